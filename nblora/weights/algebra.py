"""Low-rank products without the dense matrix: singular values, norms and the best product of smaller rank."""

import numpy as np

from nblora.formats.peft import PeftAdapter
from nblora.formats.peft_tensors import LoraModule


def read_factors(adapter: PeftAdapter, module: LoraModule) -> tuple[np.ndarray, np.ndarray]:
    """B (out, rank) and A (rank, in) of a module as float64 matrices, a convolution's kernel flattened into `in`."""
    B, A = adapter.file.read_wide(module.B.name), adapter.file.read_wide(module.A.name)
    return B.reshape(len(B), -1), A.reshape(len(A), -1)


def decompose(B: np.ndarray, A: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The singular value decomposition of B A, from QR of each factor and one small SVD.

    With B = Q R and Aᵀ = P S the product is Q (R Sᵀ) Pᵀ, and R Sᵀ is as small as the rank.

    Parameters
    ----------
    B : ndarray of float64, shape (out, rank)
    A : ndarray of float64, shape (rank, in)

    Returns
    -------
    U : ndarray of float64, shape (out, k)
    values : ndarray of float64, shape (k,)
        Descending; k = min(out, in, rank).
    V : ndarray of float64, shape (k, in)
    """
    Q, R = np.linalg.qr(B)
    P, S = np.linalg.qr(A.T)
    U, values, V = np.linalg.svd(R @ S.T, full_matrices=False)
    return Q @ U, values, V @ P.T


def truncate(B: np.ndarray, A: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The best product of a smaller rank, its singular values shared evenly between the factors.

    Returns
    -------
    B : ndarray of float64, shape (out, rank)
    A : ndarray of float64, shape (rank, in)
    error : float
        ‖dropped‖ / ‖all‖ in the Frobenius norm; 0 for a product of zeros.
    """
    U, values, V = decompose(B, A)
    kept = min(rank, len(values))
    roots = np.sqrt(values[:kept])
    left, right = np.zeros((B.shape[0], rank)), np.zeros((rank, A.shape[1]))
    left[:, :kept], right[:kept] = U[:, :kept] * roots, roots[:, None] * V[:kept]
    total = np.linalg.norm(values)
    return left, right, float(np.linalg.norm(values[kept:]) / total) if total else 0.0
