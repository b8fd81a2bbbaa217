"""Attention on NVIDIA GPUs: softmax(scale q kᵀ) v, forward and backward, and rotary positions.

In the manner of FlashAttention-2 (Dao, 2023): a block owns a tile of queries, or of keys, walks along the others, and
holds the scores of one pair of tiles at a time; the way back computes them again from the logarithms of their sums.
"""
