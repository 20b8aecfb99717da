"""The gradient flow's field in matrix products that NumPy and PyTorch share.

The same thin products as `Factorization.field`, for lanes in the leading axis. B is kept transposed, so that every
product with a frozen weight is from the right: one large product for all lanes, not a small one a lane.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Weights(NamedTuple):
    w1: Any
    w2: Any
    shift: Any


def residual(weights: Weights, a1: Any, b1t: Any, a2: Any, b2t: Any) -> Any:
    """shift - W2 B1 A1 - B2 A2 (W1 + B1 A1), `(lanes, m, n)`."""
    right = _times(a2, weights.w1) + (a2 @ b1t.mT) @ a1
    return weights.shift - _times(b1t, weights.w2.T).mT @ a1 - b2t.mT @ right


def loss(weights: Weights, a1: Any, b1t: Any, a2: Any, b2t: Any) -> Any:
    return 0.5 * (residual(weights, a1, b1t, a2, b2t) ** 2).sum((-2, -1))


def field(weights: Weights, a1: Any, b1t: Any, a2: Any, b2t: Any) -> tuple[Any, Any, Any, Any]:
    """-dL/d(A1, B1^T, A2, B2^T)."""
    w1, w2, shift = weights
    coupling = b1t @ a2.mT
    lifted = _times(b1t, w2.T)
    left = lifted + coupling @ b2t
    right = _times(a2, w1) + coupling.mT @ a1
    e = shift - lifted.mT @ a1 - b2t.mT @ right
    a1_e, b2_e = a1 @ e.mT, b2t @ e
    return (
        left @ e,
        _times(a1_e, w2) + (a1_e @ b2t.mT) @ a2,
        _times(b2_e, w1.T) + (b2_e @ a1.mT) @ b1t,
        right @ e.mT,
    )


def _times(lanes: Any, weight: Any) -> Any:
    """lanes @ weight as one product of two matrices."""
    return (lanes.reshape(-1, lanes.shape[-1]) @ weight).reshape(*lanes.shape[:-1], weight.shape[-1])
