"""Fuzz readers in this process: bounded in memory, each input in time; print what came, as one JSON line a reader.

`python -m tests.fuzz --count 1000 --seed 7 [--only npz]`. Exit status 1 where anything but an error of nblora's own,
or an OSError, came out of a reader.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

from nblora.errors import NbloraError

from .mutation import damage
from .readers import READERS

MEMORY = 500 << 20
PATIENCE = 20


class Hang(BaseException):
    """An input took longer than PATIENCE."""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=100, help="inputs for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(READERS), choices=list(READERS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of what numbers overflow: a warning is no fault here
    signal.signal(signal.SIGALRM, _alarm)
    os.fsync = lambda descriptor: None  # what is written here need not outlive the machine
    clean = True
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            found = fuzz(name, options.count, options.seed, Path(folder))
        print(json.dumps({"reader": name, "seed": options.seed, **found}), flush=True)
        clean = clean and not found["faults"]
    sys.exit(not clean)


def _alarm(*_):
    raise Hang


def fuzz(name, count, seed, folder):
    """Read so many damaged files; return how many were read, refused, and what else came."""
    reader = READERS[name]
    reader.make(folder)
    path = folder / reader.name
    whole = path.read_bytes()
    reader.read(folder)  # it must work, and what it compiles and imports is not the input's
    _bound_memory()
    outcomes, faults = Counter(), {}
    for number in range(count):
        rng = random.Random(f"{name} {seed} {number}")
        use = reader.structured if reader.structured and rng.random() < 0.6 else damage
        path.write_bytes(use(rng, whole))
        outcome, detail = attempt(reader, folder)
        outcomes[outcome] += 1
        if detail:
            faults.setdefault(outcome, f"input {number}: {detail}")
    return {"outcomes": dict(outcomes), "faults": faults}


def attempt(reader, folder):
    """What came of one file: its name, and where it is none that a user should see, the place."""
    signal.alarm(PATIENCE)
    try:
        reader.read(folder)
    except (NbloraError, OSError):
        return "refused", ""
    except (Exception, Hang) as error:
        signal.alarm(0)
        own = [
            frame for frame in traceback.extract_tb(error.__traceback__) if f"{os.sep}nblora{os.sep}" in frame.filename
        ]
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
        return f"{type(error).__name__} at {place}", f"{error}"[:200] or "-"
    finally:
        signal.alarm(0)
    return "read", ""


def _bound_memory():
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
