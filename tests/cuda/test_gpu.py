"""What runs on a GPU alone, and needs nothing of the emulator. Ready for a device; nothing here has run on one yet."""

import pytest

import nblora
from nblora import backends
from tests.cuda import contract, models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda:0" not in nblora.devices(), reason="needs an NVIDIA GPU, its driver, and nblora[cuda12]"),
]


def move(layer):
    return layer.to("cuda")


@pytest.mark.parametrize("samples", [1, 5, 64, 300])
@pytest.mark.parametrize("layout", [nblora.Dense, nblora.FullyConnected])
@pytest.mark.parametrize("kind", [nblora.LoRAAdapter, nblora.DeltaLoRAAdapter])
def test_step(rng, kind, layout, samples):
    contract.check_step(rng, move, samples, kind=kind, layout=layout)


def test_life(rng, tmp_path):
    contract.check_life(rng, move, tmp_path / "adapter.safetensors")
    contract.check_gradients_move(rng, move)
    contract.check_device_arrays(rng, move)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_fit(rng, optimizer):
    contract.check_fit(rng, move, optimizer)


@pytest.mark.parametrize("name", models.CASES)
def test_models(name):
    models.check_learning(move, name)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation(name):
    models.check_generation(move, name, tokens=12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1000, 997, 8), (7, 130, 257, 3), (256, 1024, 1024, 64), (300, 1000, 997, 1)], ids=str
)
def test_kernels(shape, transposed, dtype):
    from tests.test_kernels import CASES, run

    for case in CASES:
        if case.base or not transposed:
            run(shape, dtype, transposed, case, backends.resolve("cuda"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows(dtype):
    """Rows as models have them: of 768 features, and logits for a vocabulary."""
    from tests.cuda import rows

    backend = backends.resolve("cuda")
    rows.check_tables(backend, dtype, 1000, 3000, 768)
    for samples, count in ((1000, 3000), (5000, 2)):
        rows.check_sums(backend, dtype, samples, count, 768)
    rows.check_means(backend, dtype, 32, 4000, 384)
    rows.check_columns(backend, dtype, 1000, 3, 768)
    for width in (1, 127, 768, 4096, 5120):
        rows.check_norm(backend, dtype, 300, width)
        rows.check_pointwise(backend, dtype, 5, width)
        rows.check_dropout(backend, dtype, 5, width)
    for width in (2, 127, 1024, 50257):
        rows.check_largest(backend, dtype, 40, width)
        rows.check_softmax(backend, dtype, 40, width)


def test_tensor_cores():
    from tests.test_kernels import Case, run

    run((256, 1024, 1024, 64), "float32", False, Case(), backends.resolve("cuda", "tf32"), 1e-3)
