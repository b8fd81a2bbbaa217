"""The contract's table of adapters: attributes, dropout, disabling, merging, resetting."""

import inspect
import math

import numpy as np
import pytest

import nblora
from tests import oracle
from tests.helpers import (
    ADAPTERS,
    DTYPES,
    LAYOUTS,
    assert_close,
    assert_disjoint,
    assert_unchanged,
    make_adapter,
    make_layer,
    randomise,
    snapshot,
    state_of,
)

pytestmark = pytest.mark.small
every_adapter = pytest.mark.parametrize("kind", ADAPTERS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)

SIGNATURES = {
    nblora.Dense: "(weight, bias=None, *, activation='identity')",
    nblora.FullyConnected: "(weight, bias=None, *, activation='identity')",
    nblora.Dense.random: (
        "(in_features, out_features, *, activation='identity', bias=True, dtype='float32', seed=None)"
    ),
    nblora.LoRALayer: (
        "(in_features, out_features, rank, alpha=-1.0, *, use_rslora=False, init='kaiming', dtype='float32', seed=None)"
    ),
    nblora.LoRAAdapter: (
        "(base_layer, rank, alpha=-1.0, freeze_base_layer=True, *, use_rslora=False, init='kaiming', "
        "lora_dropout=0.0, seed=None)"
    ),
    nblora.DeltaLoRAAdapter: (
        "(base_layer, rank, alpha=-1.0, delta_scaling=0.1, momentum_factor=0.9, freeze_base_layer=True, *, "
        "use_rslora=False, init='kaiming', lora_dropout=0.0, seed=None)"
    ),
}


@pytest.mark.parametrize("call", SIGNATURES, ids=lambda call: call.__qualname__)
def test_signature(call):
    signature = inspect.signature(call)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[call]


# --- attributes --------------------------------------------------------------------------------------------------


@every_adapter
def test_attributes(rng, kind):
    base = make_layer(rng)
    adapter = kind(base, 3, 6.0, freeze_base_layer=False, seed=1)
    assert adapter.base_layer is base
    assert isinstance(adapter.lora_layer, nblora.LoRALayer)
    assert (adapter.rank, adapter.alpha, adapter.scaling) == (3, 6.0, 2.0)
    assert adapter.is_base_layer_frozen is False
    assert kind(base, 3).is_base_layer_frozen is True
    assert adapter.lora_dropout == 0.0


def test_delta_attributes(rng):
    adapter = nblora.DeltaLoRAAdapter(make_layer(rng), 3, -1.0, 0.25, 0.5)
    assert (adapter.delta_scaling, adapter.momentum_factor) == (0.25, 0.5)
    default = nblora.DeltaLoRAAdapter(make_layer(rng), 3)
    assert (default.delta_scaling, default.momentum_factor) == (0.1, 0.9)
    assert adapter.delta.shape == adapter.velocity.shape == (7, 5)


@every_adapter
def test_negative_alpha_means_the_rank(rng, kind):
    for alpha in (-1.0, -7, -math.inf):
        adapter = kind(make_layer(rng), 4, alpha)
        assert (adapter.alpha, adapter.scaling) == (4.0, 1.0)


@every_adapter
def test_rslora_divides_by_the_square_root(rng, kind):
    adapter = make_adapter(rng, kind, rank=4, alpha=6.0, use_rslora=True)
    assert adapter.scaling == 3.0
    x = rng.normal(size=(3, 7))
    assert_close(adapter.forward(x), oracle.forward(x, state_of(adapter)))


@every_adapter
@every_layout
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_is_that_of_the_base(rng, kind, layout, dtype):
    adapter = make_adapter(rng, kind, make_layer(rng, layout=layout, dtype=dtype))
    assert adapter.dtype == dtype
    assert {adapter.get_parameter(name).dtype for name in adapter.parameter_names()} == {np.dtype(dtype)}


@every_layout
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_parameter_count(rng, layout, frozen, bias):
    base = make_layer(rng, layout=layout, bias=bias)
    own = 0 if frozen else 35 + (5 if bias else 0)
    assert make_adapter(rng, nblora.LoRAAdapter, base, frozen=frozen).parameter_count == own + 3 * 12
    assert make_adapter(rng, nblora.DeltaLoRAAdapter, base, frozen=frozen).parameter_count == own + 3 * 12 + 35


@every_layout
def test_delta_and_factors_are_in_logical_shape(rng, layout):
    adapter = make_adapter(rng, base=make_layer(rng, layout=layout))
    assert adapter.get_current_delta().shape == (7, 5)
    assert adapter.lora_layer.A.shape == (7, 3)
    assert adapter.lora_layer.B.shape == (3, 5)
    x = np.eye(7)
    expected = adapter.base_layer.forward(x) + adapter.lora_layer.forward(x) + 0.1 * adapter.get_current_delta()
    assert_close(adapter.forward(x), expected)


# --- new adapters ------------------------------------------------------------------------------------------------


@every_adapter
@every_layout
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
def test_a_new_adapter_computes_its_base(rng, kind, layout, dtype, activation):
    base = make_layer(rng, (33, 17), layout, dtype, activation)
    adapter = kind(base, 4, seed=0)
    np.testing.assert_array_equal(adapter.get_parameter("lora_B"), 0)
    if kind is nblora.DeltaLoRAAdapter:
        np.testing.assert_array_equal(adapter.get_parameter("delta"), 0)
        np.testing.assert_array_equal(adapter.get_parameter("velocity"), 0)
    x = rng.normal(size=(9, 33)).astype(dtype)
    assert_close(adapter.forward(x), base.forward(x))


def test_kaiming_draws_within_its_bound():
    A = nblora.LoRALayer(400, 50, 40, seed=0).A
    bound = 1 / math.sqrt(400)
    assert np.abs(A).max() <= bound
    assert A.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(A.mean()) < bound / 50


def test_gaussian_draws_with_std_one_over_rank():
    A = nblora.LoRALayer(400, 50, 40, init="gaussian", seed=0).A
    assert A.std() == pytest.approx(1 / 40, rel=0.02)
    assert np.abs(A).max() > 2 / 40


@every_adapter
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_same_seed_same_adapter(rng, kind, init):
    base = make_layer(rng)
    first, second = (kind(base, 3, init=init, seed=5, lora_dropout=0.5) for _ in range(2))
    assert_unchanged(first, snapshot(second))
    other = kind(base, 3, init=init, seed=6)
    assert not np.array_equal(first.get_parameter("lora_A"), other.get_parameter("lora_A"))
    x = rng.normal(size=(4, 7))
    for adapter in (first, second):
        adapter.set_parameter("lora_B", np.ones((3, 5)))
    np.testing.assert_array_equal(first.forward(x), second.forward(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_layers(layout):
    first, second = (layout.random(100, 40, dtype="float64", seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.weight, second.weight)
    np.testing.assert_array_equal(first.bias, second.bias)
    assert first.weight.shape == ((100, 40) if layout is nblora.Dense else (40, 100))
    assert layout.random(4, 3, bias=False).bias is None
    assert layout.random(4, 3).dtype == np.float32
    assert layout.random(4, 3, activation="tanh").activation == "tanh"
    assert np.any(layout.random(100, 40, seed=4).weight != first.weight)


# --- a frozen base -----------------------------------------------------------------------------------------------


@every_adapter
def test_a_frozen_base_is_not_changed(rng, kind):
    base = make_layer(rng)
    before = snapshot(base)
    adapter = make_adapter(rng, kind, base)
    x, grad = rng.normal(size=(4, 7)), rng.normal(size=(4, 5))
    for _ in range(2):
        adapter.forward(x)
        adapter.backward(grad)
        adapter.update_parameters(0.5)
        adapter.forward(x)
        adapter.backward_update(grad, 0.5)
    assert_unchanged(base, before)


# --- disabling ---------------------------------------------------------------------------------------------------


@every_adapter
def test_disable_adapter_computes_the_base(rng, kind):
    adapter = make_adapter(rng, kind, lora_dropout=0.5)
    x = rng.normal(size=(4, 7))
    for mode in (adapter.eval, adapter.train):
        mode()
        with adapter.disable_adapter():
            np.testing.assert_array_equal(adapter.forward(x), adapter.base_layer.forward(x))
        assert not np.allclose(adapter.forward(x), adapter.base_layer.forward(x))


def test_disable_adapter_ends_with_an_error_and_nests(rng):
    adapter = make_adapter(rng)
    x = rng.normal(size=(4, 7))
    enabled = adapter.forward(x)
    with pytest.raises(KeyError), adapter.disable_adapter():
        raise KeyError
    np.testing.assert_array_equal(adapter.forward(x), enabled)
    with adapter.disable_adapter():
        with adapter.disable_adapter():
            pass
        np.testing.assert_array_equal(adapter.forward(x), adapter.base_layer.forward(x))


def test_closing_inside_disable_adapter(rng):
    adapter = make_adapter(rng)
    with adapter.disable_adapter():
        adapter.close()
    with pytest.raises(RuntimeError, match="closed"):
        adapter.forward(np.zeros(7))


@every_adapter
@pytest.mark.parametrize("fused", [True, False])
def test_training_while_disabled_leaves_the_factors(rng, kind, fused):
    adapter = make_adapter(rng, kind, frozen=False)
    x, grad = rng.normal(size=(4, 7)), rng.normal(size=(4, 5))
    plain = adapter.base_layer.clone()
    plain.forward(x)
    expected = plain.backward(grad)
    plain.update_parameters(0.1)
    factors = adapter.get_parameter("lora_A"), adapter.get_parameter("lora_B")
    with adapter.disable_adapter():
        adapter.forward(x)
        if fused:
            assert_close(adapter.backward_update(grad, 0.1), expected)
        else:
            assert_close(adapter.backward(grad), expected)
            assert adapter.get_parameter_gradients().size == adapter.parameter_count
            adapter.update_parameters(0.1)
    np.testing.assert_array_equal(adapter.get_parameter("lora_A"), factors[0])
    np.testing.assert_array_equal(adapter.get_parameter("lora_B"), factors[1])
    assert_close(adapter.get_parameter("base.weight"), plain.get_parameter("weight"))


# --- dropout -----------------------------------------------------------------------------------------------------


@every_adapter
@every_layout
@pytest.mark.parametrize("fused", [True, False])
def test_dropout_in_training_mode(rng, kind, layout, fused):
    """With W = 0 and A, B the identity, the output is the masked input: that mask is the oracle's."""
    size, p = 16, 0.25
    adapter = kind(layout(np.zeros((size, size))), size, lora_dropout=p, seed=3)
    adapter.set_parameter("lora_A", np.eye(size))
    adapter.set_parameter("lora_B", np.eye(size))
    twin = adapter.clone()
    mask = twin.forward(np.ones((32, size)))
    assert set(np.unique(mask)) == {0.0, 1 / (1 - p)}
    assert np.mean(mask == 0) == pytest.approx(p, abs=0.06)

    randomise(adapter, rng)
    adapter.set_parameter("base.weight", rng.normal(size=(size, size)))
    x, grad = rng.normal(size=(32, size)), rng.normal(size=(32, size))
    state = state_of(adapter, mask)
    assert_close(adapter.forward(x), oracle.forward(x, state))
    expected = oracle.gradients(x, grad, state)
    if fused:
        assert_close(adapter.backward_update(grad, 0.1), expected["x"])
        assert_close(adapter.get_parameter("lora_A"), oracle.update(state, expected, 0.1).A)
    else:
        assert_close(adapter.backward(grad), expected["x"])
        held = adapter.get_parameter_gradients()
        assert_close(held[: size * size].reshape(size, size), expected["lora_A"])
        assert_close(held[size * size : 2 * size * size].reshape(size, size), expected["lora_B"])


@every_adapter
def test_no_dropout_in_evaluation_mode(rng, kind):
    adapter = make_adapter(rng, kind, lora_dropout=0.5).eval()
    x = rng.normal(size=(4, 7))
    assert_close(adapter.forward(x), oracle.forward(x, state_of(adapter)))


def test_masks_differ_from_forward_to_forward(rng):
    adapter = make_adapter(rng, lora_dropout=0.5)
    x = rng.normal(size=(16, 7))
    assert not np.array_equal(adapter.forward(x), adapter.forward(x))


@pytest.mark.parametrize("copy", ["clone", "save"])
def test_the_random_state_travels(rng, tmp_path, copy):
    adapter = make_adapter(rng, lora_dropout=0.5)
    x = rng.normal(size=(16, 7))
    adapter.forward(x)
    if copy == "clone":
        twin = adapter.clone()
    else:
        adapter.save(tmp_path / "a")
        twin = nblora.load(tmp_path / "a")
    for _ in range(3):
        np.testing.assert_array_equal(twin.forward(x), adapter.forward(x))


def test_a_generator_of_another_kind_can_be_a_seed(rng, tmp_path):
    adapter = nblora.LoRAAdapter(make_layer(rng), 3, lora_dropout=0.5, seed=np.random.Generator(np.random.MT19937(1)))
    adapter.save(tmp_path / "a")
    x = rng.normal(size=(16, 7))
    np.testing.assert_array_equal(nblora.load(tmp_path / "a").forward(x), adapter.forward(x))


# --- delta -------------------------------------------------------------------------------------------------------


def test_get_current_delta_is_a_copy(rng):
    adapter = make_adapter(rng)
    before = adapter.get_current_delta()
    adapter.get_current_delta()[...] = np.nan
    np.testing.assert_array_equal(adapter.get_current_delta(), before)


@every_layout
def test_delta_is_a_live_view(rng, layout):
    adapter = make_adapter(rng, base=make_layer(rng, layout=layout))
    np.testing.assert_array_equal(adapter.delta, adapter.get_current_delta())
    np.testing.assert_array_equal(adapter.velocity, adapter.get_parameter("velocity"))
    adapter.set_parameter("delta", np.ones((7, 5)))
    np.testing.assert_array_equal(adapter.delta, 1)


def test_reset_state_clears_the_velocity_and_keeps_the_delta(rng):
    adapter = make_adapter(rng)
    before = snapshot(adapter)
    adapter.reset_state()
    np.testing.assert_array_equal(adapter.get_parameter("velocity"), 0)
    for name in ("base.weight", "base.bias", "lora_A", "lora_B", "delta"):
        np.testing.assert_array_equal(adapter.get_parameter(name), before[name])
    assert np.any(adapter.delta)


def test_reset_state_with_the_delta(rng):
    adapter = make_adapter(rng)
    factors = adapter.get_parameter("lora_B")
    adapter.reset_state(include_delta=True)
    np.testing.assert_array_equal(adapter.get_current_delta(), 0)
    np.testing.assert_array_equal(adapter.get_parameter("lora_B"), factors)
    with pytest.raises(TypeError, match="include_delta"):
        adapter.reset_state(include_delta=1)


# --- merging -----------------------------------------------------------------------------------------------------


@every_adapter
@every_layout
def test_merging_leaves_the_base_and_shares_nothing(rng, kind, layout):
    adapter = make_adapter(rng, kind, make_layer(rng, layout=layout))
    before = snapshot(adapter)
    merged = adapter.merge_to_original_layer()
    assert merged is not adapter.base_layer
    assert_disjoint(merged, adapter)
    merged.weight[...] = np.nan
    merged.bias[...] = np.nan
    assert_unchanged(adapter, before)


@every_adapter
def test_a_base_that_cannot_be_merged(rng, kind):
    for base in (
        nblora.Sequential(make_layer(rng)),
        make_adapter(rng),
        nblora.LoRALayer(7, 5, 2, dtype="float64", seed=0),
    ):
        with pytest.raises(RuntimeError, match="Dense and FullyConnected"):
            make_adapter(rng, kind, base).merge_to_original_layer()


@every_adapter
def test_merging_while_disabled_still_merges(rng, kind):
    adapter = make_adapter(rng, kind)
    with adapter.disable_adapter():
        merged = adapter.merge_to_original_layer()
    assert_close(merged.weight, oracle.merge(state_of(adapter)).weight)


# --- bases that compute by themselves ----------------------------------------------------------------------------


@every_adapter
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_an_adapter_on_a_model(rng, kind, frozen, fused):
    base = nblora.Sequential(make_layer(rng, (7, 6), activation="tanh"), make_layer(rng, (6, 5)))
    adapter = make_adapter(rng, kind, base, frozen=frozen)
    own = state_of(adapter)
    own.weight, own.bias, own.train_base = None, None, False
    x, grad = rng.normal(size=(4, 7)), rng.normal(size=(4, 5))
    plain = base.clone()
    assert_close(adapter.forward(x), plain.forward(x) + oracle.forward(x, own))
    expected = oracle.gradients(x, grad, own)
    grad_input = plain.backward(grad) + expected["x"]
    if fused:
        assert_close(adapter.backward_update(grad, 0.1), grad_input)
    else:
        assert_close(adapter.backward(grad), grad_input)
        adapter.update_parameters(0.1)
    if not frozen:
        plain.update_parameters(0.1)
    assert_unchanged(base, snapshot(base))
    for name in plain.parameter_names():
        assert_close(adapter.get_parameter(f"base.{name}"), plain.get_parameter(name))
    assert_close(adapter.get_parameter("lora_A"), oracle.update(own, expected, 0.1).A)
    with adapter.disable_adapter():
        np.testing.assert_array_equal(adapter.forward(x), base.forward(x))
        assert_close(adapter.backward(grad), base.backward(grad))
        once = adapter.get_parameter_gradients()
        adapter.backward(grad, accumulate=True)
        assert_close(adapter.get_parameter_gradients(), 2 * once)
        factors = adapter.get_parameter("lora_A")
        adapter.backward_update(grad, 0.1)
        np.testing.assert_array_equal(adapter.get_parameter("lora_A"), factors)


# --- diagnostics -------------------------------------------------------------------------------------------------


@every_layout
def test_diagnostics_of_a_delta_adapter(rng, layout):
    adapter = make_adapter(rng, base=make_layer(rng, layout=layout))
    adapter.forward(rng.normal(size=(4, 7)))
    adapter.backward(rng.normal(size=(4, 5)))
    figures = adapter.diagnostics()
    low_rank = adapter.scaling * adapter.lora_layer.A @ adapter.lora_layer.B
    dense = adapter.delta_scaling * adapter.delta
    singular = np.linalg.svd(low_rank + dense, compute_uv=False)
    expected = {
        "weight_norm": np.linalg.norm(adapter.base_layer.weight),
        "low_rank_norm": np.linalg.norm(low_rank),
        "delta_norm": np.linalg.norm(dense),
        "velocity_norm": np.linalg.norm(adapter.velocity),
        "stable_rank": np.sum(singular**2) / singular[0] ** 2,
        "gradient_norm.delta": np.linalg.norm(adapter.get_parameter_gradients()[-35:]),
    }
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-10), name
    for name in ("rank", "alpha", "scaling", "delta_scaling", "momentum_factor", "in_features", "out_features"):
        assert figures[name] == getattr(adapter, name)


def test_diagnostics_of_a_new_adapter(rng):
    figures = nblora.DeltaLoRAAdapter(make_layer(rng), 3).diagnostics()
    assert figures["stable_rank"] == figures["low_rank_norm"] == figures["delta_norm"] == 0.0


def test_diagnostics_of_huge_values(rng):
    adapter = make_adapter(rng, base=make_layer(rng, dtype="float32"))
    adapter.set_parameter("delta", np.full((7, 5), 3e38))
    figures = adapter.diagnostics()
    assert figures["stable_rank"] == pytest.approx(1.0, rel=1e-3)
    assert math.isfinite(figures["delta_norm"])
    adapter.set_parameter("lora_B", np.full((3, 5), np.nan))
    figures = adapter.diagnostics()
    assert math.isnan(figures["stable_rank"])
    assert figures["non_finite_count"] == 15


def test_stable_rank_of_a_large_change(rng):
    adapter = make_adapter(rng, nblora.LoRAAdapter, make_layer(rng, (520, 515)))
    singular = np.linalg.svd(adapter.lora_layer.A @ adapter.lora_layer.B, compute_uv=False)
    assert adapter.diagnostics()["stable_rank"] == pytest.approx(np.sum(singular**2) / singular[0] ** 2, rel=1e-6)
