"""What can be trained: layers and a loss, and what is known of any such problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.adapter import Adapter, Adapters, check_layers, pad, zero_adapters
from lora_flow.algebra.diagonal import Matrix, dense
from lora_flow.algebra.spectra import norm
from lora_flow.checks import kind, require
from lora_flow.problems.formulas import formula

Layers = tuple[tuple[int, int], ...]


@runtime_checkable
class Problem(Protocol):
    """Anything whose adapters can be trained by gradient flow.

    `layers` holds the `(out, in)` shape of each adapted layer, and `loss` maps a tuple of adapters,
    one for each layer, to a scalar that is at least 0. The flow is then `-jax.grad(loss)`; a problem
    that knows a faster way to it offers `field(adapters)`, and `linearised_task()` likewise: formulas, which are used
    where they are about the loss in force (`lora_flow.problems.formulas`). `weights`, `layer_inputs`
    and `scaling`, LoRA's output multiplier, are what some initialisations are made from, and what
    `observe(adapters)` returns, scalars by name, is recorded along the way beside the loss. `any_width` says that ranks
    above the layer's dimensions make sense, as of a network's hidden layer; `of_products`, that the loss is one of the
    products B_i A_i alone. An object that is not
    a PyTree must be hashable, and must not change once it has been solved: the compiled program keeps its arrays.
    """

    @property
    def layers(self) -> Layers: ...

    def loss(self, adapters: Adapters) -> Array: ...


def require_problem(problem: Any, otherwise: str = "") -> None:
    """Raises for what is no problem; the message says what else would do."""
    fits = isinstance(problem, Problem) and not isinstance(problem, type)
    require(fits, "problem", f"have layers and loss(adapters){otherwise}", kind(problem))
    check_layers("problem.layers", problem.layers)


def check_padding(problem: Problem, ranks: Sequence[int]) -> None:
    """Raises where padding with zero rows of A and columns of B changes the loss, or where the padding moves.

    A loss of the products B_i A_i needs no check. Other losses are tried at one state.
    """
    least, most = min(ranks), max(ranks)
    if least == most or of_products(problem):
        return
    small = probe(problem.layers, least)
    slope, before, after = jax.grad(problem.loss)(pad(small, most)), problem.loss(small), problem.loss(pad(small, most))
    moved = [(one.a[least:], one.b[:, least:]) for one in slope]
    same = jnp.abs(after - before) <= jnp.sqrt(jnp.finfo(after.dtype).eps) * jnp.abs(before)
    stays = all(not jnp.any(leaf) for leaf in jax.tree.leaves(moved))
    must = "be one number for a problem whose loss depends on it by itself, beside the products B A"
    require(bool(same) and stays, "rank", must, sorted(set(map(int, ranks))))


def of_products(problem: Any) -> bool:
    """Whether the loss is known to be one of the products B_i A_i alone."""
    return bool(formula(problem, "of_products"))


def probe(layers: Layers, rank: int) -> Adapters:
    """Adapters at which nothing vanishes, always the same."""

    def wave(rows: int, columns: int, phase: float) -> Array:
        return jnp.cos(phase + jnp.arange(rows)[:, None] + 0.7 * jnp.arange(columns)[None] ** 1.5) / np.sqrt(rank)

    return tuple(Adapter(wave(rank, n_in, 0.1), wave(n_out, rank, 0.5)) for n_out, n_in in layers)


def vector_field(problem: Problem) -> Callable[[Adapters], Adapters]:
    """The problem's own field where it has one of its loss, else -grad of that."""
    own = formula(problem, "field")
    if own is not None:
        return own
    return lambda adapters: jax.tree.map(jnp.negative, jax.grad(problem.loss)(adapters))


def own_observables(problem: Problem, adapters: Adapters) -> dict[str, Array]:
    """The problem's own observables of adapters, beside those that every problem has.

    **Raises:** `InputError` for a value that is not a scalar.
    """
    observe = getattr(problem, "observe", None)
    own = {} if observe is None else {name: jnp.asarray(value, float) for name, value in observe(adapters).items()}
    for name, value in own.items():
        require(value.ndim == 0, f"the observable '{name}' of the problem", "be a scalar", f"shape {value.shape}")
    return own


def linearised_task(problem: Problem) -> tuple[Matrix, ...]:
    """-dL/dW_i at the pretrained weights, the change that each layer's adapter learns while it is small.

    A problem without a formula for its loss is differentiated: with A = 0 and B = I the gradient with respect to A is
    the gradient with respect to the layer's weight, since B A = 0 changes no layer.

    **Returns:** one `(out, in)` matrix for each layer.

    **Raises:** `InputError` for what is no problem.
    """
    require_problem(problem)
    own = formula(problem, "linearised_task")
    if own is not None:
        return own()

    return tuple(_task(problem, index, jnp.eye(n_out)) for index, (n_out, _) in enumerate(problem.layers))


def _task(problem: Problem, index: int, b: Array, a: float | Array = 0.0) -> Array:
    """Minus the gradient with respect to one layer's A, at B = I the layer's task."""
    start = list(zero_adapters(problem.layers, len(b)))
    start[index] = Adapter(start[index].a + a, b)
    return -jax.grad(problem.loss)(tuple(start))[index].a


def task_sizes(problem: Problem, tasks: Sequence[Matrix]) -> tuple[Float[Array, ""], ...]:
    """For each linearised task the product of its factors' norms: beside this product the task may be rounding.

    A task is J^T E, with E the residual and J its derivative. For a problem that offers no formula of their norms,
    ||E|| is that of a sum of squares, (2 L)^(1/2), and ||J||^2 the curvature along some change of the layer.
    """
    own = formula(problem, "task_sizes")
    if own is not None:
        return own()
    loss = problem.loss(zero_adapters(problem.layers, 1))

    def size(index: int, task: Array) -> Array:
        ((change, _),) = probe(((task.shape[0], task.shape[1]),), len(task))
        change = change / norm(change)
        unit = jnp.eye(len(task))
        try:
            _, slope = jax.jvp(lambda a: _task(problem, index, unit, a), (jnp.zeros_like(change),), (change,))
        except Exception:  # of a loss that is not made to be differentiated twice, exact zeros are all that is known
            slope = jnp.zeros_like(change)
        norms = jnp.sqrt(2 * jnp.abs(loss) * norm(slope))
        return jnp.where(jnp.isfinite(norms), norms, 0.0)

    return tuple(size(index, dense(task)) for index, task in enumerate(tasks))


def scaling_of(problem: Problem) -> Float[Array, ""]:
    """s, LoRA's output multiplier: the problem's, or 1."""
    return jnp.asarray(getattr(problem, "scaling", 1.0), float)


def on_host(tree: Any) -> Any:
    """The PyTree with NumPy's arrays, for which no operation is compiled."""
    return jax.tree.map(np.asarray, tree)


def matrix_rank(singular_values: np.ndarray, shape: tuple[int, ...], tolerance: float | None = None) -> int:
    """The number of singular values above rounding, for a matrix that came out of a product or two.

    Or above the `tolerance`, relative to the largest, which is 10 max(shape) eps by default.
    """
    tolerance = 10 * max(shape) * np.finfo(singular_values.dtype).eps if tolerance is None else tolerance
    return int(np.sum(singular_values > tolerance * singular_values[0]))
