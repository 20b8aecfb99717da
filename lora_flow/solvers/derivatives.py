"""Which derivatives an adjoint has: the loops that they need, and one line where JAX would speak of loops."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import diffrax
import equinox as eqx
import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from lora_flow.checks import InputError, require, require_instance

LoopKind = Literal["checkpointed", "lax", "bounded"]  # as equinox names them
Mode = Literal["reverse", "forward", "forward again"]
Tree = TypeVar("Tree")

ONLY_REVERSE = (
    "adjoint must be diffrax.ForwardMode() for forward mode (jvp, jacfwd), or diffrax.DirectAdjoint() for second "
    "derivatives (hessian, grad of grad), got RecursiveCheckpointAdjoint, which is for one derivative in reverse mode "
    "(grad, jacrev)"
)
ONLY_FORWARD = (
    "adjoint must be diffrax.RecursiveCheckpointAdjoint(), the default, for reverse mode (grad, jacrev), or "
    "diffrax.DirectAdjoint() for second derivatives (hessian, grad of grad), got ForwardMode, which is for forward "
    "mode (jvp, jacfwd)"
)


def as_adjoint(adjoint: diffrax.AbstractAdjoint | None) -> diffrax.AbstractAdjoint:
    """The adjoint, or the default. Raises for those that see no more than where a run ends."""
    adjoint = diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint
    require_instance("adjoint", adjoint, diffrax.AbstractAdjoint, "be an adjoint of diffrax, made, as DirectAdjoint()")
    along = not isinstance(adjoint, (diffrax.BacksolveAdjoint, diffrax.ImplicitAdjoint))
    require(along, "adjoint", "differentiate what is saved along the way", type(adjoint).__name__)
    return adjoint


def loop_kind(adjoint: diffrax.AbstractAdjoint) -> LoopKind:
    """The loop to make inside a step, or of steps, that can be differentiated as the adjoint can."""
    if isinstance(adjoint, diffrax.ForwardMode):
        return "lax"
    return "bounded" if isinstance(adjoint, diffrax.DirectAdjoint) else "checkpointed"


def guard_inputs(adjoint: diffrax.AbstractAdjoint, inputs: Tree) -> Tree:
    """The inputs of a solve, guarded: derivatives that the adjoint lacks are refused by name, before JAX meets a loop.

    A forward derivative passes the inputs first, a reverse one the outputs.
    """
    return _guarded(inputs, "reverse") if isinstance(adjoint, diffrax.RecursiveCheckpointAdjoint) else inputs


def guard_outputs(adjoint: diffrax.AbstractAdjoint, outputs: Tree) -> Tree:
    return _guarded(outputs, "forward") if isinstance(adjoint, diffrax.ForwardMode) else outputs


def _guarded(tree: Tree, mode: Mode) -> Tree:
    return jax.tree.map(lambda leaf: _value.bind(leaf, mode=mode) if eqx.is_inexact_array(leaf) else leaf, tree)


# JAX makes every derivative in reverse out of one in forward mode, by transposing it, and evaluates or batches what is
# not to be transposed. Which of both it is shows by what happens to a tangent, which has a primitive of its own.


def _differentiate(primals: tuple[Any], tangents: tuple[Any], *, mode: Mode) -> tuple[Any, Any]:
    (value,), (tangent,) = primals, tangents
    return _value.bind(value, mode=mode), tangent if isinstance(tangent, ad.Zero) else _tangent.bind(tangent, mode=mode)


def _evaluate(tangent: Any, *, mode: Mode) -> Any:
    if mode == "reverse":
        raise InputError(ONLY_REVERSE)
    return tangent


def _batch(tangents: tuple[Any], axes: tuple[Any], *, mode: Mode) -> tuple[Any, Any]:
    return _tangent.bind(_evaluate(*tangents, mode=mode), mode=mode), *axes


def _transpose(cotangent: Any, tangent: Any, *, mode: Mode) -> list[Any]:
    if mode != "reverse":
        raise InputError(ONLY_FORWARD if mode == "forward" else ONLY_REVERSE)
    return [_value.bind(cotangent, mode="forward again")]  # which loops without a derivative in reverse lead to


_value, _tangent = Primitive("value_with_derivatives_in_one_mode"), Primitive("tangent_in_one_mode")
for _primitive, _meaning in ((_value, lambda value, *, mode: value), (_tangent, _evaluate)):
    _primitive.def_impl(_meaning)
    _primitive.def_abstract_eval(lambda value, *, mode: value)
    mlir.register_lowering(_primitive, lambda _, value, *, mode, meaning=_meaning: [meaning(value, mode=mode)])
batching.defvectorized(_value)
batching.primitive_batchers[_tangent] = _batch
ad.primitive_jvps[_value] = _differentiate
ad.deflinear2(_tangent, _transpose)
