"""Arrays at the image check's public functions: any real numbers in whatever clothes, and nothing else."""

import numpy as np
import pytest
from lora_flow_vision.data import prepare
from lora_flow_vision.lora import adapters_of, attach
from lora_flow_vision.peft import export_peft
from lora_flow_vision.task import HeadTask, NetworkTask
from safetensors.numpy import load_file
from small import SHALLOW, network

from lora_flow import Adapter, InputError

RNG = np.random.default_rng(0)
FEATURES, LABELS, WEIGHT = RNG.normal(size=(5, 3)), np.array([0, 1, 1, 0, 1]), RNG.normal(size=(2, 3))
IMAGES = RNG.uniform(size=(2, 8, 8, 3)).astype(np.float32)
A, B = RNG.normal(size=(2, 16)).astype(np.float32), RNG.normal(size=(10, 2)).astype(np.float32)


class Parameter:
    """What a parameter of PyTorch does: gives no array until it is off its graph and its device."""

    def __init__(self, values, bare=False):
        self.values, self.bare = values, bare

    def detach(self):
        return Parameter(self.values, True)

    def cpu(self):
        return self

    def __array__(self, dtype=None, copy=None):
        if not self.bare:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
        return np.array(self.values, dtype)


def features(dress, folder):
    return HeadTask(dress(FEATURES), LABELS, WEIGHT, np.zeros(2)).inputs, FEATURES


def weight(dress, folder):
    return HeadTask(FEATURES, LABELS, dress(WEIGHT), np.zeros(2)).weight, WEIGHT


def labels(dress, folder):
    return HeadTask(FEATURES, dress(LABELS), WEIGHT, np.zeros(2)).labels, LABELS


def images(dress, folder):
    return NetworkTask(network(SHALLOW), dress(IMAGES), [0, 1], "head").inputs, IMAGES


def prepared(dress, folder):
    return prepare(dress(IMAGES), 8, 3, 0.0, 1.0), IMAGES


def attached(dress, folder):
    model = network(SHALLOW)
    attach(model, {"head": Adapter(dress(A), dress(B))})
    return adapters_of(model)["head"].a, A


def exported(dress, folder):
    export_peft(folder / "out", {"head": Adapter(dress(A), dress(B))})
    (name,) = [one for one in load_file(folder / "out/adapter_model.safetensors") if "lora_A" in one]
    return load_file(folder / "out/adapter_model.safetensors")[name], A


PLACES = (features, weight, labels, images, prepared, attached, exported)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dress", [Parameter, np.asfortranarray, lambda x: x.astype(x.dtype.newbyteorder(">"))])
def test_numbers_are_taken_in_whatever_clothes(place, dress, tmp_path):
    taken, values = place(dress, tmp_path)
    np.testing.assert_array_equal(taken, values)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "dress",
    [
        lambda x: np.ma.masked_array(x, mask=x == x.flat[0]),
        lambda x: x.astype(complex),
        lambda x: x.astype("timedelta64[s]"),
        lambda x: x.astype(str),
        lambda x: x.astype(bool),
        lambda x: x.astype(object),
    ],
    ids=("masked", "complex", "timedelta", "text", "bool", "object"),
)
def test_what_is_no_real_number_is_refused_in_one_line(place, dress, tmp_path):
    with pytest.raises(InputError, match=r"^[^\n]* must [^\n]*, got [^\n]*$"):
        place(dress, tmp_path)


def test_a_task_does_not_change_with_the_caller_s_arrays():
    mine = FEATURES.copy()
    task = HeadTask(mine, LABELS, WEIGHT, np.zeros(2))
    mine[:] = 0
    np.testing.assert_array_equal(task.inputs, FEATURES)
