"""The paper's claims on image classifiers, tested on a check's results: each line has a verdict and its statistic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from scipy import stats

HOLDS, FAILS, REVERSED, UNDECIDED = "holds", "fails", "reversed", "undecided"
SEEDS = 3  # from fewer there is no verdict
LEARNED = 0.5  # the share of its first train loss that every run must have lost, or it is too early for a verdict
TREND = 0.7  # mean of Spearman's rho over seeds from which there is one
BETTER = 0.9  # share of standard deviations at which one start must be better than another, in every seed
ALIGNED_BY = 300  # steps, as in Figure 5
ALIGNED = 0.7  # the worst value of equation 215 that is published (Figure 5) is .665
LABELS = {"flow": "flow", "sgd": "SGD", "adam": "Adam"}
STARTS = {"gaussian-A": "A random", "gaussian-B": "B random", "spectral": "spectral", "lora-one": "LoRA-One"}
QUANTITIES = {
    "train_loss": ("lower", "train loss", 1),
    "test_loss": ("lower", "test loss", 1),
    "test_accuracy": ("higher", "test accuracy", -1),
}


class Verdict(NamedTuple):
    """A verdict on one claim. `time` is the moment that the claim is about; None for a claim about all times.

    With too few seeds or too short a time the verdict is "undecided", and the statistic says why.
    """

    verdict: str
    claim: str
    where: str
    statistic: str
    time: str | None = None

    def __str__(self) -> str:
        return f"{self.claim}: {self.where}: {self.statistic}: {self.verdict}"


def verdicts(dataset: xr.Dataset) -> list[Verdict]:
    """One verdict for each claim, optimiser, start, rank and time; `report_steps` are the times."""
    found = [*_orderings(dataset), *_alignments(dataset), *_comparisons(dataset)]
    seeds = dataset.sizes["seed"]
    missing = f"{seeds} seed{'s' * (seeds > 1)}, needs {SEEDS}"
    return found if seeds >= SEEDS else [_undecided(one, missing) for one in found]


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


def _orderings(dataset: xr.Dataset) -> Iterator[Verdict]:
    """Smaller standard deviations end better (section 5.2)."""
    compared = dataset.sel(alpha=dataset["alpha"] > dataset.attrs["aligned_at"])
    if compared.sizes["alpha"] < 3:
        return
    for optimizer, init, rank, step in _places(compared, [name for name in STARTS if name.startswith("gaussian")]):
        for name, (better, quantity, sign) in QUANTITIES.items():
            cell = compared[name].sel({"optimizer": optimizer, "init": init, "rank": rank, "step": step})
            claim, at = f"smaller std gives {better} {quantity}", moment(dataset, optimizer, step)
            where = f"{LABELS[optimizer]} {at}, rank {rank}, {STARTS[init]}"
            if lost := _diverged(cell):
                yield Verdict(FAILS, claim, where, lost, at)
                continue
            rho = sign * rhos(cell)
            agree = int(np.sum(rho > 0))
            verdict = HOLDS if rho.mean() >= TREND and agree == len(rho) else FAILS
            if rho.mean() <= -TREND and np.all(rho < 0):
                verdict = REVERSED
            first, last = (float(cell.isel(alpha=place).mean()) for place in (0, -1))
            low, high = (float(cell["alpha"][place]) for place in (0, -1))
            statistic = f"rho = {sign * rho.mean():.2f}, as claimed in {agree} of {len(rho)} seeds, "
            statistic += f"{first:.3g} at std {low:g}, {last:.3g} at {high:g}"
            one = Verdict(verdict, claim, where, statistic, at)
            yield _undecided(one, _early(compared, optimizer, [init], rank, step))


def _alignments(dataset: xr.Dataset) -> Iterator[Verdict]:
    """Small adapters align with the one-step gradient while they are small (Figure 5)."""
    early = dataset["alignment"].sel(alpha=dataset.attrs["aligned_at"]).where(dataset["step"] <= ALIGNED_BY, drop=True)
    for optimizer, init, rank in _cells(dataset, ["gaussian-A"]):
        cell = early.sel({"optimizer": optimizer, "init": init, "rank": rank})
        where = f"{LABELS[optimizer]}, rank {rank}, {STARTS[init]}, std {dataset.attrs['aligned_at']:g}"
        claim = f"adapters align: equation 215 falls below {ALIGNED:g} in every seed"
        if lost := _diverged(cell):
            yield Verdict(FAILS, claim, where, lost)
            continue
        least, at = cell.min("step"), cell.idxmin("step")
        verdict = HOLDS if bool((least < ALIGNED).all()) else FAILS
        first, low, last = (float(one.mean()) for one in (cell.isel(step=0), least, cell.isel(step=-1)))
        statistic = f"{first:.2f} falls to {low:.2f} near step {float(at.mean()):.0f}, {last:.2f} after "
        statistic += str(int(cell["step"][-1]))
        falling = bool((at == cell["step"][-1]).any()) and int(cell["step"][-1]) < ALIGNED_BY
        missing = f"still falling after {int(cell['step'][-1])} steps" if verdict == FAILS and falling else ""
        yield _undecided(Verdict(verdict, claim, where, statistic), missing)


def _comparisons(dataset: xr.Dataset) -> Iterator[Verdict]:
    """A start along the gradient's directions beats a random one of the same norm."""
    if "gaussian-A" not in dataset["init"]:
        return
    compared = dataset.sel(alpha=dataset["alpha"] > dataset.attrs["aligned_at"])
    for optimizer, init, rank, step in _places(dataset, ["spectral", "lora-one"]):
        one, random = (
            compared["train_loss"].sel({"optimizer": optimizer, "init": name, "rank": rank, "step": step})
            for name in (init, "gaussian-A")
        )
        claim, at = f"{STARTS[init]} gives lower train loss than random A of its norm", moment(dataset, optimizer, step)
        where = f"{LABELS[optimizer]} {at}, rank {rank}"
        if lost := _diverged(one, random):
            yield Verdict(FAILS, claim, where, lost, at)
            continue
        shares = [(one < random).mean("alpha"), (one > random).mean("alpha")]
        lower, higher = (bool((share >= BETTER).all()) for share in shares)
        verdict = HOLDS if lower else REVERSED if higher else FAILS
        count = int(np.sum(shares[0] >= BETTER))
        statistic = (
            f"lower at {100 * float(shares[0].mean()):.0f} % of the stds, {count} of {one.sizes['seed']} seeds reach "
            f"the needed {100 * BETTER:.0f} %, median ratio {float((one / random).median()):.2f}"
        )
        verdict_then = Verdict(verdict, claim, where, statistic, at)
        yield _undecided(verdict_then, _early(compared, optimizer, [init, "gaussian-A"], rank, step))


def _undecided(one: Verdict, missing: str) -> Verdict:
    """The verdict, or "undecided" where something is missing for it."""
    return one._replace(verdict=UNDECIDED, statistic=f"{one.statistic}; {missing}") if missing else one


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


def _cells(dataset: xr.Dataset, inits: list[str]) -> Iterator[tuple[str, str, int]]:
    for init in inits:
        if init in dataset["init"]:
            for optimizer in dataset["optimizer"].values:
                for rank in dataset["rank"].values:
                    yield str(optimizer), init, int(rank)


def _places(dataset: xr.Dataset, inits: list[str]) -> Iterator[tuple[str, str, int, int]]:
    steps: Any = report_steps(dataset)
    for cell in _cells(dataset, inits):
        for step in steps:
            yield *cell, step
