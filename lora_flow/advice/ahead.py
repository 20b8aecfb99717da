"""The phases of the recommended start in each layer, and how far the linearised task reaches in the whole network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from lora_flow.adapter import Adapter
from lora_flow.advice.tasks import Task
from lora_flow.algebra.low_rank import LowRank
from lora_flow.bridge.forecast import forecast, spans
from lora_flow.bridge.watched import Watched

THINNED = 4  # every so many of the times


def phases_ahead(
    tasks: Sequence[Task], starts: Sequence[Adapter], taken_off: bool, times: np.ndarray, loss: float | None
) -> xr.Dataset:
    """`t_align`, `t_update` and `t1` of each layer, and `t_fallen` of all, in flow time; white inputs.

    They are those of the linearised flow, and the last two need the network's loss; see `lora_flow.bridge.forecast`.
    """
    times = times[::THINNED]
    told = []
    for task, start in zip(tasks, starts, strict=True):
        eye = np.eye(len(task.sigma) + task.rank)
        descent = np.diag(np.append(task.sigma, np.zeros(task.rank)))
        layer = Watched(eye[0], eye[0], task.scaling, descent, start, taken_off)
        told.append(forecast(layer, start, LowRank(eye[:, :1], task.sigma[:1], eye[:1]), times))
    names = [name for name, values in told[0].items() if values.ndim == 1]
    observed = xr.Dataset(
        {name: (("layer", "step"), np.stack([one[name] for one in told])) for name in names}, coords={"step": times}
    )
    return spans(observed, loss)
