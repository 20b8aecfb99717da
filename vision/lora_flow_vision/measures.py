"""The measurements of the image check: loss and accuracy on both sets, and each layer's alignment and norms."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_flow import Adapter, Adapters
from lora_flow.algebra.spectra import singular_triplets
from lora_flow.algebra.thin import gram_schmidt
from lora_flow_vision.task import Classification

MEASURES = {
    "train_loss": "training loss: mean cross-entropy",
    "test_loss": "test loss: mean cross-entropy",
    "train_accuracy": "training accuracy: share of images that are classified rightly",
    "test_accuracy": "test accuracy: share of images that are classified rightly",
    "alignment": "distance from alignment: equation 215 of arXiv 2503.06982, mean over layers, from 0 to 1",
    "norm_z": "||[B; A^T]||_F: root mean square over layers",
    "norm_update": "||B A||_F: root mean square over layers",
}


def targets(task: tuple[Array, ...], rank: int) -> tuple[Float[Array, "stacked {rank}"], ...]:
    """[U_r; V_r]/sqrt(2) of each layer's negative one-step gradient U S V^T: what [B; A^T] aligns with (H.2)."""

    def one(gradient: Array) -> Array:
        u, _, vt = singular_triplets(gradient, rank)
        return jnp.concatenate([u, vt.T]) / jnp.sqrt(2.0)

    return tuple(map(one, task))


def misalignment(adapter: Adapter, target: Float[Array, "stacked rank"]) -> Float[Array, ""]:
    """(1/sqrt(2r)) ||U U^T - T T^T||_F with U the left singular vectors of [B; A^T] and T the `target`.

    Equation 215 of arXiv 2503.06982. Both have r orthonormal columns, so the measure is sqrt(1 - ||U^T T||_F^2/r). Only
    the span of U counts, which needs no singular vectors.

    **Returns:** a scalar between 0, aligned, and 1.
    """
    basis, _ = gram_schmidt(adapter.stacked)
    overlap = jnp.sum((basis.T @ target.astype(basis.dtype)) ** 2) / adapter.rank
    return jnp.sqrt(jnp.maximum(1.0 - overlap, 0.0))


def measure(
    task: Classification, test: tuple[Array, Array], aims: tuple[Array, ...], adapters: Adapters
) -> dict[str, Array]:
    """All of `MEASURES` for one lane; `test` are inputs and labels, `aims` the `targets` of the layers."""
    train_loss, train_accuracy = task.evaluate(adapters, task.inputs, task.labels)
    test_loss, test_accuracy = task.evaluate(adapters, *test)
    aligned = [misalignment(adapter, aim) for adapter, aim in zip(adapters, aims, strict=True)]
    sizes = [jnp.sum(adapter.a**2) + jnp.sum(adapter.b**2) for adapter in adapters]
    updates = [jnp.sum((a @ a.T) * (b.T @ b)) for a, b in adapters]
    return {
        "train_loss": train_loss,
        "test_loss": test_loss,
        "train_accuracy": train_accuracy,
        "test_accuracy": test_accuracy,
        "alignment": jnp.mean(jnp.stack(aligned)),
        "norm_z": jnp.sqrt(jnp.mean(jnp.stack(sizes))),
        "norm_update": jnp.sqrt(jnp.mean(jnp.stack(updates))),
    }
