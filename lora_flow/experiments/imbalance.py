"""How imbalance speeds up linear networks: gradient flow against the bounds of Min et al.

Min et al. 2021 is arXiv 2105.06351, and Min et al. 2022 its extension; `lora_flow.theory.linear_flow` has the bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float

from lora_flow.adapter import Adapter, Adapters, pad
from lora_flow.coordinates.narrow import narrow
from lora_flow.dynamics.solve import STATUS, solve
from lora_flow.experiments.base import Experiment, Progress
from lora_flow.figures.style import BLUE, GREEN, ORANGE, PURPLE, Mark, band, keys, letters, panels, shades
from lora_flow.initialization import gaussian_both_init
from lora_flow.problems.network import LinearNetwork
from lora_flow.results.report import table
from lora_flow.runtime.compiling import compiled
from lora_flow.theory import linear_flow as flow
from lora_flow.theory import linear_networks as networks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALPHA, NOISE = 0.1, 0.01
STARTS = {"0.1, 0.1": 1.0, "0.5, 0.02": 25.0, "0.05, 0.2": 0.25}  # sigma_U, sigma_V and their ratio
BALANCED, NEAR = "balanced", "balanced, near"
WIDEST = 1000  # of the published experiment over widths
VARIANCE = 0.1  # of Y's entries, over widths
FLOOR = 1e-16  # of the start's loss: below it the loss is rounding
FOLDS, SAVES = 40.0, 91
EARLIEST = 5e-4  # time after the start's that is kept
SLACK = 1e-6  # of the solver's, relative

Network = tuple[Any, Any, Any, Any]  # X, Y, W1, W2


class Sizes(NamedTuple):
    """The sizes of both experiments."""

    samples: int = 100
    inputs: int = 400
    width: int = 500
    rows: int = 20  # Y of the second
    columns: int = 5
    widths: tuple[int, ...] = (30, 100, 300, 1000, 3000, 10000)


FULL = Sizes()


def run(seeds: int, progress: Progress, sizes: Sizes = FULL) -> xr.Dataset:
    """Losses and their rates, with the bounds, over starts and over widths; times and rates in units of the papers."""
    starts, widths = [], []
    for seed in progress(range(seeds)):
        starts.append([_follow(network) for network in _starts(seed, sizes).values()])
        widths.append([_follow(*_wide(seed, h, sizes)) for h in sizes.widths])
    return xr.Dataset(
        {**_variables(starts, "start", ""), **_variables(widths, "width", "width_")},
        coords={"seed": range(seeds), "start": [*STARTS, BALANCED, NEAR], "width": list(sizes.widths)},
        attrs={name: size for name, size in sizes._asdict().items() if name != "widths"},
    )


def _starts(seed: int, sizes: Sizes) -> dict[str, Network]:
    """The experiment of Min et al. 2021, X X^T = I and one output: Gaussian weights of three ratios, two balanced."""
    rng, n = np.random.default_rng(seed), sizes.inputs
    x = np.linalg.qr(rng.standard_normal((n, sizes.samples)))[0].T
    theta = rng.standard_normal((n, 1)) / np.sqrt(n)
    y = x @ theta + NOISE * rng.standard_normal((sizes.samples, 1))
    problem = LinearNetwork(y, x)
    begun: dict[str, Network] = {}
    for name, ratio in STARTS.items():
        key = jax.random.key(seed)
        ((a, b),) = gaussian_both_init(key, problem, rank=sizes.width, alpha=ALPHA, ratio=ratio)
        begun[name] = x, y, a.T, b.T
    seen = flow.reduce(*begun[next(iter(STARTS))])
    for name, product in {BALANCED: seen.u1 @ seen.w2, NEAR: seen.phi1.T @ theta}.items():
        begun[name] = seen.x, seen.y, *_balanced(product)
    return begun


def _balanced(product: Float[Array, "r m"]) -> tuple[Array, Array]:
    """The control of Min et al. 2021, Lam = 0: U_1 = P (P^T P)^{-1/4} Q^T and V = (P^T P)^{1/4} Q^T for the product P.

    The frame Q only turns the hidden layer; without Q the layer is as wide as P has columns. The weights that the loss
    depends on are balanced. `balanced_init` balances all of U with V; a non-empty part U_2 of U never moves, and then
    Lam = -U_2^T U_2.
    """
    u, s, vt = jnp.linalg.svd(jnp.asarray(product), full_matrices=False)
    return u * jnp.sqrt(s)[None], jnp.sqrt(s)[:, None] * vt


def _wide(seed: int, h: int, sizes: Sizes) -> tuple[Network, float]:
    """Min et al. 2022 over widths, `1/2 ||Y - U V^T/sqrt(m h)||_F^2` with U, V from N(0, 1), and the unit of time.

    With W1 = U/(m h)^{1/4} and W2 = V^T/(m h)^{1/4} that is `1/2 ||Y - W1 W2||_F^2`, and U' = E V/sqrt(m h) becomes
    sqrt(m h) W1' = E W2^T: the flow of W, with its time in units of sqrt(m h).
    """
    rng, n, m = np.random.default_rng(seed), sizes.rows, sizes.columns
    y = np.sqrt(VARIANCE) * rng.standard_normal((n, m))
    ((a, b),) = gaussian_both_init(jax.random.key(seed), LinearNetwork(y), rank=h, alpha=(m * h) ** -0.25)
    return (np.eye(n), y, a.T, b.T), np.sqrt(m * h)


def _follow(network: Network, unit: float = 1.0) -> dict[str, Any]:
    """The flow from a start: loss and rate, their bounds by Min et al., and the drift of Lam; times in that unit."""
    start = _narrowed(*network)
    spectrum = networks.imbalance_spectrum(start.u1, start.w2)
    end = FOLDS / float(_rate(start, spectrum, start.y / jnp.sqrt(start.s)[:, None]))
    times, begun = np.concatenate([[0.0], np.geomspace(EARLIEST, end, SAVES - 1)]), Adapter(start.u1.T, start.w2.T)
    status, (ended,), history = _solve(LinearNetwork(start.y, start.x), (begun,), jnp.asarray(end), times)
    if status != 0:
        raise RuntimeError(f"the flow from one of the starts ended with status {STATUS[int(status)]!r}")
    loss, rate, bound = map(np.asarray, _rates(start, spectrum, history))
    seen = loss > FLOOR * loss[0]
    return {
        "time": unit * times,
        "loss": loss,
        "rate": np.where(seen, rate, np.nan) / unit,
        "proposition1": np.where(seen, bound, np.nan) / unit,
        "theorem1": float(flow.imbalance_rate(start)) / unit,
        "theorem3": float(flow.global_rate(start)) / unit,
        "drift": float(jnp.linalg.norm(ended.imbalance - begun.imbalance) / sum(jnp.sum(leaf**2) for leaf in begun)),
    }


@compiled(quickly=True)
def _solve(problem: LinearNetwork, start: Adapters, end: Any, times: Any) -> tuple[Array, Adapters, Adapters | None]:
    """Status, end and history; compiled as a whole, so that the unused observables cost nothing.

    The solver is Tsit5, because nothing here is stiff; "auto" would compile for far longer than it runs.
    """
    how: Any = {"solver": "Tsit5", "rtol": 1e-6, "derivatives": "forward", "save_adapters": True}
    solved = solve(problem, start, t1=end, saves=times, **how)
    return solved.status, solved.adapters, solved.history


def _narrowed(x: Any, y: Any, w1: Any, w2: Any) -> flow.Reduced:
    """The part of a network that its flow moves, with r + m hidden directions for any width."""
    seen = flow.reduce(x, y, w1, w2)
    ((a, b),) = pad(narrow((Adapter(seen.u1.T, seen.w2.T),)), sum(seen.y.shape))
    return flow.reduce(seen.x, seen.y, a.T, b.T)


def _rate(start: flow.Reduced, spectrum: Array, product: Array) -> Array:
    """The least rate (Min et al. 2022, Proposition 1) where U_1 V^T is `product`, by the conserved spectrum of Lam."""
    r, m = start.y.shape
    s_m, s_r = networks.singular_values(product, m, r)
    return 2 * start.s[-1] * networks.alpha(spectrum, s_m, s_r, r, m)


@compiled(quickly=True)
def _rates(start: flow.Reduced, spectrum: Array, history: Adapters) -> tuple[Array, Array, Array]:
    """L - L*, its rate ||grad L||^2/(L - L*), and what that is at least, over time."""

    def one(adapters: Adapters) -> tuple[Array, Array, Array]:
        ((a, b),) = adapters
        now = start._replace(u1=a.T, w2=b.T)
        loss, gradients = networks.loss(*now.network), networks.gradients(*now.network)
        return loss, sum(jnp.sum(g**2) for g in gradients) / loss, _rate(start, spectrum, now.u1 @ now.w2)

    return jax.vmap(one)(history)


def _variables(runs: Sequence[Sequence[dict[str, Any]]], dim: str, prefix: str) -> dict[str, Any]:
    """The results of `_follow` over (seed, dim, save)."""
    dims = ("seed", dim, "save")
    variables = {}
    for name in runs[0][0]:
        values = np.array([[one[name] for one in each] for each in runs])
        variables[prefix + name] = dims[: values.ndim], values
    return variables


MARKS = (
    Mark("gradient flow", {"color": "0.2", "linestyle": "-"}),
    Mark("bound: Theorem 1 in (a, c, d), Proposition 1 in (b)", {"color": "0.2", "linestyle": "--"}),
    Mark("bound: Theorem 3, where it is another", {"color": "0.2", "linestyle": ":"}),
)


def draw(dataset: xr.Dataset) -> Figure:
    with panels(2, 2, height=5.8) as (figure, axes):
        _draw_starts(dataset.isel(seed=0), axes[0])
        _draw_widths(dataset, axes[1])
        letters(axes)
        figure.legend(handles=keys(MARKS), loc="outside lower center", ncols=3)
    return figure


def _draw_starts(dataset: xr.Dataset, axes: Any) -> None:
    for start, colour in zip(dataset["start"].values, (BLUE, ORANGE, GREEN, "0.35", PURPLE), strict=True):
        one = dataset.sel(start=start).isel(save=slice(1, None))
        _draw_loss(axes[0], one, "", colour, start)
        axes[1].plot(one["time"], one["rate"], color=colour)
        axes[1].plot(one["time"], one["proposition1"], color=colour, linestyle="--", linewidth=1)
    _finish(axes[0])
    axes[0].set(title=f"Loss of {dataset.attrs['samples']} samples, h = {dataset.attrs['width']}")
    axes[0].legend(title=r"$\sigma_U, \sigma_V$ of the start", loc="lower left")
    axes[1].set(yscale="log", xlabel="gradient-flow time t", title="Its rate at the moment")
    axes[1].set_ylabel(r"$-\frac{d}{dt}\,\log\,(L - L^*)$")
    for ax in axes:
        ax.set(xscale="log", xlim=(EARLIEST, 2.5 * FOLDS))


def _draw_widths(dataset: xr.Dataset, axes: Any) -> None:
    shown = [h for h in dataset["width"].values if h <= WIDEST]
    for h, colour in zip(shown, shades(len(shown)), strict=True):
        _draw_loss(axes[0], dataset.sel(width=h).isel(seed=0), "width_", colour, f"h = {h}")
    _finish(axes[0])
    rows, columns = dataset.attrs["rows"], dataset.attrs["columns"]
    axes[0].set(xlim=(0, 100), xlabel="gradient-flow time t of U and V")
    axes[0].set_title(f"Loss of a {rows} x {columns} factorisation")
    axes[0].legend(loc="lower left")
    least = dataset["width_rate"].min("save")
    band(least, axes[1], spread="range", marker="o", ms=3, color=BLUE)
    band(dataset["width_theorem1"], axes[1], spread="range", linestyle="--", color="0.4")
    axes[1].autoscale(axis="x")  # with room for the markers
    axes[1].axhline(4 / columns, color="0.5", linewidth=1)
    place = (dataset["width"][0], 4 / columns)
    axes[1].annotate("4/m, of infinite width", place, (0, 3), textcoords="offset points", fontsize=7, color="0.3")
    axes[1].set(xscale="log", xlabel="hidden width h", title="Its rate where it is slowest")
    axes[1].set_ylabel(r"least $-\frac{d}{dt}\,\log\,L$ on the way")
    axes[1].set_ylim(0, 4 / columns * 1.12)


def _draw_loss(ax: Any, one: xr.Dataset, prefix: str, colour: Any, label: str) -> None:
    """The loss while it is above rounding, Theorem 1's bound dashed, and Theorem 3's dotted where it is another."""
    time, loss = one[f"{prefix}time"], one[f"{prefix}loss"]
    ax.plot(time, (loss / loss[0]).where(one[f"{prefix}rate"].notnull()), color=colour, label=label)
    rates = {name: one[f"{prefix}{name}"].values for name in ("theorem1", "theorem3")}
    grid = np.geomspace(EARLIEST, 10 * time.max(), 400)
    for (name, rate), style in zip(rates.items(), ("--", ":"), strict=True):
        if name == "theorem1" or rate > 1.001 * rates["theorem1"]:
            ax.plot(grid, flow.loss_bound(rate, grid, 1.0), color=colour, linestyle=style, linewidth=1)


def _finish(ax: Any) -> None:
    ax.set(yscale="log", ylim=(FLOOR, 4), xlabel="gradient-flow time t", ylabel=r"$(L - L^*)\,/\,(L(0) - L^*)$")


def notes(dataset: xr.Dataset) -> str:
    header = ["rate guaranteed, Theorem 1", "Theorem 3", "least on the way", "first", "last"]
    header += ["Proposition 1 gives of it", "t to 1e-10"]
    starts = [[start, *_row(dataset.sel(start=start), "")] for start in dataset["start"].values]
    widths = [[h, *_row(dataset.sel(width=h), "width_")] for h in dataset["width"].values]
    sizes = dataset.attrs
    return (
        f"The rate is -d/dt log(L - L*), and each number a median over {dataset.sizes['seed']} draws. "
        f"{_ABOUT.format(**sizes)}\n\n{table(['sigma_U, sigma_V', *header], starts)}\n\n"
        f"{_ABOUT_WIDTHS.format(**sizes)}\n\n{table(['h', *header], widths)}\n\n{_seen(dataset)}"
    )


_ABOUT = (
    "First, {samples} samples of {inputs} inputs with X X^T = I, one output, h = {width}. The balanced starts are the "
    "paper's control, Lam = 0 of the weights that the loss depends on: at the product of the first start, and near the "
    "solution, at the weights that Y was drawn from. The initialisation `balanced` is not the same: it balances the "
    "part of U outside the rows of X too, which never moves, and leaves an imbalance: Lam = -U_2^T U_2."
)
_ABOUT_WIDTHS = (
    "Then 1/2 ||Y - U V^T/sqrt(m h)||^2 over widths, Y {rows} x {columns} with entries N(0, .1), weights N(0, 1), in "
    "the time of U and V. With h going to infinity the rate goes to 4/m."
)


def _row(one: xr.Dataset, prefix: str) -> list[str]:
    rate = one[f"{prefix}rate"]
    loss, time = one[f"{prefix}loss"], one[f"{prefix}time"]
    spans = time.where(loss <= 1e-10 * loss.isel(save=0)).min("save")
    last = rate.isel(save=rate.notnull().sum("save") - 1)
    share = (one[f"{prefix}proposition1"] / rate).quantile([0.0, 1.0], ["seed", "save"]).values
    values = (one[f"{prefix}theorem1"], one[f"{prefix}theorem3"], rate.min("save"), rate.isel(save=0), last)
    shown = [_number(value) for value in values]
    return [*shown, f"{100 * share[0]:.3g} to {100 * share[1]:.3g} %", _number(spans)]


def _number(values: xr.DataArray) -> str:
    """The median, with zero for the rounding of rates of order 1."""
    middle = float(values.median())
    return f"{middle if abs(middle) > 1e-9 else 0:.3g}"


def _seen(dataset: xr.Dataset) -> str:
    """A sentence on how often the bounds hold, and where Theorem 3 says more than Theorem 1."""
    counts = {prefix: violations(dataset, prefix) for prefix in ("", "width_")}
    broken, steps = (sum(count[i] for count in counts.values()) for i in (0, 1))
    drift = max(float(dataset[f"{prefix}drift"].max()) for prefix in counts)
    more = [f"h = {h}" for h in _with_margin(dataset, "width", "width_")]
    more = [*(f"'{start}'" for start in _with_margin(dataset, "start", "")), *more]
    return (
        f"Of {steps} recorded times with a loss above {FLOOR:g} of the start's, a bound fails at {broken}. Theorem 3 "
        "says more than Theorem 1 only from starts that are nearer to the targets than the targets' least singular "
        f"value: here {', '.join(more) or 'none'}. Largest drift of Lam relative to the weights' squared norm: "
        f"{drift:.1g}."
    )


def _with_margin(dataset: xr.Dataset, dim: str, prefix: str) -> list[Any]:
    """The starts for which Theorem 3 says more than Theorem 1."""
    more = dataset[f"{prefix}theorem3"] > dataset[f"{prefix}theorem1"] * (1 + SLACK) + SLACK
    return dataset[dim].values[more.any("seed")].tolist()


def violations(dataset: xr.Dataset, prefix: str = "") -> tuple[int, int]:
    """The number of recorded times at which one of the bounds fails by more than the solver's error, and of all."""
    time, loss, rate = (dataset[f"{prefix}{name}"] for name in ("time", "loss", "rate"))
    fails = dataset[f"{prefix}proposition1"] > rate * (1 + SLACK)
    for theorem in ("theorem1", "theorem3"):
        highest = np.exp(-dataset[f"{prefix}{theorem}"] * time) * loss.isel(save=0)
        fails |= (loss > highest * (1 + SLACK)) & rate.notnull()
    return int(fails.sum()), int(rate.notnull().sum())


_OF_A_RUN = {
    "time": "gradient-flow time: over widths that of U and V",
    "loss": "L - L*",
    "rate": "-d/dt log(L - L*): NaN where the loss is rounding",
    "proposition1": "bound of the rate, Proposition 1 of Min et al. 2022",
    "theorem1": "bound of the rate, Theorem 1 of Min et al. 2022",
    "theorem3": "bound of the rate, Theorem 3 of Min et al. 2022",
    "drift": "drift of the conserved imbalance, relative to the weights' squared norm",
}
MEANINGS = {
    "seed": "seed of the draw",
    "start": "kind of start",
    "width": "hidden width h",
    **_OF_A_RUN,
    **{f"width_{name}": about for name, about in _OF_A_RUN.items()},
}

EXPERIMENT = Experiment.of_one(
    "how imbalance speeds up linear networks, and the bounds on their rate",
    run,
    draw,
    notes,
    seeds=5,
    meanings=MEANINGS,
)
