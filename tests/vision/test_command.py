"""`lora-flow vision`: what it stores and says, what it refuses, and that being killed changes no bit."""

import contextlib
import dataclasses
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import equinox as eqx
import numpy as np
import pytest
import xarray as xr
import zarr
from lora_flow_vision import figures
from lora_flow_vision.base import base_model, checkpoint
from lora_flow_vision.check import build, starts_of
from lora_flow_vision.command import check
from lora_flow_vision.data import load_dataset, prepare
from lora_flow_vision.export import export
from lora_flow_vision.folder import Unit, stored_settings, units
from lora_flow_vision.hub import Snapshot
from lora_flow_vision.lora import attach
from lora_flow_vision.measures import MEASURES
from lora_flow_vision.peft import import_peft
from lora_flow_vision.results import DIVERGED, DONE, VisionFolder, load_adapters, load_vision, saved_steps
from lora_flow_vision.settings import INITS, OPTIMIZERS, VisionSettings
from lora_flow_vision.weights import load_vit, save_vit
from safetensors.numpy import load_file
from small import SHALLOW, logits, network

from lora_flow import Adapter, InputError
from lora_flow.cli import main
from lora_flow.storage.locks import locked

QUICK = VisionSettings(limit=60, steps=20, seeds=2, rank=(2,), alpha=(0.05, 0.2, 0.8), sgd_rate=0.02)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "vit"
    save_vit(network(SHALLOW), folder)
    return folder


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    """A whole check: its folder, its settings, and what it said."""
    out, settings = tmp_path_factory.mktemp("finished") / "run", dataclasses.replace(QUICK, weights=str(weights))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert check(out, settings, resume=False, overwrite=False) == 0
    return out, settings, said.getvalue()


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures take seconds, and are not what is asked."""
    monkeypatch.setattr("lora_flow_vision.command.tell", lambda out: 0)


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


def stored_bytes(out):
    """Every stored value and adapter byte for byte, through xarray's and safetensors' own readers."""
    dataset = xr.open_zarr(out / "results.zarr").load()
    values = {name: dataset[name].values for name in dataset.variables}
    values = {name: one.tolist() if one.dtype == object else one.tobytes() for name, one in values.items()}
    adapters = {path.name: path.read_bytes() for path in (out / "adapters").iterdir()}
    return values | adapters


def test_a_check_is_a_folder_that_others_can_read(finished):
    out, settings, _ = finished
    assert sorted(path.name for path in out.iterdir()) == [
        "adapters",
        "checkpoints",
        "figures",
        "report.html",
        "report.md",
        "results.zarr",
        "settings.toml",
    ]
    dataset = xr.open_zarr(out / "results.zarr").load()
    assert dataset["train_loss"].dims == ("optimizer", "init", "alpha", "rank", "seed", "step")
    assert dict(dataset.sizes) == {"optimizer": 3, "init": 4, "alpha": 4, "rank": 1, "seed": 2, "step": 3}
    assert (tuple(dataset["optimizer"].values), tuple(dataset["init"].values)) == (OPTIMIZERS, INITS)
    np.testing.assert_array_equal(dataset["alpha"], [1e-3, 0.05, 0.2, 0.8])
    np.testing.assert_array_equal(dataset["step"], [0, 10, 20])
    np.testing.assert_allclose(dataset["time"], [0, 0.2, 0.4])
    assert set(dataset.data_vars) == {*MEASURES, "status"}
    assert np.all(dataset["status"] == DONE)
    assert all(np.all(np.isfinite(dataset[name])) for name in MEASURES)
    assert (dataset.attrs["train_images"], dataset.attrs["test_images"], dataset.attrs["adapted"]) == (60, 60, "head")
    assert dataset.attrs["weights"] == settings.weights
    assert not any((out / "checkpoints").rglob("*"))


def test_a_check_draws_its_figures_and_says_its_verdicts(finished):
    out, _, said = finished
    report = (out / "report.md").read_text()
    for name in ("figure5", "figure6", "figure7", "starts"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 10_000
        assert f"figures/{name}.png" in report
        assert f"{out}/figures/{name}.png" in said
    assert said.startswith("60 training and 60 test images of digits\nLoRA on head; 12 units of 8 runs\n")
    verdicts = re.findall(r"^(\S.*): (undecided)$", said, re.MULTILINE)
    for claim in ("smaller std gives lower train loss: ", "adapters align: ", "spectral gives ", "LoRA-One gives "):
        assert any(line.startswith(claim) for line, _ in verdicts)
    for line, verdict in verdicts:
        assert f"| {verdict} | {line.split(': ')[0]}" in report


def test_every_start_has_the_norm_and_the_loss_that_it_promises(finished):
    """With a head of zeros the loss at B = 0 or A = 0 is log 10; matched starts have norm alpha sqrt(2 16)."""
    out, _, _ = finished
    first = load_vision(out).isel(step=0)
    for init in ("spectral", "lora-one"):
        norms = first["norm_z"].sel(init=init)
        np.testing.assert_allclose(norms / norms["alpha"], np.full(norms.shape, np.sqrt(32)), rtol=1e-6)
    for init in ("gaussian-A", "gaussian-B", "spectral"):
        np.testing.assert_allclose(first["train_loss"].sel(init=init), np.log(10), rtol=1e-6)
        np.testing.assert_allclose(first["norm_update"].sel(init=init), 0.0)
    np.testing.assert_allclose(first["alignment"].sel(init="lora-one"), 0.0, atol=2e-3)  # the root of a single rounding
    flow, adam = (first["train_loss"].sel(optimizer=name) for name in ("flow", "adam"))
    np.testing.assert_allclose(flow, adam, rtol=1e-5)


def test_sgd_with_a_small_rate_tracks_the_flow(finished):
    """To 2% of what the loss has fallen by, and what single precision resolves; Adam goes elsewhere."""
    losses = load_vision(finished[0])["train_loss"]
    fallen = (losses.isel(step=0) - losses.isel(step=-1)).sel(optimizer="flow")
    assert np.all(fallen > 0)
    sgd, adam = (abs(losses.sel(optimizer=name) - losses.sel(optimizer="flow")).max("step") for name in ("sgd", "adam"))
    assert np.all(sgd < 0.03 * fallen + 2e-6)
    assert np.all(adam > 0.03 * fallen + 2e-6)


def test_stored_adapters_have_the_loss_that_is_stored_for_them(finished):
    out, settings, _ = finished
    bench, _ = build(settings, checkpoint(settings).folder)
    last = load_vision(out)["train_loss"].isel(step=-1)
    for optimizer in OPTIMIZERS:
        for init, alpha, seed in (("gaussian-B", 0.8, 1), ("spectral", 1e-3, 0), ("lora-one", 0.2, 1)):
            lane = {"optimizer": optimizer, "init": init, "alpha": alpha, "rank": 2, "seed": seed}
            found = load_adapters(out, **lane)
            assert list(found) == ["head"]
            assert isinstance(found["head"], Adapter)
            np.testing.assert_allclose(bench.task.loss((found["head"],)), last.sel(lane), rtol=1e-5)
    with pytest.raises(InputError, match=r"alpha must be one of 0.001, 0.05, 0.2, 0.8, got 0.3"):
        load_adapters(out, **(lane | {"alpha": 0.3}))


def test_seeds_differ_and_starts_and_optimisers_share_them(finished):
    """The same A at every scale, and for every optimiser."""
    dataset = load_vision(finished[0]).isel(step=0, rank=0)
    norms = dataset["norm_z"].sel(init="gaussian-A")
    assert np.all(norms.isel(seed=0) != norms.isel(seed=1))
    scaled = (norms / norms["alpha"]).transpose("seed", ...).values.reshape(2, -1)
    np.testing.assert_allclose(scaled, np.broadcast_to(scaled[:, :1], scaled.shape), rtol=1e-5)


def test_a_second_check_is_identical_bit_by_bit(finished, copied, undrawn):
    """In the place of another one, as --overwrite asks."""
    out, settings, _ = finished
    zarr.open_array(copied / "results.zarr" / "train_loss")[:] = 0.0
    shutil.rmtree(copied / "adapters")
    assert check(copied, settings, resume=False, overwrite=True) == 0
    assert stored_bytes(copied) == stored_bytes(out)


def lose(out, unit):
    """As if a check had been killed before a unit was stored."""
    (out / "adapters" / f"{unit}.safetensors").unlink()
    status = zarr.open_array(out / "results.zarr" / "status")
    status[1, 2] = -1  # sgd, spectral
    zarr.open_array(out / "results.zarr" / "train_loss")[1, 2] = np.nan


def test_an_unfinished_check_is_named_and_gone_on_with(finished, copied, capsys, monkeypatch):
    lose(copied, "sgd-spectral-rank2-seed-all")
    with pytest.raises(InputError, match=f"must hold a finished check, got 88 of 96 lanes; .*{copied} --resume"):
        load_vision(copied)
    assert main(["plot", str(copied)]) == 2
    assert_one_line(capsys, "must hold a finished check, got 88 of 96 lanes")
    with pytest.raises(InputError, match="must hold sgd-spectral-rank2-seed-all, got an unfinished run"):
        load_adapters(copied, optimizer="sgd", init="spectral", alpha=0.2, rank=2, seed=0)
    monkeypatch.setattr("lora_flow_vision.command.tell", lambda out: 0)
    trained, write = [], VisionFolder.write
    monkeypatch.setattr(
        VisionFolder, "write", lambda self, unit, *what: trained.append(unit) or write(self, unit, *what)
    )
    assert main(["vision", "--out", str(copied), "--resume"]) == 0
    assert [unit.name for unit in trained] == ["sgd-spectral-rank2-seed-all"]
    assert stored_bytes(copied) == stored_bytes(finished[0])


def test_an_interruption_says_how_to_go_on_once_there_is_a_folder(weights, copied, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    lose(copied, "sgd-spectral-rank2-seed-all")
    fresh = ["--limit", "60", "--steps", "20", "--rank", "2", "--weights", str(weights)]
    for step, out, flags, said in (
        (
            "lora_flow_vision.check.run",
            tmp_path / "new",
            fresh,
            "; trained units are stored, continue with: lora-flow vision --out {}",
        ),
        (
            "lora_flow_vision.check.run",
            copied,
            ["--resume"],
            "; trained units are stored, continue with: lora-flow vision --out {}",
        ),
        ("lora_flow_vision.check.build", tmp_path / "none", fresh, ""),
    ):
        monkeypatch.undo()
        monkeypatch.setattr(step, interrupt)
        assert main(["vision", "--out", str(out), *flags]) == 1
        assert capsys.readouterr().err == f"lora-flow: interrupted{said and said.format(out) + ' --resume'}\n"
        assert out.exists() == bool(said)


def test_a_finished_check_is_drawn_again(copied, capsys, monkeypatch):
    """Of the pictures, one."""
    monkeypatch.setattr(figures, "draw", lambda dataset: {"starts": figures.starts(dataset)})
    shutil.rmtree(copied / "figures")
    report = (copied / "report.md").read_text()
    (copied / "report.md").unlink()
    assert main(["plot", str(copied)]) == 0
    assert report.startswith((copied / "report.md").read_text().split("![")[0])
    assert [path.name for path in (copied / "figures").iterdir()] == ["starts.png"]
    assert "smaller std gives lower train loss" in capsys.readouterr().out


LONG = ["--limit", "60", "--steps", "200", "--seeds", "2", "--rank", "2", "--alpha", "0.1", "0.5", "1"]
LONG += ["--optimizer", "adam", "sgd", "--init", "gaussian-A"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_killed_at_a_random_moment_and_resumed_it_ends_with_the_same_bits(weights, tmp_path, undrawn):
    whole, out = tmp_path / "whole", tmp_path / "run"
    flags = ["vision", "--weights", str(weights), *LONG, "--out"]
    script = "import sys; from lora_flow_vision import training; training.SECONDS_BETWEEN = 0; "
    script += "from lora_flow.cli import main; main(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", script, *flags, str(out)], stderr=subprocess.DEVNULL)
    moment = random.Random(2026)
    unit, target = moment.choice(["adam", "sgd"]), moment.randint(2, 12)
    kept = out / "checkpoints" / f"{unit}-gaussian-A-rank2-seed-all"

    def reached():
        found = os.listdir(kept) if kept.is_dir() else []
        return any(name.isdigit() and int(name) >= target for name in found)

    while not reached() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with pytest.raises(InputError, match="must hold a finished check, got"):
        load_vision(out)
    assert main(["vision", "--out", str(out), "--resume"]) == 0
    assert main([*flags, str(whole)]) == 0
    assert stored_bytes(out) == stored_bytes(whole)
    assert not any((out / "checkpoints").rglob("*"))


def test_layers_within_the_network_are_trained_by_minibatches(weights, tmp_path, undrawn):
    """Each of them has adapters, which are stored under its path."""
    settings = dataclasses.replace(
        QUICK,
        weights=str(weights),
        layers="attention/(query|value)",
        optimizer=("sgd", "adam"),
        init=("gaussian-A", "lora-one"),
        alpha=(0.1, 0.3, 1.0),
        seeds=1,
        batch_size=16,
        sgd_rate=0.5,
    )
    assert check(tmp_path / "run", settings, resume=False, overwrite=False) == 0
    dataset = load_vision(tmp_path / "run")
    paths = ["blocks/0/attention/query", "blocks/0/attention/value"]
    assert dataset.attrs["adapted"] == ", ".join(paths)
    losses = dataset["train_loss"].sel(alpha=[0.1, 0.3, 1.0])
    assert np.all(np.isfinite(losses))
    assert np.all(losses.isel(step=-1).mean(["seed", "alpha"]) < losses.isel(step=0).mean(["seed", "alpha"]))
    found = load_adapters(tmp_path / "run", optimizer="adam", init="lora-one", alpha=0.3, rank=2, seed=0)
    assert list(found) == paths
    bench, _ = build(settings, checkpoint(settings).folder)
    stored = dataset["train_loss"].sel(optimizer="adam", init="lora-one", alpha=0.3, rank=2, seed=0, step=20)
    np.testing.assert_allclose(eqx.filter_jit(bench.task.loss)(tuple(found.values())), stored, rtol=1e-4)


def test_the_hub_is_asked_once_a_command_and_for_the_commit_when_resuming(weights, tmp_path, undrawn, monkeypatch):
    asked = []

    def fetch(name, revision):
        asked.append((name, revision))
        return Snapshot(weights, "c0ffee")

    monkeypatch.setattr("lora_flow_vision.base.fetch", fetch)
    settings = dataclasses.replace(QUICK, weights="a/b", revision="main", optimizer=("sgd",), init=("gaussian-A",))
    out = tmp_path / "run"
    assert check(out, settings, resume=False, overwrite=False) == 0
    assert asked == [("a/b", "main")]
    assert check(out, stored_settings(out), resume=True, overwrite=False) == 0
    assert asked == [("a/b", "main"), ("a/b", "c0ffee")]


def test_a_run_that_diverged_is_stored_with_a_status_of_its_own(tmp_path):
    settings = dataclasses.replace(QUICK, optimizer=("sgd",), init=("gaussian-A",))
    (unit,) = units(settings)
    with locked(tmp_path / "run"):
        folder = VisionFolder.create(tmp_path / "run", settings, MEASURES, {})
    seen = {name: np.ones((4, 2, 3)) for name in MEASURES}
    seen["norm_z"] = np.where(np.arange(24).reshape(4, 2, 3) == 23, np.inf, 1.0)
    assert folder.pending() == [unit]
    folder.write(unit, seen, {"head": Adapter(np.ones((4, 2, 2, 5)), np.ones((4, 2, 3, 2)))})
    assert not folder.pending()
    expected = [[DONE, DONE], [DONE, DONE], [DONE, DONE], [DONE, DIVERGED]]
    np.testing.assert_array_equal(load_vision(tmp_path / "run")["status"][0, 0, :, 0], expected)


def test_units_share_out_all_lanes():
    alone = VisionSettings(optimizer=("sgd",), init=("gaussian-A",), rank=(2, 4), seeds=3)
    assert units(alone) == [Unit("sgd", "gaussian-A", rank, (0, 1, 2)) for rank in (2, 4)]
    inside = dataclasses.replace(alone, layers="all")
    assert [unit.seeds for unit in units(inside)] == [(0,), (1,), (2,)] * 2
    names = [unit.name for unit in units(inside)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("steps", "saved"),
    [
        (1, [0, 1]),
        (25, [0, 10, 20, 25]),
        (300, [*range(0, 301, 10)]),
        (450, [*range(0, 301, 10), 400, 450]),
    ],
)
def test_saved_steps_are_tens_to_300_then_hundreds_and_the_last(steps, saved):
    assert saved_steps(steps).tolist() == saved


def assert_one_line(capsys, message):
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert said.startswith("lora-flow: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "minst"], r"data must be 'digits', .*, got 'minst' \(did you mean 'mnist'\?\)"),
        (["--data", "mnist", "--data-dir", "CUT"], "train-images-idx3-ubyte' must hold 816 bytes .*, got 815"),
        (["--data", "mnist", "--data-dir", "NONE"], "data_dir must be a folder that exists, got"),
        (["--weights", "NONE"], r"weights must be shipped, a folder that exists, or a name on the hub, got '.*none'"),
        (["--weights", "EMPTY"], "weights must be a folder with config.json and model.safetensors, got no"),
        (["--weights", "DAMAGED"], "model.safetensors must be a whole safetensors file, got"),
        (["--config", "vit-base"], "patch_size of config vit-base must be 16, got 4 in"),
        (["--config", "vit-huge"], "config must be .*'tiny', 'small', .*, got 'vit-huge'"),
        (["--image-size", "10"], r"image_size must be a multiple of patch_size \(4\), got 10"),
        (["--layers", "all"], "optimizer must be sgd or adam where layers is not 'head', got flow, sgd, adam"),
        (["--layers", "query", "--optimizer", "flow"], "optimizer must be sgd or adam where layers is not 'head'"),
        (["--layers", "conv", "--optimizer", "sgd"], "layers must match a layer, such as .*, got 'conv'"),
        (["--layers", "(", "--optimizer", "sgd"], r"layers must be a regular expression, got '\('"),
        (["--optimizer", "sgdd"], r"optimizer must be 'flow', 'sgd' or 'adam', got 'sgdd' \(did you mean 'sgd'\?\)"),
        (["--init", "gaussian"], "init must be 'gaussian-A', .*, got 'gaussian'"),
        (["--rank", "11"], "rank must lie between 1 and 10 for head, got 11"),
        (["--rank", "2", "2"], r"rank must name each value once, got \(2, 2\)"),
        (["--alpha", "0.1", "-1"], r"alpha must be positive and finite, got \(0\.1, -1\.0\)"),
        (["--aligned-at", "0.05"], "aligned_at must be positive and below alpha, got 0.05"),
        (["--batch-size", "61", "--optimizer", "sgd"], "batch_size must be at most 60, the training images, got 61"),
        (
            ["--seeds", "100000000000000000000"],
            "seeds and steps must be small enough for the .* of memory .*, which takes",
        ),
        (
            ["--steps", "1000000000000"],
            "seeds and steps must be small enough for the .* of memory",
        ),
        (
            ["--batch-size", "60", "--steps", "500000000", "--optimizer", "sgd"],
            "must be small enough for the .* of memory that are free, got .*, which takes",
        ),
        (["--image-size", "4000000"], "must be small enough for the .* of memory that are free, got .*, which takes"),
        (["--alpha", "1e-300", "--aligned-at", "1e-301"], "alpha must lie between 1e-15 and 1e\\+15, where single"),
        (["--alpha", "1", "1e300"], "alpha must lie between 1e-15 and 1e\\+15, where single precision has room"),
        (["--revision", "main"], "revision must be left out unless weights is a name on the hub, got 'main'"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--sgd-rate", "nan"], "sgd_rate must be positive and finite, got nan"),
        (["--precision", "double"], "precision must be 'single' or 'bfloat16', got 'double'"),
        (["--resume", "--overwrite"], "resume and overwrite must not be given together"),
        (["--resume"], "the run folder must exist, got"),
        (["--alpa", "1"], "alpa"),
    ],
)
def test_bad_input_gets_one_line_and_status_2_and_writes_nothing(weights, flags, message, tmp_path, capsys):
    places = {"NONE": tmp_path / "none", "EMPTY": tmp_path / "empty", "CUT": tmp_path / "cut"}
    places |= {"DAMAGED": tmp_path / "damaged"}
    write_cut_idx(places["CUT"])
    places["EMPTY"].mkdir()
    shutil.copytree(weights, places["DAMAGED"])
    os.truncate(places["DAMAGED"] / "model.safetensors", 1000)
    before = sorted(tmp_path.rglob("*"))
    common = [] if "--weights" in flags else ["--weights", str(weights)]
    given = [str(places.get(flag, flag)) for flag in flags]
    assert main(["vision", "--out", str(tmp_path / "out"), "--limit", "60", *common, *given]) == 2
    assert_one_line(capsys, message)
    assert sorted(tmp_path.rglob("*")) == before


def write_cut_idx(folder):
    """MNIST's four files with 50 and 8 images of 4 x 4; the first lacks its last byte."""
    folder.mkdir()
    for part, count in (("train", 50), ("t10k", 8)):
        images = bytes([0, 0, 8, 3, 0, 0, 0, count, 0, 0, 0, 4, 0, 0, 0, 4]) + bytes(16 * count)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images[: -1 if part == "train" else None])
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, count]) + bytes(count))


def test_refuses_to_replace_or_to_go_on_with_what_it_was_not_told_to(copied, tmp_path, capsys):
    before = stored_bytes(copied)
    for flags, message in (
        ([], r"out must be new \(--overwrite replaces it, --resume continues it\), got the check"),
        (
            ["--resume", "--alpha", "0.3"],
            r"alpha must be \(0\.05, 0\.2, 0\.8\), as '.*' was started, to resume it, got",
        ),
        (["--resume", "--seeds", "3"], "seeds must be 2, as '.*' was started, to resume it, got 3"),
        (["--overwrite", "--steps", "0"], "steps must be at least 1, got 0"),
        (["--overwrite", "--weights", str(tmp_path / "none")], "weights must be shipped, a folder"),
    ):
        assert main(["vision", "--out", str(copied), *flags]) == 2
        assert_one_line(capsys, message)
        assert stored_bytes(copied) == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    (tmp_path / "thesis" / "settings.toml").write_text("x = 1")
    for place, flags, message in (
        ("thesis", [], "out must be a new folder or one of an image check, got"),
        ("thesis", ["--overwrite"], "out must be a new folder or one of an image check, got"),
        ("thesis", ["--resume"], "must be the folder of an image check, got one of another run"),
        ("thesis/thesis.tex", ["--overwrite"], "out must be a folder, got the file"),
    ):
        assert main(["vision", "--out", str(tmp_path / place), *flags]) == 2
        assert_one_line(capsys, message)
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years of work"
    assert main(["sweep", "--out", str(copied), "--overwrite"]) == 2
    assert_one_line(capsys, "out must be a new folder or a run folder")
    assert stored_bytes(copied) == before


def test_refuses_to_go_on_with_other_weights_under_the_same_name(weights, copied, capsys):
    lose(copied, "sgd-spectral-rank2-seed-all")
    kept = shutil.copytree(weights, weights.parent / "kept")
    try:
        save_vit(network(SHALLOW, seed=9), weights)
        assert main(["vision", "--out", str(copied), "--resume"]) == 2
        assert_one_line(capsys, "as '.*' was started, to resume it, got")
    finally:
        shutil.rmtree(weights)
        kept.rename(weights)
    assert sum(len(load_file(path)) for path in (copied / "adapters").iterdir()) == 11 * 2


@pytest.mark.parametrize(("layers", "inits"), [("attention/(query|value)", INITS), ("all", ("spectral", "lora-one"))])
def test_behind_a_new_head_every_layer_has_a_gradient_to_start_from(weights, layers, inits):
    settings = VisionSettings(
        weights=str(weights), limit=30, layers=layers, optimizer=("sgd",), rank=(2,), alpha=(0.1,)
    )
    bench, attrs = build(settings, checkpoint(settings).folder)
    assert min(attrs["gradient_norms"]) > 0
    for init in inits:
        for adapter in starts_of(bench, settings, Unit("sgd", init, 2, (0, 1))):
            assert np.all(np.isfinite(adapter.a))
            assert np.all(np.isfinite(adapter.b))
            assert np.any(adapter.a) or np.any(adapter.b)


def test_what_is_exported_classifies_as_the_lane_did(finished, tmp_path):
    """The frozen model that was trained, not the checkpoint that it came from: its head is another one."""
    out, settings, _ = finished
    lane = {"optimizer": "adam", "init": "gaussian-A", "alpha": 0.2, "rank": 2, "seed": 1}
    base, adapters = export(out, tmp_path / "torch", **lane)
    model = load_vit(base).model
    attach(model, *import_peft(adapters))
    bench, _ = build(settings, checkpoint(settings).folder)
    images = prepare(load_dataset("digits").test.images[:60], 8, model.config.channels, 0.5, 0.5)
    expected = load_vision(out).sel(lane).isel(step=-1)
    accuracy = np.mean(np.asarray(logits(model, images)).argmax(-1) == np.asarray(bench.test[1]))
    assert accuracy == pytest.approx(float(expected["test_accuracy"]), abs=1e-6)
    assert not np.any(base_model(settings, checkpoint(settings).folder, 10).model.head.kernel[...])
    with pytest.raises(InputError, match="folder must be new, got"):
        export(out, tmp_path / "torch", **lane)
