"""Runs of gradient descent, or of an optimiser, as a trainer leaves them: PEFT folders over steps."""

import jax
import numpy as np
from safetensors.numpy import save_file

from lora_flow import Adapter, SingleLayer, descend, gaussian_init
from lora_flow.bridge.peft_folder import PeftAdapters, write_peft

SHAPES = {"model.layers.0.q_proj": (12, 16), "model.layers.1.q_proj": (9, 16)}
SCALING, RANK = 2.0, 3


def descents(seed=0):
    """-dL/dW of each layer, with singular values 1/k and 0.7/k."""
    rng, found = np.random.default_rng(seed), {}
    for size, (name, shape) in zip((1.0, 0.7), SHAPES.items(), strict=True):
        u, v = (np.linalg.qr(rng.standard_normal((n, min(shape))))[0] for n in shape)
        found[name] = size * (u / np.arange(1, min(shape) + 1)) @ v.T
    return found


def trained(folder, *, alpha=1e-3, steps=200, saves=21, step=0.05, dtype=np.float64):
    """A run of each layer by itself; the files by argument's name, the simulator's runs, and the loss at the start."""
    runs = {}
    for name, descent in descents().items():
        problem = SingleLayer(descent, scaling=SCALING)
        start = gaussian_init(jax.random.key(len(runs)), problem, rank=RANK, alpha=alpha)
        runs[name] = descend(problem, start, steps=steps, step=step, saves=saves, save_adapters=True)
    for place, at in enumerate(next(iter(runs.values())).iterations):
        adapters = {
            name: Adapter(*(np.asarray(factor[place]).astype(dtype) for factor in run.history[0]))
            for name, run in runs.items()
        }
        write_peft(folder / "run" / f"checkpoint-{int(at)}", PeftAdapters(adapters, dict.fromkeys(adapters, SCALING)))
    gradients = folder / "gradients.safetensors"
    save_file({f"{name}.weight": -descent.astype(dtype) for name, descent in descents().items()}, gradients)
    loss = sum(float(run.observables["loss"][0]) for run in runs.values())
    return {"run": folder / "run", "gradients": gradients, "progress": False}, runs, loss
