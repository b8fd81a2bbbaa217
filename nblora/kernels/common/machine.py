"""The shapes that follow the machine: vector length, register tile and cache blocks.

A register tile is `TILE_ROWS` x 2 vectors. With 32 vector registers 12 rows need 24 accumulators, two vectors of B and
a broadcast; with 16 registers 6 rows need 12. `DEPTH` inner elements by two vectors of 512 bits is a panel of 32 KB,
two thirds of a level-1 cache; a block of `BLOCK` x `DEPTH` is 256 KB of float32 and stays in the level-2 cache.
"""

import os
import platform

import llvmlite.binding as llvm


def _detected_bits() -> int:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return 128
    features = llvm.get_host_cpu_features()
    if features.get("avx512f") and features.get("avx512vl"):
        return 512
    return 256 if features.get("avx2") and features.get("fma") else 128


def _vector_bits() -> int:
    text = os.environ.get("NBLORA_VECTOR_BITS") or str(_detected_bits())
    if text not in ("128", "256", "512"):
        raise ValueError(f"NBLORA_VECTOR_BITS: expected 128, 256 or 512, got {text!r}; unset it to follow the machine")
    return int(text)


VECTOR_BITS = _vector_bits()
REGISTERS = 16 if VECTOR_BITS < 512 and platform.machine().lower() in ("x86_64", "amd64") else 32
TILE_ROWS = 12 if REGISTERS == 32 else 6
GROUP = 8 if REGISTERS == 32 else 4
"""Rows of a weight that a tile of `rowtiles` holds in registers, or whose gradient it does."""
DEPTH = 256
ROW_STRIDE = DEPTH + VECTOR_BITS // 32  # not a power of two: rows of a panel fall into different cache sets
BLOCK = 256
