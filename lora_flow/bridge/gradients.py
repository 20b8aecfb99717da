"""Gradients and inputs of a checkpoint's layers, from safetensors files, a layer at a time.

A gradient dL/dW has the name of its parameter and lies as the parameter does. Or thin factors stand for it: NAME.u,
NAME.s and NAME.vt, with NAME = u diag(s) vt.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float

from lora_flow.algebra.low_rank import LowRank
from lora_flow.bridge.layers import Layer
from lora_flow.bridge.truncated import Truncated, truncated_svd
from lora_flow.checks import require
from lora_flow.storage.tensors import Tensor, open_tensors

THIN = ("u", "s", "vt")


class Gradients:
    """The gradients that a file declares."""

    def __init__(self, path: Path):
        require(path.is_file(), "gradients", "be a .safetensors file that exists", f"'{path}'")
        self.path, self.tensors = path, open_tensors(path).tensors

    def check(self, layer: Layer, least: int) -> None:
        """Raises unless the file has a layer's gradient, of the layer's shape; thin factors of rank `least` or more."""
        stored, shape = self.tensors.get(self._name(layer)), layer.tensor.shape
        where = f"{layer.module} in {self.path}"
        if stored is not None:
            turned = stored.shape == shape[::-1]
            guess = ", which is its transpose" if turned else "; are these the gradients of another model?"
            must = f"have the weight's shape {shape}"
            require(stored.shape == shape, f"the gradient of {where}", must, f"{stored.shape}{guess}")
            return
        thin = self._thin(layer)
        require(
            len(thin) == len(THIN), "gradients", f"hold {layer.tensor.name}, or .u, .s and .vt of it", f"'{self.path}'"
        )
        count = thin["s"].shape[0] if len(thin["s"].shape) == 1 else -1
        shapes = {"u": (shape[0], count), "s": (count,), "vt": (count, shape[1])}
        for part, tensor in thin.items():
            must = f"have shape {shapes[part]}, for the weight's {shape}"
            require(tensor.shape == shapes[part], f"{part} of the gradient of {where}", must, tensor.shape)
        least = min(least, *shape)
        must = f"have at least {least} of them, twice the rank, to be right"
        require(count >= least, f"the thin factors of the gradient of {where}", must, count)

    def is_whole(self, layer: Layer) -> bool:
        """Whether the gradient itself is there, and not its factors."""
        return self._name(layer) in self.tensors

    def descent(self, layer: Layer) -> Float[np.ndarray, "out in"]:
        """-dL/dW."""
        return -layer.turned(self.tensors[self._name(layer)].read(np.float64))

    def leading(self, layer: Layer, count: int) -> Truncated:
        """The leading triplets of -dL/dW; of thin factors by two small decompositions."""
        if self.is_whole(layer):
            return truncated_svd(self.descent(layer), count)
        u, s, vt = (self._thin(layer)[part].read(np.float64) for part in THIN)
        q, left = np.linalg.qr(u)
        p, right = np.linalg.qr(vt.T)
        x, sigma, yt = np.linalg.svd((left * s) @ right.T)
        found = LowRank(-q @ x, sigma, yt @ p.T)
        found = LowRank(-found.vt.T, sigma, -found.u.T) if layer.transposed else found
        return Truncated(found.first(count), 0.0, float(np.sum(sigma**2)))

    def dense(self, layer: Layer) -> Float[np.ndarray, "out in"]:
        """-dL/dW, or what the thin factors know of it."""
        if self.is_whole(layer):
            return self.descent(layer)
        found = self.leading(layer, min(layer.shape)).triplets
        return (np.asarray(found.u) * np.asarray(found.s)) @ np.asarray(found.vt)

    def _name(self, layer: Layer) -> str:
        return layer.tensor.name if layer.tensor.name in self.tensors else layer.module

    def _thin(self, layer: Layer) -> Mapping[str, Tensor]:
        named = {part: self.tensors.get(f"{layer.tensor.name}.{part}") for part in THIN}
        return {part: tensor for part, tensor in named.items() if tensor is not None}


class Inputs:
    """What a file declares of the inputs of layers.

    MODULE or MODULE.inputs holds samples, `(samples, in)`; MODULE.covariance their second moments, `(in, in)`.
    """

    def __init__(self, path: Path):
        require(path.is_file(), "activations", "be a .safetensors file that exists", f"'{path}'")
        self.path, self.tensors = path, open_tensors(path).tensors

    def check(self, layer: Layer, rank: int) -> None:
        """Raises unless the file has a layer's inputs, of the layer's width, and at least as many as the rank."""
        samples, covariance = self._found(layer)
        n_in, where = layer.shape[1], f"the inputs of {layer.module} in {self.path}"
        stored = samples or covariance
        hold = f"hold {layer.module}.inputs (samples, {n_in}) or {layer.module}.covariance ({n_in}, {n_in})"
        require(stored is not None, "activations", hold, f"'{self.path}'")
        if stored is None:
            return
        shape = stored.shape
        if samples is None:
            require(
                shape == (n_in, n_in),
                f"the covariance for {layer.module} in {self.path}",
                f"have shape {(n_in, n_in)}",
                shape,
            )
            return
        guess = ", which is their transpose" if len(shape) == 2 and shape[0] == n_in else ""
        require(len(shape) == 2 and shape[1] == n_in, where, f"have shape (samples, {n_in})", f"{shape}{guess}")
        require(rank <= shape[0], where, f"have at least {rank} samples, one a rank", shape[0])

    def read(self, layer: Layer, rank: int) -> Truncated:
        """The leading triplets of the inputs, `(samples, in)`, up to a rotation of the samples and their number."""
        samples, covariance = self._found(layer)
        if samples is not None:
            return truncated_svd(samples.read(np.float64), min(rank, *samples.shape))
        assert covariance is not None
        found = truncated_svd(covariance.read(np.float64), rank)
        roots, basis = np.sqrt(found.triplets.s), np.eye(len(found.triplets.s))
        energy = float(np.trace(covariance.read(np.float64)))
        return Truncated(LowRank(basis, roots, found.triplets.vt), found.residual, energy)

    def _found(self, layer: Layer) -> tuple[Tensor | None, Tensor | None]:
        samples = self.tensors.get(f"{layer.module}.inputs", self.tensors.get(layer.module))
        return samples, self.tensors.get(f"{layer.module}.covariance")
