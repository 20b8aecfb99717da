"""The sizes of Vision Transformers, from one that trains in seconds on a CPU to ViT-B/16."""

from __future__ import annotations

import dataclasses

from lora_flow.checks import require


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A pre-norm Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929).

    **Raises:** `InputError` where the patches do not tile the image or the heads do not share out the width.
    """

    image_size: int
    """Height and width of an image, in pixels."""
    patch_size: int
    channels: int
    width: int
    """Entries of a token."""
    depth: int
    """Number of blocks."""
    heads: int
    """Attention heads."""
    hidden: int
    """Width of the hidden layer of each block's perceptron."""
    classes: int = 10
    eps: float = 1e-12
    """Added to the variance by layer normalisation."""

    def __post_init__(self) -> None:
        fits = self.image_size % self.patch_size == 0
        require(fits, "image_size", f"be a multiple of patch_size ({self.patch_size})", self.image_size)
        require(self.width % self.heads == 0, "width", f"be a multiple of heads ({self.heads})", self.width)

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """The patches and the class token."""
        return self.patches + 1


CONFIGS = {
    "tiny": ViTConfig(28, 7, 1, width=128, depth=3, heads=4, hidden=256),
    "small": ViTConfig(32, 4, 3, width=192, depth=6, heads=3, hidden=768),
    "vit-small": ViTConfig(224, 16, 3, width=384, depth=12, heads=6, hidden=1536, classes=1000),
    "vit-base": ViTConfig(224, 16, 3, width=768, depth=12, heads=12, hidden=3072, classes=1000),
    "vit-large": ViTConfig(224, 16, 3, width=1024, depth=24, heads=16, hidden=4096, classes=1000),
}
