"""What calls took: on the host's clock, or between events on a device's own."""

import itertools
import time
from collections.abc import Callable
from typing import Any

Call = Callable[[], object]
Clock = Callable[[Call, int], list[float]]  # makes a call so many times; the seconds that each took


def host_clock(call: Call, count: int) -> list[float]:
    """For what is done when the call returns."""
    marks = [time.perf_counter()]
    for _ in range(count):
        call()
        marks.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(marks)]


def event_clock(new_event: Callable[[], Any], milliseconds: Callable[[Any, Any], float]) -> Clock:
    """For what only begins when the call returns: an event goes into the device's stream before and after each call.

    The host waits once, at the end, so it may run ahead of the device as it does in use.

    Parameters
    ----------
    new_event : callable
        Makes an event with `record()` and `synchronize()`.
    milliseconds : callable
        The time from one event to another.
    """

    def clock(call: Call, count: int) -> list[float]:
        events = [new_event() for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        events[-1].synchronize()
        return [1e-3 * milliseconds(before, after) for before, after in itertools.pairwise(events)]

    return clock
