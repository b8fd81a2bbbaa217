"""Low-rank products of files without the dense matrix: their factors, and the best product of smaller rank."""

import numpy as np

from nblora.errors import FormatError
from nblora.formats.peft import PeftAdapter
from nblora.formats.peft_tensors import LoraModule
from nblora.linalg import product_svd, shared


def read_factors(adapter: PeftAdapter, module: LoraModule) -> tuple[np.ndarray, np.ndarray]:
    """B (out, rank) and A (rank, in) of a module as float64 matrices, a convolution's kernel flattened into `in`."""
    if module.single:
        raise FormatError(
            f"{adapter.path}: {module.name} has one matrix, whose other factor follows from the size of the base's "
            "layer: load_peft reads it with its base, and nblora merge merges it"
        )
    B, A = adapter.file.read_wide(module.B.name), adapter.file.read_wide(module.A.name)
    return B.reshape(len(B), -1), A.reshape(len(A), -1)


def truncate(B: np.ndarray, A: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The best product of a smaller rank, its singular values shared evenly between the factors.

    Returns
    -------
    B : ndarray of float64, shape (out, rank)
    A : ndarray of float64, shape (rank, in)
    error : float
        ‖dropped‖ / ‖all‖ in the Frobenius norm; 0 for a product of zeros.
    """
    U, values, V = product_svd(B, A)
    kept = min(rank, len(values))
    left, right = np.zeros((B.shape[0], rank)), np.zeros((rank, A.shape[1]))
    left[:, :kept], right[:kept] = shared(U[:, :kept], values[:kept], V[:kept])
    total = np.linalg.norm(values)
    return left, right, float(np.linalg.norm(values[kept:]) / total) if total else 0.0
