"""The runs on Xu et al.'s problem that several claims share, each made once, and what is read from them.

The problem is 10 x 10, h = 100, sigma = 5, a rank-one shift along the top pair, r = 4. Time is counted as
tau = sigma s t, with s the larger of the two weights' gains along the shift, so that problems with different delta_w
share one axis; so are rates, in units of sigma s.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import xarray as xr

from lora_flow.dynamics.lanes import require_finished, solve_lanes, stack
from lora_flow.dynamics.solve import Trajectory
from lora_flow.initialization import initialize
from lora_flow.problems.factorization import Factorization
from lora_flow.recipes.aligned import aligned_problem
from lora_flow.results.phases import phases
from lora_flow.sweeps.sweep import sweep
from lora_flow.theory import gradient_flow as theory

PAPER = "Xu et al."
DELTA_W = (1 / 1.05**2, 1 / 4, 1 / 100)
SIDES = ("A", "B")
ALPHAS = tuple(10.0 ** -np.arange(3.0, 6.5, 0.5))
TINY_ALPHAS = (1e-10, 1e-12, 1e-14, 1e-16, 1e-18)
RANK = 4
TAU = np.concatenate([np.linspace(0, 40, 161), np.geomspace(40, 100, 21)[1:]])

GAUSSIAN = "gaussian, alpha = 1e-3 to 1e-6, both sides, to tau = 100"
TINY = "gaussian, alpha = 1e-10 to 1e-18, both sides"


@functools.cache
def problem(delta_w: float) -> Factorization:
    return aligned_problem(jax.random.key(0), delta_w=delta_w)


@functools.cache
def gains(delta_w: float) -> theory.Gains:
    return theory.gains(problem(delta_w))


@functools.cache
def gaussian(seeds: int) -> xr.Dataset:
    """Both sides, alpha from 1e-3 to 1e-6, to tau = 100."""
    return _sweeps(ALPHAS, TAU, seeds)


@functools.cache
def tiny(seeds: int) -> xr.Dataset:
    """Both sides, alpha from 1e-10 to 1e-18, where That1 is well above 0; to tau = 17, with details."""
    return _sweeps(TINY_ALPHAS, np.linspace(0, 17, 86), seeds, details=True)


@functools.cache
def t1(seeds: int) -> xr.DataArray:
    """T1 of every run of `gaussian`, in tau."""
    return phases(gaussian(seeds))["t1"]


def precise(
    delta_w: float, init: str, side: str, alphas: tuple[float, ...], tau: np.ndarray, seeds: int, *keep: str
) -> Trajectory:
    """Trajectories with their adapters at rtol = 1e-10, leading axes (alpha, seed), and the observables to keep."""
    one = functools.partial(initialize, init, problem=problem(delta_w), rank=RANK, side=side)
    starts = stack([stack([one(jax.random.key(seed), alpha=alpha) for seed in range(seeds)]) for alpha in alphas])
    times = tau / gains(delta_w).rate
    how: dict[str, Any] = {"solver": "Dopri8", "rtol": 1e-10, "save_adapters": True, "throw": True}
    return solve_lanes(problem(delta_w), starts, times, keep=keep, **how)


def _sweeps(alphas: tuple[float, ...], tau: np.ndarray, seeds: int, details: bool = False) -> xr.Dataset:
    parts = []
    for delta_w in DELTA_W:
        rate = gains(delta_w).rate
        swept = sweep(
            problem(delta_w),
            side=SIDES,
            alpha=alphas,
            rank=RANK,
            seeds=seeds,
            t1=tau[-1] / rate,
            saves=tau / rate,
            details=details,
        )
        require_finished(swept["status"])
        parts.append(swept.assign_coords(time=tau).expand_dims(delta_w=[delta_w]).squeeze(["init", "rank"]))
    names = ("sigma", "sigma_w1", "sigma_w2", "shift_rank", "aligned")
    with xr.set_options(use_new_combine_kwarg_defaults=True):
        joined = xr.concat([part.drop_vars(names) for part in parts], "delta_w", combine_attrs="drop_conflicts")
    return joined.assign_coords({name: ("delta_w", [float(part[name]) for part in parts]) for name in names})


def each_setting(dataset: xr.Dataset) -> Iterator[tuple[str, theory.Gains, xr.Dataset]]:
    """Every delta_w and side: what to call it, its gains and its runs."""
    for delta_w in DELTA_W:
        for side in SIDES:
            yield case_name(delta_w, side), gains(delta_w), dataset.sel(delta_w=delta_w, side=side)


def t1_of(part: xr.Dataset, seeds: int) -> xr.DataArray:
    """T1 of the runs of one setting of `gaussian`."""
    return t1(seeds).sel(delta_w=part["delta_w"], side=part["side"])


def case_name(delta_w: float, side: str | None = None, alpha: float | None = None) -> str:
    parts = [f"delta_w = {delta_w:.3g}"]
    return ", ".join(parts + ([f"side {side}"] if side else []) + ([f"alpha = {alpha:.3g}"] if alpha else []))


def slope(values: xr.DataArray, over: xr.DataArray) -> xr.DataArray:
    """d log(values) / d log(over) by least squares over alpha, seed by seed; NaN where a value is missing."""
    x, y = log(over), log(values)
    x, y = x - x.mean("alpha", skipna=False), y - y.mean("alpha", skipna=False)
    return (x * y).sum("alpha", skipna=False) / (x**2).sum("alpha", skipna=False)


def log(values: Any) -> Any:
    return xr.apply_ufunc(np.log, values)


def sine2(error: xr.DataArray) -> xr.DataArray:
    """1 - cos^2 from 1 - cos."""
    return error * (2 - error)


def frobenius2(dataset: xr.Dataset, layer: int) -> xr.DataArray:
    """||Z_i||_F^2."""
    return dataset[f"norm_along{layer}"] ** 2 + dataset[f"norm_across{layer}"] ** 2
