"""Weights come back as they were written, positions go to other grids by cubic convolution, and damage is named."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small import CONFIG, network

from lora_flow import InputError
from vision.config import CONFIGS
from vision.pretrain import linear_probe
from vision.weights import SHIPPED, fetch, load_vit, parameters, resample, save_vit

ARRAYS, SIZES, PIXELS = "model.safetensors", "config.json", "preprocessor_config.json"
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


def changed(name, array):
    """A damage to the arrays: another one under a name, or none."""

    def damage(folder):
        arrays = load_file(folder / ARRAYS)
        arrays.pop(name)
        save_file(arrays | ({} if array is None else {name: np.zeros(array, np.float32)}), folder / ARRAYS)

    return damage


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


def test_a_size_that_the_patches_do_not_tile_is_refused(saved):
    with pytest.raises(InputError, match=r"image_size must be a multiple of patch_size \(4\), got 10"):
        load_vit(saved, image_size=10)


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
