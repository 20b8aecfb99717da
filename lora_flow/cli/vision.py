"""`lora-flow vision`: the theory on images. The package `vision` does the work."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro
from lora_flow_vision.settings import VisionSettings

from lora_flow.checks import InputError, require
from lora_flow.cli.groups import Draws
from lora_flow.storage.remote import local_path


@dataclasses.dataclass(frozen=True)
class Vision(Draws):
    """Check the theory on images: a Vision Transformer whose layers carry LoRA, by gradient flow, SGD and Adam.

    Trains from standard deviations .025 ... 1 as in Figures 5, 6 and 7 of Xu et al. (arXiv 2503.06982), from random A,
    random B, spectral and one-step starts. The report gives a verdict on each claim, with the statistic. Results go to
    a run folder: settings.toml, results.zarr, adapters/, figures/ and report.md. A unit of work is stored as soon as it
    is done, with checkpoints in between; --resume continues. The defaults need no network and take a few minutes.

    Images and weights of your own choice:

    lora-flow vision --data fashion-mnist --weights FOLDER --config vit-base --out runs/vit

    LoRA on other layers, by minibatches:

    lora-flow vision --layers 'attention/(query|value)|head' --optimizer sgd adam --batch-size 64 --out runs/qv
    """

    out: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """The run folder."""
    resume: bool = False
    """Continue an unfinished check, with the settings that it was started with."""
    overwrite: bool = False
    """Replace the folder's check if the folder has one."""
    settings: VisionSettings = dataclasses.field(default_factory=VisionSettings)

    def from_file(self) -> Vision | None:
        """The command with the settings that a check was started with, for --resume."""
        require(not (self.resume and self.overwrite), "resume and overwrite", "not be given together", "both")
        if not self.resume:
            return None
        from lora_flow_vision.folder import stored_settings

        return dataclasses.replace(self, settings=stored_settings(local_path("out", self.out)))

    def run(self) -> int:
        try:
            import flax  # noqa: F401
        except ImportError as error:
            raise InputError("vision must have flax installed (pip install 'lora-flow[vision]'), got none") from error
        from lora_flow_vision.command import check

        return check(local_path("out", self.out), self.settings, self.resume, self.overwrite)
