"""Norms of a weight's outputs, for DoRA: values on the emulator, mutants, machine code, traffic."""

import re

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="the emulator needs greenlet (extra test)")

from nblora.backends.protocol import Base, LowRank, Operands
from nblora.backends.reference import ReferenceBackend
from nblora.kernels.common.cuda.target import COMPILED
from tests.cuda import machine_code, mutants
from tests.cuda.emulated import make_backend
from tests.cuda.emulator import ORDERS
from tests.cuda.machine_code import ARCHITECTURES, OUTPUTS, assert_fits, compile_kernel
from tests.cuda.recorded import launched, recording_backend

# in, out, rank
SHAPES = [
    (1, 1, 1), (2, 1, 1), (1, 3, 1), (5, 4, 2), (8, 8, 3), (31, 2, 1), (2, 31, 1), (33, 32, 4), (32, 33, 4), (64, 7, 2),
    (7, 65, 3), (100, 3, 5), (3, 100, 2), (65, 66, 1),
]  # fmt: skip
MODULE = "linear.cuda.norms"
GUARDS = [
    (r"if output < outputs:", "if True:"),
    (r" and output < outputs", ""),
    (r"\(across if transposed else along\) < width", "True"),
    (r"while i < inputs", "while i < inputs - 1"),
    (r"(?<=while i < )norms\.size", "norms.size + 1"),
    (r" if norm != ZERO else ZERO", ""),
]


def operands(rng, shape, dtype, transposed, bring):
    inputs, outputs, rank = shape
    weight, A, B = (rng.normal(size=s).astype(dtype) for s in ((inputs, outputs), (inputs, rank), (rank, outputs)))
    if outputs > 2:
        weight[:, 1] = B[:, 1] = 0  # an output without any weight
    stored = np.ascontiguousarray(weight.T if transposed else weight)
    return Operands(Base(bring(stored), None, transposed), LowRank(bring(A), bring(B), 0.5), None, 0, False)


def check(backend, shape, dtype, transposed):
    """Norms, and what is made of them, are the reference's."""
    bound = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 1e-12, "atol": 1e-13}
    rng, reference = np.random.default_rng(shape), ReferenceBackend()
    given = operands(rng, shape, dtype, transposed, np.asarray)
    magnitude = rng.normal(size=shape[1]).astype(dtype)
    expected = reference.output_norms(given)
    brought = operands(np.random.default_rng(shape), shape, dtype, transposed, backend.from_host)
    norms = backend.output_norms(brought)
    np.testing.assert_allclose(norms.copy_to_host(), expected, **bound)
    scaled = backend.per_norms(backend.from_host(magnitude), norms)
    for found, right in zip(scaled, reference.per_norms(magnitude, expected), strict=True):
        np.testing.assert_allclose(found.copy_to_host(), right, **bound)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype):
    for transposed in (False, True):
        for order in ORDERS:
            check(make_backend(order), shape, dtype, transposed)
    check(make_backend(aligned=False), shape, dtype, True)


def checks(emulated):
    """For mutants: shapes that end everywhere."""
    for order in ("forward", "reverse"):
        for transposed in (False, True):
            for shape in ((65, 66, 1), (33, 32, 4), (7, 3, 2)):
                case = shape, "float32", transposed
                yield lambda order=order, case=case: check(emulated.make_backend(order), *case)


MUTANTS = mutants.mutants((MODULE,), GUARDS)


def test_the_mutants_are_all_there():
    assert len(MUTANTS) == 9
    assert sum("syncthreads" in name for name, *_ in MUTANTS) == 2


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m[0])
def test_mutants(mutant):
    _, module, mutate = mutant
    assert mutants.killed_by(module, mutate, checks) is not None


def test_traffic():
    """The merged weight is written once and read once; a norm written once."""
    backend, shape = make_backend(), (33, 18, 2)
    given = operands(np.random.default_rng(0), shape, "float32", True, backend.from_host)
    norms = backend.output_norms(given)
    traffic = backend._device.traffic
    kernel, _, _, (weight, written) = backend._device.launches[-1]
    assert kernel.py_func.__name__ == "output_norms"
    assert traffic[id(weight.base), "read"] == traffic[id(weight.base), "written"] == 33 * 18
    assert traffic[id(given.base.weight.memory.base), "read"] == 33 * 18
    assert traffic[id(written.base), "written"] == norms.size


@pytest.mark.skipif(
    not COMPILED or machine_code.disassembler() is None,
    reason="needs numba-cuda and nvdisasm: pip install 'nblora[cuda12]' nvidia-cuda-nvdisasm",
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_machine_code(dtype):
    backend = recording_backend()
    for transposed in (False, True):
        given = operands(np.random.default_rng(0), (24, 40, 8), dtype, transposed, backend.from_host)
        backend.per_norms(backend.output_norms(given), backend.output_norms(given))
    found = [row for row in launched(backend) if re.search("norms", row[0])]
    assert len({kernel for _, kernel, *_ in found}) == 3
    for name, kernel, threads, types in found:
        for architecture in ARCHITECTURES:
            for output in OUTPUTS:
                code = compile_kernel(kernel, types, architecture, output)
                assert_fits(code, kernel, threads)
                if dtype == "float32":
                    assert not [op for op in code.opcodes if op in ("DFMA", "DADD", "DMUL")], name
