"""Weights come back as they were written, positions go to other grids by cubic convolution, and damage is named."""

import hashlib
import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from lora_flow_vision.base import checkpoint
from lora_flow_vision.config import CONFIGS
from lora_flow_vision.hub import fetch
from lora_flow_vision.pretrain import linear_probe
from lora_flow_vision.settings import VisionSettings
from lora_flow_vision.weights import SHIPPED, load_vit, parameters, resample, save_vit
from safetensors.numpy import load_file, save_file
from small import CONFIG, network

from lora_flow import InputError
from lora_flow.storage.tensors import KINDS

ARRAYS, SIZES, PIXELS = "model.safetensors", "config.json", "preprocessor_config.json"
INDEX = "model.safetensors.index.json"
POSITIONS = "vit.embeddings.position_embeddings"
PROJECTION = "vit.embeddings.patch_embeddings.projection.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "weights"
    save_vit(network(), folder, mean=0.25, std=2.0)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "weights")


def values(model):
    return {path: np.asarray(param[...]) for path, param in parameters(model).items()}


def assert_same(model, other, besides=()):
    assert model.keys() == other.keys()
    for path in model.keys() - set(besides):
        np.testing.assert_array_equal(model[path], other[path], err_msg=path)


def test_what_is_saved_is_loaded_bit_by_bit(tmp_path):
    model = network()
    save_vit(model, tmp_path / "new" / "folder", mean=0.25, std=2.0)
    loaded = load_vit(tmp_path / "new" / "folder")
    assert loaded.model.config == CONFIG
    assert (loaded.mean, loaded.std) == ([0.25] * 3, [2.0] * 3)
    assert_same(values(loaded.model), values(model))


def test_a_checkpoint_holds_the_names_and_shapes_of_hugging_face(saved):
    """A convolution's weight is (out, in, height, width), a linear layer's (out, in)."""
    arrays = load_file(saved / ARRAYS)
    assert len(arrays) == 4 + CONFIG.depth * 16 + 4
    assert arrays[PROJECTION].shape == (16, 3, 4, 4)
    assert arrays[POSITIONS].shape == (1, 5, 16)
    assert arrays["vit.embeddings.cls_token"].shape == (1, 1, 16)
    assert arrays["vit.encoder.layer.1.intermediate.dense.weight"].shape == (32, 16)
    kernel = network().blocks[1].attention.output.kernel[...]
    np.testing.assert_array_equal(arrays["vit.encoder.layer.1.attention.output.dense.weight"], kernel.T)


def test_a_checkpoint_without_a_head_has_neither_the_prefix_nor_1000_classes_of_its_own(folder):
    """ViTModel in place of ViTForImageClassification."""
    arrays = load_file(folder / ARRAYS)
    bare = {name.removeprefix("vit."): array for name, array in arrays.items() if not name.startswith("classifier")}
    save_file(bare, folder / ARRAYS)
    loaded = load_vit(folder).model
    assert loaded.config.classes == 1000
    assert_same(values(loaded), values(network()), besides=["head/kernel", "head/bias"])
    assert not np.any(loaded.head.kernel[...])


def test_for_other_classes_the_head_is_new_and_zero(saved):
    loaded = load_vit(saved, classes=3).model
    assert loaded.config.classes == 3
    assert loaded.head.kernel.shape == (16, 3)
    assert not np.any(loaded.head.kernel[...])
    assert not np.any(loaded.head.bias[...])
    assert_same(values(loaded), values(network()), besides=["head/kernel", "head/bias"])
    assert not np.any(load_vit(saved, classes=10).model.head.kernel[...])


def test_for_another_size_only_the_positions_change(saved):
    loaded = load_vit(saved, image_size=12).model
    assert (loaded.config.image_size, loaded.config.tokens) == (12, 10)
    expected = resample(values(network())["embedding/positions"], 9)
    np.testing.assert_array_equal(loaded.embedding.positions[...], expected)
    assert_same(values(loaded), values(network()), besides=["embedding/positions"])


def test_without_a_normalisation_of_its_own_images_go_to_minus_one_and_one(folder):
    (folder / PIXELS).unlink()
    assert load_vit(folder)[1:] == (0.5, 0.5)


def grid(size, plane):
    """Positions whose first entry is `plane(row, column)`, behind a class token of their own."""
    rows, columns = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    return np.concatenate([[7.0], plane(rows, columns).ravel()])[:, None]


def resampled(size, after, plane):
    return resample(grid(size, plane), after**2)[1:].reshape(after, after)


@pytest.mark.parametrize(("before", "after"), [(4, 4), (4, 6), (4, 3), (7, 14), (14, 7), (2, 5), (1, 3)])
def test_a_constant_stays_constant_and_the_class_token_its_own(before, after):
    turned = resample(grid(before, lambda i, j: 0 * i + 3.5), after**2)
    assert turned[0] == 7.0
    np.testing.assert_allclose(turned[1:], np.full((after**2, 1), 3.5), rtol=1e-14)


def test_on_their_own_grid_positions_stay_as_they_are():
    positions = np.random.default_rng(0).standard_normal((17, 3)).astype(np.float32)
    np.testing.assert_array_equal(resample(positions, 16), positions)


@pytest.mark.parametrize("places", [2, 3, 4])
def test_away_from_the_border_a_ramp_keeps_its_slope(places):
    """Where `places` new ones lie between two old ones, the slope over an old one's width is exactly the ramp's.

    In between, Keys' kernel with a = -3/4 leaves s (1-s) (2s-1)/2 at a share s of the way (it would be 0 for -1/2).
    """
    turned = resampled(8, 8 * places, lambda i, j: 2.0 * i - 3.0 * j)
    place = (np.arange(8 * places) + 0.5) / places - 0.5
    share = place - np.floor(place)
    away = place - share * (1 - share) * (2 * share - 1) / 2
    inner = slice(2 * places, -2 * places)
    expected = 2 * away[:, None] - 3 * away[None]
    np.testing.assert_allclose(turned[inner, inner], expected[inner, inner], atol=1e-13)


def test_halved_away_from_the_border_a_ramp_is_the_ramp():
    turned = resampled(12, 6, lambda i, j: 2.0 * i - 3.0 * j)
    centres = 2 * np.arange(6) + 0.5
    np.testing.assert_allclose(turned[1:-1, 1:-1], (2 * centres[:, None] - 3 * centres)[1:-1, 1:-1], atol=1e-13)


def test_rows_and_columns_are_resampled_alike():
    positions = np.random.default_rng(0).standard_normal((5, 5))
    upright, lying = (resampled(5, 8, lambda i, j, p=p: p[i, j]) for p in (positions, positions.T))
    np.testing.assert_allclose(upright, lying.T, atol=1e-14)


def changed(name, array, besides=None):
    """A damage to the arrays: another one under a name, or none; or one more."""

    def damage(folder):
        arrays = load_file(folder / ARRAYS)
        if besides is None:
            arrays.pop(name)
        new = {} if array is None else {besides or name: np.zeros(array, np.float32)}
        save_file(arrays | new, folder / ARRAYS)

    return damage


def filled(name, value, kind=float):
    """A damage to the arrays: the same value everywhere."""

    def damage(folder):
        arrays = load_file(folder / ARRAYS)
        save_file(arrays | {name: np.full(arrays[name].shape, value, kind)}, folder / ARRAYS)

    return damage


def declares(folder, header=None, **kinds):
    """A file that says that it is larger than it is, on a disk that has no room for what it says."""
    entries = {kind: {"dtype": kind, "shape": shape, "data_offsets": [0, 4]} for kind, shape in kinds.items()}
    said = json.dumps(entries).encode()
    (folder / ARRAYS).write_bytes((header or len(said)).to_bytes(8, "little") + said + bytes(4))
    if header:
        os.truncate(folder / ARRAYS, header + 100)


def described(**other):
    """A damage to the config: other values, or none."""

    def damage(folder):
        stored = json.loads((folder / SIZES).read_text()) | other
        (folder / SIZES).write_text(json.dumps({name: value for name, value in stored.items() if value is not None}))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "weights must be a folder with config.json and model.safetensors, got no .*config.json$"),
        (lambda f: (f / ARRAYS).unlink(), "weights must be a folder with .*, got no .*model.safetensors$"),
        (lambda f: (f / SIZES).unlink(), "weights must be a folder with .*, got no .*config.json$"),
        (lambda f: cut(f / ARRAYS, -1), "model.safetensors must be a whole safetensors file, got "),
        (lambda f: cut(f / ARRAYS, 100), "model.safetensors must be a whole safetensors file, got "),
        (lambda f: cut(f / ARRAYS, 0), "model.safetensors must be a whole safetensors file, got "),
        (lambda f: cut(f / SIZES, -3), "config.json must be a JSON file, got "),
        (lambda f: (f / SIZES).write_bytes(b"\xff\xfe"), "config.json must be a JSON file, got "),
        (lambda f: (f / SIZES).write_text("[]"), "config.json must hold a JSON object, got list"),
        (lambda f: cut(f / PIXELS, -3), "preprocessor_config.json must be a JSON file, got "),
        (lambda f: (f / PIXELS).write_text("[]"), "preprocessor_config.json must hold a JSON object, got list"),
        (described(model_type="bert"), "config.json must describe a model of type vit, got bert"),
        (described(model_type=None), "config.json must describe a model of type vit, got None"),
        (described(hidden_act="relu"), "config.json must have hidden_act gelu, got relu"),
        (described(patch_size=None), "config.json must hold image_size, .*, got no patch_size"),
        (described(hidden_size="16"), "config.json must have a positive integer as hidden_size, got 16"),
        (described(patch_size=0), "config.json must have a positive integer as patch_size, got 0"),
        (described(patch_size=[4, 8]), r"config.json must have a positive integer as patch_size, got \[4, 8\]"),
        (described(layer_norm_eps="small"), "config.json must have a positive number as layer_norm_eps, got small"),
        (described(num_attention_heads=3), r"width must be a multiple of heads \(3\), got 16"),
        (described(image_size=10), r"image_size must be a multiple of patch_size \(4\), got 10"),
        (described(num_hidden_layers=10**7), "config.json must have at most 65536 as num_hidden_layers, got 10000000"),
        (described(num_hidden_layers=41), "num_hidden_layers in .* must be at most 40, the number of arrays, got 41"),
        (described(hidden_size=2**40), "config.json must have at most 65536 as hidden_size, got 1099511627776"),
        (described(image_size=10**400), "config.json must have a positive integer as image_size, got 1000"),
        (described(num_attention_heads=True), "config.json must have a positive integer as num_attention_heads, got T"),
        (described(layer_norm_eps=float("inf")), "config.json must have a positive number as layer_norm_eps, got inf"),
        (described(head_dim=4), "config.json must have heads that share out hidden_size, got head_dim 4"),
        (described(quantization_config={}), "config.json must be of weights that were not quantised, got quant"),
        (described(model_type="dinov2"), "must describe a model of type vit, got dinov2, which has layer scale"),
        (described(model_type=None, architecture="vit_tiny"), "must describe a model of type vit, got timm's vit_tiny"),
        (lambda f: (f / SIZES).write_text("[" * 10**6), "config.json must be a JSON file, got "),
        (lambda f: (f / SIZES).write_text('{"a": 1, "a": 2}'), "config.json must be a JSON file, got a twice"),
        (lambda f: os.truncate(f / SIZES, 2**30), "config.json must be at most 67108864 bytes long, got 1073741824"),
        (
            lambda f: (f / PIXELS).write_text('{"image_mean": "a"}'),
            "image_mean in .* must be a number, or 3 of them",
        ),
        (
            lambda f: (f / PIXELS).write_text('{"image_std": [1, 0, 1]}'),
            "image_std in .* must be positive, or 3 of",
        ),
        (lambda f: (f / PIXELS).write_text('{"rescale_factor": 1}'), "rescale_factor in .* must be 1/255, got 1"),
        (lambda f: declares(f, header=40 * 10**9), "model.safetensors must be a whole safetensors file, got "),
        (lambda f: declares(f, F32=[2**40, 2**40]), "model.safetensors must be a whole safetensors file, got "),
        (
            lambda f: (f / ARRAYS).rename(f / "pytorch_model.bin"),
            "'pytorch_model.bin' is pickled PyTorch weights; l",
        ),
        (lambda f: (f / ARRAYS).rename(f / "ViT-B_16.NPZ"), "'ViT-B_16.NPZ' is weights of Google's vision_transformer"),
        (lambda f: (f / SIZES).rename(f / "adapter_config.json"), "no .*config.json: these are PEFT's adapters"),
        (changed("vit.layernorm.weight", 16, "deit.embeddings.distillation_token"), "config.json must describe a .*"),
        (
            changed("vit.layernorm.weight", 16, "vit.encoder.layer.0.layer_scale1.lambda1"),
            "ViT's arrays, got .*scale",
        ),
        (
            changed("vit.layernorm.weight", 16, "vit.encoder.layer.0.output.dense.SCB"),
            "arrays, got .*quantised",
        ),
        (changed("vit.layernorm.weight", 16, "vit.encoder.layer.0.foo"), "arrays, got vit.encoder.layer.0.foo$"),
        (
            filled("vit.layernorm.weight", np.nan),
            "vit.layernorm.weight in .* must be finite as float32, got 16",
        ),
        (filled("vit.layernorm.weight", 1e300), "vit.layernorm.weight in .* must be finite as float32, got 16"),
        (filled("vit.layernorm.weight", 1, np.int8), "vit.layernorm.weight in .* must be floating-point, .*, got I8"),
        (described(num_hidden_layers=3), r"must hold vit.encoder.layer.2.\S+, got 40 other arrays"),
        (
            described(intermediate_size=64),
            r"intermediate.dense.weight \S+ .*must have shape \(64, 16\), .*got \(32, 16\)",
        ),
        (described(image_size=16), r"position_embeddings \S+ .*must have shape \(1, 17, 16\), .*got \(1, 5, 16\)"),
        (changed("vit.layernorm.weight", None), "must hold vit.layernorm.weight, got 39 other arrays"),
        (changed("classifier.bias", None), r"classifier\.(weight|bias)"),
        (changed("classifier.weight", None), "must hold classifier.weight, got 39 other arrays"),
        (changed("classifier.bias", ()), r"classifier.\S+ .*must have shape .*, as its config says, got "),
        (changed("vit.layernorm.weight", 8), r"vit.layernorm.weight .* shape \(16,\), as its config says, got \(8,\)"),
        (changed("vit.embeddings.cls_token", 16), r"cls_token .* shape \(1, 1, 16\), as its config says, got \(16,\)"),
        (changed(PROJECTION, (8, 6, 4, 4)), r"projection.weight .* shape \(16, 3, 4, 4\), .*, got \(8, 6, 4, 4\)"),
        (changed(PROJECTION, (16, 12, 2, 2)), r"projection.weight .* shape \(16, 3, 4, 4\), .*, got \(16, 12, 2, 2\)"),
        (changed(POSITIONS, (1, 10, 16)), r"position_embeddings .* shape \(1, 5, 16\), .*, got \(1, 10, 16\)"),
        (changed(POSITIONS, (1, 8, 16)), r"position_embeddings .* shape \(1, 5, 16\), .*, got \(1, 8, 16\)"),
    ],
)
def test_damage_is_named_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        load_vit(folder)
    assert "\n" not in str(caught.value)


def cut(path, end):
    path.write_bytes(path.read_bytes()[:end])


def shard(folder, parts=3):
    """The arrays in several files and an index, as transformers writes large checkpoints."""
    arrays, listed = load_file(folder / ARRAYS), {}
    for part in range(parts):
        name = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        mine = dict(list(arrays.items())[part::parts])
        save_file(mine, folder / name)
        listed |= dict.fromkeys(mine, name)
    (folder / ARRAYS).unlink()
    write_index(folder, listed)
    return listed


def write_index(folder, listed):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def test_in_several_files_the_weights_are_the_same(folder, monkeypatch):
    shard(folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert_same(values(load_vit("~/weights").model), values(network()))


FIRST = "model-00001-of-00003.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f, _: (f / FIRST).unlink(), f"index.json must name files in '.*', got '{FIRST}'"),
        (lambda f, _: cut(f / FIRST, -1), f"{FIRST} must be a whole safetensors file, got "),
        (
            lambda f, old: write_index(f, old | {POSITIONS: "../../x.safetensors"}),
            "index.json must name safetensors",
        ),
        (lambda f, old: write_index(f, old | {POSITIONS: "config.json"}), "index.json must name safetensors files in"),
        (
            lambda f, old: write_index(f, dict.fromkeys(old, FIRST)),
            f"must name the file of each array, got {FIRST}",
        ),
        (lambda f, _: write_index(f, {}), "index.json must hold a weight_map from .*, got dict"),
        (
            lambda f, _: write_index(f, {POSITIONS: 1}),
            "index.json must hold a weight_map from .*, got dict",
        ),
        (
            lambda f, _: (f / INDEX).write_text("{}"),
            "index.json must hold a weight_map from .*, got None",
        ),
    ],
)
def test_damage_to_several_files_is_named(folder, damage, message):
    damage(folder, shard(folder))
    with pytest.raises(InputError, match=message):
        load_vit(folder)


def test_without_biases_of_queries_keys_and_values_they_are_zero(folder):
    arrays = load_file(folder / ARRAYS)
    left = [name for name in arrays if name.endswith(("query.bias", "key.bias", "value.bias"))]
    assert len(left) == 6
    kept = {name: array for name, array in arrays.items() if name not in left}
    save_file(kept, folder / ARRAYS)
    with pytest.raises(InputError, match=r"must hold vit\.\S+\.query\.bias, got 34 other arrays"):
        load_vit(folder)
    described(qkv_bias=False)(folder)
    loaded = values(load_vit(folder).model)
    missing = [f"blocks/{block}/attention/{name}/bias" for block in (0, 1) for name in ("query", "key", "value")]
    assert_same(loaded, values(network()), besides=missing)
    assert not any(np.any(loaded[path]) for path in missing)
    save_file(arrays, folder / ARRAYS)
    with pytest.raises(InputError, match=r"must hold a ViT's arrays, got vit\.\S+\.(query|key|value)\.bias"):
        load_vit(folder)


@pytest.mark.parametrize("kind", ["F64", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_weights_of_every_floating_point_kind_are_read(folder, kind):
    """Written byte for byte as the format has it; what each kind rounds to is ml_dtypes' own."""
    stored = {name: array.astype(KINDS[kind]) for name, array in load_file(folder / ARRAYS).items()}
    header, data = {}, b""
    for name, array in stored.items():
        ends = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": ends}
        data += array.tobytes()
    said = json.dumps(header).encode()
    (folder / ARRAYS).write_bytes(len(said).to_bytes(8, "little") + said + data)
    loaded = values(load_vit(folder).model)
    expected = stored["vit.encoder.layer.1.intermediate.dense.weight"].astype(np.float32).T
    np.testing.assert_array_equal(loaded["blocks/1/mlp/up/kernel"], expected)
    assert np.unique(expected).size > 50


def test_images_that_are_not_normalised_stay_as_they_are(folder):
    (folder / PIXELS).write_text(json.dumps({"do_normalize": False, "image_mean": [0.5], "image_std": [0.5]}))
    assert load_vit(folder)[1:] == (0.0, 1.0)


def test_a_model_beyond_memory_is_refused_before_it_is_made(saved, monkeypatch):
    monkeypatch.setattr("lora_flow.runtime.memory.free", lambda: 2.0**20)
    with pytest.raises(InputError, match=r"weights must be small enough for the 1.05 MB .*, got .*4000 x 4000, which"):
        load_vit(saved, image_size=4000)


def test_a_size_that_the_patches_do_not_tile_is_refused(saved):
    with pytest.raises(InputError, match=r"image_size must be a multiple of patch_size \(4\), got 10"):
        load_vit(saved, image_size=10)


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A hub with one checkpoint at one commit, and a cache as huggingface_hub keeps it: links to files by checksum."""
    api, commit, asked = pytest.importorskip("huggingface_hub"), "c0ffee" * 6 + "cafe", []
    place = tmp_path / "cache" / "snapshots" / commit
    place.mkdir(parents=True)

    def download(name, revision, allow_patterns):
        asked.append((name, revision, tuple(allow_patterns)))
        for one in allow_patterns:
            if (folder / one).is_file() and not (place / one).is_file():
                content = (folder / one).read_bytes()
                git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                blob = hashlib.sha256(content).hexdigest() if one.endswith(".safetensors") else git
                (tmp_path / "cache" / blob).write_bytes(content)
                (place / one).symlink_to(tmp_path / "cache" / blob)
        return str(place)

    class Api:
        def model_info(self, name, revision, files_metadata):
            sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
            sibling = [type("Sibling", (), {"rfilename": name, "size": size}) for name, size in sizes.items()]
            return type("Info", (), {"siblings": sibling})

    monkeypatch.setattr(api, "snapshot_download", download)
    monkeypatch.setattr(api, "HfApi", Api)
    return asked, commit, place


@pytest.mark.parametrize("parts", [1, 3])
def test_the_hub_gives_a_commit_whose_files_are_verified_each_time(folder, hub, parts):
    asked, commit, place = hub
    if parts > 1:
        shard(folder)
    assert checkpoint(VisionSettings(weights="a/b", revision="main")) == (place, commit)
    assert asked[0][:2] == ("a/b", "main")
    assert_same(values(load_vit(fetch("a/b", commit).folder).model), values(network()))
    assert {revision for _, revision, _ in asked[1:]} == {commit}
    for damaged in (FIRST if parts > 1 else ARRAYS, SIZES, PIXELS):
        blob = (place / damaged).resolve()
        whole = blob.read_bytes()
        blob.write_bytes(whole[:-2] + b" " + whole[-1:])  # of the same length, and JSON still
        with pytest.raises(InputError, match=f"{damaged}' must have the hub's checksum {blob.name}, got .*delete it"):
            fetch("a/b", commit)
        blob.write_bytes(whole)


def test_what_is_no_vit_or_too_large_is_not_downloaded_from_the_hub(folder, hub, monkeypatch):
    asked, _, place = hub
    monkeypatch.setattr("lora_flow.runtime.memory.free", lambda: 1000.0)
    with pytest.raises(InputError, match=r"weights must be small enough for the 1 kB of memory .*, got 'a/b', which"):
        fetch("a/b")
    (place / SIZES).unlink()
    described(model_type="llama")(folder)
    with pytest.raises(InputError, match="must describe a model of type vit, got llama"):
        fetch("a/b")
    assert not any(ARRAYS in patterns for _, _, patterns in asked)


def test_the_hub_is_asked_by_https_only(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub.example")
    with pytest.raises(InputError, match=r"HF_ENDPOINT must begin with https://, got http://hub.example"):
        fetch("a/b")
    assert not hub[0]


def test_a_revision_is_for_the_hub_alone(saved):
    with pytest.raises(InputError, match="revision must be left out unless weights is a name on the hub, got 'main'"):
        checkpoint(VisionSettings(weights=str(saved), revision="main"))


def test_what_the_hub_does_not_give_is_named(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def fail(name, **_):
        raise OSError(f"no network\nfor {name}")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(
        InputError, match=r"weights must be a folder or a name that the hub knows, got 'a/b': no network$"
    ):
        fetch("a/b")


def test_the_shipped_weights_are_those_of_the_tiny_config_and_serve_digits_that_they_never_saw():
    """Pretrained on garments; the same probe of the pixels themselves reaches .971, of these features .982."""
    shipped = load_vit(SHIPPED)
    assert shipped.model.config == CONFIGS["tiny"]
    assert all(np.all(np.isfinite(value)) for value in values(shipped.model).values())
    assert (SHIPPED / ARRAYS).stat().st_size < 2e6
    assert linear_probe(shipped.model) > 0.975
    assert load_vit().model.config == shipped.model.config


def test_weights_are_kept_in_single_precision_whatever_products_are_in(saved):
    loaded = load_vit(saved, dtype=jnp.bfloat16).model
    assert_same(values(loaded), values(network()))
    assert loaded.head.dtype == jnp.bfloat16
