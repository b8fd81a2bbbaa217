"""What the process holds of the machine's memory, where the system tells (Linux)."""


def fresh_peak() -> int | None:
    """Let the peak start again from the present resident set, and return that; None where the system cannot."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return None
    return peak_bytes()


def peak_bytes() -> int:
    """Return the largest resident set since the process began or `fresh_peak`."""
    with open("/proc/self/status") as file:
        kilobytes = dict(line.split(":", 1) for line in file)["VmHWM"]
    return int(kilobytes.split()[0]) * 1024
