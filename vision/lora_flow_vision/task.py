"""Fine-tuning a classifier by LoRA as a `lora_flow.Problem`: the mean cross-entropy over data, of the adapters."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lora_flow import Adapter, Adapters, zero_adapters
from lora_flow.arrays import AnyArray, as_labels, numbers
from lora_flow.checks import require
from lora_flow.problems.base import AbstractProblem, Layers
from lora_flow.problems.one_layer import cross_entropy, cross_entropy_floor
from lora_flow_vision.lora import attach, linear_layers
from lora_flow_vision.model import ViT

CHUNK = 256  # images that pass through a network together


class Classification(AbstractProblem):
    """The mean cross-entropy of `logits(adapters, inputs)`: the base of the two tasks below."""

    inputs: Float[Array, "count ..."]
    labels: Int[Array, " count"]

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
    """LoRA on any linear layers of a model: `inputs` are images, `(count, size, size, channels)`."""

    frozen: Any
    graph: Any = eqx.field(static=True)
    paths: tuple[str, ...] = eqx.field(static=True)
    shapes: Layers = eqx.field(static=True)

    def __init__(self, model: ViT, images: AnyArray, labels: AnyArray, scaling: Mapping[str, float]):
        """`scaling` names the layers that carry an adapter, with their output multipliers; `model` is left as it is."""
        self.inputs, self.labels = jnp.asarray(numbers("images", images)), as_labels(labels, model.config.classes)
        require(
            len(self.inputs) == len(self.labels), "labels", f"be {len(self.inputs)}, one an image", len(self.labels)
        )
        found = linear_layers(model)
        unknown = sorted(set(scaling) - set(found))
        require(not unknown, "scaling", f"name layers of the model, {', '.join(found)}", ", ".join(unknown))
        self.paths = tuple(scaling)
        self.shapes = tuple((found[path].out_features, found[path].in_features) for path in scaling)
        carrier = nnx.clone(model)
        attach(carrier, dict(zip(self.paths, zero_adapters(self.shapes, rank=1), strict=True)), scaling)
        graph, _, frozen = nnx.split(carrier, nnx.LoRAParam, ...)  # type: ignore[misc]
        self.graph, self.frozen = graph, frozen

    @property
    def layers(self) -> Layers:
        return self.shapes

    def logits(self, adapters: Adapters, inputs: Array) -> Float[Array, "batch classes"]:
        def one(image: Array) -> Array:
            return self.model(adapters)(image[None])[0]

        if len(inputs) > CHUNK:
            return jax.lax.map(jax.checkpoint(one), inputs, batch_size=CHUNK)  # keeping no chunk's activations
        return self.model(adapters)(inputs)

    def linearised_task(self) -> tuple[Float[Array, "out in"], ...]:
        """s times minus the one-step full gradient of every layer's weight.

        With A = 0 and B = I the gradient with respect to A is that with respect to the weight.
        """
        starts = tuple(Adapter(jnp.zeros(shape), jnp.eye(shape[0])) for shape in self.shapes)
        return tuple(-slope.a for slope in jax.grad(self.loss)(starts))

    def model(self, adapters: Adapters) -> ViT:
        """The network with these adapters."""
        state: Any = {}
        for path, adapter in zip(self.paths, adapters, strict=True):
            *parents, name = (int(part) if part.isdigit() else part for part in path.split("/"))
            place = state
            for part in parents:
                place = place.setdefault(part, {})
            place[name] = {"a": nnx.LoRAParam(adapter.a), "b": nnx.LoRAParam(adapter.b)}
        return nnx.merge(self.graph, nnx.State(state), self.frozen)
