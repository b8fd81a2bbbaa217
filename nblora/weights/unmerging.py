"""Take adapters out of a checkpoint again: bit by bit from the kept originals, else by subtraction."""

import contextlib
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from nblora.errors import FormatError
from nblora.formats.model_files import ModelFiles, is_plain_name, open_model
from nblora.kernels.weights.blocks import spacing_block
from nblora.kernels.weights.codes import CODES
from nblora.storage.safetensors_reader import SafetensorsFile, parse_header
from nblora.weights.merging import (
    DEFAULT_MEMORY,
    AdapterSpec,
    PathLike,
    adapter_files,
    byte_counter,
    open_adapters,
    stored_dtype,
)
from nblora.weights.originals import check_digests, originals_path, read_record
from nblora.weights.output import OutputShard, Placed, build_index, lay_out
from nblora.weights.plan import Plan, WeightedAdapter, make_plan
from nblora.weights.report import MergeReport
from nblora.weights.sizes import parse_size
from nblora.weights.stream import Block, Change, Stream
from nblora.weights.writer import CheckpointWriter


@contextlib.contextmanager
def open_originals(model: ModelFiles, path: PathLike | None = None) -> Iterator[SafetensorsFile | None]:
    """Open the originals that `merge(keep_original=True)` left beside a checkpoint; None where it left none.

    Parameters
    ----------
    model : ModelFiles
        The merged checkpoint.
    path : path-like, optional
        The file of originals, where it is not in its place.
    """
    place = Path(path) if path else originals_path(model.folder if model.is_folder else model.path, model.is_folder)
    if path is None and not os.path.lexists(place):
        yield None
        return
    with SafetensorsFile(place) as file:
        yield file


def unmerge(
    checkpoint: PathLike,
    output: PathLike,
    adapters: AdapterSpec | Sequence[AdapterSpec] = (),
    *,
    originals: PathLike | None = None,
    dtype: str | None = None,
    max_memory: int | str = DEFAULT_MEMORY,
    maps: Iterable[str] = (),
    dry_run: bool = False,
    force: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> MergeReport:
    """Write a checkpoint without the adapters that were merged into it.

    Where the originals were kept the result is the base, bit for bit, and no adapter is needed. Otherwise each
    adapter's change is subtracted; what the merge rounded away stays lost, and the report bounds how far off that is.

    Parameters
    ----------
    checkpoint : path-like
        A merged checkpoint, of any form that `merge` writes.
    output : path-like
        Where the result goes.
    adapters : path-like, (path-like, float), or a sequence of these
        What was merged, with the same weights. Not needed where the originals were kept.
    originals : path-like, optional
        The file of originals, if it is not beside the checkpoint.
    dtype, max_memory, maps, dry_run, force, threads, progress
        As for `merge`; `dtype` and `maps` for a subtraction only.

    Returns
    -------
    MergeReport
        `exact` tells which way was taken, `off_by` how far off a subtraction may be.

    Raises
    ------
    FormatError
        If a file is broken or does not fit, or an adapter cannot be subtracted (DoRA, whole tensors).
    ValueError
        If there are neither originals nor adapters, or an argument is out of range.
    OSError
        If a file cannot be read or the output cannot be written.
    """
    began = time.perf_counter()
    limit = parse_size(max_memory, "max_memory")
    listed = [adapters] if isinstance(adapters, (str, os.PathLike)) else adapters
    with open_model(checkpoint) as model, open_originals(model, originals) as kept:
        if kept is not None:
            report = _restore(model, kept, Path(output), limit, dry_run, force, threads, progress)
        elif listed:
            with open_adapters(listed) as opened:
                stored = stored_dtype(dtype)
                report = _subtract(model, opened, Path(output), stored, limit, maps, dry_run, force, threads, progress)
        else:
            raise ValueError(
                f"{checkpoint} has no originals beside it (merge --keep-original stores them); "
                "name the adapters that were merged to subtract them"
            )
    report.seconds = time.perf_counter() - began
    return report


def _restore(
    model: ModelFiles,
    kept: SafetensorsFile,
    output: Path,
    limit: int,
    dry_run: bool,
    force: bool,
    threads: int | None,
    progress: Callable[[int, int], object] | None,
) -> MergeReport:
    record = read_record(kept)
    check_digests(kept, record)
    shards = [_original_shard(model, kept, name, text) for name, text in record["headers"].items()]
    placed = Counter(each.info.name for shard in shards for each in shard.tensors)
    for name in kept.tensors:
        if placed[name] != 1:
            places = f"{placed[name]} places in the base's files, not one"
            raise FormatError(f"{kept.path}: the original of {name} has {places}")
    index, config = record["index"], record["config_text"]
    if index is not None and not is_plain_name(index):
        raise FormatError(f"{kept.path}: holds no usable record of the base's files")
    writer = CheckpointWriter(
        model,
        shards,
        {},
        output,
        index=(index, record["index_text"].encode()) if index else None,
        texts={} if config is None else {"config.json": config.encode()},
    )
    writer.check([model.path, *model.inputs, kept.path], force)
    report = MergeReport(str(output), [], writer.copied - len(kept.tensors), writer.nbytes, dry_run=dry_run)
    report.exact, report.restored = True, sorted(kept.tensors)
    if not dry_run:
        with Stream(limit, threads, byte_counter(progress, writer.total)) as stream:
            writer.write(stream)
    return report


def _original_shard(model: ModelFiles, kept: SafetensorsFile, name: str, text: object) -> OutputShard:
    """A shard of the base: its header as it was, its tensors from the originals or, unchanged, from here."""
    if not isinstance(text, str) or not is_plain_name(name):
        raise FormatError(f"{kept.path}: holds no usable record of the base's files")
    header = len(text.encode()).to_bytes(8, "little") + text.encode()
    tensors = model.tensors | {other: (kept, info) for other, info in kept.tensors.items()}
    placed = []
    _, infos = parse_header(header, kept.path)
    for info in infos.values():
        file, found = tensors.get(info.name, (None, None))
        if file is None or found is None or (found.dtype, found.shape) != (info.dtype, info.shape):
            raise FormatError(f"{kept.path}: does not belong to {model.path}: {info.name} is not what it was")
        placed.append(Placed(file, found, found.dtype, info.start))
    end = max((info.stop for info in infos.values()), default=len(header))
    return OutputShard(name, header, placed, end)


def _subtract(
    model: ModelFiles,
    adapters: list[WeightedAdapter],
    output: Path,
    dtype: str | None,
    limit: int,
    maps: Iterable[str],
    dry_run: bool,
    force: bool,
    threads: int | None,
    progress: Callable[[int, int], object] | None,
) -> MergeReport:
    plan = make_plan(model, adapters, maps)
    _negate(plan)
    shards = lay_out(model, dtype)
    writer = CheckpointWriter(model, shards, plan.recipes, output, index=build_index(model, shards), measure=_spacings)
    writer.check([model.path, *model.inputs, *adapter_files(adapters)], force)
    report = MergeReport(
        str(output), [], writer.copied, writer.nbytes, dry_run=dry_run, warnings=plan.warnings, exact=False
    )
    changes: dict[str, Change] = {}
    if not dry_run:
        with Stream(limit, threads, byte_counter(progress, writer.total)) as stream:
            changes = writer.write(stream)
        measured = np.array([part for change in changes.values() for part in change.measured]).reshape(-1, 3)
        report.off_by = float(measured[:, 1].max(initial=0))
        # Rounding errors are spread evenly over a spacing, which gives them a variance of a twelfth of its square.
        report.off_by_rms = math.sqrt(measured[:, 0].sum() / 12 / max(measured[:, 2].sum(), 1))
    report.tensors = writer.reports(changes, plan.ties)
    return report


def _spacings(block: Block, placed: Placed) -> np.ndarray:
    """Σ u² over the old and the new numbers, the bound (u + u') / 2 on what two roundings did, and the entries."""
    old_squares, old_largest = spacing_block(block.old, CODES[placed.info.dtype])
    new_squares, new_largest = spacing_block(block.new, CODES[placed.dtype])
    count = (block.rows[1] - block.rows[0]) * (block.columns[1] - block.columns[0])
    return np.array([old_squares + new_squares, (old_largest + new_largest) / 2, count])


def _negate(plan: Plan) -> None:
    for name, recipe in plan.recipes.items():
        if recipe.replacement:
            raise FormatError(
                f"{recipe.replaced_by} replaced {name} whole; what it was cannot be computed. Only the originals that "
                "merge --keep-original stores bring it back"
            )
        if recipe.dora:
            raise FormatError(
                f"{recipe.dora.label} is a DoRA adapter: merging scaled {name} to new norms and the old ones are lost. "
                "Only the originals that merge --keep-original stores bring it back"
            )
        recipe.terms = [replace(term, scale=-term.scale) for term in recipe.terms]
