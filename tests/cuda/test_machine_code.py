"""Machine code of every kernel the backend launches, for every architecture, from both of the compiler's outputs.

What a GPU would run is looked at where there is none: no stack, no local memory, registers and shared memory for two
blocks an SM, 128-bit loads, and inner loops that mostly multiply.
"""

import pytest

pytest.importorskip("greenlet", reason="the emulator needs greenlet (extra test)")

from nblora.kernels.common.cuda.target import COMPILED
from tests.cuda import machine_code
from tests.cuda.machine_code import ARCHITECTURES, OUTPUTS, assert_fits, compile_kernel
from tests.cuda.recorded import record, record_updates, recording_backend

needs_compiler = pytest.mark.skipif(
    not COMPILED or machine_code.disassembler() is None,
    reason="needs numba-cuda and nvdisasm: pip install 'nblora[cuda12]' nvidia-cuda-nvdisasm",
)
pytestmark = needs_compiler

MAIN = ("forward", "input_gradient", "dense_update")
# precision, dtype, transposed, settings of `record`
VARIANTS = [
    ("float32", "float32", False, {}),
    ("float32", "float32", True, {"masked": True, "train": True}),
    ("float32", "float32", False, {"delta": False, "samples": 20, "train": True}),
    ("float32", "float32", True, {"samples": 1}),
    ("float32", "float64", False, {"masked": True, "train": True}),
    ("float32", "float64", True, {"samples": 1}),
    ("tf32", "float32", False, {"masked": True, "train": True}),
    ("tf32", "float32", True, {"samples": 20}),
    ("bf16-base", "float32", False, {}),
    ("bf16-base", "float32", True, {"samples": 1}),
]


def kernels(variant):
    precision, dtype, transposed, settings = variant
    return record(recording_backend(precision), dtype, transposed, **settings)


# Least share of multiplications in the inner loop. The whole step of a float64 or tensor-core product is one loop, its
# global loads included, with the scalar ones of edges, which a whole vector jumps over.
LEAST = {"FFMA": 0.6, "DFMA": 0.34, "HMMA": 0.025}


def assert_tiled(code, dtype, tensor):
    """The loop that multiplies is one of multiplications, and what feeds it comes in 128-bit vectors."""
    assert code.count("LDG.E.128") > 0
    assert code.shared_vectors >= 4
    what = "HMMA" if tensor else "FFMA" if dtype == "float32" else "DFMA"
    loops = code.main_loops(what)
    assert loops
    assert all(count >= 16 and count / length >= LEAST[what] for count, length in loops), loops


@pytest.mark.parametrize("architecture", [(8, 0), (9, 0)], ids=str)
def test_main_kernels(architecture):
    for variant in (VARIANTS[0], VARIANTS[6]):
        for name, kernel, threads, types in kernels(variant):
            if name in MAIN:
                code = compile_kernel(kernel, types, architecture, "ltoir")
                assert threads * kernel.targetoptions["launch_bounds"][1] >= 12 * 32
                assert_fits(code, kernel, threads)
                assert_tiled(code, "float32", variant[0] == "tf32")


@pytest.mark.slow
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_kernel(variant, architecture, output):
    precision, dtype, _, _ = variant
    if precision == "tf32" and architecture < (8, 0):
        pytest.skip("tensor cores take float32 from compute capability 8.0 on")
    for name, kernel, threads, types in kernels(variant):
        code = compile_kernel(kernel, types, architecture, output)
        assert_fits(code, kernel, threads)
        if name in MAIN:
            tensor = precision == "tf32"
            assert_tiled(code, dtype, tensor)
            if dtype == "float32":
                assert not [op for op in code.opcodes if op in ("DFMA", "DADD", "DMUL")], name


@pytest.mark.slow
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_updates_and_losses(dtype, architecture, output):
    found = record_updates(recording_backend(), dtype)
    names = {name for name, *_ in found}
    assert len(names) == 12
    for name, kernel, threads, types in found:
        code = compile_kernel(kernel, types, architecture, output)
        assert_fits(code, kernel, threads)
        if name in ("momentum", "add", "times", "masked"):
            assert code.count("LDG.E.128") > 0, name
            assert code.count("STG.E.128") > 0, name


def test_what_adds_splits_up_divides_no_integers():
    """A division of 64 bits is a hundred instructions, and would be done for every element."""
    for samples in (600, 1):
        found = record(recording_backend(), "float32", False, samples=samples)
        for name, kernel, _, types in found:
            if name in ("finish", "descend_sums"):
                code = compile_kernel(kernel, types, (9, 0), "ltoir")
                assert code.count("I2F") == 0, name


def test_rules_keep_float32():
    """Constants of the shared rules do not take a float32 kernel to double arithmetic."""
    for name, kernel, _, types in kernels(VARIANTS[3]):
        if name in ("finish", "activation_gradient"):
            code = compile_kernel(kernel, types, (8, 0), "ltoir")
            assert not [op for op in code.opcodes if op in ("DFMA", "DADD", "DMUL")], name
