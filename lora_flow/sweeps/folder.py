"""What a sweep's run folder holds, and what tells it from other folders. Imports no JAX by itself.

settings.toml, results.zarr   as in every run folder, with the same guarantees: see `lora_flow.storage.folder`
figures/*, report.md, report.html, report-*.csv
problem-as-started.npz or .safetensors   a copy of the file that --problem named
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_flow.checks import require
from lora_flow.storage import checksums
from lora_flow.storage.folder import RESULTS, Kind, Template
from lora_flow.storage.made import found, pictures
from lora_flow.storage.portable import portable_attrs
from lora_flow.storage.remote import RunPath
from lora_flow.storage.resumable import check_same
from lora_flow.sweeps import from_python

if TYPE_CHECKING:
    from lora_flow.sweeps.plan import Plan

PROBLEM = "problem-as-started"
_SUFFIXES = (".npz", ".safetensors")  # of files that hold a problem
_COPIES = [f"{PROBLEM}{suffix}" for suffix in _SUFFIXES]
MADE = ("report.md", "report.html", "report-*.csv", *pictures("sweep*", "figure*"), "figures/animation-*")
FIGURE = "figure"  # the attribute of a run that was made for a figure
_NOTE, _LAYOUT = "settings", "layout"  # the notes of what a run was asked for, and of how it is cut
_SAME = ["lora_flow_version", "jax_version", "diffrax_version", "platform", "dtype"]  # attributes of a resumed run
_SAME += ["t1", "flow", "solver", "rtol", "max_steps", "steps", "batch_size"]
_ALWAYS = {"init", "side", "alpha", "rank", "seeds", "saves", "problem", "problem_seed", "m", "n", "h"}
_ALWAYS |= {"batch_size", "precision"}  # settings that every version has written


def kept_problem(path: RunPath) -> RunPath | None:
    """The run's copy of the problem's file, from which the run is resumed even if that file has gone."""
    return next((kept for name in _COPIES if (kept := path / name).is_file()), None)


def stored_layout(path: RunPath) -> dict[str, Any] | None:
    """What a run has noted of its layout, for `plan_sweep`; None where that cannot be read."""
    note = checksums.notes(path / RESULTS).get(_LAYOUT)
    if not isinstance(note, dict) or not isinstance(note.get("box"), dict):
        return None
    whole = all(isinstance(one, int) and one > 0 for one in (*note["box"].values(), note.get("width")))
    return note if whole else None


def figure_of(path: RunPath) -> str:
    """The name of the figure that a run was made for, "" for a plain run."""
    return str(checksums.attributes(path / RESULTS).get(FIGURE) or "")


def drawn(path: RunPath) -> list[str]:
    """The report, its tables and the pictures of results, as names below their folder."""
    return found(path, *MADE)


def template_of(settings: Mapping[str, Any], plan: Plan, attrs: Mapping[str, Any]) -> Template:
    """A run that is asked for by these settings, with these attributes beside theirs, before any lane has run."""
    outline = plan.outline()
    told = dict(settings) | dict(attrs)
    told = portable_attrs({name: value for name, value in told.items() if name not in outline.dims})
    outline = outline.assign_attrs(told | outline.attrs)
    named = Path(str(settings["problem"]))
    copies = {f"{PROBLEM}{named.suffix}": named} if named.suffix in _SUFFIXES and named.is_file() else {}
    box = [length for dim, length in zip(plan.grid.axes, plan.layout.boxes.box, strict=True) if dim in outline.dims]
    return Template(settings, outline, tuple(box), {_NOTE: dict(settings), _LAYOUT: plan.noted_layout}, copies)


def _check_unchanged(path: RunPath, template: Template, notes: Any, attrs: Any) -> None:
    """The settings; then the plan and the problem, by the same versions on the same platform."""
    now = template.dataset.attrs
    if notes is not None:
        names = (name for name in template.settings if name != "devices")  # which is how many there are
        check_same(path, notes.get(_NOTE, {}), template.settings, names)
    if attrs is not None:
        check_same(path, attrs, now, [name for name in _SAME if name in now])
        ours, must = attrs.get("problem_digest"), f"be the one that '{path}' was started with, to resume it"
        require(ours == now["problem_digest"], "problem", must, "other weights or another shift")


SWEEP = Kind(
    noun="run",
    folder="a run folder",
    is_mine=lambda settings: set(settings) >= (from_python.ALWAYS if from_python.is_from_python(settings) else _ALWAYS),
    made=lambda path: [*drawn(path), *_COPIES],
    go_on=from_python.go_on,
    unchanged=_check_unchanged,
)
