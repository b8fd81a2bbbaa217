"""Every error type of nblora's own. Each also derives from the built-in error that a caller would expect."""

_LONGEST = 3000
"""Characters of a message that are shown."""


class NbloraError(Exception):
    """Base of every error type that nblora defines."""


class FormatError(NbloraError, ValueError):
    """A file is broken, hostile, of another version, or not of the kind asked for.

    Messages quote what the file holds; of one that a file made very long, the middle is left out.
    """

    def __init__(self, message: str = "") -> None:
        if len(message) > _LONGEST:
            left_out = len(message) - _LONGEST
            message = f"{message[: _LONGEST * 2 // 3]} … ({left_out} characters) … {message[-_LONGEST // 3 :]}"
        super().__init__(message)


class DeviceUnavailableError(NbloraError, RuntimeError):
    """The device asked for cannot run here; the message says what is missing."""


class DeviceMemoryError(NbloraError, MemoryError):
    """A GPU's memory is full; the message says how much was wanted and how much is free."""


class NonFiniteError(NbloraError, ArithmeticError):
    """Training met a NaN or an infinity; the message names the layer and the step."""


class MissingExtraError(NbloraError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""
