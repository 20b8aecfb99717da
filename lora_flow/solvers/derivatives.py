"""Which derivatives a run has: the loops that they need, and one line where JAX would speak of loops."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import diffrax
import equinox as eqx
import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from lora_flow.checks import InputError, require_choice

LoopKind = Literal["checkpointed", "lax", "bounded"]  # as equinox names them
Derivatives = Literal["reverse", "forward", "both"]
Mode = Literal["reverse", "reverse once", "forward", "forward again", "no more"]
Tree = TypeVar("Tree")

DERIVATIVES = ("reverse", "forward", "both")

ONLY_REVERSE = (
    'derivatives must be "forward" for forward mode (jvp, jacfwd), or "both" for reverse mode twice (grad of grad), '
    'got "reverse", which is for reverse mode (grad, jacrev), and for forward mode over that (jvp of grad, hessian)'
)
ONLY_ONCE = (
    'derivatives must be "both" for second derivatives (hessian, grad of grad) of what takes the adjoint of diffrax: '
    'StableLoRA, and a solver or stepsize_controller of your own; got "reverse"'
)
ONLY_FORWARD = (
    'derivatives must be "reverse", the default, for reverse mode (grad, jacrev) and forward mode over that (jvp of '
    'grad, hessian), or "both" for reverse mode twice (grad of grad), got "forward", which is for forward mode (jvp, '
    "jacfwd)"
)


THEN: dict[Mode, Mode] = {"reverse": "forward again", "reverse once": "no more"}  # after the first derivative
NOT_FORWARD: dict[Mode, str] = {"reverse": ONLY_REVERSE, "reverse once": ONLY_REVERSE, "no more": ONLY_ONCE}
NOT_REVERSE: dict[Mode, str] = {"forward": ONLY_FORWARD, "forward again": ONLY_REVERSE, "no more": ONLY_ONCE}


def require_derivatives(derivatives: Any) -> None:
    require_choice("derivatives", derivatives, DERIVATIVES)


def adjoint_of(derivatives: str) -> diffrax.AbstractAdjoint:
    """What diffrax calls the loops over steps."""
    if derivatives == "reverse":
        return diffrax.RecursiveCheckpointAdjoint()
    return diffrax.ForwardMode() if derivatives == "forward" else diffrax.DirectAdjoint()


def loop_kind(derivatives: str) -> LoopKind:
    """The loop to make inside a step, or of steps, that has these derivatives."""
    kinds: dict[str, LoopKind] = {"reverse": "checkpointed", "forward": "lax", "both": "bounded"}
    return kinds[derivatives]


def fixed(tree: Tree) -> Tree:
    """The same without derivatives."""
    return jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_inexact_array(leaf) else leaf, tree)


def guard_inputs(derivatives: str, inputs: Tree, *, once: bool = False) -> Tree:
    """The inputs of a solve, guarded: derivatives that it has not are refused by name, before JAX meets a loop.

    A forward derivative passes the inputs first, a reverse one the outputs. `once`: what goes back in reverse mode has
    no derivative of its own.
    """
    if derivatives != "reverse":
        return inputs
    return _guarded(inputs, "reverse once" if once else "reverse")


def guard_outputs(derivatives: str, outputs: Tree) -> Tree:
    return _guarded(outputs, "forward") if derivatives == "forward" else outputs


def _guarded(tree: Tree, mode: Mode) -> Tree:
    return jax.tree.map(lambda leaf: _value.bind(leaf, mode=mode) if eqx.is_inexact_array(leaf) else leaf, tree)


# JAX makes every derivative in reverse out of one in forward mode, by transposing it, and evaluates or batches what is
# not to be transposed. Which of both it is shows by what happens to a tangent, which has a primitive of its own.


def _differentiate(primals: tuple[Any], tangents: tuple[Any], *, mode: Mode) -> tuple[Any, Any]:
    (value,), (tangent,) = primals, tangents
    moved = tangent if isinstance(tangent, ad.Zero) else _tangent.bind(tangent, mode=mode)
    return _value.bind(value, mode=THEN.get(mode, mode)), moved


def _evaluate(tangent: Any, *, mode: Mode) -> Any:
    if mode in NOT_FORWARD:
        raise InputError(NOT_FORWARD[mode])
    return tangent


def _batch(tangents: tuple[Any], axes: tuple[Any], *, mode: Mode) -> tuple[Any, Any]:
    return _tangent.bind(_evaluate(*tangents, mode=mode), mode=mode), *axes


def _transpose(cotangent: Any, tangent: Any, *, mode: Mode) -> list[Any]:
    if mode in NOT_REVERSE:
        raise InputError(NOT_REVERSE[mode])
    return [_value.bind(cotangent, mode=THEN[mode])]  # which loops without a derivative in reverse lead to


_value, _tangent = Primitive("value_with_derivatives_in_one_mode"), Primitive("tangent_in_one_mode")
for _primitive, _meaning in ((_value, lambda value, *, mode: value), (_tangent, _evaluate)):
    _primitive.def_impl(_meaning)
    _primitive.def_abstract_eval(lambda value, *, mode: value)
    mlir.register_lowering(_primitive, lambda _, value, *, mode, meaning=_meaning: [meaning(value, mode=mode)])
batching.defvectorized(_value)
batching.primitive_batchers[_tangent] = _batch
ad.primitive_jvps[_value] = _differentiate
ad.deflinear2(_tangent, _transpose)
