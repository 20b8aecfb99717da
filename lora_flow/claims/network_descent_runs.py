"""Gradient descent of linear networks by every step rule, what is read off each of its steps, and ratios over them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_flow.adapter import Adapters
from lora_flow.claims import network_runs as runs
from lora_flow.claims.frame import Cases, Tried
from lora_flow.claims.network_runs import FLOOR, SHAPES, STARTS
from lora_flow.dynamics.descend import Descent, StepRule, descend
from lora_flow.dynamics.lanes import finished, only, stack
from lora_flow.dynamics.network_steps import RATES, AdaptiveStep, AdmissibleStep, Backtracking, GrowingStep
from lora_flow.problems.network import LinearNetwork
from lora_flow.runtime.compiling import compiled
from lora_flow.theory import linear_descent as descent
from lora_flow.theory import linear_local as local
from lora_flow.theory import linear_networks as networks

STEPS = 60
ROUNDING = 1e-12  # relative to what falls: less is not promised
NETWORKS = "n = m = 4 and n = 8, m = 4, X of rank 5, h = 40, four kinds of start, 60 steps"
EVERY_RULE = f"gradient descent by eta_max, four adaptive, two growing steps and backtracking; {NETWORKS}"
FIXED = {"eta_max": AdmissibleStep(c1=0.5, c2=1.5)}  # as in the experiments of Xu et al. 2023
ADAPTIVE = {rate: AdaptiveStep(rate, c1=0.9, c2=1.1) for rate in RATES}  # where eta_max need not be the smaller
GROWING = {
    "1/K_t, d = 1.01": GrowingStep(fraction=0.9),
    "1/Kbar_t, d = 2": GrowingStep(fraction=0.9, d=2.0, by_bound=True),
}
RULES: dict[str, StepRule] = {**FIXED, **ADAPTIVE, **GROWING, "backtracking": Backtracking()}


class Point(NamedTuple):
    """What can be said of one step from the weights before and after it; over `(seed, step)` in `Steps`."""

    loss: Any
    step: Any
    lowest: Any  # lmin(tau)
    highest: Any  # lmax(tau)
    constants: descent.Constants
    theorem: local.Constants
    rho: descent.RateBound
    margin: Any  # of Lemma 3.1, at this step
    change: Any  # ||D+ - D||_F/(||W1||_F^2 + ||W2||_F^2)
    change_error: Any  # the same of D+ - D - (the formula)
    drift: Any  # ||D+ - D(0)||_F
    gradient2: Any  # ||grad L||_F^2
    smooth: local.Smoothness
    pl: Any  # mu_t


class Steps(NamedTuple):
    """Gradient descent by one rule: every step, and the loss after it."""

    at: Point
    after: np.ndarray
    rule: Any

    @property
    def start(self) -> descent.Constants:
        """The constants of Xu et al. 2023 at the start, over `(seed, 1)`."""
        return jax.tree.map(lambda leaf: leaf[:, :1], self.at.constants)

    @property
    def schedule(self) -> local.Schedule:
        """The growing steps of Xu et al. 2025 from the first of these on, over `(seed, 1)`."""
        start, first = jax.tree.map(lambda leaf: leaf[:, :1], (self.at.theorem, self.at.step))
        return local.Schedule(start, first, self.rule.c, self.rule.d)


class _OneOf(StepRule):
    """One of some rules, by its index: one compiled program does for all of them."""

    rules: tuple[StepRule, ...]
    which: Any

    def init(self, problem: Any, adapters: Adapters) -> Any:
        return [rule.init(problem, adapters) for rule in self.rules]

    def size(self, state: Any, problem: Any, adapters: Adapters, iteration: Array) -> Array:
        sizes = [
            functools.partial(rule.size, one, problem, adapters, iteration)
            for rule, one in zip(self.rules, state, strict=True)
        ]
        return jax.lax.switch(self.which, sizes)


@compiled(quickly=True)
def _descend(problem: LinearNetwork, start: Adapters, rule: Array) -> Descent:
    """By the rule of that index. One lane: its steps need spectra."""
    step = _OneOf(tuple(RULES.values()), rule)
    return only(descend(problem, start, steps=STEPS, step=step, saves=STEPS + 1, save_adapters=True))


@functools.cache
def descents(seeds: int) -> dict[tuple[str, str, str], Steps]:
    """By shape, start and rule."""
    found = {}
    for (shape, start), (problems, starts) in runs.begun(seeds).items():
        if start in STARTS:
            lanes = [jax.tree.map(lambda leaf, i=i: leaf[i], (problems, starts)) for i in range(seeds)]
            for index, (name, rule) in enumerate(RULES.items()):
                run = stack([finished(_descend(*lane, jnp.asarray(index))) for lane in lanes])
                at, after = jax.tree.map(np.asarray, _points(problems, run.history, np.diff(run.times)))
                found[shape, start, name] = Steps(at, after, rule)
    return found


@compiled(quickly=True)
def _points(problems: LinearNetwork, history: Any, sizes: Array) -> tuple[Point, Array]:
    """What is seen of every step, over seeds, and the loss after it."""

    def one(problem: LinearNetwork, passed: Any, sizes: Array) -> tuple[Point, Array]:
        first, before, after = (jax.tree.map(lambda leaf, at=at: leaf[at], passed) for at in (0, np.s_[:-1], np.s_[1:]))
        _, _, *weights = problem.network(first)
        look = functools.partial(_point, problem, networks.imbalance(*weights))
        return jax.vmap(look)(before, after, sizes), jax.vmap(problem.loss)(after)

    return jax.vmap(one)(problems, history, sizes)


def _point(problem: LinearNetwork, first: Array, before: Adapters, after: Adapters, eta: Array) -> Point:
    """`first` is D(0)."""
    x, _, w1, w2 = now = problem.network(before)
    _, _, *moved = problem.network(after)
    loss, imbalance = networks.loss(*now), networks.imbalance(*moved)
    change, size = imbalance - networks.imbalance(w1, w2), jnp.sum(w1**2) + jnp.sum(w2**2)
    mu, k = networks.curvature(x)
    return Point(
        loss=loss,
        step=eta,
        lowest=networks.tau_smallest(w1, w2),
        highest=networks.tau_largest(w1, w2),
        constants=descent.constants(*now),
        theorem=local.constants(networks.curvature(x), loss, problem.optimum, w1, w2),
        rho=descent.rate(*now),
        margin=descent.rate_margin(*now, eta),
        change=jnp.linalg.norm(change) / size,
        change_error=jnp.linalg.norm(change - descent.imbalance_change(*now, eta)) / size,
        drift=jnp.linalg.norm(imbalance - first),
        gradient2=sum(jnp.sum(gradient**2) for gradient in networks.gradients(*now)),
        smooth=local.smoothness(k, loss, w1, w2),
        pl=local.pl_constant(mu, w1, w2),
    )


# Ratios over the steps


def worst(ratio: Callable[[Steps], np.ndarray], rules: Iterable[str], seeds: int, name: str = "") -> Cases:
    """The largest ratio over starts, seeds and steps, for each shape and rule; NaN where a step does not count."""
    for shape in SHAPES:
        for rule in rules:
            ratios = np.array([ratio(descents(seeds)[shape, start, rule]) for start in STARTS])
            counted, where = ratios[~np.isnan(ratios)], f"{shape}, {rule}{name}"
            if counted.size:
                yield where, 1, counted.max()
            else:
                yield Tried(f"{where}: no step counts", 1, np.nan, applies=False)


def seen(steps: Steps) -> np.ndarray:
    """Where the loss is more than rounding after the step, too."""
    return steps.after > FLOOR * steps.at.loss[:, :1]


def share(promised: np.ndarray, kept: np.ndarray, of: np.ndarray | float = 1.0) -> np.ndarray:
    """promised/kept, infinite where something was promised and nothing kept, NaN where nothing but rounding was."""
    ratio = np.where(kept > 0, promised / np.where(kept > 0, kept, 1.0), np.inf)
    return np.where(promised > ROUNDING * of, ratio, np.nan)


def fall_share(steps: Steps, bound: Any) -> np.ndarray:
    """(1 - bound)/(1 - L+/L), which is at most 1 where L+ <= bound L."""
    return np.where(seen(steps), share(1 - np.asarray(bound), 1 - steps.after / steps.at.loss), np.nan)


def drift_share(steps: Steps, bound: Any) -> np.ndarray:
    """||D(t) - D(0)||_F over its bound, without what may be rounding, which is relative to what D is made of."""
    drift = np.maximum(steps.at.drift - ROUNDING * steps.at.highest, 0.0)
    return np.divide(drift, np.asarray(bound), out=np.zeros_like(drift), where=drift > 0)
