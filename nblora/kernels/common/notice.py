"""One line on a terminal before the first kernel compiles: half a minute of silence looks like a fault."""

import functools
import multiprocessing
import sys

TEXT = (
    "nblora: compiling kernels for this processor, which takes up to half a minute and happens once: later runs load "
    "them (`nblora warmup` compiles all ahead)"
)


@functools.cache
def say_once() -> None:
    """Write the line to standard error, where that is a terminal and this process is nobody's worker."""
    if sys.stderr is None or not sys.stderr.isatty() or multiprocessing.parent_process() is not None:
        return
    sys.stderr.write(f"\r\x1b[K{TEXT}\n")  # a progress bar that stands on the line is drawn again below
    sys.stderr.flush()
