"""What callers use of the kernels on weights: compiled, or where the compiler is off the reference."""

from nblora.kernels.common.jit import JIT_DISABLED

if JIT_DISABLED:
    from .reference import compare_block, encode_all, fold_rows, merge_block, norm_block, spacing_block
else:
    from .compare import compare_block, spacing_block
    from .merge import fold_rows, merge_block, norm_block
    from .numbers import encode_all

__all__ = ["compare_block", "encode_all", "fold_rows", "merge_block", "norm_block", "spacing_block"]
