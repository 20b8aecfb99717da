"""A run that grows: its grid gets longer along its axes, and what is stored stays.

The larger run is made whole beside the old one, shares its chunks, and takes its place in one step: whatever ends the
process, one of the two is there, with every value of the old one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from lora_flow.storage import checksums
from lora_flow.storage.checksums import LANES
from lora_flow.storage.folder import RESULTS, Folder, Template
from lora_flow.storage.lanes import NOT_RUN
from lora_flow.storage.reading import read
from lora_flow.storage.swap import replacing, sync


def grow(folder: Folder, template: Template, gone: Iterable[str]) -> None:
    """Puts a run of a larger grid in the place of one whose values begin each of its axes, with boxes of the same size.

    Lanes that have run keep their values, and their proof. `gone` names what was made of the old results. Hold the
    folder's lock, and do not use `folder` afterwards.
    """
    path, live = folder.path, template.dataset.data_vars
    lanes = template.dataset["status"].ndim
    length = sum(one.dtype.itemsize * math.prod(one.shape[lanes:]) for one in live.values())
    with replacing(path, gone) as new:
        template._replace(copies=None).make(new)  # the old copies stay
        checksums.share_chunks(path / RESULTS, new / RESULTS, [str(name) for name in live if name != "status"])
        description = checksums.description_sum(read(new / RESULTS, values=False).dataset)
        old, larger = checksums.open_arrays(path / RESULTS), checksums.open_arrays(new / RESULTS)
        boxes, status = checksums.boxes_of(path / RESULTS), np.asarray(old["status"][...])
        for block in map(boxes.block, boxes.where(status != NOT_RUN)):
            larger[LANES][block] = checksums.carried_over(old[LANES][block], length, folder.begin, description)
            larger["status"][block] = status[block]
        sync(file for file in (new / RESULTS).rglob("*") if file.is_file())
