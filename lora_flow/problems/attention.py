"""LoRA on the map of an attention head, whose keys and queries are tied: a problem that theory solves as it grows."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.adapter import Adapters
from lora_flow.arrays import AnyArray, real_array
from lora_flow.checks import concrete, kind, require, require_choice, require_instance, require_number
from lora_flow.problems.base import AbstractProblem, Layers

ACTIVATIONS = ("linear", "softmax")
HIDDEN = -1e30  # the pre-activation of a token that is not there


class AttentionLoRA(AbstractProblem):
    r"""LoRA on an attention head: `sum_i ||attention(Z_i + X_i B A X_i^T/D - tr(B A)/D I) - Y_i||_F^2`, and a ridge.

    Each of N sequences i has T tokens, the rows of X_i `(T, D)`. Z_i `(T, T)` is what the frozen head makes of the
    sequence before the activation, and Y_i `(T, T)` the attention that a teacher gives. The activation is linear,
    `a/T`, or the softmax over rows. The ridge adds `ridge/2 (||A||_F^2 + ||B||_F^2)`. The problem has one layer
    `(D, D)`. Adapters that are tied, A = B^T = w^T, stay tied where Z and Y are symmetric and the activation is linear.
    The term with the trace takes the mean over white tokens away, without which the diagonal would dominate.

    This is fine-tuning in the model of Duranthon, Boncoraglio and Zdeborová (arXiv 2606.05899), whose theory for large
    D is `lora_flow.theory.attention`. The loss is a sum over sequences, and time is the flow's for this sum.

    The observables are `q`, ||B A||_F/D, and `train_error`, the mean over sequences without the ridge. Where the
    teacher is known, `overlap` is the cosine between w and w*, that is sqrt(<B A, w* w*^T>/(||B A|| ||w* w*^T||)) in
    general, and `test_error` the mean over new sequences. The latter is exact for linear attention and white tokens,
    and otherwise taken over the sequences that are held out.

    **Arguments:**

    - `tokens`: X, of shape `(N, T, D)`; `labels`: Y, of shape `(N, T, T)`.
    - `frozen`: Z, of shape `(N, T, T)`; 0 by default.
    - `lengths`: the number of tokens of each sequence, `(N,)`, T by default; the others are ignored. A sequence of
      length 0 does not count.
    - `ridge`: lambda', at least 0.
    - `activation`: "linear" or "softmax".
    - `direction`: w* of the teacher, of shape `(D, k)`, where known. `missing`: S0 - S, of shape `(D, D)`, what the
      frozen map S lacks of the teacher's, `Z = (X S X^T - tr S I)/sqrt(D)`; with `direction` only. `noise`: Delta of
      the teacher's noise, of variance Delta/2 off the diagonal of the pre-activations, and Delta on it.
    - `held_out`: another `AttentionLoRA` of the same D and activation, whose train error is the test error.

    **Raises:** `InputError` for shapes that do not match, entries that are not finite, and lengths that are none.
    """

    tokens: Float[Array, "N T D"]
    labels: Float[Array, "N T T"]
    frozen: Float[Array, "N T T"]
    lengths: Float[Array, " N"]
    ridge: Float[Array, ""]
    activation: str = eqx.field(static=True)
    direction: Float[Array, "D k"] | None
    missing: Float[Array, "D D"] | None
    noise: Float[Array, ""]
    held_out: AttentionLoRA | None

    def __init__(
        self,
        tokens: AnyArray,
        labels: AnyArray,
        frozen: AnyArray | None = None,
        lengths: AnyArray | None = None,
        *,
        ridge: Any = 0.0,
        activation: str = "linear",
        direction: AnyArray | None = None,
        missing: AnyArray | None = None,
        noise: Any = 0.0,
        held_out: AttentionLoRA | None = None,
    ):
        self.tokens = _finite("tokens", tokens, 3)
        count, length, size = self.tokens.shape
        self.labels = _finite("labels", labels, 3, (count, length, length))
        zeros = jnp.zeros_like(self.labels)
        self.frozen = zeros if frozen is None else _finite("frozen", frozen, 3, zeros.shape)
        self.lengths = jnp.full(count, float(length)) if lengths is None else _lengths(lengths, count, length)
        self.ridge, self.noise = _not_negative("ridge", ridge), _not_negative("noise", noise)
        require_choice("activation", activation, ACTIVATIONS)
        self.activation = activation
        self.direction = None if direction is None else _finite("direction", direction, 2, (size, None))
        self.missing = None if missing is None else _finite("missing", missing, 2, (size, size))
        must = "come with direction, which the test error needs too"
        require(missing is None or direction is not None, "missing", must, "missing alone")
        if held_out is not None:
            require_instance("held_out", held_out, AttentionLoRA, "be an AttentionLoRA")
            fits = held_out.layers == self.layers and held_out.activation == activation
            told = f"D = {held_out.tokens.shape[2]} and {held_out.activation}"
            require(fits, "held_out", f"be of the same D = {size} and {activation} attention", told)
        self.held_out = held_out

    @property
    def layers(self) -> Layers:
        size = self.tokens.shape[2]
        return ((size, size),)

    def loss(self, adapters: Adapters) -> Float[Array, ""]:
        ((a, b),) = adapters
        return self.misfit(adapters) + self.ridge / 2 * (jnp.sum(a**2) + jnp.sum(b**2))

    def misfit(self, adapters: Adapters) -> Float[Array, ""]:
        """The loss without the ridge."""
        ((a, b),) = adapters
        (count, length, size), rank = self.tokens.shape, b.shape[1]
        chi = (self.tokens.reshape(-1, size) @ jnp.concatenate([b, a.T], axis=1)).reshape(count, length, -1)
        return self.misfit_of(chi[..., :rank], chi[..., rank:], jnp.sum(a * b.T))

    def misfit_of(self, left: Float[Array, "N T r"], right: Float[Array, "N T r"], trace: Array) -> Float[Array, ""]:
        """The same, of X B, X A^T and tr(B A)."""
        _, length, size = self.tokens.shape
        made = self.frozen + (left @ right.mT - trace * jnp.eye(length)[None]) / size
        present = (jnp.arange(length)[None] < self.lengths[:, None]).astype(made.dtype)
        if self.activation == "linear":
            given = made / jnp.maximum(self.lengths, 1)[:, None, None]
        else:
            given = jax.nn.softmax(jnp.where(present[:, None] > 0, made, HIDDEN))
        return jnp.sum(present[:, :, None] * present[:, None] * (given - self.labels) ** 2)

    def fastest_rate(self) -> float:
        """The rate at which small adapters grow: the ridge slows it down, and a large one to nothing."""
        return max(super().fastest_rate() - float(self.ridge), 0.0)

    def observe(self, adapters: Adapters) -> dict[str, Array]:
        ((a, b),) = adapters
        size = self.tokens.shape[2]
        norm = jnp.sqrt(jnp.maximum(jnp.sum((b.T @ b) * (a @ a.T)), jnp.finfo(a.dtype).tiny))  # ||B A||_F
        counted = jnp.maximum(jnp.sum(self.lengths > 0), 1)
        seen = {"q": norm / size, "train_error": self.misfit(adapters) / counted}
        if self.direction is not None:
            shared = jnp.sum((self.direction.T @ b) * (a @ self.direction).T)
            whole = norm * jnp.sqrt(jnp.sum((self.direction.T @ self.direction) ** 2))
            seen["overlap"] = jnp.sqrt(jnp.maximum(shared, 0.0) / whole)
        if self.held_out is not None:
            seen["test_error"] = self.held_out.observe(adapters)["train_error"]
        elif self.missing is not None and self.direction is not None and self.activation == "linear":
            left = self.missing / np.sqrt(size) + (self.direction @ self.direction.T - b @ a) / size
            diagonal = jnp.sum(jnp.where(self.lengths > 0, 1 / jnp.maximum(self.lengths, 1), 0.0)) / counted
            seen["test_error"] = jnp.sum(left**2) + diagonal * jnp.sum(left * left.T) + self.noise / 2 * (1 + diagonal)
        return seen

    def meanings(self) -> dict[str, str]:
        return {
            "loss": "loss: sum over sequences of ||attention - label||_F^2, and the ridge",
            "q": "norm of B A over D: |w|^2/D where A = B^T = w^T",
            "train_error": "error on the sequences: mean of ||attention - label||_F^2, without the ridge",
            "test_error": "error on new sequences: mean of ||attention - label||_F^2",
            "overlap": "cosine between w and the teacher's w*",
            "effective_noise": "De: variance of what the frozen map lacks of the teacher's pre-activations",
        }

    def characteristics(self) -> dict[str, float | int]:
        """`effective_noise`, Delta/2 + ||S0 - S||_F^2/D, where S0 - S is known."""
        if self.missing is None:
            return {}
        return {"effective_noise": float(self.noise / 2 + jnp.sum(self.missing**2) / len(self.missing))}

    def padded(self, sequences: int, length: int) -> AttentionLoRA:
        """The same problem with arrays of that many sequences and tokens, the further ones of which do not count."""
        (count, now, _), held = self.tokens.shape, self.held_out

        def pad(array: AnyArray, *axes: int) -> np.ndarray:
            widths = [(0, sequences - count), *((0, length - now) for _ in axes)]
            return np.pad(np.asarray(array), widths + [(0, 0)] * (array.ndim - len(widths)))

        return AttentionLoRA(
            pad(self.tokens, 1),
            pad(self.labels, 1, 2),
            pad(self.frozen, 1, 2),
            pad(self.lengths),
            ridge=self.ridge,
            activation=self.activation,
            direction=self.direction,
            missing=self.missing,
            noise=self.noise,
            held_out=None if held is None else held.padded(len(held.tokens), length),
        )

    def __str__(self) -> str:
        count, size = int(np.sum(np.asarray(self.lengths) > 0)), self.tokens.shape[2]
        longest = int(np.max(np.asarray(self.lengths)))
        about = f"{count} sequences of {longest} tokens, {self.activation}; ridge {float(self.ridge):g}"
        noise = [f"; effective noise {value:.4g}" for value in self.characteristics().values()]
        return f"{type(self).__name__}: D = {size}, {about}{''.join(noise)}"


def _finite(name: str, value: AnyArray, axes: int, shape: tuple[int | None, ...] | None = None) -> Array:
    array = real_array(name, value)
    fits = array.ndim == axes and 0 not in array.shape
    exactly = f"have the shape {shape}".replace("None", "k")
    wanted = f"have {axes} axes, none of them empty" if shape is None else exactly
    if fits and shape is not None:
        fits = all(want is None or got == want for got, want in zip(array.shape, shape, strict=True))
    require(fits, name, wanted, f"shape {array.shape}")
    known = concrete(array)
    require(known is None or np.all(np.isfinite(known)), name, "be finite", "entries that are not")
    return array


def _lengths(value: AnyArray, count: int, length: int) -> Array:
    must = f"be {count} whole numbers from 0 to {length}, not all 0"
    array = real_array("lengths", value, must)
    require(array.shape == (count,), "lengths", must, f"shape {array.shape}")
    known = concrete(array)
    if known is not None:
        fits = np.all((known >= 0) & (known <= length) & (known == np.round(known))) and np.any(known > 0)
        require(fits, "lengths", must, kind(known.tolist()))
    return array


def _not_negative(name: str, value: Any) -> Array:
    number = real_array(name, value, "be at least 0 and finite")
    require_number(name, number, "be at least 0 and finite", lambda known: known >= 0)
    return number
