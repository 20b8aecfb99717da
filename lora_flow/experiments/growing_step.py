"""Steps of linear networks that grow as the loss falls: Figures 1 to 3 and 5 of Xu et al. 2025 (arXiv 2505.11664).

Y = X W1 W2 + sigma^2 noise at the start W1, W2, so sigma sets the distance to the solution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array

from lora_flow.adapter import Adapter, Adapters
from lora_flow.coordinates.narrow import narrow
from lora_flow.dynamics.descend import StepRule
from lora_flow.dynamics.network_steps import AdaptiveStep, Backtracking, GrowingStep
from lora_flow.experiments.base import Experiment, Progress
from lora_flow.experiments.over_steps import curves, first_iteration, middle, over
from lora_flow.figures.style import BLUE, GREEN, ORANGE, PURPLE, Mark, band, keys, letters, panels
from lora_flow.problems.network import LinearNetwork
from lora_flow.results.report import table
from lora_flow.theory import linear_descent, linear_local, linear_networks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEPS, SHOWN, SOLVED, RESOLVED = 150, 80, 1e-10, 1e-16
FRACTION, C, D = 0.9, 0.5, 1.01


class Setting(NamedTuple):
    """X, `(side, side)`, has singular values in `values`; the weights are N(0, 1), or N(0, 1/h) if `scaled`."""

    side: int
    width: int
    sigma: float
    values: tuple[float, float] = (1.0, 1.0)
    scaled: bool = False


WIDTHS, SIGMAS = (500, 1000, 4000), (1.0, 4.0)
FIGURE_5 = "Figure 5"
SETTINGS = {
    **{f"h = {h}, sigma = {sigma:g}": Setting(10, h, sigma) for sigma in SIGMAS for h in WIDTHS},
    FIGURE_5: Setting(5, 1000, 0.3, (1.8, 2.3), scaled=True),
}
PANELS = (*(f"h = {h}, sigma = {SIGMAS[-1]:g}" for h in WIDTHS), FIGURE_5)
CLOSER = (PANELS[1], FIGURE_5)  # whose steps and local rates are shown
RULES: dict[str, Callable[[Array], StepRule | Array]] = {  # by the first step
    "constant": lambda first: first,
    "K_t": lambda _: GrowingStep(FRACTION, C, D),
    "Kbar_t": lambda _: GrowingStep(FRACTION, C, D, by_bound=True),
    "adaptive": lambda _: AdaptiveStep("rho"),
    "backtracking": lambda _: Backtracking(factor=0.1, constant=0.9),
}
GROWING = ["K_t", "Kbar_t"]


def run(seeds: int, progress: Progress) -> xr.Dataset:
    """Losses, steps, local rates and 1/K_t over setting, rule, seed and iteration, and the constants of the starts."""
    drawn = {(name, seed): draw_problem(SETTINGS[name], seed) for name in SETTINGS for seed in range(seeds)}
    starts = over(lambda *at: _about_start(*drawn[at]), {"setting": SETTINGS, "seed": range(seeds)})

    def one(name: str, rule: str, seed: int) -> dict[str, Array]:
        first = jnp.asarray(starts["first_step"].sel(setting=name, seed=seed).values)
        return _descend(*drawn[name, seed], RULES[rule](first))

    runs = over(one, {"setting": SETTINGS, "rule": RULES, "seed": range(seeds)}, progress)
    return runs.merge(starts).assign_coords(iteration=np.arange(STEPS + 1))


def draw_problem(setting: Setting, seed: int) -> tuple[LinearNetwork, Adapters]:
    """A network and its start, narrowed."""
    side, width, sigma, values, scaled = setting
    rng = np.random.default_rng([seed, width])
    left, right = (np.linalg.qr(rng.normal(size=(side, side)))[0] for _ in range(2))
    x = left * rng.uniform(*values, side) @ right
    size = width**-0.5 if scaled else 1.0
    w1, w2 = size * rng.normal(size=(side, width)), size * rng.normal(size=(width, side))
    targets = x @ w1 @ w2 + sigma**2 * rng.normal(size=(side, side))
    return LinearNetwork(targets, x), narrow((Adapter(jnp.asarray(w1.T), jnp.asarray(w2.T)),))


@jax.jit
def _about_start(problem: LinearNetwork, start: Adapters) -> dict[str, Array]:
    """eta_0, rhobar_0, a1/a2 and the schedule's limit rate of Theorem E.1; eta_max of Xu et al. 2023."""
    x, y, w1, w2 = problem.network(start)
    at_start = linear_local.constants(linear_networks.curvature(x), problem.loss(start), problem.optimum, w1, w2)
    first_step = FRACTION * linear_local.largest_step(at_start, C, D).step
    return {
        "first_step": first_step,
        "rhobar": linear_local.Schedule(at_start, first_step, C, D).rhobar,
        "ratio": at_start.a1 / at_start.a2,
        "goal": linear_local.asymptotic_rate(at_start),
        "largest_step": linear_descent.largest_step(linear_descent.constants(x, y, w1, w2), 0.5, 1.5).step,
    }


@eqx.filter_jit
def _descend(problem: LinearNetwork, start: Adapters, rule: StepRule | Array) -> dict[str, Array]:
    """At every iteration: the loss, the step, rho_t(step) and 1/K_t."""

    def look(adapters: Adapters, loss: Array, step: Array) -> dict[str, Array]:
        x, _, w1, w2 = problem.network(adapters)
        mu, k = linear_networks.curvature(x)
        smooth = linear_local.smoothness(k, loss, w1, w2)
        rate = linear_local.rate(linear_local.pl_constant(mu, w1, w2), smooth.at(step), step)
        return {"rate": rate, "smooth_step": smooth.step()}

    return curves(problem, start, rule, STEPS, look)


def fall(dataset: xr.Dataset) -> xr.DataArray:
    """L+/L at each iteration but the last, NaN where the loss is rounding."""
    loss = dataset["loss"]
    after = loss.shift(iteration=-1)
    return (after / loss).where(after > RESOLVED * loss.isel(iteration=0))


MARKS = {
    "constant": Mark(r"constant $\eta_0$", {"color": "0.75", "linewidth": 5, "solid_capstyle": "butt"}),
    "K_t": Mark(r"growing, $1/K_t$", {"color": BLUE}),
    "Kbar_t": Mark(
        r"growing, $1/\bar{K}_t$", {"color": PURPLE, "linestyle": "", "marker": "o", "ms": 3, "markevery": 5}
    ),
    "adaptive": Mark(r"adaptive, $\rho$ (AISTATS 2023)", {"color": ORANGE}),
    "backtracking": Mark("backtracking", {"color": GREEN}),
}
PROVEN = Mark(r"proven, $\bar\rho_0^{\,t}$ and $\bar\rho_0$", {"color": "0.1", "linestyle": "--", "linewidth": 1})
LOCAL = Mark(r"local rate $\rho_t$", {"color": "0.4", "linestyle": (0, (1, 1)), "linewidth": 1.2})
LIMIT = Mark(r"$1/K_t$", {"color": "0.1", "linestyle": ":", "linewidth": 1})


def draw(dataset: xr.Dataset) -> Figure:
    with panels(2, 4, height=4.4, look={"axes.titlesize": 7}, sharex=True) as (figure, axes):
        for ax, setting in zip(axes[0], PANELS, strict=True):
            _draw_losses(dataset.sel(setting=setting), ax)
        for i, setting in enumerate(CLOSER):
            _draw_steps(dataset.sel(setting=setting), axes[1, 2 * i])
            _draw_rates(dataset.sel(setting=setting), axes[1, 2 * i + 1])
        for ax in axes[0, 1:]:
            ax.tick_params(labelleft=False)
        axes[0, 0].set_ylabel(r"loss $L/L_0$")
        figure.legend(
            handles=keys((*MARKS.values(), PROVEN, LOCAL, LIMIT)),
            loc="outside lower center",
            ncols=4,
            columnspacing=1.2,
        )
        letters(axes)
    return figure


def _draw_losses(one: xr.Dataset, ax: Axes) -> None:
    loss = one["loss"] / one["loss"].isel(iteration=0)
    ax.set_yscale("log")
    for rule, mark in MARKS.items():
        band(loss.sel(rule=rule), ax, **mark.style)
    middle(ax, one["rhobar"] ** one["iteration"], **PROVEN.style)
    ax.set(yscale="log", ylim=(1e-20, 3), xlim=(0, SHOWN), title=_title(one))


def _draw_steps(one: xr.Dataset, ax: Axes) -> None:
    for rule, mark in MARKS.items():
        band((one["step"] / one["first_step"]).sel(rule=rule), ax, **mark.style)
    middle(ax, one["smooth_step"].sel(rule="K_t") / one["first_step"], **LIMIT.style)
    ax.set(xlim=(0, SHOWN), ylim=(0, None), xlabel="iteration", ylabel=r"step size, in units of $\eta_0$")
    ax.set_title(f"steps, {_short(one)}")


def _draw_rates(one: xr.Dataset, ax: Axes) -> None:
    ratios = fall(one)
    for rule in ("adaptive", "K_t"):
        seen, colour = ratios.sel(rule=rule).median("seed", skipna=False), MARKS[rule].style["color"]
        middle(ax, ratios.sel(rule=rule), color=colour)
        middle(ax, one["rate"].sel(rule=rule).where(seen.notnull()), **{**LOCAL.style, "color": colour})
    ax.axhline(float(one["rhobar"].median()), **PROVEN.style)
    ax.set(xlim=(0, SHOWN), ylim=(0, 1), xlabel="iteration", ylabel=r"$L(t+1)/L(t)$", title=f"rates, {_short(one)}")


def _title(one: xr.Dataset) -> str:
    name = str(one["setting"].values)
    _, width, sigma, *_ = SETTINGS[name]
    first = f"{name}, h = {width}" if name == FIGURE_5 else f"h = {width}"
    return first + "\n" + rf"$\sigma$ = {sigma:g}, $a_1/a_2$ = {float(one['ratio'].mean()):.2f}"


def _short(one: xr.Dataset) -> str:
    name = str(one["setting"].values)
    return name if name == FIGURE_5 else f"h = {SETTINGS[name].width}"


def notes(dataset: xr.Dataset) -> str:
    rows = [[name, *_row(dataset.sel(setting=name))] for name in SETTINGS]
    header = ["setting", "a1/a2", "eta_0", "of eta_max of 2023", "eta_t/eta_0 when solved, K_t", "Kbar_t"]
    header += [f"steps to {SOLVED:g} L_0, K_t", "Kbar_t", "constant eta_0", "adaptive of 2023", "backtracking"]
    header += ["rhobar_0", "1 - (mu/K) a1/a2", "L+/L when solved, K_t"]
    return f"{_about(dataset)}\n\n{_findings(dataset)}\n\n" + table(header, rows)


def _about(dataset: xr.Dataset) -> str:
    small = SETTINGS[FIGURE_5]
    return (
        f"Xu et al. 2025 (arXiv 2505.11664): X orthogonal, 10 x 10, weights N(0, 1); c = {C:g}, d = {D:g}, medians of "
        f"{dataset.sizes['seed']} draws. Chosen here: sigma, and eta_0 = {FRACTION:g} eta_max. Figure 5 is "
        f"{small.side} x {small.side} with singular values of X in {list(small.values)} and weights N(0, 1/h), here "
        f"with h = {small.width} and sigma = {small.sigma:g}. Adaptive steps are those of Xu et al. 2023 (AISTATS), "
        "by rho, c1 = 0.5, c2 = 1.5. Backtracking is by powers of 0.1, with the constant 0.9 and the step in its "
        "condition."
    )


def _findings(dataset: xr.Dataset) -> str:
    start = dataset["loss"].isel(iteration=0)
    schedule = dataset["loss"].sel(rule=GROWING)
    above = int((schedule > start * dataset["rhobar"] ** dataset["iteration"] * (1 + 1e-9) + RESOLVED * start).sum())
    faster = int((fall(dataset) > dataset["rate"] * (1 + 1e-6)).sum())
    wide = dataset.drop_sel(setting=FIGURE_5)
    grown = float((wide["step"].sel(rule="K_t").isel(iteration=-1) / wide["first_step"]).max()) - 1
    slow = [name for name in SETTINGS if _seen(dataset.sel(setting=name)) > _goal(dataset.sel(setting=name))]
    capped = dataset["step"].sel(rule="adaptive") >= dataset["largest_step"] * (1 - 1e-9)
    return (
        f"Exceptions, above rounding: {above} to L <= L_0 rhobar_0^t, {faster} to L(t+1) <= rho_t L(t). With weights "
        f"N(0, 1) steps hardly grow, by {100 * grown:.2g} % in {STEPS} iterations at most: 1/K_t, 1/Kbar_t and the "
        "constant eta_0 give the same losses, and the gain over the adaptive steps is the larger first step. In Figure "
        "5's setting the steps do grow. The rate 1 - (mu/K) a1/a2 is that of steps which have grown; settings that "
        f"fall more slowly: {'; '.join(slow) or 'none'}. The cap of the adaptive steps binds at "
        f"{100 * float(capped.mean()):.3g} % of them, which are then the constant eta_max. On a parabola, backtracking "
        "with the constant 0.9 accepts at most a fifth of the best step. It tries powers of 0.1 only, so its speed "
        "depends on where these powers happen to fall."
    )


def _row(one: xr.Dataset) -> list[str]:
    first = one["first_step"]
    times = {rule: _iterations(one["loss"].sel(rule=rule)) for rule in RULES}
    grown = [(one["step"].sel(rule=rule) / first).median("seed") for rule in GROWING]
    ends = [curve.isel(iteration=int(min(times[rule], STEPS))) for rule, curve in zip(GROWING, grown, strict=True)]
    order = (*GROWING, "constant", "adaptive", "backtracking")
    return [
        f"{float(one['ratio'].median()):.3f}",
        f"{float(first.median()):.3g}",
        f"{float((first / one['largest_step']).median()):.3g}",
        *(f"{float(end):.4g}" for end in ends),
        *(f"{times[rule]:g}" if np.isfinite(times[rule]) else "-" for rule in order),
        f"{float(one['rhobar'].median()):.3f}",
        f"{_goal(one):.3f}",
        f"{_seen(one):.3f}",
    ]


def _seen(one: xr.Dataset) -> float:
    """L+/L by K_t where the loss is solved."""
    at = int(min(_iterations(one["loss"].sel(rule="K_t")), STEPS))
    return float(fall(one).sel(rule="K_t").median("seed").isel(iteration=at))


def _goal(one: xr.Dataset) -> float:
    return float(one["goal"].median())


def _iterations(loss: xr.DataArray) -> float:
    """The number of iterations until solved, median over seeds; infinite where a run is not solved."""
    return float(first_iteration(loss <= SOLVED * loss.isel(iteration=0)))


MEANINGS = {
    "loss": "loss",
    "step": "step size",
    "rate": "local rate rho_t of the step",
    "smooth_step": "1/K_t",
    "first_step": "first step eta_0",
    "rhobar": "proven rate rhobar_0",
    "ratio": "a1/a2 at the start, of Theorem E.1 of Xu et al. 2025",
    "goal": "limit of the schedule's rate, of Theorem E.1 of Xu et al. 2025",
    "largest_step": "eta_max of Xu et al. 2023",
    "setting": "shapes and distance of the start",
    "rule": "step rule",
    "seed": "seed of the draw",
    "iteration": "iteration",
}

EXPERIMENT = Experiment.of_one(
    "steps of linear networks that grow as the loss falls, and local rates",
    run,
    draw,
    notes,
    seeds=5,
    meanings=MEANINGS,
)
