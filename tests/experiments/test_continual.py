"""The figure of continual learning, of a small layer: its numbers are those of theory, its report and picture whole."""

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

from lora_flow.experiments import continual

pytestmark = pytest.mark.long

SMALL = continual.Sizes(m=6, n=8, r=4, k=2, overlaps=(0.0, 0.5, 1.0), side=16, turn_rank=4, turn_overlaps=(0.0, 0.5))


@pytest.fixture(scope="module")
def found():
    return continual.run(2, lambda items: items, SMALL)


@pytest.mark.parametrize("overlap", [0.0, 0.4, 1.0])
def test_a_shared_shift_has_its_share_on_the_first_inputs(overlap):
    shift = np.asarray(continual.shared_shift(jax.random.key(1), m=5, n=9, k=3, overlap=overlap))
    assert np.sum(shift**2) == pytest.approx(1.0)
    assert np.sum(shift[:, :3] ** 2) == pytest.approx(overlap)
    assert np.linalg.matrix_rank(shift) == 2


def test_a_new_task_ends_at_its_floor_or_forgets_it(found):
    floor = found["overlap"] / 2
    for rule in ("least-squares", "exact", "safe-start"):
        one = found.sel(rule=rule)
        np.testing.assert_allclose(*np.broadcast_arrays(one["new_loss"], floor.values[:, None]), atol=5e-3)
        assert float(one["forgetting"].max()) < 1e-3
    plain = found.sel(rule="plain")
    np.testing.assert_allclose(*np.broadcast_arrays(plain["forgetting"], floor.values[:, None]), atol=1e-6)
    assert float(plain["new_loss"].max()) < 1e-6
    assert float(found["forgetting"].sel(rule="projected", overlap=0.0).min()) > 1e-4


def test_three_tasks_are_learned_or_kept_as_the_rule_allows(found):
    old, new = continual._of_three(found)
    for rule, forgets, learns in (("plain", True, True), ("exact", False, False), ("safe-start", False, True)):
        assert (float(old.sel(turn_rule=rule).min()) > 3e-3) == forgets, rule
        assert (float(new.sel(turn_rule=rule).max()) < 1e-6) == learns, rule


def test_the_report_has_both_tables_and_the_picture_four_panels(found, reported):
    report = reported("continual", found)
    assert report.count("\n| --- |") == 2
    assert "nan" not in report
    figure = continual.draw(found)
    assert [len(ax.lines) for ax in figure.axes] == [6, 6, 4, 4]
    plt.close(figure)
