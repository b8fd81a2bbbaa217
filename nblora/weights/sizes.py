"""Sizes as people write them: 64MiB, 5GB, 1_000_000."""

import re

_UNITS = {"": 1, **{f"{letter}B": 1000**at for at, letter in enumerate("KMGT", 1)}}
_UNITS |= {f"{letter}IB": 1024**at for at, letter in enumerate("KMGT", 1)} | {"B": 1}
_UNITS |= {letter: 1024**at for at, letter in enumerate("KMGT", 1)}


def parse_size(value: int | str, name: str) -> int:
    """Return a number of bytes.

    Parameters
    ----------
    value : int or str
        A number, or a number and B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB, K, M, G, T (of 1024).
    name : str
        The argument, for messages.

    Raises
    ------
    ValueError
        If it is no such size, or not positive.
    """
    if isinstance(value, int):
        size = value
    else:
        match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value)
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(f"{name} is {value!r}; expected a size such as 64MiB or 5GB")
        size = int(float(match[1].replace("_", "")) * _UNITS[match[2].upper()])
    if size <= 0:
        raise ValueError(f"{name} is {value!r}; expected a positive size")
    return size
