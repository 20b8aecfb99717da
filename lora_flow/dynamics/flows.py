"""Flows: each turns the negative gradient into the adapters' velocity.

A flow is a function `(updates, adapters) -> updates`, which `solve` integrates and `descend` steps with.
`optax.stateless` turns it into a gradient transformation. The updates are negative gradients, that is velocities. A
chain of optax starts from gradients, so turn the sign before the flow, as in
`optax.chain(optax.scale(-1), optax.stateless(flow), optax.scale(0.1))`.

Statements on the motion of W are for one layer with a scaling s of 1. In general the preconditioned flows move W s^2
times as fast.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.adapter import Adapter, Adapters
from lora_flow.algebra.spectra import norm
from lora_flow.algebra.thin import solve_gram
from lora_flow.checks import InputError, StartWarning, kind, require
from lora_flow.dynamics.flow import Flow as Flow
from lora_flow.dynamics.flow import Plain as Plain
from lora_flow.dynamics.flow import check_rank as check_rank
from lora_flow.dynamics.flow import is_known, positive
from lora_flow.dynamics.flow import not_negative as not_negative
from lora_flow.dynamics.spectral_flows import BaLoRA, LoRAMuon, Muon


class LoRAPlus(Flow):
    r"""LoRA+ (arXiv 2402.12354): B learns `ratio` times as fast as A.

    With an optimiser of optax, A and B have two learning rates, as in the source and in PEFT: the ratio multiplies B's
    updates, because Adam would normalise a multiplied gradient. Conserves `ratio A A^T - B^T B`.

    **Raises:** `InputError` unless the ratio is positive.
    """

    name: ClassVar[str] = "lora-plus"

    ratio: Float[Array, ""]

    def __init__(self, ratio: float | Array):
        self.ratio = positive("ratio", ratio)

    @property
    def rates(self) -> Adapter:
        return Adapter(jnp.ones(()), self.ratio)

    @property
    def before(self) -> Flow:
        return Plain()

    @property
    def conserves(self) -> Float[Array, ""]:
        return self.ratio

    def velocity(self, descent: Adapter, adapter: Adapter) -> Adapter:
        return Adapter(descent.a, self.ratio * descent.b)


class ScaledGD(Flow):
    r"""Each factor preconditioned by the other's Gram matrix (ScaledGD; for LoRA arXiv 2402.02347):

        A' = (B^T B + damping I)^{-1} (-dL/dA),   B' = (-dL/dB) (A A^T + damping I)^{-1}.

    Undamped and with one layer, W moves by `P_B G + G P_A`, with G the negative gradient of W and P the projections on
    the factors' column and row spaces. The residual of `SingleLayer` then falls like exp(-2 t) inside both spaces and
    like exp(-t) inside one of them, whatever its condition number. The flow conserves `det(B^T B)/det(A A^T)`, not the
    imbalance. LoRA-One's updates (arXiv 2502.01235, equation 9) are gradient descent along this flow.

    **Raises:** `InputError` unless the damping is at least 0; undamped, both factors must have full rank.
    """

    name: ClassVar[str] = "scaled"

    damping: Float[Array, ""]

    def __init__(self, damping: float | Array = 0.0):
        self.damping = not_negative("damping", damping)

    def velocity(self, descent: Adapter, adapter: Adapter) -> Adapter:
        return Adapter(
            over_gram(adapter.b, descent.a, self.damping), over_gram(adapter.a.T, descent.b.T, self.damping).T
        )

    @property
    def always_defined(self) -> bool:
        return bool(self.damping > 0)

    def check_start(self, adapters: Adapters) -> None:
        check_rank(adapters, self.damping)


class LoRAPro(Flow):
    r"""W moves by the part of its negative gradient that adapters can express (LoRA-Pro, arXiv 2407.18242):

        A' = (B^T B)^{-1} (-dL/dA) (I - P_A/2),   B' = (I - P_B/2) (-dL/dB) (A A^T)^{-1}.

    W then moves by `P_B G + G P_A - P_B G P_A`, the orthogonal projection of its negative gradient G on the tangent
    space of the matrices of rank r, for every factorisation of W. The source adds `X A` to A' and `-B X` to B' with an
    X that leaves W's motion unchanged and is chosen differently there; here X shares the common part evenly. The flow
    conserves `det(B^T B)/det(A A^T)`, and the loss falls at the rate of the projection's squared norm.

    Both Gram matrices take a `damping`, as in `ScaledGD`. **Raises:** `InputError` as `ScaledGD` does.
    """

    name: ClassVar[str] = "lora-pro"

    damping: Float[Array, ""]

    def __init__(self, damping: float | Array = 0.0):
        self.damping = not_negative("damping", damping)

    def velocity(self, descent: Adapter, adapter: Adapter) -> Adapter:
        a, b = adapter
        along_a = over_gram(b, descent.a, self.damping)
        along_b = over_gram(a.T, descent.b.T, self.damping).T
        common = 0.5 * over_gram(a.T, a @ along_a.T, self.damping).T  # half of (B^T B)^{-1} B^T G A^T (A A^T)^{-1}
        return Adapter(along_a - common @ a, along_b - b @ common)

    @property
    def always_defined(self) -> bool:
        return bool(self.damping > 0)

    def check_start(self, adapters: Adapters) -> None:
        check_rank(adapters, self.damping)


class ShrinkA(Flow):
    r"""Adds `-rate A` to A's velocity, for ever; `StableLoRA` (arXiv 2603.05204) while its decay is on.

    Stable-LoRA multiplies A by 1 - lam before a step of size eta; `rate = lam/eta`. Under the plain flow the imbalance
    then obeys `d/dt (A A^T - B^T B) = -2 rate A A^T`. **Raises:** `InputError` unless the rate is at least 0.
    """

    name: ClassVar[str] = "shrink-a"

    rate: Float[Array, ""]

    def __init__(self, rate: float | Array):
        self.rate = not_negative("rate", rate)

    def velocity(self, descent: Adapter, adapter: Adapter) -> Adapter:
        return Adapter(descent.a - self.rate * adapter.a, descent.b)


class StableLoRA(ShrinkA):
    r"""Stable-LoRA (arXiv 2603.05204) as a flow: `ShrinkA` until its rule is met, and from then on the plain flow.

    In each layer, with B `(m, r)` and A `(r, n)`, A shrinks at the `rate` k until `||A||_F/n < ||B||_F/m`, and never
    again, whatever the norms do afterwards. From B = 0, and while little is learned, the rule is met at
    `log(1 + k m ||A_0|| / (n ||G A_0^T||)) / k` (`lora_flow.theory.stable_lora.switch_off_time`), with G the layer's
    task. Runs record `shrunk_until1` and so on, the time up to which A of that layer has been shrunk.

    A start that meets the rule, as one with A = 0, is warned of: such a layer is never shrunk. **Raises:** `InputError`
    unless the rate is at least 0, and where nothing remembers the latch, as in `descend` (see `stable_lora`).
    """

    name: ClassVar[str] = "stable-lora"

    def __init__(self, rate: float | Array):
        super().__init__(rate)

    @property
    def latched(self) -> bool:
        return True

    @property
    def off(self) -> Flow:
        return Plain()

    def margin(self, adapter: Adapter, layer: tuple[int, int]) -> Float[Array, ""]:
        return excess_of_a(adapter, layer)

    @property
    def always_defined(self) -> bool:
        return False

    def check_start(self, adapters: Adapters) -> None:
        if not is_known(adapters):
            return
        for layer, (a, b) in enumerate(adapters, start=1):
            size_a, size_b = np.linalg.norm(a) / np.shape(a)[-1], np.linalg.norm(b) / np.shape(b)[-2]
            if size_a < size_b:
                told = f"||A||/n = {size_a:.3g} is less than ||B||/m = {size_b:.3g} at the start"
                warnings.warn(f"flow '{self}' never shrinks A of layer {layer}: {told}", StartWarning, stacklevel=3)


def excess_of_a(adapter: Adapter, layer: tuple[int, int]) -> Float[Array, ""]:
    """`||A||_F/n - ||B||_F/m` of a layer of shape `(m, n)`, relative to their sum; 0 where both factors are zero."""
    m, n = layer
    size_a, size_b = norm(adapter.a) / n, norm(adapter.b) / m
    both = size_a + size_b
    return (size_a - size_b) / jnp.where(both > 0, both, 1.0)


class Chain(Flow):
    """One flow after another, in the order given, as in `optax.chain`.

    With an optimiser of optax, learning rates (`LoRAPlus`) must come last, because they act after the optimiser.

    **Raises:** `InputError` for what is no flow, and for several flows with a latch.
    """

    flows: tuple[Flow, ...]

    def __init__(self, *flows: Flow):
        for flow in flows:
            require(isinstance(flow, Flow), "flows", "be Flows, made, as ScaledGD(0.1)", kind(flow))
        latches = [flow for flow in flows if flow.latched]
        require(len(latches) < 2, "flows", "hold at most one with a latch", ", ".join(f"'{flow}'" for flow in latches))
        self.flows = flows

    def __str__(self) -> str:
        return ", ".join(map(str, self.flows))

    @property
    def conserves(self) -> Float[Array, ""]:
        """The product of constant rates; NaN where the chain has another flow."""
        return jnp.prod(jnp.stack([flow.conserves for flow in (Plain(), *self.flows)]))

    @property
    def rates(self) -> Adapter:
        rates = [flow.rates for flow in (Plain(), *self.flows)]
        return Adapter(*(jnp.prod(jnp.stack(factor)) for factor in zip(*rates, strict=True)))

    @property
    def before(self) -> Flow:
        return Chain(*(flow.before for flow in self.flows))

    @property
    def _parts(self) -> list[Flow]:
        nested = [flow._parts if isinstance(flow, Chain) else [flow] for flow in self.flows]
        return [flow for flows in nested for flow in flows if not isinstance(flow, Plain)]

    def check_optimiser(self) -> None:
        rated = [flow.before is not flow for flow in self._parts]
        must = "have its learning rates, LoRAPlus, last in the chain for an optimiser of optax"
        require(rated == sorted(rated), "flow", must, f"'{self}'")

    def velocity(self, descent: Adapter, adapter: Adapter) -> Adapter:
        for flow in self.flows:
            descent = flow.velocity(descent, adapter)
        return descent

    @property
    def latched(self) -> bool:
        return any(flow.latched for flow in self.flows)

    @property
    def off(self) -> Flow:
        return Chain(*(flow.off for flow in self.flows))

    def margin(self, adapter: Adapter, layer: tuple[int, int]) -> Float[Array, ""]:
        margins = (flow.margin(adapter, layer) for flow in self.flows if flow.latched)
        return next(margins, super().margin(adapter, layer))

    @property
    def always_defined(self) -> bool:
        return all(flow.always_defined for flow in self.flows)

    def check_start(self, adapters: Adapters) -> None:
        for flow in self.flows:
            flow.check_start(adapters)

    def project(self, adapter: Adapter) -> Adapter:
        for flow in self.flows:
            adapter = flow.project(adapter)
        return adapter

    def check_projected_start(self, adapters: Adapters) -> None:
        for flow in self.flows:
            flow.check_projected_start(adapters)


KINDS: tuple[Callable[..., Flow], ...] = (
    Plain,
    LoRAPlus,
    ScaledGD,
    LoRAPro,
    ShrinkA,
    StableLoRA,
    Muon,
    LoRAMuon,
    BaLoRA,
)
FLOWS: dict[str, Callable[..., Flow]] = {kind.name: kind for kind in KINDS}  # type: ignore[attr-defined]


def as_flow(flow: Any) -> Flow:
    """The flow itself, or the flow of that name."""
    must = "be a Flow, or the name of one, as in 'lora-plus:16'"
    require(isinstance(flow, Flow | str), "flow", must, kind(flow))
    return parse_flow(flow) if isinstance(flow, str) else flow


def parse_flow(text: str) -> Flow:
    """A flow by its name, with its numbers after colons: "lora-plus:16", "scaled" or "scaled:1e-3", "shrink-a:0.1"."""
    name, *numbers = text.split(":")
    must = "be " + ", ".join(map(repr, FLOWS)) + ", with a number after a colon, as in 'lora-plus:16'"
    require(name in FLOWS, "flow", must, repr(text))
    most = len(inspect.signature(FLOWS[name]).parameters)
    takes = f"with at most {most} number{'s' * (most > 1)} after colons" if most else "without a number"
    require(len(numbers) <= most, "flow", f"come {takes} for '{name}'", repr(text))
    try:
        return FLOWS[name](*map(float, numbers))
    except TypeError:
        raise InputError(f"flow must come with a number after a colon for '{name}', got {text!r}") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"flow must have a number after the colon, got {text!r}") from None


@jax.custom_jvp
def over_gram(x: Float[Array, "n r"], y: Float[Array, "r k"], damping: Float[Array, ""]) -> Float[Array, "r k"]:
    """(x^T x + damping I)^{-1} y; 0 along columns of x that are 0, which padding makes.

    By a QR factorisation of x, which keeps the digits that x^T x would lose.
    """
    return solve_gram(jnp.concatenate([x, jnp.sqrt(damping) * jnp.eye(x.shape[1], dtype=x.dtype)]), y)


@over_gram.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x, y, damping), (dx, dy, ddamping) = primals, tangents
    z = over_gram(x, y, damping)
    change = dy - dx.T @ (x @ z) - x.T @ (dx @ z) - ddamping * z
    return z, over_gram(x, change, damping)
