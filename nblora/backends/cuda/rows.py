"""Operations on rows on a GPU: tables, norms, gates, and which rows are read."""

from .deferred import Deferred


class RowOperations(Deferred):
    """The operations of `protocol.Backend` and `ReferenceBlocks` whose arrays are rows."""
