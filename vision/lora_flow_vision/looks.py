"""The recognised kinds of folders and files that cannot be read, for the one line that refuses them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SAVE_AGAIN = "load it there and write it by save_pretrained(folder)"
WEIGHTS = {  # of other layouts, by the ends of their files' names
    ".bin": f"pickled PyTorch weights; {SAVE_AGAIN}",
    ".pt": f"pickled PyTorch weights; {SAVE_AGAIN}",
    ".pth": f"pickled PyTorch weights; {SAVE_AGAIN}",
    ".ckpt": f"pickled PyTorch weights; {SAVE_AGAIN}",
    ".h5": f"weights of TensorFlow or Keras; {SAVE_AGAIN}",
    ".msgpack": f"weights of Flax's older layout; {SAVE_AGAIN}",
    ".npz": f"weights of Google's vision_transformer; {SAVE_AGAIN}",
    ".onnx": "an exported program, from which its weights cannot be taken",
    ".gguf": "quantised weights for llama.cpp",
}
MODELS = {
    "deit": "deit, a DeiT with a distillation token",
    "dinov2": "dinov2, which has layer scale and a head on two tokens",
    "dinov2_with_registers": "dinov2_with_registers, which has layer scale and register tokens",
    "dinov3_vit": "dinov3_vit, which has rotary positions and register tokens",
    "vit_mae": "vit_mae, a masked autoencoder",
    "clip": "clip, whose vision tower has quick_gelu and a norm before the blocks",
}
UNUSED = ("pooler.", "embeddings.mask_token", "decoder.")  # which the class token does not pass through


PICTURES = (".png", ".jpg", ".jpeg")
DATA = {  # of other layouts, by the ends of their files' names
    ".npz": "arrays as Keras keeps them",
    ".npy": "an array of NumPy's",
    ".parquet": "a table as Hugging Face keeps data sets",
    ".arrow": "a table as Hugging Face keeps data sets",
    ".csv": "a table of text",
    ".pt": "pickled tensors",
    ".pkl": "pickled",
    ".mat": "arrays of MATLAB's",
    ".zip": "an archive that was not unpacked",
    ".tfrecord": "records of TensorFlow's",
}


def no_dataset(folder: Path) -> str:
    """The contents of a folder without a data set's IDX or binary files, in words; "" for unknown contents."""
    for path in sorted(folder.iterdir()):
        if path.name in ("cifar-10-python.tar.gz", "cifar-10-batches-py"):
            return f"'{path.name}', which is pickled; take the binary version, cifar-10-binary.tar.gz"
        if path.suffix.lower() in DATA:
            return f"'{path.name}', {DATA[path.suffix.lower()]}; write its images and labels as IDX files"
        if path.suffix.lower() in PICTURES:
            return f"'{path.name}', a picture by itself; write all images and labels as IDX files"
    return ""


def no_checkpoint(folder: Path, wanted: tuple[str, ...]) -> str:
    """The contents of a folder without the needed files, in words."""
    missing = next(folder / name for name in wanted if not (folder / name).is_file())
    if not folder.is_dir():
        return f"the file '{folder}'" if folder.is_file() else f"no {missing}"
    if (folder / "adapter_config.json").is_file():
        return f"no {missing}: these are PEFT's adapters, without the model that they are for"
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in WEIGHTS:
            return f"no {missing}: '{path.name}' is {WEIGHTS[path.suffix.lower()]}"
    return f"no {missing}"


def other_model(config: Mapping[str, Any]) -> str:
    """The kind of model, other than a ViT, that a config describes, in words."""
    kind = config.get("model_type")
    if kind is None and "architecture" in config:
        return f"timm's {config['architecture']}, whose layers have other names"
    return MODELS.get(str(kind), str(kind))


def unused(name: str) -> bool:
    """Whether an array of a ViT's checkpoint has no part in what its class token becomes."""
    return name.removeprefix("vit.").removeprefix("deit.").startswith(UNUSED)


def other_array(name: str) -> str:
    """The kind of model that an array belongs to, in words."""
    last = name.rsplit(".", 1)[-1]
    if "distillation" in name or name.startswith("cls_classifier"):
        return f"{name}: a distilled DeiT, whose logits are the mean of two heads"
    if "layer_scale" in name or "lambda" in name:
        return f"{name}: a network with layer scale"
    if "absmax" in name or "scale" in last or last == "SCB" or "quant" in name:
        return f"{name}: quantised weights"
    if "lora_" in name or ".base_layer." in name:
        return f"{name}: a model that carries PEFT's adapters; write what its merge_and_unload() returns"
    return name
