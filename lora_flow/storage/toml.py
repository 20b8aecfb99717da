"""Settings files, read with one line for anything wrong in them."""

from __future__ import annotations

import tomllib
from typing import Any

from lora_flow.checks import InputError, require
from lora_flow.storage.remote import RunPath, run_path

LARGEST = 2**20  # bytes


def read_toml(path: str | RunPath) -> dict[str, Any]:
    """A TOML file's table.

    **Raises:** `InputError` where there is no such file or it is none, `OSError` where it may not be read.
    """
    path = run_path("the settings file", path)
    require("\0" not in str(path), "the settings file", "have a name without NUL", repr(str(path)))
    require(path.exists(), "the settings file", "exist", f"'{path}'")
    require(path.is_file(), "the settings file", "be a file", f"'{path}', which is none")
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    require(len(content) <= LARGEST, f"'{path}'", f"be a settings file of at most {LARGEST} bytes", "a larger one")
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise InputError(f"'{path}' must be a TOML file, got one that is nested too deeply") from error
    except ValueError as error:  # not UTF-8, not TOML, or an integer of thousands of digits
        raise InputError(f"'{path}' must be a TOML file, got {error}") from error
