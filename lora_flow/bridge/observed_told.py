"""What a PEFT run has done, in words: when its layers align and grow, and whether gradient flow is about it."""

from __future__ import annotations

import numpy as np
import xarray as xr

from lora_flow.bridge.forecast import ALIGNED, FALLEN, GROWN
from lora_flow.results.given import require_dataset
from lora_flow.results.report import table


def observed_told(dataset: xr.Dataset) -> list[str]:
    """What a run has done, a sentence each, for `peft_observe`'s dataset.

    **Raises:** `InputError` for another dataset.
    """
    require_dataset(dataset, "observed_told", "update_error", "t_update", "drift", "effective_rank")
    lines = [_extent(dataset), _alignment(dataset), *_fall(dataset), _ranks(dataset)]
    return [*lines, _drift(dataset), *_agreement(dataset), *_not_predicted(dataset)]


def report(dataset: xr.Dataset, links: list[str]) -> str:
    """The text of report.md: the sentences, the pictures, and a table of the layers."""
    parts = ["# What a PEFT run has done", f"The checkpoints of `{dataset.attrs['run']}`."]
    parts.append("\n".join(f"- {line}" for line in observed_told(dataset)))
    parts += [*(f"![]({link})" for link in links), "## Layer by layer", _legend(dataset), _layers(dataset)]
    return "\n\n".join(parts) + "\n"


def _extent(dataset: xr.Dataset) -> str:
    steps, layers = dataset["step"].values, dataset.sizes["layer"]
    rest = "" if len(steps) == 1 else f" from {steps[0]} to {steps[-1]}"
    whose = f"{dataset.attrs['direction']}'s top singular pair"
    hint = "" if _has_gradients(dataset) else "; --gradients tells of the gradient's"
    return f"{layers} layers at {len(steps)} steps{rest}. Alignment is that with {whose}{hint}."


def _alignment(dataset: xr.Dataset) -> str:
    times, what = dataset["t_update"], _direction(dataset)
    reached = np.isfinite(times.values)
    least = dataset["update_error"].min("step")
    if not reached.any():
        return f"No update aligns with {what}: 1 - cos is at least {_number(least.min())}, of {ALIGNED:g} asked."
    first = int(np.argmin(np.where(reached, times, np.inf)))
    last = int(np.argmax(np.where(reached, times, -np.inf)))
    some = f"{reached.sum()} of {times.size} updates align with {what}, 1 - cos below {ALIGNED:g}"
    when = f"step {times.values[first]:.0f} ({_layer(dataset, first)})"
    until = f" to step {times.values[last]:.0f} ({_layer(dataset, last)})" if first != last else ""
    return f"{some}: {'from' if until else 'at'} {when}{until}."


def _fall(dataset: xr.Dataset) -> list[str]:
    if not np.isfinite(dataset["t_fallen"]):
        return [f"To first order the loss does not fall by {FALLEN:.0%}."] if np.isinf(dataset["t_fallen"]) else []
    grown = dataset["t1"].where(dataset["t1"] <= dataset["t_fallen"])
    order = [_layer(dataset, int(i)) for i in np.argsort(grown.values)[: int(grown.notnull().sum())]]
    first = ", ".join(order[:3]) + (f" and {len(order) - 3} more" if len(order) > 3 else "")
    ends = f"; by then growth has ended in {first}" if order else ""
    return [f"To first order the loss has fallen by {FALLEN:.0%} at step {float(dataset['t_fallen']):.0f}{ends}."]


def _ranks(dataset: xr.Dataset) -> str:
    last = dataset.isel(step=-1)
    ranks, held = last["effective_rank"], dataset["rank"]
    low, high = map(_number, (ranks.min(), ranks.max()))
    return (
        f"At step {int(last['step'])} the updates have an effective rank of {low} to {high}, "
        f"of rank {_span(held.values)}."
    )


def _drift(dataset: xr.Dataset) -> str:
    """Whether gradient flow is about the run by A A^T - B^T B, up to the fall of the loss where that is known."""
    end, limit, steps = float(dataset["t_fallen"]), dataset.attrs["drift_limit"], dataset["step"].values
    drift = dataset["drift"].values[:, : max(2, np.searchsorted(steps, end, "right")) if end < np.inf else None]
    largest, when = drift.max(axis=1), f"up to step {steps[drift.shape[1] - 1]}"
    at_once, beyond = int(np.sum(drift[:, :2].max(axis=1) > limit)), int(np.sum(largest > limit))
    what = "A A^T - B^T B, which gradient flow conserves, drifts by"
    if 2 * at_once > len(drift):
        return (
            f"Theory does not apply: {what} more than {limit:.0%} of ||Z||^2 in {at_once} of {len(drift)} layers by "
            f"the first checkpoint already, by {largest.max():.0%} at the most {when}, as under Adam or with large "
            "steps."
        )
    if beyond:
        return (
            f"{what} more than {limit:.0%} of ||Z||^2 in {beyond} of {len(drift)} layers {when}: of these theory tells "
            "nothing from there on."
        )
    return f"{what} {largest.max():.2g} of ||Z||^2 at the most {when}: gradient flow is about this run."


def _agreement(dataset: xr.Dataset) -> list[str]:
    """Of the predicted alignments how many were measured at the same checkpoint or the next."""
    if "t_update_predicted" not in dataset:
        return []
    predicted, measured = dataset["t_update_predicted"], dataset["t_update"]
    told = np.isfinite(predicted.values)
    lines = []
    if told.any():
        place, then = (np.searchsorted(dataset["step"].values, one.values[told]) for one in (predicted, measured))
        near = int(np.sum(np.abs(place - then) <= 1))
        lines.append(
            f"Of {told.sum()} alignments of updates that gradient flow predicts, {near} came at the predicted "
            "checkpoint or beside it."
        )
    if np.isfinite(dataset["t_fallen_predicted"]):
        when = float(dataset["t_fallen_predicted"])
        lines.append(f"The loss was predicted to have fallen by {FALLEN:.0%} at step {when:.0f}.")
    left = int(np.isnan(predicted.values).sum())
    if left:
        lines.append(
            f"Not predicted: the alignment of {left} of {told.size} layers, which comes later than theory tells."
        )
    return lines


def _not_predicted(dataset: xr.Dataset) -> list[str]:
    """What the report cannot say, and the flag that would let it."""
    attrs, lines = dataset.attrs, []
    missing = [flag for flag in ("gradients", "lr") if flag not in attrs]
    if "told_until" not in dataset:
        if 0 not in dataset["step"].values:
            missing.append("initial")
        needs = " and ".join(filter(None, [", ".join(f"--{one}" for one in missing[:-1]), f"--{missing[-1]}"]))
        lines.append(f"Phases are not predicted: that needs {needs}.")
    if "loss" not in attrs:
        lines.append(
            f"Where growth ends, and until when the flow is linear (a fall of the loss by {FALLEN:.0%}), is not "
            f"told: that needs --loss{'' if _has_gradients(dataset) else ' and --gradients'}."
        )
    return lines


def _legend(dataset: xr.Dataset) -> str:
    text = (
        f"Steps at which Z = [B; A^T] turns to {_direction(dataset)}, the update does (1 - cos below {ALIGNED:g}), and "
        f"the layer's own update lowers the loss by {GROWN:.0%} to first order (T1). `-`: not by the last step, or not "
        "known."
    )
    return f"{text} Behind a slash what gradient flow predicts." if "told_until" in dataset else text


def _layers(dataset: xr.Dataset) -> str:
    header = ["layer", "sigma", "gap", "Z aligns", "update aligns", "T1", "least 1 - cos", "norm of the update"]
    header += ["effective rank", "largest drift"]
    last, least, drift = dataset.isel(step=-1), dataset["update_error"].min("step"), dataset["drift"].max("step")
    rows = []
    for i, name in enumerate(dataset["layer"].values):
        times = [_beside(dataset, one, i) for one in ("t_align", "t_update", "t1")]
        sizes = [dataset["sigma"][i], dataset["gap"][i]]
        ends = [least[i], last["update_norm"][i], last["effective_rank"][i], drift[i]]
        rows.append([f"`{name}`", *map(_number, sizes), *times, *map(_number, ends)])
    return table(header, rows)


def _beside(dataset: xr.Dataset, name: str, layer: int) -> str:
    measured = _step(float(dataset[name][layer]))
    if f"{name}_predicted" not in dataset:
        return measured
    predicted = float(dataset[f"{name}_predicted"][layer])
    return f"{measured} / {'not predicted' if np.isnan(predicted) else _step(predicted)}"


def _step(value: float) -> str:
    return f"{value:.0f}" if np.isfinite(value) else "-"


def _number(value: xr.DataArray | float) -> str:
    return f"{float(value):.2g}" if np.isfinite(value) else "-"


def _span(values: np.ndarray) -> str:
    low, high = values.min(), values.max()
    return f"{low}" if low == high else f"{low} to {high}"


def _layer(dataset: xr.Dataset, place: int) -> str:
    return str(dataset["layer"].values[place])


def _has_gradients(dataset: xr.Dataset) -> bool:
    return "gradients" in dataset.attrs


def _direction(dataset: xr.Dataset) -> str:
    return str(dataset.attrs["direction"])
