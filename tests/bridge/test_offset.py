"""A start that offsets the weights: in a copy of them, beside them, and as plain LoRA, all the same model."""

import json

import numpy as np
import pytest
from checkpoint_files import SHAPES, drawn, write
from safetensors.numpy import load_file

from lora_flow import Adapter, InputError, peft_apply, peft_convert, peft_init
from lora_flow.bridge.peft_folder import read_peft, write_peft
from lora_flow.cli import main
from lora_flow.storage.tensors import open_tensors

RANK, SCALING = 3, 2.0


@pytest.fixture
def started(tmp_path):
    """A start, and adapters that were trained from it: its own with every entry changed."""
    files = write(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text("{}")
    start = tmp_path / "start"
    peft_init(**files, rank=RANK, scaling=SCALING, init="pissa", out=start)
    first, rng = read_peft(start), np.random.default_rng(7)
    changed = {
        module: Adapter(*(np.float32(x + 0.1 * rng.standard_normal(x.shape)) for x in adapter))
        for module, adapter in first.adapters.items()
    }
    write_peft(tmp_path / "trained", first._replace(adapters=changed))
    return tmp_path, start, tmp_path / "trained"


def weights(folder, module):
    return load_file(folder / "model.safetensors")[f"{module}.weight"].astype(float)


def update(folder, module):
    read = read_peft(folder)
    adapter = read.adapters[module]
    return read.scalings[module] * adapter.b.astype(float) @ adapter.a.astype(float)


def test_three_ways_to_the_same_weights(started):
    folder, start, trained = started
    errors = peft_apply(start, folder / "base", folder / "residual")
    peft_convert(trained, start, folder / "plain")
    assert (folder / "residual" / "config.json").read_text() == "{}"
    assert read_peft(folder / "plain").config["r"] == 2 * RANK
    for name in SHAPES:
        module = name.removesuffix(".weight")
        base = drawn(0)[name].astype(float)
        beside = base + update(trained, module) + update(start / "offset", module)
        np.testing.assert_allclose(weights(folder / "residual", module) + update(trained, module), beside, atol=1e-6)
        np.testing.assert_allclose(base + update(folder / "plain", module), beside, atol=1e-6)
        assert np.abs(beside - base).max() > 0.1
        assert errors[module] < 1e-7
    kept = ("model.embed_tokens.weight", "model.norm.weight")
    before, after = (open_tensors(folder / name / "model.safetensors").tensors for name in ("base", "residual"))
    assert all(before[name].read().tobytes() == after[name].read().tobytes() for name in kept)


def test_a_lower_rank_is_the_nearest_and_tells_how_near(started):
    folder, start, trained = started
    errors = peft_convert(trained, start, folder / "plain", rank=2)
    for module, error in errors.items():
        exact = update(trained, module) + update(start / "offset", module)
        u, s, vt = np.linalg.svd(exact)
        np.testing.assert_allclose(update(folder / "plain", module), (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5)
        assert error == pytest.approx(np.linalg.norm(s[2:]) / np.linalg.norm(s), rel=1e-4)


def test_sixteen_bit_weights_are_rounded_and_the_error_is_told(tmp_path):
    files = write(tmp_path / "base", np.float16)
    peft_init(**files, rank=RANK, init="pissa", out=tmp_path / "start")
    errors = peft_apply(tmp_path / "start", files["checkpoint"], tmp_path / "residual")
    assert 1e-5 < max(errors.values()) < 1e-3
    assert load_file(tmp_path / "residual" / "model.safetensors")[next(iter(SHAPES))].dtype == np.float16


def test_what_does_not_belong_together_is_named(started, capsys):
    folder, start, trained = started
    plain = folder / "gaussian"
    peft_init(checkpoint=folder / "base", targets="v_proj", rank=2, out=plain, progress=False)
    few = read_peft(trained)
    one = next(iter(few.adapters))
    write_peft(folder / "few", few._replace(adapters={one: few.adapters[one]}))
    other = {one: Adapter(np.ones((2, 5)), np.ones((4, 2)))}
    write_peft(folder / "other", few._replace(adapters=other))
    for call, message in (
        (
            lambda: peft_apply(plain, folder / "base", folder / "x"),
            "start must be of a scheme that offsets the weights",
        ),
        (
            lambda: peft_apply(trained, folder / "base", folder / "x"),
            "start must be a folder of peft init, with start.js",
        ),
        (lambda: peft_apply(start, folder / "base", trained), "out must be a new folder, got"),
        (lambda: peft_convert(trained, start, trained), "out must be a new folder, got"),
        (lambda: peft_convert(trained, start, folder / "x", rank=0), "rank must be at least 1, got 0"),
        (lambda: peft_convert(folder / "few", start, folder / "x"), "must hold every layer of the start, got no model"),
        (
            lambda: peft_convert(folder / "other", start, folder / "x"),
            "must have the start's in 16 and out 12, got in 5",
        ),
    ):
        with pytest.raises(InputError, match=message):
            call()
    told = json.loads((start / "start.json").read_text())
    told["layers"][one]["parameter"] = "none.weight"
    (start / "start.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match=r"must hold none.weight of shape \(12, 16\), as the start's, got none"):
        peft_apply(start, folder / "base", folder / "x")
    assert not (folder / "x").exists()
    words = ["peft", "apply", "--start", str(plain), "--checkpoint", str(folder / "base"), "--out", str(folder / "x")]
    assert main(words) == 2
    assert "start must be of a scheme that offsets the weights; others are used as they are" in capsys.readouterr().err


def test_the_commands_say_what_they_did(started, capsys):
    folder, start, trained = started
    words = ["--start", str(start), "--out"]
    assert main(["peft", "apply", "--checkpoint", str(folder / "base"), *words, str(folder / "residual")]) == 0
    assert "relative rounding error of a new weight" in capsys.readouterr().out
    assert main(["peft", "convert", "--trained", str(trained), *words, str(folder / "plain"), "--rank", "2"]) == 0
    assert "relative error of an update by the lower rank" in capsys.readouterr().out
