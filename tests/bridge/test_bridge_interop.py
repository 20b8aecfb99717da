"""Starts of tiny models of transformers: PEFT loads every scheme's folder, and the model computes what theory says."""

import copy
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_flow import INITIALIZATIONS, InputError, observed_told, peft_convert, peft_init, peft_observe
from lora_flow.bridge.peft_folder import read_peft

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
RANK, SCALING = 4, 0.5
SCHEMES = [name for name, scheme in INITIALIZATIONS.items() if not scheme.network]
OFFSETS = [name for name in SCHEMES if INITIALIZATIONS[name].offset]
TARGETS = {
    "llama": r".*_proj",
    "gpt2": r"c_attn|c_proj|c_fc",
    "bert": r"query|key|value|.*\.dense",
    "vit": r"attention\.(query|value)|(intermediate|layer\.\d\.output)\.dense",
}


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """Here and not above, where every worker would wait for them though one runs this file."""
    global torch, transformers, peft, bridge
    torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))
    from lora_flow.bridge import torch as bridge


def made(kind):
    """A tiny model with every parameter drawn."""
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
        model = transformers.LlamaForCausalLM(config)
    elif kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16)
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "bert":
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
        )
        model = transformers.BertForSequenceClassification(config)
    else:
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
        )
        model = transformers.ViTForImageClassification(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, param in model.named_parameters():
            if param.ndim > 1:
                param.copy_(torch.randn(param.shape, generator=generator) * 0.2)
    return model.eval()


def batches(kind):
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        if kind == "vit":
            images = torch.randn((3, 3, 8, 8), generator=generator)
            yield {"pixel_values": images, "labels": torch.tensor([0, 1, 1])}
        else:
            words = torch.randint(0, 50, (3, 7), generator=generator)
            yield {"input_ids": words, "labels": words if kind != "bert" else torch.tensor([0, 1, 1])}


def logits(model, kind):
    with torch.no_grad():
        return model(**next(iter(batches(kind)))).logits.numpy()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By kind, a model, and the files of its checkpoint, gradients, inputs and names."""
    found = {}
    for kind, targets in TARGETS.items():
        folder, model = tmp_path_factory.mktemp(kind), made(kind)
        model.save_pretrained(folder)
        names = bridge.names(model, folder, folder / "names.json")
        inverse = {value: key for key, value in names.items()}
        for batch in batches(kind):
            (model(**batch).loss / 2).backward()
        gradients, inputs = {}, {}
        for name, param in model.named_parameters():
            module = inverse.get(name.removesuffix(".weight"))
            if module is not None and param.ndim == 2:
                gradients[f"{module}.weight"] = param.grad.numpy()
                width = param.shape[0] if kind == "gpt2" else param.shape[1]
                inputs[f"{module}.inputs"] = np.random.default_rng(0).standard_normal((40, width)).astype(np.float32)
        save_file(gradients, folder / "gradients.safetensors")
        save_file(inputs, folder / "activations.safetensors")
        model.zero_grad()
        files = {name: folder / f"{name}.safetensors" for name in ("gradients", "activations")}
        files |= {"checkpoint": folder / "model.safetensors", "names": folder / "names.json", "targets": targets}
        found[kind] = model, files | {"progress": False, "rank": RANK, "scaling": SCALING}, inverse
    return found


def weights_of(model):
    """Each module's weight, `(out, in)`."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 2:
            turned = weight.T if type(module).__name__ == "Conv1D" else weight
            found[name] = turned.detach().numpy().astype(float)
    return found


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("init", SCHEMES)
def test_peft_loads_every_scheme_and_the_model_is_what_it_should_be(models, tmp_path, kind, init):
    model, files, _ = models[kind]
    peft_init(**files, out=tmp_path / "start", init=init)
    stored, before = read_peft(tmp_path / "start"), logits(model, kind)
    size = np.abs(before).max()
    if init in OFFSETS:
        for how in ("adapter", "subtract"):
            adapted = bridge.apply_start(copy.deepcopy(model), tmp_path / "start", how)
            np.testing.assert_allclose(logits(adapted, kind), before, rtol=0, atol=1e-5 * max(size, 1))
            trained = [name for name, param in adapted.named_parameters() if param.requires_grad]
            assert len(trained) == 2 * len(stored.adapters)
            assert all(".default." in name for name in trained)
        return
    adapted = bridge.apply_start(copy.deepcopy(model), tmp_path / "start")
    by_hand = copy.deepcopy(model)
    modules = dict(by_hand.named_modules())
    with torch.no_grad():
        for module, (a, b) in stored.adapters.items():
            change = torch.from_numpy(SCALING * b @ a)
            modules[module].weight += change.T if type(modules[module]).__name__ == "Conv1D" else change
    np.testing.assert_allclose(logits(adapted, kind), logits(by_hand, kind), rtol=0, atol=1e-5 * max(size, 1))
    loaded = {name: one for name, one in adapted.named_modules() if hasattr(one, "lora_A")}
    assert {name.removeprefix("base_model.model.") for name in loaded} == set(stored.adapters)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_peft_s_own_start_is_the_same_up_to_signs(models, tmp_path, kind, init):
    model, files, _ = models[kind]
    peft_init(**files, out=tmp_path / "start", init=init)
    stored, weights = read_peft(tmp_path / "start"), weights_of(model)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=SCALING * RANK,
        target_modules=list(stored.adapters),
        init_lora_weights=init,
        fan_in_fan_out=kind == "gpt2",
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A"):
            a, b = (getattr(module, f"lora_{letter}")["default"].weight.detach().numpy() for letter in "AB")
            mine = stored.adapters[name.removeprefix("base_model.model.")]
            if kind == "gpt2" and init == "olora":
                continue  # PEFT factorises Conv1D's weight as it is stored, (in, out)
            s = np.linalg.svd(weights[name.removeprefix("base_model.model.")], compute_uv=False)
            gap = s[RANK - 1] / (s[RANK - 1] - s[RANK])  # by which PEFT's rounding to single precision turns its space
            size = np.abs(b @ a).max() * (gap if init == "pissa" else 1)
            np.testing.assert_allclose(mine.b @ mine.a, b @ a, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize("init", OFFSETS)
def test_after_some_steps_three_ways_are_one_model(models, tmp_path, init):
    """The second adapter, subtraction in place, and the trained adapter as plain LoRA of twice the rank."""
    model, files, _ = models["llama"]
    peft_init(**files, out=tmp_path / "start", init=init, size=0.2)
    results = {}
    for how in ("adapter", "subtract"):
        adapted = bridge.apply_start(copy.deepcopy(model), tmp_path / "start", how)
        step = torch.optim.SGD([param for param in adapted.parameters() if param.requires_grad], 0.05)
        for _ in range(3):
            for batch in batches("llama"):
                step.zero_grad()
                adapted(**batch).loss.backward()
                step.step()
        results[how] = logits(adapted, "llama")
        if how == "adapter":
            adapted.save_pretrained(tmp_path / "trained", selected_adapters=["default"])
    assert np.abs(results["adapter"] - logits(model, "llama")).max() > 1e-3
    np.testing.assert_allclose(results["subtract"], results["adapter"], rtol=0, atol=2e-5)
    peft_convert(tmp_path / "trained", tmp_path / "start", tmp_path / "plain")
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "plain"))
    np.testing.assert_allclose(logits(plain, "llama"), results["adapter"], rtol=0, atol=2e-5)


def test_the_adapters_of_peft_come_back_as_it_wrote_them(models, tmp_path):
    from lora_flow.bridge.peft_folder import write_peft

    model, _, _ = models["gpt2"]
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["c_attn", "c_fc"],
        rank_pattern={"c_fc": 2},
        use_rslora=True,
        fan_in_fan_out=True,
        lora_dropout=0.25,
        task_type="CAUSAL_LM",
    )
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / "theirs")
    read = read_peft(tmp_path / "theirs")
    write_peft(tmp_path / "ours", read)
    one, other = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours"))
    assert one == other
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours"))
    scalings = {name: one.scaling["default"] for name, one in loaded.named_modules() if hasattr(one, "lora_A")}
    for name, s in scalings.items():
        assert read.scalings[name.removeprefix("base_model.model.")] == pytest.approx(s)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_collected_factors_are_the_gradient_s_leading_directions(models, tmp_path, kind):
    """Whose memory is freed layer by layer, and whose model is left as it was."""
    model, files, inverse = models[kind]
    needs = [param.requires_grad for param in model.parameters()]
    targets = TARGETS[kind]
    moved = bridge.collect(
        model, lambda: batches(kind), tmp_path / "thin.safetensors", targets=targets, rank=2, passes=4
    )
    assert [param.requires_grad for param in model.parameters()] == needs
    assert all(param.grad is None for param in model.parameters())
    thin, whole = load_file(tmp_path / "thin.safetensors"), load_file(files["gradients"])
    assert len(moved) == len(thin) / 3
    for name in moved:
        g = whole[f"{inverse[name.removesuffix('.weight')]}.weight"].astype(float)
        _, s, vt = np.linalg.svd(g)
        found = thin[f"{name}.vt"][:2].astype(float)
        outside = found - (found @ vt[:2].T) @ vt[:2]
        assert np.linalg.norm(outside, 2) < 1e-2 * s[1] / (s[1] - s[2]), name
        np.testing.assert_allclose(thin[f"{name}.s"][:2], s[:2], rtol=1e-2)


def test_a_model_without_the_start_s_modules_is_refused(models, tmp_path):
    _, files, _ = models["llama"]
    peft_init(**files, out=tmp_path / "start", init="pissa")
    with pytest.raises(InputError, match=r"model must have the modules of .*, got no model\.layers"):
        bridge.apply_start(made("bert"), tmp_path / "start")
    with pytest.raises(InputError, match="start must be a folder of peft init"):
        bridge.apply_start(made("bert"), tmp_path)


STEPS = {"small": (1e-6, "SGD", 0.1, 300), "default": (1.0, "SGD", 0.1, 100), "adam": (1.0, "AdamW", 2e-3, 100)}


@pytest.fixture(scope="module")
def observed(models, tmp_path_factory):
    """By the kind of start, what short runs of PEFT on a Llama have done, saved as PEFT does every 20 steps."""
    words = torch.randint(0, 50, (6, 7), generator=torch.Generator().manual_seed(1))
    found, folder, model = {}, tmp_path_factory.mktemp("runs"), models["llama"][0]
    whole = copy.deepcopy(model)
    loss = whole(input_ids=words, labels=words).loss
    loss.backward()
    gradients = {name: one.grad.numpy() for name, one in whole.named_parameters() if "_proj" in name}
    save_file(gradients, folder / "gradients.safetensors")
    for kind, (size, optimiser, lr, steps) in STEPS.items():
        torch.manual_seed(3)
        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=r".*_proj")
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        trained = [one for one in adapted.parameters() if one.requires_grad]
        with torch.no_grad():
            for one in trained:  # A; B is 0
                one *= size
        step = getattr(torch.optim, optimiser)(trained, lr)
        adapted.save_pretrained(folder / kind / "checkpoint-0")
        for count in range(1, steps + 1):
            step.zero_grad()
            adapted(input_ids=words, labels=words).loss.backward()
            step.step()
            if count % 20 == 0:
                adapted.save_pretrained(folder / kind / f"checkpoint-{count}")
        files = {"gradients": folder / "gradients.safetensors", "progress": False}
        found[kind] = peft_observe(folder / kind, **files, lr=lr, loss=float(loss))
    return found


def test_small_starts_of_peft_align_at_the_predicted_checkpoints(observed):
    """One checkpoint is 20 steps; the gradient's top pair is what was planted."""
    small = observed["small"]
    assert small.sizes["layer"] == 14
    for name in ("t_align", "t_update", "t1"):
        told = np.isfinite(small[f"{name}_predicted"].values)
        assert told.sum() >= (1 if name == "t1" else 10), name
        np.testing.assert_allclose(small[name].values[told], small[f"{name}_predicted"].values[told], rtol=0, atol=20)
    aligned = np.isfinite(small["t_update_predicted"])
    assert small["update_error"].min("step").values[aligned].max() < 0.1
    before = small["step"] <= float(small["t_fallen_predicted"])
    assert float(small["drift"].where(before).max()) < 0.02


def test_of_peft_s_own_start_theory_tells_no_alignment_and_under_adam_nothing(observed):
    for kind in ("default", "adam"):
        assert np.isinf(observed[kind]["t_update"]).all()
        assert np.isnan(observed[kind]["t_update_predicted"]).all()
    text = "\n".join(observed_told(observed["adam"]))
    assert "Theory does not apply" in text
    assert "Not predicted: the alignment of 14 of 14 layers" in text
    assert float(observed["adam"]["drift"].isel(step=1).min()) > 0.1
    assert float(observed["default"]["drift"].isel(step=1).median()) < 0.1
    assert np.isnan(observed["adam"]["t_fallen_predicted"])
    assert not float(observed["default"]["t_fallen_predicted"]) > 20  # or not told: the layer that leads drifts
