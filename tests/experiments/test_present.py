"""One way from results to pictures and a report: a sweep's folder, and that of an experiment that runs as a whole."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
import zarr
from many_lanes import opened, results, with_gaps

from lora_flow import InputError, phases, time_to
from lora_flow.cli import main
from lora_flow.experiments.base import Experiment
from lora_flow.experiments.folder import store_study
from lora_flow.experiments.present import present
from lora_flow.experiments.table import EXPERIMENTS
from lora_flow.figures.shown import shown
from lora_flow.figures.style import band, panels
from lora_flow.settings import Settings
from lora_flow.storage import blocks
from lora_flow.storage.locks import locked

RUN = Settings(m=4, n=5, h=6, alpha=(1e-2,), rank=(2,), seeds=2, t1=0.5, saves=5, solver="Tsit5")
VALUES = xr.Dataset({"x": (("seed", "step"), [[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]])}, coords={"step": [0, 1]})


def draw(dataset):
    with panels(1, 1, height=2.0) as (figure, axes):
        band(dataset["x"] if "x" in dataset else dataset["loss"].isel(init=0, alpha=0, rank=0), axes[0, 0])
    return figure


def of_function(values=VALUES):
    return Experiment.of_one("what x is", lambda seeds, progress: values, draw, lambda dataset: "x is told", seeds=3)


def test_an_experiment_that_runs_as_a_whole_is_drawn_and_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(EXPERIMENTS, "mine", of_function())
    out = tmp_path / "mine"
    assert main(["figure", "mine", "--out", str(out)]) == 0
    picture = out / "figures" / "figure-mine.png"
    said = capsys.readouterr().out.splitlines()[-4:]
    paths = [f"report: {out / 'report.md'}", f"page: {out / 'report.html'}"]
    assert said == ["x is told", f"picture: {picture}", *paths]
    assert '<img alt="figures/figure-mine.png" src="data:image/png;base64,' in (out / "report.html").read_text()
    assert (out / "report.md").read_text() == "# What x is\n\nx is told\n\n![](figures/figure-mine.png)\n"
    assert json.loads(picture.with_suffix(".json").read_text())[0]["lines"] == [[3.0, 4.0]]
    assert (out / "settings.toml").read_text() == 'study = "mine"\nseeds = 3\n'
    with xr.open_zarr(out / "results.zarr", mask_and_scale=False) as stored:
        np.testing.assert_array_equal(stored["x"], VALUES["x"])


def test_a_sweep_of_an_experiment_is_drawn_with_its_notes_and_its_part_alone_without(tmp_path, monkeypatch):
    one = Experiment("a run", {"a": RUN}, lambda datasets: {"-x": draw(datasets["a"])}, lambda datasets: "told of it")
    monkeypatch.setitem(EXPERIMENTS, "mine", one)
    out = tmp_path / "mine"
    assert main(["figure", "mine", "--out", str(out)]) == 0
    done = present(out)
    assert done.lines[0] == "told of it"
    assert (done.failed, done.lanes) == ({}, 2)
    assert sorted(path.name for path in (out / "figures").iterdir()) == ["figure-mine-x.json", "figure-mine-x.png"]
    assert "\n\ntold of it\n\n# a\n\n" in (out / "report.md").read_text()
    alone = present(out / "a")
    assert (out / "a" / "figures" / "sweep.png").is_file()
    assert "told of it" not in alone.lines
    monkeypatch.setitem(EXPERIMENTS, "mine", dataclasses.replace(one, parts={"a": RUN, "b": RUN}))
    with pytest.raises(InputError, match="must hold all the runs of figure mine, got none of b; --resume goes on"):
        present(out)
    monkeypatch.delitem(EXPERIMENTS, "mine")
    with pytest.raises(InputError, match=r"the figure in '.*' must be '1', .* got 'mine'"):
        present(out)


def test_a_folder_of_an_unknown_experiment_is_refused(tmp_path):
    with locked(tmp_path / "old"):
        store_study(tmp_path / "old", "phase", 3, VALUES)
    with pytest.raises(InputError, match=r"the study in '.*' must be 'pretraining', .* got 'phase'"):
        present(tmp_path / "old")


def test_a_function_that_gives_other_numbers_draws_another_picture(tmp_path, monkeypatch):
    for factor in (1, 2):
        monkeypatch.setitem(EXPERIMENTS, "mine", of_function(factor * VALUES))
        assert main(["figure", "mine", "--out", str(tmp_path / "mine"), "--overwrite"]) == 0
        shown = json.loads((tmp_path / "mine/figures/figure-mine.json").read_text())
        np.testing.assert_allclose(shown[0]["lines"], [[3.0 * factor, 4.0 * factor]])


@pytest.fixture
def presented(tmp_path, monkeypatch):
    """The files, the lines and the numbers of the pictures of a dataset."""

    def run(dataset):
        numbers = {}

        def save(pictures, folder, title=""):
            numbers.update({name: shown(figure) for name, figure in pictures.items()})
            for figure in pictures.values():
                plt.close(figure)
            return []

        monkeypatch.setattr("lora_flow.figures.over_time.save", save)
        monkeypatch.setattr("lora_flow.experiments.present.load_figure", lambda out, partial: ("", {"": dataset}))
        done = present(tmp_path, partial=True)
        return numbers, done, {path.name: path.read_text() for path in tmp_path.iterdir()}

    return run


def test_what_is_read_in_blocks_is_presented_as_what_is_in_memory(presented, monkeypatch):
    """Four lanes at once of six in a cell. There are two problems and two sides; some lanes have failed or not run."""
    dataset, readings = with_gaps(results(seeds=6, saves=11, inits=("gaussian",), alphas=(1e-1,))), []
    expected = presented(dataset)
    assert len(expected[0]) == 4
    at_once = 4 * 5 * 88  # bytes: phases are read off five curves of 11 saves
    monkeypatch.setattr(blocks, "AT_ONCE", at_once)
    assert presented(opened(dataset, readings)) == expected
    xr.testing.assert_identical(phases(opened(dataset, [])), phases(dataset))
    assert max(readings) <= at_once < dataset["loss"].nbytes, "nothing over time is read as a whole"


def test_the_time_to_a_level_of_what_is_read_in_blocks(monkeypatch):
    loss = results(seeds=7, saves=11)["loss"]
    level = xr.DataArray([1e-1, 1e-6], dims="level", coords={"level": [1e-1, 1e-6]})
    expected = [time_to(loss, one) for one in (1e-3, level, loss.isel(time=0, seed=0, drop=True) / 10)]
    assert expected[1].dims == (*loss.dims[:-1], "level")
    monkeypatch.setattr(blocks, "AT_ONCE", 1000)
    stored = opened(loss.to_dataset(), [])["loss"]
    for one, times in zip((1e-3, level, loss.isel(time=0, seed=0, drop=True) / 10), expected, strict=True):
        xr.testing.assert_identical(time_to(stored, one), times)


def write(path, lanes, chunk=1024):
    """A run of so many lanes, those of a few seeds again and again, in chunks as a run folder has them."""
    few = results(seeds=64, saves=101, delta_w=(0.5,), inits=("gaussian",), sides=("B",), alphas=(1e-1, 1e-2, 1e-3))
    few = few.isel(delta_w=0, side=0).assign_attrs(side="B")
    seeds = -(-lanes // 3)
    few[list(few.coords)].isel(seed=0).drop_vars("seed").assign_coords(seed=range(seeds)).to_zarr(
        path, zarr_format=2, consolidated=False
    )
    group = zarr.open_group(path, mode="r+", zarr_format=2)
    for name, one in few.data_vars.items():
        shape = tuple(seeds if dim == "seed" else size for dim, size in one.sizes.items())
        chunks = tuple({"alpha": 1, "seed": min(chunk, seeds)}.get(dim, size) for dim, size in one.sizes.items())
        attributes = {**one.attrs, "_ARRAY_DIMENSIONS": list(one.dims)}
        array = group.create_array(name, shape=shape, chunks=chunks, dtype=one.dtype, attributes=attributes)
        block = one.values[:, :, :, np.arange(chunk) % 64]
        for first in range(0, seeds, chunk):
            part = slice(first, min(first + chunk, seeds))
            array[:, :, :, part] = block[:, :, :, : part.stop - part.start]


PEAK = """
import sys
import matplotlib
import xarray as xr
matplotlib.use("Agg")
from lora_flow.experiments import present
how = {"engine": "zarr", "chunks": None, "cache": False, "mask_and_scale": False, "consolidated": False}
dataset = xr.open_dataset(sys.argv[1], **how)
present.load_figure = lambda out, partial: ("", {"": dataset})
present.present(sys.argv[2])
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1000)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of the memory is read there")
def test_the_memory_to_present_a_run_does_not_grow_with_its_lanes(tmp_path):
    """In MB. One variable of 100,000 lanes has 81, and the run 1200."""
    peaks = {}
    for lanes in (1000, 100_000):
        write(tmp_path / f"{lanes}.zarr", lanes)
        asked = [sys.executable, "-c", PEAK, str(tmp_path / f"{lanes}.zarr"), str(tmp_path / f"{lanes}")]
        peaks[lanes] = float(subprocess.run(asked, check=True, capture_output=True, text=True).stdout)
    assert peaks[100_000] < peaks[1000] + 100
