"""Initial adapters for a checkpoint, layer by layer, as a folder of PEFT's."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import scipy

from lora_flow.adapter import Adapter
from lora_flow.bridge.checkpoints import open_checkpoint
from lora_flow.bridge.gradients import Gradients, Inputs
from lora_flow.bridge.layers import Layer, choose, read_names
from lora_flow.bridge.peft_folder import NEW, PeftAdapters, write_into
from lora_flow.bridge.ranks import Ranks, read_ranks
from lora_flow.bridge.schemes import Start, check_ranks, need_of, offsets, start
from lora_flow.bridge.sizes import UPDATE, Measured, choose_sizes, measure
from lora_flow.checks import as_path, require, require_choice, require_integer, require_number
from lora_flow.initialization import SIDES
from lora_flow.runtime.interrupts import whole
from lora_flow.runtime.progress import Progress
from lora_flow.storage.locks import locked
from lora_flow.storage.swap import replacing
from lora_flow.version import __version__

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(jax.numpy.bfloat16)}
MANIFEST, OFFSET = "start.json", "offset"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Initial:
    """What `peft_init` has written: the folder and the manifest, whose `layers` say what each start is like."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def layers(self) -> dict[str, dict[str, Any]]:
        return self.manifest["layers"]

    def __str__(self) -> str:
        kept, layers = self.manifest["offset"], self.layers.values()
        ranks = sorted({one["rank"] for one in layers})
        told = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        lines = [f"{self.manifest['init']}: {len(self.layers)} layers of rank {told}, in {self.folder}"]
        residuals = [one["residual"] for one in layers if one["residual"] is not None]
        if residuals:
            lines.append(f"largest residual of a singular pair, ||M^T u - s v||/s: {max(residuals):.1e}")
        held = [one["held"] for one in layers if one["held"] is not None]
        if held:
            what = self.manifest["made_of"]
            lines.append(f"the rank holds {min(held):.1%} to {max(held):.1%} of a layer's squared norm of the {what}")
        largest = max(one["update"] for one in layers)
        lines.append(f"s ||B A||/||W||: {largest:.2g} at the most{'; the offset takes it back' if kept else ''}")
        change = self.manifest["loss_change"]
        if change is not None and not kept:
            lines.append(f"the loss changes by {change:.3g} to first order")
        dead = sum(one["dead_directions"] for one in layers)
        if dead:
            lines.append(f"{dead} directions are zero in both factors, and stay so")
        return "\n".join(lines)


def peft_init(
    checkpoint: str | Path,
    out: str | Path,
    *,
    targets: str,
    init: str = "gaussian",
    rank: int | str | Sequence[int | str] = 16,
    max_rank: int = 64,
    scaling: float = 1.0,
    size: float | str = "auto",
    update: float = UPDATE,
    loss_change: float | None = None,
    side: str = "A",
    gradients: str | Path | None = None,
    activations: str | Path | None = None,
    names: str | Path | None = None,
    base: str = "",
    dtype: str = "float32",
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> Initial:
    """Initial LoRA adapters for a checkpoint, by any of `INITIALIZATIONS`, in a folder that PEFT loads.

    Layers are read one at a time, so that memory is bounded by the largest. `out` is a new folder with
    `adapter_config.json`, `adapter_model.safetensors` and the manifest `start.json`. For a scheme that offsets the
    weights it also has `offset/`, a second adapter (A_0, -B_0) to be loaded frozen beside the first; the checkpoint
    stays as it is. `lora_flow.bridge.torch.apply_start` loads both.

    **Arguments:**

    - `checkpoint`: a `.safetensors` file, or a folder with `model.safetensors` or its index.
    - `targets`: a regular expression for the modules, of whole names or of what is behind a dot.
    - `rank`: a number, or several words: `16`, `q_proj=32` for some layers, `energy:0.9` for what holds 90 % of the
      squared norm of the matrix that the start is made of, at most `max_rank`.
    - `scaling`: the output multiplier s; PEFT's lora_alpha is s times the rank.
    - `size`: the scale alpha, or "auto", see `lora_flow.bridge.sizes.choose_sizes`; then `update` is the relative
      change of a weight that a start may make, and `loss_change` asks for a fall of the loss instead.
    - `gradients`, `activations`: `.safetensors` files, for the schemes that are made of them
      (`lora_flow.bridge.gradients`).
    - `names`: a JSON file that maps modules of the checkpoint to those of the model, where they differ.
    - `base`: the model's name, for PEFT's settings. `dtype`: of the factors, float32, float16 or bfloat16.

    **Raises:** `InputError` with the layer's name, before anything is written.
    """
    folder = as_path("out", out).expanduser()
    require(overwrite or not folder.exists(), "out", "be a new folder, or come with --overwrite", f"'{folder}'")
    require(not folder.exists() or (folder / MANIFEST).is_file(), "out", "be new, or hold a start", f"'{folder}'")
    words = [rank] if isinstance(rank, (int, str)) else list(rank)
    asked = {"targets": targets, "rank": words, "max_rank": max_rank, "scaling": scaling, "size": size}
    asked |= {"update": update, "loss_change": loss_change, "side": side, "dtype": dtype, "seed": seed, "base": base}
    _check_settings(asked)
    work = _opened(init, checkpoint, targets, read_ranks(words, max_rank), gradients, activations, names)
    require(work.given is not None or loss_change is None, "gradients", "be given for loss_change", "none")
    starts, measured, digests = _made(work, scaling, seed, side, progress)

    fixed = None if isinstance(size, str) else float(size)
    sizes = choose_sizes(init, side, measured, size=fixed, update=update, gain=loss_change)
    adapters = {name: _sized(name, starts[name].adapter, sizes[name], dtype) for name in starts}
    transposed = any(layer.transposed for layer in work.layers)
    config = NEW | {"base_model_name_or_path": base or None, "init_lora_weights": True, "fan_in_fan_out": transposed}
    peft = PeftAdapters(adapters, dict.fromkeys(adapters, float(scaling)), config)
    told = {
        one.name: _told(one, starts[one.name], measured[one.name], sizes[one.name], adapters[one.name])
        for one in work.layers
    }
    manifest = _manifest(work, asked, digests, told)
    _write(folder, peft, manifest)
    return Initial(folder, manifest)


class _Work(NamedTuple):
    """Files that are opened and fit together."""

    init: str
    path: Path
    layers: list[Layer]
    ranks: Ranks
    given: Gradients | None
    fed: Inputs | None

    @property
    def files(self) -> list[Path]:
        found = [layer.tensor.path for layer in self.layers]
        return list(dict.fromkeys([*found, *(one.path for one in (self.given, self.fed) if one is not None)]))


def _check_settings(asked: Mapping[str, Any]) -> None:
    require_choice("side", asked["side"], SIDES)
    require_choice("dtype", asked["dtype"], DTYPES)
    require_integer("seed", asked["seed"], "be at least 0", 0)
    auto = isinstance(asked["size"], str)
    require(not auto or asked["size"] == "auto", "size", "be a number or 'auto'", repr(asked["size"]))
    must = "be left out where size is given"
    require(auto or asked["loss_change"] is None, "loss_change", must, asked["loss_change"])
    for name in ("scaling", "update", "loss_change", *(() if auto else ("size",))):
        if asked[name] is not None:
            require_number(name, asked[name], "be positive and finite", lambda known: known > 0)


def _opened(
    init: str, checkpoint: Any, targets: str, ranks: Ranks, gradients: Any, activations: Any, names: Any
) -> _Work:
    need = need_of(init)
    for what, of, file in (("gradients", "gradient", gradients), ("activations", "inputs", activations)):
        wanted = need is not None and need.what == of
        require(not wanted or file is not None, what, f"be given for {init}, which is made of them", "none")
    path = as_path("checkpoint", checkpoint).expanduser()
    renamed = None if names is None else read_names(as_path("names", names).expanduser())
    layers = choose(open_checkpoint(path), targets, renamed)
    check_ranks(init, layers, ranks)
    given = None if gradients is None else Gradients(as_path("gradients", gradients).expanduser())
    fed = None if activations is None else Inputs(as_path("activations", activations).expanduser())
    for layer in layers:
        if given is not None:
            given.check(layer, 2 * ranks.of(layer))
            entire = need is None or need.what != "gradient" or need.times > 0 or given.is_whole(layer)
            where = f"the gradient of {layer.module} in {given.path}"
            require(entire, where, f"be whole for {init}, which projects all of it", "thin factors")
        if fed is not None:
            fed.check(layer, ranks.of(layer))
    return _Work(init, path, layers, ranks, given, fed)


def _made(
    work: _Work, scaling: float, seed: int, side: str, shown: bool
) -> tuple[dict[str, Start], dict[str, Measured], dict[str, str]]:
    """Each layer's start for alpha = 1, and what it does; and the digests of the files. One layer is held at a time."""
    starts, measured, digests = dict[str, Start](), dict[str, Measured](), dict[str, str]()
    given, fed, files = work.given, work.fed, work.files
    with Progress(len(work.layers) + len(files), "steps", shown=shown, what="starts") as bar:
        for layer in work.layers:
            weight = layer.weight()
            how: dict[str, Any] = {"scaling": scaling, "seed": seed, "side": side, "weight": weight}
            made = start(work.init, layer, work.ranks, gradients=given, inputs=fed, **how)
            descent = None if given is None else given.dense(layer)
            starts[layer.name], measured[layer.name] = made, measure(made.adapter, scaling, weight, descent)
            bar.update()
        for file in files:
            with file.open("rb") as content:
                digests[str(file)] = hashlib.file_digest(content, "sha256").hexdigest()
            bar.update()
    return starts, measured, digests


def _manifest(
    work: _Work, asked: Mapping[str, Any], digests: Mapping[str, str], told: Mapping[str, Any]
) -> dict[str, Any]:
    need, changes = need_of(work.init), [one["loss_change"] for one in told.values()]
    packages = {"jax": jax, "numpy": np, "scipy": scipy, "safetensors": safetensors}
    versions = {name: package.__version__ for name, package in packages.items()}
    sources = {"checkpoint": work.path, "gradients": work.given.path if work.given else None}
    sources["activations"] = work.fed.path if work.fed else None
    return {
        "format": FORMAT,
        "init": work.init,
        "offset": offsets(work.init),
        "made_of": need and need.what,
        "settings": dict(asked),
        "sources": {name: path and str(path) for name, path in sources.items()} | {"sha256": dict(digests)},
        "versions": {"lora_flow": __version__, "python": platform.python_version()} | versions,
        "loss_change": None if None in changes else math.fsum(changes),
        "layers": dict(told),
    }


def _write(folder: Path, peft: PeftAdapters, manifest: Mapping[str, Any]) -> None:
    with whole(), locked(folder), replacing(folder, gone=[OFFSET]) as new:
        write_into(new, peft)
        if manifest["offset"]:
            (new / OFFSET).mkdir()
            minus = {name: Adapter(adapter.a, -adapter.b) for name, adapter in peft.adapters.items()}
            write_into(new / OFFSET, peft._replace(adapters=minus))
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _sized(name: str, adapter: Adapter, alpha: float, dtype: str) -> Adapter:
    """The factors for alpha, in the type that is stored."""
    with np.errstate(over="ignore"):
        a, b = ((alpha * factor).astype(DTYPES[dtype]) for factor in adapter)
    finite = bool(np.all(np.isfinite(a)) and np.all(np.isfinite(b)))
    require(finite, f"the start of {name}", f"be finite in {dtype}", "entries that are not")
    return Adapter(a, b)


def _told(layer: Layer, made: Start, measured: Measured, alpha: float, adapter: Adapter) -> dict[str, Any]:
    rank, source = made.adapter.rank, made.source
    dead = ~np.any(np.asarray(adapter.a), axis=1) & ~np.any(np.asarray(adapter.b), axis=0)
    return {
        "parameter": layer.tensor.name,
        "shape": list(layer.shape),
        "transposed": layer.transposed,
        "dtype": layer.tensor.kind,
        "rank": rank,
        "alpha": alpha,
        "update": alpha**2 * measured.update,
        "loss_change": None if measured.gain is None else -(alpha**2) * measured.gain,
        "residual": None if source is None else source.residual,
        "held": None if source is None else min(source.held(rank), 1.0),
        "dead_directions": int(np.sum(dead)),
    }
