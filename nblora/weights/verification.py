"""Does a checkpoint contain an adapter? The merge is done again, in memory, and its bits are compared."""

import contextlib
import enum
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from nblora.formats.model_files import ModelFiles, open_model
from nblora.kernels.weights.blocks import compare_block
from nblora.kernels.weights.codes import CODES, DIFFERS, DOT, GAP, MOVED, SQUARES, STEPS
from nblora.storage.dtypes import FLOATS
from nblora.storage.safetensors_reader import SafetensorsFile, TensorInfo
from nblora.weights.merging import DEFAULT_MEMORY, AdapterSpec, PathLike, open_adapters
from nblora.weights.plan import Plan, Recipe, make_plan
from nblora.weights.report import plain
from nblora.weights.sizes import parse_size
from nblora.weights.stream import Block, Change, Matrix, Stream
from nblora.weights.unmerging import open_originals

_NEAR = 0.05


class Verdict(enum.Enum):
    """The answer of `verify`; its value is the command's exit code (2 stands for files that cannot be read)."""

    YES = 0
    NO = 1
    INCONCLUSIVE = 3


@dataclass(frozen=True)
class TensorVerdict:
    """What one tensor says.

    Attributes
    ----------
    name : str
    finding : str
        "exact" (bit by bit what the merge gives), "same" (the merge changes no bit of it), "near" (not bit by bit, but
        the change is there), "absent" (as in the base), "different", "missing" or "misshapen".
    differing : int
        Entries whose bits differ from the replay.
    contained : float
        ⟨C − W, M − W⟩ / ‖M − W‖² of the checkpoint C, the base W and the replay M: 1 where the change is there, 0 where
        it is not; NaN where the merge changes nothing.
    furthest, furthest_steps : float
        The largest difference, and in spacings of the stored type.
    """

    name: str
    finding: str
    differing: int = 0
    contained: float = float("nan")
    furthest: float = 0.0
    furthest_steps: float = 0.0


@dataclass
class VerifyReport:
    """The answer of `verify`, the reason for it, and what every tensor says."""

    verdict: Verdict
    reason: str
    tensors: list[TensorVerdict]

    @property
    def exit_code(self) -> int:
        """0 yes, 1 no, 3 inconclusive."""
        return self.verdict.value

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        tensors = [asdict(tensor) for tensor in self.tensors]
        verdict = self.verdict.name.lower()
        return plain({"verdict": verdict, "exit_code": self.exit_code, "reason": self.reason, "tensors": tensors})

    def table(self) -> str:
        """Return the report as text."""
        width = max([len(tensor.name) for tensor in self.tensors] + [6])
        lines = [f"{'tensor':<{width}}  {'finding':<9}  {'differing':>9}  {'contained':>9}  furthest"]
        lines += [
            f"{each.name:<{width}}  {each.finding:<9}  {each.differing:>9}  {each.contained:>9.4f}  "
            f"{each.furthest:.3g} ({each.furthest_steps:.3g} steps)"
            for each in self.tensors
        ]
        return "\n".join([*lines, f"{self.verdict.name.lower()}: {self.reason}"])


def verify(
    checkpoint: PathLike,
    adapters: AdapterSpec | Sequence[AdapterSpec],
    base: PathLike | None = None,
    *,
    maps: Iterable[str] = (),
    max_memory: int | str = DEFAULT_MEMORY,
    threads: int | None = None,
) -> VerifyReport:
    """Tell whether a checkpoint is its base with these adapters merged, by merging again and comparing bits.

    Parameters
    ----------
    checkpoint : path-like
        What is in question.
    adapters : path-like, (path-like, float), or a sequence of these
        All that are said to be merged, with their weights.
    base : path-like, optional
        The checkpoint they were merged into. Without it the originals that `merge(keep_original=True)` left beside
        `checkpoint` are used; without these the answer is inconclusive.
    maps, max_memory, threads
        As for `merge`.

    Returns
    -------
    VerifyReport
        YES if every tensor that the adapters change is bit by bit what the merge gives, NO if one is not (as in the
        base, or something else), INCONCLUSIVE if there is no base, if the adapters change no bit, or if the change is
        there but not bit by bit (merged by other software, or something else was merged too).

    Raises
    ------
    FormatError, OSError
        If a file is broken, does not fit or cannot be read.
    ValueError
        If an argument is out of range.
    """
    limit = parse_size(max_memory, "max_memory")
    with open_model(checkpoint) as model, open_adapters(adapters) as opened, _open_base(model, base) as before:
        if before is None:
            make_plan(model, opened, maps)
            reason = "without the base or the originals that merge --keep-original stores nothing can be replayed"
            return VerifyReport(Verdict.INCONCLUSIVE, reason, [])
        plan = make_plan(before, opened, maps)
        with Stream(limit, threads) as stream:
            tensors = _replay(stream, before, model, plan)
    return VerifyReport(*_judge(tensors), tensors)


@contextlib.contextmanager
def _open_base(model: ModelFiles, base: PathLike | None) -> Iterator[ModelFiles | None]:
    if base is not None:
        with open_model(os.fspath(base)) as before:
            yield before
        return
    with open_originals(model) as kept:
        yield None if kept is None else replace(model, overlay=kept)


def _replay(stream: Stream, before: ModelFiles, after: ModelFiles, plan: Plan) -> list[TensorVerdict]:
    verdicts: dict[str, TensorVerdict] = {}
    changes: dict[str, Change] = {}
    old, new = before.tensors, after.tensors
    for name, recipe in plan.recipes.items():
        if name not in new:
            verdicts[name] = TensorVerdict(name, "missing")
        elif new[name][1].shape != old[name][1].shape or new[name][1].dtype not in FLOATS:
            verdicts[name] = TensorVerdict(name, "misshapen")
        else:
            changes[name] = _compare(stream, recipe, old[name], new[name])
    stream.wait()
    for name, change in changes.items():
        verdicts[name] = _finding(name, np.array(change.measured).reshape(-1, 6))
    return [verdicts[name] for name in old if name in verdicts]


def _compare(
    stream: Stream, recipe: Recipe, old: tuple[SafetensorsFile, TensorInfo], new: tuple[SafetensorsFile, TensorInfo]
) -> Change:
    base, candidate = (Matrix(file, info, recipe.rows, recipe.columns) for file, info in (old, new))

    def finish(block: Block, base: Matrix, candidate: Matrix) -> np.ndarray:
        measured = np.zeros(6)
        actual = candidate.read(block.spare, block.rows, block.columns)
        code = CODES[candidate.info.dtype]
        compare_block(block.old, CODES[base.info.dtype], block.new, actual, code, measured)
        return measured

    bound = functools.partial(finish, base=base, candidate=candidate)
    return stream.merge(base, recipe, candidate.info.dtype, bound)


def _finding(name: str, measured: np.ndarray) -> TensorVerdict:
    sums, peaks = measured[:, :GAP].sum(axis=0), measured[:, GAP:].max(axis=0, initial=0)
    differing, moved = int(sums[DIFFERS]), int(sums[MOVED])
    contained = sums[DOT] / sums[SQUARES] if sums[SQUARES] else float("nan")
    if differing == 0:
        finding = "exact" if moved else "same"
    elif moved == 0:
        finding = "absent"
    else:
        finding = "near" if abs(contained - 1) <= _NEAR else "different"
    return TensorVerdict(name, finding, differing, float(contained), float(peaks[0]), float(peaks[STEPS - GAP]))


def _judge(tensors: Sequence[TensorVerdict]) -> tuple[Verdict, str]:
    found = {finding: sum(tensor.finding == finding for tensor in tensors) for finding in {t.finding for t in tensors}}
    refuting = [finding for finding in ("missing", "misshapen", "different", "absent") if finding in found]
    if refuting:
        listed = ", ".join(f"{found[finding]} {finding}" for finding in refuting)
        return Verdict.NO, f"of {len(tensors)} tensors that the adapters change {listed}"
    if "near" in found:
        return Verdict.INCONCLUSIVE, (
            f"the change is there, but {found['near']} of {len(tensors)} tensors are not bit by bit what this merge "
            "gives: merged by other software, or together with something else"
        )
    if "exact" in found:
        return Verdict.YES, f"{found['exact']} tensors are bit by bit what the merge gives"
    return Verdict.INCONCLUSIVE, "the adapters change no bit of this checkpoint, merged or not"
