"""One adapted layer: how it is drawn, the figures made of it, and what LoRA-One publishes of its toy experiments."""

import dataclasses

import jax
import numpy as np
import pytest
import xarray as xr

from lora_flow import InputError, Regression, SingleLayer, load_run, regression_problem
from lora_flow.cli import main
from lora_flow.cli.figure import Figure
from lora_flow.experiments import lora_one as toys
from lora_flow.experiments import scaling
from lora_flow.experiments.comparison import INITS, KAPPA, KAPPA_RUNS, rates, times_to
from lora_flow.experiments.folder import load_study
from lora_flow.experiments.studies import STUDIES
from lora_flow.experiments.table import EXPERIMENTS
from lora_flow.initialization import INITIALIZATIONS

KEY = jax.random.key(0)


@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0])
def test_the_shift_has_the_singular_values_and_the_angle_asked_for(angle):
    problem = regression_problem(KEY, m=12, n=9, target_rank=3, kappa=100.0, angle=angle)
    u, sigma, vt = np.linalg.svd(problem.shift)
    np.testing.assert_allclose(sigma[:4], [1.0, 0.1, 0.01, 0.0], atol=1e-14)
    left, _, right = np.linalg.svd(problem.weight)
    for mine, theirs in ((u[:, :3], left[:, :3]), (vt[:3].T, right[:3].T)):
        cosines = np.linalg.svd(mine.T @ theirs, compute_uv=False)
        np.testing.assert_allclose(cosines, np.cos(np.deg2rad(angle)), atol=1e-12)


def test_inputs_have_the_covariance_asked_for_or_a_sample_of_it():
    infinite = regression_problem(KEY, m=5, n=6, input_kappa=10.0)
    covariance = np.asarray(infinite.features).T @ infinite.features
    right = np.linalg.svd(infinite.weight)[2]
    np.testing.assert_allclose(right @ covariance @ right.T, np.diag(np.geomspace(1, 0.1, 6)), atol=1e-14)
    sampled = regression_problem(KEY, m=5, n=6, input_kappa=10.0, samples=200_000)
    np.testing.assert_allclose(np.asarray(sampled.features).T @ sampled.features, covariance, atol=0.02)
    assert type(regression_problem(KEY)) is SingleLayer
    assert type(regression_problem(KEY, samples=30, activation="relu")) is Regression


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kappa": 0.5}, "kappa must be at least 1, got 0.5"),
        ({"angle": 91.0}, "angle must lie between 0 and 90 degrees, got 91.0"),
        ({"target_rank": 6, "angle": 5.0}, "target_rank must be at most 5, half the smallest dimension"),
        ({"samples": -1}, "samples must be at least 0"),
        ({"activation": "relu"}, "samples must be at least 1 with activation relu, got 0"),
        ({"activation": "tanh"}, "activation must be 'linear' or 'relu', got 'tanh'"),
    ],
)
def test_a_bad_draw_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        regression_problem(KEY, **arguments)


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
    assert [line.split()[0] for line in listed] == list(INITIALIZATIONS)
    of_lora = {name for name, scheme in INITIALIZATIONS.items() if not scheme.network}
    assert set(INITS.init) == of_lora, "and all that are meant for LoRA are compared"


def test_all_initialisations_are_compared_in_one_picture_and_table(tmp_path, monkeypatch):
    small = dataclasses.replace(INITS, m=12, n=14, t1=30.0, saves=61)
    monkeypatch.setitem(EXPERIMENTS, "inits", dataclasses.replace(EXPERIMENTS["inits"], runs={"": small}))
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


@pytest.mark.long
def test_the_preconditioned_rate_does_not_depend_on_the_condition_number(tmp_path, monkeypatch):
    short = {
        name: dataclasses.replace(run, kappa=(1.0, 30.0), t1=min(run.t1, 300.0)) for name, run in KAPPA_RUNS.items()
    }
    monkeypatch.setitem(EXPERIMENTS, "kappa", dataclasses.replace(EXPERIMENTS["kappa"], runs=short))
    monkeypatch.setattr("lora_flow.experiments.comparison.KAPPAS", (1.0, 30.0))
    assert main(["figure", "kappa", "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/figures/figure-kappa.png").exists()
    scaled, plain = (rates(load_run(tmp_path / "run" / name)).squeeze() for name in ("scaled", "plain"))
    np.testing.assert_allclose(scaled.sel(init="lora-one-theory"), 2.0, rtol=0.02)
    np.testing.assert_allclose(scaled.sel(init="gora"), 1.0, rtol=0.02)
    np.testing.assert_allclose(plain.sel(init="lora-one-theory"), [2.0, 2 / 30], rtol=0.02)
    assert KAPPA.kappa[-1] == 1000.0


def test_a_study_is_stored_drawn_again_and_never_replaced_unasked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toys, "ALIGNMENT_STEPS", 320)
    monkeypatch.setattr(toys, "SAMPLES", 400)
    out = str(tmp_path / "toy")
    assert main(["figure", "lora-one", "--seeds", "1", "--out", out]) == 0
    report = (tmp_path / "toy/report.md").read_text()
    picture = tmp_path / "toy/figures/figure-lora-one.png"
    picture.unlink()
    assert main(["plot", out]) == 0
    assert picture.exists()
    assert (tmp_path / "toy/report.md").read_text() == report
    assert load_study(out).sizes["iteration"] == 17
    capsys.readouterr()
    assert main(["figure", "lora-one", "--seeds", "1", "--out", out]) == 2
    assert "out must be new (--overwrite replaces it)" in capsys.readouterr().err
    assert main(["figure", "lora-one", "--out", out, "--resume"]) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("")
    assert main(["figure", "scaling", "--out", str(tmp_path / "other"), "--overwrite"]) == 2
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]


@pytest.mark.long
def test_the_angles_of_lora_ones_toy_are_the_published_ones(monkeypatch):
    """Published for alpha^2 = 1e-3, 1e-4: a dip to .2 and .16 near step 300, and a rise to .265 at the end.

    Reproduced from the authors' notebook, by others, for one draw: .214 and .156, .271. Medians over six draws here: a
    rare draw has an A that hardly overlaps with one of the directions, and is late.
    """
    monkeypatch.setattr(toys, "VARIANCES", (1e-3, 1e-4))
    angle = toys.alignment(6, lambda items: items)["angle"].median("seed").sel(inputs="sampled")
    np.testing.assert_allclose(angle.isel(iteration=-1), 0.271, atol=0.03)
    np.testing.assert_allclose(angle.sel(iteration=toys.DIP), [0.214, 0.156], atol=0.03)
    assert np.all(abs(angle["iteration"][angle.argmin("iteration")] - toys.DIP) <= 60)


@pytest.mark.long
def test_the_preconditioned_risk_falls_where_the_rank_lets_it():
    """Published: from ln risk -2.9 for LoRA-One's start, and stuck near -3 for LoRA-GA's."""
    risk = toys.preconditioning(2, lambda items: items)
    logs = np.log(risk["risk"].mean("seed")).sel(flow="scaled")
    one, approximation = logs.sel(inputs="sampled", init="lora-one-theory"), logs.sel(inputs="sampled", init="lora-ga")
    assert float(one[0]) == pytest.approx(-2.9, abs=0.15)
    assert float(one[-1]) < -60
    assert float(approximation[-1]) == pytest.approx(-3.05, abs=0.15)
    assert float(logs.sel(inputs="white", init="lora-ga")[-1]) < -60, "the obstruction is one of sampling"
    floor = risk["floor"].sel(inputs="sampled", init="lora-ga")
    assert bool((risk["risk"].sel(inputs="sampled", init="lora-ga").isel(iteration=-1) >= floor - 1e-9).all())


def test_the_best_lora_alpha_is_found_between_the_grid_points():
    """On losses that are a parabola in log2(lora_alpha) about 3 + p log2(r), at every rank."""
    exponent = 0.5
    grid, ranks = np.log2(scaling.LORA_ALPHAS)[None], np.log2(scaling.RANKS)[:, None]
    loss = np.exp((grid - 3.1 - exponent * ranks) ** 2)
    found = scaling.best(
        xr.Dataset(
            {"loss": (("seed", "rank", "lora_alpha"), loss[None])},
            coords={"rank": list(scaling.RANKS), "lora_alpha": scaling.LORA_ALPHAS},
        )
    )
    np.testing.assert_allclose(np.log2(found["lora_alpha"][0]), 3.1 + exponent * ranks[:, 0], atol=1e-9)
    assert float(found["exponent"][0]) == pytest.approx(exponent)


def test_every_figure_is_in_the_help_of_the_command():
    assert all(name in Figure.__doc__ for name in (*EXPERIMENTS, *STUDIES))
