"""What a fit has found, in words: the parameters, what cannot be told apart, and whether the model is the curve's."""

from __future__ import annotations

import numpy as np
import xarray as xr

from lora_flow.results.given import require_dataset
from lora_flow.results.report import show, table

UNTOLD = 4.0  # ratio of an interval's ends above which a parameter is not told
APART = 0.1  # share of its variance that a parameter keeps once another is known, below which the two go together
RUN = 0.7  # correlation of neighbouring residuals above which they are no noise
TOO_FAR = 1.5  # distance of the fit in units of the error that was given


def fit_told(dataset: xr.Dataset) -> list[str]:
    """What a fit has found, a sentence each, for `fit`'s dataset.

    Every parameter with its interval; answers elsewhere that fit nearly as well; which parameters the curves do not
    tell apart, and what they tell instead; what an unknown draw does; which losses are left out; and how far the curves
    are from the model.

    **Raises:** `InputError` for another dataset.
    """
    require_dataset(dataset, "fit_told", "estimate", "low", "high", "covariance", "used")
    lines = [_interval(dataset, str(name)) for name in dataset["parameter"].values]
    parts = (_elsewhere, _together, _of_the_draw, _left_out, _scatter)
    return [*lines, *(line for part in parts for line in part(dataset))]


def is_told(dataset: xr.Dataset, name: str) -> bool:
    """Whether the parameter's interval is closed, and its ends within a factor of 4."""
    one = dataset.sel(parameter=name)
    return bool(one["low"] > 0 and one["high"] / one["low"] <= UNTOLD)


def _interval(dataset: xr.Dataset, name: str) -> str:
    one = dataset.sel(parameter=name)
    estimate, low, high = (float(one[what]) for what in ("estimate", "low", "high"))
    ends = f"{show(low) if low > 0 else 'open below'} to {show(high) if np.isfinite(high) else 'open above'}"
    level = f"{100 * dataset.attrs['level']:g} %"
    if is_told(dataset, name):
        return f"{name} = {show(estimate)}, {level} interval {ends}."
    return f"{name} cannot be told: its {level} interval is {ends}."


def _elsewhere(dataset: xr.Dataset) -> list[str]:
    if "other_estimate" not in dataset:
        return []
    lines = []
    for values, more in zip(dataset["other_estimate"].values, dataset["other_deviance"].values, strict=True):
        named = zip(dataset["parameter"].values, values, strict=True)
        told = ", ".join(f"{name} = {show(float(value))}" for name, value in named)
        lines.append(
            f"Another answer fits nearly as well: {told}. Its sum of squares is {more:.2g} more; the intervals are "
            "about the first answer alone."
        )
    return lines


def _together(dataset: xr.Dataset) -> list[str]:
    """The pairs of which at least one is not told, and which would tell each other."""
    names = [str(name) for name in dataset["parameter"].values]
    spread = dataset["covariance"].values
    lines = []
    for i, one in enumerate(names):
        for j, other in enumerate(names[:i]):
            alone = spread[i, i] - spread[i, j] ** 2 / spread[j, j]
            if (is_told(dataset, one) and is_told(dataset, other)) or alone > APART * spread[i, i]:
                continue
            power = -spread[i, j] / spread[j, j]
            lines.append(
                f"{other} and {one} cannot be told apart: the curve tells {one} * {other}^{power:.2f} to "
                f"{100 * np.sqrt(alone):.2g} %. With one of them known, the other follows."
            )
    return lines


def _of_the_draw(dataset: xr.Dataset) -> list[str]:
    if dataset.attrs["draws"] != "unknown":
        return []
    size, error = dataset["size"], dataset["size_error"]
    curves, rank = dataset.sizes["curve"], dataset.attrs["rank"]
    alone = 100 / np.sqrt(4 * curves * rank)
    known = ", ".join(
        f"{show(float(size[0, i]))} within {100 * float(error[0, i]):.2g} % (layer {i + 1})"
        for i in range(2)
        if error[0, i] < 1
    )
    count = f"{curves} curves" if curves > 1 else "a curve"
    lines = [
        f"The draw is unknown: the first curve tells the size of the start along the task, {known or 'of no layer'}."
    ]
    if "alpha" in dataset["parameter"].values:
        lines.append(
            f"alpha and the draw cannot be told apart: each size is alpha times a random number, so {count} of rank "
            f"{rank} cannot tell alpha to better than {alone:.2g} % (one standard deviation). More curves can, or the "
            "draw's seed."
        )
    if "delta_w" in dataset["parameter"].values:
        lines.append(
            "delta_w and its inverse cannot be told apart: with an unknown draw the layers may change places. The "
            "answer is on the first guess's side of 1."
        )
    return lines


def _left_out(dataset: xr.Dataset) -> list[str]:
    used = dataset["used"].values.astype(bool)
    if used.all():
        return []
    why = "the rest of the unknown draw decides them" if dataset.attrs["draws"] == "unknown" else "they are at rounding"
    first = float(dataset["time"].values[(~used).any(axis=0)][0])
    return [f"{(~used).sum()} of {used.size} losses, from {first:g} on, are left out: {why}."]


def _scatter(dataset: xr.Dataset) -> list[str]:
    """The error of a loss, and signs that the model is not the curve's."""
    used = dataset["used"].values.astype(bool)
    error = f"{100 * dataset.attrs['error']:.2g} %"
    if dataset.attrs["error_given"]:
        sizes = dataset["size"].size if "size" in dataset else 0
        left = max(1, used.sum() - sizes - dataset.sizes["parameter"])
        ratio = np.sqrt(dataset.attrs["deviance"] / left)
        if ratio > TOO_FAR:
            return [f"The fit is off by {ratio:.2g} times the error that was given: the model is not the curve's."]
        return [f"The fit is off by {ratio:.2g} times the error that was given, {error}."]
    loss, fitted, taken = (dataset[name].values for name in ("loss", "fitted", "uncertainty"))
    rows = [(np.log(loss[i, at]) - np.log(fitted[i, at])) / taken[i, at] for i, at in enumerate(used) if at.sum() > 2]
    together = np.mean([row[1:] @ row[:-1] / (row @ row) for row in rows if row.any()] or [0.0])
    if together > RUN:
        return [
            f"Neighbouring losses are off alike, by {error}: the model is not the curve's, or intervals too narrow."
        ]
    return [f"The error of a loss is {error}, as the scatter about the fit tells."]


def report(dataset: xr.Dataset, links: list[str]) -> str:
    """The text of report.md: the sentences, a table of parameters, and the picture."""
    header = ["parameter", "estimate", "low", "high", "standard error of its logarithm"]
    rows = [
        [
            name,
            *(show(float(dataset[what].sel(parameter=name))) for what in ("estimate", "low", "high")),
            f"{spread:.3g}",
        ]
        for name, spread in zip(dataset["parameter"].values, np.sqrt(np.diag(dataset["covariance"])), strict=True)
    ]
    parts = ["# Fit of a loss curve", str(dataset.attrs["problem"])]
    parts += ["\n".join(f"- {line}" for line in fit_told(dataset)), table(header, rows)]
    parts.append(f"Intervals are of {100 * dataset.attrs['level']:g} %, by profile likelihood.")
    return "\n\n".join([*parts, *(f"![]({link})" for link in links)]) + "\n"
