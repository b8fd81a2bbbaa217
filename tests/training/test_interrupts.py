"""An interrupt of `fit`, wherever it lands, leaves a model as it was at the end of an epoch, in the mode it came in."""

import contextlib
import ctypes
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import nblora
from nblora.errors import NonFiniteError
from nblora.layers import tree
from nblora.training import SGD, Schedule
from tests.processes import run

from . import support

EPOCHS = 3
WATCHED = {str(Path(nblora.training.__file__).parent / name) for name in ("run.py", "snapshot.py")}


class Explosive(Schedule):
    """Harmless for two epochs of two steps, then enormous: the run ends by an error of its own."""

    def factor(self, step, total_steps):
        return 1.0 if step < 5 else 1e37


def fit(model, **settings):
    x, y = support.data(dtype="float32")
    nblora.fit(model, x, y, loss="cross_entropy", optimizer=SGD(0.1), epochs=EPOCHS, batch_size=19, seed=11, **settings)


class Trial:
    """A model, and every state that it may be left in."""

    def __init__(self, **settings):
        self.settings = settings
        self.model = support.network("float32", dropout=0.2)
        watch = support.Watch()
        self.start = self.model.clone()
        self._run(self.model, callbacks=[watch])
        self.whole = [support.state(self.start), *watch.states]

    def _run(self, model, **more):
        try:
            fit(model, **self.settings, **more)
        except NonFiniteError:
            assert self.settings

    def run(self):
        """Train from the start; return whether an interrupt came through. The model is checked."""
        model = self.start.clone()
        interrupted = False
        try:
            self._run(model)
        except KeyboardInterrupt:
            interrupted = True
        return model, interrupted

    def check(self, model):
        """Fail unless the model is in a state of one epoch."""
        computed = support.state(model)
        for state in self.whole:
            try:
                support.assert_same_state(computed, state)
            except AssertionError:
                continue
            break
        else:
            pytest.fail("parameters or random states of two epochs")
        assert all(training for _, training in tree.modes(model))


def interrupted_at(trial, places):
    """Train with an interrupt at each of these lines of the loop or of the snapshot, counted as they are run."""
    count = 0

    def trace_lines(frame, event, _):
        nonlocal count
        if event == "line":
            count += 1
            if count in places:
                raise KeyboardInterrupt
        return trace_lines

    def trace_calls(frame, event, _):
        return trace_lines if frame.f_code.co_filename in WATCHED else None

    before = sys.gettrace()
    sys.settrace(trace_calls)
    try:
        model, interrupted = trial.run()
    finally:
        sys.settrace(before)
    return model, interrupted, count


@pytest.mark.small
@pytest.mark.parametrize("settings", [{}, {"schedule": Explosive()}], ids=["ends", "explodes"])
def test_an_interrupt_at_any_line(settings):
    trial = Trial(**settings)
    *_, lines = interrupted_at(trial, ())
    assert lines > 100
    for place in range(1, lines + 1):
        model, interrupted, _ = interrupted_at(trial, (place,))
        assert interrupted
        trial.check(model)


def bombard(trial, count, seed, interrupted_run):
    """Train with an interrupt at a random moment until so many have come through, or too many came too late."""
    rng = random.Random(seed)
    trial.run()
    started = time.perf_counter()
    trial.run()
    duration = time.perf_counter() - started
    through = 0
    for _ in range(20 * count):
        result = interrupted_run(trial, rng.uniform(0, duration))
        if result is not None:
            model, interrupted = result
            trial.check(model)
            through += interrupted
        if through == count:
            break
    assert through


class Alarm:
    """A signal's handler that raises KeyboardInterrupt, in the main thread."""

    def __init__(self, delay):
        self.delay = max(delay, 1e-6)

    def __enter__(self):
        self.before = signal.signal(signal.SIGALRM, self.fire)
        signal.setitimer(signal.ITIMER_REAL, self.delay)

    def fire(self, *_):
        # The test's own lines must not be hit: a fit that has not begun or has ended is left alone.
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code is nblora.fit.__code__:
                raise KeyboardInterrupt
            frame = frame.f_back

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)


def run_with_alarm(trial, delay):
    """Train in the main thread, with a signal after a while."""
    with Alarm(delay):
        return trial.run()


def run_in_thread(trial, delay):
    """Train in a thread that is sent an asynchronous KeyboardInterrupt after a while; None where that missed."""
    result, begun, sent = [], [], []  # lists, as an interrupt could leave an Event's own lock held

    def work():
        with contextlib.suppress(KeyboardInterrupt):  # one that comes after the run
            begun.append(True)
            try:
                result.append(trial.run())
            finally:
                while not sent:  # or it came while the thread ends
                    time.sleep(1e-4)
                time.sleep(0)

    thread = threading.Thread(target=work)
    thread.start()
    while not begun:
        time.sleep(1e-5)
    time.sleep(delay)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt))
    sent.append(True)
    thread.join()
    return result[0] if result else None


# In a process of its own: what traces this one for coverage has a lock that an interrupt can leave held.
BOMBARD = """
import sys
from tests.training import test_interrupts as interrupts
sys.setswitchinterval(1e-5)  # or the interrupt of a thread waits until the run has ended
interrupts.bombard(interrupts.Trial(), int(sys.argv[1]), int(sys.argv[2]), getattr(interrupts, sys.argv[3]))
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers here")
@pytest.mark.parametrize("count", [15, pytest.param(1000, marks=pytest.mark.slow)])
def test_signals_at_random_moments(count):
    run(BOMBARD, count, 5, "run_with_alarm", timeout=1500)


@pytest.mark.parametrize("count", [15, pytest.param(1000, marks=pytest.mark.slow)])
def test_asynchronous_exceptions_at_random_moments(count):
    run(BOMBARD, count, 6, "run_in_thread", timeout=1500)
