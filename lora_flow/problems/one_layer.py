"""One adapted layer by itself: a matrix to learn, a regression on data, a classification."""

from __future__ import annotations

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lora_flow.adapter import Adapter, Adapters
from lora_flow.algebra.diagonal import as_matrix, check_task, dense
from lora_flow.algebra.spectra import frobenius_norm, singular_values, spectral_norm
from lora_flow.arrays import AnyArray, as_labels, real_array
from lora_flow.checks import require, require_choice, require_number
from lora_flow.problems.base import ROUNDING, AbstractProblem, Layers, matrix_rank
from lora_flow.problems.factorization import spectrum_text

ACTIVATIONS = ("linear", "relu")


class AdaptedLayer(AbstractProblem):
    """LoRA on one layer: a loss of the change `s B A` of its weight, with s LoRA's output multiplier, `scaling`."""

    scaling: eqx.AbstractVar[Float[Array, ""]]
    weight: eqx.AbstractVar[Float[Array, "out in"] | None]

    of_products = True

    @abc.abstractmethod
    def loss_of(self, change: Float[Array, "out in"]) -> Float[Array, ""]:
        """The loss with the layer's weight changed by `change`."""

    @abc.abstractmethod
    def descent_of(self, change: Float[Array, "out in"]) -> Float[Array, "out in"]:
        """Minus the gradient of that."""

    @property
    def weights(self) -> tuple[Float[Array, "out in"], ...] | None:
        """The pretrained weight, for initialisations from it; None where it is not known."""
        return None if self.weight is None else (self.weight,)

    def loss(self, adapters: Adapters) -> Float[Array, ""]:
        return self.loss_of(self._change(adapters))

    def product_descent(self, adapters: Adapters) -> Float[Array, "out in"]:
        """-dL/d(B A)."""
        return self.scaling * self.descent_of(self._change(adapters))

    def field(self, adapters: Adapters) -> Adapters:
        """The gradient flow's right-hand side, B^T D and D A^T with D = -dL/d(B A)."""
        ((a, b),) = adapters
        descent = self.product_descent(adapters)
        return (Adapter(b.T @ descent, descent @ a.T),)

    def linearised_task(self) -> tuple[Float[Array, "out in"]]:
        return (self.scaling * self.descent_of(jnp.zeros(self.layers[0])),)

    def __str__(self) -> str:
        (n_out, n_in), scaling = self.layers[0], float(self.scaling)
        return f"{type(self).__name__}: {n_out} x {n_in}{self._about()}; scaling {scaling:g}"

    def _about(self) -> str:
        return ""

    def _change(self, adapters: Adapters) -> Float[Array, "out in"]:
        ((a, b),) = adapters
        return self.scaling * (b @ a)


class SingleLayer(AdaptedLayer):
    r"""LoRA on one linear layer: `1/2 ||shift - s B A||_F^2`, with `shift` of shape `(out, in)`.

    The scaling s is LoRA's output multiplier. With the negative gradient of a network's layer as its shift, this is the
    problem that the layer's adapter solves first, while it is small. Only initialisations from the weight need the
    pretrained `weight`, `(out, in)`.

    **Raises:** `InputError` unless the shift is a finite matrix that is not zero, and the scaling is positive.
    """

    shift: Float[Array, "out in"]
    scaling: Float[Array, ""]
    weight: Float[Array, "out in"] | None

    def __init__(self, shift: AnyArray, scaling: Any = 1.0, weight: AnyArray | None = None):
        self.shift, self.scaling = _shift(shift), _scaling(scaling)
        self.weight = None if weight is None else _weight(weight, self.shift.shape)

    @property
    def layers(self) -> Layers:
        return (self.shift.shape,)  # type: ignore[return-value]

    def loss_of(self, change: Float[Array, "out in"]) -> Float[Array, ""]:
        return 0.5 * jnp.sum((self.shift - change) ** 2)

    def descent_of(self, change: Float[Array, "out in"]) -> Float[Array, "out in"]:
        return self.shift - change

    def _about(self) -> str:
        return _spectrum(self.shift)

    def task_sizes(self) -> tuple[Array]:
        return (self.scaling * frobenius_norm(self.shift),)

    def smoothness(self) -> Float[Array, ""]:
        """The Lipschitz constant of dL/d(B A)."""
        return self.scaling**2

    def lowest_loss(self, rank: int, frozen: np.ndarray | None = None) -> float:
        """The least loss at a rank: half the squared norm of the rest after the best approximation (Eckart and Young).

        `frozen` is `s B_0 A_0` where the frozen weight is `W_0 - s B_0 A_0`.
        """
        return tail(np.asarray(self.shift) + (0.0 if frozen is None else frozen), rank)


class Regression(AdaptedLayer):
    r"""LoRA on one layer of data: `1/(2 N) ||f(X (W + s B A)^T) - f(X (W + shift)^T)||_F^2`, f linear or ReLU.

    The setting of LoRA-One (arXiv 2502.01235, section 2): N samples, the rows of X, and labels without noise from a
    weight that differs from the pretrained one by `shift`.

    **Arguments:** `inputs` X of shape `(N, in)`, `shift` of shape `(out, in)`, the pretrained `weight` of the same
    shape, optional for a linear layer, `activation` "linear" or "relu", and the `scaling` s.

    **Raises:** `InputError` for shapes that do not match, entries that are not finite, or a shift of zero.
    """

    features: Float[Array, "samples in"]  # X/sqrt(N), or for a linear layer with N > in its triangular factor
    shift: Float[Array, "out in"]
    weight: Float[Array, "out in"] | None
    scaling: Float[Array, ""]
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        inputs: AnyArray,
        shift: AnyArray,
        weight: AnyArray | None = None,
        activation: str = "linear",
        scaling: Any = 1.0,
    ):
        require_choice("activation", activation, ACTIVATIONS)
        self.shift, self.scaling, self.activation = _shift(shift), _scaling(scaling), activation
        require(weight is not None or activation == "linear", "weight", "be given for a layer with an activation", None)
        self.weight = None if weight is None else _weight(weight, self.shift.shape)
        samples = _inputs(inputs, self.shift.shape[1])
        features = samples / np.sqrt(len(samples))
        thin = activation == "linear" and features.shape[0] > features.shape[1]
        self.features = jnp.linalg.qr(features)[1] if thin else features

    @property
    def layers(self) -> Layers:
        return (self.shift.shape,)  # type: ignore[return-value]

    @property
    def layer_inputs(self) -> tuple[Float[Array, "samples in"]]:
        """The layer's inputs, up to a rotation of the samples and their number."""
        return (self.features,)

    def loss_of(self, change: Float[Array, "out in"]) -> Float[Array, ""]:
        return 0.5 * jnp.sum(self._residual(change)[0] ** 2)

    def descent_of(self, change: Float[Array, "out in"]) -> Float[Array, "out in"]:
        residual, slope = self._residual(change)
        return (residual * slope).T @ self.features

    def _about(self) -> str:
        return f", {self.activation}, {len(self.features)} rows of data{_spectrum(self.shift)}"

    def task_sizes(self) -> tuple[Array]:
        return (self.scaling * frobenius_norm(self.features) ** 2 * frobenius_norm(self.shift),)

    def smoothness(self) -> Float[Array, ""]:
        """The Lipschitz constant of dL/d(B A), of a linear layer: s^2 times the largest eigenvalue of X^T X/N."""
        require(self.activation == "linear", "activation", "be 'linear' for a smooth loss", repr(self.activation))
        return (self.scaling * spectral_norm(self.features)) ** 2

    def lowest_loss(self, rank: int, frozen: np.ndarray | None = None) -> float:
        """As for `SingleLayer`, of a linear layer; NaN with an activation, where it is not known."""
        if self.activation != "linear":
            return float("nan")
        shift = np.asarray(self.shift) + (0.0 if frozen is None else frozen)
        return tail(shift @ np.asarray(self.features).T, rank)

    def _residual(self, change: Float[Array, "out in"]) -> tuple[Array, Array]:
        """The outputs' residual, `(samples, out)`, and the activation's derivative there."""
        missing = self.features @ (self.shift - change).T
        if self.weight is None or self.activation == "linear":
            return missing, jnp.ones_like(missing)
        # where both are active their difference is what a linear layer lacks, to the last digit
        now = self.features @ (self.weight + change).T
        goal = self.features @ (self.weight + self.shift).T
        both = (now > 0) & (goal > 0)
        return jnp.where(both, missing, jax.nn.relu(goal) - jax.nn.relu(now)), jnp.where(now > 0, 1.0, 0.0)


class SoftmaxRegression(AdaptedLayer):
    r"""LoRA on a linear classifier: the mean cross-entropy of `softmax(X (W + s B A)^T)`.

    The loss is smooth in the weight and bounded below, but not quadratic; its least value is not 0.

    **Arguments:** `inputs` X of shape `(N, in)`, `labels` of shape `(N,)`, integers from 0, the pretrained `weight` of
    shape `(out, in)` with a row for each class, and the `scaling` s.

    **Raises:** `InputError` for shapes that do not match, entries that are not finite, or labels beyond the classes.
    """

    inputs: Float[Array, "samples in"]
    labels: Int[Array, " samples"]
    weight: Float[Array, "out in"]
    scaling: Float[Array, ""]

    def __init__(self, inputs: AnyArray, labels: AnyArray, weight: AnyArray, scaling: Any = 1.0):
        self.weight, self.scaling = dense(as_matrix("weight", weight)), _scaling(scaling)
        classes, features = self.weight.shape
        self.inputs, self.labels = _inputs(inputs, features), as_labels(labels, classes)
        samples, count = len(self.inputs), len(self.labels)
        require(count == samples, "labels", f"be {samples}, one a sample", count)

    @property
    def layers(self) -> Layers:
        return (self.weight.shape,)  # type: ignore[return-value]

    @property
    def layer_inputs(self) -> tuple[Float[Array, "samples in"]]:
        return (self.inputs,)

    def loss_of(self, change: Float[Array, "out in"]) -> Float[Array, ""]:
        return cross_entropy(self._logits(change), self.labels)

    def descent_of(self, change: Float[Array, "out in"]) -> Float[Array, "out in"]:
        wanted = jax.nn.one_hot(self.labels, len(self.weight), dtype=self.weight.dtype)
        return (wanted - jax.nn.softmax(self._logits(change))).T @ self.inputs / len(self.inputs)

    def _about(self) -> str:
        return f", {len(self.inputs)} samples"

    def task_sizes(self) -> tuple[Array]:
        return (self.scaling * frobenius_norm(self.inputs) * np.sqrt(2 / len(self.inputs)),)

    def smoothness(self) -> Float[Array, ""]:
        """A Lipschitz constant of dL/d(B A): s^2 ||X||_2^2/(2 N), since the softmax has derivatives up to 1/2."""
        return (self.scaling * spectral_norm(self.inputs)) ** 2 / (2 * len(self.inputs))

    def rounding_floor(self, adapters: Adapters) -> Float[Array, ""]:
        return cross_entropy_floor(self.weight.dtype)

    def _logits(self, change: Float[Array, "out in"]) -> Float[Array, "samples out"]:
        return self.inputs @ (self.weight + change).T


def cross_entropy(logits: Float[Array, "samples classes"], labels: Int[Array, " samples"]) -> Float[Array, ""]:
    """The mean of -log p of the labels, from logits minus their largest, which limits rounding."""
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))


def cross_entropy_floor(dtype: Any) -> Float[Array, ""]:
    """The rounding floor of a mean cross-entropy, 100 eps: not squared, as that of a sum of squares is.

    A sample's -log p = log(1 + sum of exp(other logits - its own)) is known to half an eps of the 1, however small the
    sum; the logits, known to some eps of themselves, move it only in proportion to itself. Measured, it is within
    1 eps of 60 digits for logits up to 1e3, so that above 100 eps it is known to 0.003 decades.
    """
    return jnp.asarray(ROUNDING * jnp.finfo(dtype).eps, dtype)


def _shift(value: AnyArray) -> Array:
    shift = dense(as_matrix("shift", value))
    check_task("shift", shift)
    return shift


def _weight(value: AnyArray, shape: tuple[int, ...]) -> Array:
    weight = dense(as_matrix("weight", value))
    require(weight.shape == shape, "weight", f"have the shift's shape {shape}", weight.shape)
    return weight


def _inputs(value: AnyArray, width: int) -> Array:
    inputs = dense(as_matrix("inputs", value))
    require(inputs.shape[1] == width, "inputs", f"have {width} columns, as the weight has", f"shape {inputs.shape}")
    return inputs


def _scaling(value: Any) -> Array:
    scaling = real_array("scaling", value, "be one number")
    require_number("scaling", scaling, "be positive and finite", lambda known: known > 0)
    return scaling


def _spectrum(shift: Array) -> str:
    sigma = singular_values(shift)
    return f"; {spectrum_text(sigma[: matrix_rank(sigma, shift.shape)])}"


def tail(matrix: np.ndarray, rank: int) -> float:
    """Half the squared norm of the rest after the best approximation of that rank (Eckart and Young)."""
    sigma = singular_values(matrix)
    return 0.5 * float(np.sum(sigma[rank : matrix_rank(sigma, matrix.shape)] ** 2))
