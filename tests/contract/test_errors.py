"""Bad arguments: the right type of error, the argument's name in the message, and nothing changed."""

import math

import numpy as np
import pytest

import nblora
from nblora import errors
from tests.helpers import ADAPTERS, LAYOUTS, assert_unchanged, make_adapter, make_layer, snapshot

pytestmark = pytest.mark.small
every_adapter = pytest.mark.parametrize("kind", ADAPTERS)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.FormatError, ValueError),
        (errors.DeviceUnavailableError, RuntimeError),
        (errors.NonFiniteError, ArithmeticError),
        (errors.MissingExtraError, ImportError),
    ],
)
def test_every_error_derives_from_the_builtin_one_too(error, builtin):
    assert issubclass(error, errors.NbloraError)
    assert issubclass(error, builtin)


# --- constructors ------------------------------------------------------------------------------------------------


@every_adapter
@pytest.mark.parametrize("base", [None, np.zeros((7, 5)), "dense", nblora.Dense])
def test_base_layer_must_be_a_layer(kind, base):
    with pytest.raises(TypeError, match="base_layer must be a layer"):
        kind(base, 2)


@every_adapter
def test_missing_arguments(kind):
    with pytest.raises(TypeError):
        kind()
    with pytest.raises(TypeError):
        kind(nblora.Dense(np.eye(3)))


@every_adapter
def test_a_closed_base(rng, kind):
    base = make_layer(rng)
    base.close()
    with pytest.raises(RuntimeError, match="closed"):
        kind(base, 2)


def lora_layer(rank=2, alpha=-1.0, **settings):
    return nblora.LoRALayer(7, 5, rank, alpha, **settings)


def lora(rank=2, alpha=-1.0, **settings):
    return nblora.LoRAAdapter(nblora.Dense(np.ones((7, 5))), rank, alpha, **settings)


def delta(rank=2, alpha=-1.0, **settings):
    return nblora.DeltaLoRAAdapter(nblora.FullyConnected(np.ones((5, 7))), rank, alpha, **settings)


MAKERS = [lora_layer, lora, delta]
NUMBERS = [None, "0.5", True, 1j, [0.5]]


@pytest.mark.parametrize("make", MAKERS)
def test_rank(make):
    assert make(1).rank == 1
    assert make(5).rank == 5
    assert make(np.int64(3)).rank == 3
    for rank in (0, -1, 6):
        with pytest.raises(ValueError, match=rf"rank must be between 1 and 5, got {rank}"):
            make(rank)
    for rank in (None, 2.0, "2", True):
        with pytest.raises(TypeError, match="rank must be an integer"):
            make(rank)


@pytest.mark.parametrize("make", MAKERS)
def test_alpha(make):
    for alpha in (0, 0.0, -0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="alpha must be positive and finite"):
            make(2, alpha)
    for alpha in NUMBERS:
        with pytest.raises(TypeError, match="alpha must be a real number"):
            make(2, alpha)
    assert make(2, np.float32(3)).alpha == 3.0


@pytest.mark.parametrize("make", MAKERS)
def test_init_and_use_rslora(make):
    with pytest.raises(ValueError, match=r"init must be one of 'kaiming', 'gaussian', ('pissa', )?got 'zeros'"):
        make(init="zeros")
    with pytest.raises(TypeError, match="init"):
        make(init=None)
    with pytest.raises(TypeError, match="use_rslora"):
        make(use_rslora="yes")


def test_delta_scaling():
    for value in (0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="delta_scaling must be positive and finite"):
            delta(delta_scaling=value)
    for value in NUMBERS:
        with pytest.raises(TypeError, match="delta_scaling"):
            delta(delta_scaling=value)


def test_momentum_factor():
    assert delta(momentum_factor=0).momentum_factor == 0.0
    for value in (1, 1.5, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"momentum_factor must be in \[0, 1\)"):
            delta(momentum_factor=value)
    for value in NUMBERS:
        with pytest.raises(TypeError, match="momentum_factor"):
            delta(momentum_factor=value)


@pytest.mark.parametrize("make", [lora, delta])
def test_lora_dropout_and_freeze(make):
    for value in (1, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"lora_dropout must be in \[0, 1\)"):
            make(lora_dropout=value)
    for value in NUMBERS:
        with pytest.raises(TypeError, match="lora_dropout"):
            make(lora_dropout=value)
    for value in (None, "yes", 1):
        with pytest.raises(TypeError, match="freeze_base_layer"):
            make(freeze_base_layer=value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers(layout):
    for weight in (None, "text", object(), np.ones((2, 2), complex), np.array([[object()]]), [["a"]]):
        with pytest.raises(TypeError, match="weight must be an array of real numbers"):
            layout(weight)
    for weight in (np.ones(3), np.ones((2, 2, 2)), 1.0, np.ones((0, 3)), np.ones((3, 0))):
        with pytest.raises(ValueError, match="weight must"):
            layout(weight)
    with pytest.raises(ValueError, match="weight must be a rectangular"):
        layout([[1.0], [1.0, 2.0]])
    weight = np.ones((3, 2)) if layout is nblora.Dense else np.ones((2, 3))
    for bias in (np.ones(3), np.ones((2, 1)), 1.0):
        with pytest.raises(ValueError, match=r"bias must have shape \(2,\)"):
            layout(weight, bias)
    with pytest.raises(TypeError, match="bias"):
        layout(weight, "text")
    with pytest.raises(ValueError, match="activation must be one of 'identity', 'relu', 'gelu', 'tanh', 'sigmoid'"):
        layout(weight, activation="swish")
    with pytest.raises(TypeError, match="activation"):
        layout(weight, activation=None)


@pytest.mark.parametrize("make", [nblora.Dense.random, nblora.FullyConnected.random, nblora.LoRALayer])
def test_sizes_and_dtype(make):
    rank = () if make is not nblora.LoRALayer else (1,)
    for sizes in ((0, 3), (3, 0), (-1, 3)):
        with pytest.raises(ValueError, match="_features must be at least 1"):
            make(*sizes, *rank)
    for sizes in ((2.0, 3), (3, None)):
        with pytest.raises(TypeError, match="_features must be an integer"):
            make(*sizes, *rank)
    for dtype in ("float16", "int32", "complex64"):
        with pytest.raises(ValueError, match="dtype must be float32 or float64"):
            make(3, 3, *rank, dtype=dtype)
    with pytest.raises(TypeError, match="dtype must be float32 or float64"):
        make(3, 3, *rank, dtype="numbers")


def test_from_factors():
    with pytest.raises(ValueError, match=r"B must have shape \(2, any\), got \(3, 5\)"):
        nblora.LoRALayer.from_factors(np.ones((7, 2)), np.ones((3, 5)))
    layer = nblora.LoRALayer.from_factors(np.ones((2, 6)), np.ones((6, 3)))
    assert layer.rank == 6  # beyond min(in, out): factors that were read may be so


# --- calls -------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(rng):
    adapter = make_adapter(rng, frozen=False)
    adapter.forward(rng.normal(size=(4, 7)))
    adapter.backward(rng.normal(size=(4, 5)))
    return adapter


@pytest.mark.parametrize("call", ["update_parameters", "backward_update"])
def test_lr(adapter, rng, call):
    before, gradients = snapshot(adapter), adapter.get_parameter_gradients()
    arguments = (rng.normal(size=(4, 5)),) if call == "backward_update" else ()
    for lr in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="lr must be finite and not negative"):
            getattr(adapter, call)(*arguments, lr)
    for lr in NUMBERS:
        with pytest.raises(TypeError, match="lr must be a real number"):
            getattr(adapter, call)(*arguments, lr)
    assert_unchanged(adapter, before)
    np.testing.assert_array_equal(adapter.get_parameter_gradients(), gradients)


@pytest.mark.parametrize("call", ["backward", "backward_update"])
def test_grad_output(adapter, rng, call):
    before, gradients = snapshot(adapter), adapter.get_parameter_gradients()
    extra = (0.1,) if call == "backward_update" else ()
    for shape in ((4, 6), (3, 5), (5,), (1, 4, 5), ()):
        with pytest.raises(ValueError, match="grad_output must have"):
            getattr(adapter, call)(np.zeros(shape), *extra)
    for value in (None, "text", np.zeros((4, 5), complex)):
        with pytest.raises(TypeError, match="grad_output must be an array of real numbers"):
            getattr(adapter, call)(value, *extra)
    assert_unchanged(adapter, before)
    np.testing.assert_array_equal(adapter.get_parameter_gradients(), gradients)
    grad = rng.normal(size=(4, 5))
    assert getattr(adapter, call)(grad, *extra).shape == (4, 7)  # the forward is still there


def test_x(adapter, rng):
    gradients = adapter.get_parameter_gradients()
    for shape in ((4, 6), (7, 1), (), (0,)):
        with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 7\), got"):
            adapter.forward(np.zeros(shape))
    for value in (None, "text", np.zeros((4, 7), complex), np.full((4, 7), None), [["a"] * 7]):
        with pytest.raises(TypeError, match="x must be an array of real numbers"):
            adapter.forward(value)
    with pytest.raises(ValueError, match="x must be a rectangular"):
        adapter.forward([[1.0], [1.0, 2.0]])
    np.testing.assert_array_equal(adapter.get_parameter_gradients(), gradients)
    assert adapter.backward(rng.normal(size=(4, 5))).shape == (4, 7)  # the last good forward is still there


def test_a_read_only_weight_is_not_trained(rng):
    weight = rng.normal(size=(7, 5))
    weight.flags.writeable = False
    frozen = make_adapter(rng, base=nblora.Dense(weight))
    trained = make_adapter(rng, base=nblora.Dense(weight), frozen=False)
    x, grad = rng.normal(size=(4, 7)), rng.normal(size=(4, 5))
    frozen.forward(x)
    frozen.backward_update(grad, 0.1)
    before = snapshot(trained)
    trained.forward(x)
    for call in (lambda: trained.update_parameters(0.1), lambda: trained.backward_update(grad, 0.1)):
        trained.backward(grad)
        with pytest.raises(ValueError, match=r"base\.weight is read-only.*copy"):
            call()
    assert_unchanged(trained, before)


# --- models ------------------------------------------------------------------------------------------------------


def test_a_model_half_of_which_has_no_forward(rng):
    """The update of the layers behind must not have happened when one before them refuses."""
    model = nblora.Sequential(make_layer(rng, (7, 6)), make_layer(rng, (6, 5)))
    before = snapshot(model)
    model.forward(rng.normal(size=(4, 7)))
    model[0].reset_state()
    with pytest.raises(RuntimeError, match="forward"):
        model.backward_update(rng.normal(size=(4, 5)), 0.1)
    assert_unchanged(model, before)
