"""A stored run that gets further values along its axes; only what is new is solved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lora_flow.checks import require
from lora_flow.storage.disk import require_room
from lora_flow.storage.folder import Folder, Template
from lora_flow.storage.growing import grow
from lora_flow.storage.locks import locked
from lora_flow.storage.remote import RunPath
from lora_flow.sweeps.folder import SWEEP, drawn, figure_of, template_of
from lora_flow.sweeps.run import Run


@contextlib.contextmanager
def open_larger(path: RunPath, then: Run, now: Run) -> Iterator[Folder]:
    """The folder of a run, locked for as long as the context lasts, grown from what it was `then` to what it is `now`.

    What is damaged is mended first. The values of `then` begin each axis of `now`, and the layout is the same. Pictures
    and report of the smaller run go.

    **Raises:** `InputError` for a run that was started otherwise, is in use or a figure's, and for values whose results
    do not fit into the arrays that there are.
    """
    figure = figure_of(path)
    require(not figure, "out", "be a run of `lora-flow sweep`, to extend it", f"one of figure {figure}, '{path}'")
    before, after = template_of(*then, {}), template_of(*now, {})
    _check_modes(before, after, then, now)
    require_room(path, now[1].nbytes - then[1].nbytes)
    with locked(path):
        folder = SWEEP.resume(path, before)
        if then[1].grid.shape != now[1].grid.shape:
            damaged = folder.damaged
            grow(folder, after, drawn(path))
            folder = SWEEP.join(path, after)
            folder.damaged += damaged
        yield folder


def _check_modes(before: Template, after: Template, then: Run, now: Run) -> None:
    """Raises where a larger rank makes more modes."""
    lanes = before.dataset["status"].ndim
    for name, one in before.dataset.items():
        same = after.dataset[name].shape[lanes:] == one.shape[lanes:]
        most, asked = (max(run[1].grid.rank) for run in (then, now))
        require(same, "rank", f"be at most {most}, to extend a run with details, which have {name} of that size", asked)
