"""Values worked out by hand; they hold to 1e-12 in float64."""

import numpy as np
import pytest

import nblora

pytestmark = pytest.mark.small

EXACT = {"rtol": 0, "atol": 1e-12}
A = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
B = [[1.0, 2.0], [3.0, 4.0]]
PRODUCT = [[2.0, 4.0], [6.0, 8.0], [8.0, 12.0]]


def filled(kind, layout=nblora.Dense, **settings):
    shape = (3, 2) if layout is nblora.Dense else (2, 3)
    adapter = kind(layout(np.zeros(shape)), 2, 4.0, **settings)
    adapter.set_parameter("lora_A", A)
    adapter.set_parameter("lora_B", B)
    return adapter


def lora_layer():
    layer = nblora.LoRALayer(3, 2, 2, 4.0, dtype="float64")
    layer.set_parameter("lora_A", A)
    layer.set_parameter("lora_B", B)
    return layer


MAKERS = {
    "LoRALayer": lora_layer,
    "LoRAAdapter": lambda: filled(nblora.LoRAAdapter),
    "DeltaLoRAAdapter": lambda: filled(nblora.DeltaLoRAAdapter),
    "on FullyConnected": lambda: filled(nblora.DeltaLoRAAdapter, nblora.FullyConnected),
}


@pytest.fixture(params=MAKERS, ids=str)
def layer(request):
    return MAKERS[request.param]()


def test_forward(layer):
    assert layer.scaling == 2.0
    np.testing.assert_allclose(layer.forward([1.0, 2.0, 3.0]), [38.0, 56.0], **EXACT)
    np.testing.assert_allclose(layer.forward([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), [[38, 56], [86, 128]], **EXACT)


@pytest.mark.parametrize("layout", [nblora.Dense, nblora.FullyConnected])
def test_merged_product(layout):
    merged = filled(nblora.LoRAAdapter, layout).merge_to_original_layer()
    np.testing.assert_allclose(merged.get_parameter("weight"), PRODUCT, **EXACT)


def test_gradients(layer):
    layer.forward([1.0, 2.0, 3.0])
    np.testing.assert_allclose(layer.backward([1.0, 1.0]), [6.0, 14.0, 20.0], **EXACT)
    packed = layer.get_parameter_gradients()
    np.testing.assert_allclose(packed[:6].reshape(3, 2), [[6, 14], [12, 28], [18, 42]], **EXACT)
    np.testing.assert_allclose(packed[6:10].reshape(2, 2), [[8, 8], [10, 10]], **EXACT)


@pytest.mark.parametrize("fused", [False, True])
def test_update(layer, fused):
    layer.forward([1.0, 2.0, 3.0])
    if fused:
        np.testing.assert_allclose(layer.backward_update([1.0, 1.0], 0.1), [6.0, 14.0, 20.0], **EXACT)
    else:
        layer.backward([1.0, 1.0])
        layer.update_parameters(0.1)
    np.testing.assert_allclose(layer.get_parameter("lora_A"), [[0.4, -1.4], [-1.2, -1.8], [-0.8, -3.2]], **EXACT)
    np.testing.assert_allclose(layer.get_parameter("lora_B"), [[0.2, 1.2], [2.0, 3.0]], **EXACT)


@pytest.mark.parametrize("layout", [nblora.Dense, nblora.FullyConnected])
@pytest.mark.parametrize("fused", [False, True])
def test_delta_and_velocity(layout, fused):
    adapter = filled(nblora.DeltaLoRAAdapter, layout, delta_scaling=0.5, momentum_factor=0.9)
    gradient = np.array([[0.5, 0.5], [1.0, 1.0], [1.5, 1.5]])
    adapter.forward([1.0, 2.0, 3.0])
    if fused:
        adapter.backward_update([1.0, 1.0], 0.1)
    else:
        adapter.backward([1.0, 1.0])
        np.testing.assert_allclose(adapter.get_parameter_gradients()[10:].reshape(3, 2), gradient, **EXACT)
        np.testing.assert_array_equal(adapter.get_parameter("velocity"), 0)  # never updated in backward
        adapter.update_parameters(0.1)
    np.testing.assert_allclose(adapter.get_parameter("velocity"), 0.1 * gradient, **EXACT)
    np.testing.assert_allclose(adapter.get_current_delta(), -0.01 * gradient, **EXACT)
