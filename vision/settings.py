"""What `lora-flow vision` can be told. Imports no JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_flow.checks import require, require_choice
from lora_flow.memory import require_memory
from vision.config import CONFIGS

OPTIMIZERS = ("flow", "sgd", "adam")
INITS = ("gaussian-A", "gaussian-B", "spectral", "lora-one")
PRECISIONS = ("single", "bfloat16")
DATA = ("digits", "mnist", "fashion-mnist", "cifar10")
PUBLISHED_STDS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # arXiv 2503.06982, section 5.2
HEAD = "head"
LEAST = 1e-15  # of standard deviations: single precision holds their squares, and those of 1 over it


@dataclasses.dataclass(frozen=True)
class VisionSettings:
    """Every setting of the image check. Where a flag takes several values, all combinations are run."""

    data: str = "digits"
    """The images: digits (comes with scikit-learn), mnist, fashion-mnist or cifar10."""
    data_dir: str = ""
    """The folder of the data set's files (IDX for the MNISTs, the binary version for CIFAR-10). Unless given, a folder
    where they are known to be installed, or a download that is kept and held to its checksum each time."""
    weights: str = "shipped"
    """Pretrained weights: shipped (a small ViT pretrained on Fashion-MNIST), a folder with config.json and
    model.safetensors as Hugging Face keeps ViTs, or a name on its hub such as google/vit-base-patch16-224."""
    revision: str = ""
    """Of weights on the hub: the commit, branch or tag; the newest unless given. The run keeps its commit."""
    config: str = ""
    """What the weights must be: tiny, small, vit-small, vit-base or vit-large; any unless given."""
    image_size: int = 0
    """Height and width that images are resized to, a multiple of the patch size; the weights' own unless given."""
    layers: str = HEAD
    """The layers that carry LoRA, as a pattern on their paths: head, all, attention/(query|value), ..."""
    optimizer: tuple[str, ...] = OPTIMIZERS
    """How adapters are trained: flow (the gradient flow itself; for the head alone), sgd, adam."""
    init: tuple[str, ...] = INITS
    """How they start: gaussian-A (A random, B = 0), gaussian-B, and at the norm of gaussian-A spectral and lora-one."""
    alpha: tuple[float, ...] = PUBLISHED_STDS
    """Standard deviations of the random factor's entries, over which losses are compared."""
    aligned_at: float = 1e-3
    """One more standard deviation, small, at which alignment is followed."""
    rank: tuple[int, ...] = (4, 8)
    """LoRA ranks."""
    scaling: float = 1.0
    """LoRA's output multiplier s."""
    seeds: int = 5
    """Number of random starts, seeds 0, 1, ...; common to all other settings."""
    steps: int = 1000
    """Steps of sgd and adam; the flow goes to time steps times the rate of sgd."""
    sgd_rate: float = 0.1
    """Step size of sgd, the paper's."""
    adam_rate: float = 0.01
    """Step size of adam, the paper's."""
    batch_size: int = 0
    """Images a step of sgd and adam, drawn by the seed; 0 for all of them at every step."""
    limit: int = 0
    """Use only the first so many training and test images; 0 for all."""
    precision: str = "single"
    """Of the network: single, or bfloat16 (mixed: weights in single precision). The flow is in double."""

    def check(self) -> None:
        """**Raises:** `InputError` for what can be seen to be wrong without the data and the weights."""
        require_choice("data", self.data, DATA)
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("config", self.config, ("", *CONFIGS))
        for name, choices in (("optimizer", OPTIMIZERS), ("init", INITS)):
            for one in getattr(self, name):
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
        """What grows with numbers alone: the results, and minibatches that are drawn beforehand."""
        together = len(self.alphas) * (self.seeds if self.layers == HEAD else 1)
        lanes = len(self.optimizer) * len(self.init) * len(self.rank) * len(self.alphas) * self.seeds
        require_memory("seeds and steps", f"{self.seeds} and {self.steps}", 8.0 * 8 * lanes * (32 + self.steps // 100))
        require_memory("batch_size", self.batch_size, 4.0 * together * self.steps * self.batch_size)

    @property
    def alphas(self) -> tuple[float, ...]:
        """All of them, `aligned_at` first."""
        return (self.aligned_at, *sorted(self.alpha))


def from_table(table: Mapping[str, Any]) -> VisionSettings:
    """The inverse of `dataclasses.asdict`, for a table whose tuples have become lists."""
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in table.items()}
    return VisionSettings(**values)
