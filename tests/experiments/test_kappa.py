"""Rates against the condition number of the task."""

import dataclasses

import numpy as np
import pytest

from lora_flow import load_run
from lora_flow.cli import main
from lora_flow.experiments.kappa import EXPERIMENT, KAPPA, KAPPA_RUNS, rates
from lora_flow.experiments.table import EXPERIMENTS


@pytest.mark.long
def test_the_preconditioned_rate_does_not_depend_on_the_condition_number(tmp_path, monkeypatch):
    short = {
        name: dataclasses.replace(run, kappa=(1.0, 30.0), t1=min(run.t1, 300.0)) for name, run in KAPPA_RUNS.items()
    }
    monkeypatch.setitem(EXPERIMENTS, "kappa", dataclasses.replace(EXPERIMENT, parts=short))
    monkeypatch.setattr("lora_flow.experiments.kappa.KAPPAS", (1.0, 30.0))
    assert main(["figure", "kappa", "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/figures/figure-kappa.png").exists()
    scaled, plain = (rates(load_run(tmp_path / "run" / name)).squeeze() for name in ("scaled", "plain"))
    np.testing.assert_allclose(scaled.sel(init="lora-one-theory"), 2.0, rtol=0.02)
    np.testing.assert_allclose(scaled.sel(init="gora"), 1.0, rtol=0.02)
    np.testing.assert_allclose(plain.sel(init="lora-one-theory"), [2.0, 2 / 30], rtol=0.02)
    assert KAPPA.kappa[-1] == 1000.0
