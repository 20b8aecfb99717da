"""Checkpoints that are named on the Hugging Face hub: one commit of them, downloaded once and held to its checksums."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lora_flow.bridge.checkpoints import ARRAYS, INDEX, shards
from lora_flow.checks import InputError, require
from lora_flow.runtime.memory import require_memory
from lora_flow.storage.tensors import read_json
from lora_flow_vision.checkpoint import FILES, PROCESSOR, require_vit

SMALL = (FILES[0], INDEX, PROCESSOR)


class Snapshot(NamedTuple):
    """The folder of a checkpoint, and its commit."""

    folder: Path
    commit: str


def is_name(weights: str) -> bool:
    """Whether this may be a name on the hub, such as google/vit-base-patch16-224."""
    return weights.count("/") == 1 and not weights.startswith((".", "/", "~"))


def fetch(name: str, revision: str = "") -> Snapshot:
    """A checkpoint of the hub at a commit, branch or tag, by default the newest; downloaded unless it is in the cache.

    The kind and the length of the files are checked before the weights are downloaded. Files in the cache are checked
    again against the hub's checksums, which are their names there.

    **Raises:** `InputError` where huggingface_hub is not installed, the hub cannot be reached, the model is no ViT, or
    a file is damaged.
    """
    try:
        from huggingface_hub import HfApi, constants, snapshot_download
    except ImportError as error:
        raise InputError(f"weights must be a local folder unless huggingface_hub is installed, got '{name}'") from error
    require(constants.ENDPOINT.startswith("https://"), "HF_ENDPOINT", "begin with https://", constants.ENDPOINT)
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(SMALL)))
        commit = folder.name
        _verify(folder, SMALL)
        if (folder / FILES[0]).is_file():
            require_vit(read_json(folder / FILES[0]), str(folder / FILES[0]))
        wanted = shards(folder) if (folder / INDEX).is_file() else [ARRAYS]
        if not all((folder / one).is_file() for one in wanted):
            listed = HfApi().model_info(name, revision=commit, files_metadata=True).siblings or []
            sizes = [one.size or 0 for one in listed if one.rfilename in wanted]
            require_memory("weights", f"'{name}'", float(sum(sizes)))
            snapshot_download(name, revision=commit, allow_patterns=wanted)
    except InputError:
        raise
    except Exception as error:  # of many kinds: no network, no such name, no permission
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"weights must be a folder or a name that the hub knows, got '{name}': {reason}") from error
    _verify(folder, wanted)
    return Snapshot(folder, commit)


def _verify(folder: Path, names: Iterable[str]) -> None:
    """Raises unless files are what their names in the hub's cache say: SHA-256, or of small files Git's SHA-1."""
    for path in (folder / name for name in names):
        named = path.resolve().name
        if re.fullmatch("[0-9a-f]{64}", named):
            digest = hashlib.sha256()
        elif re.fullmatch("[0-9a-f]{40}", named):
            digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
        else:  # not there, or in a cache without links, which does not keep them
            continue
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        found = digest.hexdigest()
        must = f"have the hub's checksum {named}"
        require(found == named, f"'{path}'", must, f"{found}; delete it, and it is downloaded again")
