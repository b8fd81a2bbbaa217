"""`nblora bench`: nblora beside its peers on this machine."""

import math
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from nblora.bench.cases import DEVICES, DTYPES, KINDS, LAYOUTS, Case, parse_case
from nblora.bench.chart import draw_cases, draw_growth
from nblora.bench.machine import Watch, describe_machine, usable_cores
from nblora.bench.peers import BASELINE, PEERS, peers_of
from nblora.bench.rehearsal import dry_run_text, rehearse
from nblora.bench.report import Report, check_markers, replace_between_markers, write_text
from nblora.bench.runner import Bench, Effort, run_cases
from nblora.bench.sections import growth, memory, neighbour, startup
from nblora.bench.suites import Group, chosen, default, full, narrowed, on_device, quick
from nblora.bench.tables import docs_text, full_text, readme_text
from nblora.errors import DeviceUnavailableError, MissingExtraError

SECTIONS = ("cases", "startup", "memory", "growth", "neighbour")
# Memory is the host's, and a busy neighbour one on the host's cores.
DEVICE_SECTIONS = ("cases", "startup", "growth")
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


def _device(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if not re.fullmatch(DEVICES, value):
        raise click.BadParameter(f"must be cpu, cuda or cuda:N, got {value!r}")
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
@click.option("--device", default="cpu", show_default=True, callback=_device, metavar="NAME", help="cpu, cuda, cuda:N.")
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
@click.option("--dry-run", is_flag=True, help="Say what would be measured, with peers started and checked; no times.")
@click.option(
    "--update-readme",
    type=MARKED,
    callback=_marked,
    help="File whose short table is replaced, this processor's.",
)
@click.option("--update-docs", type=MARKED, callback=_marked, help="The same of the long tables.")
def command(suite: str | None, **options: Any) -> None:
    """Compare nblora with what you would use instead, on this machine.

    Every peer runs in a process of its own, on the same arrays with the same number of threads. Its results are
    compared with a float64 reference first: a wrong peer is reported and not timed. Peers then take turns in rounds,
    and ratios are taken pair by pair. How fast the machine can multiply and copy is measured in the same run, and
    every time is also given as a fraction of that limit. Peers that are not installed are skipped, saying so.

    With --device cuda everything runs on a GPU: peers are PyTorch (eager, by hand, compiled) and CuPy, times are taken
    between events of the device, and its limits are measured on it. Memory and the busy neighbour, which are the
    host's, are left out.

    Without options: the published tables. With --case: these sizes only, in all combinations of --kind, --dtype,
    --layout and --threads.
    """
    begin = time.monotonic()
    name = suite or "default"
    kept = [option for option in ("update_docs", "update_readme") if options[option]]
    groups, sections = _groups(name, options), _sections(name, options)
    effort = replace(EFFORTS[name], rounds=options["rounds"] or EFFORTS[name].rounds)
    problem = _device_problem(options["device"])
    if problem and not options["dry_run"]:
        raise DeviceUnavailableError(
            f"device {options['device']!r} is not available: {problem}; --dry-run shows what would be measured"
        )
    bench = _bench(name, options, effort, begin)
    if options["dry_run"]:
        found = rehearse(bench, groups)
        click.echo(dry_run_text(bench, groups, sections, problem, found))
        raise SystemExit(any(outcome.failed for outcome in found.values()))
    report = Report("chosen cases" if options["cases"] else name, bench, describe_machine(), groups, sections)
    if kept:
        _refuse_busy(report)
    elif report.busy:
        bench.say(f"WARNING: {report.busy}")
    output: Path = options["output"]
    output.mkdir(parents=True, exist_ok=True)
    watch = Watch()
    _measure(report, name, options["threads"])
    report.machine |= {**watch.shares(), "device": bench.device_description}
    _write(report, output)
    click.echo(f"{time.monotonic() - begin:.0f} s; written to {output}")
    if kept:
        _refuse_busy(report)
    for option, text in (("update_readme", readme_text), ("update_docs", docs_text)):
        if option in kept:
            replace_between_markers(options[option], report.machine["processor"], text(report))


def _refuse_busy(report: Report) -> None:
    """End where the machine has other work: a table that is kept must hold for a quiet one."""
    if report.busy:
        raise click.ClickException(
            f"{report.busy}: no table was replaced. Wait until it is quiet (its load is the last minute's average), "
            "or run without --update-docs and --update-readme"
        )


def _sections(name: str, options: dict[str, Any]) -> tuple[str, ...]:
    known: tuple[str, ...] = SECTIONS if options["device"] == "cpu" else DEVICE_SECTIONS
    if not set(options["sections"]) <= set(known):
        raise click.UsageError(f"on {options['device']} the sections are {', '.join(known)}")
    if options["cases"]:
        known = ("cases",)
    elif name == "quick":
        known = ("cases", "startup")
    return options["sections"] or known


def _device_problem(device: str) -> str | None:
    """What keeps the device from being used here; None where nothing does."""
    if device == "cpu":
        return None
    from nblora.backends import cuda_problem, devices

    problem = cuda_problem()
    known = devices()
    if problem is None and (device if ":" in device else f"{device}:0") not in known:
        problem = f"there are only {', '.join(known)}"
    return problem


def _groups(name: str, options: dict[str, Any]) -> list[Group]:
    settings = {"kind": options["kinds"], "dtype": options["dtypes"], "layout": options["layouts"]}
    threads, device = options["threads"], options["device"]
    if options["cases"]:
        return chosen(options["cases"], **settings, threads=threads or [usable_cores()], device=device)
    groups = SUITES[name](usable_cores())
    if device != "cpu":
        groups = on_device(groups, device, usable_cores(), large=name != "quick")
    groups = narrowed(groups, settings, threads)
    if not groups:
        raise click.UsageError(
            f"no case of the {name} suite is left by --kind, --dtype and --layout; try --full or --case"
        )
    return groups


def _bench(name: str, options: dict[str, Any], effort: Effort, begin: float) -> Bench:
    peers, device = options["peers"], options["device"]
    known = peers_of(device)
    unfit = [peer for peer in peers if peer not in known]
    if unfit:
        raise click.UsageError(f"{', '.join(unfit)}: not on {device}; there are {', '.join(known)}")
    left_out = QUICK_LEAVES_OUT if name == "quick" and not peers else {}
    wanted = {BASELINE, *(peers or known.keys() - left_out.keys())}
    bench = Bench(
        {peer: spec for peer, spec in known.items() if peer in wanted},
        effort,
        lambda line: click.echo(line, err=True),
        options["python"],
        begin + QUICK_SECONDS if name == "quick" else math.inf,
        device,
    )
    for peer, why in left_out.items():
        bench.say(f"skipping {peer}: {why}")
        bench.skipped[peer] = why
    return bench


def _measure(report: Report, name: str, threads: list[int]) -> None:
    bench, sections = report.bench, report.sections
    most, quick = max(threads, default=usable_cores()), name == "quick"
    if "cases" in sections:
        report.results = run_cases(bench, [case for group in report.groups for case in group.cases])
    if "startup" in sections:
        report.startup = startup(bench, most, 1 if quick else 5, not quick, (8, 768, 768))
    if "memory" in sections:
        report.memory = memory(bench, most, (64, 1024, 1024) if quick else (64, 4096, 4096))
    if "growth" in sections:
        report.growth = growth(bench, most, name == "full")
    if "neighbour" in sections:
        report.neighbour = neighbour(bench, Case("step", 256, 1024, 1024, threads=most))


def _write(report: Report, output: Path) -> None:
    click.echo(full_text(report, quartiles=False))
    write_text(output / "results.json", report.to_json())
    write_text(output / "results.csv", report.to_csv())
    write_text(output / "report.md", full_text(report))
    try:
        draw_cases(report, output / "cases.png")
        draw_growth(report, output / "growth.png")
    except MissingExtraError as error:
        click.echo(f"no charts: {error}", err=True)
