"""What matters most, in words and in a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import xarray as xr

from lora_flow.checks import require, require_choice, require_integer
from lora_flow.results.given import require_dataset
from lora_flow.results.report import show, table

SIGNED = 3  # digits
QUANTITY = {"log10 loss": "the loss", "log10 alignment_error": "the alignment error", "t_align": "t_align", "t1": "T1"}


class Spread(NamedTuple):
    """The median of finite elasticities over lanes, and their quartiles; NaN where there are none."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: xr.DataArray) -> Spread:
        known = values.values[np.isfinite(values.values)]
        return cls(*(np.quantile(known, (0.25, 0.5, 0.75)) if known.size else (np.nan,) * 3))

    def __str__(self) -> str:
        if np.isnan(self.middle):
            return "-"
        one = f"{self.middle:.{SIGNED}g}"
        return one if self.low == self.high else f"{one} ({self.low:.{SIGNED}g} to {self.high:.{SIGNED}g})"


def spreads(dataset: xr.Dataset, observable: str) -> Mapping[str, Spread]:
    """The spread of every parameter's elasticity over all lanes, the largest median first; unknown ones last."""
    found = {
        str(name): Spread.of(dataset["elasticity"].sel(observable=observable, parameter=name))
        for name in dataset["parameter"].values
    }
    return dict(sorted(found.items(), key=lambda one: -np.nan_to_num(abs(one[1].middle), nan=-1.0)))


def lines(dataset: xr.Dataset) -> list[str]:
    """A sentence for each observable: which parameter matters most, and by how much."""
    return [_line(dataset, str(observable)) for observable in dataset["observable"].values]


def _line(dataset: xr.Dataset, observable: str) -> str:
    name = QUANTITY.get(observable, observable)
    at = dataset["at"].sel(observable=observable)
    when = f" at t = {float(at.min()):g}" if observable.startswith("log10") else ""
    ranked = spreads(dataset, observable)
    first, spread = next(iter(ranked.items()), ("", Spread(*(np.nan,) * 3)))
    if np.isnan(spread.middle):
        return f"{name}{when}: no lane has it, or all are at rounding."
    known = np.isfinite(dataset["elasticity"].sel(observable=observable).transpose("parameter", ...).values)
    missing = int((~known.all(axis=0)).sum())
    left_out = f"; {missing} of {at.size} lanes do not have it, or are at rounding" if missing else ""
    return (
        f"{name}{when}: {first} matters most: 1 % more of {first} makes {spread.middle:+.{SIGNED}g} % (median over "
        f"lanes){left_out}."
    )


def leading_pairs(dataset: xr.Dataset, name: str, count: int = 1) -> xr.Dataset:
    """The leading singular pairs of the derivative by a matrix of the problem, `by_<name>`.

    Along the first pair (left, right) a change of the matrix of norm 1 changes the quantity most, by `singular_value`.

    **Returns:** `singular_value` with a dim `pair`, and `left` and `right` over the rows and columns as well; NaN where
    the derivative is not known.

    **Raises:** `InputError` unless the dataset has the derivative by a matrix of this name.
    """
    require_dataset(dataset, "leading_pairs")
    there = [str(one).removeprefix("by_") for one in dataset.data_vars if str(one).startswith("by_")]
    require(len(there) > 0, "dataset", "have the derivative by an array of the problem", "one by numbers only")
    require_choice("name", name, there)
    values = dataset[f"by_{name}"]
    rows, columns = f"{name}_0", f"{name}_1"
    require(columns in values.dims, "name", "be a matrix's", f"'{name}', a vector's")
    most = min(values.sizes[rows], values.sizes[columns])
    require_integer("count", count, f"lie between 1 and {most}", 1, most)
    lanes = [dim for dim in values.dims if dim not in (rows, columns)]
    matrices = values.transpose(*lanes, rows, columns).values
    known = np.isfinite(matrices).all(axis=(-2, -1), keepdims=True)
    found = np.linalg.svd(np.where(known, matrices, 0.0), full_matrices=False)
    u, s, vt = (np.where(of, one, np.nan) for of, one in zip((known, known[..., 0], known), found, strict=True))
    coords = {name: one for name, one in values.coords.items() if not {rows, columns} & set(one.dims)}
    return xr.Dataset(
        {
            "singular_value": ((*lanes, "pair"), s[..., :count]),
            "left": ((*lanes, rows, "pair"), u[..., :count]),
            "right": ((*lanes, "pair", columns), vt[..., :count, :]),
        },
        coords=coords,
    )


def report(dataset: xr.Dataset, links: list[str]) -> str:
    """The text of report.md: the sentences, a table of elasticities, and the pictures."""
    header = ["quantity", "init", *map(str, dataset["parameter"].values), "median value"]
    rows = []
    for observable in dataset["observable"].values:
        for init in dataset["init"].values:
            cell = dataset.sel(observable=observable, init=init)
            spread = [Spread.of(cell["elasticity"].sel(parameter=name)) for name in dataset["parameter"].values]
            rows.append([observable, init, *spread, f"{float(cell['value'].median()):.4g}"])
    about = (
        "Elasticities: the per cent by which the loss, the alignment error or a time changes for one per cent more of "
        "a parameter. Medians over the lanes, and quartiles in brackets."
    )
    parts = ["# Sensitivities", str(dataset.attrs["problem"]), "\n".join(f"- {line}" for line in lines(dataset))]
    parts += [about, table(header, rows), *(f"![]({link})" for link in links)]
    whole = [str(name) for name in dataset.data_vars if str(name).startswith("by_")]
    for name in whole:
        pairs = leading_pairs(dataset, name.removeprefix("by_"))["singular_value"].isel(pair=0)
        told = ", ".join(
            f"{observable}: {show(float(pairs.sel(observable=observable).median(skipna=True)))}"
            for observable in dataset["observable"].values
        )
        parts.append(f"Most that a change of {name.removeprefix('by_')} of norm 1 does, median over lanes: {told}.")
    return "\n\n".join(parts) + "\n"
