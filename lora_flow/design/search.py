"""The search for the point from which curves follow: first guesses, rounds of least squares, and intervals."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_flow.checks import require
from lora_flow.design.draws import directions, with_other_rests
from lora_flow.design.intervals import Better, Profile, profiles
from lora_flow.design.least_squares import MAX_STEPS, Data, Model, curves, minimise
from lora_flow.design.moved import ALPHA, DELTA_W, RATE, SHIFT_SCALE, moved
from lora_flow.runtime.progress import Progress

LANES = 8  # points from which squares are minimised together
SCATTERED = {True: 256, False: 64}  # points that are looked at first, along the task alone or not
SCATTER = {ALPHA: 100.0, RATE: 10.0, SHIFT_SCALE: 1.3, DELTA_W: 4.0}  # factors about the first guess
RESTS = 128  # runs in all by which the rest of the draw is known
DECIDED = 0.25  # standard deviation of a log loss over rests of the draw, above which it is left out
NEARLY = 10.0  # by which the sum of squares of another answer may be larger: it is then e^5 times less likely
FIRST = 1e-2  # of the largest loss, above which an unknown draw's curve is first looked at


class Best(NamedTuple):
    """A minimum with the data of which it is one, the errors that were taken, and the losses that were used.

    `minima` are all that were found: points `(minimum, unknown)`, and their sums of squares.
    """

    point: np.ndarray
    cost: float
    jacobian: np.ndarray
    data: Data
    error: float
    used: np.ndarray
    minima: tuple[np.ndarray, np.ndarray]


class Search(NamedTuple):
    """One model, the whole problem, the curves, and the error of losses where it is known."""

    model: Model
    problem: Any
    clock: np.ndarray
    losses: np.ndarray
    error: float | None
    bar: Progress

    def best(self, rounds: int) -> Best:
        """The best fit, found in rounds: each takes the errors of losses from the last one's fit."""
        guess = self._guess()
        used = np.ones(self.losses.shape, bool)
        if self.model.seeds is None:
            used = self.losses > FIRST * self.losses.max(axis=1, keepdims=True)
        error = 0.05 if self.error is None else self.error
        points = self._scattered(guess, used)
        self.bar.update()
        mean, spread = np.zeros(self.losses.shape), np.zeros((*self.losses.shape, 1))
        for last in range(rounds):
            self._require_enough(used, guess.size)
            data = self._data(guess, mean, spread, used, error)
            best, points = self._minimised(data, points, error, used)
            best, points = best._replace(point=self._on_side(best.point)), np.stack([*map(self._on_side, points)])
            if last < rounds - 1:
                error = self._error(best)
                mean, spread, used = self._rest(best)
            self.bar.update()
        best, _ = self._minimised(data, points, error, used)
        return best._replace(error=self._error(best))

    def again(self, best: Best, point: np.ndarray) -> Best:
        again, _ = self._minimised(best.data, np.stack([point] * LANES), best.error, best.used)
        return again._replace(minima=best.minima)

    def intervals(self, best: Best, level: float, better: float = 0.1) -> list[Profile] | Better:
        from scipy.stats import norm, t

        def solve(points: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            lanes = np.arange(LANES) % len(points)
            found, costs, _ = minimise(self.model, best.data, jnp.asarray(points[lanes]), jnp.asarray(free[lanes]))
            return np.asarray(found)[: len(points)], np.nan_to_num(np.asarray(costs)[: len(points)], nan=np.inf)

        left = best.used.sum() - best.point.size
        quantile = norm if self.error is not None else t(left)
        errors = np.sqrt(np.diag(covariance(best.jacobian)))[: len(self.model.unknown)]
        threshold = float(quantile.ppf(0.5 + level / 2)) ** 2
        return profiles(solve, best.point, best.cost, errors, threshold, better)

    def others(self, best: Best, found: list[Profile]) -> tuple[np.ndarray, np.ndarray]:
        """Minima nearly as good, `(answer, parameter)` in logarithms, the best first, and what their sums have more.

        They lie outside an interval at least, and differ from each other by a per cent at least.
        """
        count = len(found)
        ends = np.array([(one.low, one.high) for one in found])
        points, costs = best.minima
        order = np.argsort(costs, kind="stable")
        kept = [best.point[:count]]
        more = []
        for point, cost in zip(points[order], costs[order] - best.cost, strict=True):
            one = self._on_side(point)[:count]
            outside = np.any((one < ends[:, 0]) | (one > ends[:, 1]))
            if cost < NEARLY and outside and all(np.any(abs(one - other) > 0.01) for other in kept):
                kept.append(one)
                more.append(cost)
        return np.array(kept[1:]).reshape(-1, count), np.array(more)

    def fitted(self, best: Best) -> np.ndarray:
        losses, _ = curves(self.model, jnp.asarray(self.clock), jnp.asarray(best.point[None]))
        return np.asarray(losses[0]) * np.exp(np.asarray(best.data.mean))

    def _guess(self) -> np.ndarray:
        """The centre of the first guesses: the values given, and the shift's size as the first loss has it."""
        values = {name: float(value) for name, value in self.model.values.items()}
        if SHIFT_SCALE in self.model.unknown:
            point = np.log([values[name] for name in self.model.unknown])
            rank = np.full(2 * len(self.losses), values[ALPHA] * np.sqrt(self.model.rank))
            point = np.concatenate([point, np.log(rank) if self.model.seeds is None else []])
            first, _ = curves(self.model, jnp.asarray(self.clock[:3]), jnp.asarray(point[None]))
            values[SHIFT_SCALE] *= float(np.sqrt(np.median(self.losses[:, 0] / np.asarray(first[0, :, 0]))))
        point = np.log([values[name] for name in self.model.unknown])
        sizes = np.full(2 * len(self.losses), np.log(values[ALPHA]) + 0.5 * np.log(self.model.rank))
        return np.concatenate([point, sizes]) if self.model.seeds is None else point

    def _scattered(self, guess: np.ndarray, used: np.ndarray) -> np.ndarray:
        """The best of many points about the guess: of a low-discrepancy sequence, so always the same."""
        from scipy.stats import qmc

        count, number = len(self.model.unknown), SCATTERED[self.model.seeds is None]
        with np.errstate(all="ignore"):
            cube = qmc.Sobol(count + 2, rng=np.random.default_rng(0)).random(number)
        scale = np.log([SCATTER[name] for name in self.model.unknown])
        points = np.tile(guess, (number, 1))
        points[:, :count] += (2 * cube[:, :count] - 1) * scale
        points[:, count:] += np.tile(2 * cube[:, count:] - 1, (1, (guess.size - count) // 2))  # by factors up to e
        if self.model.seeds is None and ALPHA in self.model.unknown:  # sizes follow alpha
            moved_by = points[:, self.model.unknown.index(ALPHA)] - guess[self.model.unknown.index(ALPHA)]
            points[:, count:] += moved_by[:, None]
        losses, _ = curves(self.model, jnp.asarray(self.clock), jnp.asarray(points))
        with np.errstate(all="ignore"):
            off = np.where(used, np.log(np.asarray(losses)) - np.log(self.losses), 0.0)
        costs = np.sum(np.clip(np.nan_to_num(off, nan=5.0), -5.0, 5.0) ** 2, axis=(1, 2))
        return points[np.argsort(costs, kind="stable")[:LANES]]

    def _on_side(self, point: np.ndarray) -> np.ndarray:
        """The same curve with delta_w on the first guess's side of 1: an unknown draw lets the layers change places."""
        if self.model.seeds is not None or DELTA_W not in self.model.unknown:
            return point
        i, count = self.model.unknown.index(DELTA_W), len(self.model.unknown)
        if point[i] * np.log(float(self.model.values[DELTA_W])) >= 0:
            return point
        turned = np.concatenate([point[:count], point[count:].reshape(-1, 2)[:, ::-1].ravel()])
        turned[i] = -point[i]
        return turned

    def _require_enough(self, used: np.ndarray, unknown: int) -> None:
        must = f"have more than {unknown + 1} losses from which its {unknown} unknown numbers follow"
        require(used.sum() > unknown + 1, "curve", must, int(used.sum()))

    def _data(self, guess: np.ndarray, mean: np.ndarray, spread: np.ndarray, used: np.ndarray, error: float) -> Data:
        """Each curve's errors have the covariance `error^2 I + spread spread^T`, over the losses that are used."""
        whiten = np.zeros((*self.losses.shape, self.losses.shape[1]))
        for i, at in enumerate(used):
            places = np.flatnonzero(at)
            one = spread[i, places]
            root = np.linalg.cholesky(error**2 * np.eye(places.size) + one @ one.T)
            whiten[i, places[:, None], places] = np.linalg.inv(root)
        logs = np.log(self.losses)
        return Data(*map(jnp.asarray, (self.clock, logs, np.where(used, mean, 0.0), whiten, guess)))

    def _minimised(self, data: Data, points: np.ndarray, error: float, used: np.ndarray) -> tuple[Best, np.ndarray]:
        """The best of the minima that are found from these points, and all of the minima."""
        found = minimise(self.model, data, jnp.asarray(points), jnp.ones(points.shape, bool))
        points, costs, jacobians = map(np.asarray, found)
        i = int(np.argmin(np.nan_to_num(costs, nan=np.inf)))
        return Best(points[i], float(costs[i]), jacobians[i], data, error, used, (points, costs)), points

    def _error(self, best: Best) -> float:
        """The relative error of losses, from the scatter about the fit in units of the one that was taken."""
        if self.error is not None:
            return self.error
        residuals = np.asarray(best.data.residuals(self.model, jnp.asarray(best.point)))[: best.used.size]
        left = max(1, best.used.sum() - best.point.size)
        return max(1e-6, best.error * float(np.sqrt(np.sum(residuals**2) / left)))

    def _rest(self, best: Best) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the rest of an unknown draw adds to each log loss: on average, its spread, and where it decides.

        A known draw has no rest; losses at rounding are then all that is left out.
        """
        point = jnp.asarray(best.point)
        losses, floor = curves(self.model, jnp.asarray(self.clock), point[None])
        used = self.losses > 10 * np.asarray(floor[0])[:, None]
        if self.model.seeds is not None:
            return np.zeros(used.shape), np.zeros((*used.shape, 1)), used
        values = self.model.at(point)
        whole = moved(self.problem, self.model.begun, values)
        count = max(8, RESTS // len(used))
        others = with_other_rests(
            {"solver": "auto", "rtol": 1e-4, "max_steps": MAX_STEPS},
            self.model.rank,
            self.model.side,
            whole,
            tuple(map(jnp.asarray, directions(self.problem))),
            values[ALPHA],
            self.model.sizes(point),
            jnp.arange(count),
            values[RATE] * jnp.asarray(self.clock),
        )
        with np.errstate(divide="ignore", invalid="ignore"):  # where the run along the task has come to zero
            added = np.asarray(others) - np.log(np.asarray(losses[0]))[:, None]
            mean = np.mean(added, axis=1)
            spread = np.moveaxis(added - mean[:, None], 1, 2) / np.sqrt(count - 1)
        decided = ~(np.sqrt(np.sum(spread**2, axis=2)) < DECIDED)
        first = np.where(decided.any(axis=1), decided.argmax(axis=1), decided.shape[1])
        used &= np.arange(decided.shape[1]) < first[:, None]
        return np.where(used, mean, 0.0), np.where(used[..., None], spread, 0.0), used


def uncertainties(best: Best) -> np.ndarray:
    """The standard deviation that each log loss was taken to have, `(curve, time)`; infinite where it was left out."""
    found = np.full(best.used.shape, np.inf)
    for one, whiten, at in zip(found, np.asarray(best.data.whiten), best.used, strict=True):
        places = np.flatnonzero(at)
        one[places] = np.linalg.norm(np.linalg.inv(whiten[places[:, None], places]), axis=1)
    return found


def covariance(jacobian: np.ndarray) -> np.ndarray:
    """Of the logarithms of all unknown numbers; the residuals' weak ties to the guess keep it finite."""
    return np.linalg.inv(jacobian.T @ jacobian)
