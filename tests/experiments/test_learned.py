"""Figures learned and elasticities: starts are compared at one norm, and phases last as theory has it."""

import numpy as np
import pytest

from lora_flow.experiments import learned, phase_elasticities

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def test_learned_starts_and_others_are_compared_on_tasks_of_every_kind(monkeypatch):
    for name, value in {"STEPS": 3, "RULE_STEPS": 3, "UNSEEN": 2, "TRAINED": (100,)}.items():
        monkeypatch.setattr(learned, name, value)
    dataset = learned.run(2, list)
    assert dict(dataset["unseen"].sizes) == {"kind": 4, "task": 2, "start": 6, "seed": 2}
    known = np.isfinite(dataset["unseen"])
    assert known.sel(start=[*learned.INITS, learned.RULE]).all()
    assert known.sel(start=learned.ENTRIES, kind="aligned").all()
    one = dataset["unseen"].sel(kind="aligned").mean(["task", "seed"])
    assert float(one.sel(start="lora-one")) < float(one.sel(start="spectral")) < float(one.sel(start="gaussian"))
    told = learned.notes(dataset)
    assert "| misaligned |" in told
    assert learned.draw(dataset).axes[1].get_ylabel() == "degrees"


def test_alignment_does_not_depend_on_alpha_and_growth_does():
    """Small adapters grow at rates without alpha in them, and their growth takes log(1/alpha) of the time."""
    dataset = phase_elasticities.run(2, list)
    middle = dataset["elasticity"].median("seed")
    assert abs(float(middle.sel(phase="alignment", setting="alpha"))) < 0.02
    assert float(middle.sel(phase="growth", setting="alpha")) < -0.02
    np.testing.assert_allclose(middle.sel(setting="scaling"), middle.sel(setting="alpha") / 2 - 1, rtol=1e-12)
    assert "| growth |" in phase_elasticities.notes(dataset)
