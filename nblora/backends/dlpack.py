"""Arrays from and to other libraries: by DLPack, or by `__cuda_array_interface__` where they lack it.

DLPack tells the producer the consumer's stream, and it makes that stream wait for what it has under way on its own.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

CPU, CUDA, CUDA_MANAGED = 1, 2, 13  # DLPack's kinds of device
_KINDS = {0: "i", 1: "u", 2: "f", 5: "c", 6: "b"}
_CODES = {kind: code for code, kind in _KINDS.items()}
_BFLOAT16 = 4


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_DELETER = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _DELETER))

_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_rename = ctypes.pythonapi.PyCapsule_SetName
_rename.restype, _rename.argtypes = ctypes.c_int, (ctypes.py_object, ctypes.c_char_p)
_DESTRUCTOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, _DESTRUCTOR)
# Capsules that are being destroyed are handed over as addresses: a reference would bring them back to life.
_is_unused = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_dying_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class Foreign:
    """Memory of another library, kept alive by this object."""

    def __init__(
        self, address: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: np.dtype, keep: Any
    ) -> None:
        self.address, self.shape, self.dtype, self._keep = address, shape, dtype, keep
        dense, stride = [], dtype.itemsize
        for extent in reversed(shape):
            dense.append(stride)
            stride *= extent
        self._dense = tuple(reversed(dense))
        self.strides = self._dense if strides is None else strides

    @property
    def is_contiguous(self) -> bool:
        """Whether it is C-contiguous; a stride along a single element, or in an empty array, says nothing."""
        if 0 in self.shape:
            return True
        return all(n == 1 or a == b for n, a, b in zip(self.shape, self.strides, self._dense, strict=True))

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last."""
        reach = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        if any(stride < 0 for stride in self.strides):
            raise ValueError("an array with negative strides cannot be taken from a GPU: copy it there first")
        return reach + self.dtype.itemsize


class _Capsule:
    """A tensor taken out of its capsule, whose producer hears when it is no longer needed."""

    def __init__(self, capsule: Any) -> None:
        self._managed = ctypes.cast(_pointer_of(capsule, b"dltensor"), ctypes.POINTER(_Managed))
        _rename(capsule, b"used_dltensor")

    @property
    def tensor(self) -> _Tensor:
        return self._managed.contents.tensor

    def __del__(self) -> None:
        if self._managed.contents.deleter:
            self._managed.contents.deleter(self._managed)


def take(value: Any, stream: int, owner: Callable[[int], int], index: int) -> Foreign | None:
    """What `value` holds on GPU `index`, ready for `stream`; None for what is on the host.

    `owner` tells the GPU of an address.

    Raises
    ------
    ValueError
        For an array of another GPU, before its producer is asked for anything.
    """
    if isinstance(value, np.ndarray):
        return None
    if hasattr(value, "__dlpack_device__") and hasattr(value, "__dlpack__"):
        kind, where = map(int, value.__dlpack_device__())
        if kind not in (CUDA, CUDA_MANAGED):
            return None
        _refuse_another(where, index)
        return _from_capsule(_Capsule(value.__dlpack__(stream=stream)))
    if hasattr(value, "__cuda_array_interface__"):
        given = value.__cuda_array_interface__
        address = int(given["data"][0])
        _refuse_another(owner(address) if address else index, index)
        return _from_interface(value, given)
    return None


def _refuse_another(where: int, index: int) -> None:
    if where != index:
        raise ValueError(
            f"the array is on cuda:{where} and the layer on cuda:{index}: move one of them, as by to('cuda:{where}')"
        )


def _from_capsule(capsule: _Capsule) -> Foreign:
    tensor = capsule.tensor
    if tensor.code not in _KINDS or tensor.lanes != 1 or tensor.bits % 8:
        raise TypeError(f"arrays of DLPack's type {tensor.code} with {tensor.bits} bits are not taken: cast to float32")
    dtype = np.dtype(f"{_KINDS[tensor.code]}{tensor.bits // 8}")
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = tuple(tensor.strides[i] * dtype.itemsize for i in range(tensor.ndim)) if tensor.strides else None
    return Foreign((tensor.data or 0) + tensor.byte_offset, shape, strides, dtype, capsule)


def _from_interface(value: Any, given: dict[str, Any]) -> Foreign:
    from cuda.bindings import driver

    stream = given.get("stream")
    if stream not in (None, 1):
        driver.cuStreamSynchronize(stream)
    return Foreign(
        int(given["data"][0]), tuple(given["shape"]), given.get("strides"), np.dtype(given["typestr"]), value
    )


# --- to other libraries -------------------------------------------------------------------------------------------

_given: dict[int, tuple[Any, ...]] = {}
"""What consumers have not let go of yet, by the address of its description."""


def give(
    address: int, shape: tuple[int, ...], dtype: np.dtype, bfloat16: bool, device: tuple[int, int], keep: Any
) -> Any:
    """A DLPack capsule of C-contiguous memory; `keep` lives until the consumer has let go of it."""
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    managed = _Managed()
    tensor = managed.tensor
    tensor.data, tensor.shape, tensor.ndim = address or None, sizes, len(shape)
    tensor.device_type, tensor.device_id = device
    tensor.code, tensor.bits, tensor.lanes = _BFLOAT16 if bfloat16 else _CODES[dtype.kind], 8 * dtype.itemsize, 1
    managed.deleter = _let_go
    place = ctypes.addressof(managed)
    _given[place] = managed, sizes, keep
    return _new_capsule(place, b"dltensor", _forget)


@_DELETER
def _let_go(managed: Any) -> None:
    """The consumer needs it no longer; it may say so from any thread."""
    _given.pop(ctypes.addressof(managed.contents), None)


@_DESTRUCTOR
def _forget(capsule: int) -> None:
    """A capsule is gone: nobody will let go of one that nobody took."""
    if _is_unused(capsule, b"dltensor"):
        _given.pop(_dying_pointer(capsule, b"dltensor"), None)
