"""The choice of a model's matrices that carry adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_flow.checks import concrete, kind, require
from lora_flow.problems.kernels import check_letters
from lora_flow.problems.paths import ALL, layer_of, matches, order
from lora_flow.problems.uses import Found, uses


class Chosen(NamedTuple):
    """An adapted matrix: its layer's path, its place among the parameters' leaves, and the letters of its axes."""

    path: str
    place: int
    letters: str


def choose(
    told: Mapping[str, str | None],
    matched: Mapping[str, list[int]],
    names: Sequence[str],
    arrays: Sequence[Any],
    loss_with: Callable[[Mapping[int, Array]], Array],
) -> tuple[Chosen, ...]:
    """The matrices to adapt among those that match each pattern; `loss_with` is the loss with others in their places.

    **Raises:** `InputError` for a matrix that the loss does not multiply by, or not in the way that is told.
    """
    every = {place: arrays[place] for places in matched.values() for place in places}
    found = uses(lambda kernels: loss_with(dict(zip(every, kernels, strict=True))), [*every.values()])
    used = dict(zip(every, found, strict=True))
    chosen: dict[int, Chosen] = {}
    for pattern, letters in told.items():
        for place in matched[pattern]:
            path = layer_of(names[place])
            one = Chosen(path, place, letters or _letters(path, used[place]))
            if one.letters or pattern != ALL:
                _check_use(one, used[place])
                check_letters(f"layers[{pattern!r}]", one.letters, every[place].shape)
                chosen.setdefault(place, one)
    require(chosen, "layers", "match a matrix that the loss multiplies by", repr(ALL))
    return tuple(chosen.values())


def letters_by_pattern(layers: Any) -> dict[str, str | None]:
    """The letters by pattern, None where they are to be read off the loss; `layers` as `adapted` takes them."""
    several = [layers] if isinstance(layers, str) else layers
    fits = isinstance(several, (list, tuple, Mapping)) and all(isinstance(one, str) for one in several)
    require(
        fits and len(several), "layers", "be a pattern, several, or a mapping from patterns to letters", kind(layers)
    )
    return dict(several) if isinstance(several, Mapping) else dict.fromkeys(several)


def matrices(pattern: str, names: Sequence[str], arrays: Sequence[Any]) -> list[int]:
    """The places of the matrices that a pattern chooses, in the order of their paths."""
    matched = [i for i, name in enumerate(names) if matches(pattern, layer_of(name)) or matches(pattern, name)]
    real = [i for i in matched if arrays[i] is not None and jnp.issubdtype(arrays[i].dtype, jnp.floating)]
    found = [i for i in real if arrays[i].ndim >= 2]
    known = [layer_of(name) for name, array in zip(names, arrays, strict=True) if array is not None and array.ndim >= 2]
    require(known, "params", "hold a matrix at least", f"{len(names)} leaves and none")
    require(matched, "layers", f"match a matrix of the parameters, such as {', '.join(known[-3:])}", repr(pattern))
    got = kind(arrays[matched[0]]) if not found else ""
    require(found, f"layer '{layer_of(names[matched[0]])}'", "be a matrix of real numbers", got)
    for i in found:
        entries = concrete(arrays[i])
        finite = entries is None or np.isfinite(entries).all()
        require(finite, f"layer '{layer_of(names[i])}'", "be finite", "entries that are NaN or infinite")
    return sorted(found, key=lambda i: order(layer_of(names[i])))


def _letters(path: str, found: Found) -> str:
    """The letters of a matrix that the loss multiplies by; "" where it does not."""
    letters = sorted({use.letters for use in found.uses})
    require(len(letters) < 2, f"layer '{path}'", "be multiplied by in one way", " and ".join(map(repr, letters)))
    return letters[0] if letters else ""


def _check_use(one: Chosen, found: Found) -> None:
    """Raises unless the letters of the matrix are told, or read off the loss."""
    others = ", ".join(dict.fromkeys(found.others))
    must = "be a matrix that the loss multiplies by, or have letters in a mapping, layers={'...': 'io'}"
    got = f"one that enters {others}" if others else "one that the loss does not use"
    require(one.letters, f"layer '{one.path}'", must, got)
