"""Initialisations from a layer's inputs."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from lora_flow.adapter import Adapter, Adapters
from lora_flow.algebra.diagonal import Matrix
from lora_flow.checks import require
from lora_flow.initialization.checks import check, layer_inputs
from lora_flow.initialization.directions import triplets
from lora_flow.problems.base import Problem


def eva_init(key: Array, problem: Problem, *, rank: int, alpha: float | Array) -> Adapters:
    r"""A along the principal directions of the layer's inputs, B = 0 (EVA, arXiv 2410.07170).

    The rows of A are alpha times the first r right singular vectors of the inputs, `(samples, in)`. In a network with
    white inputs these are the left singular vectors of W_1 for the second layer, and not defined for the first. The
    source has alpha = 1. Nothing is drawn. PEFT subtracts the inputs' mean first.

    **Returns:** an `Adapter` for each layer, A of shape `(rank, in)` and B of shape `(out, rank)`.

    **Raises:** `InputError` for a problem that does not know its layers' inputs or has white ones, or a bad rank or
    alpha.
    """
    check(key, problem, rank, alpha)

    def directions(inputs: Matrix, n_out: int) -> Adapter:
        samples = inputs.shape[0]
        require(rank <= samples, "rank", f"be at most {samples}, the number of samples, for eva", rank)
        return Adapter(alpha * triplets(inputs.T, rank)[0].T, jnp.zeros((n_out, rank)))

    inputs = layer_inputs(problem, "eva")
    return tuple(directions(one, n_out) for one, (n_out, _) in zip(inputs, problem.layers, strict=True))
