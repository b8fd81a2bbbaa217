"""Merge adapters into a checkpoint, streamed: memory is bounded by what the caller allows, never by the model."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from nblora.formats.model_files import ModelFiles, open_model
from nblora.formats.peft import CONFIG_NAME, PeftAdapter
from nblora.storage.dtypes import BY_NAME
from nblora.weights.originals import originals_of
from nblora.weights.output import build_index, lay_out
from nblora.weights.plan import WeightedAdapter, make_plan
from nblora.weights.report import MergeReport
from nblora.weights.sizes import parse_size
from nblora.weights.stream import Change, Stream
from nblora.weights.writer import CheckpointWriter

DEFAULT_MEMORY = "64MiB"
PathLike = str | os.PathLike[str]
AdapterSpec = PathLike | tuple[PathLike, float]


@contextlib.contextmanager
def open_adapters(adapters: AdapterSpec | Sequence[AdapterSpec]) -> Iterator[list[WeightedAdapter]]:
    """Open one or several adapters, each a path or a pair of path and weight."""
    listed = [adapters] if isinstance(adapters, (str, os.PathLike, tuple)) else list(adapters)
    if not listed:
        raise ValueError("adapters is empty; expected at least one adapter")
    with contextlib.ExitStack() as stack:
        opened = []
        for spec in listed:
            path, weight = spec if isinstance(spec, tuple) else (spec, 1.0)
            if not math.isfinite(weight):
                raise ValueError(f"the weight of adapter {path} is {weight}; expected a finite number")
            opened.append(WeightedAdapter(stack.enter_context(PeftAdapter(path)), float(weight)))
        yield opened


def stored_dtype(dtype: str | None) -> str | None:
    """A dtype as safetensors spells it."""
    if dtype is not None and dtype not in BY_NAME:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(BY_NAME)}")
    return BY_NAME[dtype] if dtype else None


def adapter_files(adapters: Iterable[WeightedAdapter]) -> list[Path]:
    """Every file and folder that the adapters are read from."""
    return [
        path
        for weighted in adapters
        for path in (weighted.adapter.path, weighted.adapter.path / CONFIG_NAME, weighted.adapter.file.path)
    ]


def merge(
    base: PathLike,
    adapters: AdapterSpec | Sequence[AdapterSpec],
    output: PathLike,
    *,
    dtype: str | None = None,
    max_memory: int | str = DEFAULT_MEMORY,
    shard_size: int | str | None = None,
    maps: Iterable[str] = (),
    keep_original: bool = False,
    dry_run: bool = False,
    force: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> MergeReport:
    """Merge adapters into a checkpoint and write the result.

    Parameters
    ----------
    base : path-like
        A safetensors file, the index of a sharded checkpoint, or a folder that holds either.
    adapters : path-like, (path-like, float), or a sequence of these
        PEFT LoRA adapters, each with the factor that its change is multiplied by (1 where none is given).
    output : path-like
        A file for a file, a folder for a folder; what nblora wrote there before is replaced, whole or not at all. A
        merged folder takes along what lies beside the base's weights, subfolders included.
    dtype : {"float64", "float32", "float16", "bfloat16"}, optional
        What the floating-point tensors of the output are stored as; as in the base by default.
    max_memory : int or str
        Bytes (or "64MiB") for buffers and factors, at least 1 MiB.
    shard_size : int or str, optional
        Bytes (or "5GB") of a shard of the output; the base's own shards by default.
    maps : iterable of str
        `OLD=NEW` rules from parts of an adapter's names to the checkpoint's.
    keep_original : bool
        Store the tensors that change beside the output, from which `unmerge` restores the base bit by bit.
    dry_run : bool
        Match and check everything, write nothing.
    force : bool
        Replace an output that is there already, though nblora did not write it.
    threads : int, optional
        As many as Numba would use, at most 16.
    progress : callable, optional
        Called as progress(finished, total), in bytes.

    Returns
    -------
    MergeReport

    Raises
    ------
    FormatError
        If a file is broken, names or shapes do not match, or the output is an input; nothing is written then.
    ValueError
        If an argument is out of range.
    OSError
        If a file cannot be read or the output cannot be written.
    """
    began = time.perf_counter()
    stored = stored_dtype(dtype)
    limit = parse_size(max_memory, "max_memory")
    shard_limit = parse_size(shard_size, "shard_size") if shard_size is not None else None
    with open_model(base) as model, open_adapters(adapters) as opened:
        plan = make_plan(model, opened, maps)
        shards = lay_out(model, stored, shard_limit)
        texts = _retyped_config(model, dtype)
        originals = None
        if keep_original:
            old = model.config_bytes.decode(errors="replace") if texts else None
            originals = originals_of(model, shards, plan.recipes, opened, old)
        writer = CheckpointWriter(
            model, shards, plan.recipes, Path(output), build_index(model, shards), originals, texts
        )
        writer.check([model.path, *model.inputs, *adapter_files(opened)], force)
        warnings = plan.warnings + [
            f"{name}/ stays behind: it has weights of its own, which this merge does not change"
            for name in model.left_out
        ]
        report = MergeReport(str(output), [], writer.copied, writer.nbytes, dry_run=dry_run, warnings=warnings)
        changes: dict[str, Change] = {}
        if not dry_run:
            with Stream(limit, threads, byte_counter(progress, writer.total)) as stream:
                changes = writer.write(stream)
        report.tensors = writer.reports(changes, plan.ties)
    report.seconds = time.perf_counter() - began
    return report


def _retyped_config(model: ModelFiles, dtype: str | None) -> dict[str, bytes]:
    """`config.json` naming the output's dtype: else a loader would silently round the weights back to the old one."""
    keys = {"torch_dtype", "dtype"} & model.config.keys()
    if dtype is None or not keys:
        return {}
    return {"config.json": json.dumps(model.config | dict.fromkeys(keys, dtype), indent=2).encode() + b"\n"}


def byte_counter(progress: Callable[[int, int], object] | None, total: int) -> Callable[[int], None]:
    """Turn counts of finished bytes into calls of progress(finished, total)."""
    finished = 0

    def count(nbytes: int) -> None:
        nonlocal finished
        finished += nbytes
        if progress:
            progress(finished, total)

    return count


def needs_model(base: PathLike, adapter: PathLike) -> bool:
    """Whether the base must be loaded as a model to merge this adapter into it: a GGUF file, or a folder that lacks
    layers which the adapter of a classification brings whole, or has others of another size."""
    if Path(base).suffix.lower() == ".gguf" and not Path(base).is_dir():
        return True
    if not Path(base).is_dir():
        return False
    with PeftAdapter(adapter) as opened:
        if opened.config.raw.get("task_type") != "SEQ_CLS":
            return False
        with open_model(base) as model:
            shapes = {name: info.shape for name, (_, info) in model.tensors.items()}
            return any(shapes.get(name) != info.shape for name, info in opened.replaced.items())
