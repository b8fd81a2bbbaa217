"""`Snapshot`: a copy of what training changes in a model."""

from typing import Any

from nblora.layers import Layer, tree


class Snapshot:
    """Copies of the trained parameters and velocities, as they are stored, and of the random states.

    It takes as much memory again as these parameters; later `take`s reuse it.
    """

    def __init__(self, model: Layer) -> None:
        self._live = {named.name: named.array for named in tree.changing(model)}
        self.arrays = {name: array.copy() for name, array in self._live.items()}
        self._generators = tree.generators(model)
        self._take_states()

    def take(self) -> None:
        """Copy the model's present state over the one held."""
        for name, array in self._live.items():
            self.arrays[name][...] = array
        self._take_states()

    def restore(self) -> None:
        """Bring the model back to the state held."""
        self.restore_arrays()
        for name, generator in self._generators.items():
            generator.bit_generator.state = self._states[name]

    def restore_arrays(self) -> None:
        """Bring parameters and velocities back, and leave the random states."""
        for name, array in self._live.items():
            array[...] = self.arrays[name]

    def _take_states(self) -> None:
        self._states: dict[str, Any] = {name: g.bit_generator.state for name, g in self._generators.items()}
