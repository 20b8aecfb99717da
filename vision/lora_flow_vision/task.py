"""Fine-tuning a classifier by LoRA as a `lora_flow.Problem`: the mean cross-entropy over data, of the adapters."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lora_flow import Adapted, Adapters, adapted
from lora_flow.arrays import AnyArray, as_labels, numbers
from lora_flow.checks import require
from lora_flow.problems.base import AbstractProblem, Layers
from lora_flow.problems.one_layer import cross_entropy, cross_entropy_floor
from lora_flow_vision.lora import attach
from lora_flow_vision.model import ViT

CHUNK = 256  # images that pass through a network together


class Classification(AbstractProblem):
    """The mean cross-entropy of `logits(adapters, inputs)`: the base of the two tasks below."""

    inputs: eqx.AbstractVar[Float[Array, "count ..."]]
    labels: eqx.AbstractVar[Int[Array, " count"]]

    @abc.abstractmethod
    def logits(self, adapters: Adapters, inputs: Array) -> Float[Array, "batch classes"]: ...

    def loss(self, adapters: Adapters) -> Float[Array, ""]:
        return cross_entropy(self.logits(adapters, self.inputs), self.labels)

    def batch_loss(self, adapters: Adapters, chosen: Int[Array, " batch"]) -> Float[Array, ""]:
        """The loss over some of the data."""
        return cross_entropy(self.logits(adapters, self.inputs[chosen]), self.labels[chosen])

    def evaluate(self, adapters: Adapters, inputs: Array, labels: Int[Array, " count"]) -> tuple[Array, Array]:
        """The mean cross-entropy and the accuracy on other data."""
        logits = self.logits(adapters, inputs)
        return cross_entropy(logits, labels), jnp.mean(logits.argmax(-1) == labels)

    def rounding_floor(self, adapters: Adapters) -> Float[Array, ""]:
        """The floor of the coarsest type that anything is computed in."""
        kinds = {leaf.dtype for leaf in jax.tree.leaves(eqx.filter((self, adapters), eqx.is_inexact_array))}
        return cross_entropy_floor(max(kinds, key=lambda dtype: float(jnp.finfo(dtype).eps)))


class HeadTask(Classification):
    """LoRA on the head alone: softmax regression on features that are computed once.

    `inputs` are features `(count, width)`, `weight` is `(classes, width)` and `bias` `(classes,)`; logits are
    `(W + s B A) phi + bias` (arXiv 2503.06982, section 5.2).
    """

    inputs: Float[Array, "count width"]
    labels: Int[Array, " count"]
    weight: Float[Array, "classes width"]
    bias: Float[Array, " classes"]
    scaling: Float[Array, ""]

    def __init__(
        self,
        features: AnyArray,
        labels: AnyArray,
        weight: AnyArray,
        bias: AnyArray,
        scaling: float = 1.0,
        dtype: Any = float,
    ):
        given = {"features": features, "weight": weight, "bias": bias, "scaling": scaling}
        arrays = {name: jnp.asarray(numbers(name, one), dtype) for name, one in given.items()}
        self.inputs, self.weight, self.bias, self.scaling = arrays.values()
        require(self.weight.ndim == 2, "weight", "have two dimensions, classes and features", self.weight.shape)
        classes, width = self.weight.shape
        self.labels = as_labels(labels, classes)
        require(self.inputs.shape == (len(self.labels), width), "features", f"have {width} columns", self.inputs.shape)
        require(self.bias.shape == (classes,), "bias", f"have shape {(classes,)}", self.bias.shape)

    @property
    def layers(self) -> Layers:
        return (self.weight.shape,)  # type: ignore[return-value]

    def logits(self, adapters: Adapters, inputs: Array) -> Float[Array, "batch classes"]:
        ((a, b),) = adapters
        weight = self.weight + self.scaling * (b @ a)
        return inputs @ weight.astype(inputs.dtype).T + self.bias[None]

    def linearised_task(self) -> tuple[Float[Array, "classes width"]]:
        """s times minus the one-step full gradient, `-dL/dW = (1/N) sum_j (y_j - softmax(W phi_j + bias)) phi_j^T`."""
        logits = self.inputs @ self.weight.T + self.bias[None]
        missed = jax.nn.one_hot(self.labels, len(self.weight), dtype=logits.dtype) - jax.nn.softmax(logits)
        return (self.scaling * missed.T @ self.inputs / len(self.labels),)


class NetworkTask(Classification):
    """LoRA on any linear layers of a model: `inputs` are images, `(count, size, size, channels)`.

    All that is known of it is `network`'s, the problem that `lora_flow.adapted` makes of the model. The loss takes
    low-rank products instead, so that no gradient in a whole weight is computed.
    """

    network: Adapted

    def __init__(
        self, model: ViT, images: AnyArray, labels: AnyArray, layers: str | Sequence[str], scaling: float = 1.0
    ):
        """`layers` are patterns of the layers that carry an adapter; `model` is left as it is."""
        images, labels = jnp.asarray(numbers("images", images)), as_labels(labels, model.config.classes)
        require(len(images) == len(labels), "labels", f"be {len(images)}, one an image", len(labels))
        self.network = adapted(_mean_cross_entropy, model, layers, data=(images, labels), scaling=scaling)

    @property  # type: ignore[misc]
    def inputs(self) -> Float[Array, "count size size channels"]:  # type: ignore[override]
        return self.network.data[0]

    @property  # type: ignore[misc]
    def labels(self) -> Int[Array, " count"]:  # type: ignore[override]
        return self.network.data[1]

    @property
    def paths(self) -> tuple[str, ...]:
        return self.network.paths

    @property
    def layers(self) -> Layers:
        return self.network.layers

    @property
    def scaling(self) -> Array:
        return self.network.scaling

    @property
    def weights(self) -> tuple[Float[Array, "out in"], ...]:
        return self.network.weights

    @property
    def layer_inputs(self) -> tuple[Float[Array, "samples in"], ...] | None:
        return self.network.layer_inputs

    def linearised_task(self) -> tuple[Float[Array, "out in"], ...]:
        """s times minus the one-step full gradient of every layer's weight."""
        return self.network.linearised_task()

    def logits(self, adapters: Adapters, inputs: Array) -> Float[Array, "batch classes"]:
        return _logits(lambda: self.model(adapters), inputs)

    def model(self, adapters: Adapters) -> ViT:
        """The network with these adapters."""
        model = self.network.parameters()
        attach(model, dict(zip(self.paths, adapters, strict=True)), self.scaling)
        return model


def _mean_cross_entropy(model: ViT, images: Array, labels: Array) -> Float[Array, ""]:
    return cross_entropy(_logits(lambda: model, images), labels)


def _logits(model: Callable[[], ViT], images: Array) -> Float[Array, "batch classes"]:
    """Of images that pass in chunks where they are many; no chunk's activations are kept for the gradient."""
    if len(images) <= CHUNK:
        return model()(images)
    return jax.lax.map(jax.checkpoint(lambda image: model()(image[None])[0]), images, batch_size=CHUNK)
