"""Which cases are measured: the quick look, the published tables, and everything; with the goals of each group."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .cases import DTYPES, KINDS, LAYOUTS, Case

SHAPES = ((384, 384), (384, 1536), (768, 768), (768, 3072), (1024, 1024), (4096, 4096), (1000, 997))
SAMPLES = (1, 8, 32, 64, 256, 2048)
RANKS = (1, 8, 64)
LIMIT = "limit"  # the key of a goal that is a fraction of the machine's limit


@dataclass(frozen=True)
class Group:
    """Cases under one heading. `goals`: the least ratio to a peer, by its name, or of the limit, under `LIMIT`."""

    name: str
    cases: tuple[Case, ...]
    goals: dict[str, float] = field(default_factory=dict)

    def label(self, case: Case) -> str:
        """The case's sizes, and of its other settings those in which the group's cases differ."""
        settings = ("kind", "dtype", "layout", "threads")
        varied = [name for name in settings if len({getattr(other, name) for other in self.cases}) > 1]
        extra = [f"{case.threads}t" if name == "threads" else str(getattr(case, name)) for name in varied]
        return ", ".join([case.shape, *extra])


def _cases(
    kind: str, shapes: Iterable[tuple[int, int, int]], threads: int, dtype: str = "float32", layout: str = "dense"
) -> tuple[Case, ...]:
    return tuple(Case(kind, *shape, dtype=dtype, layout=layout, threads=threads) for shape in shapes)


def _each(samples: Iterable[int], *shapes: tuple[int, int]) -> list[tuple[int, int, int]]:
    return [(n, *shape) for shape in shapes for n in samples]


def quick(threads: int) -> list[Group]:
    """A look in under two minutes."""
    return [
        Group("step", _cases("step", [(8, 768, 768), (64, 768, 768), (256, 1024, 1024), (4, 2048, 2048)], threads)),
        Group("forward", _cases("forward", [(64, 768, 768)], threads)),
        Group("LoRA-only step", _cases("lora-step", [(32, 768, 768)], threads)),
        Group("float64 step", _cases("step", [(256, 768, 768)], threads, dtype="float64")),
    ]


def default(threads: int) -> list[Group]:
    """The published tables, with their goals."""
    large = [*_each((256,), (384, 1536), (768, 768), (1024, 1024), (4096, 4096)), (512, 768, 3072), (2048, 1024, 1024)]
    neighbours = [(64, 1000, 997), (64, 1000, 1000), (256, 1000, 997), (256, 1000, 1000)]
    flipped = [(64, 768, 768), (256, 1024, 1024), (2048, 1024, 1024), (16, 4096, 4096)]
    groups = [
        Group(
            "step, N ≥ 256",
            _cases("step", large, threads),
            {"torch-eager": 1.7, "torch-manual": 1.05, LIMIT: 0.9},
        ),
        Group(
            "step, N = 32 and 64",
            _cases("step", _each((32, 64), (768, 768), (768, 3072)), threads),
            {"torch-eager": 2.0, "torch-manual": 1.15, LIMIT: 0.65},
        ),
        Group(
            "step, N ≤ 16, 768 × 768",
            _cases("step", _each((1, 8, 16), (768, 768)), threads),
            {"torch-eager": 2.2, "torch-manual": 1.2},
        ),
        Group(
            "step, N ≤ 16, 4096 × 4096",
            _cases("step", _each((1, 8, 16), (4096, 4096)), threads),
            {"torch-eager": 3.0, "torch-manual": 2.0, LIMIT: 0.6},
        ),
        Group(
            "forward, N ≥ 32",
            _cases("forward", [*_each((32, 64, 256, 2048), (768, 768)), (256, 1024, 1024)], threads),
            {"torch-eager": 1.8, "torch-manual": 1.0},
        ),
        Group(
            "forward, N = 8 and 16",
            _cases("forward", _each((8, 16), (768, 768), (4096, 4096)), threads),
            {"torch-eager": 1.6, "torch-manual": 1.0},
        ),
        Group(
            "forward, N = 1",
            _cases("forward", _each((1,), (768, 768), (4096, 4096)), threads),
            {"torch-eager": 1.25, "torch-manual": 1.0},
        ),
        Group(
            "LoRA-only step, N ≥ 256",
            _cases("lora-step", [*_each((256, 2048), (768, 768)), (256, 1024, 1024), (512, 768, 3072)], threads),
            {"peft": 1.05},
        ),
        Group(
            "LoRA-only step, N ≤ 32",
            _cases("lora-step", [*_each((1, 8, 32), (768, 768)), (32, 1024, 1024)], threads),
            {"peft": 1.5},
        ),
        Group(
            "float64 step, N ≥ 256",
            _cases("step", [(256, 1024, 1024), (512, 768, 3072), (2048, 1024, 1024)], threads, dtype="float64"),
            {"torch-eager": 1.5, "torch-manual": 1.05, LIMIT: 0.85},
        ),
        Group("step, odd shapes and their neighbours", _cases("step", neighbours, threads)),
        Group("step, FullyConnected", _cases("step", flipped, threads, layout="fullyconnected")),
    ]
    if threads > 1:
        alone = [(8, 768, 768), (64, 768, 768), (256, 1024, 1024), (512, 768, 3072), (2048, 1024, 1024)]
        groups.append(Group("step, one thread", _cases("step", alone, 1)))
    return groups


def full(threads: int) -> list[Group]:
    """Every shape, number of samples, rank, dtype, kind and layout, with one thread too: many hours."""
    groups = default(threads)
    known = {case for group in groups for case in group.cases}
    for kind, dtype, layout, count in itertools.product(KINDS, DTYPES, LAYOUTS, sorted({threads, 1}, reverse=True)):
        sizes = itertools.product(SHAPES, SAMPLES, RANKS)
        cases = (Case(kind, n, *shape, rank, dtype, layout, count) for shape, n, rank in sizes)
        name = f"{kind}, {dtype}, {layout}, {count} thread{'s' if count > 1 else ''}"
        groups.append(Group(name, tuple(case for case in cases if case not in known)))
    return groups


def on_device(groups: Sequence[Group], device: str, threads: int, large: bool) -> list[Group]:
    """The groups' cases on a GPU: without goals, which are the CPU's, and without those for fewer host threads; with
    layers large enough to fill one where `large`."""
    found = [Group(group.name, tuple(case for case in group.cases if case.threads == threads)) for group in groups]
    if large:
        sizes = [*_each((1, 16, 128, 512, 2048), (4096, 4096)), (2048, 4096, 11008)]
        known = {case for group in found for case in group.cases}
        wide = tuple(case for case in _cases("step", sizes, threads) if case not in known)
        found.append(Group("step, large layers", wide))
    return _changed(found, lambda case: [replace(case, device=device)])


def chosen(
    cases: Sequence[tuple[int, int, int, int]],
    *,
    kind: Sequence[str] = (),
    dtype: Sequence[str] = (),
    layout: Sequence[str] = (),
    threads: Sequence[int],
    device: str = "cpu",
) -> list[Group]:
    """Return the given cases, (n, in, out, rank) each, in every combination; what is left out has its first value."""
    settings = itertools.product(kind or KINDS[:1], dtype or DTYPES[:1], layout or LAYOUTS[:1], threads, cases)
    made = (Case(of, *sizes, number, stored, count, device) for of, number, stored, count, sizes in settings)
    return [Group("chosen cases", tuple(dict.fromkeys(made)))]


def narrowed(groups: Sequence[Group], settings: Mapping[str, Sequence[str]], threads: Sequence[int]) -> list[Group]:
    """Return the cases that have one of the given values of each setting; with `threads`, each at these numbers."""

    def change(case: Case) -> list[Case]:
        if any(values and getattr(case, name) not in values for name, values in settings.items()):
            return []
        return [replace(case, threads=count) for count in threads] or [case]

    return _changed(groups, change)


def _changed(groups: Iterable[Group], change: Callable[[Case], list[Case]]) -> list[Group]:
    """Groups of what becomes of their cases, none twice; groups that have none left are left out."""
    found = (
        replace(group, cases=tuple(dict.fromkeys(new for case in group.cases for new in change(case))))
        for group in groups
    )
    return [group for group in found if group.cases]
