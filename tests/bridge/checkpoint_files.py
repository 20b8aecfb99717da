"""Small checkpoints with their gradients and inputs, in files."""

import json

import numpy as np
from safetensors.numpy import save_file

SHAPES = {
    f"model.layers.{i}.self_attn.{name}.weight": shape
    for i in range(2)
    for name, shape in (("q_proj", (12, 16)), ("v_proj", (8, 16)))
}
TARGETS = "q_proj|v_proj"


def drawn(seed, shapes=SHAPES, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write(folder, dtype=np.float32, shards=1):
    """A checkpoint with two other arrays, its gradients and its inputs; their paths, by the names of the arguments."""
    folder.mkdir(exist_ok=True)
    rest = {"model.embed_tokens.weight": np.ones((20, 16), dtype), "model.norm.weight": np.ones(16, dtype)}
    arrays = drawn(0, dtype=dtype) | rest
    if shards == 1:
        save_file(arrays, folder / "model.safetensors")
    else:
        placed = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(arrays)}
        for shard in set(placed.values()):
            save_file({name: arrays[name] for name, where in placed.items() if where == shard}, folder / shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    save_file(drawn(1), folder / "gradients.safetensors")
    inputs = drawn(2, {name.replace(".weight", ".inputs"): (50, shape[1]) for name, shape in SHAPES.items()})
    save_file(inputs, folder / "activations.safetensors")
    return {
        "checkpoint": folder / "model.safetensors" if shards == 1 else folder,
        "gradients": folder / "gradients.safetensors",
        "activations": folder / "activations.safetensors",
        "targets": TARGETS,
        "progress": False,
    }
