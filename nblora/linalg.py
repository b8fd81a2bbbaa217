"""Norms and singular values of weights and of their changes, and probabilities of logits, in float64."""

import numpy as np

_DENSE_SVD = 512
"""Smallest side up to which a whole decomposition takes less than 0.1 s; beyond, few values cost in·out·count."""


def frobenius_norm(array: np.ndarray) -> float:
    """√Σ a², accumulated in float64."""
    return float(np.sqrt(np.einsum("...,...", array, array, dtype=np.float64).sum(dtype=np.float64)))


def softmax(logits: np.ndarray) -> np.ndarray:
    """exp(z) / Σ exp(z) of each row of logits (rows, classes)."""
    z = logits.astype(np.float64)
    exponentials = np.exp(z - z.max(axis=1, keepdims=True))
    result: np.ndarray = exponentials / exponentials.sum(axis=1, keepdims=True)
    return result


def leading_svd(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `count` largest singular values of a matrix (rows, columns), descending, and their vectors.

    Returns
    -------
    U : ndarray of float64, shape (rows, count)
    values : ndarray of float64, shape (count,)
    V : ndarray of float64, shape (count, columns)
    """
    smallest = min(matrix.shape)
    if smallest <= _DENSE_SVD or 4 * count > smallest:
        U, values, V = np.linalg.svd(matrix, full_matrices=False)
        return U[:, :count], values[:count], V[:count]
    from scipy.sparse.linalg import svds

    start = np.random.default_rng(0).standard_normal(smallest)  # so that the figures repeat
    U, values, V = svds(matrix, k=count, v0=start)  # Lanczos iteration, to full precision
    order = np.argsort(values)[::-1]
    return U[:, order], values[order], V[order]


def product_svd(B: np.ndarray, A: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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


def shared(U: np.ndarray, values: np.ndarray, V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two factors whose product is U diag(values) V, the roots of the values shared evenly."""
    roots = np.sqrt(values)
    return U * roots, roots[:, None] * V


def best_product(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The best approximation P Q of a dense matrix in the Frobenius norm (Eckart and Young, 1936).

    Parameters
    ----------
    matrix : ndarray of float64, shape (in, out)
    rank : int
        At most min(in, out).

    Returns
    -------
    P : ndarray of float64, shape (in, rank)
    Q : ndarray of float64, shape (rank, out)
    error : float
        ‖matrix − P Q‖ / ‖matrix‖; 0 for zeros.
    """
    P, Q = shared(*leading_svd(matrix, rank))
    norm = np.linalg.norm(matrix)
    return P, Q, float(np.linalg.norm(matrix - P @ Q) / norm) if norm else 0.0


def stable_rank(matrix: np.ndarray) -> float:
    """‖M‖²_F / ‖M‖²_2: 0 for a zero matrix, NaN where any value is not finite (Rudelson and Vershynin, 2007)."""
    if not np.isfinite(matrix).all():
        return float("nan")
    largest = float(np.max(np.abs(matrix), initial=0.0))
    if largest == 0.0:
        return 0.0
    scaled = matrix / largest  # squares stay in range
    return float((frobenius_norm(scaled) / leading_svd(scaled, 1)[1][0]) ** 2)
