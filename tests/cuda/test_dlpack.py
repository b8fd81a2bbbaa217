"""Arrays of other libraries: what DLPack and `__cuda_array_interface__` say is read as they mean it."""

import sys

import numpy as np
import pytest

from nblora.backends import dlpack


class OnGPU:
    """A NumPy array that says it is on a GPU, and notes the stream it was asked for."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, *, stream=None):
        self.stream = stream
        return self.array.__dlpack__()


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint16"])
def test_an_array_is_taken_where_it_lies(dtype):
    source = OnGPU(np.arange(6, dtype=dtype).reshape(2, 3))
    taken = dlpack.take(source, 1)
    assert source.stream == 1  # so the producer makes our stream wait for its own
    assert (taken.address, taken.shape, taken.dtype) == (source.array.ctypes.data, (2, 3), np.dtype(dtype))
    assert taken.is_contiguous


def test_a_view_is_found_not_contiguous():
    source = np.arange(24, dtype=np.float32).reshape(4, 6)
    for view in (source.T, source[:, 1:3], source[::2]):
        taken = dlpack.take(OnGPU(view), 1)
        assert not taken.is_contiguous
        assert (taken.shape, taken.strides) == (view.shape, view.strides)
        assert taken.span == np.lib.array_utils.byte_bounds(view)[1] - view.ctypes.data
    assert dlpack.take(OnGPU(source[1:2, :]), 1).is_contiguous


def test_the_producer_hears_when_the_array_is_gone():
    source = np.ones(3, np.float32)
    taken = dlpack.take(OnGPU(source), 1)
    held = sys.getrefcount(source)
    del taken
    assert sys.getrefcount(source) == held - 1


def test_what_is_on_the_host_is_left_there():
    assert dlpack.take(np.ones(3), 1) is None
    assert dlpack.take([1.0], 1) is None


def test_types_without_a_numpy_dtype_are_refused():
    capsule = dlpack._Capsule(np.ones(3, np.float16).__dlpack__())
    capsule._managed.contents.tensor.code = 4  # bfloat16
    with pytest.raises(TypeError, match="cast to float32"):
        dlpack._from_capsule(capsule)


def test_the_interface_is_read():
    pytest.importorskip("cuda.bindings.driver", reason="needs a CUDA extra: pip install 'nblora[cuda12]'")
    array = np.arange(6, dtype=np.float32).reshape(2, 3)

    class Interface:
        __cuda_array_interface__ = array.__array_interface__ | {"stream": 1}

    taken = dlpack.take(Interface(), 1)
    assert (taken.address, taken.shape, taken.dtype) == (array.ctypes.data, (2, 3), np.float32)
