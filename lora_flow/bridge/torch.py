"""PyTorch's side: gradients of a model as thin factors, and starts on a model. Nothing else here needs PyTorch.

`collect` runs the model's own backward passes and keeps of each layer's gradient only two sketches, so that memory is
O((out + in) r) a layer and no gradient outlives its hook. `apply_start` puts a start of `peft_init` on a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from lora_flow.bridge.checkpoints import open_checkpoint
from lora_flow.bridge.gradients import THIN
from lora_flow.bridge.init import MANIFEST, OFFSET
from lora_flow.bridge.peft_folder import read_peft
from lora_flow.checks import as_path, require, require_choice, require_integer
from lora_flow.storage.swap import appearing
from lora_flow.storage.tensors import read_json

Sketch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
HOWS = ("adapter", "subtract")


def collect(
    model: torch.nn.Module,
    batches: Callable[[], Iterable[Any]],
    out: str | Path,
    *,
    targets: str,
    rank: int,
    loss: Callable[[torch.nn.Module, Any], torch.Tensor] | None = None,
    passes: int = 2,
    seed: int = 0,
) -> dict[str, float]:
    """Writes thin factors of the mean gradient of each target's weight, for `peft_init`'s `gradients`.

    Of a gradient G only Y = G P and Z = Q^T G are accumulated over the batches, each with 2 r and some columns more,
    and G's memory is freed as soon as it is there. P and Q are random in the first pass; in each further pass they span
    what the pass before found, which is a step of subspace iteration. Sharp spectra need no further pass, slowly
    decaying ones do; what is returned tells.

    **Arguments:** `batches`, a function that returns the batches, the same at each call; `targets`, as for `peft_init`;
    `rank` r of the adapters; `loss(model, batch)`, by default `model(**batch).loss`; the number of `passes`.

    **Returns:** by parameter, how far the last pass moved the leading r right directions: the largest angle's sine.

    **Raises:** `InputError` for targets that match nothing, and for no batches.
    """
    require_integer("rank", rank, "be at least 1", 1)
    require_integer("passes", passes, "be at least 1", 1)
    path = as_path("out", out).expanduser()
    chosen = _weights(model, targets)
    measure = loss or (lambda model, batch: model(**batch).loss)
    generator = torch.Generator().manual_seed(seed)
    probes = {name: _probes(weight, rank, generator) for name, weight in chosen.items()}
    needs = {name: one.requires_grad for name, one in model.named_parameters()}
    moved: dict[str, float] = {}
    try:
        for name, one in model.named_parameters():
            one.requires_grad_(name in chosen)
        for number in range(passes):
            sketches, count = _one_pass(model, chosen, probes, batches(), measure)
            require(count > 0, "batches", "hold at least one", "none")
            last = number == passes - 1
            thin = {name: _factors(sketch, rank, count) for name, sketch in sketches.items()}
            moved = {name: _moved(probes[name][0], vt, rank) for name, (_, _, vt) in thin.items()}
            if not last:
                probes = {name: _next(sketch, generator) for name, sketch in sketches.items()}
    finally:
        for name, one in model.named_parameters():
            one.requires_grad_(needs[name])
    named = ((f"{name}.{part}", array) for name, one in thin.items() for part, array in zip(THIN, one, strict=True))
    with appearing(path) as file:
        file.write(save(dict(named), metadata={"format": "pt", "batches": str(count), "passes": str(passes)}))
    return moved


def names(model: torch.nn.Module, checkpoint: str | Path, out: str | Path) -> dict[str, str]:
    """Writes, for `peft_init`'s `names`, the model's name of each module of a checkpoint.

    By transformers' own table of renamed layers where the model has one, and else by the end of the name that the two
    have in common.

    **Raises:** `InputError` for a module that the model has not.
    """
    inside = {name.removesuffix(".weight") for name, _ in model.named_parameters() if name.endswith(".weight")}
    rename = _renaming(model)
    found = {}
    for parameter in open_checkpoint(as_path("checkpoint", checkpoint).expanduser()):
        module = parameter.removesuffix(".weight")
        if module == parameter:
            continue
        known = rename(parameter).removesuffix(".weight")
        ends = [name for name in inside if name == known or name.endswith(f".{known}") or known.endswith(f".{name}")]
        if len(ends) == 1:
            found[module] = ends[0]
    require(found, "model", f"have the modules of '{checkpoint}'", "none of them")
    with appearing(as_path("out", out).expanduser()) as file:
        file.write((json.dumps(found, indent=1) + "\n").encode())
    return found


def apply_start(model: torch.nn.Module, start: str | Path, how: str = "adapter") -> Any:
    """The model with a start of `peft_init`, ready to be trained, and the same function as before if the start offsets.

    With `how="adapter"` such a start's second adapter (A_0, -B_0), "offset", is active and frozen beside "default";
    the model's weights stay, and may be quantised. Save the trained one by
    `save_pretrained(folder, selected_adapters=["default"])`. With "subtract" s B_0 A_0 is subtracted from the weights
    in place, as PEFT's own schemes do.

    **Returns:** a `peft.PeftModel`.

    **Raises:** `InputError` for a folder that is no start, and where the model has not the modules of the start.
    """
    import peft

    require_choice("how", how, HOWS)
    folder = as_path("start", start).expanduser()
    require((folder / MANIFEST).is_file(), "start", f"be a folder of peft init, with {MANIFEST}", f"'{folder}'")
    stored, offsets = read_peft(folder), bool(read_json(folder / MANIFEST).get("offset"))
    modules = dict(model.named_modules())
    missing = next((module for module in stored.adapters if module not in modules), None)
    require(missing is None, "model", f"have the modules of '{folder}' (see peft init --names)", f"no {missing}")
    if offsets and how == "subtract":
        with torch.no_grad():
            for module, (a, b) in stored.adapters.items():
                weight: Any = modules[module].weight
                change = torch.from_numpy(stored.scalings[module] * (b.astype(np.float64) @ a.astype(np.float64)))
                change = change if change.shape == weight.shape and not _is_conv1d(modules[module]) else change.T
                weight -= change.to(weight.device, weight.dtype)
    adapted = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    if offsets and how == "adapter":
        adapted.load_adapter(str(folder / OFFSET), "offset")
        adapted.base_model.set_adapter(["default", "offset"])
        adapted.set_requires_grad("offset", False)
    return adapted


def _weights(model: torch.nn.Module, targets: str) -> dict[str, torch.nn.Parameter]:
    wanted = re.compile(rf"(.*\.)?({targets})")
    found = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if wanted.fullmatch(name) and isinstance(getattr(module, "weight", None), torch.nn.Parameter)
    }
    require(found, "targets", "match modules of the model", f"'{targets}', which matches none")
    for name, weight in found.items():
        require(weight.ndim == 2, name, "be a matrix", f"shape {tuple(weight.shape)}")
    return found


def _probes(weight: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """P `(columns, k)` and Q `(rows, 2 k)` with orthonormal columns: twice as many tell what the first leave open."""
    rows, columns = weight.shape
    count = min(2 * rank + 8, rows, columns)
    sizes = ((columns, count), (rows, min(2 * count, rows)))
    p, q = (torch.linalg.qr(torch.randn(*size, generator=generator))[0].to(weight.device) for size in sizes)
    return p, q


def _one_pass(
    model: torch.nn.Module,
    chosen: Mapping[str, torch.nn.Parameter],
    probes: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    batches: Iterable[Any],
    measure: Callable[[torch.nn.Module, Any], torch.Tensor],
) -> tuple[dict[str, Sketch], int]:
    sums = {
        name: [torch.zeros(len(q), p.shape[1]).to(p), torch.zeros(q.shape[1], len(p)).to(p)]
        for name, (p, q) in probes.items()
    }

    def keep(name: str) -> Callable[[torch.Tensor], None]:
        p, q = probes[name]

        def take(weight: torch.Tensor) -> None:
            gradient = weight.grad
            weight.grad = None  # at once: no gradient outlives its layer's step
            if gradient is not None:
                gradient = gradient.to(p.dtype)
                sums[name][0] += gradient @ p
                sums[name][1] += q.T @ gradient

        return take

    hooks = [weight.register_post_accumulate_grad_hook(keep(name)) for name, weight in chosen.items()]
    count = 0
    try:
        for batch in batches:
            measure(model, batch).backward()
            count += 1
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (y, z, *probes[name]) for name, (y, z) in sums.items()}, count


def _factors(sketch: Sketch, rank: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """G = Y (Q^T Y)^+ Z over the batches, as U, S, V^T; of the mean."""
    y, z, _, q = (one.double().cpu().numpy() for one in sketch)
    left, right = np.linalg.qr(y)[0], np.linalg.qr(z.T)[0]
    core = np.linalg.pinv(q.T @ left, rcond=1e-6) @ (z @ right)
    u, s, vt = np.linalg.svd(core)
    kept = min(2 * rank, len(s))
    parts = (left @ u[:, :kept], s[:kept] / count, vt[:kept] @ right.T)
    u, s, vt = (np.ascontiguousarray(part.astype(np.float32)) for part in parts)
    return u, s, vt


def _next(sketch: Sketch, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The leading row space of Z as P; the column space of Y, and as many random columns beside it, as Q."""
    y, z, p, q = sketch
    rows = torch.linalg.svd(z, full_matrices=False)[2][: p.shape[1]]
    more = torch.randn(len(q), q.shape[1] - y.shape[1], generator=generator).to(q)
    return rows.T.contiguous(), torch.linalg.qr(torch.cat([y / y.norm().clamp_min(1e-30), more], dim=1))[0]


def _moved(p: torch.Tensor, vt: np.ndarray, rank: int) -> float:
    """The sine of the largest angle between the leading right directions and the span of P."""
    leading = vt[: min(rank, len(vt))].astype(np.float64)
    basis = p.double().cpu().numpy()
    outside = leading - (leading @ basis) @ basis.T
    return float(np.linalg.norm(outside, 2))


def _renaming(model: torch.nn.Module) -> Callable[[str], str]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return lambda name: name
    mapping: Any = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    prefix, inside = getattr(model, "base_model_prefix", ""), model.state_dict()
    return lambda name: rename_source_key(name, renamings, converters, prefix, inside)[0]


def _is_conv1d(module: torch.nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"
