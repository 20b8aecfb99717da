"""One adapted layer by itself."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from lora_flow.adapter import Adapter, Adapters
from lora_flow.checks import concrete, require
from lora_flow.problem import Layers


class SingleLayer(eqx.Module):
    r"""LoRA on one linear layer: `1/2 ||shift - s B A||_F^2`, with `shift` of shape `(out, in)`.

    The scaling s is LoRA's output multiplier. With the negative gradient of a network's layer as its shift this is what
    that layer's adapter learns first, while it is small.

    **Raises:** `InputError` unless the shift is a finite matrix that is not zero, and the scaling is positive.
    """

    shift: Float[Array, "out in"]
    scaling: Float[Array, ""]

    def __init__(self, shift: ArrayLike, scaling: float | Array = 1.0):
        self.shift, self.scaling = jnp.asarray(shift, float), jnp.asarray(scaling, float)
        require(self.shift.ndim == 2, "shift", "be a matrix", f"shape {self.shift.shape}")
        values, s = concrete(self.shift), concrete(self.scaling)
        finite = values is None or bool(np.isfinite(values).all())
        require(finite, "shift", "be finite", "entries that are NaN or infinite")
        require(values is None or values.any(), "shift", "have a non-zero entry", "nothing to learn")
        require(s is None or s > 0, "scaling", "be positive", scaling)

    @property
    def layers(self) -> Layers:
        return (self.shift.shape,)  # type: ignore[return-value]

    def loss(self, adapters: Adapters) -> Float[Array, ""]:
        return 0.5 * jnp.sum(self._residual(adapters) ** 2)

    def field(self, adapters: Adapters) -> Adapters:
        """The gradient flow's right-hand side, `s B^T E` and `s E A^T` with E the residual."""
        ((a, b),) = adapters
        residual = self.scaling * self._residual(adapters)
        return (Adapter(b.T @ residual, residual @ a.T),)

    def linearised_task(self) -> tuple[Float[Array, "out in"]]:
        return (self.scaling * self.shift,)

    def _residual(self, adapters: Adapters) -> Float[Array, "out in"]:
        ((a, b),) = adapters
        return self.shift - self.scaling * (b @ a)
