"""Put the table that `nblora demo` wrote into README.md: `python docs/update_readme.py nblora-demo/results.md`."""

import sys
from pathlib import Path

BEGIN = "<!-- demo results: written by docs/update_readme.py -->\n"
END = "<!-- end of demo results -->\n"
README = Path(__file__).resolve().parent.parent / "README.md"


def with_table(readme: str, table: str) -> str:
    """Return the page with `table` between the marks, in place of what was there."""
    before, mark, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"README.md must hold the two lines {BEGIN.strip()!r} and {END.strip()!r}, in this order")
    return f"{before}{mark}{table.strip()}\n{end}{after}"


def main(arguments: list[str]) -> None:
    """Rewrite README.md with the file named by the one argument."""
    if len(arguments) != 1:
        raise SystemExit(__doc__)
    table = Path(arguments[0]).read_text(encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
