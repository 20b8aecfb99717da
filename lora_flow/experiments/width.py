"""The effect of width on linear networks: where they end, and how well conditioned they begin.

The implicit bias of Min et al. 2021 (arXiv 2105.06351), and Figure 4 of Xu et al. 2025 (arXiv 2505.11664).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array

from lora_flow.adapter import Adapter, Adapters
from lora_flow.coordinates.narrow import Narrow, narrow
from lora_flow.dynamics.solve import STATUS, solve
from lora_flow.experiments.base import Experiment, Progress
from lora_flow.figures.style import BLUE, ORANGE, band, letters, panels, shades
from lora_flow.initialization import gaussian_wide_init, invariant_init
from lora_flow.problems.network import LinearNetwork
from lora_flow.results.levels import spread
from lora_flow.results.report import table
from lora_flow.runtime.compiling import compiled
from lora_flow.theory import linear_flow as flow
from lora_flow.theory import linear_local as local
from lora_flow.theory import linear_networks as networks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POWERS = (0.5, 0.375)  # p of entries N(0, h^{-2p}); the experiment of Min et al. 2021 has 1/2
CONDITION_POWERS = (0.275, 0.375, 0.475)
NOISE, END = 0.01, 80.0
FAILURE = 0.05  # the probability with which Theorem 2 may fail
PUBLISHED_UP_TO = 2000  # of Figure 4 of Xu et al. 2025


class Sizes(NamedTuple):
    """The sizes of both experiments."""

    samples: int = 100
    inputs: int = 400
    widths: tuple[int, ...] = (500, 1000, 2000, 5000, 10000)
    side: int = 10  # n = m of the second
    condition_widths: tuple[int, ...] = (500, 700, 1000, 1400, 2000, 4000, 8000, 16000)


FULL = Sizes()


def run(seeds: int, progress: Progress, sizes: Sizes = FULL) -> xr.Dataset:
    """Distances of the flow's end from the solution of least norm, and condition numbers at the start, over widths."""
    ends, starts = [], []
    for seed in progress(range(seeds)):
        ends.append(_ends(seed, sizes))
        starts.append(_conditions(seed, sizes))
    dims, condition_dims = ("seed", "p", "width"), ("seed", "condition_p", "condition_width")
    distance, invariant, theorem2 = map(np.array, zip(*ends, strict=True))
    ratio, b2 = np.moveaxis(np.array(starts), -1, 0)
    return xr.Dataset(
        {
            "distance": (dims, distance),
            "invariant": (("seed", "width"), invariant),
            "theorem2": (dims, theorem2),
            "ratio": (condition_dims, ratio),
            "b2": (condition_dims, b2),
        },
        coords={
            "seed": range(seeds),
            "p": list(POWERS),
            "width": list(sizes.widths),
            "condition_p": list(CONDITION_POWERS),
            "condition_width": list(sizes.condition_widths),
        },
        attrs={"samples": sizes.samples, "inputs": sizes.inputs, "side": sizes.side},
    )


def exponents(values: xr.DataArray, dim: str) -> xr.DataArray:
    """q of `values ~ h^q`, by least squares over the widths of `dim`."""
    x, y = np.log(values[dim]), np.log(values)
    dx = x - x.mean()
    return (dx * y).sum(dim) / (dx**2).sum()


def _ends(seed: int, sizes: Sizes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """||U V^T(inf) - X^+ Y|| over (p, width), from the invariant start over widths, and Theorem 2's bound of it."""
    rng, n = np.random.default_rng(seed), sizes.inputs
    x, theta = rng.standard_normal((sizes.samples, n)) / np.sqrt(n), rng.standard_normal((n, 1)) / np.sqrt(n)
    y = x @ theta + NOISE * rng.standard_normal((sizes.samples, 1))
    problem, key = LinearNetwork(y, x), jax.random.key(seed)
    x_seen, y_seen, _, _ = problem.network(gaussian_wide_init(key, problem, rank=1, alpha=1.0))
    distance_from = functools.partial(_distance, problem, LinearNetwork(y_seen, x_seen))
    distance, invariant = np.empty((len(POWERS), len(sizes.widths))), np.empty(len(sizes.widths))
    for j, h in enumerate(sizes.widths):
        for i, p in enumerate(POWERS):
            distance[i, j] = distance_from(gaussian_wide_init(key, problem, rank=h, alpha=1.0, p=p))
        invariant[j] = distance_from(invariant_init(key, problem, rank=h, alpha=h**-0.5))
    s, size, widths = np.linalg.svd(x, compute_uv=False) ** 2, float(np.linalg.norm(y)), np.array(sizes.widths, float)
    bounds = [np.asarray(flow.width_bound(widths, p, s, size, n, 1, FAILURE)) for p in POWERS]
    return distance, invariant, np.array(bounds)


def _distance(problem: LinearNetwork, seen: LinearNetwork, start: Adapters) -> float:
    """||U V^T - X^+ Y|| of one output at the end of the flow.

    Only U_1 and V move, within the hidden directions that they span at the start. So the flow of the `seen` part of the
    problem is solved in a frame of these directions, and U_2 is added in this frame at the end.
    """
    (((whole, _),), (_, _, u1, w2)) = start, problem.network(start)
    (coordinates,) = Narrow.of([seen], rank=len(whole))
    (begun,), (frame,) = coordinates.enter((Adapter(jnp.asarray(u1.T), jnp.asarray(w2.T)),))
    status, ((a, b),) = _solve(seen, (begun,))
    if status != 0:
        raise RuntimeError(f"the flow from one of the starts ended with status {STATUS[int(status)]!r}")
    moved = (a - begun.a).T if problem.basis is None else problem.basis @ (a - begun.a).T
    return float(jnp.linalg.norm((whole.T @ frame + moved) @ b.T - problem.solution))


@compiled(quickly=True)
def _solve(problem: LinearNetwork, start: Adapters) -> tuple[Array, Adapters]:
    """Status and end, by Tsit5, because nothing here is stiff."""
    solved = solve(problem, start, t1=END, saves=2, solver="Tsit5", rtol=1e-6, derivatives="forward")
    return solved.status, solved.adapters


def _conditions(seed: int, sizes: Sizes) -> np.ndarray:
    """a1/a2 and b2 of Xu et al. 2025 over (p, width, 2): X orthogonal, ||W*||_F = 1, the weights N(0, h^{-2p})."""
    rng, n = np.random.default_rng(seed), sizes.side
    x, solution = np.linalg.qr(rng.standard_normal((n, n)))[0], rng.standard_normal((n, n))
    solution /= np.linalg.norm(solution)
    problem, values = LinearNetwork(x @ solution, x), []
    for p in CONDITION_POWERS:
        for h in sizes.condition_widths:
            start = narrow(gaussian_wide_init(jax.random.key(seed), problem, rank=h, alpha=1.0, p=p))
            values.append(_condition(problem, start))
    return np.array(values).reshape(len(CONDITION_POWERS), len(sizes.condition_widths), 2)


@compiled(quickly=True)
def _condition(problem: LinearNetwork, start: Adapters) -> tuple[Array, Array]:
    x, _, w1, w2 = problem.network(start)
    constants = local.constants(networks.curvature(x), problem.loss(start), problem.optimum, w1, w2)
    return constants.a1 / constants.a2, constants.b2


def draw(dataset: xr.Dataset) -> Figure:
    with panels(1, 2, height=3.2) as (figure, axes):
        _draw_ends(dataset, axes[0, 0])
        _draw_conditions(dataset, axes[0, 1])
        letters(axes)
    return figure


def _draw_ends(dataset: xr.Dataset, ax: Any) -> None:
    for p, colour in zip(dataset["p"].values, (BLUE, ORANGE), strict=True):
        one = dataset["distance"].sel(p=p)
        label = rf"p = {p:g}: {_slope(one, 'width')}, Theorem 2: {0.5 - 2 * p:.2f}"
        _draw_over_widths(ax, one, "width", colour, label, 0.5 - 2 * p)
    largest, bounds = float(dataset["invariant"].max()), dataset["theorem2"].median("seed")
    beyond = f"not shown: the start 'invariant', {largest:.0e} or less (rounding);\n"
    beyond += f"Theorem 2's bounds, from {float(bounds.min()):.0f} to {float(bounds.max()):.0f}"
    ax.annotate(beyond, (0.03, 0.97), xycoords="axes fraction", va="top", fontsize=6.5, color="0.3")
    ax.set(title=r"End of the flow from weights N(0, $h^{-2p}$)", ylabel=r"$\|U V^T(\infty) - X^+ Y\|$")
    _room(ax, dataset["distance"], below=6.0, above=3.0)
    ax.legend(loc="lower left", title="exponent of h (dotted: the theorem's)", alignment="left")


def _draw_conditions(dataset: xr.Dataset, ax: Any) -> None:
    for p, colour in zip(dataset["condition_p"].values, shades(dataset.sizes["condition_p"]), strict=True):
        one = 1 - dataset["ratio"].sel(condition_p=p)
        label = rf"p = {p:g}: {_slope(_published(one), 'condition_width')}, Theorem 3.3: {2 * p - 1:.2f}"
        _draw_over_widths(ax, one, "condition_width", colour, label, 2 * p - 1)
    ax.axvline(PUBLISHED_UP_TO, 0.3, color="0.75", linewidth=0.8, zorder=0)
    note = f"fitted up to h = {PUBLISHED_UP_TO}"
    ax.annotate(
        note, (PUBLISHED_UP_TO, 1.0), (-3, -2), ("data", "axes fraction"), "offset points", ha="right", va="top"
    )
    ax.texts[-1].set(fontsize=6.5, color="0.3")
    ax.set(title=r"Condition of such weights", ylabel=r"$1 - a_1/a_2$")
    _room(ax, 1 - dataset["ratio"], below=3.0, above=1.25)
    ax.legend(loc="lower left", title="exponent of h (dotted: the theorem's)", alignment="left")


def _draw_over_widths(ax: Any, values: xr.DataArray, dim: str, colour: Any, label: str, exponent: float) -> None:
    """Medians and the full range over seeds, and the power law of the theorem from the first median on."""
    h, first = values[dim].values, float(values.isel({dim: 0}).median())
    band(values, ax, spread="range", marker="o", ms=3, color=colour, label=label)
    ax.plot(h, first * (h / h[0]) ** exponent, color=colour, linestyle=":", linewidth=1)
    ax.set(xscale="log", yscale="log", xlabel="hidden width h")
    ax.autoscale(axis="x")  # with room for the markers
    shown = [500, 1000, 2000, 5000, 10000]
    ax.set_xticks(shown, [str(one) for one in shown])
    ax.minorticks_off()


def _room(ax: Any, values: xr.DataArray, below: float, above: float) -> None:
    """Space for the text below and above the values, and ticks without powers of ten."""
    low, high = float(values.min()) / below, float(values.max()) * above
    ticks = [tick for tick in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0) if low <= tick <= high]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_ylim(low, high)


def notes(dataset: xr.Dataset) -> str:
    first, last = (int(dataset["width"][i]) for i in (0, -1))
    ends = []
    for p in dataset["p"].values:
        one, bound = dataset["distance"].sel(p=p), dataset["theorem2"].sel(p=p)
        distances, bounds = ([float(values.isel(width=i).median()) for i in (0, -1)] for values in (one, bound))
        shown = [f"{value:.3g}" for value in distances] + [f"{value:.0f}" for value in bounds]
        ends.append([f"{p:g}", f"{0.5 - 2 * p:.2f}", _slope(one, "width"), *shown])
    header = ["p", "Theorem 2's exponent", "exponent here", f"distance at h = {first}", f"at h = {last}"]
    header += [f"Theorem 2's bound at h = {first}", f"at h = {last}"]
    sizes, draws = dataset.attrs, dataset.sizes["seed"]
    invariant = float(dataset["invariant"].max())
    return (
        f"Medians of {draws} draws; exponents of h: means and standard deviations. First, the distance of the flow's "
        f"end from X^+ Y, {sizes['samples']} samples of {sizes['inputs']} inputs, all N(0, 1/{sizes['inputs']}), "
        f"one output, weights N(0, h^(-2p)); Min et al. 2021 have p = 1/2.\n\n{table(header, ends)}\n\n"
        f"From the start `invariant` it is {invariant:.1g} or less, which is rounding. Theorem 2's bound (probability "
        f"{1 - FAILURE:g}) has the exponent that is found, and a constant that puts it off the picture.\n\n"
        f"{_condition_notes(dataset)}"
    )


def _condition_notes(dataset: xr.Dataset) -> str:
    widths = dataset["condition_width"].values
    published, later = widths[widths <= PUBLISHED_UP_TO], widths[widths >= 2 * PUBLISHED_UP_TO]
    header = ["p", "Theorem 3.3's 2p - 1", f"exponent, h = {published[0]} to {published[-1]}"]
    header += [f"h = {later[0]} to {later[-1]}"] if len(later) > 1 else []
    header += ["max(-1/2, 4p - 2)", *(f"a2/a1 at h = {h}" for h in (published[0], published[-1]))]
    header += [f"b2/h^(1-2p) at h = {published[0]}"]
    rows = []
    for p in dataset["condition_p"].values:
        one = dataset.sel(condition_p=p)
        fits = [_slope((1 - one["ratio"]).sel(condition_width=h), "condition_width") for h in (published, later)]
        inverse = (1 / one["ratio"]).median("seed")
        conditions = [f"{float(inverse.sel(condition_width=h)):.2f}" for h in (published[0], published[-1])]
        small = float(one["b2"].median("seed")[0]) / published[0] ** (1 - 2 * p)
        rows.append(
            [
                f"{p:g}",
                f"{2 * p - 1:.2f}",
                *fits[: 1 + (len(later) > 1)],
                f"{max(-0.5, 4 * p - 2):.2f}",
                *conditions,
                f"{small:.2f}",
            ]
        )
    side = dataset.attrs["side"]
    return (
        f"The condition number a2/a1 of Theorem E.1 of Xu et al. 2025 at the start, shown in their Figure 4 up to h = "
        f"{PUBLISHED_UP_TO}: X orthogonal {side} x {side}, ||W*||_F = 1. The exponent is that of 1 - a1/a2.\n\n"
        f"{table(header, rows)}\n\n"
        "Theorem 3.3 is an upper bound for h going to infinity, 1 - a1/a2 = O(h^(2p-1)). Two quantities decide: the "
        "spread of the weights' singular values, of order h^(-1/2), and b2^2 relative to the squared level of the "
        "imbalance, of order h^(4p-2) (derived here). So p = .275 reaches the theorem's exponent only beyond the "
        "figure's widths, and the others fall faster than the theorem says. Smaller p is better conditioned at every "
        "width, which agrees with the theorem and contradicts the text on Figure 4."
    )


def _published(values: xr.DataArray) -> xr.DataArray:
    """At the widths of Figure 4 of Xu et al. 2025."""
    return values.sel(condition_width=slice(None, PUBLISHED_UP_TO))


def _slope(values: xr.DataArray, dim: str) -> str:
    return spread(exponents(values, dim))


MEANINGS = {
    "distance": "||U V^T - X^+ Y|| at the end of the flow, from Gaussian weights",
    "invariant": "||U V^T - X^+ Y|| at the end of the flow, from the start 'invariant'",
    "theorem2": f"bound of the distance, Theorem 2 of Min et al. 2021: with probability {1 - FAILURE:g}",
    "ratio": "a1/a2 at the start, of Theorem E.1 of Xu et al. 2025",
    "b2": "b2 at the start, of Theorem E.1 of Xu et al. 2025",
    "seed": "seed of the draw",
    "p": "power of the width: weights N(0, h^(-2p)), of the distances",
    "width": "hidden width h, of the distances",
    "condition_p": "power of the width: weights N(0, h^(-2p)), of the conditions",
    "condition_width": "hidden width h, of the conditions",
}

EXPERIMENT = Experiment.of_one(
    "how far wide linear networks end from the solution of least norm, and how well conditioned they begin",
    run,
    draw,
    notes,
    seeds=5,
    meanings=MEANINGS,
)
