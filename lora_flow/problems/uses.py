"""How a loss uses its matrices: which axes are summed over, and what they are multiplied by.

JAX's trace of the loss is followed from each matrix on. Along the way stands, in place of the matrix, the array of its
flat indices, turned and reshaped as the matrix is. Where this meets a product, the axes summed over are the inputs'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal
from jaxtyping import Array, Float

from lora_flow.problems.kernels import letters_of

CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2")
INLINE = (*CALLS, "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
AS_THEY_ARE = ("convert_element_type", "copy", "copy_p", "optimization_barrier", "reduce_precision", "pvary")


class View(NamedTuple):
    """A matrix on its way through the loss: which one, where each of its entries is, and its shape at first."""

    which: int
    places: np.ndarray
    shape: tuple[int, ...]


class Use(NamedTuple):
    """A product with a matrix: the letters of its axes, and its inputs, `(samples, in)`, None where out of sight."""

    letters: str
    inputs: Float[Array, "samples in"] | None


class Found(NamedTuple):
    """The products with one matrix, and the names of other operations that it enters."""

    uses: list[Use]
    others: list[str]


def uses(loss: Callable[[Any], Array], kernels: Sequence[Array], inputs: bool = False) -> list[Found]:
    """What the loss, a function of the list of kernels, does with each of them; with the `inputs` if asked for."""
    traced = jax.make_jaxpr(loss)(list(kernels))
    found = [Found([], []) for _ in kernels]
    views = [
        View(which, np.arange(kernel.size, dtype=np.int32).reshape(kernel.shape), kernel.shape)
        for which, kernel in enumerate(kernels)
    ]
    values = list(kernels) if inputs else [None] * len(kernels)
    _follow(traced.jaxpr, traced.consts if inputs else [None] * len(traced.consts), values, views, found)
    return found


def _follow(jaxpr: Any, consts: Sequence[Any], values: list[Any], views: list[Any], found: list[Found]) -> Any:
    """The values and the views of a program's results; values are None where they are not asked for."""
    value_of = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))
    view_of = dict(zip(jaxpr.invars, views, strict=True))
    asked = all(value is not None for value in value_of.values())

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else value_of[atom]

    def view(atom: Any) -> Any:
        return None if isinstance(atom, Literal) else view_of.get(atom)

    for equation in jaxpr.eqns:
        given, seen = [*map(value, equation.invars)], [*map(view, equation.invars)]
        results, turned = [None] * len(equation.outvars), [None] * len(equation.outvars)
        inner = _inner(equation) if any(one is not None for one in seen) else None
        if inner is not None:
            inside, held = inner
            results, turned = _follow(inside, held if asked else [None] * len(held), given, seen, found)
        else:
            if asked:
                results = _evaluate(equation, given)
            if any(one is not None for one in seen):
                turned = _one(equation, given, seen, found)
        value_of.update(zip(equation.outvars, results, strict=True))
        view_of.update(zip(equation.outvars, turned, strict=True))
    return [*map(value, jaxpr.outvars)], [*map(view, jaxpr.outvars)]


def _one(equation: Any, given: list[Any], seen: list[Any], found: list[Found]) -> list[Any]:
    """The views of the results of one operation; if it is a product, it is noted."""
    name, results = equation.primitive.name, [None] * len(equation.outvars)
    if name == "scan":
        count, body = equation.params["num_consts"], equation.params["jaxpr"]
        kept = seen[:count] + [None] * (len(seen) - count)
        _follow(body.jaxpr, [None] * len(body.consts), [None] * len(seen), kept, found)
        seen = [None] * count + seen[count:]  # what is carried, and what is gone through
    for side, view in enumerate(seen):
        if view is None:
            continue
        if name in MOVES:
            results[side] = view._replace(places=MOVES[name](view.places, equation.params))
        elif use := _product(equation, side, view, given, seen):
            found[view.which].uses.append(use)
        else:
            found[view.which].others.append(name)
    return results


def _product(equation: Any, side: int, view: View, given: list[Any], seen: list[Any]) -> Use | None:
    """The use that a product is, None for anything else, and for a product of two of the matrices."""
    name, params, inputs = equation.primitive.name, equation.params, None
    if name == "dot_general" and seen[1 - side] is None:
        (summed, batched), other = ([dims[side] for dims in params["dimension_numbers"]], given[1 - side])
        if batched:
            return None
        if other is not None:
            inputs = _rows(other, params["dimension_numbers"][0][1 - side])
    elif name == "conv_general_dilated" and side == 1 and params["feature_group_count"] == 1:
        summed = params["dimension_numbers"].rhs_spec[1:]
    else:
        return None
    index = _rows(view.places, summed)
    letters = letters_of(index, view.shape)
    return (
        None if letters is None else Use(letters, None if inputs is None else inputs[:, _order(index, letters, view)])
    )


def _rows(array: Any, last: Sequence[int]) -> Any:
    """The array as a matrix, with these axes in its rows."""
    first = [axis for axis in range(array.ndim) if axis not in last]
    width = int(np.prod([array.shape[axis] for axis in last]))
    return array.transpose(*first, *last).reshape(-1, width)


def _order(index: np.ndarray, letters: str, view: View) -> np.ndarray:
    """Which column of the inputs belongs to each column of the folded matrix."""
    ins = [axis for axis, letter in enumerate(letters) if letter == "i"]
    places = np.unravel_index(index[0], view.shape)
    return np.argsort(np.ravel_multi_index([places[axis] for axis in ins], [view.shape[axis] for axis in ins]))


def _inner(equation: Any) -> tuple[Any, Sequence[Any]] | None:
    """The program within an operation that does no more than that, and its constants."""
    if equation.primitive.name not in INLINE:
        return None
    program = next(equation.params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in equation.params)
    return getattr(program, "jaxpr", program), getattr(program, "consts", ())


def _evaluate(equation: Any, given: list[Any]) -> list[Any]:
    bound = equation.primitive.get_bind_params(equation.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # as JAX has it up to 0.9, and since
    results = equation.primitive.bind(*functions, *given, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def _broadcast(index: np.ndarray, params: Mapping[str, Any]) -> np.ndarray:
    shape = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], index.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(index.reshape(shape), params["shape"])


MOVES: dict[str, Callable[[np.ndarray, Mapping[str, Any]], np.ndarray]] = {
    "transpose": lambda index, params: index.transpose(params["permutation"]),
    "reshape": lambda index, params: index.reshape(params["new_sizes"]),
    "squeeze": lambda index, params: index.squeeze(tuple(params["dimensions"])),
    "broadcast_in_dim": _broadcast,
    **dict.fromkeys(AS_THEY_ARE, lambda index, params: index),
}
