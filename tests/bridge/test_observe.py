"""A run of the simulator read back from PEFT's folders has the simulator's observables, beside what theory predicts."""

import json
import shutil

import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
import xarray as xr
from observed_runs import RANK, SCALING, SHAPES, descents, trained
from picture_faults import faults
from safetensors.numpy import load_file, save_file

from lora_flow import Adapter, InputError, peft_init, peft_observe, read_peft, write_peft
from lora_flow.bridge.observed_told import observed_told
from lora_flow.bridge.watched import Watched, watch
from lora_flow.cli import main
from lora_flow.figures.observed import observed_figure
from lora_flow.theory.lora_one import linear_phase

STEP = 0.05
SIMULATED = {
    "alignment_error": "alignment_error",
    "norm_z": "norm_z1",
    "norm_ba": "norm_b1a1",
    "norm_along": "norm_along1",
    "norm_across": "norm_across1",
    "overlap": "overlap_1",
    "drift": "drift",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"), step=STEP)


@pytest.mark.parametrize(("dtype", "error"), [(np.float64, 1e-9), (np.float32, 1e-5)])
def test_the_simulator_s_observables_come_back(tmp_path, dtype, error):
    files, runs, _ = trained(tmp_path, step=STEP, dtype=dtype)
    dataset = peft_observe(**files)
    assert list(dataset["layer"].values) == list(SHAPES)
    for name, other in SIMULATED.items():
        for layer, one in runs.items():
            mine = dataset[name].sel(layer=layer).values
            floor = error * np.max(np.abs(one.observables[other])) * (1e-2 if name != "drift" else 1)
            np.testing.assert_allclose(mine, one.observables[other], rtol=error, atol=floor, err_msg=name)
    for layer, one in runs.items():
        for place, (a, b) in enumerate(zip(*one.history[0], strict=True)):
            s = np.linalg.svd(SCALING * b @ a, compute_uv=False)[:RANK]
            kept = dataset["singular_value"].sel(layer=layer).values[place]
            np.testing.assert_allclose(kept, s, rtol=0, atol=10 * error * max(s[0], 1e-30))


def test_the_prediction_is_the_closed_form_up_to_a_tenth_of_the_loss(run):
    files, runs, loss = run
    dataset = peft_observe(**files, lr=STEP, loss=loss)
    steps, until = dataset["step"].values, float(dataset["t_fallen_predicted"])
    assert 40 < until < 200
    for name, descent in descents().items():
        u, _, vt = np.linalg.svd(descent)
        a = np.asarray(runs[name].history[0].a[0])
        layer = Watched(u[:, 0], vt[0], SCALING, descent, Adapter(a, np.zeros((len(descent), len(a)))))
        expected = watch(layer, map(Adapter, *linear_phase(descent, a, SCALING * STEP * steps)))
        for what in ("norm_b", "alignment_error", "update_error", "loss_change", "norm_across"):
            found = dataset[f"{what}_predicted"].sel(layer=name).values
            assert np.array_equal(np.isnan(found), (steps > until) | np.isnan(expected[what]))
            kept = np.isfinite(found)
            np.testing.assert_allclose(found[kept], expected[what][kept], rtol=1e-7, atol=1e-12)


def test_small_starts_align_when_predicted_and_the_loss_falls_when_predicted(run):
    files, _, loss = run
    dataset = peft_observe(**files, lr=STEP, loss=loss)
    apart = np.diff(dataset["step"].values)[0]
    assert np.isfinite(dataset["t_update_predicted"]).any()
    for name in ("t_align", "t_update", "t1", "t_fallen"):
        predicted, measured = dataset[f"{name}_predicted"].values, dataset[name].values
        told = np.isfinite(predicted)
        assert told.any(), name
        np.testing.assert_allclose(measured[told], predicted[told], atol=apart, rtol=0)
    assert float(dataset["drift"].max()) < 0.01
    text = "\n".join(observed_told(dataset))
    assert "gradient flow is about this run" in text
    assert "came at the predicted checkpoint or beside it" in text


def test_adam_from_peft_s_default_start_is_not_predicted(tmp_path):
    """B grows by the learning rate a step, whatever the gradient: A A^T - B^T B drifts, and theory keeps quiet."""
    files, _, loss = trained(tmp_path, alpha=0.15, step=optax.adam(2e-2), steps=100, saves=11)
    dataset = peft_observe(**files, lr=2e-2, loss=loss)
    assert float(dataset["drift"].isel(step=1).min()) > dataset.attrs["drift_limit"]
    for name in ("t_align", "t_update", "t1", "t_fallen"):
        assert np.isnan(dataset[f"{name}_predicted"]).all()
    assert np.isnan(dataset["norm_b_predicted"].isel(step=slice(1, None))).all()
    text = "\n".join(observed_told(dataset))
    assert "Theory does not apply: A A^T - B^T B" in text
    assert "Not predicted: the alignment of 2 of 2 layers" in text


def test_without_numbers_the_report_says_which_flag_would_tell(run):
    files, _, _ = run
    plain = peft_observe(files["run"], progress=False)
    assert plain.attrs["direction"] == "the last update"
    np.testing.assert_allclose(plain["update_error"].isel(step=-1), 0, atol=1e-12)
    assert "loss_change" not in plain
    text = "\n".join(observed_told(plain))
    assert "Phases are not predicted: that needs --gradients and --lr." in text
    assert "that needs --loss and --gradients" in text
    text = "\n".join(observed_told(peft_observe(**files)))
    assert "Phases are not predicted: that needs --lr." in text
    dataset = peft_observe(**files, lr=STEP)
    assert np.isfinite(dataset["t_update_predicted"]).all()
    assert np.isnan(dataset["t1_predicted"]).all()
    assert "(a fall of the loss by 10%), is not told: that needs --loss." in "\n".join(observed_told(dataset))


def test_a_run_without_its_start_is_observed_and_not_predicted(run, tmp_path):
    files, _, loss = run
    shutil.copytree(files["run"], tmp_path / "run")
    (tmp_path / "run" / "checkpoint-0").rename(tmp_path / "start")
    without = peft_observe(**files | {"run": tmp_path / "run"}, lr=STEP, loss=loss)
    assert "norm_b_predicted" not in without
    assert np.isnan(without["loss_change"]).all()  # since the start, which nobody knows
    assert "Phases are not predicted: that needs --initial." in "\n".join(observed_told(without))
    given = peft_observe(**files | {"run": tmp_path / "run"}, initial=tmp_path / "start", lr=STEP, loss=loss)
    whole = peft_observe(**files, lr=STEP, loss=loss)
    assert given.drop_attrs().identical(whole.drop_attrs())


def test_the_start_of_a_scheme_that_changes_the_weights_is_taken_off(tmp_path):
    """Its update is what was learnt since; its gradients lie as the checkpoint's weights, here (in, out)."""
    rng = np.random.default_rng(0)
    weights = {"h.0.c_attn.weight": rng.standard_normal((8, 12)), "h.0.c_attn.bias": np.zeros(12)}
    save_file({name: one.astype(np.float32) for name, one in weights.items()}, tmp_path / "model.safetensors")
    gradient = rng.standard_normal((8, 12))
    save_file({"h.0.c_attn.weight": gradient}, tmp_path / "gradients.safetensors")
    peft_init(
        tmp_path / "model.safetensors", tmp_path / "start", targets="c_attn", init="pissa", rank=2, progress=False
    )
    start = read_peft(tmp_path / "start")
    (first,) = start.adapters.values()
    later = type(first)(first.a + 0.1, first.b - 0.2)
    for step, adapter in ((5, first), (10, later)):
        write_peft(tmp_path / "run" / f"step_{step:03d}", start._replace(adapters={"h.0.c_attn": adapter}))
    files = {"run": tmp_path / "run", "initial": tmp_path / "start", "progress": False}
    dataset = peft_observe(**files, gradients=tmp_path / "gradients.safetensors").isel(layer=0)
    assert dataset["step"].values.tolist() == [0, 5, 10]
    update = later.b.astype(float) @ later.a - first.b.astype(float) @ first.a
    np.testing.assert_allclose(dataset["update_norm"], [0, 0, np.linalg.norm(update)], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(dataset["loss_change"], [0, 0, np.sum(gradient.T * update)], rtol=1e-6, atol=1e-12)


def _broken(files, folder, how):
    shutil.copytree(files["run"], folder / "run")
    shutil.copy(files["gradients"], folder / "gradients.safetensors")
    layer, where = next(iter(SHAPES)), folder / "run" / "checkpoint-100" / "adapter_model.safetensors"
    arrays, gradients = load_file(where), load_file(folder / "gradients.safetensors")
    how(folder, arrays, gradients, layer)
    save_file(arrays, where)
    save_file(gradients, folder / "gradients.safetensors")


FACTOR = "base_model.model.{}.lora_A.weight"


def _no_factor(folder, arrays, gradients, layer):
    del arrays[FACTOR.format(layer)]


def _nan(folder, arrays, gradients, layer):
    arrays[FACTOR.format(layer)][0, 0] = np.nan


def _wide(folder, arrays, gradients, layer):
    arrays[FACTOR.format(layer)] = np.ones((RANK, 5))


def _no_layer(folder, arrays, gradients, layer):
    for letter in "AB":
        del arrays[FACTOR.format(layer).replace("lora_A", f"lora_{letter}")]


def _other_gradient(folder, arrays, gradients, layer):
    gradients[f"{layer}.weight"] = np.ones((4, 4))


def _turned(folder, arrays, gradients, layer):
    gradients[f"{layer}.weight"] = np.ones((16, 12))


def _no_gradient(folder, arrays, gradients, layer):
    del gradients[f"{layer}.weight"]


def _nan_gradient(folder, arrays, gradients, layer):
    gradients[f"{layer}.weight"][0, 0] = np.inf


def _no_step(folder, arrays, gradients, layer):
    (folder / "run" / "checkpoint-200").rename(folder / "run" / "last")


def _step_of_another_thing(folder, arrays, gradients, layer):
    (folder / "run" / "checkpoint-200").rename(folder / "run" / "checkpoint-200-v12")


def _same_step(folder, arrays, gradients, layer):
    (folder / "run" / "checkpoint-200").rename(folder / "run" / "again-100")


LAYER = "model.layers.0.q_proj"
BROKEN = {
    _no_factor: rf"{LAYER} in .*checkpoint-100.* must have lora_A and lora_B, got only lora_B",
    _nan: rf"{LAYER}.lora_A.weight in .*checkpoint-100.* must be finite as float64, got 1 entries that are not",
    _wide: rf"lora_A of {LAYER} in .*checkpoint-100.* must have the shape \(3, 16\) that it has in .*, got \(3, 5\)",
    _no_layer: rf"checkpoint-100.* must hold {LAYER}, as .*checkpoint-0.*, got none",
    _other_gradient: rf"the gradient of {LAYER} in .* shape \(12, 16\), got \(4, 4\); are these the gradients",
    _turned: rf"the gradient of {LAYER} in .* must have .* got \(16, 12\), which is its transpose",
    _no_gradient: rf"gradients must hold {LAYER}.weight, or .u, .s and .vt of it, got",
    _nan_gradient: rf"{LAYER}.weight in .* must be finite as float64",
    _no_step: r"the name of '.*last' must end with the step, as checkpoint-100 does, got last",
    _step_of_another_thing: r"the name of '.*v12' must end with the step, as checkpoint-100 does, got ",
    _same_step: r"the step of '.*checkpoint-100' must be its own, got 100, as of '.*again-100'",
}


@pytest.mark.parametrize("how", BROKEN)
def test_bad_input_is_one_line_and_nothing_is_written(run, tmp_path, capsys, how):
    _broken(run[0], tmp_path, how)
    words = [str(tmp_path / "run"), "--gradients", str(tmp_path / "gradients.safetensors"), "--lr", "0.05"]
    assert main(["peft", "observe", *words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    with pytest.raises(InputError, match=BROKEN[how]) as raised:
        peft_observe(tmp_path / "run", gradients=tmp_path / "gradients.safetensors", lr=0.05, progress=False)
    assert str(raised.value) in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not (tmp_path / "out").exists()


def test_bad_arguments_are_named(run, tmp_path):
    files, _, _ = run
    only = {"run": files["run"], "progress": False}
    (tmp_path / "none").mkdir()
    for asked, message in (
        (only | {"lr": 0.1}, "lr must be left out without gradients"),
        (only | {"loss": 1.0}, "loss must be left out without gradients"),
        (files | {"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        (files | {"loss": np.nan}, "loss must be positive and finite, got nan"),
        (only | {"run": tmp_path / "no"}, "run must be a folder of checkpoints"),
        (only | {"run": tmp_path / "none"}, "run must hold folders of checkpoints, .*, got '.*', which holds none"),
        (only | {"run": files["run"] / "checkpoint-0"}, "got '.*', a single checkpoint"),
        (only | {"initial": tmp_path / "no"}, "initial must be the folder of the start"),
        (only | {"initial": files["run"] / "checkpoint-10"}, "initial must be left out for a run that has"),
    ):
        with pytest.raises(InputError, match=message):
            peft_observe(**asked)
    shutil.copytree(files["run"], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-0")
    config = tmp_path / "run" / "checkpoint-100" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": "pissa"}))
    with pytest.raises(InputError, match="initial must be given for a start that changes the frozen weights"):
        peft_observe(tmp_path / "run", progress=False)


def test_the_folder_has_the_picture_the_reports_and_the_data(run, tmp_path, capsys):
    files, _, loss = run
    out = tmp_path / "observed"
    words = ["peft", "observe", str(files["run"]), "--gradients", str(files["gradients"]), "--lr", str(STEP)]
    words += ["--loss", str(loss), "--out", str(out)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"page: {out / 'report.html'}" in said
    stored, direct = xr.open_zarr(out / "results.zarr"), peft_observe(**files, lr=STEP, loss=loss)
    for name in direct.variables:
        np.testing.assert_array_equal(stored[name].values, direct[name].values)
    assert stored["norm_z"].attrs["long_name"]
    assert faults(observed_figure(direct)) == []
    assert faults(observed_figure(peft_observe(files["run"], progress=False))) == []
    plt.close("all")
    text = (out / "report.md").read_text()
    assert "| `model.layers.0.q_proj` |" in text
    assert "1 - cos below 0.1" in text
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "lora-flow peft observe" in page
    assert main(words) == 2
    assert "out must be new (--overwrite replaces it), got the observation" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    assert main([*words[:-1], str(tmp_path / "mine")]) == 2
    assert "which holds something else" in capsys.readouterr().err


def test_layers_are_read_one_at_a_time(run, monkeypatch):
    """No array of another layer is read between two of one."""
    from lora_flow.storage.tensors import Tensor

    order, read = [], Tensor.read

    def noted(self, *arguments, **how):
        order.append(next(name for name in SHAPES if name in self.name))
        return read(self, *arguments, **how)

    monkeypatch.setattr(Tensor, "read", noted)
    peft_observe(**run[0], lr=STEP)
    assert order == sorted(order)
    assert len(set(order)) == 2
