"""What a start looks like beside the gradient: principal angles, and how its norm is shared out."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lora_flow.adapter import Adapters
from lora_flow.algebra.diagonal import dense
from lora_flow.problems.base import linearised_task, matrix_rank


class Spans(NamedTuple):
    """For each layer orthonormal columns along the gradient's singular vectors, of A's side and of B's.

    Spectral starts lie in these spans: as many directions as the gradient has, at most the rank.
    """

    columns: tuple[tuple[np.ndarray, np.ndarray], ...]

    @classmethod
    def of(cls, problem: Any, rank: int) -> Spans:
        found = []
        for task in linearised_task(problem):
            u, s, vt = np.linalg.svd(np.asarray(dense(task)), full_matrices=False)
            count = min(matrix_rank(s, task.shape), rank)
            found.append((vt[:count].T, u[:, :count]))
        return cls(tuple(found))

    @property
    def pairs(self) -> int:
        """The largest number of directions that a layer's gradient has."""
        return max(1, *(of_a.shape[1] for of_a, _ in self.columns))

    def look(self, adapters: Adapters) -> tuple[np.ndarray, np.ndarray]:
        """Of starts with leading axes: principal angles in degrees, `(..., layer, factor, pair)`, and shares.

        The angles are those between the span and as many leading singular vectors of the factor, the smallest first.
        The shares of the squared norm are `(..., layer, factor)`.
        """
        factors = [[np.swapaxes(np.asarray(a), -1, -2), np.asarray(b)] for a, b in adapters]
        squares = np.stack([np.stack([np.sum(one**2, axis=(-2, -1)) for one in pair], -1) for pair in factors], -2)
        lead = squares.shape[:-2]
        angles = np.full((*lead, len(factors), 2, self.pairs), np.nan)
        for i, (pair, spans) in enumerate(zip(factors, self.columns, strict=True)):
            for j, (factor, span) in enumerate(zip(pair, spans, strict=True)):
                count = span.shape[1]
                left = np.linalg.svd(factor, full_matrices=False)[0][..., :count]
                cosines = np.linalg.svd(span.T @ left, compute_uv=False)
                angles[..., i, j, :count] = np.degrees(np.arccos(np.clip(cosines, 0.0, 1.0)))
        return angles, squares / squares.sum(axis=(-2, -1), keepdims=True)
