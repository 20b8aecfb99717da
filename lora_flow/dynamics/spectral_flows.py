"""Flows by singular values: orthogonalised factors (Muon), steepest descent at rank r (LoRA-Muon), balanced factors."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.adapter import Adapter, Adapters, as_adapters
from lora_flow.algebra.polar import balanced_factors, orthogonalised
from lora_flow.algebra.thin import Root
from lora_flow.checks import require
from lora_flow.dynamics.flow import Flow, Plain, check_rank, directions, is_known, not_negative, positive

SMOOTHING = 1e-3


class Muon(Flow):
    r"""Each factor moves by its orthogonalised gradient: spectral gradient flow (arXiv 2602.06385), Muon as a flow.

        A' = msign(-dL/dA),   B' = msign(-dL/dB),   msign(G) = G (G^T G + smoothing^2 I)^{-1/2}

    msign(G) = U V^T for the singular value decomposition G = U S V^T where S is far above the `smoothing`, and G over
    the smoothing where S is far below. Without smoothing msign jumps at singular values of 0: msign(0) = 0, the flow
    reaches its end in finite time, and no solver could stay there. With it the run ends exponentially, at rates of
    about 2 sigma/smoothing, which bound the solver's steps. So take a smoothing far below the gradients' singular
    values while something is still learned, and no smaller: the number of steps grows as its inverse.

    From small adapters the singular values of B A grow alike, as t^2, so that those of the task are reached in
    increasing order, sigma at t = sqrt(sigma). **Raises:** `InputError` unless the smoothing is positive.
    """

    name: ClassVar[str] = "muon"

    smoothing: Float[Array, ""]

    def __init__(self, smoothing: float | Array = SMOOTHING):
        self.smoothing = positive("smoothing", smoothing)

    @property
    def symmetric(self) -> bool:
        """The Jacobian is that of msign, the gradient of a convex function, times minus the loss's Hessian."""
        return True

    def velocity(self, descent: Adapter, adapter: Adapter) -> Adapter:
        return Adapter(orthogonalised(descent.a, self.smoothing), orthogonalised(descent.b, self.smoothing))


class LoRAMuon(Flow):
    r"""Spectral steepest descent on the matrices of rank r (LoRA-Muon, arXiv 2606.12921), without momentum and decay:

        A' = 1/2 (B^T B)^{-1/2} msign((B^T B)^{-1/2} (-dL/dA)),   B' = 1/2 msign((-dL/dB) (A A^T)^{-1/2}) (A A^T)^{-1/2}

    with msign as in `Muon`. W then moves by `(msign(P_B G) + msign(G P_A))/2`, with G the negative gradient of W and P
    the projections on the factors' column and row spaces: by 1 at the most in the spectral norm, and alike for every
    factorisation of W. From small adapters the singular values of B A grow as t, and sigma is reached at t = sigma.

    Both Gram matrices take a `damping`, as in `ScaledGD`; undamped, both factors must have full rank. **Raises:**
    `InputError` unless the damping is at least 0 and the smoothing is positive.
    """

    name: ClassVar[str] = "lora-muon"

    damping: Float[Array, ""]
    smoothing: Float[Array, ""]

    def __init__(self, damping: float | Array = 0.0, smoothing: float | Array = SMOOTHING):
        self.damping, self.smoothing = not_negative("damping", damping), positive("smoothing", smoothing)

    def velocity(self, descent: Adapter, adapter: Adapter) -> Adapter:
        return Adapter(self._within(adapter.b, descent.a), self._within(adapter.a.T, descent.b.T).T)

    @property
    def symmetric(self) -> bool:
        """Near the end the flow is that of W at the rates of P_B E + E P_A, over 2 smoothing."""
        return True

    def _within(self, other: Float[Array, "n r"], descent: Float[Array, "r k"]) -> Float[Array, "r k"]:
        """By any root R of the other factor's Gram matrix, R^T R: all lead to the same velocity."""
        damped = jnp.concatenate([other, jnp.sqrt(self.damping) * jnp.eye(other.shape[1], dtype=other.dtype)])
        root = Root.of(damped)
        return 0.5 * root.solve(orthogonalised(root.solve_transposed(descent), self.smoothing))

    @property
    def always_defined(self) -> bool:
        return bool(self.damping > 0)

    def hint(self, rank: int, task_rank: int) -> str:
        if rank <= task_rank or self.damping > 0:
            return ""
        return (
            f"lora-muon at rank {rank}, above the task's {task_rank}, may take very long: directions of W that are "
            "almost zero turn ever faster; take the task's rank, or a damping such as lora-muon:1e-3"
        )

    def check_start(self, adapters: Adapters) -> None:
        check_rank(adapters, self.damping)


class BaLoRA(Plain):
    r"""Gradient flow from balanced factors: BaLoRA (arXiv 2605.31484), for losses of the products B A alone.

    The source projects A and B on `A A^T = B^T B` after each step of an optimiser, and keeps B A. So does `descend`,
    with the nearest such factors, as `balance` has them. Gradient flow stays balanced, so `solve` projects the start
    and then follows gradient flow. On one layer the closed form is `oracles.riccati`, with lam = 0.

    Balanced factors of B A = 0 are zero, a saddle that gradient flow does not leave: `solve` refuses a start whose
    product has a lower rank than the factors need. `descend` takes it, because its first step comes before the
    projection.
    """

    name: ClassVar[str] = "balora"

    def project(self, adapter: Adapter) -> Adapter:
        return Adapter(*balanced_factors(*adapter))

    @property
    def always_defined(self) -> bool:
        return False

    def check_projected_start(self, adapters: Adapters) -> None:
        if not is_known(adapters):
            return
        for layer, (a, b) in enumerate(adapters, start=1):
            reach = min(directions(a, b)[0], b.shape[0], a.shape[1])
            found = int(np.linalg.matrix_rank(np.asarray(b) @ np.asarray(a)))
            must = f"have a product of rank {reach}, which the flow 'balora' balances at the start"
            require(found >= reach, "adapters", must, f"B_{layer} A_{layer} of rank {found}")


def balance(adapters: Adapters) -> Adapters:
    r"""The nearest adapters with the same products B A that are balanced, A A^T = B^T B (BaLoRA, arXiv 2605.31484).

    Gradient flow from there is BaLoRA's. The adapters may have leading axes. Directions that are in one factor and not
    in the product are lost: A and B become zero where B A = 0. Derivatives are defined where no direction is lost.

    **Returns:** one `Adapter` a layer, of the same shapes.

    **Raises:** `InputError` for what are no adapters.
    """
    return tuple(map(_balance, as_adapters("adapters", adapters)))


def _balance(adapter: Adapter) -> Adapter:
    one = balanced_factors
    for _ in range(adapter.a.ndim - 2):
        one = jax.vmap(one)
    return Adapter(*one(jnp.asarray(adapter.a), jnp.asarray(adapter.b)))
