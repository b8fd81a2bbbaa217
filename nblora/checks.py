"""Every check of an argument, and the message it raises: the name, what was expected, what came, the remedy."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

_TOGETHER = 1 << 20  # elements looked at together, 8 MB at most
FLOAT_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


def check_integer(name: str, value: Any, low: int, high: int | None = None, remedy: str = "") -> int:
    """Return `value` as an int within [low, high]; TypeError for another kind, ValueError out of range."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {_describe(value)}{_remedy(remedy)}")
    number = int(value)
    if number < low or (high is not None and number > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {bounds}, got {number}{_remedy(remedy)}")
    return number


def check_number(name: str, value: Any) -> float:
    """Return `value` as a float; TypeError for what is not a real number. NaN passes."""
    if type(value) is float:  # as a rule; asking `numbers.Real` takes ten times as long
        return value
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {_describe(value)}")
    return float(value)


def check_rank(rank: Any, in_features: int, out_features: int) -> int:
    """1 <= rank <= min(in, out)."""
    largest = min(in_features, out_features)
    remedy = f"the layer maps {in_features} to {out_features} features"
    return check_integer("rank", rank, 1, largest, remedy)


def check_alpha(alpha: Any, rank: int) -> float:
    """Negative means `rank`; otherwise positive and finite."""
    number = check_number("alpha", alpha)
    if number < 0:
        return float(rank)
    if number == 0 or not math.isfinite(number):
        raise ValueError(f"alpha must be positive and finite, or negative to mean the rank, got {number}")
    return number


def check_positive(name: str, value: Any) -> float:
    """Positive and finite."""
    number = check_number(name, value)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be positive and finite, got {number}")
    return number


def check_not_negative(name: str, value: Any) -> float:
    """Zero or more, and finite."""
    number = check_number(name, value)
    if not (number >= 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be finite and not negative, got {number}")
    return number


def check_fraction(name: str, value: Any) -> float:
    """A number in [0, 1)."""
    number = check_number(name, value)
    if not 0 <= number < 1:
        raise ValueError(f"{name} must be in [0, 1), got {number}")
    return number


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of `choices`; TypeError for what is not a string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {_describe(value)}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_name(name: str, value: Any) -> str:
    """A string that is not empty and has no dot; TypeError for what is not a string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {_describe(value)}")
    if not value or "." in value:
        raise ValueError(f"{name} must be a string that is not empty and has no dot, got {value!r}")
    return value


def check_flag(name: str, value: Any) -> bool:
    """A truth value; TypeError for anything else."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {_describe(value)}")
    return bool(value)


def check_dtype(dtype: Any) -> np.dtype:
    """float32 or float64."""
    try:
        checked = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype must be float32 or float64, got {dtype!r}") from None
    if checked not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be float32 or float64, got {checked}")
    return checked


def as_real(name: str, value: Any) -> np.ndarray:
    """`value` as an array of real numbers; TypeError for complex numbers, objects, strings and the like."""
    if value is None:
        raise TypeError(f"{name} must be an array of real numbers, got None")
    try:
        array = np.asarray(value)
    except ValueError as error:  # ragged lists
        raise ValueError(f"{name} must be a rectangular array of real numbers: {error}") from None
    if array.dtype.kind not in "biuf" and array.dtype.name not in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        raise TypeError(f"{name} must be an array of real numbers, got dtype {array.dtype}")
    return array


def as_parameter(name: str, value: Any, shape: tuple[int | None, ...], dtype: np.dtype | None = None) -> np.ndarray:
    """`value` as a parameter: float32 or float64, C-contiguous, aligned; not copied where it is all that.

    `shape` has None where any positive size will do; `dtype` forces one. Without it, what is neither float32 nor
    float64 becomes float32 (wider floats: float64), and so do lists.
    """
    array = as_real(name, value)
    if dtype is None:
        wide = hasattr(value, "dtype") and array.dtype.kind == "f" and array.dtype.itemsize >= 8
        dtype = np.dtype(np.float64 if wide else np.float32)
    if array.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape, strict=True)):
        wanted = tuple("any" if size is None else size for size in shape)
        raise ValueError(f"{name} must have shape {_shape(wanted)}, got {_shape(array.shape)}")
    if 0 in array.shape:
        raise ValueError(f"{name} must not be empty, got shape {_shape(array.shape)}")
    return np.require(array, dtype=dtype, requirements=["C", "A"])


def as_samples(name: str, value: Any, features: int, dtype: np.dtype) -> np.ndarray:
    """`value` as an array of shape (..., features) and the given dtype, not copied where it is one."""
    array = _as_ready(name, value, dtype)
    check_last_axis(name, array.shape, features)
    return array if array.dtype == dtype else array.astype(dtype)


def check_last_axis(name: str, shape: Sequence[int], features: int) -> None:
    """(..., features)."""
    if not shape or shape[-1] != features:
        raise ValueError(f"{name} must have shape (..., {features}), got {_shape(shape)}")


def as_images(name: str, value: Any, channels: int, axes: Sequence[str], dtype: np.dtype) -> np.ndarray:
    """`value` as an array (N, channels, *axes), or of one sample without N, and the given dtype, not copied where it
    is one; `axes` are what messages call the sizes that are open."""
    array = _as_ready(name, value, dtype)
    check_images(name, array.shape, channels, axes)
    return array if array.dtype == dtype else array.astype(dtype)


def check_images(name: str, shape: Sequence[int], channels: int, axes: Sequence[str]) -> None:
    """(N, channels, *axes) or (channels, *axes)."""
    if len(shape) not in (len(axes) + 1, len(axes) + 2) or shape[-1 - len(axes)] != channels:
        wanted = _shape(("N", channels, *axes))
        raise ValueError(f"{name} must have shape {wanted}, or that of one sample without N, got {_shape(shape)}")


def as_indices(name: str, value: Any) -> np.ndarray:
    """`value` as an array of integers, not copied where it is one; TypeError for other numbers, and for booleans."""
    array = as_real(name, value)
    if array.size == 0 and not hasattr(value, "dtype"):  # an empty list
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got dtype {array.dtype}: indices are not rounded, cast them")
    return array


def check_range(name: str, indices: np.ndarray, count: int) -> None:
    """IndexError for the first of the indices that is not in [0, count)."""
    if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < count:
        place = int(np.argmax((indices < 0) | (indices >= count)))
        where = tuple(map(int, np.unravel_index(place, indices.shape)))
        raise IndexError(
            f"{name} must hold indices from 0 to {count - 1}, got {int(indices.reshape(-1)[place])} at {where}"
        )


def check_each(name: str, value: Any, axes: int, low: int) -> tuple[int, ...]:
    """An integer for every axis, or a tuple with one for each, all of them at least `low`."""
    if not isinstance(value, tuple | list):
        return (check_integer(name, value, low),) * axes
    if len(value) != axes:
        raise ValueError(f"{name} must be an integer or {axes} of them, got {value!r}")
    return tuple(check_integer(name, each, low) for each in value)


def _as_ready(name: str, value: Any, dtype: np.dtype) -> Any:
    """An array as it is, on a device too, where it has the dtype; else as real numbers on the host."""
    ready = isinstance(value, np.ndarray) or is_device_array(value)
    return value if ready and value.dtype == dtype else as_real(name, value)


def is_device_array(value: Any) -> bool:
    """Whether a value is in a GPU's memory: CuPy's, PyTorch's, JAX's, Numba's arrays and nblora's own."""
    if isinstance(value, np.ndarray):
        return False
    # DLPack's kinds 2 and 13 are CUDA's memory. It is asked first: to look for the interface is to read it, by which an
    # array of nblora counts as lent.
    if hasattr(value, "__dlpack_device__") and int(value.__dlpack_device__()[0]) in (2, 13):
        return True
    return hasattr(value, "__cuda_array_interface__")


def check_finite(name: str, array: np.ndarray, dtype: np.dtype) -> None:
    """ValueError that names the first sample in which a value is not finite once cast to `dtype`."""
    if array.dtype.kind in "biu":
        return
    step = max(1, _TOGETHER * len(array) // max(1, array.size))
    for start in range(0, len(array), step):
        with np.errstate(over="ignore"):
            finite = np.isfinite(array[start : start + step].astype(dtype, copy=False))
        if not finite.all():
            place = np.argwhere(~finite)[0]
            place[0] += start
            value = array[tuple(place)]
            raise ValueError(
                f"{name} must be finite in {dtype}, got {value} at sample {place[0]}: "
                "replace or drop such samples, for example with numpy.isfinite"
            )


def as_rows(array: np.ndarray) -> np.ndarray:
    """View (..., features) as (N, features), C-contiguous and aligned; copies only what is neither."""
    return as_contiguous(array if array.ndim == 2 else array.reshape((math.prod(array.shape[:-1]), array.shape[-1])))


def as_contiguous(array: np.ndarray) -> np.ndarray:
    """The array itself where it is C-contiguous and aligned, else a copy that is."""
    if array.flags.c_contiguous and array.flags.aligned:
        return array
    return np.require(array, requirements=["C", "A"])


def is_writeable(array: Any) -> bool:
    """Whether an array, which may be on a device, can be changed in place."""
    return bool(getattr(getattr(array, "flags", None), "writeable", True))


def check_writeable(name: str, array: np.ndarray) -> None:
    """ValueError for a read-only array about to be trained in place."""
    if not is_writeable(array):
        raise ValueError(
            f"{name} is read-only and cannot be trained in place: give the layer a copy of it, or freeze it "
            "(a base held as bfloat16 is read-only: move it with precision='float32')"
        )


def _shape(shape: Sequence[object]) -> str:
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"


def _describe(value: Any) -> str:
    return "None" if value is None else f"{value!r} of type {type(value).__name__}"


def _remedy(text: str) -> str:
    return f": {text}" if text else ""
