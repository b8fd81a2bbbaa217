"""What the process holds of the machine's memory, where the system tells (Linux)."""

import os


def resident_bytes() -> int:
    """Return the resident set as it is; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def reset_peak() -> bool:
    """Let the peak start again from the present resident set; say whether the system could."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Return the largest resident set since the process began or `reset_peak`."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
