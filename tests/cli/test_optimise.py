"""`lora-flow optimise`: a folder with every step and the winner, which is resumed to the last bit."""

import shutil

import numpy as np
import pytest
import xarray as xr

from lora_flow.cli import main
from lora_flow.design import optimise as module

SMALL = ["--m", "3", "--n", "3", "--h", "4", "--rank", "1", "--alpha", "1e-2", "--restarts", "2", "--steps", "25"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("optimise") / "run"
    assert main(["optimise", *SMALL, "--out", str(out)]) == 0
    return out


def test_the_folder_has_every_step_the_winner_a_picture_and_a_report(folder, capsys):
    blocks = xr.open_zarr(folder / "results.zarr")
    assert dict(blocks["objective"].sizes) == {"block": 3, "restart": 2, "within": 10}
    assert int(np.isfinite(blocks["objective"]).sum()) == 50
    assert (folder / "learned.safetensors").is_file()
    assert [one.name for one in (folder / "figures").glob("*.png")] == ["optimise.png"]
    assert "| A_1 |" in (folder / "report.md").read_text()
    assert main(["status", str(folder)]) == 0
    assert "3 of 3 lanes done (3 of 3 blocks of steps)" in capsys.readouterr().out
    (folder / "report.md").unlink()
    assert main(["plot", str(folder)]) == 0
    assert (folder / "report.md").is_file()


def test_an_interrupted_search_ends_the_same_to_the_last_bit(folder, tmp_path, monkeypatch):
    made, real = [], module.step

    def cut(*given):
        if len(made) == 14:
            raise KeyboardInterrupt
        made.append(True)
        return real(*given)

    out = tmp_path / "run"
    monkeypatch.setattr(module, "step", cut)
    assert main(["optimise", *SMALL, "--out", str(out)]) == 1
    monkeypatch.setattr(module, "step", real)
    assert main(["optimise", "--out", str(out), "--resume"]) == 0
    one, other = (xr.open_zarr(path / "results.zarr").load() for path in (folder, out))
    for name in one.data_vars:
        np.testing.assert_array_equal(one[name], other[name], err_msg=str(name))
    assert (folder / "learned.safetensors").read_bytes() == (out / "learned.safetensors").read_bytes()


def test_a_damaged_block_is_made_again(folder, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(folder, out)
    (out / "results.zarr" / "state" / "1.0.0").write_bytes(b"nothing")
    assert main(["optimise", "--out", str(out), "--resume"]) == 0
    assert (folder / "learned.safetensors").read_bytes() == (out / "learned.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--objective", "log10 los"], "did you mean 'log10 loss'?"),
        (["--objective", "time to 1e-25"], "objective must be finite at the start of every restart"),
        (["--parameters", "adapter"], "did you mean 'adapters'?"),
        (["--at", "7"], "at must be a time after 0 and up to t1 = 1, got 7"),
        (["--rate", "0"], "rate must be positive, got 0"),
        (["--kappa", "2"], "kappa must be left out with problem 'aligned'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(flags, message, tmp_path, capsys):
    assert main(["optimise", *SMALL, *flags, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_other_settings_do_not_go_on(folder, capsys):
    assert main(["optimise", *SMALL, "--out", str(folder)]) == 2
    assert "--overwrite replaces it, --resume continues it" in capsys.readouterr().err
    assert main(["optimise", "--out", str(folder), "--resume", "--rate", "0.2"]) == 2
    assert "rate must be 0.1, as" in capsys.readouterr().err
