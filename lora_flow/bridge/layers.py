"""The matrices of a checkpoint that get adapters, and how they lie in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from lora_flow.checks import InputError, require
from lora_flow.storage.tensors import KINDS, Tensor, read_json

EMBEDDING = re.compile(r"(.*\.)?(wte|wpe|shared|\w*embed(ding|dings|_tokens|_positions|_in)?)")
CONV1D = re.compile(r"(.*\.)?(c_attn|c_proj|c_fc|q_attn)")
"""Names under which GPT-2 and its kin have layers whose weight is stored (in, out), transformers' Conv1D."""


class Layer(NamedTuple):
    """A matrix of a checkpoint: its module, that one's name in the model, and the array, if transposed `(in, out)`."""

    module: str
    name: str
    tensor: Tensor
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        rows, columns = self.tensor.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def turned(self, array: np.ndarray) -> np.ndarray:
        """An array that lies as this one does, as `(out, in)`; and back."""
        return array.T if self.transposed else array

    def weight(self) -> Float[np.ndarray, "out in"]:
        """In double precision."""
        return self.turned(self.tensor.read(np.float64))


def choose(tensors: Mapping[str, Tensor], targets: str, names: Mapping[str, str] | None = None) -> list[Layer]:
    """The layers whose module's name, or an end of it behind a dot, the regular expression `targets` matches.

    Linear layers, stored `(out, in)`, and Conv1D, stored `(in, out)`: the length of a bias tells them apart, and where
    the matrix is square or has no bias, the names that Conv1D has and other layers of such names. A fused layer of
    queries, keys and values is one matrix, with one adapter, as in PEFT. `names` maps modules of the checkpoint to
    those of the model in memory, where they differ.

    **Raises:** `InputError` where nothing is matched, or something that is no matrix of floating-point numbers.
    """
    try:
        wanted = re.compile(rf"(.*\.)?({targets})")
    except re.error as error:
        raise InputError(f"targets must be a regular expression, got '{targets}' ({error})") from error
    modules = {name.removesuffix(".weight"): tensor for name, tensor in tensors.items() if name.endswith(".weight")}
    found = {module: tensor for module, tensor in modules.items() if wanted.fullmatch(module)}
    some = ", ".join(list(modules)[:3])
    must = f"match modules of the checkpoint, such as {some or 'none: it has no .weight'}"
    require(found, "targets", must, f"'{targets}', which matches none")
    for module, tensor in found.items():
        where = f"{module} in {tensor.path}"
        require(len(tensor.shape) == 2, where, "be a matrix, to carry an adapter", f"shape {tensor.shape}")
        require(not EMBEDDING.fullmatch(module), where, "be a linear layer, to carry an adapter", "an embedding")
        must = "be floating-point, as weights are that were not quantised"
        require(tensor.kind in KINDS, where, must, tensor.kind)
    votes = {module: _told_by_bias(module, tensor, tensors) for module, tensor in found.items()}
    listed = []
    for module, tensor in found.items():
        vote = votes[module]
        if vote is None and CONV1D.fullmatch(module):
            vote = any(_told_by_bias(*one, tensors) for one in modules.items() if CONV1D.fullmatch(one[0]))
        listed.append(Layer(module, (names or {}).get(module, module), tensor, bool(vote)))
    twice = len({layer.name for layer in listed}) < len(listed)
    require(not twice, "names", "give each module a name of its own", "one name for several")
    return listed


def read_names(path: Path) -> dict[str, str]:
    """The names in the model of a checkpoint's modules, from a JSON object."""
    require(path.is_file(), "names", "be a file that exists", f"'{path}'")
    names = read_json(path)
    wrong = next((value for value in names.values() if not isinstance(value, str)), None)
    require(wrong is None, f"'{path}'", "map names to names", wrong)
    return names


def _told_by_bias(module: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> bool | None:
    """Whether a layer is stored `(in, out)`; None where its bias does not tell."""
    bias = tensors.get(f"{module}.bias")
    if bias is None or len(tensor.shape) != 2 or tensor.shape[0] == tensor.shape[1]:
        return None
    return bias.shape == (tensor.shape[1],)
