"""`Snapshot`: a copy of what training changes in a model; `AtEnd`: bringing it back, whatever interrupts."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from nblora.backends.protocol import Array
from nblora.layers import Layer, tree

_ATTEMPTS = 100  # interrupts that one restoring outlives: more than any hand sends


class State(NamedTuple):
    """The trained parameters and velocities, as they are stored, and the random states."""

    arrays: dict[str, Any]
    random: dict[str, Any]


class Snapshot:
    """A copy of the trained parameters and velocities, as they are stored, and of the random states.

    It takes as much memory again as these parameters; from the second `take` on twice as much, since a copy must be
    whole before it replaces the one held. An interrupt at any moment leaves the one or the other. `others` are arrays
    to be copied and brought back with them.
    """

    def __init__(self, model: Layer, others: Iterable[Array] = ()) -> None:
        self._live = {named.name: named.array for named in tree.changing(model)}
        self._live.update((f":{place}", array) for place, array in enumerate(others))  # as no parameter is called
        self._generators = tree.generators(model)
        self._held = self._state(self._copies())
        self._spare: dict[str, Any] | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The parameters held, by name."""
        return self._held.arrays

    def take(self) -> None:
        """Replace the state held by the model's present one."""
        if self._spare is None:
            self._spare = self._copies()
        for name, array in self._live.items():
            self._spare[name][...] = array
        new, old = self._state(self._spare), self._held.arrays
        # In this order: were the spare the arrays held, another `take` could be interrupted while it writes them.
        self._spare = None
        self._held = new
        self._spare = old

    def restore(self) -> None:
        """Bring the model back to the state held."""
        self.restore_arrays()
        for name, generator in self._generators.items():
            generator.bit_generator.state = self._held.random[name]

    def restore_arrays(self) -> None:
        """Bring parameters and velocities back, and leave the random states."""
        for name, array in self._live.items():
            array[...] = self._held.arrays[name]

    def _copies(self) -> dict[str, Any]:
        return {name: array.copy() for name, array in self._live.items()}

    def _state(self, arrays: dict[str, Any]) -> State:
        return State(arrays, {name: g.bit_generator.state for name, g in self._generators.items()})


class AtEnd:
    """Calls its actions when a `with` block ends, each to its end; an interrupt (Ctrl-C) meanwhile is raised after.

    An interrupt at the very first instruction of the end still passes by. Who cannot have that enters the same object
    twice, `with end, end:`, and the second end begins where the first was stopped. Actions must bear being repeated.

    Parameters
    ----------
    *actions : callable
    failed : bool
        Call them only if the block raised.
    """

    def __init__(self, *actions: Callable[[], object], failed: bool = False) -> None:
        self._actions, self._failed = actions, failed

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, *rest: object) -> None:
        if kind is None and self._failed:
            return
        interrupt: BaseException | None = None
        for _ in range(_ATTEMPTS):
            try:
                for action in self._actions:
                    action()
                break
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt
