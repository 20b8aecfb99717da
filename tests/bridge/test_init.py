"""Starts for a checkpoint: the schemes' definitions, sizes and ranks, and what is refused before it is written."""

import hashlib
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import SHAPES, drawn, write
from safetensors.numpy import load_file, save_file

from lora_flow import INITIALIZATIONS, InputError, Regression, SingleLayer, peft_init
from lora_flow.bridge.peft_folder import read_peft
from lora_flow.bridge.sizes import choose_sizes, measure
from lora_flow.cli import main
from lora_flow.initialization import initialize

RANK, SCALING = 4, 2.0
HOW = {"rank": RANK, "scaling": SCALING, "size": 1.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write(tmp_path_factory.mktemp("checkpoint"))


def gradient(name):
    return drawn(1)[name].astype(float)


def dense_problem(init, name):
    """The layer with all that is known of it written out."""
    if init in ("eva", "invariant"):
        return Regression(drawn(2, {name: (50, SHAPES[name][1])})[name], -gradient(name), scaling=SCALING)
    descent = -gradient(name)
    if init == "spectral":
        u, s, vt = np.linalg.svd(descent, full_matrices=False)
        descent = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
    return SingleLayer(descent, SCALING, drawn(0)[name])


@pytest.mark.parametrize("init", INITIALIZATIONS)
def test_every_scheme_is_the_simulator_s_on_each_layer(files, tmp_path, init):
    made = peft_init(**files, **HOW, out=tmp_path / "start", init=init)
    stored = read_peft(tmp_path / "start")
    assert set(stored.adapters) == {name.removesuffix(".weight") for name in SHAPES}
    inputs = load_file(files["activations"])
    for module, adapter in stored.adapters.items():
        problem = dense_problem(init, f"{module}.weight")
        if init in ("eva", "invariant"):
            problem = Regression(inputs[f"{module}.inputs"], np.ones(problem.layers[0]), scaling=SCALING)
        key = jax.random.fold_in(jax.random.key(0), zlib.crc32(module.encode()))
        ((a, b),) = initialize(init, key, problem, rank=RANK, alpha=1.0, side="A")
        size = max(float(jnp.max(jnp.abs(a))), float(jnp.max(jnp.abs(b))))
        np.testing.assert_allclose(adapter.a, a, rtol=0, atol=2e-6 * size)
        np.testing.assert_allclose(adapter.b, b, rtol=0, atol=2e-6 * size)
        assert stored.scalings[module] == SCALING
    offset = INITIALIZATIONS[init].offset
    assert made.manifest["offset"] == offset == (tmp_path / "start" / "offset").exists()
    if offset:
        second = read_peft(tmp_path / "start" / "offset")
        for module, (a, b) in stored.adapters.items():
            np.testing.assert_array_equal(second.adapters[module].a, a)
            np.testing.assert_array_equal(second.adapters[module].b, -b)


def test_the_products_are_the_papers(files, tmp_path):
    """With U S V^T the weight's decomposition, or that of G = -dL/dW."""
    for init in ("pissa", "milora", "olora", "lora-one", "lora-one-theory", "gora"):
        peft_init(**files, **HOW, out=tmp_path / init, init=init)
        for module, (a, b) in read_peft(tmp_path / init).adapters.items():
            w, g = drawn(0)[f"{module}.weight"].astype(float), -gradient(f"{module}.weight")
            (u, s, vt), (x, sigma, yt) = (np.linalg.svd(one, full_matrices=False) for one in (w, g))
            q, r = np.linalg.qr(w)
            expected = {
                "pissa": (u[:, :RANK] * s[:RANK]) @ vt[:RANK] / SCALING,
                "milora": (u[:, -RANK:] * s[-RANK:]) @ vt[-RANK:] / SCALING,
                "olora": q[:, :RANK] @ r[:RANK],
                "lora-one": (x[:, :RANK] * sigma[:RANK]) @ yt[:RANK] / sigma[0],
                "lora-one-theory": (x[:, :RANK] * sigma[:RANK]) @ yt[:RANK],
                "gora": g @ np.linalg.pinv(a.astype(float)) @ a,
            }[init]
            np.testing.assert_allclose(b @ a, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_spectral_takes_the_leading_directions_of_a_full_gradient_and_says_what_it_leaves(files, tmp_path):
    made = peft_init(**files, rank=RANK, out=tmp_path / "start", init="spectral")
    for module, (a, b) in read_peft(tmp_path / "start").adapters.items():
        _, s, vt = np.linalg.svd(gradient(f"{module}.weight"))
        outside = a - (a @ vt[:RANK].T) @ vt[:RANK]
        assert np.abs(outside).max() < 1e-6 * np.abs(a).max()
        assert not b.any()
        assert made.layers[module]["held"] == pytest.approx(np.sum(s[:RANK] ** 2) / np.sum(s**2))


@pytest.mark.parametrize("init", ["lora-one", "pissa", "lora-ga-peft"])
def test_conv1d_layers_have_the_starts_of_the_linear_layers_they_are(files, tmp_path, init):
    """Their weights and gradients lie (in, out), and their biases say so."""
    turned = {name.replace("q_proj", "c_attn"): np.ascontiguousarray(x.T) for name, x in drawn(0).items()}
    biases = {name.replace(".weight", ".bias"): np.ones(x.shape[1], np.float32) for name, x in turned.items()}
    save_file(turned | biases, tmp_path / "model.safetensors")
    turned = {name.replace("q_proj", "c_attn"): np.ascontiguousarray(x.T) for name, x in drawn(1).items()}
    save_file(turned, tmp_path / "gradients.safetensors")
    mine = {"checkpoint": tmp_path, "gradients": tmp_path / "gradients.safetensors", "targets": "c_attn"}
    peft_init(**mine, **HOW, out=tmp_path / "conv1d", init=init, progress=False)
    peft_init(**files, **HOW, out=tmp_path / "linear", init=init)
    conv1d, linear = (read_peft(tmp_path / name) for name in ("conv1d", "linear"))
    assert conv1d.config["fan_in_fan_out"] is True
    assert linear.config["fan_in_fan_out"] is False
    for module, (a, b) in conv1d.adapters.items():
        other = linear.adapters[module.replace("c_attn", "q_proj")]
        np.testing.assert_allclose(b @ a, other.b @ other.a, rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["spectral", "lora-one", "lora-ga"])
def test_thin_factors_are_as_good_as_the_gradient(files, tmp_path, init):
    thin = {}
    for name, g in drawn(1).items():
        u, s, vt = np.linalg.svd(g.astype(float), full_matrices=False)
        turn = np.linalg.qr(np.random.default_rng(0).standard_normal((len(s), len(s))))[0]  # no need to be orthonormal
        thin |= {f"{name}.u": (u * s) @ turn, f"{name}.s": np.ones(len(s)), f"{name}.vt": turn.T @ vt}
    save_file(thin, tmp_path / "thin.safetensors")
    peft_init(**files | {"gradients": tmp_path / "thin.safetensors"}, **HOW, out=tmp_path / "thin", init=init)
    peft_init(**files, **HOW, out=tmp_path / "whole", init=init)
    one, other = (read_peft(tmp_path / name).adapters for name in ("thin", "whole"))
    for module, (a, b) in one.items():
        np.testing.assert_allclose(a, other[module].a, rtol=0, atol=1e-6)
        np.testing.assert_allclose(b, other[module].b, rtol=0, atol=1e-6)


def test_the_size_is_chosen_by_the_change_of_the_weights_or_of_the_loss(files, tmp_path):
    made = peft_init(**files, rank=RANK, scaling=SCALING, out=tmp_path / "update", init="lora-one", update=0.03)
    shares = []
    for module, (a, b) in read_peft(tmp_path / "update").adapters.items():
        shares.append(SCALING * np.linalg.norm(b @ a) / np.linalg.norm(drawn(0)[f"{module}.weight"]))
        assert made.layers[module]["update"] == pytest.approx(shares[-1], rel=1e-5)
    assert max(shares) == pytest.approx(0.03, rel=1e-5)
    made = peft_init(**files, rank=RANK, scaling=SCALING, out=tmp_path / "loss", init="lora-one", loss_change=0.5)
    told = read_peft(tmp_path / "loss").adapters.items()
    change = sum(SCALING * np.sum(gradient(f"{module}.weight") * (b @ a)) for module, (a, b) in told)
    assert change == pytest.approx(-0.5, rel=1e-5)
    assert made.manifest["loss_change"] == pytest.approx(-0.5)


def test_a_start_that_changes_nothing_has_the_size_that_lora_has(files, tmp_path):
    peft_init(**files, rank=RANK, out=tmp_path / "gaussian")
    drawn_a = [adapter.a for adapter in read_peft(tmp_path / "gaussian").adapters.values()]
    assert np.std(np.concatenate(drawn_a)) == pytest.approx(1 / np.sqrt(3 * 16), rel=0.15)
    zero = measure(
        read_peft(tmp_path / "gaussian").adapters[next(iter(SHAPES)).removesuffix(".weight")], 1.0, np.eye(2), None
    )
    assert choose_sizes("spectral", "A", {"x": zero}, size=None, update=1.0, gain=None) == {"x": 1 / np.sqrt(3)}
    assert choose_sizes("pissa", "A", {"x": zero}, size=None, update=1.0, gain=None) == {"x": 1.0}


def test_ranks_go_by_patterns_and_by_energy(files, tmp_path):
    made = peft_init(**files, rank=["2", r"1\.self_attn\.v_proj=3"], out=tmp_path / "patterns", init="lora-one")
    assert [one["rank"] for one in made.layers.values()] == [2, 2, 2, 3]
    made = peft_init(**files, rank=["energy:0.8", "v_proj=1"], max_rank=8, out=tmp_path / "energy", init="lora-one")
    for module, one in made.layers.items():
        if "v_proj" in module:
            assert one["rank"] == 1
            continue
        held = np.cumsum(np.linalg.svd(gradient(f"{module}.weight"), compute_uv=False) ** 2)
        assert held[one["rank"] - 2] < 0.8 * held[-1] <= held[one["rank"] - 1]
    config = json.loads((tmp_path / "energy" / "adapter_config.json").read_text())
    assert config["rank_pattern"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_in_and_out(tmp_path, dtype):
    kind = np.dtype(getattr(jnp, dtype))
    files = write(tmp_path / "checkpoint", kind)
    peft_init(**files, **HOW, out=tmp_path / "start", init="pissa", dtype=dtype)
    for module, (a, b) in read_peft(tmp_path / "start").adapters.items():
        assert a.dtype == b.dtype == kind
        u, s, vt = np.linalg.svd(drawn(0, dtype=kind)[f"{module}.weight"].astype(float), full_matrices=False)
        best = (u[:, :RANK] * s[:RANK]) @ vt[:RANK] / SCALING
        np.testing.assert_allclose(b.astype(float) @ a.astype(float), best, atol=0.05)


def test_a_layer_s_draws_do_not_depend_on_the_other_layers(files, tmp_path):
    peft_init(**files, rank=RANK, out=tmp_path / "all", seed=5)
    peft_init(**files | {"targets": "1.self_attn.v_proj"}, rank=RANK, out=tmp_path / "one", seed=5)
    ((module, adapter),) = read_peft(tmp_path / "one").adapters.items()
    np.testing.assert_array_equal(adapter.a, read_peft(tmp_path / "all").adapters[module].a)
    peft_init(**files, rank=RANK, out=tmp_path / "all", seed=6, overwrite=True)
    assert not np.array_equal(adapter.a, read_peft(tmp_path / "all").adapters[module].a)


def test_the_manifest_says_where_it_all_comes_from(files, tmp_path):
    made = peft_init(**files, rank=RANK, out=tmp_path / "start", init="lora-ga", seed=3)
    manifest = json.loads((tmp_path / "start" / "start.json").read_text())
    assert manifest == made.manifest
    for what in ("checkpoint", "gradients"):
        path = files[what]
        assert manifest["sources"]["sha256"][str(path)] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest["settings"]["seed"] == 3
    assert {"lora_flow", "jax", "numpy", "scipy"} <= set(manifest["versions"])
    assert all(one["residual"] < 1e-10 for one in made.layers.values())
    assert "largest residual" in str(made)


def test_names_are_the_model_s_where_they_differ(files, tmp_path):
    renamed = {name.removesuffix(".weight"): f"outer.{name.removesuffix('.weight')}" for name in SHAPES}
    (tmp_path / "names.json").write_text(json.dumps(renamed))
    peft_init(**files, rank=RANK, out=tmp_path / "start", init="pissa", names=tmp_path / "names.json")
    assert set(read_peft(tmp_path / "start").adapters) == set(renamed.values())


def test_what_fails_at_the_last_step_leaves_nothing(files, tmp_path, monkeypatch):
    def full(*args, **how):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_flow.bridge.peft_folder.save_file", full)
    with pytest.raises(OSError, match="No space"):
        peft_init(**files, rank=RANK, out=tmp_path / "start", init="pissa")
    assert not list(tmp_path.iterdir())


NAME = next(iter(SHAPES))
MODULE = NAME.removesuffix(".weight")


def gradients(folder, changed):
    arrays = {name: x for name, x in (drawn(1) | changed).items() if x is not None}
    save_file(arrays, folder / "other.safetensors")
    return folder / "other.safetensors"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({NAME: None}, f"gradients must hold {NAME}, or .u, .s and .vt of it, got '"),
        (
            {NAME: np.ones((3, 3))},
            rf"the gradient of {MODULE} in .* must have the weight's shape \(12, 16\), got \(3, 3\); ",
        ),
        ({NAME: np.ones((16, 12))}, r"the gradient of .*, got \(16, 12\), which is its transpose"),
        ({NAME: np.full((12, 16), np.nan)}, f"{NAME} in .* must be finite as float64, got 192 entries that are not"),
        (
            {NAME: None, f"{NAME}.u": np.ones((12, 3)), f"{NAME}.s": np.ones(3), f"{NAME}.vt": np.ones((3, 16))},
            f"the thin factors of the gradient of {MODULE} in .* must have at least 8 of them, twice .*, got 3",
        ),
        (
            {NAME: None, f"{NAME}.u": np.ones((12, 8)), f"{NAME}.s": np.ones(8), f"{NAME}.vt": np.ones((8, 12))},
            rf"vt of the gradient of {MODULE} in .* must have shape \(8, 16\), for the weight's .*, got \(8, 12\)",
        ),
    ],
)
def test_gradients_of_another_model_are_named_with_the_layer(files, tmp_path, changed, message):
    path = gradients(tmp_path, changed)
    with pytest.raises(InputError, match=message):
        peft_init(**files | {"gradients": path}, rank=RANK, out=tmp_path / "start", init="lora-one")
    assert not (tmp_path / "start").exists()


LINES = [
    ("--targets k_proj", "targets must match modules of the checkpoint"),
    ("--targets .*norm", "model.norm in "),
    ("--targets v_proj --init pisa", "init must be 'gaussian', "),
    ("--targets v_proj --init lora-one", "gradients must be given for lora-one, which is made of them, got none"),
    ("--targets v_proj --init eva", "activations must be given for eva, which is made of them, got none"),
    (
        "--targets v_proj --rank 9",
        "rank of model.layers.0.self_attn.v_proj must be at most 8, the layer's smaller dimens",
    ),
    ("--targets v_proj --rank 0", "rank must be at least 1, got 0"),
    ("--targets v_proj --rank many", "rank must be a rank (16), a rank for some layers (q_proj=16) or a share of the"),
    (
        "--targets v_proj --rank 2 3",
        "rank must have one number or one energy:SHARE for the layers that no pattern names",
    ),
    ("--targets v_proj --rank energy:2", "rank must have a share of the energy above 0 and at most 1, got 2.0"),
    (
        "--targets v_proj --rank energy:0.5",
        "rank must be a number for gaussian, which is made of no leading directions",
    ),
    (
        "--targets v_proj --init orthogonal --rank 3",
        "rank of model.layers.0.self_attn.v_proj must be even for orthogonal",
    ),
    ("--targets v_proj --rank 2 --scaling 0", "scaling must be positive and finite, got 0.0"),
    ("--targets v_proj --rank 2 --size big", "size must be a number, got 'big'"),
    ("--targets v_proj --rank 2 --size -1", "size must be positive and finite, got -1.0"),
    ("--targets v_proj --rank 2 --size 1 --loss-change 1", "loss_change must be left out where size is given, got 1.0"),
    ("--targets v_proj --rank 2 --loss-change 1", "gradients must be given for loss_change, got none"),
    ("--targets v_proj --rank 2 --side C", "side must be 'A' or 'B', got 'C'"),
    ("--targets v_proj --rank 2 --dtype int8", "dtype must be 'float32', "),
    ("--targets v_proj --rank 2 --names none.json", "names must be a file that exists, got 'none.json'"),
    ("--targets v_proj --rank 2 --gradients none", "gradients must be a .safetensors file that exists, got 'none'"),
    ("--targets v_proj --checkpoint none", "--checkpoint must be given once"),
]


@pytest.mark.parametrize(("words", "message"), LINES)
def test_wrong_words_are_one_line_and_nothing_is_written(files, tmp_path, capsys, words, message):
    out = tmp_path / "start"
    said = ["peft", "init", "--checkpoint", str(files["checkpoint"]), "--out", str(out), *words.split()]
    assert main(said) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"lora-flow: {message}"), line
    assert line.count("\n") == 1
    assert not out.exists()


def test_a_folder_that_exists_is_kept(files, tmp_path, capsys):
    said = ["peft", "init", "--checkpoint", str(files["checkpoint"]), "--targets", "v_proj", "--rank", "2", "--out"]
    assert main([*said, str(tmp_path / "start")]) == 0
    assert "gaussian: 2 layers of rank 2" in capsys.readouterr().out
    assert main([*said, str(tmp_path / "start")]) == 2
    assert "out must be a new folder, or come with --overwrite" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    assert main([*said, str(tmp_path / "mine"), "--overwrite"]) == 2
    assert "out must be new, or hold a start" in capsys.readouterr().err
    assert main([*said, str(tmp_path / "start"), "--overwrite"]) == 0


def test_the_group_has_help_and_names_its_commands(capsys):
    assert main(["peft", "--help"]) == 0
    assert "usage: lora-flow peft COMMAND [FLAGS]" in capsys.readouterr().out
    for words in (["peft"], ["peft", "inti"]):
        assert main(words) == 2
        assert "the command after peft must be 'init', 'apply', 'convert' or 'observe'" in capsys.readouterr().err
