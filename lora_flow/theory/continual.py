r"""LoRA that must leave old inputs alone: the exact safe motion, what it can reach, and what it leaves.

One layer W0 + B A, with A `(r, n)` and B `(m, r)`, and the negative gradient G = -dl/dW of a new task's loss. V
`(n, k)` has orthonormal columns, the protected inputs, and N = I - V V^T. A step dW is safe where dW V = 0. The
formulas are derived for this project. The question, and the observation that safe gradients of the factors do not make
a safe motion of W, are those of Janus-LoRA (arXiv 2605.28495), of which the abstract was read. All functions take
NumPy arrays.

**Theorem.** Let Q be an orthonormal basis of the column space of A V in R^r, Pi = I - Q Q^T, P_B the projection on B's
columns and P the projection on the rows of Pi A. Of all dW = B dA + dB A with dW V = 0, the closest to G N is

    dW = P_B G N + (I - P_B) G P.

*Proof.* Both parts of dW = P_B dW + (I - P_B) dW must be safe, and their distances from the parts of G N add up
squared.

Inside B's columns, P_B dW = B (dA + B^+ dB A). Since dA is free, this is any matrix with columns in B's. The closest
one to P_B G N is P_B G N itself, and it is safe.

Outside, (I - P_B) dW = Y A with Y = (I - P_B) dB. It is safe where Y (A V) = 0, that is Y = Y Pi. So its rows are
combinations of the rows of Pi A, and each such combination is safe, since Pi A V = 0. The closest one to (I - P_B) G N
has its rows projected, (I - P_B) G N P. The rows of Pi A are orthogonal to V, hence N P = P. QED

The factors dA = (B^T B)^{-1} B^T G N and dB = (I - P_B) G (Pi A)^+ give this motion. They need no more than the
factors' gradients D_A = B^T G and D_B = G A^T, for G (Pi A)^+ = D_B Pi (Pi A A^T Pi)^+. With them dA V = 0 and
dB A V = 0 hold one by one. So A V and B A V are conserved by the flow, and by a finite step too:
(B + e dB)(A + e dA) V = B A V. The rank of Pi A is at most r - rank(A V), which bounds the rank of the part outside.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def exact_motion(g: np.ndarray, a: np.ndarray, b: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """The theorem's dW = P_B G N + (I - P_B) G P, `(m, n)`."""
    p_b, size = _projection(b, _size(b)), _size(a)
    blocked = _projection(a @ basis, size)
    p = _projection((a - blocked @ a).T, size)
    return p_b @ (g - g @ basis @ basis.T) + (g - p_b @ g) @ p


def constrained_optimum(g: np.ndarray, a: np.ndarray, b: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """The closest dW = B dA + dB A to G N with dW V = 0, `(m, n)`, by brute force.

    All m r + r n entries of the factors' steps are unknowns. The safe ones among them are a null space, in which a
    least-squares problem is solved. For sizes up to a dozen.
    """
    n, m = a.shape[1], len(b)
    of_a, of_b = np.kron(b, np.eye(n)), np.kron(np.eye(m), a.T)  # dW by rows, from dA and dB by rows
    moves = np.concatenate([of_a, of_b], axis=1)
    violates = np.kron(np.eye(m), basis.T) @ moves
    _, s, vt = np.linalg.svd(violates)
    safe = vt[int(np.sum(s > 1e-10 * s.max(initial=0.0))) :].T
    target = (g - g @ basis @ basis.T).ravel()
    steps, *_ = np.linalg.lstsq(moves @ safe, target, rcond=1e-10)
    return (moves @ safe @ steps).reshape(m, n)


def rank_outside(rank: int, blocked: int) -> int:
    """The largest rank of the exact motion outside B's columns, max(r - rank(A V), 0)."""
    return max(rank - blocked, 0)


def floor(shift: np.ndarray, basis: np.ndarray, covariance: np.ndarray | None = None) -> float:
    r"""The least loss of the new task under exact protection, for adapters of enough rank.

    The new task asks for the change `shift`, Delta `(m, n)`. With white inputs the floor is 1/2 ||Delta V||_F^2, what
    the new task asks of old inputs. With the new inputs' covariance C it is 1/2 tr(Delta V (V^T C^{-1} V)^{-1} V^T
    Delta^T), which is less: a change on other inputs makes up for what correlated inputs share. C must be invertible.
    """
    asked = shift @ basis
    if covariance is None:
        return 0.5 * float(np.sum(asked**2))
    schur = np.linalg.inv(basis.T @ np.linalg.solve(covariance, basis))
    return 0.5 * float(np.trace(asked @ schur @ asked.T))


def forgetting(change: np.ndarray, basis: np.ndarray) -> Any:
    """1/2 ||dW V||_F^2, `(...)`: the loss of an old task that was fitted, whose inputs are white in the span of V."""
    return 0.5 * np.sum((change @ basis) ** 2, axis=(-2, -1))


def violation(motion: np.ndarray, basis: np.ndarray) -> Any:
    """||dW V||_F/||dW||_F of a motion, `(...)`; 0 of none."""
    whole = np.linalg.norm(motion, axis=(-2, -1))
    return np.linalg.norm(motion @ basis, axis=(-2, -1)) / np.where(whole > 0, whole, 1.0)


def _size(x: np.ndarray) -> float:
    return float(np.linalg.norm(x, 2))


def _projection(x: np.ndarray, size: float) -> np.ndarray:
    """On the column space of x; singular values that are rounding beside `size` are zero."""
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    u = u[:, s > 100 * max(x.shape) * np.finfo(x.dtype).eps * size]
    return u @ u.T
