"""One lane of a run for PyTorch: the frozen model as a Hugging Face folder, and its adapters in PEFT's layout."""

from __future__ import annotations

from pathlib import Path

from lora_flow.checks import require
from lora_flow.storage.locks import locked
from lora_flow.storage.swap import replacing
from lora_flow_vision.base import base_model, checkpoint
from lora_flow_vision.folder import stored_settings
from lora_flow_vision.peft import export_peft
from lora_flow_vision.results import load_adapters, load_vision
from lora_flow_vision.weights import save_vit


def export(
    run: str | Path, folder: str | Path, *, optimizer: str, init: str, alpha: float, rank: int, seed: int
) -> tuple[Path, Path]:
    """Writes `folder/base` and `folder/adapters`, and returns these paths.

    `transformers.ViTForImageClassification.from_pretrained(base)` and `peft.PeftModel.from_pretrained(model, adapters)`
    then compute what the lane ended with; the images' mean and standard deviation are in `preprocessor_config.json`.

    **Raises:** `InputError` where the run has no such lane or is not finished, or the folder exists.
    """
    settings, folder = stored_settings(Path(run).expanduser()), Path(folder).expanduser()
    adapters = load_adapters(run, optimizer=optimizer, init=init, alpha=alpha, rank=rank, seed=seed)
    require(not folder.exists(), "folder", "be new", f"'{folder}'")
    base = base_model(settings, checkpoint(settings).folder, load_vision(run).attrs["classes"])
    with locked(folder), replacing(folder) as new:
        save_vit(base.model, new / "base", mean=base.mean, std=base.std)
        export_peft(new / "adapters", adapters, settings.scaling, base="base")
    return folder / "base", folder / "adapters"
