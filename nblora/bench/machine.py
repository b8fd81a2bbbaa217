"""What a report says of the machine and of the versions: no names of hosts or users."""

import os
import platform
from pathlib import Path

from nblora._version import __version__


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_machine() -> dict[str, object]:
    """Return processor, cores, caches, memory, system, and how busy the machine was before the run."""
    about: dict[str, object] = {
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "nblora": __version__,
    }
    flags = _cpu_info().get("flags", "").split()
    about["vectors"] = next((name for name in ("avx512f", "avx2", "avx", "asimd") if name in flags), "")
    if hasattr(os, "getloadavg"):
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


def _processor() -> str:
    info = _cpu_info()
    name = info.get("model name") or platform.processor() or platform.machine()
    if "model" in info and "cpu family" in info:
        name += f" (family {info['cpu family']}, model {info['model']})"
    return name


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None
