"""The progress bar: tqdm on standard error, or nothing."""

import sys
from typing import Any


class Progress:
    """A bar over all samples, or tokens, of a run, with the loss, how many a second, and the time that is left.

    `shown` is True or False; None shows it where standard error is a terminal. tqdm is imported only to show it.
    """

    def __init__(self, shown: bool | None, total: float, unit: str) -> None:
        self._bar: Any = None
        if shown is None:
            shown = sys.stderr is not None and sys.stderr.isatty()
        if shown:
            from tqdm import tqdm

            self._bar = tqdm(total=round(total), unit=f" {unit}", unit_scale=True, dynamic_ncols=True)

    def advance(self, where: str, amount: int, loss: float) -> None:
        """Count a step; `where` says which."""
        if self._bar is not None:
            self._bar.set_description(where, refresh=False)
            self._bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            self._bar.update(amount)

    def restart(self, done: float) -> None:
        """Go (back) to where so much is done."""
        if self._bar is not None:
            self._bar.n = self._bar.initial = round(done)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
