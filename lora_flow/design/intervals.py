"""Profile likelihood: how far a parameter can be moved while all others follow, until the fit is too bad."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

MOST = np.log(1000.0)  # by which the logarithm of a parameter is moved at the most
ROUNDS = 14
NEAR = 0.01  # of the threshold, within which an end is found

Solve = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]  # points and what is free to points and costs


class Better(NamedTuple):
    """A point with a smaller sum of squares than the one that intervals were sought about."""

    point: np.ndarray


class Profile(NamedTuple):
    """One parameter's interval, infinite where open, and the deviances on the way, in the order of the values.

    All values are logarithms. The deviance is what the sum of squares has more than at the best fit.
    """

    low: float
    high: float
    values: np.ndarray
    deviances: np.ndarray


@dataclasses.dataclass
class _End:
    """One end of one interval, while it is sought: the next distance to try, and what is known below and above."""

    index: int
    sign: int
    far: float
    below: tuple[float, float] = (0.0, 0.0)  # distance, and root of the deviance
    above: tuple[float, float] | None = None
    done: bool = False
    is_open: bool = False
    seen: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    def learn(self, root: float, wanted: float) -> None:
        """The root of a deviance is nearly linear in the distance, so a line leads to the end."""
        self.seen.append((self.far, root**2))
        if root < wanted:
            self.below = self.far, root
        else:
            self.above = self.far, root
        if abs(root - wanted) < NEAR * wanted:
            self.done = True
        elif self.above is None:
            self.done = self.is_open = self.far >= MOST
            self.far = min(MOST, self.far * float(np.clip(1.1 * wanted / max(root, 1e-9), 1.2, 4.0)))
        else:
            (x0, r0), (x1, r1) = self.below, self.above
            share = float(np.clip((wanted - r0) / (r1 - r0), 0.05, 0.95))
            self.far = x0 + share * (x1 - x0)
            self.done = x1 - x0 < 1e-6


def profiles(
    solve: Solve, point: np.ndarray, least: float, errors: np.ndarray, threshold: float, better: float = 0.1
) -> list[Profile] | Better:
    """The intervals of the first parameters of a point, as many as there are `errors`, or a better point.

    **Arguments:** `solve` minimises from points `(lane, unknown)` over what is `free`, and returns points and sums of
    squares; `least` is the sum at the `point`; `errors` are standard errors, from which the search begins; the
    interval ends where the deviance is `threshold`. A point is better whose sum is smaller by more than `better`.
    """
    wanted = float(np.sqrt(threshold))
    ends = [
        _End(i, sign, float(np.clip(wanted * error, 1e-5, 0.5))) for i, error in enumerate(errors) for sign in (-1, 1)
    ]
    near = [point] * len(ends)
    for _ in range(ROUNDS):
        if all(end.done for end in ends):
            break
        points, free = np.stack(near), np.ones((len(ends), point.size), bool)
        for lane, end in enumerate(ends):
            points[lane, end.index] = point[end.index] + end.sign * end.far
            free[lane, end.index] = False
        found, costs = solve(points, free)
        if np.min(costs) < least - better:
            return Better(found[np.argmin(costs)])
        for lane, end in enumerate(ends):
            if not end.done:
                end.learn(float(np.sqrt(max(costs[lane] - least, 0.0))), wanted)
                near[lane] = found[lane]
    return [_joined(point[i], *(end for end in ends if end.index == i)) for i in range(len(errors))]


def _joined(at: float, lower: _End, upper: _End) -> Profile:
    visited = sorted([(at, 0.0), *((at + end.sign * far, one) for end in (lower, upper) for far, one in end.seen)])
    values, deviances = np.array(visited).T
    low, high = (end.sign * np.inf if end.is_open else at + end.sign * end.far for end in (lower, upper))
    return Profile(float(low), float(high), values, deviances)
