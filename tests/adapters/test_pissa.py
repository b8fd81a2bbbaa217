"""init="pissa": A and B begin at the principal singular values, and the base without that part."""

import numpy as np
import pytest

import nblora
from nblora.adapters import ADAPTERS, DoRAAdapter
from nblora.formats import load_peft
from tests.adapters.support import KINDS, base_of
from tests.helpers import assert_close, snapshot

pytestmark = pytest.mark.small
METHODS = [cls for cls in ADAPTERS.values() if cls.method not in ("zi", "miss")]


@pytest.fixture(params=METHODS, ids=lambda cls: cls.method)
def method(request):
    return request.param


def learning(adapter, x, rng, steps=3):
    for _ in range(steps):
        adapter.backward_update(rng.normal(size=adapter(x).shape), 0.02)
    return adapter


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_where_the_base_stands(method, kind):
    base, x = base_of(kind)
    before, plain = snapshot(base), base(x)
    adapter = method(base, 3, alpha=5.0, init="pissa", seed=1)
    assert adapter.base_layer is base
    np.testing.assert_allclose(adapter(x), plain, rtol=0, atol=1e-10)
    W, A, B = (adapter.get_parameter(name) for name in ("base.weight", "lora_A", "lora_B"))
    values = np.linalg.svd(W, compute_uv=False)
    assert np.linalg.norm(W - adapter.scaling * A @ B) == pytest.approx(np.linalg.norm(values[3:]), rel=1e-10)
    assert np.linalg.norm(A) == pytest.approx(np.linalg.norm(B))
    for name, value in before.items():
        np.testing.assert_array_equal(base.get_parameter(name), value)
    with adapter.disable_adapter():
        np.testing.assert_array_equal(adapter(x), plain)


@pytest.mark.parametrize("kind", ["dense", "fully_connected"])
def test_it_trains_as_lora_on_the_residual_base_does(kind, rng):
    base, x = base_of(kind)
    adapter = nblora.LoRAAdapter(base, 3, alpha=5.0, init="pissa", seed=1)
    A, B = adapter.get_parameter("lora_A"), adapter.get_parameter("lora_B")
    residual = base.clone()
    residual.set_parameter("weight", base.get_parameter("weight") - adapter.scaling * A @ B)
    plain = nblora.LoRAAdapter.from_factors(residual, A, B, 5.0)
    for _ in range(4):
        assert_close(adapter(x), plain(x))
        g = rng.normal(size=plain(x).shape)
        assert_close(adapter.backward(g), plain.backward(g))
        assert_close(adapter.get_parameter_gradients(), plain.get_parameter_gradients())
        adapter.update_parameters(0.05)
        plain.update_parameters(0.05)
    assert_close(adapter.merge_to_original_layer().weight, plain.merge_to_original_layer().weight)


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_copies_keep_where_it_began(method, kind, tmp_path, rng):
    base, x = base_of(kind)
    adapter = learning(method(base, 2, alpha=3.0, init="pissa", seed=1), x, rng)
    adapter.save(tmp_path / "a.safetensors")
    g = rng.normal(size=adapter(x).shape)
    for copy in (nblora.load(tmp_path / "a.safetensors"), adapter.clone()):
        np.testing.assert_array_equal(copy(x), adapter(x))
        np.testing.assert_array_equal(copy.get_parameter("start_A"), adapter.get_parameter("start_A"))
        copy.backward(g)
        adapter(x)
        adapter.backward(g)
        np.testing.assert_array_equal(copy.get_parameter_gradients(), adapter.get_parameter_gradients())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_rslora", [True, False])
@pytest.mark.parametrize("method", [nblora.LoRAAdapter, DoRAAdapter])
def test_pefts_file_is_a_plain_one_of_twice_the_rank(method, kind, use_rslora, tmp_path, rng):
    base, x = base_of(kind)
    adapter = learning(method(base, 2, alpha=3.0, init="pissa", use_rslora=use_rslora, seed=1), x, rng)
    (report,) = nblora.save_peft({"layer": adapter}, tmp_path / "a", dtype="float64")
    assert report.rank == 4
    assert report.scaling == adapter.scaling
    model = nblora.Sequential({"layer": base_of(kind)[0]})  # the base as it is, no residual
    assert_close(load_peft(tmp_path / "a", model)(x), adapter(x))
    assert '"init_lora_weights": true' in (tmp_path / "a" / "adapter_config.json").read_text()


def test_a_model_and_a_sweep_take_it(rng):
    layers = [nblora.Dense.random(6, 8, dtype="float64", seed=1), nblora.Dense.random(8, 3, dtype="float64", seed=2)]
    model, x = nblora.Sequential(*layers), rng.normal(size=(30, 6))
    before = model(x)
    model.adapt("0", rank=2, init="pissa", modules_to_save="1", seed=1)
    np.testing.assert_allclose(model(x), before, rtol=0, atol=1e-10)
    assert model.parameter_count == 2 * (6 + 8) + 8 * 3 + 3
    nblora.fit(model, x, np.arange(30) % 3, loss="cross_entropy", epochs=2, progress=False)
    assert_close(model.merge()(x), model(x))


def test_what_has_no_meaning_is_refused(rng):
    base = nblora.Dense.random(6, 6, seed=1)
    with pytest.raises(ValueError, match="lora_dropout must be 0"):
        nblora.LoRAAdapter(base, 2, init="pissa", lora_dropout=0.1)
    with pytest.raises(ValueError, match="a Sequential has not"):
        nblora.LoRAAdapter(nblora.Sequential(base), 2, init="pissa")
    with pytest.raises(ValueError, match="init must be one of"):
        ADAPTERS["zi"](base, 2, init="pissa")
    with pytest.raises(ValueError, match=r"init must be one of.*pissa"):
        nblora.LoRAAdapter(base, 2, init="svd")
    broken = nblora.Dense(np.full((4, 4), np.nan))
    with pytest.raises(ValueError, match="not finite"):
        nblora.LoRAAdapter(broken, 2, init="pissa")
