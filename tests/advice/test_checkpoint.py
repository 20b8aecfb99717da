"""Advice for a checkpoint is a command that `peft init` takes; and in a folder, what other commands read."""

import json
import shlex

import numpy as np
import pytest
from picture_faults import faults
from safetensors.numpy import save_file

from lora_flow import InputError, advise_checkpoint
from lora_flow.advice.folder import load
from lora_flow.cli import main
from lora_flow.figures.advice import advice_figure

NAMES = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
HOW = {"targets": ".*_proj", "rank": (2, 4), "init": ("gaussian", "lora-one"), "size": (0.1, 1.0), "progress": False}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Layers of which some have much more to learn than others."""
    folder, rng = tmp_path_factory.mktemp("model"), np.random.default_rng(0)
    weights, gradients = {}, {}
    for i, name in enumerate(NAMES):
        u, v = (np.linalg.qr(rng.standard_normal((n, 12)))[0] for n in (16, 12))
        weights[f"{name}.weight"] = rng.standard_normal((16, 12)).astype(np.float32)
        gradients[f"{name}.weight"] = (0.5**i * (u * np.arange(1, 13.0) ** -1) @ v.T).astype(np.float32)
    save_file(weights, folder / "model.safetensors")
    save_file(gradients, folder / "gradients.safetensors")
    return folder


@pytest.fixture(scope="module")
def found(files):
    return advise_checkpoint(files / "model.safetensors", files / "gradients.safetensors", level=0.3, loss=1e3, **HOW)


def test_the_command_makes_starts_of_the_ranks_and_the_size_that_are_advised(found, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    assert main(shlex.split(found.command)[1:]) == 0
    capsys.readouterr()
    made = json.loads((files / "start" / "start.json").read_text())
    cell = found.recommended.of(found.dataset)
    assert made["init"] == found.recommended.init
    assert [made["layers"][name]["rank"] for name in NAMES] == cell["ranks"].values.tolist()
    np.testing.assert_allclose([one["alpha"] for one in made["layers"].values()], float(cell["alpha"]), rtol=1e-3)


def test_layers_with_more_to_learn_get_more(found):
    ranks = found.dataset["ranks"].sel(rank=2).values
    assert ranks.sum() == 2 * len(NAMES)
    assert (np.diff(ranks) <= 0).all()
    assert ranks[0] > ranks[-1]


def test_nothing_is_trusted_once_the_loss_of_the_network_has_fallen_by_a_tenth(found, files):
    small = advise_checkpoint(files / "model.safetensors", files / "gradients.safetensors", level=0.3, loss=0.1, **HOW)
    assert float(small.dataset["t_fallen"]) < float(small.recommended.of(small.dataset)["time_level"])
    assert [found.confidence.level, small.confidence.level] == ["middle", "low"]
    assert "later nothing is predicted" in small.confidence.reasons[0]


def test_a_folder_holds_numbers_picture_report_and_page(files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = f"advise --checkpoint {files / 'model.safetensors'} --gradients {files / 'gradients.safetensors'}"
    words += " --targets .*_proj --rank 2 4 --init gaussian lora-one --size 0.1 1 --level 0.3 --out out"
    assert main(words.split()) == 0
    said = capsys.readouterr().out
    assert "next: lora-flow peft init" in said
    assert "## Layer by layer" in said
    advice, settings = load(tmp_path / "out")
    assert settings["level"] == 0.3
    assert advice.reason in said
    text, page = ((tmp_path / "out" / name).read_text() for name in ("report.md", "report.html"))
    assert "## Assumptions" in text
    assert "lora-flow peft init" in page
    assert (tmp_path / "out" / "figures" / "advice.png").is_file()
    assert main(["status", "out"]) == 0
    assert "a recommendation, finished" in capsys.readouterr().out
    (tmp_path / "out" / "report.md").unlink()
    assert main(["plot", "out"]) == 0
    assert (tmp_path / "out" / "report.md").read_text() == text
    assert main(words.split()) == 2
    assert "out must be new (--overwrite replaces it)" in capsys.readouterr().err


def test_the_picture_has_no_faults(found):
    assert faults(advice_figure(found.dataset, found.recommended)) == []


def wrong(files, tmp_path, **arrays):
    path = tmp_path / "wrong.safetensors"
    good = {f"{name}.weight": np.ones((16, 12), np.float32) for name in NAMES}
    save_file({name: value for name, value in (good | arrays).items() if value is not None}, path)
    return path


@pytest.mark.parametrize(
    ("changed", "how", "message"),
    [
        (None, {}, "gradients must hold layers.0.q_proj.weight"),
        (np.ones((12, 16)), {}, r"the gradient of layers.0.q_proj in .* must have the weight's shape \(16, 12\)"),
        (np.full((16, 12), np.nan), {}, "layers.0.q_proj.weight in .* must be finite"),
        (np.zeros((16, 12)), {}, "the gradient of layers.0.q_proj in .* must not be zero"),
        (
            np.ones((16, 12)),
            {"rank": 13},
            "1 and 12, the smaller dimension of layers.0.q_proj, got 13",
        ),
        (np.ones((16, 12)), {"init": "eva"}, "init must be made of gradients, or of singular pairs of weights"),
        (np.ones((16, 12)), {"targets": "none"}, "targets must match modules of the checkpoint"),
        (np.ones((16, 12)), {"loss": -1.0}, "loss must be positive and finite, got -1.0"),
    ],
)
def test_wrong_files_are_refused_by_the_layer_s_name(changed, how, message, files, tmp_path):
    gradients = wrong(
        files, tmp_path, **{"layers.0.q_proj.weight": None if changed is None else changed.astype(np.float32)}
    )
    with pytest.raises(InputError, match=message):
        advise_checkpoint(files / "model.safetensors", gradients, **HOW | how)


def test_a_level_that_no_rank_reaches_is_refused_with_the_floor(files):
    with pytest.raises(
        InputError, match=r"level must be above 0.09\d+, the share of the loss that rank 4 leaves in these 4"
    ):
        advise_checkpoint(files / "model.safetensors", files / "gradients.safetensors", level=0.01, **HOW)
