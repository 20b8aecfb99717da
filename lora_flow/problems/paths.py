"""The arrays of a PyTree by path, and the patterns that choose among them.

A path has the names of the attributes, keys and indices on the way, with slashes between: `params/Dense_0/kernel`,
`layers/0/weight`, `w1`. A layer's path leaves off a last `kernel` or `weight`. A pattern is a regular expression that
matches the end of a path from a slash on: `Dense_0`, `attention/(query|value)`, `blocks/[01]/mlp/up`.
"""

from __future__ import annotations

import re
from typing import Any

import jax

from lora_flow.checks import InputError

ALL = "all"
LEFT_OFF = ("kernel", "weight")  # Flax's and Equinox's names for the matrix of a layer
HOLDERS = ("value", "raw_value")  # of Flax NNX, whose variables hold their array


def leaves_by_path(tree: Any) -> tuple[list[str], list[Any], Any]:
    """The paths and the leaves of a PyTree, in its order, and its structure."""
    found, structure = jax.tree_util.tree_flatten_with_path(tree)
    return [_path(keys) for keys, _ in found], [leaf for _, leaf in found], structure


def layer_of(path: str) -> str:
    """The layer's path, of its matrix's path."""
    parent, _, last = path.rpartition("/")
    return parent if parent and last in LEFT_OFF else path


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern chooses a path.

    **Raises:** `InputError` for a pattern that is no regular expression.
    """
    if pattern == ALL:
        return True
    try:
        return re.search(rf"(^|/)({pattern})$", path) is not None
    except re.error as error:
        raise InputError(f"layers must be a regular expression, got {pattern!r}: {error}") from error


def order(path: str) -> tuple[tuple[int, str], ...]:
    """A key that sorts paths with their numbers by size."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)|/", path) if part)


def _path(keys: tuple[Any, ...]) -> str:
    parts = [jax.tree_util.keystr((key,), simple=True).strip(".") for key in keys]
    while len(parts) > 1 and parts[-1] in HOLDERS:
        parts.pop()
    return "/".join(parts) or "params"  # which is an array itself
