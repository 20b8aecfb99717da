"""A large matrix as a linear flow from a small start sees it: in a space that is a few times the start's rank wide."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

ROUNDING = 1e-13  # of the columns' norm, up to which what they add to a space is rounding
MARGIN = 20  # powers of the matrix that even a short flow needs, for double precision


class Seen(NamedTuple):
    """U^T M V, with orthonormal columns of U and V."""

    left: Float[np.ndarray, "rows k"]
    matrix: Float[np.ndarray, "k l"]
    right: Float[np.ndarray, "columns l"]


def seen_from(
    matrix: Float[np.ndarray, "rows columns"],
    left: Float[np.ndarray, "rows p"],
    right: Float[np.ndarray, "columns q"],
    growth: float,
) -> Seen:
    """What the flow x' = M y, y' = M^T x sees of M from columns of x and y in the spans of `left` and `right`.

    U and V span these columns and their images under powers of M^T M and M M^T, as many as the flow needs up to the
    time t with ||M||_2 t = `growth`, to rounding: the solution projected onto them is the solution. Where that would be
    half of the matrix or more, they span all of it.
    """
    depth = math.ceil((MARGIN + math.sqrt(64 * growth)) / 2)
    width = right.shape[1] + (left.shape[1] if left.any() else 0)
    if 2 * (depth * width + left.shape[1]) >= min(matrix.shape):
        (rows, columns), u, v = matrix.shape, left, right
        u = _orthonormal(np.hstack([left, matrix])) if rows > columns + u.shape[1] else np.eye(rows)
        v = _orthonormal(np.hstack([right, matrix.T])) if columns > rows + v.shape[1] else np.eye(columns)
        return Seen(u, u.T @ matrix @ v, v)
    block = np.hstack([right, matrix.T @ left]) if left.any() else right
    space = np.zeros((matrix.shape[1], 0))
    for _ in range(depth):
        block = _beside(space, block)
        if not block.shape[1]:  # all that the matrix reaches is spanned
            break
        space = np.hstack([space, block])
        block = matrix.T @ (matrix @ block)
    forward = matrix @ space
    u = _beside(np.zeros((len(matrix), 0)), np.hstack([left, forward]))
    return Seen(u, u.T @ forward, space)


def _beside(space: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Orthonormal columns that with the space span these columns too, but for rounding: none where the space does.

    They are made orthogonal to it twice: what is rounding of the columns need not be rounding of what is left of them.
    """
    least = ROUNDING * float(np.linalg.norm(columns))
    for _ in range(2):
        u, s, _ = np.linalg.svd(columns - space @ (space.T @ columns), full_matrices=False)
        columns, least = u[:, s > least], 0.5
    return columns


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    return np.linalg.qr(columns)[0]
