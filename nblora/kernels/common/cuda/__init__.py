"""What the kernels for NVIDIA GPUs stand on; CUDA is imported here and in `backends/` alone.

Every kernel comes from a factory that takes the tile and what is there (delta, mask, ...): these are constants of the
compiled kernel. Arrays are C-contiguous, bounds come from their shapes, each output element has one owner, and there
are no atomics, so results repeat bit for bit.
"""
