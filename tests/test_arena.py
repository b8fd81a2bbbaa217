"""Memory that is lent again: never while somebody looks at it, never kept beyond need."""

import threading

import numpy as np
import pytest

import nblora
from nblora.backends.arena import SMALL, Arena
from tests.helpers import relative_error

SHAPE = (100, 300)


@pytest.fixture
def arena():
    return Arena()


def place(array):
    return array.__array_interface__["data"][0]


def test_memory_serves_again_once_nobody_looks_at_it(arena):
    with arena.open():
        first = arena.empty(SHAPE, np.float32)
        where, view = place(first), first.reshape(-1)[5:].view(np.int32)
        assert place(arena.empty(SHAPE, np.float32)) != where
        del first
        second = arena.empty(SHAPE, np.float32)
        assert place(second) != where, "a view of a view still looks at it"
        del view
        assert place(arena.empty((300, 50), np.float64)) == where
        assert second.flags.c_contiguous
        assert second.flags.writeable
        assert place(second) % 64 == 0


def test_outside_arrays_are_numpys_own(arena):
    assert arena.empty(SHAPE, np.float32).base is None
    with arena.open():
        assert arena.empty((3, 4), np.float32).base is None
        lent = arena.empty(SHAPE, np.float32)
    lent[:] = 1
    assert arena._free == {}
    del lent
    assert (arena._free, arena._held, arena._out, arena._lent) == ({}, 0, 0, {})


def test_batches_of_nearly_one_size_share_memory(arena):
    with arena.open():
        first = arena.empty((1400, 300), np.float32)
        where = place(first)
        del first
        smaller = arena.empty((1000, 300), np.float32)
        assert place(smaller) == where
        del smaller
        assert place(arena.empty((500, 300), np.float32)) != where, "much of it would lie idle"
        assert place(arena.empty((1500, 300), np.float32)) != where


def test_no_more_is_held_than_a_quarter_beyond_need(arena):
    rng = np.random.default_rng(0)
    with arena.open():
        for _ in range(300):
            held = [arena.empty((int(n),), np.uint8) for n in rng.integers(SMALL, 40 * SMALL, 5)]
            most = sum(array.nbytes for array in held)
            assert arena._held <= 1.25 * max(arena._most, most)
        assert arena._out == sum(len(memory) for _, memory in arena._lent.values())
        del held
        assert arena._held == sum(size * len(free) for size, free in arena._free.items())


def test_threads_never_share_memory(arena):
    faults = []

    def work(number):
        for step in range(300):
            array = arena.empty(SHAPE, np.float64)
            array[:] = number * 1000 + step
            if (array != number * 1000 + step).any():
                faults.append(number)

    with arena.open():
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert faults == []


def test_fit_leaves_nothing_and_changes_nothing():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 64)).astype("f4"), rng.normal(size=(400, 96)).astype("f4")
    adapter = nblora.LoRAAdapter(nblora.Dense.random(64, 96, activation="gelu", seed=0), rank=4, seed=0)
    other = adapter.clone()
    nblora.fit(adapter, x, y, loss="mse", epochs=3, batch_size=200, seed=0)
    arena = adapter._backend.arena
    assert (arena._users, arena._free, arena._held) == (0, {}, 0)
    arena.open, whole = lambda: _nothing(), arena.open
    try:
        nblora.fit(other, x, y, loss="mse", epochs=3, batch_size=200, seed=0)
    finally:
        arena.open = whole
    assert relative_error(other.get_parameters(), adapter.get_parameters()) == 0


def _nothing():
    import contextlib

    return contextlib.nullcontext()
