"""LoRA on the matrices of any JAX model: a loss of its parameters, as a problem."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.adapter import Adapters
from lora_flow.arrays import numbers, real_array
from lora_flow.checks import InputError, kind, one_line, require, require_number
from lora_flow.problems.base import AbstractProblem, Layers
from lora_flow.problems.choice import Chosen, choose, letters_by_pattern, matrices
from lora_flow.problems.kernels import fold, folded_shape, unfold
from lora_flow.problems.paths import ALL, leaves_by_path
from lora_flow.problems.uses import uses


class Adapted(AbstractProblem):
    """A loss of a model's parameters, of which some matrices carry adapters; `adapted` makes one.

    With A and B of a layer, its weight is `W + s B A`, with s the `scaling`. All arrays of the parameters and the data
    are inputs of the compiled program, and copies: later changes to a model do not reach the problem.
    """

    arrays: tuple[Array | None, ...]  # the parameters' leaves, None where one is no array
    data: tuple[Any, ...]
    scaling: Float[Array, ""]
    function: Callable[..., Array]
    rest: tuple[Any, ...]  # the parameters' other leaves, activations for instance
    structure: Any = eqx.field(static=True)
    chosen: tuple[Chosen, ...] = eqx.field(static=True)

    of_products = True

    @property
    def paths(self) -> tuple[str, ...]:
        """The path of each adapted layer."""
        return tuple(one.path for one in self.chosen)

    @property
    def layers(self) -> Layers:
        return tuple(folded_shape(one.letters, kernel.shape) for one, kernel in self._kernels())

    @property
    def weights(self) -> tuple[Float[Array, "out in"], ...]:
        """The pretrained weight of each layer."""
        return tuple(fold(kernel, one.letters).astype(float) for one, kernel in self._kernels())

    @property
    def layer_inputs(self) -> tuple[Float[Array, "samples in"], ...] | None:
        """The inputs of each layer in the loss at the pretrained weights, up to a rotation of many samples.

        None where one is out of sight: in a loop, or where the layer is no product of matrices.
        """
        places = [one.place for one in self.chosen]
        kernels = [kernel for _, kernel in self._kernels()]
        found = uses(lambda kernels: self.loss_with(dict(zip(places, kernels, strict=True))), kernels, inputs=True)
        seen = [[use.inputs for use in one.uses] for one in found]
        if not all(found and all(x is not None for x in found) for found in seen):
            return None
        joined = (jnp.concatenate([jnp.asarray(x, float) for x in found]) for found in seen)
        return tuple(jnp.linalg.qr(x)[1] if len(x) > x.shape[1] else x for x in joined)

    def parameters(self, adapters: Adapters | None = None) -> Any:
        """The model's parameters with `s B A` added to the adapted ones; without adapters as they were given."""
        return self._with({} if adapters is None else self._changed(self._changes(adapters)))

    def loss(self, adapters: Adapters) -> Float[Array, ""]:
        return self.loss_of(self._changes(adapters))

    def loss_of(self, changes: Sequence[Array]) -> Float[Array, ""]:
        """The loss with a change of each layer's weight, `(out, in)`."""
        return self.loss_with(self._changed(changes))

    def loss_with(self, arrays: Mapping[int, Array]) -> Any:
        """The loss with other arrays in some places of the parameters' leaves."""
        return self.function(self._with(arrays), *self.data)

    def linearised_task(self) -> tuple[Float[Array, "out in"], ...]:
        """-s dL/dW of each layer."""
        slopes = jax.grad(self.loss_of)(tuple(map(jnp.zeros, self.layers)))
        return tuple(-self.scaling * slope for slope in slopes)

    def product_descent(self, adapters: Adapters) -> Float[Array, "out in"]:
        (slope,) = jax.grad(self.loss_of)(self._changes(adapters))
        return -self.scaling * slope

    def summary(self) -> dict[str, Any]:
        return {"paths": list(self.paths)}

    def __str__(self) -> str:
        shapes = (f"{path} {n_out} x {n_in}" for path, (n_out, n_in) in zip(self.paths, self.layers, strict=True))
        return f"Adapted: {', '.join(shapes)}; scaling {float(self.scaling):g}"

    def _kernels(self) -> list[tuple[Chosen, Any]]:
        return [(one, self.arrays[one.place]) for one in self.chosen]

    def _changes(self, adapters: Adapters) -> tuple[Array, ...]:
        return tuple(self.scaling * (b @ a) for a, b in adapters)

    def _changed(self, changes: Sequence[Array]) -> dict[int, Array]:
        """The adapted kernels with a change of their matrices, by place."""
        return {
            one.place: kernel + unfold(change, one.letters, kernel.shape).astype(kernel.dtype)
            for (one, kernel), change in zip(self._kernels(), changes, strict=True)
        }

    def _with(self, arrays: Mapping[int, Array]) -> Any:
        leaves = [arrays.get(place, array) for place, array in enumerate(self.arrays)]
        return jax.tree.unflatten(self.structure, eqx.combine(leaves, list(self.rest)))


def adapted(
    loss: Callable[..., Any],
    params: Any,
    layers: str | Sequence[str] | Mapping[str, str] = ALL,
    *,
    data: Sequence[Any] = (),
    scaling: Any = 1.0,
) -> Adapted:
    """Any JAX model as a problem: LoRA on matrices of its parameters, `W + s B A` in place of W.

    `loss(params, *data)` is a scalar that is at least 0, in JAX alone. `params` is any PyTree: nested dictionaries,
    Linen's variables, an NNX module or its state, an Equinox module. It is copied, and stays as it is.

    **Arguments:** `layers` chooses the matrices by regular expressions that match the end of a path from a slash on,
    without a last `kernel` or `weight`: `"Dense_0"`, `"attention/(query|value)"`; one, or several; `"all"` is each
    matrix that the loss multiplies by. Which axes are a layer's inputs is read off the loss, where they are what is
    summed over. Where that cannot be read, in a loop over stacked layers or of an embedding, a mapping from patterns to
    letters says it, "i" for the axes of inputs and "o" for those of outputs: `{"embedding": "io"}`. `data` are PyTrees
    of arrays, the further arguments of the loss, which then can change from one problem of a sweep to another without
    another program. `scaling` is LoRA's output multiplier s.

    **Returns:** a problem with `layers`, `(out, in)` each, in the order of the patterns and then of the paths, which
    are `paths`; with `weights`, and with `layer_inputs` where the loss has each layer in sight.

    **Raises:** `InputError` for a pattern that matches nothing, for an array that is no matrix or that the loss does
    not multiply by, for entries that are not finite, and for a loss that is no finite number of at least 0.
    """
    require(callable(loss), "loss", "be a function loss(params, *data)", kind(loss))
    _check_data(loss, data)
    scaling = real_array("scaling", scaling, "be one number")
    require_number("scaling", scaling, "be positive and finite", lambda known: known > 0)
    told = letters_by_pattern(layers)
    names, leaves, structure = leaves_by_path(params)
    own = [_as_jax(f"'{name}' of params", leaf) for name, leaf in zip(names, leaves, strict=True)]
    arrays, rest = map(tuple, eqx.partition(own, eqx.is_array))
    matched = {pattern: matrices(pattern, names, arrays) for pattern in told}
    given = jax.tree.map(functools.partial(_as_jax, "data"), tuple(data))
    problem = Adapted(arrays, given, scaling, loss, rest, structure, ())
    _check_loss(problem.loss_with({}))
    return dataclasses.replace(problem, chosen=choose(told, matched, names, arrays, problem.loss_with))


def _check_data(loss: Any, data: Any) -> None:
    """Raises unless the loss takes the parameters and the data."""
    require(isinstance(data, (tuple, list)), "data", "be a tuple of the loss's further arguments", kind(data))
    try:
        inspect.signature(loss).bind(None, *data)
    except TypeError as error:
        raise InputError(f"data must be the further arguments of loss(params, *data), got {one_line(error)}") from error
    except ValueError:  # of a function that does not say what it takes
        pass


def _check_loss(value: Any) -> None:
    """Raises unless what the loss returned is a finite number of at least 0."""
    must = "be one finite real number of at least 0, at the parameters as they are"
    require_number("loss(params, *data)", value, must, lambda known: known >= 0)


def _as_jax(name: str, leaf: Any) -> Any:
    """The array as one of JAX's, a copy of its own type; anything else as it is.

    **Raises:** `InputError` for an array of what are no numbers or truth values, and for one with masked entries.
    """
    if not isinstance(leaf, (np.ndarray, np.generic)):
        return leaf
    return jnp.array(leaf if leaf.dtype.kind in "bc" else numbers(name, leaf, "hold numbers"))
