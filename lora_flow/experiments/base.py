"""The shape of a named experiment: its parts, its pictures, and its notes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import xarray as xr

from lora_flow.checks import require
from lora_flow.settings import Settings
from lora_flow.sweeps.schema import explain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Datasets = Mapping[str, xr.Dataset]
"""The results of an experiment, by the names of its parts."""
Progress = Callable[[Any], Any]
"""Goes through items, and says how many are done."""
Function = Callable[[int, Progress], xr.Dataset]
"""A part that runs as a whole, within about a minute: (number of draws, progress) -> results."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A named figure: what it is about, what runs, what is drawn of the results, and what is told of them.

    A part is the settings of a sweep, which has a run folder and can be resumed, or a function, which is the only part.
    An only part is named "", and its folder is the experiment's own. A function comes with `seeds`, the number of draws
    that it starts from, and with the `meanings` of its variables by name: up to ": " the `long_name`, the rest the
    `comment`. Settings have their own.
    """

    about: str
    parts: Mapping[str, Settings | Function]
    draw: Callable[[Datasets], dict[str, Figure]]  # what to add to the picture's name -> picture
    notes: Callable[[Datasets], str]
    seeds: int | None = None
    meanings: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        functions = [name for name, part in self.parts.items() if not isinstance(part, Settings)]
        require(not functions or list(self.parts) == [""], "parts", 'be settings, or one function, ""', [*self.parts])
        require(bool(functions) == (self.seeds is not None), "seeds", "be given with a function only", self.seeds)

    @classmethod
    def of_one(
        cls,
        about: str,
        part: Settings | Function,
        draw: Callable[[xr.Dataset], Figure],
        notes: Callable[[xr.Dataset], str],
        seeds: int | None = None,
        meanings: Mapping[str, str] | None = None,
    ) -> Experiment:
        """An experiment of one part and one picture, with functions of the part's dataset."""
        return cls(
            about,
            {"": part},
            lambda datasets: {"": draw(datasets[""])},
            lambda datasets: notes(datasets[""]),
            seeds,
            meanings or {},
        )

    @property
    def function(self) -> Function | None:
        """The function, where the experiment runs as a whole."""
        only = self.parts.get("")
        return None if isinstance(only, Settings) else only

    def label(self, dataset: xr.Dataset) -> xr.Dataset:
        """The function's results, with their variables explained."""
        for name in set(self.meanings) & set(map(str, dataset.variables)):
            explain(dataset[name], self.meanings[name])
        return dataset

    def runs(self, seeds: int | None = None) -> dict[str, Settings]:
        """The sweeps by name, with another number of seeds if one is given; none where a function runs."""
        return {
            name: part if seeds is None else dataclasses.replace(part, seeds=seeds)
            for name, part in self.parts.items()
            if isinstance(part, Settings)
        }
