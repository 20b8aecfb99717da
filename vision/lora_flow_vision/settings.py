"""The settings of `lora-flow vision`. Imports no JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_flow.checks import require, require_choice
from lora_flow.runtime.memory import require_memory
from lora_flow_vision.config import CONFIGS

OPTIMIZERS = ("flow", "sgd", "adam")
LEARNED = "learned"  # before the colon: a folder of lora-flow optimise
INITS = ("gaussian-A", "gaussian-B", "spectral", "lora-one")
PRECISIONS = ("single", "bfloat16")
DATA = ("digits", "mnist", "fashion-mnist", "cifar10")
PUBLISHED_STDS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # arXiv 2503.06982, section 5.2
HEAD = "head"
LEAST = 1e-15  # of standard deviations: single precision holds their squares, and those of 1 over it


@dataclasses.dataclass(frozen=True)
class VisionSettings:
    """Every setting of the image check, which runs all combinations of the values given."""

    data: str = "digits"
    """The images: digits (from scikit-learn), mnist, fashion-mnist or cifar10."""
    data_dir: str = ""
    """The folder of the data set's files (IDX for the MNISTs, the binary version for CIFAR-10). By default a folder
    where such files are usually installed, or a download that is kept, with its checksum checked each time."""
    weights: str = "shipped"
    """Pretrained weights: shipped (a small ViT pretrained on Fashion-MNIST), a folder with config.json and
    model.safetensors in Hugging Face's layout, or a name on its hub such as google/vit-base-patch16-224."""
    revision: str = ""
    """For weights on the hub: the commit, branch or tag; by default the newest. The run keeps the commit."""
    config: str = ""
    """The architecture that the weights must have: tiny, small, vit-small, vit-base or vit-large; by default any."""
    image_size: int = 0
    """Height and width that images are resized to, a multiple of the patch size; by default the weights' own."""
    layers: str = HEAD
    """The layers that carry LoRA, as a pattern on their paths: head, all, attention/(query|value), ..."""
    optimizer: tuple[str, ...] = OPTIMIZERS
    """Optimisers: flow (the gradient flow itself; for the head alone), sgd, adam."""
    init: tuple[str, ...] = INITS
    """Initialisations: gaussian-A (A random, B = 0), gaussian-B; spectral, lora-one and learned:FOLDER (what
    lora-flow optimise has learned) at gaussian-A's norm."""
    alpha: tuple[float, ...] = PUBLISHED_STDS
    """Standard deviations of the random factor's entries, over which losses are compared."""
    aligned_at: float = 1e-3
    """One more standard deviation, a small one, at which alignment is followed."""
    rank: tuple[int, ...] = (4, 8)
    """LoRA ranks."""
    scaling: float = 1.0
    """LoRA's output multiplier s."""
    seeds: int = 5
    """Number of random starts, seeds 0, 1, ...; all combinations share the seeds."""
    steps: int = 1000
    """Steps of sgd and adam; the flow ends at the time steps x sgd_rate."""
    sgd_rate: float = 0.1
    """Step size of sgd; the default is the paper's."""
    adam_rate: float = 0.01
    """Step size of adam; the default is the paper's."""
    batch_size: int = 0
    """Images a step of sgd and adam, drawn by the seed; 0 for all images at every step."""
    limit: int = 0
    """Number of training and of test images to use, the first ones; 0 for all."""
    precision: str = "single"
    """Precision of the network: single, or bfloat16 (mixed: weights in single precision). The flow is in double."""

    def check(self) -> None:
        """**Raises:** `InputError` for settings that are wrong whatever the data and the weights are."""
        require_choice("data", self.data, DATA)
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("config", self.config, ("", *CONFIGS))
        for name, choices in (("optimizer", OPTIMIZERS), ("init", INITS)):
            for one in getattr(self, name):
                learned = name == "init" and one.startswith(f"{LEARNED}:")
                if not learned:
                    require_choice(name, one, choices)
        for name in ("optimizer", "init", "alpha", "rank"):
            listed = getattr(self, name)
            require(len(listed) > 0, name, "hold at least one value", "none")
            require(len(set(listed)) == len(listed), name, "name each value once", listed)
        require(all(0 < std < float("inf") for std in self.alpha), "alpha", "be positive and finite", self.alpha)
        for name, stds in (("alpha", self.alpha), ("aligned_at", (self.aligned_at,))):
            held = all(not 0 < std < LEAST and not std > 1 / LEAST for std in stds)
            must = f"lie between {LEAST:g} and {1 / LEAST:g}, where single precision has room to compute"
            require(held, name, must, stds if name == "alpha" else self.aligned_at)
        require(0 < self.aligned_at < min(self.alpha), "aligned_at", "be positive and below alpha", self.aligned_at)
        for name in ("seeds", "steps"):
            require(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        for name in ("sgd_rate", "adam_rate", "scaling"):
            require(0 < getattr(self, name) < float("inf"), name, "be positive and finite", getattr(self, name))
        for name in ("batch_size", "limit", "image_size"):
            require(getattr(self, name) >= 0, name, "be at least 0", getattr(self, name))
        alone = self.layers == HEAD or "flow" not in self.optimizer
        self._check_room()
        require(alone, "optimizer", f"be sgd or adam where layers is not {HEAD!r}", ", ".join(self.optimizer))

    def _check_room(self) -> None:
        """Checks the memory of results and of minibatches that are drawn beforehand, which grow with numbers alone."""
        together = len(self.alphas) * (self.seeds if self.layers == HEAD else 1)
        lanes = len(self.optimizer) * len(self.init) * len(self.rank) * len(self.alphas) * self.seeds
        require_memory("seeds and steps", f"{self.seeds} and {self.steps}", 8.0 * 8 * lanes * (32 + self.steps // 100))
        require_memory("batch_size", self.batch_size, 4.0 * together * self.steps * self.batch_size)

    @property
    def alphas(self) -> tuple[float, ...]:
        """All standard deviations, `aligned_at` first."""
        return (self.aligned_at, *sorted(self.alpha))


def from_table(table: Mapping[str, Any]) -> VisionSettings:
    """The inverse of `dataclasses.asdict`, for a table whose tuples have become lists."""
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in table.items()}
    return VisionSettings(**values)
