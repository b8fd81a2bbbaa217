"""Peers' processes: started with as many threads as asked for, driven by one JSON object a line, watched by a clock."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from .peers import PeerSpec

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
    """A peer's process failed, ended or kept silent; the message is what to report."""


class PeerMissingError(PeerError):
    """The peer's library is not installed for its interpreter."""


class DeviceMissingError(PeerMissingError):
    """The library is there, but cannot use the device."""


def environment(spec: PeerSpec, threads: int, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a peer's process: every thread pool as large as `threads`."""
    folders = [*spec.folders, *([str(NBLORA_ROOT)] if spec.module == ".nblora_peer" else [])]
    given = os.environ.get("PYTHONPATH")
    paths = folders + ([given] if given else [])
    eigen_threads = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()}"
    return {
        **os.environ,
        **dict.fromkeys(POOLS, str(threads)),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of compilers beside the process that is timed
        "TOKENIZERS_PARALLELISM": "false",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {eigen_threads}".strip(),
        **(extra or {}),
    }


class Worker:
    """One peer's process. A context manager: its end ends the process."""

    def __init__(
        self,
        spec: PeerSpec,
        threads: int,
        python: str = sys.executable,
        once: Mapping[str, Any] | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        arguments = [] if once is None else [json.dumps(once)]
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process runs
        self._process = subprocess.Popen(
            [python, "-c", BOOTSTRAP, str(PEERS_FOLDER), spec.module, spec.cls, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            encoding="utf-8",
            env=environment(spec, threads, extra),
        )
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(ValueError, OSError):  # closed by `stop`
            for line in self._process.stdout or ():
                self._answers.put(line)
        self._answers.put(None)

    def ask(self, do: str, *, timeout: float = TIMEOUT, **arguments: Any) -> dict[str, Any]:
        """Send a command and return its answer.

        Raises
        ------
        PeerError
            Where the peer raised, ended or kept silent for `timeout` seconds.
        """
        stream = self._process.stdin
        try:
            if stream is not None:
                stream.write(json.dumps({"do": do, **arguments}) + "\n")
                stream.flush()
        except (BrokenPipeError, OSError):
            raise PeerError(self._last_words("ended")) from None
        return self.answer(timeout)

    def answer(self, timeout: float = TIMEOUT) -> dict[str, Any]:
        """Wait for the next answer."""
        try:
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            self.stop()
            raise PeerError(f"no answer for {timeout:g} s") from None
        if line is None:
            raise PeerError(self._last_words("ended"))
        answer: dict[str, Any] = json.loads(line)
        if "missing" in answer:
            raise PeerMissingError(f"{answer['missing']} is not installed")
        if "unavailable" in answer:
            raise DeviceMissingError(answer["unavailable"])
        if "error" in answer:
            raise PeerError(answer["error"].strip())
        return answer

    def _last_words(self, what: str) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._complaints.seek(0)
        words = self._complaints.read().decode(errors="replace").strip()[-2000:]
        return f"the process {what} with status {self._process.poll()}" + (f":\n{words}" if words else "")

    def stop(self) -> None:
        """End the process; harmless when it has ended."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._complaints.close()

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End the process."""
        self.stop()
