"""The same weights give the same logits here and in transformers, and the same adapters here and in PEFT."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lora_flow_vision.config import ViTConfig
from lora_flow_vision.lora import Spec, attach, choose, linear_layers
from lora_flow_vision.model import ViT
from lora_flow_vision.peft import export_peft, import_peft
from lora_flow_vision.weights import load_vit, module_name, parameters, save_vit
from safetensors.numpy import load_file, save_file

from lora_flow import Adapter, InputError

# PEFT asks transformers for a property that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CLASSES = 5
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """Here and not above, where every worker would wait for them though one runs this file."""
    global torch, transformers, peft
    torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))


def theirs(kind="ViTForImageClassification", channels=3, depth=2, seed=0, **changed):
    """A model of transformers with every parameter drawn, so that none can be left out unseen."""
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=24,
        layer_norm_eps=1e-3,
        image_size=12,
        patch_size=4,
        num_channels=channels,
        num_labels=CLASSES,
        **changed,
    )
    return draw(getattr(transformers, kind)(config), seed)


def draw(model, seed=0, having=""):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if having in name:
                param.copy_(torch.randn(param.shape, generator=generator) * 0.3 + ("layernorm" in name))
    return model.eval()


def both(folder, **changed):
    """A model of transformers and what `load_vit` makes of the folder that it saves."""
    model = theirs(**changed)
    model.save_pretrained(folder)
    return model, load_vit(folder).model


def images(channels=3, size=12):
    return np.random.default_rng(0).standard_normal((4, size, size, channels)).astype(np.float32)


def run(model, x, **how):
    """Their output for our images, `(batch, height, width, channels)`."""
    with torch.no_grad():
        return model.eval()(torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))), **how)


def assert_same_logits(model, vit, x=None, **how):
    x = images() if x is None else x
    logits = np.asarray(vit(jnp.asarray(x)))
    assert logits.dtype == np.float32
    expected = run(model, x, **how).logits.numpy()
    size = max(1.0, np.abs(expected).max())  # single precision rounds in proportion, in whatever order threads add
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * size)
    assert np.ptp(logits, axis=0).min() > 0.01  # the images differ, so equal logits say something


@pytest.mark.parametrize("channels", [1, 3])
def test_a_checkpoint_of_transformers_has_the_same_tokens_and_logits_here(tmp_path, channels):
    model, vit = both(tmp_path, channels=channels)
    x = images(channels)
    tokens = run(model.vit.embeddings, x).numpy()
    np.testing.assert_allclose(np.asarray(vit.embedding(jnp.asarray(x))), tokens, rtol=0, atol=1e-5)
    assert_same_logits(model, vit, x)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_checkpoint_from_here_has_the_same_logits_in_transformers(tmp_path, channels):
    config = ViTConfig(12, 4, channels, width=16, depth=2, heads=2, hidden=24, classes=CLASSES, eps=1e-3)
    vit = ViT(config, nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for param in parameters(vit).values():
        param[...] = jnp.asarray(0.3 * rng.standard_normal(param.shape), jnp.float32)
    save_vit(vit, tmp_path)
    model, told = transformers.ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())  # no array is missing, left over or of another shape
    assert_same_logits(model, vit, images(channels))


@pytest.mark.parametrize("size", [8, 20])
def test_positions_are_interpolated_as_in_transformers(tmp_path, size):
    model, _ = both(tmp_path)
    vit = load_vit(tmp_path, image_size=size).model
    assert_same_logits(model, vit, images(size=size), interpolate_pos_encoding=True)


def without_prefix(folder):
    model = theirs("ViTModel")
    model.save_pretrained(folder)
    assert not any(name.startswith("vit.") for name in load_file(folder / "model.safetensors"))
    return model


def without_classifier(folder):
    model = theirs()
    model.save_pretrained(folder)
    arrays = load_file(folder / "model.safetensors")
    kept = {name: array for name, array in arrays.items() if "classifier" not in name}
    assert len(kept) == len(arrays) - 2
    save_file(kept, folder / "model.safetensors")
    return model.vit


@pytest.mark.parametrize("write", [without_prefix, without_classifier])
@pytest.mark.parametrize("classes", [None, 7])
def test_a_checkpoint_without_a_head_has_the_same_features_and_a_new_head(tmp_path, write, classes):
    model = write(tmp_path)
    vit = load_vit(tmp_path, classes=classes).model
    features = run(model, images()).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(np.asarray(vit.features(jnp.asarray(images()))), features, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(vit(jnp.asarray(images()))), np.zeros((4, classes or 1000)))


@pytest.mark.parametrize("changed", [{"qkv_bias": False}, {"hidden_act": "gelu"}])
def test_in_several_files_and_without_biases_of_queries_the_logits_are_the_same(tmp_path, changed):
    model = theirs(**changed)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_logits(model, load_vit(tmp_path).model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2"])
def test_weights_of_other_kinds_have_the_logits_of_what_they_hold(tmp_path, dtype):
    model = theirs()
    for param in model.parameters():
        param.data = param.data.to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    assert_same_logits(model.float(), load_vit(tmp_path).model)


def test_a_deit_without_a_distillation_token_is_a_vit(tmp_path):
    """Under the names that DeiT has: its own prefix and type, the same layers."""
    model, _ = both(tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    save_file({name.replace("vit.", "deit."): array for name, array in arrays.items()}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "deit"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_logits(model, load_vit(tmp_path).model)


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 12, "patch_size": 4}


@pytest.mark.parametrize(
    ("kind", "config", "told"),
    [
        ("DeiTForImageClassification", "DeiTConfig", "deit, a DeiT with a distillation token"),
        ("DeiTForImageClassificationWithTeacher", "DeiTConfig", "deit, a DeiT with a distillation token"),
        ("Dinov2ForImageClassification", "Dinov2Config", "dinov2, which has layer scale and a head on two tokens"),
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", "dinov2_with_registers, which has layer scale"),
        ("ViTMAEModel", "ViTMAEConfig", "vit_mae, a masked autoencoder"),
    ],
)
def test_networks_that_are_no_plain_vit_are_refused_by_their_names(tmp_path, kind, config, told):
    getattr(transformers, kind)(getattr(transformers, config)(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"config.json must describe a model of type vit, got {told}"):
        load_vit(tmp_path)


def test_a_model_with_adapters_on_it_is_refused_by_what_it_looks_like(tmp_path):
    model = theirs()
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    save_file({name: x.numpy() for name, x in model.state_dict().items()}, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"must hold (a ViT's arrays|vit\.)"):
        load_vit(tmp_path)


SPECS = {
    "head": [Spec("head", 3, 0.7)],
    "one rank and scaling": [Spec("attention/(query|value)", 2), Spec("mlp/(up|down)", 2)],
    "several ranks and scalings": [
        Spec("0/attention/query", 1, 2.0),
        Spec("attention/(query|value)", 4, 0.5),
        Spec("1/mlp/up", 4, -1.5),
        Spec("mlp/(up|down)", 3, 0.7),
        Spec("head", 5, 1 / 3),
    ],
    # from 20 names on PEFT shortens them; the one that is left out must stay out
    "all but one": [Spec("[1-3]/attention/query|attention/(key|value|output)|mlp/(up|down)|head", 2)],
}


def adapters_for(vit, specs, seed=0):
    """Adapters drawn for the layers that the specs choose, and their scalings."""
    rng, layers, chosen = np.random.default_rng(seed), linear_layers(vit), choose(vit, specs)
    adapters = {}
    for path, spec in chosen.items():
        shapes = (spec.rank, layers[path].in_features), (layers[path].out_features, spec.rank)
        adapters[path] = Adapter(*(jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32) for shape in shapes))
    return adapters, {path: spec.scaling for path, spec in chosen.items()}


def carriers(model):
    """The modules that carry adapters in PEFT, by name."""
    found = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    return {name.removeprefix("base_model.model."): module for name, module in found.items()}


@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
def test_exported_adapters_have_the_same_logits_in_peft(tmp_path, specs):
    model, vit = both(tmp_path / "base", depth=4)
    adapters, scaling = adapters_for(vit, specs)
    export_peft(tmp_path / "new" / "adapters", adapters, scaling, base="some/vit")
    before = run(model, images()).logits
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "new" / "adapters")
    attach(vit, adapters, scaling)
    assert_same_logits(adapted, vit)
    assert abs(run(adapted, images()).logits - before).max() > 0.1
    assert len(carriers(adapted)) == len(adapters)
    assert adapted.peft_config["default"].base_model_name_or_path == "some/vit"


def test_one_scaling_is_that_of_every_adapter(tmp_path):
    model, vit = both(tmp_path / "base")
    adapters, _ = adapters_for(vit, [Spec("query", 2), Spec("head", 3)])
    export_peft(tmp_path / "adapters", adapters, 0.5)
    attach(vit, adapters, 0.5)
    assert_same_logits(peft.PeftModel.from_pretrained(model, tmp_path / "adapters"), vit)


def tree(layers):
    """Linear layers under their checkpoint's names, which in transformers 4 are those in memory."""
    root = torch.nn.ModuleDict()
    for path, layer in layers.items():
        *parents, name = module_name(path).split(".")
        at = root
        for part in parents:
            if part not in at:
                at[part] = torch.nn.ModuleDict()
            at = at[part]
        at[name] = torch.nn.Linear(layer.in_features, layer.out_features)
    return root


@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
def test_under_the_names_of_transformers_4_peft_adds_the_same_products_to_the_same_layers(tmp_path, specs):
    vit = ViT(ViTConfig(12, 4, 3, width=16, depth=4, heads=2, hidden=24, classes=CLASSES), nnx.Rngs(0))
    adapters, scaling = adapters_for(vit, specs)
    export_peft(tmp_path, adapters, scaling, transformers=4)
    found = carriers(peft.PeftModel.from_pretrained(tree(linear_layers(vit)), tmp_path))
    assert set(found) == {module_name(path) for path in adapters}
    for path, adapter in adapters.items():
        added = found[module_name(path)].get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(added, scaling[path] * np.asarray(adapter.b @ adapter.a), rtol=0, atol=1e-6)


PATTERNS = {
    "rank_pattern": {r"1\.mlp\.fc1": 1, "o_proj": 2},
    "alpha_pattern": {"[qv]_proj": 5, "q_proj": 9, "0.mlp.fc2": 20},  # of two that match, the first counts
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("patterns", [{}, PATTERNS], ids=["alike", "patterns"])
def test_adapters_from_peft_have_the_same_logits_here(tmp_path, rslora, patterns):
    model, vit = both(tmp_path / "base")
    targets = ["q_proj", "v_proj", "o_proj", "fc1", "fc2", "classifier"]
    settings = peft.LoraConfig(r=3, lora_alpha=7, lora_dropout=0.5, target_modules=targets, use_rslora=rslora)
    for name, value in patterns.items():
        setattr(settings, name, value)
    adapted = draw(peft.get_peft_model(model, settings), having="lora_B")
    adapted.save_pretrained(tmp_path / "adapters")
    adapters, scaling = import_peft(tmp_path / "adapters")
    assert len(adapters) == 11
    attach(vit, adapters, scaling)
    assert_same_logits(adapted, vit)


@pytest.mark.parametrize("how", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["classifier", "layernorm_after"]}])
def test_a_classifier_that_peft_trained_as_a_whole_has_the_same_logits_here(tmp_path, how):
    model, _ = both(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], **how))
    draw(adapted, having="lora_B")
    draw(adapted, seed=5, having="modules_to_save")
    adapted.save_pretrained(tmp_path / "adapters")
    vit = load_vit(tmp_path / "base").model
    before = np.asarray(vit(jnp.asarray(images())))
    attach(vit, *import_peft(tmp_path / "adapters", vit))
    assert_same_logits(adapted.base_model, vit)  # around it, SEQ_CLS asks for tokens
    assert abs(np.asarray(vit(jnp.asarray(images()))) - before).max() > 0.1
    other = load_vit(tmp_path / "base", classes=7).model
    with pytest.raises(InputError, match=r"classifier\.\w+ in .* must fit the model, whose head has shape .*7"):
        import_peft(tmp_path / "adapters", other)


def test_adapters_of_a_model_without_a_head_are_those_of_its_blocks(tmp_path):
    model = theirs("ViTModel")
    model.save_pretrained(tmp_path / "base")
    vit = load_vit(tmp_path / "base").model
    settings = peft.LoraConfig(r=2, target_modules=["k_proj", "fc1"])
    adapted = draw(peft.get_peft_model(model, settings), having="lora_B")
    adapted.save_pretrained(tmp_path / "adapters")
    adapters, scaling = import_peft(tmp_path / "adapters")
    assert set(adapters) == {f"blocks/{block}/{layer}" for block in (0, 1) for layer in ("attention/key", "mlp/up")}
    attach(vit, adapters, scaling)
    features = run(adapted, images()).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(np.asarray(vit.features(jnp.asarray(images()))), features, rtol=0, atol=1e-5)
