"""Verdicts on results whose order is known."""

import re
from typing import NamedTuple

import numpy as np
import pytest
import xarray as xr
from lora_flow_vision.claims import CLAIMS as check_claims
from lora_flow_vision.claims import LABELS, lines, moment, report_steps, rhos, rows
from lora_flow_vision.results import saved_steps
from lora_flow_vision.settings import INITS, OPTIMIZERS

from lora_flow.claims.table import CLAIMS

STDS = np.array([0.1, 0.2, 0.4, 0.6, 0.8])
ALIGNED_AT = 1e-3
ORDERS = {  # places of five values, and Spearman's rho = 1 - 6 sum d^2 / (n (n^2 - 1))
    (0, 1, 2, 3, 4): 1.0,
    (0, 1, 2, 4, 3): 0.9,
    (1, 0, 3, 2, 4): 0.8,
    (2, 0, 1, 4, 3): 0.6,
    (4, 0, 1, 2, 3): 0.0,
    (3, 2, 4, 1, 0): -0.7,
    (4, 3, 2, 1, 0): -1.0,
}
LOSS, TEST_LOSS, ACCURACY = (
    f"smaller std gives {told}" for told in ("lower train loss", "lower test loss", "higher test accuracy")
)
ALIGNED = "adapters align: equation 215 falls below 0.7 in every seed"
HOLDS, FAILS, REVERSED, UNDECIDED = "holds", "fails", "reversed", "undecided"


class Verdict(NamedTuple):
    verdict: str
    claim: str
    where: str
    statistic: str


def verdicts(dataset):
    return [Verdict(*row) for row in rows(lines(dataset))]


def results(seeds=3, optimizers=("sgd",), inits=("gaussian-A",), stds=STDS, steps=20, begin=100.0, **values):
    """A dataset of zeros, but for what is given: arrays that broadcast to `(init, alpha, seed, step)`.

    Over alpha they are for `stds`; at the smallest, where alignment is followed, they are absurd (but for alignment).
    Train losses begin at 100, so that all has been learned that was to be.
    """
    alphas, numbers = np.array([ALIGNED_AT, *stds]), saved_steps(steps)
    coords = {"optimizer": list(optimizers), "init": list(inits), "alpha": alphas, "rank": [2]}
    coords |= {"seed": np.arange(seeds), "step": numbers}
    sizes = {dim: len(listed) for dim, listed in coords.items()}
    data = {}
    for name in ("train_loss", "test_loss", "test_accuracy", "alignment"):
        inner = len(inits), len(stds), seeds, len(numbers)
        array = np.broadcast_to(values.get(name, 0.0), inner)
        if name == "train_loss":
            array = np.concatenate([np.full_like(array[..., :1], begin), array[..., 1:]], axis=-1)
        first = array[:, :1] if name == "alignment" else np.full_like(array[:, :1], 1e9)
        array = np.concatenate([first, array], axis=1)[None, :, :, None]
        data[name] = (tuple(coords), np.broadcast_to(array, tuple(sizes.values())))
    return xr.Dataset(data, coords, {"aligned_at": ALIGNED_AT, "sgd_rate": 0.1})


def over_stds(*orders):
    """Values over `(init, alpha, seed, step)`: one order for each seed."""
    return np.array(orders, float).T[None, :, :, None]


def only(found, claim, last=True):
    """The verdict on a claim, at the last time."""
    chosen = [one for one in found if one.claim == claim]
    return chosen[-1] if last else chosen


@pytest.mark.parametrize(("order", "rho"), ORDERS.items())
def test_rho_is_spearmans(order, rho):
    values = xr.DataArray([order], dims=("seed", "alpha"), coords={"alpha": STDS})
    np.testing.assert_allclose(rhos(np.exp(values)), [rho], atol=1e-12)


def test_rho_of_values_that_are_all_equal_is_0():
    values = xr.DataArray(np.ones((5, 2)), dims=("alpha", "seed"), coords={"alpha": STDS})
    np.testing.assert_array_equal(rhos(values), [0.0, 0.0])


UP, NEARLY, MIXED, FLAT, DOWN = (0, 1, 2, 3, 4), (1, 0, 3, 2, 4), (2, 0, 1, 4, 3), (4, 0, 1, 2, 3), (4, 3, 2, 1, 0)


@pytest.mark.parametrize(
    ("orders", "verdict", "rho", "agree"),
    [
        ((UP, UP, UP), HOLDS, 1.0, 3),
        ((UP, UP, NEARLY, NEARLY), HOLDS, 0.9, 4),
        ((NEARLY, NEARLY, MIXED, MIXED), HOLDS, 0.7, 4),
        ((MIXED, MIXED, MIXED), FAILS, 0.6, 3),
        ((UP, UP, UP, FLAT), FAILS, 0.75, 3),
        ((UP, UP, DOWN, DOWN), FAILS, 0.0, 2),
        ((DOWN, DOWN, DOWN), REVERSED, -1.0, 0),
        ((DOWN, DOWN, DOWN, FLAT), FAILS, -0.75, 0),
        ((DOWN,) * 9 + (MIXED,), FAILS, -0.84, 1),
        (((0,) * 5,) * 3, FAILS, 0.0, 0),
    ],
)
def test_an_ordering_holds_where_rho_is_large_on_average_and_positive_in_every_seed(orders, verdict, rho, agree):
    found = verdicts(results(len(orders), train_loss=over_stds(*orders)))
    one = only(found, LOSS)
    assert one.verdict == verdict
    assert f"rho = {rho:.2f}" in one.statistic
    assert f" {agree} of {len(orders)} seeds" in one.statistic


def test_a_higher_accuracy_is_better_and_a_lower_loss():
    rising, falling = over_stds(UP, UP, UP), over_stds(DOWN, DOWN, DOWN)
    found = verdicts(results(test_loss=rising, test_accuracy=falling))
    assert only(found, TEST_LOSS).verdict == HOLDS
    assert only(found, ACCURACY).verdict == HOLDS
    assert "rho = -1.00" in only(found, ACCURACY).statistic
    assert " 3 of 3 seeds" in only(found, ACCURACY).statistic
    assert only(verdicts(results(test_accuracy=rising)), ACCURACY).verdict == REVERSED


def test_a_statistic_names_the_means_at_both_ends_of_the_stds():
    one = only(verdicts(results(train_loss=over_stds(UP, UP, (3, 4, 5, 6, 8)))), LOSS)
    assert re.search(r"\b1(\.0+)? at .*\b0\.1\b.* 5\.330* at .*\b0\.8$", one.statistic)
    assert one[:3] == ("holds", LOSS, "SGD 20 steps, rank 2, A random")


def test_verdicts_are_of_their_own_time():
    early, late = over_stds(UP, UP, UP), over_stds(DOWN, DOWN, DOWN)
    found = verdicts(results(train_loss=np.concatenate([0 * early, early, late], axis=3)))
    assert [one.verdict for one in only(found, LOSS, last=False)] == [HOLDS, REVERSED]
    assert [one.where for one in only(found, LOSS, last=False)] == [
        f"SGD {step} steps, rank 2, A random" for step in (10, 20)
    ]


def test_orderings_are_of_random_starts_and_of_three_stds_or_more():
    every = results(optimizers=OPTIMIZERS, inits=INITS)
    found = only(verdicts(every), LOSS, last=False)
    places = [(label, start) for start in ("A random", "B random") for label in LABELS.values() for _ in range(2)]
    assert [(one.where.split()[0], one.where.rsplit(", ")[-1]) for one in found] == places
    assert not only(verdicts(results(stds=STDS[:2])), LOSS, last=False)


def test_report_steps_are_a_twentieth_a_third_and_all():
    assert report_steps(results(steps=1000)) == [50, 300, 1000]
    assert report_steps(results(steps=20)) == [10, 20]
    assert report_steps(results(steps=1)) == [1]


def test_a_time_of_the_flow_is_steps_times_the_rate():
    assert moment(results(), "flow", 300) == "T = 30"
    assert moment(results(), "adam", 300) == "300 steps"


@pytest.mark.parametrize(
    ("lowest", "verdict"), [((0.69, 0.3, 0.3), HOLDS), ((0.7, 0.3, 0.3), FAILS), ((0.75, 0.8, 0.8), FAILS)]
)
def test_adapters_align_where_every_seed_falls_below(lowest, verdict):
    """They may rise again later."""
    curve = np.array([[1.0, low, 0.9] for low in lowest])[None, None]
    one = only(verdicts(results(alignment=curve)), ALIGNED)
    assert one.verdict == verdict
    assert one.statistic == f"1.00 falls to {np.mean(lowest):.2f} near step 10, 0.90 after 20"
    assert one.where == "SGD, rank 2, A random, std 0.001"


def test_alignment_counts_in_the_first_300_steps():
    numbers = saved_steps(500)
    late = np.where(numbers > 300, 0.1, 0.9)[None, None, None]
    one = only(verdicts(results(steps=500, alignment=late)), ALIGNED)
    assert one.verdict == FAILS
    assert one.statistic.endswith("0.90 after 300")


@pytest.mark.parametrize(
    ("lower", "verdict", "seeds"),
    [((5, 5, 5), HOLDS, 3), ((5, 4, 5), FAILS, 2), ((1, 0, 0), FAILS, 0), ((0, 0, 0), REVERSED, 0)],
)
def test_one_start_beats_another_where_it_does_so_in_every_seed(lower, verdict, seeds):
    """At nine tenths of the five stds, which is all of them."""
    random = np.ones((5, 3))
    other = np.where(np.arange(5)[:, None] < np.array(lower), 0.5, 2.0)
    losses = np.stack([random, other])[..., None]
    found = verdicts(results(inits=("gaussian-A", "lora-one"), train_loss=losses))
    one = only(found, "LoRA-One gives lower train loss than random A of its norm")
    assert one.verdict == verdict
    share = f"lower at {20 * sum(lower) / 3:.0f} % of the stds, {seeds} of 3 seeds reach the needed 90 %"
    assert one.statistic == f"{share}, median ratio {np.median(other):.2f}"
    assert one.where == "SGD 20 steps, rank 2"


STARTS = {"inits": ("gaussian-A", "lora-one")}


@pytest.mark.parametrize(("seeds", "told"), [(1, "1 seed, needs 3"), (2, "2 seeds, needs 3"), (3, "")])
def test_fewer_than_three_seeds_decide_nothing(seeds, told):
    """What they measured is told all the same."""
    losses = (1 + over_stds(*[UP] * seeds)) * np.array([1.0, 0.5])[:, None, None, None]
    curve = np.array([[1.0, 0.1, 0.9]] * seeds)[None, None]
    found = verdicts(results(seeds, **STARTS, train_loss=losses, alignment=curve))
    claims = [LOSS, ALIGNED, "LoRA-One gives lower train loss than random A of its norm"]
    assert [only(found, claim).verdict for claim in claims] == [UNDECIDED if told else HOLDS] * 3
    if told:
        assert {one.verdict for one in found} == {UNDECIDED}
        assert all(one.statistic.endswith(f"; {told}") for one in found)
    assert only(found, LOSS).statistic.startswith("rho = 1.00, ")


def test_before_half_of_the_train_loss_is_gone_everywhere_it_is_too_early():
    """One standard deviation that has hardly moved is enough; then the order is one of speed."""
    losses = np.array([1.2, 1.0, 0.9, 0.8, 0.7])[None, :, None, None] * np.array([1.0, 1.0, 0.4])
    found = verdicts(results(**STARTS, begin=2.0, train_loss=losses))
    early, late = only(found, LOSS, last=False)
    assert early.verdict == UNDECIDED
    assert early.statistic.endswith("; too early, std 0.1 has lost 40 % of its train loss, needs 50 %")
    assert early.statistic.startswith("rho = -1.00, ")
    assert late.verdict == REVERSED
    early, late = only(found, "LoRA-One gives lower train loss than random A of its norm", last=False)
    assert (early.verdict, late.verdict) == (UNDECIDED, FAILS)


def test_alignment_that_still_falls_when_a_short_run_ends_is_undecided():
    for curve, verdict in (([1.0, 0.9, 0.8], UNDECIDED), ([1.0, 0.8, 0.9], FAILS), ([1.0, 0.8, 0.6], HOLDS)):
        one = only(verdicts(results(alignment=np.array([curve] * 3)[None, None])), ALIGNED)
        assert one.verdict == verdict
        assert one.statistic.endswith("; still falling after 20 steps") == (verdict == UNDECIDED)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_run_that_diverged_decides_nothing(bad):
    losses = np.broadcast_to(over_stds(UP, UP, UP), (2, 5, 3, 1)).copy()
    losses[1, -1, 0] = bad
    curve = np.array([[1.0, 0.1, 0.1], [1.0, 0.1, 0.1], [1.0, 0.1, bad]])[None, None]
    found = verdicts(results(inits=("gaussian-B", "gaussian-A"), train_loss=losses, alignment=curve))
    lost = [one for one in found if one.statistic == "1 runs diverged"]
    assert {one.claim for one in lost} == {LOSS, ALIGNED}
    assert {one.verdict for one in lost} == {FAILS}


def test_a_tie_is_no_win_and_a_start_alone_is_compared_with_nothing():
    equal = verdicts(results(inits=("gaussian-A", "spectral")))
    assert only(equal, "spectral gives lower train loss than random A of its norm").verdict == FAILS
    alone = verdicts(results(inits=("gaussian-B", "spectral")))
    assert not [one for one in alone if "random A" in one.claim]


def test_the_claims_are_lines_of_the_frame_and_take_no_names_of_the_others():
    late = np.concatenate([0 * over_stds(UP, UP, UP), over_stds(UP, UP, UP), over_stds(DOWN, DOWN, DOWN)], axis=3)
    (line,) = [one for one in lines(results(train_loss=late)) if one.statement == LOSS]
    assert [case.verdict for case in line.cases] == ["yes", "reversed"]
    assert [case.measured for case in line.cases] == [pytest.approx(1.0), pytest.approx(-1.0)]
    assert (line.verdict, line.relation, line.cases[0].predicted) == ("fails (1 of 2)", ">=", 0.7)
    assert [case.where for case in lines(results(train_loss=late), [20])[0].cases] == ["SGD 20 steps, rank 2, A random"]
    assert not {claim.__name__ for claim in check_claims} & set(CLAIMS)
