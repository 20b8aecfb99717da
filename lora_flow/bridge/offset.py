"""Starts that are taken off the frozen weights: subtracted in a copy of the checkpoint, or made plain LoRA again.

With s B_0 A_0 the start's own update and s B A the trained one's, the model computes W - s B_0 A_0 + s B A. The second
adapter (A_0, -B_0) beside the trained one computes the same on the untouched weights. So does one plain adapter of
rank 2 r with the factors [B, -B_0] and [A; A_0], and so do weights from which s B_0 A_0 is subtracted.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_flow.adapter import Adapter
from lora_flow.bridge.checkpoints import files_of, open_checkpoint
from lora_flow.bridge.init import MANIFEST, OFFSET
from lora_flow.bridge.peft_folder import PeftAdapters, read_peft, write_peft
from lora_flow.checks import as_path, require, require_integer
from lora_flow.runtime.interrupts import whole
from lora_flow.runtime.progress import each
from lora_flow.storage.locks import locked
from lora_flow.storage.swap import replacing
from lora_flow.storage.tensors import KINDS, read_json


def read_start(folder: str | Path) -> tuple[dict[str, Any], PeftAdapters]:
    """The manifest of a start that offsets the weights, and its second adapter (A_0, -B_0).

    **Raises:** `InputError` for a folder that is no start of `peft_init`, or of a scheme without an offset.
    """
    folder = as_path("start", folder).expanduser()
    require((folder / MANIFEST).is_file(), "start", f"be a folder of peft init, with {MANIFEST}", f"'{folder}'")
    manifest = read_json(folder / MANIFEST)
    must = "be of a scheme that offsets the weights; others are used as they are"
    require(manifest.get("offset") is True, "start", must, manifest.get("init"))
    return manifest, read_peft(folder / OFFSET)


def peft_apply(start: str | Path, checkpoint: str | Path, out: str | Path) -> dict[str, float]:
    """A copy of the checkpoint with W - s B_0 A_0 in place of W, for a start that offsets the weights.

    On the copy the start's own folder is all that PEFT needs. Everything else in a checkpoint's folder is copied. The
    numbers are rounded to the checkpoint's type: with 16 bits the model at the start is the base's to that rounding
    only, which the second adapter does not have.

    **Returns:** by module, the relative rounding error of the new weight, in Frobenius norm.

    **Raises:** `InputError` where the start has no offset or is one for another checkpoint, or the folder exists.
    """
    manifest, offset = read_start(start)
    source, folder = as_path("checkpoint", checkpoint).expanduser(), as_path("out", out).expanduser()
    require(not folder.exists(), "out", "be a new folder", f"'{folder}'")
    tensors = open_checkpoint(source)
    layers: Mapping[str, Any] = manifest["layers"]
    for module, adapter in offset.adapters.items():
        told, shape = layers[module], (adapter.b.shape[0], adapter.a.shape[1])
        tensor = tensors.get(told["parameter"])
        stored = None if tensor is None else tensor.shape[::-1] if told["transposed"] else tensor.shape
        must = f"hold {told['parameter']} of shape {shape}, as the start's"
        require(stored == shape, f"'{source}'", must, "none" if stored is None else f"shape {stored}")
    errors = {}
    with whole(), locked(folder), replacing(folder) as new:
        if source.is_dir():
            shutil.copytree(source, new, dirs_exist_ok=True)
        else:
            for file in files_of(tensors):
                shutil.copyfile(file, new / file.name)
        for module in each(offset.adapters, "layers", "subtracting"):
            told, (a, b) = layers[module], offset.adapters[module]
            tensor = tensors[told["parameter"]]
            change = offset.scalings[module] * (b.astype(np.float64) @ a.astype(np.float64))
            exact = tensor.read(np.float64) + (change.T if told["transposed"] else change)
            rounded = exact.astype(KINDS[tensor.kind])
            left = np.linalg.norm(rounded.astype(np.float64) - exact)
            errors[module] = float(left / max(np.linalg.norm(exact), np.finfo(float).tiny))
            with (new / tensor.path.name).open("r+b") as content:
                content.seek(tensor.offset)
                content.write(np.ascontiguousarray(rounded).tobytes())
    return errors


def peft_convert(
    trained: str | Path, start: str | Path, out: str | Path, *, rank: int | None = None
) -> dict[str, float]:
    """Plain LoRA for the untouched weights, from adapters that were trained from a start that offsets them.

    Without `rank` it is exact, of twice the rank: B' = [B, -B_0], A' = [A; A_0]. With `rank` it is the best
    approximation of that rank, in Frobenius norm.

    **Returns:** by module, the relative error of the update B A - B_0 A_0, in Frobenius norm.

    **Raises:** `InputError` where the start has no offset, the adapters are of other layers, shapes or multipliers than
    the start's, or the folder exists.
    """
    _, offset = read_start(start)
    learnt, folder = read_peft(trained), as_path("out", out).expanduser()
    require(not folder.exists(), "out", "be a new folder", f"'{folder}'")
    if rank is not None:
        require_integer("rank", rank, "be at least 1", 1)
    for module, adapter in learnt.adapters.items():
        where = f"{module} in '{trained}'"
        require(module in offset.adapters, where, "be a layer of the start", "another")
        first = offset.adapters[module]
        fits = adapter.a.shape[1] == first.a.shape[1] and adapter.b.shape[0] == first.b.shape[0]
        sizes = f"in {adapter.a.shape[1]}, out {adapter.b.shape[0]}"
        require(fits, where, f"have the start's in {first.a.shape[1]} and out {first.b.shape[0]}", sizes)
    missing = next((module for module in offset.adapters if module not in learnt.adapters), None)
    require(missing is None, f"'{trained}'", "hold every layer of the start", f"no {missing}")
    joined, errors = {}, {}
    for module in each(learnt.adapters, "layers", "converting"):
        joined[module], errors[module] = _joined(
            learnt.adapters[module], offset.adapters[module], offset.scalings[module] / learnt.scalings[module], rank
        )
    with whole():
        write_peft(folder, learnt._replace(adapters=joined))
    return errors


def _joined(learnt: Adapter, offset: Adapter, ratio: float, rank: int | None) -> tuple[Adapter, float]:
    """[B, ratio B_offset] and [A; A_offset], or their product's best approximation, and its relative error."""
    dtype = learnt.a.dtype
    a: Any = np.concatenate([np.asarray(learnt.a), np.asarray(offset.a).astype(dtype)])
    second = np.asarray(offset.b).astype(np.float64) * ratio
    b: Any = np.concatenate([np.asarray(learnt.b), second.astype(dtype)], axis=1)
    if rank is None:
        return Adapter(a, b), 0.0
    q, left = np.linalg.qr(b.astype(np.float64))
    p, right = np.linalg.qr(a.astype(np.float64).T)
    u, s, vt = np.linalg.svd(left @ right.T)
    kept = min(rank, len(s))
    root = np.sqrt(s[:kept])
    a, b = root[:, None] * (vt[:kept] @ p.T), q @ u[:, :kept] * root
    error = float(np.linalg.norm(s[kept:]) / max(np.linalg.norm(s), np.finfo(float).tiny))
    return Adapter(a.astype(dtype), b.astype(dtype)), error
