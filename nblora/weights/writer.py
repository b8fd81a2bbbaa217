"""Write a checkpoint: every tensor copied, converted or merged into its place, the whole of it present or absent."""

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nblora.formats.model_files import ModelFiles
from nblora.formats.replace import check_output, check_space, replace_file, replace_folder
from nblora.storage.bounded import open_regular
from nblora.storage.dtypes import STORED
from nblora.weights.names import Ties
from nblora.weights.originals import Originals, originals_path
from nblora.weights.output import OutputShard, Placed, output_place
from nblora.weights.plan import Recipe
from nblora.weights.report import TensorReport
from nblora.weights.sinks import FileSink, FlushingSink
from nblora.weights.stream import Block, Change, Matrix, Stream, working_type


class CheckpointWriter:
    """Writes the shards of an output.

    Parameters
    ----------
    model : ModelFiles
    shards : sequence of OutputShard
    recipes : mapping of str to Recipe
        By the name of the tensor that changes.
    output : Path
        As the user gave it.
    index : (str, bytes), optional
        The index of the shards, by its name.
    originals : Originals, optional
        What is kept of the base.
    texts : mapping of str to bytes, optional
        Companions of a folder that are not copied as they are, by name.
    measure : callable, optional
        What else is measured of every block that changes, called as measure(block, placed); see `Change.measured`.
    """

    def __init__(
        self,
        model: ModelFiles,
        shards: Sequence[OutputShard],
        recipes: Mapping[str, Recipe],
        output: Path,
        index: tuple[str, bytes] | None = None,
        originals: Originals | None = None,
        texts: Mapping[str, bytes] | None = None,
        measure: Callable[[Block, Placed], np.ndarray] | None = None,
    ) -> None:
        self._measure = measure
        self._shards, self._recipes, self._originals = shards, recipes, originals
        self.place, self.is_folder = output_place(model, output, list(shards))
        takes_along = model.companions if self.is_folder and model.is_folder else []
        self._companions = {str(path.relative_to(model.folder)): path for path in takes_along}
        self._texts = {name: text for name, text in (texts or {}).items() if name in self._companions}
        if index and self.is_folder:
            self._texts[index[0]] = index[1]

    @property
    def total(self) -> int:
        """Bytes of the tensors that will be read."""
        return sum(placed.info.nbytes for shard in self._shards for placed in shard.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of the shards that will be written."""
        return sum(shard.nbytes for shard in self._shards)

    @property
    def copied(self) -> int:
        """Number of tensors that no recipe changes."""
        return sum(len(shard.tensors) for shard in self._shards) - len(self._recipes)

    def check(self, inputs: Sequence[Path], force: bool = False) -> None:
        """Refuse an output that cannot or must not be written; see `check_output` and `check_space`."""
        known = {shard.name for shard in self._shards} | {*self._companions}
        kept = originals_path(self.place, self.is_folder)
        known |= {kept.name, *self._texts}
        check_output(self.place, inputs, known if self.is_folder else None, force)
        needed = self.nbytes + sum(path.stat().st_size for path in self._companions.values() if path.is_file())
        if self._originals:
            needed += sum(placed.info.nbytes for _, placed in self._kept())
            if not self.is_folder:
                check_output(kept, inputs, force=force)
        check_space(self.place, needed)

    def write(self, stream: Stream) -> dict[str, Change]:
        """Write everything; return what happened to the tensors that recipes change."""
        stream.prepare(self._working_types())
        with self._output() as (folder, open_shard):
            changes: dict[str, Change] = {}
            with self._originals_sink(folder) as kept:
                for shard in self._shards:
                    with open_shard(shard.name) as file:
                        changes |= self._write_shard(stream, shard, file, kept)
            if self.is_folder:
                self._write_companions(folder)
        return changes

    def reports(self, changes: Mapping[str, Change], ties: Ties) -> list[TensorReport]:
        """Sum up the changes in the order of the output; without changes (a dry run) the numbers are unknown."""
        reports = []
        aliases: dict[str, list[str]] = {name: list(twins) for name, twins in ties.stored.items()}
        for alias, name in ties.absent.items():
            aliases.setdefault(name, []).append(alias)
        for shard in self._shards:
            for placed in shard.tensors:
                name, recipe = placed.info.name, self._recipes.get(placed.info.name)
                if recipe is None:
                    continue
                adapters = list(dict.fromkeys([recipe.replaced_by, *(term.label for term in recipe.terms)]))
                reports.append(
                    TensorReport.of(
                        name,
                        STORED[placed.dtype].name,
                        placed.info.shape,
                        changes.get(name, Change.unknown()),
                        [label for label in adapters if label],
                        aliases.get(name, []),
                    )
                )
        return reports

    def _kept(self) -> Iterator[tuple[str, Placed]]:
        assert self._originals
        for shard in self._shards:
            for placed in shard.tensors:
                if placed.info.name in self._originals.starts:
                    yield placed.info.name, placed

    @contextlib.contextmanager
    def _output(self) -> Iterator[tuple]:
        if self.is_folder:
            with replace_folder(self.place) as folder:
                yield folder, lambda name: _new_file(folder / name)
        else:
            with replace_file(self.place) as file:
                yield self.place.parent, lambda name: contextlib.nullcontext(file)

    @contextlib.contextmanager
    def _originals_sink(self, folder: Path) -> Iterator[FileSink | None]:
        """The originals are whole before the output is: a merge that was killed never leaves the output alone."""
        if self._originals is None:
            yield None
            return
        path = originals_path(folder if self.is_folder else self.place, self.is_folder)
        with _new_file(path) if self.is_folder else replace_file(path) as file:
            sink = FileSink(file.fileno(), str(path))
            sink.write(memoryview(self._originals.header()), 0)
            yield sink
            sink.write(memoryview(self._originals.sealed(functools.partial(_pread, file))), 0)

    def _is_copied(self, placed: Placed) -> bool:
        return placed.info.name not in self._recipes and placed.dtype == placed.info.dtype

    def _working_types(self) -> set[type]:
        """What the kernels will compute in."""
        types = set()
        for shard in self._shards:
            for placed in shard.tensors:
                if not self._is_copied(placed):
                    recipe = self._recipes.get(placed.info.name)
                    source = recipe.replacement[1] if recipe and recipe.replacement else placed.info
                    types.add(working_type(source.dtype, placed.info.dtype, placed.dtype))
        return types

    def _write_shard(
        self, stream: Stream, shard: OutputShard, file: BinaryIO, kept: FileSink | None
    ) -> dict[str, Change]:
        changes = {}
        with FlushingSink(file.fileno(), str(self.place)) as sink:
            sink.write(memoryview(shard.header), 0)
            # What is copied comes first: it fills the time in which the kernels are loaded.
            for placed in sorted(shard.tensors, key=self._is_copied, reverse=True):
                name, info = placed.info.name, placed.info
                rows = info.shape[0] if len(info.shape) > 1 else 1
                matrix = Matrix(placed.file, info, rows, info.size // max(rows, 1))
                recipe = self._recipes.get(name)
                if self._is_copied(placed):
                    stream.copy(matrix, sink, placed.start)
                    continue
                keep = (kept, self._originals.starts[name]) if kept and self._originals else None
                finish = functools.partial(self._finish, matrix=matrix, placed=placed, sink=sink, keep=keep)
                change = stream.merge(matrix, recipe or Recipe(rows, matrix.columns), placed.dtype, finish)
                if recipe:
                    changes[name] = change
            stream.wait()
        return changes

    def _finish(
        self, block: Block, matrix: Matrix, placed: Placed, sink: FileSink, keep: tuple[FileSink, int] | None
    ) -> np.ndarray | None:
        matrix.write(sink, placed.start, block.new, block.rows, block.columns)
        if keep:
            matrix.write(keep[0], keep[1], block.old, block.rows, block.columns)
        return self._measure(block, placed) if self._measure else None

    def _write_companions(self, folder: Path) -> None:
        for name, path in self._companions.items():
            if path.is_dir():
                (folder / name).mkdir(parents=True)
            elif name not in self._texts:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with os.fdopen(open_regular(path), "rb") as source, _new_file(folder / name) as file:
                    shutil.copyfileobj(source, file)
        for name, text in self._texts.items():
            with _new_file(folder / name) as file:
                file.write(text)


def _pread(file: BinaryIO, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` from the bytes that were just written."""
    while len(buffer):
        count = os.preadv(file.fileno(), [buffer], offset)
        buffer, offset = buffer[count:], offset + count


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """Create a file in a hidden folder; its bytes are on the disk when the block has ended."""
    with open(path, "x+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
