"""Training many lanes at once: one compiled program of optax steps, and exact resume from orbax checkpoints."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
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
from lora_flow.storage.swap import write_atomically
from lora_flow_vision.task import Classification

Look = Callable[[Classification, Adapters, Any], dict[str, Array]]
SECONDS_BETWEEN = 10.0  # checkpoints
DIGESTS = "lora-flow-sha256.json"  # in each of them


class Lanes(NamedTuple):
    """The state of training: PyTrees whose arrays have a leading axis of lanes."""

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
    """Trains every lane, and measures it by `look` after each number of steps in `saves`.

    A step follows the gradient of the loss over all data, or over the `batches`, indices of data for each lane and
    step. `look(task, adapters, shared)` is for one lane, `shared` any PyTree. With a `folder`, checkpoints are kept
    there, and training continues from the newest whole one: the result is the same, bit by bit. Damaged checkpoints are
    removed, with a message. `stepped` is called with the number of steps done.

    **Returns:** the final adapters, with a leading axis of lanes, and the values of `look`, `(lanes, saves)`.

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
    """The checkpoints of one call of `train`, each with the digests of its files; with no folder there are none."""

    def __init__(self, folder: Path | None):
        self._folder, self._saved = folder, time.monotonic()
        self._manager: Any = None

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, *_: object) -> None:
        if self._manager is not None:
            self._manager.close()

    def newest(self, lanes: Lanes, seen: Mapping[str, np.ndarray]) -> tuple[int, Lanes, dict[str, np.ndarray]]:
        """The number of saves, the lanes and what was seen, of the checkpoint if there is one that is whole."""
        folder, nothing = self._folder, (0, lanes, dict(seen))
        if folder is None:
            return nothing
        try:
            _check_digests(folder)
            self._open(folder)
            latest = self._manager.latest_step()
            return nothing if latest is None else (latest, *self._restore(latest, lanes, seen))
        except PermissionError:
            raise
        except Exception as error:  # of as many kinds as there are ways to damage a folder
            reason = " ".join(str(error).split())[:100]
            print(f"lora-flow: '{folder}' is damaged ({reason}); it is trained from its start", file=sys.stderr)
            self._clear(folder)
            self._open(folder)
        return nothing

    def save(self, index: int, lanes: Lanes, seen: Mapping[str, np.ndarray]) -> None:
        if self._manager is None or time.monotonic() - self._saved < SECONDS_BETWEEN:
            return
        import orbax.checkpoint as ocp

        self._manager.save(index, args=ocp.args.StandardSave({"lanes": lanes, "seen": dict(seen)}))
        step = Path(self._manager.directory) / str(index)
        write_atomically(step / DIGESTS, json.dumps({"step": step.name, "files": _digests(step)}))
        self._saved = time.monotonic()

    def _open(self, folder: Path) -> None:
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def _clear(self, folder: Path) -> None:
        if self._manager is not None:
            self._manager.close()
            self._manager = None
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            folder.unlink(missing_ok=True)

    def _restore(self, step: int, lanes: Lanes, seen: Mapping[str, np.ndarray]) -> tuple[Lanes, dict[str, np.ndarray]]:
        import orbax.checkpoint as ocp

        like = {"lanes": lanes, "seen": dict(seen)}
        found = self._manager.restore(step, args=ocp.args.StandardRestore(like))
        shapes = [[(np.shape(leaf), leaf.dtype) for leaf in jax.tree.leaves(tree)] for tree in (found, like)]
        if shapes[0] != shapes[1] or not 0 < step <= next(iter(seen.values())).shape[1]:
            raise ValueError("it is of another training")
        return found["lanes"], {name: np.array(value) for name, value in found["seen"].items()}


def _check_digests(folder: Path) -> None:
    """Raises unless the checkpoints in a folder are as they were written, where they have digests."""
    if not folder.is_dir():
        if folder.exists():
            raise ValueError("it is no folder")
        return
    for step in (entry for entry in folder.iterdir() if (entry / DIGESTS).is_file()):
        kept, found = json.loads((step / DIGESTS).read_bytes()), _digests(step)
        if kept["step"] != step.name:
            raise ValueError(f"{step.name} was {kept['step']}")
        if kept["files"] != found:
            changed = sorted(name for name, _ in kept["files"].items() ^ found.items())
            raise ValueError(f"{step.name}/{changed[0]} is not as it was written")


def _digests(step: Path) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint."""
    files = [path for path in step.rglob("*") if path.is_file() and path.name != DIGESTS]
    return {path.relative_to(step).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
