"""The paper's claims on image classifiers, tested on a check's results: each case has a verdict and its statistic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr
from scipy import stats

from lora_flow.claims.frame import Cases, Line, Tried, claim

SEEDS = 3  # from fewer there is no verdict
LEARNED = 0.5  # the share of its first train loss that every run must have lost, or it is too early for a verdict
TREND = 0.7  # mean of Spearman's rho over seeds from which there is one
BETTER = 0.9  # share of standard deviations at which one start must be better than another, in every seed
ALIGNED_BY = 300  # steps, as in Figure 5
ALIGNED = 0.7  # the worst value of equation 215 that is published (Figure 5) is .665
LABELS = {"flow": "flow", "sgd": "SGD", "adam": "Adam"}
STARTS = {"gaussian-A": "A random", "gaussian-B": "B random", "spectral": "spectral", "lora-one": "LoRA-One"}
WORDS = {"yes": "holds", "no": "fails"}  # of a case, in a check's report
PAPER, HERE = "Xu et al., section 5.2", "the image check"


class Results(NamedTuple):
    """A check's results, and the steps at which claims about one time are tried."""

    dataset: xr.Dataset
    steps: Sequence[int]


def lines(dataset: xr.Dataset, steps: Sequence[int] | None = None) -> list[Line]:
    """A line for each claim, with a case for each optimiser, start, rank and step; `report_steps` are the steps."""
    found = Results(dataset, report_steps(dataset) if steps is None else steps)
    return [line for line in (claim(found) for claim in CLAIMS) if line.cases]


def rows(found: Sequence[Line]) -> list[list[str]]:
    """Of every case the verdict, the claim, the place and the statistic."""
    return [
        [WORDS.get(case.verdict, case.verdict), line.statement, case.where, case.told]
        for line in found
        for case in line.cases
    ]


def report_steps(dataset: xr.Dataset) -> list[int]:
    """About a twentieth, a third and all of the steps: 50, 300, 1000 of 1000."""
    steps = dataset["step"].values
    wanted = [steps[-1] * share for share in (0.05, 0.3, 1.0)]
    return sorted({int(steps[np.argmin(np.abs(steps - one))]) for one in wanted} - {0})


def moment(dataset: xr.Dataset, optimizer: str, step: int) -> str:
    """A time in words: T for the flow, steps for the others."""
    if optimizer == "flow":
        return f"T = {dataset.attrs['sgd_rate'] * step:g}"
    return f"{step} steps"


def rhos(values: xr.DataArray) -> np.ndarray:
    """Spearman's correlation of alpha with the values for each seed; 0 where the values are all equal."""
    over = values.transpose("seed", "alpha")
    return np.array([stats.spearmanr(over["alpha"], one).statistic if np.ptp(one) > 0 else 0.0 for one in over.values])


@claim(PAPER, HERE, ">=")
def train_loss_over_stds(results: Results) -> Cases:
    """smaller std gives lower train loss"""
    yield from _orderings(results, "train_loss", 1)


@claim(PAPER, HERE, ">=")
def held_out_loss_over_stds(results: Results) -> Cases:
    """smaller std gives lower test loss"""
    yield from _orderings(results, "test_loss", 1)


@claim(PAPER, HERE, ">=")
def held_out_accuracy_over_stds(results: Results) -> Cases:
    """smaller std gives higher test accuracy"""
    yield from _orderings(results, "test_accuracy", -1)


@claim("Xu et al., Figure 5", HERE, "<=")
def adapters_align_early(results: Results) -> Cases:
    """adapters align: equation 215 falls below 0.7 in every seed"""
    dataset = results.dataset
    early = dataset["alignment"].sel(alpha=dataset.attrs["aligned_at"]).where(dataset["step"] <= ALIGNED_BY, drop=True)
    for optimizer, init, rank in _cells(dataset, ["gaussian-A"]):
        cell = early.sel({"optimizer": optimizer, "init": init, "rank": rank})
        where = f"{LABELS[optimizer]}, rank {rank}, {STARTS[init]}, std {dataset.attrs['aligned_at']:g}"
        if lost := _diverged(cell):
            yield Tried(where, ALIGNED, np.nan, missing=_seeds(dataset), told=lost)
            continue
        least, at, last = cell.min("step"), cell.idxmin("step"), int(cell["step"][-1])
        below = bool((least < ALIGNED).all())
        first, low, end = (float(one.mean()) for one in (cell.isel(step=0), least, cell.isel(step=-1)))
        told = f"{first:.2f} falls to {low:.2f} near step {float(at.mean()):.0f}, {end:.2f} after {last}"
        falling = not below and bool((at == last).any()) and last < ALIGNED_BY
        missing = _listed(f"still falling after {last} steps" if falling else "", _seeds(dataset))
        yield Tried(where, ALIGNED, float(least.max()), also=below, missing=missing, told=told)


@claim(HERE, HERE, ">=")
def spectral_beats_random(results: Results) -> Cases:
    """spectral gives lower train loss than random A of its norm"""
    yield from _comparisons(results, "spectral")


@claim(HERE, HERE, ">=")
def lora_one_beats_random(results: Results) -> Cases:
    """LoRA-One gives lower train loss than random A of its norm"""
    yield from _comparisons(results, "lora-one")


CLAIMS = (
    *(train_loss_over_stds, held_out_loss_over_stds, held_out_accuracy_over_stds),
    *(adapters_align_early, spectral_beats_random, lora_one_beats_random),
)


def _orderings(results: Results, name: str, sign: int) -> Iterator[Tried]:
    """Smaller standard deviations end better: rho of the standard deviations with a quantity that should be low (1) or
    high (-1)."""
    compared = _over_stds(results.dataset)
    if compared.sizes["alpha"] < 3:
        return
    for optimizer, init, rank, step in _places(results, [name for name in STARTS if name.startswith("gaussian")]):
        cell = compared[name].sel({"optimizer": optimizer, "init": init, "rank": rank, "step": step})
        where = f"{LABELS[optimizer]} {moment(compared, optimizer, step)}, rank {rank}, {STARTS[init]}"
        few = _seeds(compared)
        if lost := _diverged(cell):
            yield Tried(where, TREND, np.nan, missing=few, told=lost)
            continue
        rho = sign * rhos(cell)
        agree = int(np.sum(rho > 0))
        (first, last), (low, high) = ((float(one[0]), float(one[-1])) for one in (cell.mean("seed"), cell["alpha"]))
        told = f"rho = {sign * rho.mean():.2f}, as claimed in {agree} of {len(rho)} seeds, "
        told += f"{first:.3g} at std {low:g}, {last:.3g} at {high:g}"
        missing = _listed(_early(compared, optimizer, [init], rank, step), few)
        opposite = bool(rho.mean() <= -TREND and np.all(rho < 0))
        every = agree == len(rho)
        yield Tried(where, TREND, rho.mean(), also=every, missing=missing, reversed=opposite, told=told)


def _comparisons(results: Results, init: str) -> Iterator[Tried]:
    """A start along the gradient's directions against a random one of the same norm: the share of the standard
    deviations where the first has the lower train loss, in the seed where it is smallest."""
    if "gaussian-A" not in results.dataset["init"]:
        return
    compared = _over_stds(results.dataset)
    for optimizer, _, rank, step in _places(results, [init]):
        one, random = (
            compared["train_loss"].sel({"optimizer": optimizer, "init": name, "rank": rank, "step": step})
            for name in (init, "gaussian-A")
        )
        where, few = f"{LABELS[optimizer]} {moment(compared, optimizer, step)}, rank {rank}", _seeds(compared)
        if lost := _diverged(one, random):
            yield Tried(where, BETTER, np.nan, missing=few, told=lost)
            continue
        lower, higher = (one < random).mean("alpha"), (one > random).mean("alpha")
        told = (
            f"lower at {100 * float(lower.mean()):.0f} % of the stds, {int(np.sum(lower >= BETTER))} of "
            f"{one.sizes['seed']} seeds reach the needed {100 * BETTER:.0f} %, "
            f"median ratio {float((one / random).median()):.2f}"
        )
        missing = _listed(_early(compared, optimizer, [init, "gaussian-A"], rank, step), few)
        opposite = bool((higher >= BETTER).all())
        yield Tried(where, BETTER, float(lower.min()), missing=missing, reversed=opposite, told=told)


def _over_stds(dataset: xr.Dataset) -> xr.Dataset:
    """The standard deviations that are compared, without the one at which alignment is followed."""
    return dataset.sel(alpha=dataset["alpha"] > dataset.attrs["aligned_at"])


def _seeds(dataset: xr.Dataset) -> str:
    """What is missing of the seeds, in words; "" for nothing."""
    seeds = dataset.sizes["seed"]
    return f"{seeds} seed{'s' * (seeds > 1)}, needs {SEEDS}" if seeds < SEEDS else ""


def _early(compared: xr.Dataset, optimizer: str, inits: list[str], rank: int, step: int) -> str:
    """The runs that have hardly learned anything yet, in words; "" for none. Their order is only one of speed."""
    losses = compared["train_loss"].sel({"optimizer": optimizer, "init": inits, "rank": rank})
    left = (losses.sel(step=step) / losses.isel(step=0)).mean("seed").max("init")
    most = left.isel(alpha=int(left.fillna(0).argmax("alpha")))
    if not float(most) > 1 - LEARNED:
        return ""
    lost = f"lost {100 * (1 - float(most)):.0f} % of its train loss"
    return f"too early, std {float(most['alpha']):g} has {lost}, needs {100 * LEARNED:.0f} %"


def _diverged(*cells: xr.DataArray) -> str:
    """The number of runs with a value that is not finite, in words; "" for none."""
    lost = 0
    for cell in cells:
        bad = ~xr.apply_ufunc(np.isfinite, cell)
        runs = bad.any("step") if "step" in bad.dims else bad
        lost += int(runs.sum())
    return f"{lost} runs diverged" if lost else ""


def _listed(*missing: str) -> str:
    return "; ".join(filter(None, missing))


def _cells(dataset: xr.Dataset, inits: list[str]) -> Iterator[tuple[str, str, int]]:
    for init in inits:
        if init in dataset["init"]:
            for optimizer in dataset["optimizer"].values:
                for rank in dataset["rank"].values:
                    yield str(optimizer), init, int(rank)


def _places(results: Results, inits: list[str]) -> Iterator[tuple[str, str, int, int]]:
    for cell in _cells(results.dataset, inits):
        for step in results.steps:
            yield *cell, step
