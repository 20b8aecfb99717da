"""Adapters in PEFT's layout: to the last bit there and back, and what is no such folder is refused."""

import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from lora_flow_vision.peft import export_peft, import_peft
from safetensors.numpy import save_file
from small import SHALLOW, network

from lora_flow import Adapter, InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

PATHS = [f"blocks/{block}/{layer}" for block in (0, 11) for layer in ("attention/output", "mlp/down")] + ["head"]


def drawn(paths=PATHS, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {path: ((rank, 6), (4, rank)) for path, rank in zip(paths, (1, 2, 3, 4, 3), strict=False)}
    draw = {path: [rng.standard_normal(shape).astype(dtype) for shape in pair] for path, pair in shapes.items()}
    return {path: Adapter(*pair) for path, pair in draw.items()}


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_export_and_import_give_back_the_same_to_the_last_bit(tmp_path, version, dtype):
    adapters = drawn(dtype=dtype)
    # 0.7 and many others are not the quotient of any double by 3
    for scaling in ([0.7] * 5, [1 / 3, 0.1, 0.7, 16 / 3, 0.0], list(np.random.default_rng(0).normal(size=5))):
        scalings = dict(zip(adapters, scaling, strict=True))
        export_peft(tmp_path, adapters, scalings, transformers=version)
        again, told = import_peft(tmp_path)
        assert told == scalings
        assert again.keys() == adapters.keys()
        for path, adapter in adapters.items():
            for factor, read in zip(adapter, again[path], strict=True):
                assert read.dtype == dtype
                np.testing.assert_array_equal(read, factor)


def test_a_lora_alpha_that_was_changed_after_the_export_counts(tmp_path):
    export_peft(tmp_path, drawn(["head"]), 0.7)
    changed = json.loads((tmp_path / CONFIG).read_text()) | {"lora_alpha": 3}
    (tmp_path / CONFIG).write_text(json.dumps(changed))
    assert import_peft(tmp_path)[1] == {"head": 3.0}


def test_the_first_pattern_of_peft_that_matches_counts(tmp_path):
    export_peft(tmp_path, drawn(["head"]), 0.7)
    patterns = {"query": 1, "class.*": 5, "classifier": 9}
    settings = json.loads((tmp_path / CONFIG).read_text()) | {"alpha_pattern": patterns}
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    assert import_peft(tmp_path)[1] == {"head": 5.0}


A, B = np.zeros((2, 6), np.float32), np.zeros((4, 2), np.float32)


@pytest.mark.parametrize(
    ("adapters", "how", "message"),
    [
        ({}, {}, "adapters must hold at least one layer's, got none"),
        ({"norm": Adapter(A, B)}, {}, "adapters must be on head or on blocks/0/ and so on with .*, got norm"),
        ({"blocks/0/norm_mlp": Adapter(A, B)}, {}, "adapters must be on head or .*, got blocks/0/norm_mlp"),
        ({"mlp/up": Adapter(A, B)}, {}, "adapters must be on head or .*, got mlp/up"),
        (
            {"head": Adapter(A, B.T)},
            {},
            r"adapters of head must have shapes \(rank, in\) and \(out, rank\), got \(2, 6\) ",
        ),
        ({"head": Adapter(A[None], B[None])}, {}, r"adapters of head must .*, got \(1, 2, 6\) and \(1, 4, 2\)"),
        ({"head": Adapter(A[:0], B[:, :0])}, {}, r"adapters of head must .*, got \(0, 6\) and \(4, 0\)"),
        ({"head": Adapter(A, B)}, {"scaling": {}}, "scaling must be given for every adapter, got none for head"),
        ({"head": Adapter(A, B)}, {"scaling": float("nan")}, "scaling must be finite, got nan"),
        ({"head": Adapter(A, B)}, {"transformers": 3}, "transformers must be 4 or 5, got 3"),
    ],
)
def test_bad_adapters_are_named_and_nothing_is_written(tmp_path, adapters, how, message):
    with pytest.raises(InputError, match=message):
        export_peft(tmp_path / "adapters", adapters, **how)
    assert not (tmp_path / "adapters").exists()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    export_peft(folder, {"head": Adapter(A, B), "blocks/0/mlp/up": Adapter(A[:1], B[:, :1])})
    return folder


def refused(folder, message):
    with pytest.raises(InputError, match=message) as caught:
        import_peft(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"peft_type": "LOHA"}, r"peft_type in .*adapter_config.json must be LORA, got LOHA$"),
        ({"peft_type": None}, r"peft_type in .* must be LORA, got None$"),
        ({"use_dora": True}, "use_dora in .*adapter_config.json must be off, got True$"),
        ({"bias": "lora_only"}, "bias in .*adapter_config.json must be none, got lora_only$"),
        ({"lora_bias": True}, "lora_bias in .*adapter_config.json must be off, got True$"),
        ({"modules_to_save": "classifier"}, r"modules_to_save in .* must be a list of names, got classifier$"),
        ({"use_qalora": True}, "use_qalora in .*adapter_config.json must be off, got True$"),
        ({"layer_replication": [[0, 1]]}, r"layer_replication in .* must be off, got \[\[0, 1\]\]$"),
        ({"r": 10**400}, "r of classifier in .*adapter_config.json must be a finite number, got 1000"),
        ({"r": True}, "r of classifier in .*adapter_config.json must be a finite number, got True$"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights in .* must be true, false .*, got pissa_niter_4$"),
        ({"r": 8}, r"lora_A of classifier in .*safetensors must have rank 8, as .*json, got 2$"),
        ({"r": None}, "r of classifier in .*adapter_config.json must be a finite number, got None$"),
        ({"lora_alpha": "16"}, "lora_alpha of classifier in .* must be a finite number, got 16$"),
        ({"lora_alpha": float("nan")}, "lora_alpha of classifier in .* must be a finite number, got nan$"),
        ({"alpha_pattern": ["classifier"]}, r"alpha_pattern in .* must be an object, got \['classifier'\]$"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern in .* must hold regular expressions, got "),
    ],
)
def test_settings_of_other_methods_and_damaged_ones_are_refused(tmp_path, written, changed, message):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | changed))
    refused(tmp_path, message)


HEAD = "base_model.model.classifier"
QUERY = "base_model.model.vit.encoder.layer.0.attention.attention.query"


def with_whole(folder, arrays, saved=("classifier", "score")):
    """Adapters of one layer beside arrays of whole modules, as PEFT writes them for its task type SEQ_CLS."""
    export_peft(folder, {"blocks/0/attention/query": Adapter(np.ones((2, 16)), np.ones((16, 2)))}, transformers=4)
    factors = {
        name: np.ones(shape)
        for name, shape in ((f"{QUERY}.lora_A.weight", (2, 16)), (f"{QUERY}.lora_B.weight", (16, 2)))
    }
    save_file(factors | arrays, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text()) | {"modules_to_save": list(saved)}
    (folder / CONFIG).write_text(json.dumps(config))


WHOLE = {f"{HEAD}.weight": np.arange(160, dtype=np.float32).reshape(10, 16), f"{HEAD}.bias": np.ones(10, np.float32)}


def test_a_whole_classifier_beside_adapters_goes_into_the_model(tmp_path):
    norm = {"base_model.model.vit.layernorm.weight": np.full(16, 2.0, np.float32)}
    with_whole(tmp_path, WHOLE | norm, saved=["classifier", "layernorm"])
    refused(tmp_path, r"classifier in .*, which was trained as a whole, must come with the model .*, got no model$")
    model = network(SHALLOW)
    adapters, scaling = import_peft(tmp_path, model)
    assert scaling == {"blocks/0/attention/query": 1.0}
    np.testing.assert_array_equal(adapters["blocks/0/attention/query"].a, np.ones((2, 16)))
    np.testing.assert_array_equal(model.head.kernel[...], WHOLE[f"{HEAD}.weight"].T)
    np.testing.assert_array_equal(model.head.bias[...], np.ones(10))
    np.testing.assert_array_equal(model.norm.scale[...], np.full(16, 2.0))


@pytest.mark.parametrize(
    ("arrays", "saved", "message"),
    [
        ({f"{HEAD}.weight": np.ones((5, 16))}, ["classifier"], r"whose head has shape \(16, 10\), got \(16, 5\)$"),
        (WHOLE, ["score"], r"must hold only lora_A.weight and .* of layers, got .*classifier.(weight|bias)$"),
        ({f"{HEAD}.scale": np.ones(5)}, ["classifier"], "must hold only lora_A.weight and .*, got .*classifier.scale$"),
        ({"base_model.model.vit.pooler.weight": A}, ["pooler"], "must hold only lora_A.weight .*, got .*pooler.weight"),
        ({f"{HEAD}.weight": np.full((10, 16), np.nan)}, ["classifier"], "classifier.weight in .* must be finite as"),
    ],
)
def test_whole_modules_that_do_not_fit_are_named_and_the_model_stays(tmp_path, arrays, saved, message):
    with_whole(tmp_path, arrays, saved)
    model = network(SHALLOW)
    with pytest.raises(InputError, match=message):
        import_peft(tmp_path, model)
    np.testing.assert_array_equal(model.head.kernel[...], network(SHALLOW).head.kernel[...])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "adapter_model.safetensors must hold at least one adapter, got none$"),
        ({f"{HEAD}.weight": A}, f"must hold only lora_A.weight and lora_B.weight of layers, got {HEAD}.weight$"),
        ({f"{HEAD}.lora_magnitude_vector": A}, "must hold only lora_A.weight and .*, got .*magnitude_vector$"),
        ({f"{HEAD}.lora_A.weight": A}, "classifier in .* must have lora_A and lora_B, got only lora_A$"),
        (
            {f"{HEAD}.lora_A.weight": A, f"{HEAD}.lora_B.weight": B.T},
            r"lora_A and lora_B of classifier in .* must have shapes .*, got \(2, 6\) and \(2, 4\)$",
        ),
        *(
            (
                {f"base_model.model.{module}.lora_A.weight": A, f"base_model.model.{module}.lora_B.weight": B},
                f"must hold adapters of a ViT's linear layers, got one of {re.escape(module)}$",
            )
            for module in (
                "model.layers.0.self_attn.q_proj",
                "vit.layers.0.mlp.gate_proj",
                "vit.encoder.layer.0.layernorm_before",
                "vit.pooler.dense",
            )
        ),
    ],
)
def test_arrays_other_than_adapters_of_a_vit_are_refused(tmp_path, written, arrays, message):
    shutil.copy(written / CONFIG, tmp_path)
    save_file(arrays, tmp_path / WEIGHTS)
    refused(tmp_path, message)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (CONFIG, Path.unlink, "folder must hold adapter_config.json and .*, got no .*adapter_config.json$"),
        (WEIGHTS, Path.unlink, "folder must hold adapter_config.json and .*, got no .*adapter_model.safetensors$"),
        (CONFIG, lambda path: path.write_text("{"), "adapter_config.json must be a JSON file, got Expecting"),
        (CONFIG, lambda path: path.write_bytes(b"\xff"), "adapter_config.json must be a JSON file, got .*utf-8"),
        (CONFIG, lambda path: path.write_text("[]"), "adapter_config.json must hold a JSON object, got list$"),
        (WEIGHTS, lambda path: path.write_bytes(b""), "must be a whole safetensors file, got .*header too small"),
        (WEIGHTS, lambda path: path.write_bytes(path.read_bytes()[:-1]), "must be a whole safetensors file, got "),
    ],
)
def test_missing_and_damaged_files_are_named(tmp_path, written, name, damage, message):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / name)
    refused(tmp_path, message)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    if not (tmp_path / WEIGHTS).exists():
        refused(tmp_path, "got no .*, but adapter_model.bin, which is pickled: save it as safetensors$")
    refused(tmp_path / "nowhere", "folder must hold adapter_config.json and adapter_model.safetensors, got no ")
