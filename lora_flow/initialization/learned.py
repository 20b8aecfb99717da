"""Learned starts by the folder that `lora-flow optimise` has filled: "learned:runs/opt"."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_flow.adapter import Adapter, Adapters, pad
from lora_flow.checks import InputError, as_path, one_line, require
from lora_flow.initialization.of_norm import along_gradient, gaussian_norm, on_sphere
from lora_flow.problems.base import Layers, Problem
from lora_flow.storage.swap import write_atomically

LEARNED = "learned"  # before the colon
FILE = "learned.safetensors"
NUMBERS = ("mix", "power", "layers")
_ARRAY = re.compile(r"layer([1-9]\d*)\.([AB])")


class LearnedStart:
    """An initialisation that was learned: adapters of one problem, or a scheme's few numbers, which fit any.

    - `adapters`: the winner on the problem that it was learned on, at the scale `alpha`.
    - `numbers`: `mix`, `power` and `layers` of `along_gradient`; empty where the adapters themselves were learned.

    Called as a scheme is, it returns starts of the norm of Gaussian ones: `alpha sqrt(rank sum of inputs)`. Adapters
    that were learned are taken for layers of the same shapes alone, at their rank or a larger one. A scheme of several
    layers gives its weights to as many layers; one layer needs none.
    """

    def __init__(self, adapters: Adapters, alpha: float, numbers: Mapping[str, np.ndarray] | None = None):
        self.adapters: Adapters = jax.tree.map(np.asarray, adapters)
        self.alpha, self.numbers = float(alpha), dict(numbers or {})
        state = hashlib.sha256(repr((self.alpha, sorted(self.numbers))).encode())
        for leaf in (*jax.tree.leaves(self.adapters), *(self.numbers[name] for name in sorted(self.numbers))):
            state.update(f"{np.shape(leaf)}".encode() + np.ascontiguousarray(leaf).tobytes())
        self.digest = state.hexdigest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LearnedStart) and self.digest == other.digest

    def __call__(self, key: Array, problem: Problem, rank: int, alpha: float | Array) -> Adapters:
        direction = self._by_numbers(problem, rank) if self.numbers else self._as_learned(problem.layers, rank)
        return on_sphere(direction, gaussian_norm(alpha, rank, problem.layers))

    def _by_numbers(self, problem: Problem, rank: int) -> Adapters:
        weights, count = self.numbers["layers"], len(problem.layers)
        fits = count in (1, len(weights))
        require(fits, "init", f"be a scheme of {count} layers, or of one", f"one learned on {len(weights)}")
        mix, power = (float(self.numbers[name]) for name in ("mix", "power"))
        return along_gradient(problem, rank, mix, power, jnp.asarray(weights if count > 1 else np.zeros(1)))

    def _as_learned(self, layers: Layers, rank: int) -> Adapters:
        own = tuple((b.shape[0], a.shape[1]) for a, b in self.adapters)
        same = own == tuple(map(tuple, layers))
        require(same, "init", f"be learned on layers of the shapes {tuple(layers)}", f"adapters of {own}")
        least = self.adapters[0].rank
        require(rank >= least, "rank", f"be at least {least}, that of the learned adapters", rank)
        return pad(self.adapters, rank)

    def save(self, folder: Any) -> None:
        """Writes `learned.safetensors`: `layer1.A` and so on, `alpha`, and a scheme's numbers."""
        from safetensors.numpy import save

        arrays: dict[str, np.ndarray] = {}
        for i, (a, b) in enumerate(self.adapters, 1):
            arrays |= {f"layer{i}.A": np.asarray(a), f"layer{i}.B": np.asarray(b)}
        arrays |= {"alpha": np.asarray(self.alpha)} | {name: np.asarray(one) for name, one in self.numbers.items()}
        write_atomically(folder / FILE, save({name: np.array(one, order="C") for name, one in arrays.items()}))


def load_learned(folder: str | os.PathLike[str]) -> LearnedStart:
    """The start in a folder that `lora-flow optimise` has filled; `sweep(init=...)` takes it.

    **Raises:** `InputError` where the folder holds none, or a damaged one.
    """
    return learned_in("folder", as_path("folder", folder))


def learned_in(name: str, folder: Path) -> LearnedStart:
    """The same, of a folder that is called `name` where it is refused."""
    path = folder.expanduser() / FILE
    require(path.is_file(), name, "be one that lora-flow optimise has filled", f"no '{path}'")
    stat = path.stat()
    return _loaded(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=16)
def _loaded(path: Path, *version: int) -> LearnedStart:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays: dict[str, Any] = {name: np.asarray(one, float) for name, one in load_file(path).items()}
        count = max(int(found[1]) for name in arrays if (found := _ARRAY.fullmatch(name)))
        adapters = tuple(Adapter(arrays.pop(f"layer{i}.A"), arrays.pop(f"layer{i}.B")) for i in range(1, count + 1))
        alpha = float(arrays.pop("alpha"))
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise InputError(f"'{path}' must hold a learned start, got {one_line(error)}") from error
    for name in arrays:
        require(name in NUMBERS, f"an array in '{path}'", "be an adapter's or a scheme's", repr(name))
    whole = not arrays or set(arrays) == set(NUMBERS)
    require(whole, f"'{path}'", "hold all the numbers of a scheme", ", ".join(arrays))
    finite = all(np.isfinite(one).all() for one in (*jax.tree.leaves(adapters), *arrays.values()))
    require(finite and 0 < alpha < np.inf, f"'{path}'", "hold finite numbers", "NaN or infinite ones")
    return LearnedStart(adapters, alpha, arrays)
