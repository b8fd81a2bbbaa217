"""Write the tables of machine code into docs/gpu-proofs.md: `python -m tests.cuda.write_table`."""

import re
from pathlib import Path

from tests.cuda import rows as operations
from tests.cuda.machine_code import ARCHITECTURES, compile_kernel
from tests.cuda.recorded import launched, record, recording_backend
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


ROW_HEAD = (
    "| kernel | arithmetic | threads | registers, sm 75, 80, 90, 100, 120 | shared, bytes | stack | LDL/STL | "
    "loads of 128 bits | stores |\n" + "|---" * 2 + "|---:" * 7 + "|\n"
)


def rows_of_rows():
    """Of operations on rows, what all architectures have in common but the registers."""
    for dtype in ("float32", "float64"):
        backend = recording_backend()
        backend._device.launches.clear()
        operations.run_everything(backend, dtype, 40, 768)
        seen = set()
        for name, kernel, threads, types in launched(backend):
            if name in seen:
                continue
            seen.add(name)
            found = [compile_kernel(kernel, types, architecture, "ltoir") for architecture in ARCHITECTURES]
            registers = ", ".join(str(code.registers) for code in found)
            shared, stack, spilled = (
                max(figures)
                for figures in zip(*((c.shared, c.stack, c.count("LDL") + c.count("STL")) for c in found), strict=True)
            )
            loads, stores = (min(operations.vectors(code, what) for code in found) for what in ("LD", "ST"))
            figures = name, dtype, threads, registers, shared, stack, spilled, loads, stores
            yield f"| {' | '.join(map(str, figures))} |\n"


def main():
    text = PAGE.read_text()
    for title, table in (("machine code", HEAD + "".join(rows())), ("rows", ROW_HEAD + "".join(rows_of_rows()))):
        begin, end = f"<!-- {title}: begin -->\n", f"<!-- {title}: end -->"
        text = re.sub(f"{begin}.*?{end}", lambda _, whole=begin + table + end: whole, text, flags=re.S)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
