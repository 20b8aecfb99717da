"""The checks of every initialisation, and the needs of a problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_flow.adapter import Adapter, Adapters
from lora_flow.algebra.diagonal import Matrix, dense
from lora_flow.algebra.low_rank import LowRank
from lora_flow.arrays import require_key
from lora_flow.checks import as_real, concrete, kind, require, require_integer, require_number
from lora_flow.problems.base import Layers, Problem, as_problem, kind_of, require_problem
from lora_flow.problems.tasks import task_rank


def check_rank(rank: Any, layers: Layers, bounded: bool = True) -> None:
    """Raises unless it is a rank of LoRA, or at least a width of a hidden layer, which is not `bounded`."""
    require_integer("rank", rank, "be an integer", -np.inf)
    if bounded:
        largest = min(min(shape) for shape in layers)
        require(1 <= rank <= largest, "rank", f"lie between 1 and {largest}, the smallest layer dimension", rank)
    else:
        require(rank >= 1, "rank", "be at least 1", rank)


def check_alpha(alpha: Any) -> None:
    require_number("alpha", alpha, "be positive and finite", lambda scale: scale > 0)


def check(key: Any, problem: Problem, rank: Any, alpha: Any, any_width: bool = False) -> None:
    """`any_width` says that the scheme is defined for any rank, where the problem allows it."""
    require_key(key)
    require_problem(problem)
    check_rank(rank, problem.layers, bounded=not (any_width and allows_any_width(problem)))
    check_alpha(alpha)


def allows_any_width(problem: Problem) -> bool:
    """Whether ranks above the layer's dimensions make sense: those of a hidden layer do."""
    return bool(as_problem(problem).any_width)


def check_twice(rank: int, layers: Layers, scheme: str) -> None:
    """For schemes that take 2 r singular vectors."""
    largest = min(min(shape) for shape in layers) // 2
    require(rank <= largest, "rank", f"be at most {largest}, half the smallest layer dimension, for {scheme}", rank)


def check_reaches_task(rank: int, problems: Sequence[Problem], scheme: str) -> None:
    """For schemes that start along the whole task."""
    (needed, of), problem = max(((task_rank(one), one) for one in problems), key=lambda found: found[0][0])
    largest = min(min(shape) for shape in problem.layers)
    room = "" if needed <= largest else f", for which the smallest layer dimension, {largest}, leaves no room"
    require(rank >= needed, "rank", f"be at least {needed}, the rank of {of}, for {scheme}{room}", rank)


def check_drawn(name: str, drawn: Any, layers: Layers, rank: int) -> Adapters:
    """The result of a user's own initialisation, as adapters; raises unless it is that."""
    init, pairs = f"init '{name}'", []
    several = isinstance(drawn, (tuple, list)) and not isinstance(drawn, Adapter) and len(drawn) == len(layers)
    require(several, init, f"return one Adapter(a, b) for each of {len(layers)} layers", kind(drawn))
    for i, (one, (n_out, n_in)) in enumerate(zip(drawn, layers, strict=True)):
        pair = isinstance(one, (tuple, list)) and len(one) == 2
        require(pair, init, f"return an Adapter(a, b) for layer {i + 1}", kind(one))
        factors = []
        for letter, factor, shape in (("A", one[0], (rank, n_in)), ("B", one[1], (n_out, rank))):
            what, known = f"return {letter}_{i + 1}", as_real(factor)
            require(known is None or known.dtype != object, init, f"{what} of real numbers", kind(factor))
            require(jnp.shape(factor) == shape, init, f"{what} of shape {shape}", f"shape {jnp.shape(factor)}")
            require(
                known is None or np.isfinite(known).all(), init, f"{what} with finite entries", "NaN or infinite ones"
            )
            factors.append(jnp.asarray(factor, float))
        pairs.append(Adapter(*factors))
    return tuple(pairs)


def is_concrete(problem: Problem) -> bool:
    leaves = jax.tree.leaves(eqx.filter(problem, eqx.is_array))
    return all(concrete(leaf) is not None for leaf in leaves)


def above_rounding(singular_values: Array, shape: tuple[int, ...]) -> Array:
    """Those of a matrix of that shape, exactly zero where they are rounding: a direction is then dead, not small."""
    rounding = 10 * max(shape) * jnp.finfo(singular_values.dtype).eps
    return jnp.where(singular_values > rounding * singular_values[0], singular_values, 0.0)


def pretrained_weights(problem: Problem, scheme: str) -> tuple[Any, ...]:
    """The frozen weights W_i, `(out, in)`, from `problem.weights`, written out unless they are `LowRank`."""
    weights = as_problem(problem).weights
    must = f"know its pretrained weights, as `weights`, for {scheme}"
    require(weights is not None, "problem", must, f"{kind_of(problem)} without them")
    return tuple(map(_dense, weights or ()))


def layer_inputs(problem: Problem, scheme: str) -> tuple[Any, ...]:
    """The inputs of each layer, `(samples, in)`, of `problem.layer_inputs`, as above; refused where one's are white."""
    inputs: Any = as_problem(problem).layer_inputs
    must = f"know what its layers are fed with, as `layer_inputs`, for {scheme}"
    require(inputs is not None, "problem", must, f"{kind_of(problem)} without it")
    white = [i for i, one in enumerate(inputs or (), start=1) if one is None]
    must = f"feed every layer with inputs that have principal directions, for {scheme}"
    require(not white, "problem", must, f"white inputs of layer {', '.join(map(str, white))}")
    return tuple(map(_dense, inputs or ()))


def _dense(matrix: Matrix) -> Any:
    return matrix if isinstance(matrix, LowRank) else dense(matrix)
