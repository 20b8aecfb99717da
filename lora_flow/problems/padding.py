"""Whether adapters may be padded to a higher rank."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lora_flow.adapter import pad
from lora_flow.checks import require
from lora_flow.problems.base import Problem, as_problem
from lora_flow.problems.derivatives import probe


def check_padding(problem: Problem, ranks: Sequence[int]) -> None:
    """Raises where padding with zero rows of A and columns of B changes the loss, or where the padding moves.

    A loss of the products B_i A_i needs no check. Other losses are tried at one state.
    """
    least, most = min(ranks), max(ranks)
    if least == most or as_problem(problem).of_products:
        return
    small = probe(problem.layers, least)
    slope, before, after = jax.grad(problem.loss)(pad(small, most)), problem.loss(small), problem.loss(pad(small, most))
    moved = [(one.a[least:], one.b[:, least:]) for one in slope]
    same = jnp.abs(after - before) <= jnp.sqrt(jnp.finfo(after.dtype).eps) * jnp.abs(before)
    stays = all(not jnp.any(leaf) for leaf in jax.tree.leaves(moved))
    must = "be one number for a problem whose loss depends on it by itself, beside the products B A"
    require(bool(same) and stays, "rank", must, sorted(set(map(int, ranks))))
