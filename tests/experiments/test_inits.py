"""All the initialisations side by side, and what is refused of them in one line."""

import dataclasses

import numpy as np
import pytest

from lora_flow import load_run
from lora_flow.cli import main
from lora_flow.experiments.inits import EXPERIMENT, INITS, times_to
from lora_flow.experiments.table import EXPERIMENTS
from lora_flow.initialization import INITIALIZATIONS


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--problem", "regression", "--delta-w", "0.5"], "delta_w must be left out with problem 'regression'"),
        (["--kappa", "3"], "kappa must be left out with problem 'aligned'"),
        (["--problem", "regression", "--noise", "0.1"], "noise must be left out with problem 'regression'"),
        (["--init", "pissa", "--problem", "digits", "--rank", "65"], "rank must lie between 1 and 10"),
        (["--init", "eva"], "problem must feed every layer with inputs that have principal directions, for eva"),
        (["--init", "orthogonal", "--rank", "3"], "rank must be even for orthogonal, got 3"),
        (["--flow", "scaled"], "damping must be positive where a factor's rank is below 4"),
        (["--flow", "lora-plus"], "flow must come with a number after a colon for 'lora-plus'"),
        (["--flow", "scaled:1e-3", "--solver", "RKC"], "solver must be of another kind than RKC"),
    ],
)
def test_what_is_not_defined_is_refused_in_one_line(flags, message, tmp_path, capsys):
    assert main(["sweep", "--out", str(tmp_path / "run"), *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_initialisations_are_listed(capsys):
    assert main(["inits"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [*INITIALIZATIONS, "learned:FOLDER:"]
    of_lora = {name for name, scheme in INITIALIZATIONS.items() if not scheme.network}
    assert set(INITS.init) == of_lora, "and all that are meant for LoRA are compared"


def test_all_initialisations_are_compared_in_one_picture_and_table(tmp_path, monkeypatch):
    small = dataclasses.replace(INITS, m=12, n=14, t1=30.0, saves=61, solver="Tsit5", batch_size=1)
    monkeypatch.setitem(EXPERIMENTS, "inits", dataclasses.replace(EXPERIMENT, parts={"": small}))
    assert main(["figure", "inits", "--seeds", "2", "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/figures/figure-inits.png").exists()
    report = (tmp_path / "run/report.md").read_text()
    assert all(f"| {alpha:g} | {init} |" in report for alpha in INITS.alpha for init in INITS.init)
    assert "directions are dead" in report
    assert "no loss below" in report
    dataset = load_run(tmp_path / "run").squeeze("rank")
    final, floor = dataset["loss"].isel(time=-1), dataset["loss_floor"]
    assert np.all(final.values >= floor.values * (1 - 1e-9)), "no run is below what is possible"
    spans = times_to(dataset)
    reached = np.isfinite(spans["0.0001"])
    assert bool((spans["0.1"].where(reached) <= spans["0.0001"].where(reached)).where(reached, True).all())
    assert set(dataset["init"].values[(floor > 1e-12).any(["angle", "alpha", "seed"])]) == {
        *("pissa", "milora", "olora", "loram", "lora-ga")
    }, "only weights that are offset have a floor at a rank that suffices"
