"""Which arrays a checkpoint declares, which of them are layers, and how these lie in it."""

import json
import re

import numpy as np
import pytest
from checkpoint_files import SHAPES, TARGETS, drawn, write
from safetensors.numpy import save_file

from lora_flow import InputError
from lora_flow.bridge.checkpoints import open_checkpoint
from lora_flow.bridge.layers import choose


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_layers_of_one_file_and_of_several_are_the_same(tmp_path, dtype, shards):
    import jax.numpy as jnp

    kind = np.dtype(getattr(jnp, dtype))
    files = write(tmp_path, kind, shards)
    layers = choose(open_checkpoint(files["checkpoint"]), TARGETS)
    assert {layer.module for layer in layers} == {name.removesuffix(".weight") for name in SHAPES}
    for layer in layers:
        weight = drawn(0, dtype=kind)[layer.tensor.name]
        np.testing.assert_array_equal(layer.weight(), weight.astype(np.float64))
        assert layer.shape == weight.shape


def gpt2(folder, **changed):
    """GPT-2's layers, stored (in, out), two of them square, beside one that is stored (out, in)."""
    shapes = {"h.0.attn.c_attn": (6, 18), "h.0.attn.c_proj": (6, 6), "h.0.mlp.c_proj": (24, 6)} | changed
    arrays = {f"{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}
    arrays |= {f"{name}.bias": np.ones(shape[1], np.float32) for name, shape in shapes.items()}
    arrays["score.weight"] = np.ones((2, 6), np.float32)
    save_file(arrays, folder / "model.safetensors")
    return open_checkpoint(folder)


def test_conv1d_is_told_by_its_bias_and_where_it_is_square_by_its_kin(tmp_path):
    layers = {layer.module: layer for layer in choose(gpt2(tmp_path), "c_attn|c_proj|score")}
    assert [layers[f"h.0.{name}"].transposed for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")] == [True] * 3
    assert layers["h.0.attn.c_attn"].shape == (18, 6)
    assert not layers["score"].transposed
    (alone,) = choose(gpt2(tmp_path), "attn.c_proj")  # whose kin are not asked for
    assert alone.transposed


def test_the_same_names_on_linear_layers_are_not_taken_for_conv1d(tmp_path):
    arrays = {"h.0.c_attn.weight": np.ones((18, 6), np.float32), "h.0.c_attn.bias": np.ones(18, np.float32)}
    save_file(arrays | {"h.0.c_proj.weight": np.ones((6, 6), np.float32)}, tmp_path / "model.safetensors")
    assert not any(layer.transposed for layer in choose(open_checkpoint(tmp_path), "c_attn|c_proj"))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("k_proj", "targets must match modules of the checkpoint, such as model.*, got 'k_proj', which matches none"),
        ("proj", "targets must match modules"),  # an end of a name, but not behind a dot
        ("(", r"targets must be a regular expression, got '\('"),
        (".*norm", r"model.norm in .* must be a matrix, to carry an adapter, got shape \(16,\)"),
        ("embed_tokens", "model.embed_tokens in .* must be a linear layer, to carry an adapter, got an embedding"),
    ],
)
def test_targets_that_carry_no_adapter_are_named(tmp_path, targets, message):
    with pytest.raises(InputError, match=message):
        choose(open_checkpoint(write(tmp_path)["checkpoint"]), targets)


def test_quantised_and_fused_weights_are_named(tmp_path):
    arrays = {"q.weight": np.ones((4, 4), np.uint8), "experts.weight": np.ones((2, 4, 4), np.float32)}
    save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"q in .* must be floating-point, as weights are .*, got U8"):
        choose(open_checkpoint(tmp_path), "q")
    with pytest.raises(InputError, match=r"experts in .* must be a matrix, .*, got shape \(2, 4, 4\)"):
        choose(open_checkpoint(tmp_path), "experts")


def test_checkpoints_that_are_none_are_told_in_a_line(tmp_path):
    files = write(tmp_path, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "model.bin").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "model-0.safetensors").read_bytes()[:-1])
    for path, message in (
        (tmp_path / "none", "checkpoint must exist, got '.*none'"),
        (tmp_path / "empty", "checkpoint must be a folder with model.safetensors or .*, got '.*empty'"),
        (tmp_path / "model.bin", "checkpoint must be a .safetensors file, or a folder of them, got"),
        (cut, "must be a whole safetensors file, got "),
    ):
        with pytest.raises(InputError, match=message):
            open_checkpoint(path)
    named = json.loads(index.read_text())["weight_map"]
    for wrong in ("../model-0.safetensors", "gone.safetensors"):
        index.write_text(json.dumps({"weight_map": named | {next(iter(named)): wrong}}))
        with pytest.raises(InputError, match=f"{re.escape(str(index))} must name .*, got '{wrong}'"):
            open_checkpoint(files["checkpoint"])
