"""`Layer`: what every layer, adapter and model does, whatever it computes."""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from nblora import checks
from nblora.backends import resolve
from nblora.backends.protocol import Array
from nblora.errors import FormatError
from nblora.storage.checkpoint import read_checkpoint, write_checkpoint

from . import tree
from .parameters import Named, NamedParameters, Parameter
from .run import Run
from .saving import FROZEN, complete
from .sinks import Held, Sweep, descend, tell

PRECISIONS = ("float32", "tf32", "bf16-base")
ROOMS_OF_KINDS = ("nblora.adapters", "nblora.models", "nblora.pretrained")
"""Where layers come from that files name, beside this room: only named, since it must not depend on them."""


class Layer(NamedParameters):
    """Base of every layer, adapter and model: a node of a tree.

    A subclass states its sizes (`in_features`, `out_features`, `dtype`), names its parameters (`_own_parameters`), and
    computes on arrays of its device (`_forward`, `_backward`). Layers that it holds as attributes are its children.
    Names, modes, moving, counting, saving and updating follow from that, here and in `tree.py`. Nothing of a forward
    is kept in a layer but in its run, of which a public `forward` keeps the last.
    """

    kinds: ClassVar[dict[str, type["Layer"]]] = {}

    in_features: int
    out_features: int
    trainable: bool = True
    adaptable: ClassVar[bool] = False
    """Whether the layer is one product with a weight, which an adapter's change may join and be merged into."""
    _computes: ClassVar[bool] = False
    _droppable: ClassVar[bool] = True  # whether an adapter drops elements of its input
    _closed = False
    _run: Run | None = None
    _rng: np.random.Generator | None = None  # of what draws numbers in a forward
    _state = 0  # counts the events that make runs stale

    def __init_subclass__(cls, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not abstract:  # or a file could ask for half a class
            Layer.kinds[cls.__name__] = cls

    def _open(self, backend: Any) -> None:
        """Begin life: in training mode, with arrays that are on the host or wherever the children have theirs; end on
        `backend`."""
        self._backend = resolve("cpu")
        self._training = True
        self._move(backend)

    # --- the tree ----------------------------------------------------------------------------------------------

    def children(self) -> dict[str, "Layer"]:
        """Return the layers that this one holds, by name."""
        self._require_open()
        return {name: value for name, value in vars(self).items() if isinstance(value, Layer)}

    def _turns(self, parameter: Parameter) -> bool:
        """Whether a shared parameter is for this layer the transpose of what its logical shape says."""
        return False

    def _own_parameters(self) -> dict[str, Parameter]:
        """The parameters that are not its children's, by name."""
        return {}

    def _parts(self) -> dict[str, "Layer"]:
        """The children that compute by themselves."""
        return self.children()

    def _freezes(self, child: str) -> bool:
        """Whether it keeps a child as it is."""
        return False

    def _set_child(self, name: str, layer: "Layer") -> None:
        """Put another layer in the place of a child."""
        setattr(self, name, layer)

    def _around(self, children: Mapping[str, "Layer"]) -> "Layer":
        """The same container around other children."""
        raise NotImplementedError

    def _parameters(self) -> Iterator[Named]:
        return tree.parameters(self)

    def _trainable(self) -> Iterator[Named]:
        return tree.trainable(self)

    # --- computing ---------------------------------------------------------------------------------------------

    @property
    def _takes(self) -> int | None:
        """Features, or channels, of its input, by which neighbours are told to fit; None where any will do."""
        return self.in_features

    @property
    def _gives(self) -> int | None:
        """Features, or channels, of its output; None where they are those of its input."""
        return self.out_features

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
        values, on_device = self._enter("x", x, self._as_input)
        self._run = None  # its memory serves this one
        run = Run(self._backend, self._training)
        y = self._forward(values, run)
        if self._training:
            self._run, run.shape = run, y.shape
        return self._leave(y, on_device)

    def _forward(self, x: Array, run: Run) -> Array:
        """Compute on arrays of the device; a new array, or one that no backward of `run` reads."""
        raise NotImplementedError

    def _backward(self, grad: Array, run: Run) -> Array | None:
        """Hand every gradient to the run's sink, and return the input's, None where nobody wants it."""
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
        checks.check_flag("accumulate", accumulate)
        run, grad, on_device = self._go_back(grad_output)
        trained = tree.trained(self, [])
        if not accumulate:
            _forget_gradients(trained)
        grad_input = self._backward(grad, run.back(Held()))
        for parameter in trained:
            if parameter.gradient is None:  # the forward went past it, as past a disabled adapter
                parameter.gradient = self._backend.zeros_like(parameter.array)
        return self._leave(grad_input, on_device)

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
        run, grad, on_device = self._go_back(grad_output)
        trained = tree.trained(self, [])
        if not all(map(checks.is_writeable, [parameter.array for parameter in trained])):
            self._check_writeable()
        sweep = Sweep(rate, rate)
        grad_input = self._backward(grad, run.back(sweep))
        sweep.finish(self._backend, trained)
        _forget_gradients(trained)
        run.end()
        self._run = None
        return self._leave(grad_input, on_device)

    def update_parameters(self, lr: float) -> None:
        """Update all trainable parameters, in place, from the last gradients, which are kept.

        Plain gradient descent, except for a delta, which follows its velocity.

        Raises
        ------
        RuntimeError
            Where there are no gradients.
        """
        rate = checks.check_not_negative("lr", lr)
        held = self._with_gradients()
        self._check_writeable()
        for _, parameter, _ in held:
            descend(self._backend, parameter, parameter.gradient, rate, rate)
        tell(named.parameter for named in held)
        self._forget_forward()

    def _go_back(self, grad_output: Any) -> tuple[Run, Array, bool]:
        """The last forward's run, the gradient of its output on the device, and whether it was there."""
        run = self._run
        if run is None or run.is_stale:
            self._require_open()
            raise RuntimeError(_why_no_forward(self._training))
        grad, on_device = self._enter("grad_output", grad_output, self._as_output)
        if grad.shape != run.shape:
            raise ValueError(f"grad_output must have the output's shape {run.shape}, got {grad.shape}")
        return run, grad, on_device

    # --- learning ----------------------------------------------------------------------------------------------

    def _loss_name(self) -> str:
        """The loss that it learns by where none is named."""
        raise TypeError("loss is missing: name one, such as 'mse' or 'cross_entropy', or give a Loss")

    def _as_samples(self, name: str, x: Any) -> Any:
        """A data set checked: what has a length, and is cut by slices and by arrays of places."""
        inputs, axes = checks.as_real(name, x), self._axes()
        if inputs.ndim < len(axes):
            wanted = ", ".join(map(str, ("samples", *axes[1:])))
            raise ValueError(f"{name} must have shape ({wanted}), got {inputs.shape}")
        self._output_shape(name, inputs.shape)
        if inputs.size == 0:
            raise ValueError(f"{name} must hold at least one sample, got shape {inputs.shape}")
        checks.check_finite(name, inputs, self.dtype)
        return inputs

    def _as_targets(self, name: str, y: Any, x: Any, loss: Any) -> Any:
        """The targets of a data set that `_as_samples` checked, as `loss` wants them."""
        return loss.check_target(name, y, self._output_shape(name, x.shape))

    def _learn(self, x: Any, target: Any, loss: Any, run: Run) -> tuple[Any, Array, dict[str, Any]]:
        """The loss of a batch, what `_backward` takes, and the loss's other figures: numbers for `backend.read`."""
        output = self._forward(self._enter("x", x, self._as_input)[0], run)
        value, grad = loss.value_and_gradient(output, target, run.backend)
        return value, grad, loss._figures(output, target, run.backend) if loss.metrics else {}

    def _drop_base(self, rng: np.random.Generator | None) -> None:
        """Have the dropout that a pretrained model's configuration says draw from children of `rng`, or none: None."""
        raise ValueError("base_dropout is for pretrained models, whose config.json says what is dropped: leave it out")

    # --- modes and life ----------------------------------------------------------------------------------------

    @property
    def training(self) -> bool:
        """Whether forward keeps what backward needs (`train()`) or not (`eval()`)."""
        return self._training

    def train(self) -> Self:
        """Enter training mode, in which every object begins, and return self."""
        self._set_mode(True)
        return self

    def eval(self) -> Self:
        """Enter evaluation mode and return self: nothing is kept for backward, and threads may share the object."""
        self._set_mode(False)
        return self

    def _set_mode(self, training: bool) -> None:
        self._require_open()
        for _, layer, _ in tree.walk(self):
            layer._training = training
        if not training:
            self._forget_forward()

    def reset_state(self) -> None:
        """Clear the cached input and the gradients; keep what was learned."""
        self._require_open()
        self._forget_forward()
        for _, layer, _ in tree.walk(self):
            layer._reset_own_state()

    def _forget_forward(self) -> None:
        """Drop what forwards kept for backward, here and below."""
        for _, layer, _ in tree.walk(self):
            layer._run = None
            layer._state += 1

    def _reset_own_state(self) -> None:
        for parameter in self._own_parameters().values():
            parameter.gradient = None

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
        nodes = [node for node in tree.walk(self) if node.layer._backend is not backend]
        moved, seen = [], set()
        for node in nodes:
            for parameter in node.layer._own_parameters().values():
                if parameter in seen:
                    continue
                seen.add(parameter)
                frozen = parameter.dense and not parameter.shared and not node.trains
                take = backend.base_from_host if frozen else backend.from_host
                fetch = node.layer._backend.to_host
                held = parameter.gradient
                moved.append((parameter, take(fetch(parameter.array)), held if held is None else take(fetch(held))))
        for parameter, array, gradient in moved:
            parameter.array, parameter.gradient = array, gradient
        for node in nodes:
            node.layer._backend, node.layer._run = backend, None

    def _as_input(self, name: str, value: Any) -> Array:
        """`value` checked as what the layer takes, of the dtype that it takes."""
        return checks.as_samples(name, value, self.in_features, self.dtype)

    def _as_output(self, name: str, value: Any) -> Array:
        """`value` checked as a gradient of what the layer gives, of its dtype."""
        return checks.as_samples(name, value, self.out_features, self.dtype)

    def _output_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The output's shape for an input `name` of this one; ValueError for one that does not fit."""
        checks.check_last_axis(name, shape, self.in_features)
        return *shape[:-1], self.out_features

    def _axes(self) -> tuple[int | str, ...]:
        """Those of a batch of inputs: sizes, and names of what is open."""
        return "batch", self.in_features

    def _example(self, samples: int) -> np.ndarray:
        """An input of so many samples, for compiling and tracing."""
        return np.zeros((samples, self.in_features), self.dtype)

    def _enter(self, name: str, value: Any, check: Callable[[str, Any], Array]) -> tuple[Array, bool]:
        """`value` checked and brought to the device, and whether it was there; integers, which name rows, and tokens
        stay on the host."""
        adopted = self._backend.adopt(value)
        samples = check(name, value if adopted is None else adopted)
        named = not hasattr(samples, "dtype") or samples.dtype.kind in "iu"
        return samples if named else self._backend.from_host(samples), adopted is not None

    def _leave(self, array: Any, on_device: bool) -> Any:
        """An array of the backend as the caller wants it: on the device, or as NumPy."""
        return array if on_device else self._backend.to_host(array)

    def clone(self) -> Self:
        """Return a deep copy that shares no memory with this object, its random state included; on the same device."""
        twin = self._from_state(self._config(), self._tensors())
        twin._move(self._backend)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what `save` would write, and the device's name: cached inputs and gradients stay behind.

        So layers cross process boundaries (joblib, Dask) at the size of their parameters; where that device is
        missing, unpickling is a DeviceUnavailableError.
        """
        return _restore_layer, (type(self).__name__, self._config(), self._tensors(), self.device)

    def _tensors(self) -> dict[str, np.ndarray]:
        """Copies of all parameters by name, in logical shapes."""
        turned = tree.turned(self)
        copies = {name: self._logical_copy(parameter) for name, parameter, _ in self._parameters()}
        return {name: np.ascontiguousarray(copy.T) if name in turned else copy for name, copy in copies.items()}

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
            samples = self._example(count)
            grad = np.zeros_like(twin.forward(samples))
            twin.backward(grad)
            twin.update_parameters(0.0)
            twin.forward(samples)
            twin.backward_update(grad, 0.0)
        return self

    def to_onnx(self, path: str | os.PathLike[str]) -> None:
        """Write the forward graph, as it is in evaluation mode, to an ONNX file, atomically (extra `onnx`).

        The graph maps `x` to `y` in the layer's dtype: (batch, in_features) to (batch, out_features), and images, or
        integers (batch,), where the layer takes those.

        Raises
        ------
        MissingExtraError
            Where onnx is not installed.
        """
        self._require_open()
        from .onnx import write_graph

        write_graph(self, path)

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
        write_checkpoint(path, type(self).__name__, self._config(), self._tensors())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, base: "Layer | str | os.PathLike[str] | None" = None) -> Self:
        """Read an object that `save` wrote, or the checkpoint of a run, as `nblora.load` does.

        Raises
        ------
        FormatError
            For a broken file, one of another format version, and one that holds another kind of object.
        """
        loaded = read_layer(path, base=base)
        if not isinstance(loaded, cls):
            raise FormatError(f"{os.fspath(path)}: holds a {type(loaded).__name__}, not a {cls.__name__}")
        return loaded


def read_layer(path: str | os.PathLike[str], *, base: "Layer | str | os.PathLike[str] | None" = None) -> Layer:
    """Return the object that `save` wrote to `path`, whatever its kind (public as `nblora.load`).

    Parameters
    ----------
    path : path
    base : Layer or path, optional
        For the checkpoint of a `fit`, which holds what was trained and a digest of the rest: the model that was
        trained, or the plain one that it was made from. Its values are copied.

    Raises
    ------
    FormatError
        For a broken file, one of another format version, and a checkpoint whose base is missing or another.
    """
    source = base if base is None or isinstance(base, Layer) else read_layer(base)

    def build(kind: str, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Layer:
        complete(tensors, config.get(FROZEN, {}), source)
        return layer_from_state(kind, config, tensors)

    return read_checkpoint(path, build)


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


def _restore_layer(kind: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], device: str) -> Layer:
    return layer_from_state(kind, config, tensors).to(device)


def _forget_gradients(parameters: list[Parameter]) -> None:
    for parameter in parameters:
        parameter.gradient = None


def _why_no_forward(training: bool) -> str:
    if not training:
        return "backward needs a forward in training mode: call train() and forward() first"
    return "backward needs a forward first: none was made since the object was made, reset or updated"
