"""What gradient flow says of an adapter before it has run: the linearised flow of each layer, and its phases.

While the adapters are small the gradient G of the loss does not change, and layers do not know of each other: A' = s
B^T (-G), B' = s (-G) A^T. From B = 0 this is B = U sinh(s S t) V^T A(0)^T, with -G = U S V^T, and t the learning rate
times the steps of gradient descent. It ends where the loss has fallen by a tenth, to first order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from lora_flow.adapter import Adapter
from lora_flow.algebra.krylov import seen_from
from lora_flow.algebra.low_rank import LowRank
from lora_flow.bridge.watched import Watched, watch
from lora_flow.results.phases import crossing
from lora_flow.theory.lora_one import linear_phase

ALIGNED = 0.1  # 1 - cos of the update's top pair and the gradient's, at which the update is aligned
GROWN = 0.01  # of the loss, by which a layer's update alone lowers it to first order where its growth ends
FALLEN = 0.1  # the same of all layers together, where the linearised flow ends
DRIFT = 0.1  # of A A^T - B^T B relative to ||Z||^2, above which a run is no gradient flow
MOST = 60.0  # s sigma_1 t up to which the flow is followed: a factor of 1e52 in the update

ABOUT = {
    "t_align": "step at which the part of Z along the direction outgrows the rest",
    "t_update": f"step at which 1 - cos of the update's top pair and the gradient's falls to {ALIGNED:g}",
    "t1": f"step at which the layer's own update lowers the loss by {GROWN:.0%}, to first order: its growth ends",
    "t_fallen": f"step at which all updates together lower the loss by {FALLEN:.0%}, to first order",
}
"""The ends of phases, in steps."""
OF_LAYER = ("t_align", "t_update", "t1")


def forecast(layer: Watched, start: Adapter, leading: LowRank, times: np.ndarray) -> dict[str, np.ndarray]:
    """`watch` of the linearised flow from a start, over flow times; NaN from growth factors on that no run reaches.

    `leading` are the first singular triplets of `layer.descent`, which the times are counted in.
    """
    assert layer.descent is not None
    growth = layer.scaling * float(leading.s[0]) * times
    reached = growth <= MOST
    a, b = (np.asarray(factor, np.float64) for factor in start)
    left, right = np.hstack([np.asarray(leading.u), b]), np.hstack([np.asarray(leading.vt).T, a.T])
    seen = seen_from(layer.descent, left, right, float(np.max(growth[reached], initial=0.0)))
    a, b = a @ seen.right, seen.left.T @ b  # in these coordinates the flow is the same, and so is all that is watched
    small: Any = Adapter(a, b)  # type: ignore[arg-type]
    like = Watched(layer.left @ seen.left, layer.right @ seen.right, layer.scaling, seen.matrix, small, layer.offset)
    moved: Any = linear_phase(seen.matrix, a, layer.scaling * np.where(reached, times, 0.0), b)
    told = np.where(reached, 1.0, np.nan)
    return {name: (values.T * told).T for name, values in watch(like, map(Adapter, *moved)).items()}


def spans(observed: xr.Dataset, loss: float | None) -> xr.Dataset:
    """The steps at which layers pass from one phase to the next, as `ABOUT` says, and `t_fallen` of all layers.

    `observed` has what `watch` returns over (layer, step). Steps are interpolated between those that there are, in the
    logarithm of what crosses; infinite where the last comes earlier, and NaN where it is not known, without `loss` for
    instance. `t_fallen` is the step at which all updates together lower the loss by a tenth, to first order.
    """
    over = observed.rename(step="time")
    unknown = xr.full_like(over["norm_along"].isel(time=0, drop=True), np.nan)
    one = xr.ones_like(unknown)
    found = {
        "t_align": crossing(over["norm_along"] / over["norm_across"], one),
        "t_update": crossing(ALIGNED / over["update_error"].clip(min=np.finfo(float).tiny), one),
        "t1": unknown,
        "t_fallen": xr.DataArray(np.nan),
    }
    if loss is not None and "loss_change" in over:
        share = -over["loss_change"] / loss
        together = share.sum("layer", skipna=False)
        found |= {"t1": crossing(share / GROWN, one), "t_fallen": crossing(together / FALLEN, xr.DataArray(1.0))}
    return xr.Dataset(found)


def until(observed: xr.Dataset) -> xr.DataArray:
    """The last step up to which a layer's drift of A A^T - B^T B is a gradient flow's; infinite if it stays so."""
    kept = (observed["drift"] <= DRIFT).astype(int).cumprod("step").astype(bool)
    last = observed["step"].where(kept).max("step")
    return xr.where(kept.all("step"), np.inf, last.fillna(-np.inf))
