"""What calls took: on the host's clock, or between events on a device's own."""

import itertools
import time
from collections.abc import Callable
from typing import Any, Protocol


class Clock(Protocol):
    """Takes the time of calls."""

    def times(self, call: Callable[[], object], count: int) -> list[float]:
        """Call `count` times, and return the seconds that each took."""


class HostClock:
    """For what is done when the call returns."""

    def times(self, call: Callable[[], object], count: int) -> list[float]:
        """Call `count` times, and return the seconds that each took."""
        clock = time.perf_counter
        taken = []
        for _ in range(count):
            begin = clock()
            call()
            taken.append(clock() - begin)
        return taken


class EventClock:
    """For what only begins when the call returns: an event goes into the device's stream before and after each call.

    The host waits once, at the end, so it may run ahead of the device as it does in use.

    Parameters
    ----------
    new_event : callable
        Makes an event with `record()` and `synchronize()`.
    milliseconds : callable
        The time from one event to another.
    """

    def __init__(self, new_event: Callable[[], Any], milliseconds: Callable[[Any, Any], float]) -> None:
        self._new_event, self._milliseconds = new_event, milliseconds

    def times(self, call: Callable[[], object], count: int) -> list[float]:
        """Call `count` times, and return the seconds that each took on the device."""
        events = [self._new_event() for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        events[-1].synchronize()
        return [1e-3 * self._milliseconds(before, after) for before, after in itertools.pairwise(events)]
