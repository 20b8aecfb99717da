"""`fit`: loss curves in, and out the parameters of the runs that made them, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import ArrayLike

from lora_flow.checks import (
    kind,
    require,
    require_choice,
    require_flag,
    require_integer,
    require_number,
)
from lora_flow.coordinates.base import Coordinates
from lora_flow.design.curves import check_curves
from lora_flow.design.draws import along_task, why_not_along
from lora_flow.design.intervals import Better, Profile
from lora_flow.design.least_squares import Model
from lora_flow.design.moved import ALPHA, DELTA_W, RATE, SHIFT_SCALE, own_values
from lora_flow.design.search import Best, Search, covariance, uncertainties
from lora_flow.dynamics.flows import Flow, as_flow
from lora_flow.dynamics.integrator import SOLVERS
from lora_flow.initialization import SIDES, Init, as_scheme, initialize
from lora_flow.problems.base import Problem, kind_of, require_problem
from lora_flow.runtime.progress import Progress
from lora_flow.sensitivities.parameters import checked
from lora_flow.sweeps.schema import explain

RTOL = 1e-5
BETTER = 3  # times that a better fit may be found on the way to the intervals
ROUNDS = 3  # of fits to unknown draws, each with the errors that the last one tells of

_ABOUT = {
    "estimate": "estimate: of the parameter, where the sum of squares is least",
    "low": "lower end of the interval: by profile likelihood, 0 where it is open",
    "high": "upper end of the interval: by profile likelihood, infinite where it is open",
    "covariance": "covariance: of the parameters' logarithms, from the Jacobian",
    "profile_value": "value of the parameter: at which it was held fixed while all else was fitted",
    "profile_deviance": "deviance: what the sum of squares then has more than at the estimate",
    "loss": "loss: as it was observed",
    "fitted": "fitted loss: at the estimate, with what the rest of an unknown draw does on average",
    "uncertainty": "standard deviation of the log loss: the error, and what the rest of an unknown draw adds",
    "used": "whether the loss was fitted",
    "size": "size of the start along the task: alpha times a number of the chi distribution",
    "size_error": "relative standard error of the size",
    "other_estimate": "another answer: of the parameter, where the sum of squares has another minimum, nearly as small",
    "other_deviance": "deviance of another answer: what its sum of squares has more",
    "parameter": "parameter that was fitted",
}


def fit(
    times: ArrayLike,
    losses: ArrayLike,
    problem: Problem,
    *,
    unknown: str | Sequence[str] = (ALPHA, DELTA_W),
    alpha: float = 1e-3,
    rate: float = 1.0,
    init: Init = "gaussian",
    side: str = "A",
    rank: int = 4,
    seed: int | Sequence[int] | None = None,
    error: float | None = None,
    level: float = 0.9,
    flow: Flow | str = "plain",
    solver: str = "Tsit5",
    rtol: float = RTOL,
    progress: bool = True,
) -> xr.Dataset:
    r"""The parameters of runs from their loss curves: least squares in the logarithm of the loss, with intervals.

    **Arguments:**

    - `times`: at least three times, or steps, `(time,)`, from 0 or later.
    - `losses`: at these times, `(time,)`; or `(curve, time)`, runs that differ in their draws alone.
    - `problem`: what was trained, with the values of what is known and first guesses of the rest.
    - `unknown`: what to find, one name or several: "alpha"; "rate", the gradient-flow time of one unit of `times`, the
      learning rate where they are steps; "shift_scale", the shift's largest singular value; and "delta_w", the ratio of
      a `Factorization`'s gains along it, whose product is known. All are positive.
    - `alpha`, `rate`: their values, or the first guesses, which may be wrong by a factor of 100 and of 10.
    - `init`, `side`, `rank`: the start, as for `sweep`.
    - `seed`: of the draws, one for each curve, where they are known. Unknown draws are two numbers a curve, which are
      fitted as well: for "gaussian" starts on an aligned `Factorization` whose shift has rank one.
    - `error`: the relative error of a loss, 0.01 for one per cent; by default as the scatter about the fit tells.
    - `level`: of the intervals.
    - `flow`, `solver`, `rtol`: as for `solve`.
    - `progress`: show progress on standard error.

    A parameter that the curve does not tell has an open interval, or a wide one: `fit_told` says which, and why. An
    interval is about the best answer alone; answers elsewhere that fit nearly as well are told beside it.

    **Returns:** an `xarray.Dataset` with `estimate`, `low` and `high` over `parameter`; `covariance` of the logarithms
    over `parameter` and `other`; `profile_value` and `profile_deviance` over `parameter` and `point`; `loss`, `fitted`,
    `uncertainty` and `used` over `curve` and `time`; for unknown draws `size` and `size_error` over `curve` and
    `layer`; and where there are other answers `other_estimate` and `other_deviance` over `answer`.

    **Raises:** `InputError` for bad arguments, with the nearest name suggested, and for curves of which too little can
    be used.
    """
    clock, table = check_curves(times, losses)
    require_problem(problem)
    checked(problem)
    require_number("alpha", alpha, "be positive and finite", lambda one: one > 0)
    require_number("rate", rate, "be positive and finite", lambda one: one > 0)
    require_number("level", level, "lie between 0 and 1", lambda one: 0 < one < 1)
    require_number("rtol", rtol, "lie between 0 and 1", lambda one: 0 < one < 1)
    if error is not None:
        require_number("error", error, "be positive and finite", lambda one: one > 0)
    require_choice("side", side, SIDES)
    require_choice("solver", solver, SOLVERS)
    require_flag("progress", progress)
    require_integer("rank", rank, "be at least 1", 1)
    values = {ALPHA: float(alpha), RATE: float(rate), **own_values(problem)}
    names = _names(unknown)
    for name in names:
        require_choice("unknown", name, values, f"for this {kind_of(problem)}")
    driven, scheme = as_flow(flow), as_scheme(init)
    require(not scheme.offset, "init", "leave the frozen weights as they are, for a fit", f"'{scheme.name}'")
    starts = [initialize(scheme, jax.random.key(i), problem, rank=rank, alpha=alpha, side=side) for i in (0, 1)]
    is_drawn = not all(np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, starts), strict=True))
    of_draws = _seeds(seed, len(table))
    if of_draws is None and is_drawn:
        why = why_not_along(problem, scheme, driven)
        require(not why, "seed", f"be given, for {why} is more than two numbers", None)
    elif of_draws is None:
        of_draws = np.zeros(len(table), int)
    draws = "none" if not is_drawn else "unknown" if of_draws is None else "known"
    taken: Any = problem if of_draws is not None else along_task(problem)  # type: ignore[arg-type]
    coordinates = taken.coordinates if of_draws is not None else Coordinates
    model = Model(
        taken,
        coordinates.of([taken], rank=rank if of_draws is not None else 1)[0],
        {name: jnp.asarray(values[name]) for name in (SHIFT_SCALE, DELTA_W) if name in values},
        {name: jnp.asarray(value) for name, value in values.items()},
        names,
        scheme,
        side,
        rank,
        None if of_draws is None else jnp.asarray(of_draws),
        driven,
        solver,
        float(rtol),
    )
    rounds = ROUNDS if draws == "unknown" else 2
    with Progress(rounds + 2, "stages", shown=progress) as bar:
        search = Search(model, problem, clock, table, error, bar)
        best = search.best(rounds)
        found: Any = None
        for better in (*[0.1] * BETTER, np.inf):
            found = search.intervals(best, float(level), better)
            if not isinstance(found, Better):
                break
            best = search.again(best, found.point)
        bar.update()
    told = {"level": float(level), "error": best.error, "error_given": int(error is not None), "draws": draws}
    told |= {"rank": rank, "problem": str(problem), "deviance": best.cost, "init": scheme.name}
    return _labelled(model, best, found, search.others(best, found), search.fitted(best), clock, table, told)


def _names(unknown: Any) -> tuple[str, ...]:
    listed = [unknown] if isinstance(unknown, str) else unknown
    flat = isinstance(listed, (list, tuple)) and all(isinstance(one, str) for one in listed)
    require(flat, "unknown", "be a name, or a list of names", kind(unknown))
    require(len(listed) > 0, "unknown", "name at least one parameter", "none")
    require(len(set(listed)) == len(listed), "unknown", "name each parameter once", list(listed))
    return tuple(listed)


def _seeds(seeds: Any, count: int) -> np.ndarray | None:
    if seeds is None:
        return None
    listed = list(seeds) if isinstance(seeds, (list, tuple, np.ndarray)) else [seeds]
    must = f"be one for each of the {count} curves" if count > 1 else "be the seed of the curve's draw"
    require(len(listed) == count, "seed", must, kind(seeds))
    for one in listed:
        require_integer("seed", one, "be at least 0", 0)
    return np.asarray(listed, int)


def _labelled(
    model: Model,
    best: Best,
    found: list[Profile],
    others: tuple[np.ndarray, np.ndarray],
    fitted: np.ndarray,
    clock: np.ndarray,
    losses: np.ndarray,
    told: dict[str, Any],
) -> xr.Dataset:
    names, count = list(model.unknown), len(model.unknown)
    longest = max(len(one.values) for one in found)

    def padded(values: list[np.ndarray]) -> np.ndarray:
        return np.stack([np.pad(one, (0, longest - one.size), constant_values=np.nan) for one in values])

    spread = covariance(best.jacobian)
    over = ("curve", "time")
    variables: dict[str, Any] = {
        "estimate": ("parameter", np.exp(best.point[:count])),
        "low": ("parameter", np.exp([one.low for one in found])),
        "high": ("parameter", np.exp([one.high for one in found])),
        "covariance": (("parameter", "other"), spread[:count, :count]),
        "profile_value": (("parameter", "point"), np.exp(padded([one.values for one in found]))),
        "profile_deviance": (("parameter", "point"), padded([one.deviances for one in found])),
        "loss": (over, losses),
        "fitted": (over, fitted),
        "uncertainty": (over, uncertainties(best)),
        "used": (over, best.used.astype(np.int8)),
    }
    if len(others[0]):
        variables["other_estimate"] = ("answer", "parameter"), np.exp(others[0])
        variables["other_deviance"] = "answer", others[1]
    if model.seeds is None:
        variables["size"] = ("curve", "layer"), np.asarray(model.sizes(jnp.asarray(best.point)))
        variables["size_error"] = ("curve", "layer"), np.sqrt(np.diag(spread)[count:]).reshape(-1, 2)
    coords: dict[str, Any] = {"parameter": names, "other": names, "time": clock}
    dataset = xr.Dataset(variables, coords=coords | ({"layer": [1, 2]} if "size" in variables else {}), attrs=told)
    for name, about in _ABOUT.items():
        if name in dataset.variables:
            explain(dataset[name], about)
    return dataset
