"""Every error type of nblora's own. Each also derives from the built-in error that a caller would expect."""


class NbloraError(Exception):
    """Base of every error type that nblora defines."""


class FormatError(NbloraError, ValueError):
    """A file is broken, hostile, of another version, or not of the kind asked for."""


class DeviceUnavailableError(NbloraError, RuntimeError):
    """The device asked for cannot run here; the message says what is missing."""


class DeviceMemoryError(NbloraError, MemoryError):
    """A GPU's memory is full; the message says how much was wanted and how much is free."""


class NonFiniteError(NbloraError, ArithmeticError):
    """Training met a NaN or an infinity; the message names the layer and the step."""


class MissingExtraError(NbloraError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""
