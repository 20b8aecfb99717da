"""Coordinates in which a factorisation costs least: the same flow, rotated, without the parts that stand still."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_flow.adapter import Adapter, Adapters, pad
from lora_flow.algebra.diagonal import WRITTEN_OUT, Diagonal, Matrix
from lora_flow.algebra.spectra import norm_on_host
from lora_flow.algebra.thin import gram_schmidt
from lora_flow.checks import require_integer
from lora_flow.coordinates.base import Coordinates
from lora_flow.problems.base import Layers, matrix_rank
from lora_flow.problems.factorization import Factorization, check_factorization
from lora_flow.problems.formulas import keeps_all

DENSE_BELOW = 4  # the shift is written out where the residual is no larger than this times the rank


class Canonical(Coordinates):
    r"""A `Factorization` in canonical coordinates, and the maps there and back.

    The flow commutes with orthogonal changes of the input, the hidden and the output space. Let V, G and U be
    orthonormal frames of the subspaces that the frozen matrices span there. Then

        W1 = G w1 V^T,   W2 = U w2 G^T,   shift = U shift' V^T,

    where on an aligned problem (Assumptions 2.1 and 2.2 of arXiv 2503.06982) all three small matrices are diagonal, and
    otherwise only the shift. Outside these frames the flow makes only linear combinations of the adapters' start: r
    coordinates suffice for the parts of A1 and B2, 2 r for those of B1 and A2 in the hidden space. All of this is
    exact.

    - `problem`: the factorisation in these coordinates, a `Problem` like any other.
    - `rank`: of the adapters in these coordinates. Adapters of lower ranks are padded.
    - `enter(adapters)`: the adapters in these coordinates, and the `Bases` that this start needs beside the frames.
    - `leave(adapters, bases)`: the way back.
    """

    problem: Factorization
    frames: tuple[Matrix, Matrix, Matrix]  # V (n, .), G (h, .), U (m, .)

    changes_problem: ClassVar[bool] = True

    @classmethod
    def of(cls, problems: Sequence[Factorization], *, rank: int) -> tuple[Canonical, ...]:
        require_integer("rank", rank, "be at least 1", 1)
        for problem in problems:
            check_factorization(problem)
        turned = [_turn_aligned(problem) for problem in problems]
        if any(one is None for one in turned):
            turned = [_turn(problem) for problem in problems]
        known = [one for one in turned if one is not None]
        (h, n), (m, _) = problems[0].layers
        spanned = [max(widths) for widths in zip(*(one.spanned for one in known), strict=True)]
        seen, sizes = zip(*map(_room, spanned, (n, h, m), (rank, 2 * rank, rank)), strict=True)
        shift_rank = max(len(one.sigma) for one in known)
        reduced = (one.reduced(seen, sizes, shift_rank, rank) for one in known)
        return tuple(cls(problem=problem, rank=rank, frames=frames) for problem, frames in reduced)

    def enter(self, adapters: Adapters) -> tuple[Adapters, Bases]:
        """A start in these coordinates, with the same loss, observables and flow, and the bases to leave them with."""
        (a1, b1), (a2, b2) = pad(adapters, self.rank)
        r = self.rank
        v, g, u = self.frames
        (inputs, of_v), (hidden, of_g), (outputs, of_u) = (
            _enter(v, a1.T),
            _enter(g, jnp.concatenate([b1, a2.T], axis=1)),
            _enter(u, b2),
        )
        return (Adapter(inputs.T, hidden[:, :r]), Adapter(hidden[:, r:].T, outputs)), (of_v, of_g, of_u)

    def leave(self, adapters: Adapters, bases: Bases) -> Adapters:
        """The adapters in the original coordinates."""
        (a1, b1), (a2, b2) = adapters

        def back(coordinates: Array, index: int) -> Any:
            frame, basis = self.frames[index], bases[index]
            seen = frame.shape[1]
            return frame @ coordinates[:seen] + basis @ coordinates[seen:]

        return Adapter(back(a1.T, 0).T, back(b1, 1)), Adapter(back(a2.T, 1).T, back(b2, 2))


Bases = tuple[Array, Array, Array]  # of a start's parts outside the frames V, G and U


def canonical(problem: Factorization, *, rank: int) -> Canonical:
    """The problem in canonical coordinates, for adapters of the given rank in both layers.

    Singular value decompositions on the host find the coordinates; a problem of `Diagonal` matrices has them already.

    **Returns:** a `Canonical`. Its `problem` has W1 `(h', n')`, W2 `(m', h')` and a shift `(m', n')`, with n' at most
    the number of input directions that the frozen matrices span plus r, m' likewise, and h' with 2 r.

    **Raises:** `InputError` unless the rank is at least 1, and for a subclass that changes or adds anything.
    """
    return Canonical.of([problem], rank=rank)[0]


def is_quick_to_turn(problem: Factorization) -> bool:
    """Whether a problem has these coordinates, and singular value decompositions cost less than they save.

    `Diagonal` matrices need none. A subclass of `Factorization` that changes anything, or records more, has no
    coordinates.
    """
    if not keeps_all(problem, Factorization):
        return False
    return isinstance(problem.shift, Diagonal) or max(max(shape) for shape in problem.layers) <= WRITTEN_OUT


def _enter(frame: Any, columns: Array) -> tuple[Array, Array]:
    """Coordinates of the columns: in the frame, and, if the frame is not square, in a basis of the columns' rest."""
    size, seen = frame.shape
    inside = frame.T @ columns
    if seen == size:
        return inside, jnp.zeros((size, 0))
    outside = columns - frame @ inside
    basis, coordinates = gram_schmidt(outside - frame @ (frame.T @ outside))
    return jnp.concatenate([inside, coordinates]), basis


class _Turned(NamedTuple):
    """Square frames V, G and U, the leading columns of each that the frozen matrices span, and these matrices turned.

    `w1` and `w2` are vectors, the diagonals, where they are diagonal. Frames that are None are identities.
    """

    frames: tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]
    spanned: tuple[int, int, int]
    w1: np.ndarray
    w2: np.ndarray
    sigma: np.ndarray
    layers: Layers

    def reduced(
        self, seen: tuple[int, ...], sizes: tuple[int, ...], shift_rank: int, rank: int
    ) -> tuple[Factorization, tuple[Matrix, Matrix, Matrix]]:
        """The problem of these sizes, and the columns of the frames that it keeps."""
        (h, n), (m, _) = self.layers
        v, g, u = (_leading(*one) for one in zip(self.frames, (n, h, m), seen, strict=True))
        inputs, hidden, outputs = sizes
        sigma = _resized(self.sigma, (shift_rank,))
        if min(outputs, inputs) <= DENSE_BELOW * rank:
            shift: Matrix = _resized(np.diag(sigma), (outputs, inputs))
        else:
            shift = Diagonal(sigma, (outputs, inputs))
        if self.w1.ndim == 1:
            w1: Matrix = Diagonal(_resized(self.w1, (min(seen[:2]),)), (hidden, inputs))
            w2: Matrix = Diagonal(_resized(self.w2, (min(seen[1:]),)), (outputs, hidden))
        else:
            w1, w2 = _resized(self.w1, (hidden, inputs)), _resized(self.w2, (outputs, hidden))
        return Factorization(w1, w2, shift), (v, g, u)


def _room(spanned: int, size: int, columns: int) -> tuple[int, int]:
    """The columns of a frame to keep, and the number of coordinates then: all, where keeping fewer gains nothing."""
    return (spanned, spanned + columns) if spanned + columns < size else (size, size)


def _leading(frame: np.ndarray | None, size: int, columns: int) -> Matrix:
    if frame is None:
        return Diagonal(_resized(np.ones(columns), (columns,)), (size, columns))
    return _resized(frame, (size, columns))


def _resized(array: np.ndarray, shape: tuple[int, ...]) -> Array:
    """Cut, or padded with zeros."""
    cut = array[tuple(slice(size) for size in shape)]
    padded = np.pad(cut, [(0, size - have) for size, have in zip(shape, cut.shape, strict=True)])
    return jax.device_put(padded.astype(jnp.result_type(float)))


def _turn_aligned(problem: Factorization) -> _Turned | None:
    """Frames in which all three matrices are diagonal, the shift's largest values first; None where there are none."""
    if isinstance(problem.w1, Diagonal) and isinstance(problem.w2, Diagonal) and isinstance(problem.shift, Diagonal):
        s1, s2, sigma = (np.asarray(matrix.values) for matrix in (problem.w1, problem.w2, problem.shift))
        spanned = max(len(s1), len(sigma)), max(len(s1), len(s2)), max(len(s2), len(sigma))
        return _Turned((None, None, None), spanned, s1, s2, sigma, problem.layers)
    w1, w2, shift = _arrays(problem)
    unit = np.max(np.abs(shift))  # whose scale is nobody's business: squares of small or large entries do not hold
    shift = shift / unit
    rounding = 10 * np.sqrt(max(*w1.shape, *w2.shape)) * np.finfo(float).eps
    # the singular pairs that the matrices have in common are those of a mixture, whose values in general differ
    pretrained = w2 @ w1
    mixture = pretrained / (norm_on_host(pretrained) or 1) + np.sqrt(2) * shift / norm_on_host(shift)
    u, values, vt = np.linalg.svd(mixture)
    k, v = matrix_rank(values, shift.shape), vt.T.copy()
    sigma = np.abs(np.diag(u.T @ shift @ v)[:k])
    sigma[sigma <= rounding * norm_on_host(shift)] = 0.0
    from_w1, from_w2 = w1 @ v[:, :k], w2.T @ u[:, :k]
    gain1, gain2 = (norm_on_host(hidden, axis=0) for hidden in (from_w1, from_w2))
    order = np.lexsort((-gain1 - gain2, -sigma))
    u[:, :k], v[:, :k] = u[:, order], v[:, order]
    used = (gain1 > rounding * norm_on_host(w1)) | (gain2 > rounding * norm_on_host(w2))
    g = _through(np.where(gain1 >= gain2, from_w1, from_w2)[:, order], used[order])
    if g is None:
        return None
    hidden, shift_rank = int(np.max(np.flatnonzero(used[order]), initial=-1)) + 1, np.count_nonzero(sigma)
    kept = []
    for matrix, given, size in (
        (g.T @ w1 @ v, w1, min(hidden, k)),
        (u.T @ w2 @ g, w2, min(hidden, k)),
        (u.T @ shift @ v, shift, shift_rank),
    ):
        places = range(size)
        kept.append(matrix[places, places])
        matrix[places, places] = 0.0
        if norm_on_host(matrix) > rounding * norm_on_host(given):
            return None
    s1, s2, sigma = kept[0], kept[1], unit * kept[2]
    return _Turned((v, g, u), (k, hidden, k), s1, s2, sigma, problem.layers)


def _through(columns: np.ndarray, used: np.ndarray) -> np.ndarray | None:
    """A square orthogonal matrix with a column along each that is used, in the same place; None if there is no room."""
    size, places = len(columns), np.flatnonzero(used)
    if np.any(places >= size):
        return None
    completed, frame = _completed(columns[:, places]), np.empty((size, size))
    frame[:, places], frame[:, np.setdiff1d(np.arange(size), places)] = np.split(completed, [len(places)], axis=1)
    return frame


def _turn(problem: Factorization) -> _Turned:
    """Frames that start with the shift's singular vectors, and go on with what the weights span besides."""
    w1, w2, shift = _arrays(problem)
    u, sigma, vt = np.linalg.svd(shift, full_matrices=False)
    k = matrix_rank(sigma, shift.shape)
    outputs, inputs = _extended(u[:, :k], w2), _extended(vt[:k].T, w1.T)
    hidden = _extended(np.zeros((len(w1), 0)), np.concatenate([w1, w2.T], axis=1))
    v, g, u = map(_completed, (inputs, hidden, outputs))
    spanned = inputs.shape[1], hidden.shape[1], outputs.shape[1]
    return _Turned((v, g, u), spanned, g.T @ w1 @ v, u.T @ w2 @ g, np.diag(u.T @ shift @ v)[:k], problem.layers)


def _arrays(problem: Factorization) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """W1, W2 and the shift in double precision, whatever they came in: what is small beside the rest is kept."""
    w1, w2, shift = (np.asarray(matrix, np.float64) for matrix in (problem.w1, problem.w2, problem.shift))
    return w1, w2, shift


def _extended(basis: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """An orthonormal basis with one of what the matrix's columns span besides."""
    left, sigma, _ = np.linalg.svd(matrix - basis @ (basis.T @ matrix), full_matrices=False)
    negligible = 10 * max(matrix.shape) * np.finfo(float).eps * np.linalg.norm(matrix, 2)
    return np.concatenate([basis, left[:, sigma > negligible]], axis=1)


def _completed(columns: np.ndarray) -> np.ndarray:
    """A square orthogonal matrix whose first columns are these, up to sign, made orthonormal."""
    return np.linalg.qr(columns, mode="complete")[0]
