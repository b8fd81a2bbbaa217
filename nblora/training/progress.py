"""The progress bar: tqdm on standard error, or nothing."""

import sys
from typing import Any


class Progress:
    """A bar over all samples of a run, with the loss and samples/s.

    `shown` is True or False; None shows it where standard error is a terminal. tqdm is imported only to show it.
    """

    def __init__(self, shown: bool | None, epochs: int, samples: int, done: int) -> None:
        self._bar: Any = None
        if shown is None:
            shown = sys.stderr is not None and sys.stderr.isatty()
        if shown:
            from tqdm import tqdm

            self._epochs, self._samples = epochs, samples
            self._bar = tqdm(
                total=epochs * samples, initial=done * samples, unit=" samples", unit_scale=True, dynamic_ncols=True
            )

    def advance(self, epoch: int, samples: int, loss: float) -> None:
        """Count a batch."""
        if self._bar is not None:
            self._bar.set_description(f"epoch {epoch}/{self._epochs}", refresh=False)
            self._bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            self._bar.update(samples)

    def restart(self, done: int) -> None:
        """Go back to where `done` epochs have ended."""
        if self._bar is not None:
            self._bar.n = done * self._samples

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
