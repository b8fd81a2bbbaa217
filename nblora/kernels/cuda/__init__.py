"""Kernels for NVIDIA GPUs, and the only place besides `backends/cuda.py` that imports CUDA.

Every kernel comes from a factory that takes the tile and what is there (delta, mask, ...): these are constants of the
compiled kernel. Arrays are C-contiguous, bounds come from their shapes, each output element has one owner, and there
are no atomics, so results repeat bit for bit.
"""
