"""Optimisers and schedules against naive formulas, and their arguments."""

import itertools
import math

import numpy as np
import pytest

from nblora.backends import resolve
from nblora.training import SGD, AdamW, Constant, WarmupCosine
from nblora.training.optimizers import as_optimizer
from nblora.training.schedules import as_schedule

from . import support

pytestmark = pytest.mark.small


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("optimizer", "naive"),
    [
        (SGD(0.1), lambda p, g: support.sgd(p, g, 0.1)),
        (SGD(0.1, 0.9), lambda p, g: support.sgd(p, g, 0.1, 0.9)),
        (AdamW(0.02), lambda p, g: support.adamw(p, g, 0.02)),
        (AdamW(0.02, (0.5, 0.7), 1e-3, 0.3), lambda p, g: support.adamw(p, g, 0.02, 0.5, 0.7, 1e-3, 0.3)),
    ],
    ids=repr,
)
def test_updates_match_the_naive_formula(optimizer, naive, dtype):
    rng = np.random.default_rng(1)
    parameter = rng.normal(size=(5, 3)).astype(dtype)
    gradients = rng.normal(size=(8, 5, 3)).astype(dtype)
    reference = naive(parameter.astype(np.float64), gradients.astype(np.float64))
    slots = tuple(np.zeros_like(parameter) for _ in optimizer.slots)
    for step, gradient in enumerate(gradients, 1):
        kept = gradient.copy()
        optimizer.update(resolve("cpu"), parameter, gradient, slots, optimizer.lr, step)
        np.testing.assert_array_equal(gradient, kept)
    support.assert_close(parameter, reference)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AdamW(lr=-1), ValueError, "lr must be finite and not negative, got -1"),
        (lambda: AdamW(lr="0.1"), TypeError, "lr must be a real number"),
        (lambda: AdamW(betas=0.9), TypeError, "pair of numbers"),
        (lambda: AdamW(betas=(0.9, 1.0)), ValueError, r"betas\[1\]"),
        (lambda: AdamW(eps=0), ValueError, "eps must be positive"),
        (lambda: AdamW(weight_decay=-0.1), ValueError, "weight_decay"),
        (lambda: AdamW(lora_plus_ratio=0), ValueError, "lora_plus_ratio"),
        (lambda: SGD(math.nan), ValueError, "lr"),
        (lambda: SGD(0.1, 1.0), ValueError, "momentum"),
        (lambda: as_optimizer("adam"), ValueError, "'adamw', 'sgd'"),
        (lambda: as_optimizer(AdamW), TypeError, "Optimizer object"),
        (lambda: as_optimizer("adamw", -1.0), ValueError, "lr must be"),
        (lambda: as_optimizer(AdamW(lr=0.1), 0.2), ValueError, r"lr=0.2 is for an optimizer given by name"),
        (lambda: WarmupCosine(warmup=-1), ValueError, "warmup"),
        (lambda: WarmupCosine(warmup=1.5), ValueError, "warmup"),
        (lambda: WarmupCosine(final=2), ValueError, "final must be between 0 and 1, got 2"),
        (lambda: WarmupCosine(total_steps=0), ValueError, "total_steps"),
        (lambda: as_schedule("linear"), ValueError, "'constant', 'cosine'"),
        (lambda: as_schedule(0.5), TypeError, "Schedule object"),
    ],
)
def test_wrong_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_names_take_the_defaults():
    assert repr(as_optimizer("adamw")) == repr(AdamW())
    assert repr(as_optimizer("adamw", 0.5)) == repr(AdamW(0.5))
    assert repr(as_optimizer("sgd", 0)) == repr(SGD(0.0))
    assert repr(AdamW()) == "AdamW(lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01, lora_plus_ratio=None)"
    assert repr(as_optimizer("sgd")) == "SGD(lr=0.01, momentum=0.0, lora_plus_ratio=None)"
    assert repr(as_schedule("cosine")) == "WarmupCosine(warmup=0, final=0.0, total_steps=None)"
    assert repr(as_schedule("constant")) == repr(as_schedule(None)) == "Constant()"
    schedule = Constant()
    assert as_schedule(schedule) is schedule


def test_warm_up_then_cosine():
    schedule = WarmupCosine(warmup=4, final=0.1)
    factors = [schedule.factor(step, 24) for step in range(30)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[14] == pytest.approx(0.55)
    assert factors[24:] == pytest.approx([0.1] * 6)
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[4:25]))


def test_warm_up_as_a_share_and_a_length_of_its_own():
    assert WarmupCosine(warmup=0.5).factor(0, 8) == 0.25
    schedule = WarmupCosine(total_steps=10)
    assert schedule.factor(5, 6) == schedule.factor(5, 600) == pytest.approx(0.5)
    assert WarmupCosine(warmup=5).factor(7, 3) == 0.5 * (1 + math.cos(math.pi))
    assert Constant().factor(10**9, 3) == 1.0
