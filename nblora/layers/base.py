"""`Layer`: what every layer, adapter and model does, whatever it computes."""

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from nblora import checks
from nblora.backends import resolve
from nblora.storage.checkpoint import read_checkpoint, write_checkpoint
from nblora.storage.onnx_graph import OnnxGraph

from .named_parameters import NamedParameters, Parameter

PRECISIONS = ("float32", "tf32", "bf16-base")
ROOMS_OF_KINDS = ("nblora.adapters", "nblora.models")
"""Where layers come from that files name, beside this room: only named, since it must not depend on them."""


class Layer(NamedParameters):
    """Base of every layer, adapter and model.

    A subclass states its sizes (`in_features`, `out_features`, `dtype`), lists its parameters (`_parameters`), and
    computes (`forward`, `backward`, `_sweep`). Gradients live in `_gradients` under the parameters' names, in the
    stored layout, between a `backward` and the call that discards them.
    """

    kinds: ClassVar[dict[str, type["Layer"]]] = {}

    in_features: int
    out_features: int
    trainable: bool = True
    _closed = False

    def __init_subclass__(cls, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not abstract:  # or a file could ask for half a class
            Layer.kinds[cls.__name__] = cls

    def _open(self, backend: Any) -> None:
        """Begin life: in training mode, on `backend`, whose arrays the layer's are, without gradients."""
        self._backend = backend
        self._training = True
        self._gradients: dict[str, Any] | None = None

    def _open_from_host(self, backend: Any) -> None:
        """Begin life with arrays that are on the host or wherever the layers within have theirs; end on `backend`."""
        self._open(resolve("cpu"))
        self._move(backend)

    # --- computing ---------------------------------------------------------------------------------------------

    def forward(self, x: Any) -> np.ndarray:
        """Compute the layer's output.

        Parameters
        ----------
        x : array_like of real numbers, shape (..., in_features)
            Cast to the layer's dtype where it has another. Never written to; in training mode it is kept by
            reference until backward, so do not change it in between.

        Returns
        -------
        ndarray of the layer's dtype, shape (..., out_features)
            A new array.

        Raises
        ------
        TypeError
            For complex numbers, objects and strings.
        ValueError
            For another number of features.
        """
        raise NotImplementedError

    def __call__(self, x: Any) -> np.ndarray:
        """Compute `forward(x)`."""
        return self.forward(x)

    def backward(self, grad_output: Any, accumulate: bool = False) -> np.ndarray:
        """Compute the gradients of all trainable parameters, and return the input's.

        Parameters
        ----------
        grad_output : array_like, shape (..., out_features)
            Gradient of the loss with respect to the last forward's output, of its shape.
        accumulate : bool
            Add to the gradients held from earlier calls instead of replacing them.

        Returns
        -------
        ndarray, shape (..., in_features)
            Gradient with respect to the last forward's input.

        Raises
        ------
        RuntimeError
            Before `forward`, in evaluation mode, and after an update that made the last forward stale.
        """
        raise NotImplementedError

    def backward_update(self, grad_output: Any, lr: float) -> np.ndarray:
        """Do `backward(grad_output)` and `update_parameters(lr)` in one sweep over the weights.

        Equal to the two calls within rounding; the gradients of dense parameters are never held as matrices.
        Gradients held before are discarded.

        Returns
        -------
        ndarray, shape (..., in_features)
            Gradient with respect to the last forward's input.
        """
        rate = checks.check_not_negative("lr", lr)
        trainable = self._check_trainable_memory()
        grad_input = self._sweep(grad_output, rate, rate)
        self._descend(trainable, rate)
        self._apply_momentum(rate)
        self._forget_gradients()
        return grad_input

    def update_parameters(self, lr: float) -> None:
        """Update all trainable parameters, in place, from the last gradients, which are kept.

        Plain gradient descent, except for a delta, which follows its velocity.

        Raises
        ------
        RuntimeError
            Where there are no gradients.
        """
        rate = checks.check_not_negative("lr", lr)
        self._held_gradients()
        self._check_trainable_memory()
        self._apply_gradients(rate)
        self._forget_forward()

    def _sweep(self, grad_output: Any, lr: float, delta_lr: float) -> np.ndarray:
        """Backward that updates the dense parameters on its way, leaving the other gradients in `_gradients`."""
        raise NotImplementedError

    def _apply_gradients(self, lr: float) -> None:
        """Update in place every trainable parameter whose gradient is held."""
        self._descend(self._trainable(), lr)
        self._apply_momentum(lr)

    def _descend(self, parameters: Iterable[Parameter], lr: float) -> None:
        """Update in place those of `parameters` whose gradient is held and which follow no velocity."""
        gradients = self._held_gradients()
        for parameter in parameters:
            if parameter.name in gradients and not parameter.momentum:
                self._backend.sgd_update(parameter.array, gradients[parameter.name], lr)

    def _apply_momentum(self, lr: float) -> None:
        """Update in place what follows a velocity, where its gradient is held: nothing but in delta adapters."""

    def _require_forward(self) -> None:
        """RuntimeError where there is no forward to go back through, at any depth."""
        raise NotImplementedError

    def _forget_forward(self) -> None:
        """Drop what the last forward kept for backward."""
        raise NotImplementedError

    def _forget_gradients(self) -> None:
        """Drop the gradients."""
        self._gradients = None

    def _sequence(self) -> Iterator[tuple[str, "Layer"]]:
        """The layers that compute one after the other, with the names that prefix their parameters'."""
        yield "", self

    def _generators(self) -> dict[str, np.random.Generator]:
        """The random generators that forward draws from, by the name of their layer."""
        return {}

    # --- parameters --------------------------------------------------------------------------------------------

    def _trainable(self) -> Iterator[Parameter]:
        return (parameter for parameter in self._parameters() if parameter.trainable)

    @property
    def parameter_count(self) -> int:
        """The number of trainable parameters, counted as elements."""
        return sum(int(np.prod(parameter.shape)) for parameter in self._trainable())

    def get_parameters(self) -> np.ndarray:
        """Return all trainable parameters as one vector: a copy, each row-major in its logical shape."""
        return self._pack([self._logical_copy(parameter) for parameter in self._trainable()])

    def set_parameters(self, vector: Any) -> None:
        """Set all trainable parameters, in place, from a vector packed as `get_parameters` packs them.

        Raises
        ------
        ValueError
            For a vector of another length; nothing is changed.
        """
        array = checks.as_real("parameters", vector)
        if array.shape != (self.parameter_count,):
            raise ValueError(f"parameters must have shape ({self.parameter_count},), got {array.shape}")
        values, start = {}, 0
        for parameter in self._trainable():
            stop = start + int(np.prod(parameter.shape))
            values[parameter.name] = array[start:stop].reshape(parameter.shape)
            start = stop
        self._assign(values)

    def get_parameter_gradients(self) -> np.ndarray:
        """Return all gradients as one vector: a copy, packed as `get_parameters` packs the parameters.

        Raises
        ------
        RuntimeError
            Where there are no gradients.
        """
        gradients = self._held_gradients()
        return self._pack([self._logical_copy(p._replace(array=gradients[p.name])) for p in self._trainable()])

    def zero_gradients(self) -> None:
        """Set all gradients to zero."""
        self._gradients = {p.name: self._backend.zeros_like(p.array) for p in self._trainable()}

    def _pack(self, arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([array.ravel() for array in arrays]) if arrays else np.zeros(0, self.dtype)

    def _held_gradients(self) -> dict[str, Any]:
        if self._gradients is None:
            raise RuntimeError("there are no gradients: call forward and backward first")
        return self._gradients

    def _store_gradients(self, gradients: Iterable[tuple[str, Any]], accumulate: bool) -> None:
        """Keep those of the pairs of name and gradient that are not None, added to the held ones where `accumulate`."""
        new = {name: gradient for name, gradient in gradients if gradient is not None}
        if accumulate and self._gradients is not None:
            for name, gradient in self._gradients.items():
                self._backend.add(gradient, new[name])
        else:
            self._gradients = new

    def _check_trainable_memory(self) -> list[Parameter]:
        """Return the trainable parameters, once all of them can be updated in place."""
        trainable = list(self._trainable())
        for parameter in trainable:
            checks.check_writeable(parameter.name, parameter.array)
        return trainable

    # --- modes and life ----------------------------------------------------------------------------------------

    @property
    def training(self) -> bool:
        """Whether forward keeps what backward needs (`train()`) or not (`eval()`)."""
        return self._training

    def train(self) -> Self:
        """Enter training mode, in which every object begins, and return self."""
        self._require_open()
        self._training = True
        return self

    def eval(self) -> Self:
        """Enter evaluation mode and return self: nothing is kept for backward, and threads may share the object."""
        self._require_open()
        self._training = False
        self._forget_forward()
        return self

    def reset_state(self) -> None:
        """Clear the cached input and the gradients; keep what was learned."""
        self._require_open()
        self._forget_forward()
        self._forget_gradients()

    @property
    def device(self) -> str:
        """Where the parameters are: `"cpu"` or `"cuda:N"`."""
        return self._backend.device

    def to(self, device: str, precision: str = "float32") -> Self:
        """Move to a device, in place, and return self.

        Parameters
        ----------
        device : str
            `"auto"`, `"cpu"`, `"cuda"` or `"cuda:N"`.
        precision : str
            How a GPU multiplies float32: "float32"; "tf32" (tensor cores, inputs rounded to 10 bits of mantissa);
            "bf16-base" (float32, with the weights of frozen bases held as bfloat16, which rounds them for good). The
            CPU, and float64 layers, always compute in the layer's dtype.

        Raises
        ------
        ValueError
            For an unknown name.
        DeviceUnavailableError
            For a device that cannot run here.
        """
        self._require_open()
        checks.check_choice("precision", precision, PRECISIONS)
        self._move(resolve(device, precision))
        return self

    def _move(self, backend: Any) -> None:
        """Take all arrays to `backend`: every one of them, or where one fails, none."""
        moved = []
        for layer, names, frozen in self._pieces(False):
            if layer._backend is not backend:
                arrays = {name: layer._moved(name, backend.from_host) for name in names}
                arrays |= {name: layer._moved(name, backend.base_from_host) for name in frozen}
                moved.append((layer, arrays))
        for layer, arrays in moved:
            held = layer._gradients
            if held is not None:
                held = {name: backend.from_host(layer._backend.to_host(array)) for name, array in held.items()}
            layer.__dict__.update(arrays, _backend=backend, _gradients=held)
        if moved:
            self._forget_forward()

    def _moved(self, name: str, take: Any) -> Any:
        array = getattr(self, name)
        return None if array is None else take(self._backend.to_host(array))

    def _pieces(self, frozen: bool) -> Iterator[tuple["Layer", tuple[str, ...], tuple[str, ...]]]:
        """Every layer that moves with this one, itself included, with the names of its arrays and of frozen weights.

        `frozen` says that an adapter around this layer does not train it.
        """
        raise NotImplementedError

    def _samples(self, name: str, value: Any, features: int) -> tuple[Any, bool]:
        """`value` checked as (..., features), and whether it is on the backend's device."""
        adopted = self._backend.adopt(value)
        samples = checks.as_samples(name, value if adopted is None else adopted, features, self.dtype)
        return samples, adopted is not None

    def _enter(self, name: str, value: Any, features: int) -> tuple[Any, bool]:
        """Like `_samples`, brought to the device."""
        samples, on_device = self._samples(name, value, features)
        return self._backend.from_host(samples), on_device

    def _leave(self, array: Any, on_device: bool) -> Any:
        """An array of the backend as the caller wants it: on the device, or as NumPy."""
        return array if on_device else self._backend.to_host(array)

    def clone(self) -> Self:
        """Return a deep copy that shares no memory with this object, its random state included; on the same device."""
        twin = self._from_state(self._config(), {p.name: self._logical_copy(p) for p in self._parameters()})
        twin._move(self._backend)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what `save` would write, and the device's name: cached inputs and gradients stay behind.

        So layers cross process boundaries (joblib, Dask) at the size of their parameters; where that device is
        missing, unpickling is a DeviceUnavailableError.
        """
        tensors = {p.name: self._logical_copy(p) for p in self._parameters()}
        return _restore_layer, (type(self), self._config(), tensors, self.device)

    def close(self) -> None:
        """Free what the object holds; every later call but this one raises RuntimeError."""
        backend = self.__dict__.get("_backend")
        self.__dict__.clear()
        self._closed = True
        if backend is not None:
            backend.release()

    if not TYPE_CHECKING:  # or every misspelt attribute would pass the type checker

        def __getattr__(self, name):
            # Reached only for attributes that are not there: all of them, once `close` has cleared the object.
            if self.__dict__.get("_closed") and not name.startswith("__"):
                raise RuntimeError(f"this {type(self).__name__} is closed")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __enter__(self) -> Self:
        """Return self; the end of the `with` block closes it."""
        self._require_open()
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()

    def _require_open(self) -> None:
        _ = self._backend

    # --- compiling and files -----------------------------------------------------------------------------------

    @property
    def supports_jit(self) -> bool:
        """Whether the layer's arithmetic runs in compiled kernels: always."""
        self._require_open()
        return True

    def compile(self) -> Self:
        """Compile every kernel that the layer needs, or load it from the cache, and return self.

        Runs one step on a clone, so nothing of this object changes.
        """
        twin = self.clone().train()
        for count in (1, 256):  # few samples and many have kernels of their own
            samples = np.zeros((count, self.in_features), self.dtype)
            grad = np.zeros_like(twin.forward(samples))
            twin.backward(grad)
            twin.update_parameters(0.0)
            twin.forward(samples)
            twin.backward_update(grad, 0.0)
        return self

    def to_onnx(self, path: str | os.PathLike[str]) -> None:
        """Write the forward graph, as it is in evaluation mode, to an ONNX file, atomically (extra `onnx`).

        The graph maps `x` (batch, in_features) to `y` (batch, out_features) in the layer's dtype.

        Raises
        ------
        MissingExtraError
            Where onnx is not installed.
        """
        self._require_open()
        graph = OnnxGraph(self.dtype)
        graph.write(path, self._add_to_onnx(graph, "x"), self.in_features, self.out_features)

    def _add_to_onnx(self, graph: OnnxGraph, x: str) -> str:
        """Add the forward computation on the value called `x`, and return the name of its result."""
        raise NotImplementedError

    def diagnostics(self) -> dict[str, Any]:
        """Return a flat dict that describes the layer; it never raises on NaN."""
        raise NotImplementedError

    def _config(self) -> dict[str, Any]:
        """What, with the parameters' arrays, makes the object again: only what JSON can hold."""
        raise NotImplementedError

    @classmethod
    def _from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Self:
        """Make an object from `_config` and its arrays by name, in logical shapes; it takes the arrays over."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the object to one safetensors file, atomically: arrays as tensors, the rest as JSON in its metadata.

        An existing file is replaced as a whole or, whatever happens, left as it was.
        """
        tensors = {p.name: self._logical_copy(p) for p in self._parameters()}
        write_checkpoint(path, type(self).__name__, self._config(), tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read an object that `save` wrote.

        Raises
        ------
        FormatError
            For a broken file, one of another format version, and one that holds another kind of object.
        """
        loaded = read_layer(path)
        if not isinstance(loaded, cls):
            from nblora.errors import FormatError

            raise FormatError(f"{os.fspath(path)}: holds a {type(loaded).__name__}, not a {cls.__name__}")
        return loaded


def read_layer(path: str | os.PathLike[str]) -> Layer:
    """Return the object that `save` wrote to `path`, whatever its kind (public as `nblora.load`)."""
    return read_checkpoint(path, lambda kind, config, tensors: layer_from_state(kind, config, tensors))


def layer_from_state(kind: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Layer:
    """Make a layer of the class called `kind`; KeyError for an unknown one."""
    return _kind(kind)._from_state(config, tensors)


def _kind(name: str) -> type[Layer]:
    """The class called `name`, whose room may not have been imported yet: `import nblora` imports none."""
    for room in ROOMS_OF_KINDS:
        if name in Layer.kinds:
            break
        importlib.import_module(room)
    return Layer.kinds[name]


def _restore_layer(
    cls: type[Layer], config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], device: str
) -> Layer:
    return cls._from_state(config, tensors).to(device)
