"""Step sizes of gradient descent for linear networks: proven rules, and the rules that they are compared with.

Xu et al. 2023 is their paper at AISTATS, Xu et al. 2025 that in TMLR (arXiv 2505.11664). The formulas are in
`lora_flow.theory.linear_descent` and `lora_flow.theory.linear_local`.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lora_flow.adapter import Adapters
from lora_flow.checks import require, require_choice, require_flag, require_number
from lora_flow.dynamics.descend import StepRule, check_plain
from lora_flow.dynamics.flows import Flow
from lora_flow.problems.base import Problem, vector_field
from lora_flow.problems.network import check_network
from lora_flow.theory import linear_descent as descent
from lora_flow.theory import linear_local as local
from lora_flow.theory import linear_networks as networks

RATES = ("rho", "current", "loss", "start")


class NetworkRule(StepRule):
    """A rule that is defined for `LinearNetwork`.

    The theory assumes X of full column rank and reachable targets: Y stands for X X^+ Y and n for X's rank.
    """

    def check(self, problem: Problem, flow: Flow, order: str) -> None:
        check_network(problem, str(self))
        check_plain(self, flow, order)

    def __str__(self) -> str:
        return type(self).__name__


class AdmissibleStep(NetworkRule):
    r"""The constant step eta_max of Xu et al. 2023, the largest with which gradient descent provably converges.

    With this step `c1 alpha_0 <= lmin(tau)`, `lmax(tau) <= c2 beta_0` and `L(t+1) <= f(eta, t) L(t)` at all t. The rule
    needs alpha_0 > 0 at the start; the step is 0 otherwise.

    **Arguments:** `c1` in (0, 1) and `c2` above 1; the experiments of Xu et al. 2023 have 1/2 and 3/2.
    """

    c1: float | Array = 0.5
    c2: float | Array = 1.5

    def __check_init__(self) -> None:
        _check_constants(self.c1, self.c2)

    def init(self, problem: Any, adapters: Adapters) -> Any:
        start = descent.constants(*problem.network(adapters))
        return descent.largest_step(start, self.c1, self.c2).step

    def size(self, state: Any, problem: Any, adapters: Adapters, iteration: Int[Array, ""]) -> Float[Array, ""]:
        return state


class AdaptiveStep(NetworkRule):
    r"""The adaptive step of Xu et al. 2023: the step that minimises a bound of L(t+1)/L(t), at most eta_max.

    **Arguments:**

    - `rate`: the bound. "rho" is made from the spectra of the current weights (Lemma 3.1), "current" from their
      imbalance (rhohat), "loss" from the start's constants and the current loss (f(., t)), "start" from the start
      alone (f(., 0)).
    - `c1`, `c2`: as for `AdmissibleStep`.
    """

    rate: str = eqx.field(static=True, default="rho")
    c1: float | Array = 0.5
    c2: float | Array = 1.5

    def __check_init__(self) -> None:
        require_choice("rate", self.rate, RATES)
        _check_constants(self.c1, self.c2)

    def init(self, problem: Any, adapters: Adapters) -> Any:
        start = descent.constants(*problem.network(adapters))
        return start, descent.largest_step(start, self.c1, self.c2).step

    def size(self, state: Any, problem: Any, adapters: Adapters, iteration: Int[Array, ""]) -> Float[Array, ""]:
        start, largest = state
        bound = {
            "rho": lambda: descent.rate(*problem.network(adapters)),
            "current": lambda: descent.current_rate_bound(*problem.network(adapters)),
            "loss": lambda: descent.rate_bound(start, problem.loss(adapters), self.c1, self.c2),
            "start": lambda: descent.rate_bound(start, start.loss, self.c1, self.c2),
        }[self.rate]()
        return descent.adaptive_step(bound, largest)


class AroraStep(NetworkRule):
    r"""The constant step `p1^3/(6144 2^3 ||Y||_F^4)` of Arora et al. 2019 (arXiv 1810.02281, Theorem 1), two layers.

    p1 is the margin `[sigma_min(Y) - ||Y - X W1 W2||_F]+ / sigma_max(X)` of the start; without a margin the step is 0.
    """

    def init(self, problem: Any, adapters: Adapters) -> Any:
        _, y, _, _ = network = problem.network(adapters)
        return descent.arora_step(descent.constants(*network).p1, y)

    def size(self, state: Any, problem: Any, adapters: Adapters, iteration: Int[Array, ""]) -> Float[Array, ""]:
        return state


class DuStep(NetworkRule):
    r"""The falling step `sqrt(epsilon/r)/(100 (t+1) ||Y||_F^{3/2})` of Du, Hu and Lee 2018 (arXiv 1806.00900).

    **Arguments:** `epsilon`, the accuracy to reach; r is min(n, m).
    """

    epsilon: float | Array = 1e-3

    def __check_init__(self) -> None:
        require_number("epsilon", self.epsilon, "be positive", lambda known: known > 0)

    def size(self, state: Any, problem: Any, adapters: Adapters, iteration: Int[Array, ""]) -> Float[Array, ""]:
        _, y, w1, w2 = problem.network(adapters)
        return jnp.asarray(descent.du_step(iteration, self.epsilon, min(w1.shape[0], w2.shape[1]), y))


class GrowingStep(NetworkRule):
    r"""The schedule `eta_t = min{(1 + eta_0^d)^{t/2} eta_0, 1/K_t}` of Xu et al. 2025: steps grow as the loss falls.

    K_t, the smoothness along the step, falls with the loss (Theorem E.1). For small eta_0 the bound of L(t+1)/L(t)
    goes to 1 - (1/kappa) a1/a2; that of `AdaptiveStep` goes to 1 - (1/kappa) (c1 alpha_0/(c2 beta_0))^2. The rule needs
    a1 > 0 and double precision.

    **Arguments:**

    - `fraction`: eta_0 relative to the largest that the theorem admits, between 0 and 1.
    - `c`, `d`: the theorem's constants, c between 0 and 1 and d above 1.
    - `by_bound`: whether to take the bound Kbar_t, which is known beforehand, in place of K_t.
    """

    fraction: float | Array = 0.5
    c: float | Array = 0.5
    d: float | Array = 1.01
    by_bound: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        for name, value in (("fraction", self.fraction), ("c", self.c)):
            _check_between(name, value)
        require_number("d", self.d, "be above 1", lambda known: known > 1)
        require_flag("by_bound", self.by_bound)

    def check(self, problem: Problem, flow: Flow, order: str) -> None:
        super().check(problem, flow, order)
        must = 'be double for GrowingStep: jax.config.update("jax_enable_x64", True)'
        require(jnp.result_type(float) == jnp.float64, "precision", must, jnp.result_type(float))

    def init(self, problem: Any, adapters: Adapters) -> local.Schedule:
        x, _, w1, w2 = problem.network(adapters)
        start = local.constants(networks.curvature(x), problem.loss(adapters), problem.optimum, w1, w2)
        return local.Schedule(start, self.fraction * local.largest_step(start, self.c, self.d).step, self.c, self.d)

    def size(self, state: Any, problem: Any, adapters: Adapters, iteration: Int[Array, ""]) -> Float[Array, ""]:
        if self.by_bound:
            return state.step(iteration, 1 / state.smoothness(iteration))
        _, _, w1, w2 = problem.network(adapters)
        smooth = local.smoothness(state.start.K, problem.loss(adapters), w1, w2)
        return state.step(iteration, smooth.step())


class Backtracking(StepRule):
    r"""The first of `first`, `first factor`, `first factor^2`, ... that lowers the loss enough; for any problem.

    Enough is `L(p - eta grad L) <= L(p) - constant eta ||grad L||^2`. The experiments of Xu et al. 2025 have factor =
    0.1 and constant = 0.9. The step is 0 where none of 300 tries lowers the loss enough, or where the loss is rounding
    and does not fall at all.
    """

    first: float | Array = 1.0
    factor: float | Array = 0.5
    constant: float | Array = 0.5

    def __check_init__(self) -> None:
        require_number("first", self.first, "be positive and finite", lambda known: known > 0)
        for name, value in (("factor", self.factor), ("constant", self.constant)):
            _check_between(name, value)

    def check(self, problem: Problem, flow: Flow, order: str) -> None:
        check_plain(self, flow, order)

    def size(self, state: Any, problem: Any, adapters: Adapters, iteration: Int[Array, ""]) -> Float[Array, ""]:
        gradient = jax.tree.map(jnp.negative, vector_field(problem)(adapters))
        step = local.backtracking_step(problem.loss, adapters, gradient, self.first, self.factor, self.constant)
        moved = jax.tree.map(lambda factor, slope: factor - step * slope, adapters, gradient)
        return jnp.where(problem.loss(moved) < problem.loss(adapters), step, 0.0)


def _check_between(name: str, value: Any) -> None:
    require_number(name, value, "lie between 0 and 1", lambda known: 0 < known < 1)


def _check_constants(c1: Any, c2: Any) -> None:
    _check_between("c1", c1)
    require_number("c2", c2, "be above 1", lambda known: known > 1)
