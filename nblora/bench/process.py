"""Peers' processes: started with as many threads as asked for, driven by messages over pipes, watched by a clock."""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from .peers import PeerSpec
from .peers.messages import receive, send

# Loads the peers' folder under a name of its own, so that nothing of nblora is imported on the way.
BOOTSTRAP = """
import importlib.util, sys
folder = sys.argv[1]
places = {"submodule_search_locations": [folder]}
spec = importlib.util.spec_from_file_location("nblora_peers", folder + "/__init__.py", **places)
package = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = package
spec.loader.exec_module(package)
from nblora_peers.worker import main
main(*sys.argv[2:])
"""
PEERS_FOLDER = Path(__file__).parent / "peers"
NBLORA_ROOT = Path(__file__).parents[2]
# Every pool that a peer may bring: OpenMP, the BLASes, NumExpr, Numba, XLA.
POOLS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "PJRT_NPROC",
)
TIMEOUT = 600.0  # seconds for one answer: compiling may take minutes on a slow machine


class PeerError(Exception):
    """A peer's process failed, ended or kept silent, or its result is wrong; the message is what to report."""


class PeerMissingError(PeerError):
    """The peer's library is not installed for its interpreter."""


class DeviceMissingError(PeerMissingError):
    """The library is there, but cannot use the device."""


REFUSALS = {"missing": PeerMissingError, "unavailable": DeviceMissingError, "error": PeerError}


def environment(spec: PeerSpec, threads: int, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a peer's process: every thread pool as large as `threads`."""
    own = [str(NBLORA_ROOT)] if spec.module == ".nblora_peer" else []
    paths = [*spec.folders, *own, os.environ.get("PYTHONPATH", "")]
    eigen_threads = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()}"
    return {
        **os.environ,
        **dict.fromkeys(POOLS, str(threads)),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONSAFEPATH": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of compilers beside the process that is timed
        "TOKENIZERS_PARALLELISM": "false",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {eigen_threads}".strip(),
        **(extra or {}),
    }


class Worker(contextlib.ExitStack):
    """One peer's process. A context manager: its end ends the process."""

    def __init__(
        self, spec: PeerSpec, threads: int, python: str = sys.executable, extra: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        self._complaints = self.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack ends it
        self.process = subprocess.Popen(
            [python, "-c", BOOTSTRAP, str(PEERS_FOLDER), spec.module, spec.cls],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env=environment(spec, threads, extra),
        )
        self._commands, self._answers = cast(BinaryIO, self.process.stdin), cast(BinaryIO, self.process.stdout)
        self.callback(self._end)

    def ask(self, do: str, *, timeout: float = TIMEOUT, **arguments: Any) -> Any:
        """Send a command and return its answer.

        Raises
        ------
        PeerError
            Where the peer raised, ended or kept silent for `timeout` seconds.
        """
        watch = threading.Timer(timeout, self.process.kill)
        watch.start()
        try:
            send(self._commands, {"do": do, **arguments})
            ((word, answer),) = receive(self._answers).items()
        except (EOFError, OSError):
            silent, words = watch.finished.is_set(), self._last_words()
            raise PeerError(f"no answer for {timeout:g} s" if silent else words) from None
        finally:
            watch.cancel()
        if word in REFUSALS:
            raise REFUSALS[word](answer)
        return answer

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self._complaints.seek(0)
        words = self._complaints.read().decode(errors="replace").strip()[-2000:]
        return f"the process ended with status {self.process.poll()}" + (f":\n{words}" if words else "")

    def _end(self) -> None:
        """End the process; harmless when it has ended."""
        try:
            self.process.communicate(timeout=5)  # the end of its input is the end of its work
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None
