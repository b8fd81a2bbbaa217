"""A kernel that lacks a barrier, a bound check or a tail must fail the checks that the whole kernels pass."""

import pytest

pytest.importorskip("greenlet", reason="the emulator needs greenlet (extra test)")

from tests.cuda import mutants
from tests.cuda.emulated import make_backend
from tests.cuda.emulator import ORDERS

MUTANTS = mutants.mutants()


@pytest.mark.slow
def test_whole_kernels_pass():
    found = mutants.killed_by("linear.cuda.tiles", lambda source: source)
    assert found is None, found


@pytest.mark.parametrize("order", ORDERS)
def test_updates_and_losses(order):
    mutants.check_updates(make_backend(order))
    mutants.check_losses(make_backend(order))


def test_no_barrier_is_missed():
    assert sum("syncthreads" in name for name, *_ in MUTANTS) == 10
    assert sum("size" in name for name, *_ in MUTANTS) == 17  # tails of vectors, and ends of loops
    assert len(MUTANTS) == 65


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m[0].startswith("linear.cuda.tiles")], ids=lambda m: m[0])
def test_mutants_of_tiles(mutant):
    _, module, mutate = mutant
    assert mutants.killed_by(module, mutate) is not None


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [m for m in MUTANTS if not m[0].startswith("linear.cuda.tiles")], ids=lambda m: m[0])
def test_mutants(mutant):
    _, module, mutate = mutant
    assert mutants.killed_by(module, mutate) is not None
