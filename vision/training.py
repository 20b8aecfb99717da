"""Training many lanes at once: one compiled program of optax steps, and exact resume from orbax checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import Array, Int

from lora_flow import Adapters
from lora_flow.checks import require
from vision.task import Classification

Look = Callable[[Classification, Adapters, Any], dict[str, Array]]
SECONDS_BETWEEN = 10.0  # checkpoints


class Lanes(NamedTuple):
    """Where training stands: PyTrees whose arrays have a leading axis of lanes."""

    adapters: Adapters
    optimizer: Any


def train(
    task: Classification,
    starts: Adapters,
    *,
    optimizer: optax.GradientTransformation,
    saves: Int[np.ndarray, " saves"],
    look: Look,
    shared: Any = None,
    batches: Int[np.ndarray, "lanes steps batch"] | None = None,
    folder: Path | None = None,
    stepped: Callable[[int], None] = lambda count: None,
) -> tuple[Adapters, dict[str, np.ndarray]]:
    """Trains every lane and returns its final adapters and what `look` saw after each number of steps in `saves`.

    A step follows the gradient of the loss over all data, or where there are `batches`, indices of data for each lane
    and step, over those. `look(task, adapters, shared)` is for one lane, `shared` any PyTree; its values come back as
    `(lanes, saves)`. With a `folder`, checkpoints are kept there, and one that is found is gone on from: the
    result is the same, bit by bit. `stepped` hears how many steps were done.

    **Raises:** `InputError` unless `saves` are increasing integers from 0.
    """
    increasing = len(saves) > 0 and saves[0] >= 0 and bool(np.all(np.diff(saves) > 0))
    require(increasing, "saves", "be increasing numbers of steps from 0", saves)
    lanes = Lanes(starts, jax.vmap(optimizer.init)(starts))
    count = jax.tree.leaves(starts)[0].shape[0]
    names = jax.eval_shape(jax.vmap(lambda adapters: look(task, adapters, shared)), starts)
    seen = {name: np.full((count, len(saves)), np.nan, value.dtype) for name, value in names.items()}
    with _Kept(folder) as kept:
        first, lanes, seen = kept.newest(lanes, seen)
        done = int(saves[first - 1]) if first else 0
        stepped(done)
        for index in range(first, len(saves)):
            number = int(saves[index])
            lanes, values = _advance(
                task, optimizer, lanes, np.asarray(done), np.asarray(number), batches, look, shared
            )  # arrays: an integer would be part of the program, and every call compiled
            for name, value in values.items():
                seen[name][:, index] = value
            stepped(number - done)
            done = number
            kept.save(index + 1, lanes, seen)
    return lanes.adapters, seen


@eqx.filter_jit(donate="none")
def _advance(
    task: Classification,
    optimizer: optax.GradientTransformation,
    lanes: Lanes,
    first: Any,
    end: Any,
    batches: Any,
    look: Look,
    shared: Any,
) -> tuple[Lanes, dict[str, Array]]:
    def one(adapters: Adapters, state: Any, chosen: Any) -> Lanes:
        loss = task.loss if chosen is None else lambda adapters: task.batch_loss(adapters, chosen)
        updates, state = optimizer.update(jax.grad(loss)(adapters), state, adapters)
        return Lanes(optax.apply_updates(adapters, updates), state)

    def step(number: Any, lanes: Lanes) -> Lanes:
        chosen = None if batches is None else batches[:, number]
        return jax.vmap(one)(*lanes, chosen)

    lanes = jax.lax.fori_loop(first, end, step, lanes)
    return lanes, jax.vmap(lambda adapters: look(task, adapters, shared))(lanes.adapters)


class _Kept:
    """The checkpoints of one call of `train`; with no folder there are none."""

    def __init__(self, folder: Path | None):
        self._manager: Any = None
        self._saved = time.monotonic()
        if folder is not None:
            import orbax.checkpoint as ocp

            options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, *_: object) -> None:
        if self._manager is not None:
            self._manager.close()

    def newest(self, lanes: Lanes, seen: Mapping[str, np.ndarray]) -> tuple[int, Lanes, dict[str, np.ndarray]]:
        latest = None if self._manager is None else self._manager.latest_step()
        if latest is None:
            return 0, lanes, dict(seen)
        import orbax.checkpoint as ocp

        like = {"lanes": lanes, "seen": dict(seen)}
        found = self._manager.restore(latest, args=ocp.args.StandardRestore(like))
        return latest, found["lanes"], {name: np.array(value) for name, value in found["seen"].items()}

    def save(self, index: int, lanes: Lanes, seen: Mapping[str, np.ndarray]) -> None:
        if self._manager is None or time.monotonic() - self._saved < SECONDS_BETWEEN:
            return
        import orbax.checkpoint as ocp

        self._manager.save(index, args=ocp.args.StandardSave({"lanes": lanes, "seen": dict(seen)}))
        self._saved = time.monotonic()
