"""The folder of an image check: whole or not at all, one writer, and no number in it that was not written."""

import contextlib
import json
import pathlib
import shutil
import zlib

import numpy as np
import pytest
import tensorstore
import tomli_w
import xarray as xr
from lora_flow_vision.command import check
from lora_flow_vision.folder import units
from lora_flow_vision.measures import MEASURES
from lora_flow_vision.results import VisionFolder, load_adapters, load_vision, saved_steps
from lora_flow_vision.settings import VisionSettings

from lora_flow import Adapter, InputError
from lora_flow.cli import main
from lora_flow.storage.locks import locked
from lora_flow.storage.swap import is_generated

SETTINGS = VisionSettings(
    optimizer=("sgd",), init=("gaussian-A", "spectral"), rank=(2,), alpha=(0.1,), seeds=2, steps=20
)
ATTRS = {
    "data_name": "digits",
    "train_images": 60,
    "adapted": ["blocks/0/mlp/up", "head"],
    "gradient_norms": [0.1, 0.2],
}


def begin(path, settings=SETTINGS):
    with locked(path):
        return VisionFolder.create(path, settings, MEASURES, ATTRS)


def go_on(path, settings=SETTINGS):
    with locked(path):
        return VisionFolder(path, settings, MEASURES, ATTRS)


def fill(folder):
    """Trains nothing: what a unit ends with follows from its name."""
    done, saves = folder.pending(), len(saved_steps(folder.settings.steps))
    for unit in done:
        rng, lanes = np.random.default_rng(zlib.crc32(unit.name.encode())), (2, len(unit.seeds))
        seen = {name: rng.standard_normal((*lanes, saves)) for name in MEASURES}
        seen["norm_z"][...] = 0.0  # a chunk of zeros
        factors = rng.standard_normal((*lanes, 2, 5)), rng.standard_normal((*lanes, 3, 2))
        folder.write(unit, seen, {"head": Adapter(*(one.astype(np.float32) for one in factors))})
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run"
    assert len(fill(begin(path))) == 2
    (path / "report.md").write_text("what holds")
    (path / "figures").mkdir()
    (path / "figures" / "starts.png").write_bytes(b"drawn")
    (path / "checkpoints" / "sgd-spectral-rank2-seed-all").mkdir(parents=True)
    return path


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def contents(path):
    """Every entry with its bytes, but for what is to be removed when the folder is locked next."""
    entries = [(one.relative_to(path), one) for one in path.rglob("*")]
    return {str(name): one.is_file() and one.read_bytes() for name, one in entries if not is_generated(name.parts[0])}


def numbers(path):
    dataset = load_vision(path)
    adapters = [load_adapters(path, optimizer="sgd", init=init, alpha=0.1, rank=2, seed=1) for init in SETTINGS.init]
    return {name: dataset[name].values.tobytes() for name in dataset.variables} | {"adapters": repr(adapters)}


def test_every_chunk_is_written_and_another_reader_finds_the_same(finished):
    """Of zeros too, and no fill value is null: tensorstore's zarr driver shares no code with zarr."""
    dataset = load_vision(finished)
    for name in dataset.variables:
        told = json.loads((finished / "results.zarr" / name / ".zarray").read_text())
        chunks = np.prod([-(-size // chunk) for size, chunk in zip(told["shape"], told["chunks"], strict=True)])
        assert len([one for one in (finished / "results.zarr" / name).iterdir() if one.name[0] != "."]) == chunks
        if dataset[name].dtype.kind in "if":
            assert told["fill_value"] not in (None, 0)
            where = {"driver": "file", "path": str(finished / "results.zarr" / name)}
            stored = tensorstore.open({"driver": "zarr", "kvstore": where}, read=True).result()
            np.testing.assert_array_equal(stored.read().result(), dataset[name].values)
    assert np.all(dataset["norm_z"] == 0)


def test_a_stored_dataset_goes_into_netcdf(finished, tmp_path):
    load_vision(finished).to_netcdf(tmp_path / "run.nc", engine="scipy")
    with xr.open_dataset(tmp_path / "run.nc", engine="scipy") as again:
        np.testing.assert_array_equal(again["train_loss"], load_vision(finished)["train_loss"])
        assert again.attrs["adapted"] == "blocks/0/mlp/up, head"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes() or b"x")
    content[len(content) * 2 // 3] ^= 0x04
    path.write_bytes(content)


DAMAGES = (cut, empty, flip, pathlib.Path.unlink)


PARTS = [0, *(pytest.param(part, marks=pytest.mark.long) for part in (1, 2, 3, 4))]


@pytest.mark.parametrize("part", PARTS)
def test_whatever_is_damaged_is_named_and_trained_again(finished, tmp_path, part):
    """Files of results and adapters, by each kind of damage in turn: the same numbers, or a line that says what."""
    before, files = numbers(finished), sorted(one for one in finished.rglob("*/*") if one.is_file())
    files = [one for one in files if one.relative_to(finished).parts[0] in ("results.zarr", "adapters")]
    assert len(files) > 40
    refused = 0
    for number, file in enumerate(files):
        if number % len(PARTS) != part:
            continue
        path = shutil.copytree(finished, tmp_path / str(number))
        DAMAGES[number % 4](path / file.relative_to(finished))
        told = ""
        try:
            assert numbers(path) == before
        except InputError as error:
            told = str(error)
        folder = go_on(path)
        fill(folder)
        assert numbers(path) == before
        assert bool(folder.damaged) == bool(told)
        assert "\n" not in told
        refused += bool(told)
        shutil.rmtree(path)
    assert refused > len(files) // len(PARTS) - 3


def test_of_two_units_the_one_that_is_whole_is_not_trained_again(copied):
    (copied / "results.zarr" / "test_loss" / "0.1.0.0.0.0").write_bytes(b"")
    with pytest.raises(InputError, match=r"must hold .*, got 4 of 8 lanes, damaged or missing test_loss/0.1.0"):
        load_vision(copied)
    assert [unit.init for unit in fill(go_on(copied))] == ["spectral"]
    flip(copied / "adapters" / "sgd-gaussian-A-rank2-seed-all.safetensors")
    with pytest.raises(InputError, match=r"gaussian-A-rank2-seed-all.safetensors' must be as it was written"):
        load_adapters(copied, optimizer="sgd", init="gaussian-A", alpha=0.1, rank=2, seed=0)
    folder = go_on(copied)
    assert folder.damaged == ["adapters/sgd-gaussian-A-rank2-seed-all.safetensors"]
    assert [unit.init for unit in fill(folder)] == ["gaussian-A"]


OTHER = VisionSettings(optimizer=("sgd",), init=("gaussian-B",), rank=(3,), alpha=(0.2,), seeds=1, steps=10)
STEPS = ("open", "mkdir", "rename", "replace", "write_text", "unlink")


def test_a_run_that_cannot_be_replaced_is_still_there(copied, monkeypatch):
    """The disk is full at one step after the other, until the last one: then the new run is whole."""
    before, failed = contents(copied), 0
    real = {name: getattr(pathlib.Path, name) for name in STEPS}

    def failing(after):
        left = [after]

        def wrap(name):
            def step(self, *args, **kwargs):
                if name == "open" and (args or kwargs.values()) and "r" in str([*args, *kwargs.values()][0]):
                    return real[name](self, *args, **kwargs)
                left[0] -= 1
                if left[0] == -1:
                    raise OSError(28, "No space left on device", str(self))
                return real[name](self, *args, **kwargs)

            return step

        for name in STEPS:
            monkeypatch.setattr(pathlib.Path, name, wrap(name))

    while contents(copied) == before:
        failing(failed)
        with contextlib.suppress(OSError):
            begin(copied, OTHER)
        monkeypatch.undo()
        failed += 1
    folder = go_on(copied, OTHER)
    assert failed > 15
    assert folder.pending() == units(OTHER)
    assert not any(is_generated(path.name) for path in copied.iterdir())
    made = ("adapters/", "checkpoints/", "figures/", "report")
    assert not [name for name in contents(copied) if name.startswith(made) and "." in name]


def test_of_what_is_not_its_own_nothing_is_touched(copied):
    """Backups beside the results, a picture and adapters of the user's: by a new run, a resumed one, a mended one."""
    mine = "results.zarr.bak/train_loss/0", "results.zarr.old", "adapters/mine.safetensors", "figures/mine.png", "notes"
    for name in mine:
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_text(f"mine: {name}")
    (copied / "results.zarr" / ".zattrs").unlink()
    fill(go_on(copied))
    fill(begin(copied, OTHER))
    assert all((copied / name).read_text() == f"mine: {name}" for name in mine)
    assert not (copied / "figures" / "starts.png").exists()


def test_without_results_adapters_stay_until_their_units_are_trained_again(copied):
    before = contents(copied / "adapters")
    shutil.rmtree(copied / "results.zarr")
    with pytest.raises(InputError, match=r"must hold results.zarr, got an unfinished check; finish it with"):
        load_vision(copied)
    folder = go_on(copied)
    assert contents(copied / "adapters") == before
    assert len(fill(folder)) == 2
    assert contents(copied / "adapters") == before


def test_one_writer_at_a_time(copied, capsys, monkeypatch):
    monkeypatch.setattr("lora_flow_vision.check.build", lambda settings, folder: (None, ATTRS))
    before = contents(copied)
    for how in ("--overwrite", "--resume"):
        with locked(copied):
            assert main(["vision", "--out", str(copied), how]) == 2
        assert "must be written by one process at a time, got one that process" in capsys.readouterr().err
        assert contents(copied) == before


def test_values_do_not_go_into_another_run(copied):
    """Where locks are not to be had, or somebody has replaced the folder by hand."""
    (copied / "adapters" / "sgd-spectral-rank2-seed-all.safetensors").unlink()
    folder = go_on(copied)
    begin(copied)
    before = contents(copied)
    with pytest.raises(InputError, match="must stay in place while its run is solved, got another run's, or none"):
        fill(folder)
    assert contents(copied) == before


@pytest.mark.parametrize("changed", [{"alpha": (0.3,)}, {"steps": 30}, {"sgd_rate": 0.2}, {"seeds": 3}])
def test_an_edited_settings_file_does_not_relabel_what_is_stored(copied, changed):
    """With and without the results' own metadata; seeds and steps too, which are the lengths of axes."""
    edited = VisionSettings(**{**vars(SETTINGS), **changed})
    (copied / "settings.toml").write_text(tomli_w.dumps({"vision": vars(edited)}))
    for _ in range(2):
        with pytest.raises(InputError, match=rf"must be .*, as '{copied}' was started, to resume it, got"):
            go_on(copied, edited)
        (copied / "results.zarr" / "seed" / "0").write_bytes(b"")
    (copied / "settings.toml").write_text(tomli_w.dumps({"vision": vars(SETTINGS)}))
    fill(go_on(copied))
    assert load_vision(copied).attrs["alpha"] == [0.1]


def test_a_run_of_an_older_version_is_read_and_not_gone_on_with(finished, tmp_path):
    (tmp_path / "old").mkdir()
    shutil.copy(finished / "settings.toml", tmp_path / "old")
    dataset = load_vision(finished)
    dataset.attrs["adapted"] = ["head"]
    dataset.to_zarr(tmp_path / "old" / "results.zarr", zarr_format=2, consolidated=True)
    np.testing.assert_array_equal(load_vision(tmp_path / "old")["train_loss"], dataset["train_loss"])
    with pytest.raises(InputError, match="must be a run of this version, to be resumed, got an older one"):
        go_on(tmp_path / "old")


def test_a_check_refuses_before_it_makes_a_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="out must be a folder, got the file"):
        check(tmp_path / "file", SETTINGS, resume=False, overwrite=True)
