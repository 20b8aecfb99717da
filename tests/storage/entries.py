"""Entries of a folder, what replaces them, and a way to act before every step that changes a file system."""

import contextlib
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from lora_flow.storage.locks import locked
from lora_flow.storage.swap import replacing

HEX = "0123456789abcdef" * 2
OLD = {"settings.toml": "old", "results.zarr/loss/0.0": "old", "report.md": "old", "figures/sweep.png": "old"}
OLD |= {"part/settings.toml": "old"}
NEW = {"settings.toml": "new", "results.zarr/loss/0.0": "new", "adapters/unit": "new", "part/settings.toml": "new"}
FOREIGN = {"results.zarr.bak/loss/0.0": "mine", "figures/thesis.png": "mine", "results.zarr.x": "mine"}
FOREIGN |= {"part/notes": "mine"}


def fill(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def found(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def replace(folder):
    with locked(folder), replacing(folder, gone=("report.md", "figures/sweep.png"), within=("part",)) as new:
        fill(new, NEW)


def touching(act):
    """A context in which `act` comes before every call that changes a file system."""
    stack = contextlib.ExitStack()
    owners = {Path: ("rename", "replace", "mkdir", "unlink"), os: ("open", "fsync", "write", "ftruncate", "link")}
    patch, read_or_open = pytest.MonkeyPatch(), os.open
    stack.callback(patch.undo)
    for owner, name in [(owner, name) for owner, names in owners.items() for name in names] + [(shutil, "rmtree")]:
        original = getattr(owner, name)

        def changed(*args, original=original, **kwargs):
            if original is not read_or_open or args[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
                act()
            return original(*args, **kwargs)

        patch.setattr(owner, name, changed)
    opened = Path.open

    def opening(path, mode="r", *args, **kwargs):
        if set(mode) & set("wxa+"):
            act()
        return opened(path, mode, *args, **kwargs)

    patch.setattr(Path, "open", opening)
    return stack


def told_by(script: str) -> Any:
    """The value that a script prints, run in a process of its own, without JAX and pytest's plugins."""
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return eval(done.stdout)
