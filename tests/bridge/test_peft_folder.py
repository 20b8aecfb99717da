"""Folders in PEFT's layout, of any modules: to the last byte there and back, with fields that nobody here knows."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_flow import Adapter, InputError
from lora_flow.bridge.peft_folder import FILES, NEW, PeftAdapters, read_peft, write_peft
from lora_flow.storage.tensors import open_tensors

MODULES = ("transformer.h.0.attn.c_attn", "model.layers.1.mlp.experts.7.down_proj", "a")


def adapters(ranks=(2, 3, 2), dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        module: Adapter(rng.standard_normal((rank, 5)).astype(dtype), rng.standard_normal((4, rank)).astype(dtype))
        for module, rank in zip(MODULES, ranks, strict=True)
    }


def test_what_is_read_and_written_again_is_the_same_to_the_last_bit(tmp_path):
    write_peft(tmp_path / "first", PeftAdapters(adapters(), dict.fromkeys(MODULES, 0.7)))
    path = tmp_path / "first" / FILES[0]
    unknown = {"a_field_of_tomorrow": {"x": [1, None]}, "lora_dropout": 0.25, "task_type": "CAUSAL_LM"}
    path.write_text(json.dumps(json.loads(path.read_text()) | unknown, indent=1) + "\n")
    write_peft(tmp_path / "second", read_peft(tmp_path / "first"))
    assert (tmp_path / "second" / FILES[0]).read_bytes() == path.read_bytes()
    first, second = (open_tensors(tmp_path / name / FILES[1]) for name in ("first", "second"))
    assert first.metadata == second.metadata
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert tensor.read().tobytes() == second.tensors[name].read().tobytes()


@settings(max_examples=25, deadline=None)
@given(
    scalings=st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3),
    ranks=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    rslora=st.booleans(),
)
def test_ranks_and_multipliers_of_each_module_come_back(tmp_path_factory, scalings, ranks, rslora):
    folder = tmp_path_factory.mktemp("peft")
    wanted = dict(zip(MODULES, scalings, strict=True))
    write_peft(folder, PeftAdapters(adapters(ranks), wanted, NEW | {"use_rslora": rslora}))
    again = read_peft(folder)
    assert again.scalings == wanted
    for module, adapter in adapters(ranks).items():
        for factor, read in zip(adapter, again.adapters[module], strict=True):
            np.testing.assert_array_equal(read, factor)
    config = json.loads((folder / FILES[0]).read_text())
    rank = config["rank_pattern"].get(MODULES[1], config["r"])
    alpha = config["alpha_pattern"].get(MODULES[1], config["lora_alpha"])
    np.testing.assert_allclose(alpha / (rank**0.5 if rslora else rank), scalings[1], rtol=1e-12, atol=0)


def test_changed_adapters_change_what_the_settings_say_of_them_and_nothing_else(tmp_path):
    config = NEW | {"lora_dropout": 0.5, "r": 9, "target_modules": "all-linear"}
    write_peft(tmp_path / "first", PeftAdapters(adapters(), dict.fromkeys(MODULES, 2.0), config))
    read = read_peft(tmp_path / "first")
    kept = {MODULES[0]: read.adapters[MODULES[0]]}
    write_peft(tmp_path / "second", read._replace(adapters=kept))
    config = json.loads((tmp_path / "second" / FILES[0]).read_text())
    assert config["lora_dropout"] == 0.5
    assert (config["target_modules"], config["r"], config["lora_alpha"]) == ([MODULES[0]], 2, 4.0)


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        (PeftAdapters({}, {}), "adapters must hold at least one layer's, got none"),
        (PeftAdapters(adapters(), {}), f"scaling must be given for every adapter, got none for {MODULES[0]}"),
        (PeftAdapters(adapters(), dict.fromkeys(MODULES, np.nan)), "scaling must be finite, got nan"),
        (
            PeftAdapters({"a": Adapter(np.ones((2, 3)), np.ones((3, 4)))}, {"a": 1.0}),
            r"adapters of a must have shapes \(rank, in\) and \(out, rank\), got \(2, 3\) and \(3, 4\)",
        ),
    ],
)
def test_bad_adapters_are_named_and_nothing_is_written(tmp_path, peft, message):
    with pytest.raises(InputError, match=message):
        write_peft(tmp_path / "new", peft)
    assert not (tmp_path / "new").exists()
