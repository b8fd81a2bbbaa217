"""Where a family's layers get their arrays from: a checkpoint's tensors by name, or none, to be filled later."""

import difflib
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from nblora.errors import FormatError
from nblora.formats.model_files import ModelFiles
from nblora.layers import Conv2d, Dense, Embedding, FullyConnected, LayerNorm, RMSNorm
from nblora.layers.images import BatchNorm2d
from nblora.storage.dtypes import FLOATS

Pair = tuple[int, int]


class Source:
    """Makes layers by the names that checkpoints give them. This one makes them empty, for values that come later.

    Parameters
    ----------
    dtype : dtype
    names : mapping
        What the file calls each tensor, by the name that the model's class would save.
    """

    def __init__(self, dtype: np.dtype, names: Mapping[str, str]) -> None:
        self.dtype, self._names = dtype, names

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._names

    def take(self, name: str, *shape: int) -> np.ndarray:
        """The tensor of this name and shape, as the checkpoint stores it, in the working dtype."""
        return np.empty(shape, self.dtype)

    def linear(
        self, name: str, inputs: int, outputs: int, *, bias: bool = True, activation: str = "identity"
    ) -> FullyConnected:
        """A linear layer, stored (out, in)."""
        weight = self.take(f"{name}.weight", outputs, inputs)
        return FullyConnected(weight, self.take(f"{name}.bias", outputs) if bias else None, activation=activation)

    def turned_linear(self, name: str, inputs: int, outputs: int, *, activation: str = "identity") -> Dense:
        """A linear layer stored (in, out), as GPT-2's are."""
        weight = self.take(f"{name}.weight", inputs, outputs)
        return Dense(weight, self.take(f"{name}.bias", outputs), activation=activation)

    def table(self, name: str, count: int, features: int) -> Embedding:
        """A table of rows."""
        return Embedding(self.take(f"{name}.weight", count, features))

    def layer_norm(self, name: str, features: int, eps: float) -> LayerNorm:
        """Layer normalisation with weight and bias."""
        return LayerNorm(self.take(f"{name}.weight", features), self.take(f"{name}.bias", features), eps=eps)

    def rms_norm(self, name: str, features: int, eps: float) -> RMSNorm:
        """Normalisation by the root of the mean square."""
        return RMSNorm(self.take(f"{name}.weight", features), eps=eps)

    def convolution(
        self, name: str, inputs: int, outputs: int, kernel: Pair, *, stride: Pair, padding: int = 0, bias: bool = False
    ) -> Conv2d:
        """A convolution of windows of (height, width)."""
        weight = self.take(f"{name}.weight", outputs, inputs, *kernel)
        given = self.take(f"{name}.bias", outputs) if bias else None
        return Conv2d(weight, given, stride=stride, padding=padding)

    def batch_norm(self, name: str, channels: int, eps: float, activation: str) -> BatchNorm2d:
        """Batch norm with fixed statistics."""
        parts = [self.take(f"{name}.{part}", channels) for part in ("weight", "bias", "running_mean", "running_var")]
        return BatchNorm2d(*parts, eps=eps, activation=activation)


class Checkpoint(Source):
    """The tensors of a file, under the names that the model's own class would save them by.

    Parameters
    ----------
    model : ModelFiles
    names : mapping
        The file's name of each tensor by its own one.
    dtype : dtype
    mmap : bool
        Whether tensors of this dtype are mapped.

    Attributes
    ----------
    used : set of str
        Own names of what was taken.
    """

    def __init__(self, model: ModelFiles, names: Mapping[str, str], dtype: np.dtype, mmap: bool = False) -> None:
        super().__init__(dtype, names)
        self._model, self._mmap = model, mmap
        self._tensors = model.tensors
        self.used: set[str] = set()
        self._faults: list[str] = []
        self._drawn: dict[str, Callable[[tuple[int, ...]], np.ndarray]] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        """That of the file's tensor."""
        return self._tensors[self._names[name]][1].shape

    def draw(self, layers: Iterable[str], std: float, rng: np.random.Generator, again: Iterable[str] = ()) -> set[str]:
        """Say that layers that the file lacks are to be drawn: weights normal, biases zero; `again`: though it has
        them. Return which these are."""
        missing = [name for name in layers if name in again or not self.has(f"{name}.weight")]
        for name in missing:
            self._drawn[f"{name}.weight"] = lambda shape: (std * rng.standard_normal(shape)).astype(self.dtype)
            self._drawn[f"{name}.bias"] = lambda shape: np.zeros(shape, self.dtype)
        return set(missing)

    def take(self, name: str, *shape: int) -> np.ndarray:
        if name in self._drawn:
            self.used.add(name)
            return self._drawn[name](shape)
        if name not in self._names:
            self._faults.append(self._missing(name))
            return np.zeros(shape, self.dtype)
        self.used.add(name)
        file, info = self._tensors[self._names[name]]
        if info.shape != shape:
            self._faults.append(f"{info.name} has shape {info.shape}, expected {shape}")
            return np.zeros(shape, self.dtype)
        if info.dtype not in FLOATS:
            self._faults.append(f"{info.name} is {info.dtype}, expected F64, F32, F16 or BF16")
            return np.zeros(shape, self.dtype)
        if self._mmap and np.dtype(np.float32) == self.dtype and info.dtype == "F32":
            return file.mapped(info.name)
        return file.read_as(info.name, self.dtype)

    def _missing(self, name: str) -> str:
        near = difflib.get_close_matches(name, self._names, 1, 0.8)
        return f"{name} is missing" + (f" (the nearest is {self._names[near[0]]})" if near else "")

    def check(self) -> None:
        """FormatError that lists what was missing or of a wrong shape."""
        if self._faults:
            more = len(self._faults) - 8
            text = "; ".join(self._faults[:8]) + (f"; and {more} more" if more > 0 else "")
            raise FormatError(f"{self._model.path}: {text}")

    def left(self) -> dict[str, str]:
        """Tensors that nothing took: the file's name of each by its own one."""
        return {own: name for own, name in self._names.items() if own not in self.used}
