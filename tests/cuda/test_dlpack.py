"""Arrays of other libraries: what DLPack and `__cuda_array_interface__` say is read as they mean it, and said so."""

import gc
import sys
import weakref

import numpy as np
import pytest

from nblora import checks
from nblora.backends import dlpack
from nblora.backends.memory import Memory, Pool


class OnGPU:
    """A NumPy array that says it is on a GPU, and notes the stream it was asked for."""

    stream = None

    def __init__(self, array, index=0):
        self.array, self.index = array, index

    def __dlpack_device__(self):
        return 2, self.index

    def __dlpack__(self, *, stream=None):
        self.stream = stream
        return self.array.__dlpack__()


def take(value, index=0):
    """What GPU `index` takes; every address is of GPU 0."""
    return dlpack.take(value, 1, lambda address: 0, index)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint16"])
def test_an_array_is_taken_where_it_lies(dtype):
    source = OnGPU(np.arange(6, dtype=dtype).reshape(2, 3))
    taken = take(source)
    assert source.stream == 1  # so the producer makes our stream wait for its own
    assert (taken.address, taken.shape, taken.dtype) == (source.array.ctypes.data, (2, 3), np.dtype(dtype))
    assert taken.is_contiguous


def test_a_view_is_found_not_contiguous():
    source = np.arange(24, dtype=np.float32).reshape(4, 6)
    for view in (source.T, source[:, 1:3], source[::2]):
        taken = take(OnGPU(view))
        assert not taken.is_contiguous
        assert (taken.shape, taken.strides) == (view.shape, view.strides)
        assert taken.span == np.lib.array_utils.byte_bounds(view)[1] - view.ctypes.data
    assert take(OnGPU(source[1:2, :])).is_contiguous


def test_the_producer_hears_when_the_array_is_gone():
    source = np.ones(3, np.float32)
    taken = take(OnGPU(source))
    held = sys.getrefcount(source)
    del taken
    assert sys.getrefcount(source) == held - 1


def test_what_is_on_the_host_is_left_there():
    assert take(np.ones(3)) is None
    assert take([1.0]) is None


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

    taken = take(Interface())
    assert (taken.address, taken.shape, taken.dtype) == (array.ctypes.data, (2, 3), np.float32)


def test_an_array_of_another_gpu_is_refused_before_it_is_asked_for():
    pytest.importorskip("cuda.bindings.driver", reason="needs a CUDA extra: pip install 'nblora[cuda12]'")
    source = OnGPU(np.ones(3, np.float32), 1)
    with pytest.raises(ValueError, match=r"on cuda:1 and the layer on cuda:0: move one of them, as by to\('cuda:1'\)"):
        take(source)
    assert source.stream is None
    assert take(source, 1).shape == (3,)

    class Interface:
        __cuda_array_interface__ = source.array.__array_interface__

    with pytest.raises(ValueError, match="on cuda:0 and the layer on cuda:1"):
        take(Interface(), 1)


def test_what_offers_dlpack_alone_is_a_device_array():
    assert checks.is_device_array(OnGPU(np.ones(3)))
    assert not checks.is_device_array(np.ones(3))
    assert not checks.is_device_array([1.0])


class Shown:
    """What a consumer of DLPack sees of a piece of memory."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return dlpack.CPU, 0

    def __dlpack__(self, **_):
        return dlpack.give(
            self.array.ctypes.data, self.array.shape, self.array.dtype, False, self.__dlpack_device__(), self.array
        )


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint16"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (0, 3)], ids=str)
def test_an_array_is_given_where_it_lies(shape, dtype):
    array = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
    seen = np.from_dlpack(Shown(array))
    assert (seen.shape, seen.dtype) == (array.shape, array.dtype)
    np.testing.assert_array_equal(seen, array)
    if array.size:
        assert seen.ctypes.data == array.ctypes.data


def test_what_is_given_lives_until_the_consumer_lets_go():
    array = np.ones(3, np.float32)
    gone = weakref.ref(array)
    seen = np.from_dlpack(Shown(array))
    del array
    gc.collect()
    assert gone() is not None
    del seen
    gc.collect()
    assert gone() is None
    assert not dlpack._given


def test_a_capsule_that_nobody_took_keeps_nothing():
    array = np.ones(3, np.float32)
    capsule = Shown(array).__dlpack__()
    assert len(dlpack._given) == 1
    del capsule
    assert not dlpack._given


def test_bfloat16_is_said():
    array = np.ones(3, np.uint16)
    given = dlpack._Capsule(dlpack.give(array.ctypes.data, (3,), array.dtype, True, (2, 1), array))
    tensor = given.tensor
    assert (tensor.code, tensor.bits, tensor.lanes, tensor.device_type, tensor.device_id) == (4, 16, 1, 2, 1)


def test_memory_that_other_streams_know_is_freed_and_not_used_again():
    freed, places = [], iter(range(512, 10_000, 512))
    pool = Pool(lambda size: next(places), freed.append, 1 << 20)
    held = Memory(0, (4,), np.dtype(np.float32), pool.take(16))
    held.owner.elsewhere = True
    other = pool.take(16)
    del held
    third = pool.take(16)
    assert freed == [512]
    assert (other.address, third.address) == (1024, 1536)
    del other
    assert pool.take(16).address == 1024
