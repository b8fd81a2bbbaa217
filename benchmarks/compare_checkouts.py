"""Did nblora get slower? Two checkouts in turn: `python benchmarks/compare_checkouts.py OLD NEW --rounds 5`.

Each round runs `nblora bench --quick --peer nblora` of both checkouts, the order turning from round to round, each in
processes of its own that import nblora from the checkout's folder, or with an interpreter of its own. A round gives one
ratio of medians a case, new over old; what is printed is their geometric mean with its 95 % interval (Student's t over
the rounds), and a line for every case whose interval lies wholly beyond 3 %. It ends with 1 where a case is slower.

What follows `--` replaces `--quick`: `... OLD NEW -- --case 8,16,16,2 --kind step` compares that case alone.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from scipy import stats

LEVEL = 0.95
BEYOND = 0.03
COMMAND = "from nblora.cli import main; main()"


def measure(checkout: Path, python: str, arguments: Sequence[str]) -> dict[str, float]:
    """Run the benchmark of a checkout: nblora's median seconds of each case."""
    with tempfile.TemporaryDirectory(prefix="nblora-compare-") as folder:
        fixed = ["bench", "--peer", "nblora", "--section", "cases", "--output", folder]
        environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}
        done = subprocess.run(
            [python, "-c", COMMAND, *fixed, *arguments], cwd=folder, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise click.ClickException(f"the benchmark of {checkout} failed:\n{done.stdout}{done.stderr}")
        content = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
    results = [result for group in content["groups"] for result in group["results"]]
    return {
        label(r["case"]): r["peers"]["nblora"]["seconds"]["median"]
        for r in results
        if "seconds" in r["peers"]["nblora"]
    }


def label(case: dict[str, Any]) -> str:
    """A case's name."""
    sizes = f"{case['n']} × {case['in_features']} × {case['out_features']}, r {case['rank']}"
    return f"{case['kind']} {sizes}, {case['dtype']}, {case['layout']}, {case['threads']}t"


def interval(old: Sequence[float], new: Sequence[float]) -> tuple[float, float, float]:
    """The geometric mean of new over old, pair by pair, and its interval."""
    logs = np.log(np.divide(new, old))
    reach = stats.t.ppf(0.5 + LEVEL / 2, len(logs) - 1) * stats.sem(logs)
    low, middle, high = np.exp([logs.mean() - reach, logs.mean(), logs.mean() + reach]).tolist()
    return middle, low, high


def report(old: Sequence[dict[str, float]], new: Sequence[dict[str, float]]) -> tuple[list[str], bool]:
    """The lines to print, and whether a case is slower; `old` and `new` hold the seconds of each round's cases."""
    lines, beyond = [], []
    slower = False
    for case in dict.fromkeys(name for found in (*old, *new) for name in found):
        if not all(case in found for found in (*old, *new)):
            lines.append(f"{case}: not in every run, not compared")
            continue
        seconds = [[found[case] for found in side] for side in (old, new)]
        middle, low, high = interval(*seconds)
        before, after = (1e3 * np.median(side) for side in seconds)
        lines.append(f"{case}: {before:.3f} ms, then {after:.3f} ms: {middle:.3f} ({low:.3f} to {high:.3f})")
        if low > 1 + BEYOND or high < 1 - BEYOND:
            beyond.append(f"{'SLOWER' if low > 1 else 'faster'}: {case}, {middle:.3f} ({low:.3f} to {high:.3f})")
            slower |= low > 1
    return [*lines, *(beyond or [f"No case lies wholly beyond {BEYOND:.0%}."])], slower


FOLDER = click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path)
PYTHON = click.Path(exists=True, dir_okay=False)


@click.command(help=__doc__.partition("\n")[0])
@click.argument("old", type=FOLDER)
@click.argument("new", type=FOLDER)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--rounds", type=click.IntRange(2), default=5, show_default=True, help="Runs of each checkout.")
@click.option("--old-python", type=PYTHON, default=sys.executable, help="Interpreter of OLD; this one where not given.")
@click.option("--new-python", type=PYTHON, default=sys.executable, help="Interpreter of NEW; this one where not given.")
def main(old: Path, new: Path, arguments: tuple[str, ...], rounds: int, old_python: str, new_python: str) -> None:
    sides = {"old": (old, old_python), "new": (new, new_python)}
    found: dict[str, list[dict[str, float]]] = {"old": [], "new": []}
    asked = arguments or ("--quick",)
    for side, where in sides.items():  # compiles what is not in the cache
        click.echo(f"{side}: {where[0]}, a first run that does not count", err=True)
        measure(*where, [*asked, "--rounds", "1"])
    for turn in range(rounds):
        for side in ("old", "new") if turn % 2 == 0 else ("new", "old"):
            click.echo(f"round {turn + 1} of {rounds}: {side}", err=True)
            found[side].append(measure(*sides[side], asked))
    lines, slower = report(found["old"], found["new"])
    click.echo("\n".join(lines))
    raise SystemExit(slower)


if __name__ == "__main__":
    main()
