"""`nblora bench`: nblora beside its peers on this machine."""

import sys
import time
from pathlib import Path
from typing import Any

import click

from nblora.bench.cases import DTYPES, KINDS, LAYOUTS, Case, parse_case
from nblora.bench.chart import draw_cases, draw_growth
from nblora.bench.machine import describe_machine, usable_cores
from nblora.bench.peers import BASELINE, PEERS
from nblora.bench.report import Report, check_markers, replace_between_markers, write_text
from nblora.bench.runner import Bench, Effort, run_cases
from nblora.bench.sections import growth, memory, neighbour, startup
from nblora.bench.suites import Group, chosen, default, full, narrowed, quick
from nblora.bench.tables import full_text, readme_text
from nblora.errors import MissingExtraError

SECTIONS = ("cases", "startup", "memory", "growth", "neighbour")
QUICK_SECONDS = 85.0  # no new case after this, so that all ends within two minutes
QUICK_LEAVES_OUT = {"torch-compile": "compiling for every case takes too long for --quick; name it with --peer"}
EFFORTS = {"quick": Effort(15, 0.02, 0.1, 0.2), "default": Effort(), "full": Effort()}
SUITES = {"quick": quick, "default": default, "full": full}


def _threads(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[int]:
    counts = []
    for value in values:
        if value != "all" and not (value.isdecimal() and int(value) >= 1):
            raise click.BadParameter(f"{value!r} is neither 'all' nor a number of threads from 1")
        counts.append(usable_cores() if value == "all" else int(value))
    if max(counts, default=1) > usable_cores():
        raise click.BadParameter(f"this process may use {usable_cores()} cores, got {max(counts)} threads")
    return list(dict.fromkeys(counts))


def _case(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[tuple[int, ...]]:
    try:
        return [parse_case(value) for value in values]
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _marked(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Refuse a file without markers before hours of measuring, not after."""
    if value is not None:
        try:
            check_markers(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return value


MARKED = click.Path(exists=True, dir_okay=False, writable=True)


@click.command(name="bench")
@click.option("--quick", "suite", flag_value="quick", help="A look in under two minutes.")
@click.option("--full", "suite", flag_value="full", help="Every shape, rank, dtype and layout: many hours.")
@click.option("--peer", "peers", multiple=True, type=click.Choice(list(PEERS)), help="Only these peers (and nblora).")
@click.option("--case", "cases", multiple=True, callback=_case, metavar="N,IN,OUT[,RANK]", help="These sizes instead.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), help="Only these kinds of case.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="Only these dtypes.")
@click.option("--layout", "layouts", multiple=True, type=click.Choice(LAYOUTS), help="Only these weight layouts.")
@click.option("--threads", multiple=True, callback=_threads, metavar="N|all", help="Numbers of threads.")
@click.option("--rounds", type=click.IntRange(1), help="Rounds of each case; 15 where not given.")
@click.option("--section", "sections", multiple=True, type=click.Choice(SECTIONS), help="Only these parts.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("nblora-bench"),
    show_default=True,
    help="Folder for report.md, results.json, results.csv and the charts.",
)
@click.option(
    "--python",
    type=click.Path(exists=True, dir_okay=False),
    default=sys.executable,
    help="Interpreter of the other peers, where they are installed elsewhere.",
)
@click.option("--update-readme", type=MARKED, callback=_marked, help="File whose short table is replaced.")
@click.option("--update-docs", type=MARKED, callback=_marked, help="File whose long tables are replaced.")
def command(suite: str | None, **options: Any) -> None:
    """Compare nblora with what you would use instead, on this machine.

    Every peer runs in a process of its own, on the same arrays with the same number of threads. Its results are
    compared with a float64 reference first: a wrong peer is reported and not timed. Peers then take turns in rounds,
    and ratios are taken pair by pair. How fast the machine can multiply and copy is measured in the same run, and
    every time is also given as a fraction of that limit. Peers that are not installed are skipped, saying so.

    Without options: the published tables. With --case: these sizes only, in all combinations of --kind, --dtype,
    --layout and --threads.
    """
    begin = time.monotonic()
    name = suite or "default"
    groups = _groups(name, options)
    sections = options["sections"] or (("cases",) if options["cases"] else SECTIONS)
    if name == "quick" and not options["sections"]:
        sections = tuple(part for part in sections if part in ("cases", "startup"))
    effort = EFFORTS[name]
    if options["rounds"]:
        effort = Effort(options["rounds"], effort.burst, effort.warm, effort.rates)
    bench = _bench(name, options["peers"], effort, options["python"], begin)
    output: Path = options["output"]
    output.mkdir(parents=True, exist_ok=True)
    report = Report(
        suite="chosen cases" if options["cases"] else name,
        machine=describe_machine(),
        settings={
            "rounds": effort.rounds,
            "burst": effort.burst,
            "warm": effort.warm,
            "sections": list(sections),
        },
        peers={peer: spec.about for peer, spec in bench.peers.items()},
        groups=groups,
    )
    if report.busy:
        bench.say(f"WARNING: {report.busy}")
    _measure(report, bench, name, sections, options["threads"])
    _write(report, output, options)
    click.echo(f"{time.monotonic() - begin:.0f} s; written to {output}")


def _groups(name: str, options: dict[str, Any]) -> list[Group]:
    filters = options["kinds"], options["dtypes"], options["layouts"]
    threads = options["threads"]
    if options["cases"]:
        return chosen(options["cases"], *filters, threads or [usable_cores()])
    groups = narrowed(SUITES[name], *filters, threads, usable_cores())
    if not groups:
        raise click.UsageError(
            f"no case of the {name} suite is left by --kind, --dtype and --layout; try --full or --case"
        )
    return groups


def _bench(name: str, peers: tuple[str, ...], effort: Effort, python: str, begin: float) -> Bench:
    left_out = QUICK_LEAVES_OUT if name == "quick" else {}
    wanted = {
        peer: spec
        for peer, spec in PEERS.items()
        if peer == BASELINE or peer in peers or (not peers and peer not in left_out)
    }
    deadline = begin + QUICK_SECONDS if name == "quick" else None
    bench = Bench(wanted, effort, python, sys.executable, lambda line: click.echo(line, err=True), deadline)
    if not peers:
        for peer, why in left_out.items():
            bench.say(f"skipping {peer}: {why}")
            bench.skipped[peer] = why
    return bench


def _measure(report: Report, bench: Bench, name: str, sections: tuple[str, ...], threads: list[int]) -> None:
    most = max(threads, default=usable_cores())
    if "cases" in sections:
        report.results = run_cases(bench, [case for group in report.groups for case in group.cases])
    if "startup" in sections:
        report.startup = startup(bench, most, *((1, False) if name == "quick" else (5, True)), (8, 768, 768))
    if "memory" in sections:
        report.memory = memory(bench, most, (64, 1024, 1024) if name == "quick" else (64, 4096, 4096))
    if "growth" in sections:
        report.growth = growth(bench, most, name == "full")
    if "neighbour" in sections:
        report.neighbour = neighbour(bench, Case("step", 256, 1024, 1024, threads=most))
    report.versions, report.skipped, report.machines = bench.versions, bench.skipped, bench.machines


def _write(report: Report, output: Path, options: dict[str, Any]) -> None:
    text = full_text(report)
    click.echo(full_text(report, quartiles=False))
    write_text(output / "results.json", report.to_json())
    write_text(output / "results.csv", report.to_csv())
    write_text(output / "report.md", text)
    try:
        draw_cases(report, output / "cases.png")
        draw_growth(report, output / "growth.png")
    except MissingExtraError as error:
        click.echo(f"no charts: {error}", err=True)
    if options["update_readme"]:
        replace_between_markers(options["update_readme"], readme_text(report))
    if options["update_docs"]:
        replace_between_markers(options["update_docs"], full_text(report, heading="###"))
