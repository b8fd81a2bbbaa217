"""Which kernels the backend launches, with the types of their arguments, without running any."""

import numpy as np

from nblora.backends.cuda.attention import ATTENTION
from nblora.backends.cuda.shapes import PLAIN, TENSOR
from nblora.backends.device import as_argument
from nblora.backends.protocol import Base, Delta, LowRank, Operands
from tests.cuda.emulated import EmulatedDevice, make_backend


class RecordingDevice(EmulatedDevice):
    """Launches nothing."""

    busy = 512

    def launch(self, kernel, grid, threads, *arguments):
        self.launches.append((kernel, grid, threads, [as_argument(a) for a in arguments]))


def recording_backend(precision="float32"):
    """The backend with the tiles of a real device."""
    backend = make_backend(precision=precision, shapes=TENSOR if precision == "tf32" else PLAIN)
    backend._device, backend._plain, backend._attention = RecordingDevice(), PLAIN, ATTENTION
    return backend


def record(backend, dtype, transposed, samples=600, delta=True, train=False, masked=False, low_rank=True, code=2):
    """(name, kernel, threads, Numba types of the arguments) of what a forward, backward, sweep and merge launch."""
    inputs, outputs, rank = 24, 40, 8
    stored = (outputs, inputs) if transposed else (inputs, outputs)

    def new(*shape):
        return backend.from_host(np.zeros(shape, dtype))

    weight = backend.base_from_host(np.zeros(stored, dtype))
    operands = Operands(
        Base(weight, new(outputs), transposed),
        LowRank(new(inputs, rank), new(rank, outputs), 2.0) if low_rank else None,
        Delta(new(*stored), new(*stored), 0.1, 0.9) if delta else None,
        code,
        train,
    )
    mask = new(samples, inputs) if masked else None
    backend._device.launches.clear()
    y, saved = backend.forward(new(samples, inputs), operands, mask, True)
    backend.backward(y, saved, operands)
    for multiprocessors in (0, 1, 2):  # for which the update has tiles enough, too few, and so few that it is split
        backend._device.multiprocessors = multiprocessors
        backend.backward_update(y, saved, operands, 0.1, 0.1)
        backend._device.settle()
    backend.merge(operands)
    return launched(backend)


def record_updates(backend, dtype, shape=(20, 12)):
    """The same of every update, small operation and loss."""
    a, b, c, d = (backend.from_host(np.zeros(shape, dtype)) for _ in range(4))
    labels = backend.from_host(np.zeros(shape[0], np.int64))
    backend._device.launches.clear()
    backend.zeros_like(a)
    backend.sgd_update(a, b, 0.1)
    backend.momentum_update(a, b, c, 0.9, 0.1)
    backend.adamw_update(a, b, c, d, 0.1, (0.9, 0.99), 1e-8, 0.1, 1)
    backend.add(a, b)
    backend.scale(a, 2.0)
    backend.sum_of_squares(a)
    backend._masked(a, b)
    backend.dropout_mask(np.random.default_rng(0), shape, 0.5, np.dtype(dtype))
    backend.mean_squared_error(a, b)
    backend.binary_cross_entropy(a, b)
    backend.softmax_cross_entropy(a, labels)
    return launched(backend)


def launched(backend):
    """What was launched since the list was cleared, each kernel once for each combination of types."""
    import numba

    backend._device.settle()
    found = {}
    for kernel, _, threads, arguments in backend._device.launches:
        types = tuple(numba.typeof(argument) for argument in arguments)
        found.setdefault((kernel, types), (kernel.py_func.__name__, kernel, threads, types))
    return list(found.values())
