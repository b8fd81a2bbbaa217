"""Operations on images on a GPU: patches, pooling, norms of channels."""

from .deferred import Deferred


class Images(Deferred):
    """The operations of `protocol.Backend` and `ReferenceBlocks` whose arrays are images."""
