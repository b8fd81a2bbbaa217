"""What a report says of the machine, and whether it had other work: no names of hosts or users."""

import contextlib
import os
import platform
from pathlib import Path
from typing import Any

from nblora._version import __version__
from nblora.info import usable_cores

BUSY_LOAD = 0.5  # average of the last minute
BUSY_SHARE = 0.05  # of all processor time, by other processes or by the host of a virtual machine


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, vectors, memory, system, and how busy the machine was before the run."""
    info = _cpu_info()
    about: dict[str, Any] = {
        "processor": info.get("model name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "memory_gib": None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "nblora": __version__,
    }
    if "model" in info and "cpu family" in info:
        about["processor"] += f" (family {info['cpu family']}, model {info['model']})"
    flags = info.get("flags", "").split()
    about["vectors"] = next((name for name in ("avx512f", "avx2", "avx", "asimd") if name in flags), "")
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not on every system
        about["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
        about["load_before"] = round(os.getloadavg()[0], 2)
    return about


def _cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; nothing on systems without one."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


class Watch:
    """How much of all processor time others took since it was made, where the system tells (Linux).

    Time of this process and of those that it started and that have ended is its own.
    """

    def __init__(self) -> None:
        self._begin = self._ticks()

    def shares(self) -> dict[str, float]:
        """`foreign_share`, of other processes, and `stolen_share`, of the host of a virtual machine."""
        if self._begin is None or (now := self._ticks()) is None:
            return {}
        total, work, stolen, own = (after - before for before, after in zip(self._begin, now, strict=True))
        total = max(total, 1.0)
        return {"foreign_share": round(max(0.0, work - own) / total, 3), "stolen_share": round(stolen / total, 3)}

    @staticmethod
    def _ticks() -> tuple[float, float, float, float] | None:
        """All time, time at work, time stolen, and of the work this process' own; in the kernel's ticks."""
        try:
            fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, idle, waiting, hard, soft, stolen = map(float, fields)
        work = user + nice + system + hard + soft
        own = sum(os.times()[:4]) * os.sysconf("SC_CLK_TCK")
        return work + idle + waiting + stolen, work, stolen, own


def busy_with(about: dict[str, Any]) -> str:
    """Say what other work was seen on the machine of this description; "" where it was quiet."""
    seen = []
    if about.get("load_before", 0.0) > BUSY_LOAD:
        seen.append(f"load {about['load_before']} before the run, at most {BUSY_LOAD} is quiet")
    for name, who in (("foreign_share", "taken by other processes"), ("stolen_share", "taken by the machine's host")):
        if about.get(name, 0.0) > BUSY_SHARE:
            seen.append(f"{about[name]:.1%} of the processor time {who} during it, at most {BUSY_SHARE:.0%} is quiet")
    return f"The machine was busy with other work ({'; '.join(seen)})" if seen else ""
