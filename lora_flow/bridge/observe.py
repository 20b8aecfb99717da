"""What a PEFT run has done, checkpoint after checkpoint: the simulator's observables, and what theory says of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from lora_flow.algebra.low_rank import LowRank
from lora_flow.bridge.forecast import ABOUT, DRIFT, OF_LAYER, forecast, spans, until
from lora_flow.bridge.gradients import THIN, Gradients
from lora_flow.bridge.layers import CONV1D, Layer, read_names
from lora_flow.bridge.run_folder import Run, open_run
from lora_flow.bridge.watched import Watched, meanings, update_pairs, watch
from lora_flow.checks import as_path, require, require_number
from lora_flow.runtime.progress import Progress
from lora_flow.storage.tensors import Tensor
from lora_flow.sweeps.schema import explain
from lora_flow.version import __version__

MOST = 256  # steps at which a layer is forecast, unless there are more checkpoints
MEASURED_ONLY = ("drift", "imbalance", "singular_value")  # of the flow the first stays 0, the second what it was
OF_LAYERS = {
    "rank": "LoRA rank",
    "scaling": "LoRA's output multiplier s",
    "sigma": "singular value of the direction",
    "gap": "1 - sigma_2/sigma_1 of the matrix that the direction is from",
    "told_until": "step up to which theory tells of the layer",
    "layer": "module",
    "step": "step of the optimiser",
    "mode": "number of the singular value",
    "singular_value": "singular value of the update",
}


def peft_observe(
    run: str | Path,
    *,
    initial: str | Path | None = None,
    gradients: str | Path | None = None,
    names: str | Path | None = None,
    lr: float | None = None,
    loss: float | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """The observables of a PEFT run over layers and steps, from its checkpoints, beside what gradient flow predicts.

    Layers are read one at a time, so that memory is bounded by the largest.

    **Arguments:**

    - `run`: a folder of PEFT's folders whose names end with the step, `checkpoint-100` for instance.
    - `initial`: the folder that the training started from, step 0. Without it drift is told from the first checkpoint.
    - `gradients`: a `.safetensors` file with dL/dW at the start by the parameters' names, or thin factors
      (`lora_flow.bridge.gradients`). Alignment is told of its top singular pair. Without it, of that of the last
      update: then it ends at 0 by itself, and says when the final direction was found.
    - `names`: as for `peft_init`, where the gradients have the checkpoint's names and these differ from the model's.
    - `lr`: the learning rate of gradient descent; flow time is `lr` times the steps. With it, `gradients` and the start
      what the linearised flow predicts stands beside each observable, as NAME_predicted, and beside each phase.
    - `loss`: the loss at the start. Only with it is it known until when the flow stays linear.

    **Returns:** a dataset over `layer`, `step` and `mode`, where every variable has its meaning. Names are those of
    the simulator's results, without the layer's number. Predictions are NaN after the step `told_until`: where all
    updates together lower the loss by 10 %, to first order, and where the drift of A A^T - B^T B is above 0.1 of
    ||Z||^2, which no run near gradient flow has.

    **Raises:** `InputError` with the layer's name.
    """
    for name, value in {"lr": lr, "loss": loss}.items():
        if value is not None:
            require_number(name, value, "be positive and finite", lambda known: known > 0)
            require(gradients is not None, name, "be left out without gradients, which predictions are made of", value)
    opened = open_run(run, initial)
    given = None if gradients is None else Gradients(as_path("gradients", gradients).expanduser())
    renamed = None if names is None else read_names(as_path("names", names).expanduser())
    parameters = {} if given is None else {one: _parameter(opened, given, renamed, one) for one in opened.layers}
    finer = _finer(opened.steps)
    found, ahead = dict[str, dict[str, Any]](), dict[str, dict[str, Any]]()
    with Progress(len(opened.layers), "layers", shown=progress, what="observing") as bar:
        for name in opened.layers:
            layer, leading = _held_against(opened, name, given, parameters.get(name))
            found[name] = watch(layer, opened.adapters(name)) | _of_layer(opened, name, np.asarray(leading.s))
            if lr is not None and layer.start is not None:
                expected = forecast(layer, layer.start, leading, lr * finer)
                ahead[name] = {key: value for key, value in expected.items() if key not in MEASURED_ONLY}
            bar.update()
    measured = _dataset(found, np.array(opened.steps))
    dataset = measured.assign(spans(measured, loss))
    if ahead:
        dataset = dataset.assign(_told_ahead(measured, _dataset(ahead, finer), loss))
    asked = {"initial": initial, "gradients": gradients, "names": names, "lr": lr, "loss": loss}
    return _labelled(dataset, {"run": run} | asked)


def _held_against(opened: Run, name: str, given: Gradients | None, parameter: Layer | None) -> tuple[Watched, LowRank]:
    """A layer with its direction, and the leading triplets that this is from: the gradient's, or the last update's."""
    start, scaling = opened.adapter(name, 0) if 0 in opened.steps else None, opened.scalings[name]
    if given is not None and parameter is not None:
        leading, descent = given.leading(parameter, 2).triplets, given.dense(parameter)
    else:
        plain = Watched(np.zeros(0), np.zeros(0), scaling, None, start, opened.offset)
        leading, descent = LowRank(*update_pairs(plain, opened.adapter(name, opened.steps[-1]))), None
    there = 1.0 if leading.s[0] > 0 else 0.0  # a matrix of zeros has no direction
    left, right = there * np.asarray(leading.u)[:, 0], there * np.asarray(leading.vt)[0]
    return Watched(left, right, scaling, descent, start, opened.offset), leading


def _of_layer(opened: Run, name: str, s: np.ndarray) -> dict[str, Any]:
    gap = 1 - s[1] / s[0] if len(s) > 1 and s[0] > 0 else np.nan
    return {"rank": opened.rank(name), "scaling": opened.scalings[name], "sigma": s[0], "gap": gap}


def _parameter(opened: Run, given: Gradients, names: Mapping[str, str] | None, layer: str) -> Layer:
    """The layer as the file of gradients knows it, which must have its gradient."""
    told = opened.told.get(layer, {})
    stored = next((name for name, model in (names or {}).items() if model == layer), layer)
    candidates = [str(told.get("parameter")), f"{stored}.weight", f"{layer}.weight"]
    known = (one for one in candidates if one in given.tensors or f"{one}.{THIN[0]}" in given.tensors)
    name, shape = next(known, f"{stored}.weight"), opened.shape(layer)
    turned = told.get("transposed")
    if turned is None:  # a square one by its name
        lies = given.tensors[name].shape if name in given.tensors else None
        by_shape = shape[0] != shape[1] and lies == shape[::-1]
        turned = opened.conv1d and (by_shape or CONV1D.fullmatch(layer) is not None)
    lies = shape[::-1] if turned else shape
    parameter = Layer(name.removesuffix(".weight"), layer, Tensor(given.path, name, "F32", lies, 0), bool(turned))
    given.check(parameter, 2 * opened.rank(layer))
    return parameter


def _finer(steps: list[int]) -> np.ndarray:
    """The steps, and others between them, so that predicted phases do not wait for the next checkpoint."""
    between = max(1, min(MOST // len(steps), 16))
    return np.interp(np.arange(between * (len(steps) - 1) + 1) / between, np.arange(len(steps)), steps)


def _dataset(found: Mapping[str, Mapping[str, Any]], steps: np.ndarray) -> xr.Dataset:
    """Layers beside each other, NaN behind the end of shorter spectra."""
    variables: dict[str, Any] = {}
    for name in next(iter(found.values())):
        values = [np.asarray(one[name]) for one in found.values()]
        width = max(one.shape[-1] for one in values) if values[0].ndim == 2 else 0
        if width:
            values = [np.pad(one, ((0, 0), (0, width - one.shape[1])), constant_values=np.nan) for one in values]
        variables[name] = (("layer", "step", "mode")[: 1 + values[0].ndim], np.stack(values))
    dataset = xr.Dataset(variables, {"layer": list(found), "step": steps})
    return dataset.assign_coords(mode=np.arange(1, dataset.sizes["mode"] + 1)) if "mode" in dataset.dims else dataset


def _told_ahead(measured: xr.Dataset, ahead: xr.Dataset, loss: float | None) -> xr.Dataset:
    """What is predicted, under names that say so, up to `told_until`."""
    times, drifts = spans(ahead, loss), until(measured)
    ahead = ahead.sel(step=measured["step"]).assign_coords(step=measured["step"])
    told_until = xr.where(times["t_fallen"] <= drifts, times["t_fallen"], drifts)
    first = int(np.argmin(times["t1"].fillna(np.inf).values))  # whose growth is what t_fallen is about

    def kept(what: Any, when: xr.DataArray, drifts: xr.DataArray = drifts) -> Any:
        return what.where(~(when > times["t_fallen"]) & (when <= drifts))

    told = kept(ahead, ahead["step"]).assign({name: kept(times[name], times[name]) for name in OF_LAYER})
    told["t_fallen"] = kept(times["t_fallen"], times["t_fallen"], drifts[first])
    return told.rename({str(name): f"{name}_predicted" for name in told.data_vars}).assign(told_until=told_until)


def _labelled(dataset: xr.Dataset, asked: Mapping[str, Any]) -> xr.Dataset:
    about = meanings() | ABOUT | OF_LAYERS
    for name in map(str, dataset.variables):
        own = name.removesuffix("_predicted")
        meaning = about[own] if own == name else f"{about[own].partition(':')[0]}, as gradient flow predicts it"
        explain(dataset[name], meaning)
    direction = "the last update" if asked["gradients"] is None else "the gradient"
    given = {name: value for name, value in asked.items() if value is not None}
    given = {name: float(value) if name in ("lr", "loss") else str(value) for name, value in given.items()}
    return dataset.assign_attrs(given | {"direction": direction, "drift_limit": DRIFT, "lora_flow": __version__})
