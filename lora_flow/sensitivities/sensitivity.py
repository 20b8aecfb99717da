"""`sensitivity`: a grid of runs in, and out how much each of their quantities depends on each parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import ArrayLike

from lora_flow.adapter import Adapters, pad
from lora_flow.checks import kind, require, require_choice, require_flag, require_integer, require_number
from lora_flow.dynamics.flows import Flow, as_flow
from lora_flow.dynamics.integrator import MAX_STEPS, SOLVERS
from lora_flow.dynamics.solve import save_times
from lora_flow.initialization import Init
from lora_flow.problems.base import Problem
from lora_flow.results.phases import crossing
from lora_flow.runtime.progress import each
from lora_flow.sensitivities.lanes import Method, backward, curves, forward, starts
from lora_flow.sensitivities.parameters import ALPHA, Family, Parameters, find_parameters
from lora_flow.sensitivities.quantities import Quantity, Setting, quantities
from lora_flow.sweeps.grid import Grid, Problems
from lora_flow.sweeps.schema import LANE_DIMS, explain, label

RTOL = 2e-4  # at which derivatives are right to a part in a thousand
BATCH = 16  # lanes that are solved together
LOOKED_AT = 201  # times in each of two spacings, between which a time is sought

_ABOUT = {
    "value": "the quantity itself: log10 of a loss or an alignment error, or a time",
    "derivative": "derivative of the quantity: by the parameter",
    "elasticity": "elasticity: per cent by which loss, error or time change for one per cent of the parameter",
    "slope": "derivative by time: of a quantity that is a time, of the logarithm of what is reached then",
    "at": "the time at which the quantity is taken: of one that is a time, this time",
    "observable": "quantity that is differentiated",
    "parameter": "parameter that it is differentiated by",
    "parameter_value": "value of the parameter: NaN for alpha, which is a dimension",
}


def sensitivity(
    problem: Problem | Family,
    *,
    with_respect_to: str | Sequence[str] = ALPHA,
    observable: str | Sequence[str] = "log10 loss",
    at: float | None = None,
    parameters: Mapping[str, float] | None = None,
    init: Init | Sequence[Init] = "gaussian",
    side: str | Sequence[str] = "A",
    alpha: float | ArrayLike | Sequence[float] = 1e-3,
    rank: int | ArrayLike | Sequence[int] = 4,
    seeds: int | ArrayLike | Sequence[int] = 1,
    t1: float,
    flow: Flow | str = "plain",
    solver: str = "auto",
    rtol: float = RTOL,
    max_steps: int = MAX_STEPS,
    progress: bool = True,
) -> xr.Dataset:
    r"""How much what a run ends with depends on what it begins with, for every combination of a grid.

    The derivatives are those of the steps that the solver takes, as JAX has them: none is a difference of runs.

    **Arguments:**

    - `problem`: one that derives from `AbstractProblem`, or a function of continuous parameters that makes one in
      `jax.numpy`, `lambda delta_w: aligned_problem(key, delta_w=delta_w)` for instance.
    - `with_respect_to`: one name or several. "alpha", the initialisation's scale; "shift_scale", a factor on the whole
      shift; a parameter of the function; a number of the problem, such as "scaling"; or an array of the problem, such
      as "w1" or "shift", each entry of which is then a parameter.
    - `observable`: one name or several. At the time `at`: "log10 loss", or "log10 alignment_error" of the layer that
      aligns first. Times: "time to 1e-6", at which the loss has come down to a level, and "t_align" and "t1", which
      `phases` defines.
    - `at`: the time of the first two, `t1` by default.
    - `parameters`: the values of the function's parameters at which the derivatives are taken.
    - `init`, `side`, `alpha`, `rank`, `seeds`: the axes, as for `sweep`. Initialisations that change the frozen weights
      are refused.
    - `t1`, `flow`, `solver`, `rtol`, `max_steps`: as for `solve`; times are sought up to `t1`. At the default tolerance
      derivatives are right to about a part in a thousand, see docs/derivatives.md.
    - `progress`: show progress on standard error.

    A time T at which c(T) = 0 changes by implicit differentiation, dT/dp = -(dc/dp)/(dc/dt). Starts follow the problem,
    except where an array is taken whole: the starts then stay as they are.

    **Returns:** an `xarray.Dataset` with dims `observable, parameter, init, side, alpha, rank, seed`. `value`, `at`
    (the time) and `slope` (the derivative by time) have no parameter. `derivative` is that of the value by the
    parameter, and `elasticity` the per cent of the loss, error or time for one per cent of the parameter. For an array
    "w1" of the problem there is `by_w1`, over the observables, the lanes and the array's own dims. A time that a lane
    does not reach is infinite, and its derivatives are NaN. So are those of a loss at rounding, and of a lane that
    fails.

    **Raises:** `InputError` for bad arguments, with the nearest name suggested.
    """
    require_number("t1", t1, "be positive and finite", lambda end: end > 0)
    taken = t1 if at is None else at
    require_number("at", taken, f"be a time after 0 and up to t1 = {t1:g}", lambda time: 0 < time <= t1)
    require_number("rtol", rtol, "lie between 0 and 1", lambda tolerance: 0 < tolerance < 1)
    require_flag("progress", progress)
    require_choice("solver", solver, SOLVERS)
    require_integer("max_steps", max_steps, "be at least 1", 1)
    moved = find_parameters(
        problem, {} if parameters is None else parameters, _names("with_respect_to", with_respect_to)
    )
    looked_at = quantities(_names("observable", observable), moved.problem)
    driven = as_flow(flow)
    grid = Grid.of(Problems.of(moved.problem), init=init, side=side, alpha=alpha, rank=rank, seeds=seeds)
    offset = [name for name, scheme in grid.schemes.items() if scheme.offset]
    require(not offset, "init", "leave the frozen weights as they are, for derivatives", ", ".join(offset))
    grid.check_starts(Problems.of(moved.problem), driven)
    method = Method(Setting.of(moved.problem), looked_at, driven, solver, float(rtol), max_steps)
    found = [_solved(method, moved, batch, float(taken), float(t1)) for batch in _batches(grid, moved, progress)]
    joined = {name: np.concatenate([one[name] for one in found])[: grid.size] for name in found[0]}
    return _labelled(joined, grid, moved, looked_at, float(t1))


def _names(name: str, given: Any) -> list[str]:
    listed = [given] if isinstance(given, str) else given
    flat = isinstance(listed, (list, tuple)) and all(isinstance(one, str) for one in listed)
    require(flat, name, "be a name, or a list of names", kind(given))
    return list(listed)


def _batches(grid: Grid, moved: Parameters, progress: bool) -> Iterator[tuple[Adapters, Adapters]]:
    """The starts of `BATCH` lanes at a time, in the grid's order and padded to one rank, with their derivatives."""
    drawn: list[Any] = []
    for name in grid.init:
        for side in grid.side:
            alphas, seeds = (one.ravel() for one in np.meshgrid(grid.alpha, list(grid.seed), indexing="ij"))
            of_ranks = []
            for rank in grid.rank:
                made = starts(
                    grid.schemes[name],
                    side,
                    rank,
                    moved.problem,
                    jnp.asarray(alphas),
                    jnp.asarray(seeds),
                    moved.pushed,
                    moved.alpha_pushed,
                )
                shape = len(grid.alpha), len(grid.seed)
                of_ranks.append(
                    jax.tree.map(
                        lambda leaf, shape=shape: np.reshape(leaf, (*shape, *leaf.shape[1:])),
                        [pad(one, max(grid.rank)) for one in made],
                    )
                )
            drawn.append(jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *of_ranks))
    count = len(grid.alpha) * len(grid.rank) * len(grid.seed)
    lanes = jax.tree.map(lambda *leaves: np.concatenate([one.reshape(count, *one.shape[3:]) for one in leaves]), *drawn)
    firsts = range(0, grid.size, BATCH)
    for first in each(firsts, "batches") if progress else firsts:
        places = np.minimum(np.arange(first, first + min(BATCH, grid.size)), grid.size - 1)
        yield jax.tree.map(lambda leaf, places=places: leaf[places], tuple(lanes))


def _solved(
    method: Method, moved: Parameters, batch: tuple[Adapters, Adapters], at: float, t1: float
) -> dict[str, np.ndarray]:
    """The numbers of a batch of lanes, each with a leading axis of lanes."""
    start, pushed = batch
    times = np.full((len(start[0].a), len(method.quantities)), at)
    reached = np.ones(times.shape, bool)
    seeks = any(one.is_time for one in method.quantities)
    if seeks:
        sought = _sought(method, moved, start, t1)
        of_times = np.array([one.is_time for one in method.quantities])
        reached = np.where(of_times[None], np.isfinite(sought), reached)
        times = np.where(of_times[None] & reached, sought, times)

    def run(times: np.ndarray) -> Iterator[np.ndarray]:
        return map(np.asarray, forward(method, moved.problem, start, jnp.asarray(times), moved.pushed, pushed))

    values, derivatives, slopes, status, floor = run(times)
    if seeks:  # once more at the times that a step of Newton's gives
        with np.errstate(invalid="ignore", divide="ignore"):
            better = np.where(of_times[None] & reached, np.clip(times - values / slopes, 0.5 * times, t1), times)
        times = np.where(np.isfinite(better), better, times)
        values, derivatives, slopes, status, floor = run(times)
        with np.errstate(invalid="ignore", divide="ignore"):
            implicit = -derivatives / slopes[:, None]
        derivatives = np.where(of_times[None, None], implicit, derivatives)
        values = np.where(of_times[None], np.where(reached, times, np.inf), values)
    ended = (status == 0)[:, None]
    known = ended & reached & ~_at_rounding(method, values, floor)
    found = {
        "value": np.where(ended, values, np.nan),
        "at": np.where(reached, times, np.inf),
        "slope": np.where(known, slopes, np.nan),
        "derivative": np.where(known[:, None], derivatives, np.nan),
        "status": status,
        "rounding_floor": floor,
    }
    if moved.arrays:
        whole = backward(method, moved.arrays, moved.problem, start, jnp.asarray(times))
        for name, one in whole.items():
            shape = (*times.shape, *(1,) * (one.ndim - 2))
            scale = np.where([one.is_time for one in method.quantities], -1 / slopes, 1.0).reshape(shape)
            found[f"by_{name}"] = np.where(known.reshape(shape), np.asarray(one) * scale, np.nan)
    return found


def _at_rounding(method: Method, values: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """Where a loss, or the level that it is to come down to, is at rounding: nothing is then known of derivatives."""
    lost = np.zeros(values.shape, bool)
    for i, quantity in enumerate(method.quantities):
        if quantity.level is not None:
            lost[:, i] = quantity.level < floor
        elif quantity.name == "log10 loss":
            lost[:, i] = values[:, i] < np.log10(floor)
    return lost


def _sought(method: Method, moved: Parameters, start: Adapters, t1: float) -> np.ndarray:
    """The time at which each quantity first comes to 0, `(lane, quantity)`: between saves, and infinite for never."""
    log, linear = (np.asarray(save_times(t1, LOOKED_AT, spacing)) for spacing in ("log", "linear"))
    times = np.unique(np.concatenate([log, linear]))[1:]
    values = np.exp(np.asarray(curves(method, moved.problem, start, jnp.asarray(times))[0]))
    over = xr.DataArray(values, dims=("lane", "time", "quantity"), coords={"time": times})
    threshold = xr.ones_like(over.isel(time=0, drop=True))
    first = crossing(over, threshold, before=times[0]).transpose("lane", "quantity").values
    return np.asarray(np.where(np.isnan(first), np.inf, first))


def _labelled(
    found: Mapping[str, np.ndarray], grid: Grid, moved: Parameters, looked_at: Sequence[Quantity], t1: float
) -> xr.Dataset:
    lanes = tuple(LANE_DIMS)
    scalars = list(moved.values)

    def over(name: str) -> np.ndarray:
        return np.reshape(found[name], (*grid.shape, *found[name].shape[1:]))

    def first(values: np.ndarray, count: int) -> np.ndarray:
        """The last `count` axes of those after the lanes in front."""
        return np.moveaxis(values, range(len(lanes), len(lanes) + count), range(count))

    variables: dict[str, Any] = {
        name: (("observable", *lanes), first(over(name), 1)) for name in ("value", "at", "slope")
    }
    derivative = np.swapaxes(first(over("derivative"), 2), 0, 1)
    variables["derivative"] = ("observable", "parameter", *lanes), derivative
    variables |= {"status": (lanes, over("status").astype(np.int8)), "rounding_floor": (lanes, over("rounding_floor"))}
    for name in moved.arrays:
        own = tuple(f"{name}_{i}" for i in range(found[f"by_{name}"].ndim - 2))
        variables[f"by_{name}"] = ("observable", *lanes, *own), first(over(f"by_{name}"), 1)
    dataset = xr.Dataset(
        variables,
        coords={
            "observable": [one.name for one in looked_at],
            "parameter": scalars,
            **{dim: list(getattr(grid, dim)) for dim in lanes},
            "parameter_value": ("parameter", [moved.values[name] for name in scalars]),
        },
        attrs={"t1": t1, "problem": str(moved.problem), "layers": np.ravel(moved.problem.layers).tolist()},
    )
    alphas = dataset["alpha"] if ALPHA in scalars else 1.0
    at = dataset["parameter_value"].fillna(0.0) + (dataset["parameter"] == ALPHA) * alphas
    is_time = xr.DataArray([one.is_time for one in looked_at], dims="observable")
    relative = xr.where(is_time, 1 / dataset["value"], np.log(10.0))
    dataset["elasticity"] = (dataset["derivative"] * at * relative).transpose(*dataset["derivative"].dims)
    for name, about in _ABOUT.items():
        if name in dataset.variables:
            explain(dataset[name], about)
    return label(dataset)
