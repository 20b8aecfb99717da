"""Run folders that earlier versions made are read and drawn."""

import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from lora_flow import InputError, aligned_problem, load_run, sweep
from lora_flow.cli import main
from lora_flow.sweeps.folder import SWEEP

REFERENCE = Path(__file__).parents[1] / "reference"
SAFELY = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # before Python 3.11.4 there is no such filter


@pytest.fixture(params=["run-without-checksums", "run-with-checksums"])
def old(request, tmp_path):
    """A sweep of 16 runs, by the last version whose run folders had no checksums, and by one of the first that had."""
    with tarfile.open(REFERENCE / f"{request.param}.tar.gz") as archive:
        (name,) = {member.name.split("/")[0] for member in archive}
        archive.extractall(tmp_path, **SAFELY)
    return tmp_path / name


@pytest.fixture(scope="module")
def today():
    problem = aligned_problem(jax.random.key(0), m=3, n=4, h=5)
    return sweep(problem, init=("gaussian", "spectral"), alpha=(1e-2, 1e-3), rank=(1, 2), seeds=2, t1=3.0, saves=6)


def test_an_old_run_is_read_and_its_losses_are_those_of_today(old, today):
    stored = load_run(old)
    assert stored["loss"].dims == today["loss"].dims
    assert stored["loss"].shape == today["loss"].shape
    assert not stored["status"].any()
    difference = np.log10(today["loss"]) - np.log10(stored["loss"])
    assert np.abs(difference.where(stored["loss"] > 1e-24)).max() < 0.05


def test_an_old_run_is_drawn(old, capsys):
    assert main(["plot", str(old)]) == 0
    assert "figures/sweep-r1.png" in capsys.readouterr().out


@pytest.mark.parametrize("old", ["run-without-checksums"], indirect=True)
def test_an_old_run_without_checksums_is_not_resumed(old, capsys):
    """Nothing shows which of its numbers are whole, and one line says so."""
    assert main(["sweep", "--out", str(old), "--resume"]) == 2
    assert "must be a run of this version" in capsys.readouterr().err


def test_an_old_run_is_known_as_a_run_and_is_not_replaced_unasked(old):
    with pytest.raises(
        InputError, match=r"out must be new \(--overwrite replaces it, --resume continues it\), got the run"
    ):
        SWEEP.check_free(old, overwrite=False)
    SWEEP.check_free(old, overwrite=True)
