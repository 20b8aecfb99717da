"""The folder of an advice: its settings, its numbers, its picture and its reports. Imports no JAX by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_flow.storage.folder import Kind, Template, read_settings, steady
from lora_flow.storage.made import found, pictures
from lora_flow.storage.remote import RunPath, run_path

if TYPE_CHECKING:
    from lora_flow.advice.result import Advice

MADE = ("report.md", "report.html", *pictures("advice"), "figures/advice.json")
ADVICE_ATTR = "advice"  # in which the words are kept beside the numbers


ADVICE = Kind(
    "recommendation",
    "a recommendation's",
    is_mine=lambda settings: "advise" in settings,
    made=lambda path: found(path, *MADE),
)


def store(path: str | RunPath, settings: Mapping[str, Any], advice: Advice) -> None:
    """Replaces the folder's results and settings once the new ones are whole. Hold the folder's lock."""
    table = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    words = [
        advice.recommended,
        advice.reason,
        advice.assumptions,
        advice.confidence,
        advice.translation,
        advice.command,
    ]
    dataset = advice.dataset.assign_attrs({ADVICE_ATTR: json.dumps(words)})
    ADVICE.make(run_path("out", path), {"": Template({"advise": table}, dataset)})


def load(path: str | RunPath) -> tuple[Advice, dict[str, Any]]:
    """The advice of a folder, every number checked, and what was asked."""
    from lora_flow.advice.choice import Cell, Confidence
    from lora_flow.advice.result import Advice

    folder = run_path("the run folder", path)
    dataset = steady(folder, lambda: ADVICE.load(folder))
    cell, reason, assumptions, (level, why), translation, command = json.loads(dataset.attrs.pop(ADVICE_ATTR))
    told = Confidence(level, tuple(why)), tuple(map(tuple, translation)), command
    recommended = None if cell is None else Cell(*cell)
    return Advice(dataset, recommended, reason, tuple(assumptions), *told), read_settings(folder)["advise"]
