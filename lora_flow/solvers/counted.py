"""Loops whose number of turns only a run knows, with derivatives in reverse mode.

Of the states the last n are kept, of every n-th state the last n, and every n^2-th, with n about the cube root of the
most turns there may be. Going back, other states are made again, each at most twice, and none where the turns are no
more than n. So memory does not grow with the turns. All loops are JAX's own, which have a forward mode: what goes back
can be differentiated forward once more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

Tree = TypeVar("Tree")
Carry = TypeVar("Carry")
Count = Int[Array, ""]
Turn = Callable[[Count, Tree], Tree]  # from the number of the turn, counted from 0, and the state before to that after
Loop = Callable[[Turn[Any], Any, Count, int], Any]  # `counted`, or `turned`


def turned(turn: Turn[Tree], start: Tree, count: Count, most: int = 0) -> Tree:
    """The state after `count` turns; no derivatives in reverse mode."""

    def body(carry: tuple[Count, Tree]) -> tuple[Count, Tree]:
        return carry[0] + 1, turn(*carry)

    return jax.lax.while_loop(lambda carry: carry[0] < count, body, (jnp.zeros_like(count), start))[1]


def counted(turn: Turn[Tree], start: Tree, count: Count, most: int) -> Tree:
    """The state after `count` turns, at most `most`, with derivatives in reverse mode and none in forward mode."""
    converted = eqx.filter_closure_convert(turn, jnp.zeros_like(count), start)  # what it closes over is differentiated
    after: Tree = jax.tree.map(_without_tangent, _counted((converted, start), count, most))
    return after


LEVELS = 3


class Kept(NamedTuple):
    """States before turns, for each level l a ring with the last n of those whose number is a multiple of n^l."""

    levels: tuple[Any, ...]

    @classmethod
    def room(cls, state: Any, most: int) -> Kept:
        rows = kept_of(most) + 1  # and one more, where nobody looks
        room = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rows, *jnp.shape(leaf))), state)
        return cls((room,) * LEVELS)

    def put(self, number: Count, state: Any, most: int) -> Kept:
        """With the state before this turn; one that is put there again replaces the other."""
        n = kept_of(most)

        def one(level: int, states: Any) -> Any:
            row = jnp.where(number % n**level == 0, number // n**level % n, n)
            return jax.tree.map(lambda leaf, room: room.at[row].set(leaf), state, states)

        return Kept(tuple(one(level, states) for level, states in enumerate(self.levels)))

    def at(self, number: Count, level: int, most: int, like: Any) -> Any:
        """The state before this turn; what is kept may be buffers, which are trees themselves."""
        n = kept_of(most)
        row = number // n**level % n
        return jax.tree.map(lambda _, room: room[row], like, self.levels[level])


def kept_of(most: int) -> int:
    """The n of `Kept`, for at most so many turns."""
    n = round(most ** (1 / LEVELS))
    return n if n**LEVELS >= most else n + 1


def walk_back(
    turn: Turn[Tree],
    visit: Callable[[Count, Tree, Carry], Carry],
    kept: Kept,
    count: Count,
    most: int,
    like: Tree,
    carry: Carry,
) -> Carry:
    """Visits each turn's number and the state before it, from the last turn to the first; a state is `like` this."""
    n = kept_of(most)

    def back(outer: tuple[Count, Kept, Carry]) -> tuple[Count, Kept, Carry]:
        number, kept, carry = outer
        carry = visit(number, kept.at(number, 0, most, like), carry)
        return number - 1, refilled(number, kept), carry

    def refilled(number: Count, kept: Kept) -> Kept:
        """Where the last n states before this turn are not kept, they are made again, from one that is."""
        begin, first = number, kept.at(number, 0, most, like)
        for level in range(1, LEVELS):
            earlier = number - n**level
            gone = (number % n**level == 0) & (earlier >= 0)
            begin = jnp.where(gone, earlier, begin)
            known = kept.at(jnp.maximum(earlier, 0), level, most, like)
            first = jax.tree.map(lambda one, other, gone=gone: jnp.where(gone, one, other), known, first)

        def again(inner: tuple[Count, Tree, Kept]) -> tuple[Count, Tree, Kept]:
            at, state, kept = inner
            return at + 1, turn(at, state), kept.put(at, state, most)

        made: Kept = eqxi.while_loop(
            lambda inner: inner[0] < number, again, (begin, first, kept), kind="lax", buffers=lambda inner: inner[2]
        )[2]
        return made

    done: Carry = eqxi.while_loop(
        lambda outer: outer[0] >= 0, back, (count - 1, kept, carry), kind="lax", buffers=lambda outer: outer[1]
    )[2]
    return done


@eqx.filter_custom_vjp
def _counted(differentiated: tuple[Turn[Any], Any], count: Count, most: int) -> Any:
    return turned(*differentiated, count)


@_counted.def_fwd
def _go_on(perturbed: Any, differentiated: tuple[Turn[Any], Any], count: Count, most: int) -> Any:
    return turned(*differentiated, count), perturbed[0]


@_counted.def_bwd
def _go_back(
    asked: Any, gradient: Any, perturbed: Any, differentiated: tuple[Turn[Any], Any], count: Count, most: int
) -> Any:
    turn, start = differentiated
    moving, fixed = eqx.partition(turn, asked)
    floats = eqx.filter(start, eqx.is_inexact_array)
    gradient = jax.tree.map(or_zeros, floats, gradient, is_leaf=lambda leaf: leaf is None)

    def visit(number: Count, state: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        later, total = carry
        floats, rest = eqx.partition(state, eqx.is_inexact_array)

        def again(moving: Any, floats: Any) -> Any:
            after = eqx.combine(moving, fixed)(number, eqx.combine(floats, rest))
            return eqx.filter(after, eqx.is_inexact_array)

        _, pull = jax.vjp(again, moving, floats)
        by_turn, earlier = pull(later)
        return earlier, jax.tree.map(jnp.add, total, by_turn)

    def back(carry: Any) -> Any:
        return jnp.array(False), walk_back(turn, visit, _keep(turn, start, count, most), count, most, start, carry[1])

    # a loop of one turn or none: where no lane has a turn, no room is made for states
    begin = count > 0, (gradient, jax.tree.map(jnp.zeros_like, moving))
    by_start, by_turn = jax.lax.while_loop(lambda carry: carry[0], back, begin)[1]
    return by_turn, by_start


def _keep(turn: Turn[Tree], start: Tree, count: Count, most: int) -> Kept:
    def body(carry: tuple[Count, Tree, Kept]) -> tuple[Count, Tree, Kept]:
        number, state, kept = carry
        return number + 1, turn(number, state), kept.put(number, state, most)

    begin = jnp.zeros_like(count), start, Kept.room(start, most)
    kept: Kept = eqxi.while_loop(
        lambda carry: carry[0] < count, body, begin, kind="lax", buffers=lambda carry: carry[2]
    )[2]
    return kept


def _without_tangent(leaf: Any) -> Any:
    """The same if it has a derivative; else by an operation that has none, since JAX takes all outputs to have one."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jax.random.key_data(leaf), impl=jax.random.key_impl(leaf))
    return leaf if eqx.is_inexact_array(leaf) else leaf | leaf


def or_zeros(leaf: Any, gradient: Any) -> Any:
    if leaf is None:
        return None
    return jnp.zeros_like(leaf) if gradient is None else gradient
