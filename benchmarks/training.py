"""Job g: forward and backward passes of a Vision Transformer with LoRA on all linear layers, beside PyTorch and peft.

The other side is transformers' ViT with peft, eager and compiled: timm's cannot be imported without torchvision, whose
builds for CPUs do not fit the release of PyTorch that is measured here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np

from benchmarks.peers.processes import cores
from benchmarks.timing import interleaved, seconds

RANK, BATCH = 8, {"tiny": 256, "small": 32}
OURS = "lora_flow vision"
SAME = 1e-4  # by which the losses of the same images may differ


def run(quick: bool) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {}
    for config in ("tiny",) if quick else ("tiny", "small"):
        calls, losses, first = {}, {}, {}
        for name, step in _steps(config).items():
            found: list[float] = []
            first[name] = seconds(lambda step=step, found=found: found.append(step()))
            calls[name], losses[name] = step, found[0]
        agree = max(abs(loss - losses[OURS]) for loss in losses.values())
        if agree > SAME:
            raise ValueError(f"the losses must agree to {SAME:g}, got {losses}")
        timed = interleaved(calls, 5 if quick else 25, 5.0 if quick else 25.0)
        for name, row in timed.items():
            rows[f"{config}, {name}"] = row | {"first_s": first[name], "images_per_s": BATCH[config] / row["median_s"]}
    return {"batch": BATCH, "rank": RANK, "threads": cores(), "rows": rows}


def _steps(config: str) -> dict[str, Callable[[], float]]:
    """A step of each contestant, from the same weights on the same images; it returns the loss."""
    from flax import nnx
    from lora_flow_vision.config import CONFIGS
    from lora_flow_vision.model import ViT
    from lora_flow_vision.weights import save_vit

    size = CONFIGS[config]
    model = ViT(size, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    images = rng.standard_normal((BATCH[config], size.image_size, size.image_size, size.channels)).astype(np.float32)
    labels = rng.integers(0, size.classes, BATCH[config])
    with tempfile.TemporaryDirectory() as folder:
        save_vit(model, folder)
        return {OURS: _ours(model, images, labels), **_theirs(folder, images, labels)}


def _ours(model: Any, images: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    from lora_flow_vision.lora import linear_layers
    from lora_flow_vision.task import NetworkTask

    from lora_flow import gaussian_init

    task = NetworkTask(model, images, labels, list(linear_layers(model)))
    start = gaussian_init(jax.random.key(0), task, rank=RANK, alpha=0.02)
    start = jax.tree.map(lambda leaf: leaf.astype(np.float32), start)
    step = eqx.filter_jit(lambda task, adapters: jax.value_and_grad(task.loss)(adapters))

    def call() -> float:
        loss, slopes = step(task, start)
        jax.block_until_ready(slopes)
        return loss.item()

    return call


def _theirs(folder: str, images: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[], float]]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import ViTForImageClassification

    torch.set_num_threads(cores())
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "classifier"]
    inputs = torch.tensor(images.transpose(0, 3, 1, 2).copy())
    targets = torch.tensor(labels)

    def peer(compiled: bool) -> Callable[[], float]:
        base = ViTForImageClassification.from_pretrained(folder)
        model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=linear))
        adapters = [weight for weight in model.parameters() if weight.requires_grad]
        forward = torch.compile(model) if compiled else model

        def call() -> float:
            loss = torch.nn.functional.cross_entropy(forward(pixel_values=inputs).logits, targets)
            torch.autograd.grad(loss, adapters)
            return loss.item()

        return call

    return {"PyTorch, transformers and peft": peer(False), "the same, torch.compile": peer(True)}
