"""Write the table of machine code into docs/gpu-proofs.md: `python -m tests.cuda.write_table`."""

import re
from pathlib import Path

from tests.cuda.machine_code import ARCHITECTURES, compile_kernel
from tests.cuda.recorded import record, recording_backend
from tests.cuda.test_machine_code import MAIN

PAGE = Path(__file__).parents[2] / "docs" / "gpu-proofs.md"
ROWS = [("float32", "float32"), ("float32", "float64"), ("tf32", "float32"), ("bf16-base", "float32")]
HEAD = (
    "| kernel | arithmetic | sm | threads | registers | blocks an SM | shared, bytes | stack | LDL/STL | LDG.128 | "
    "LDS.128 | multiplications in the inner loop |\n" + "|---" * 2 + "|---:" * 10 + "|\n"
)


def rows():
    for precision, dtype in ROWS:
        for name, kernel, threads, types in record(recording_backend(precision), dtype, False):
            for architecture in ARCHITECTURES if name in MAIN else ():
                if precision == "tf32" and architecture < (8, 0):
                    continue
                code = compile_kernel(kernel, types, architecture, "ltoir")
                what = "HMMA" if precision == "tf32" else "FFMA" if dtype == "float32" else "DFMA"
                count, length = min(code.main_loops(what), key=lambda pair: pair[0] / pair[1])
                arithmetic = dtype if precision == "float32" else precision
                blocks = min(65536 // (code.registers * threads), 2048 // threads)
                yield (
                    f"| {name} | {arithmetic} | {architecture[0]}{architecture[1]} | {threads} | {code.registers} | "
                    f"{blocks} | {code.shared} | {code.stack} | {code.count('LDL') + code.count('STL')} | "
                    f"{code.count('LDG.E.128')} | {code.shared_vectors} | "
                    f"{count} {what} of {length} ({100 * count / length:.0f} %) |\n"
                )


def main():
    table = HEAD + "".join(rows())
    text = PAGE.read_text()
    begin, end = "<!-- machine code: begin -->\n", "<!-- machine code: end -->"
    PAGE.write_text(re.sub(f"{begin}.*?{end}", lambda _: begin + table + end, text, flags=re.S))


if __name__ == "__main__":
    main()
