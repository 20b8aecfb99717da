"""Results of a factorisation, made of formulas, with any number of lanes; and opened to be read when asked for.

The curves are those of a drop of the loss after a plateau, with other times and sizes in every lane.
"""

import numpy as np
import xarray as xr
from xarray.core.indexing import IndexingSupport, LazilyIndexedArray, explicit_indexing_adapter

from lora_flow.storage.lanes import NOT_RUN
from lora_flow.sweeps.schema import label

DIMS = ("delta_w", "init", "side", "alpha", "rank", "seed")
END = 10.0


def results(seeds, saves=21, delta_w=(0.5, 2.0), inits=("gaussian", "spectral"), sides=("A", "B"), alphas=(1e-1, 1e-3)):
    """A dataset as of a sweep over problems of which layer 1 is selected in the first, layer 2 in the others."""
    rng, time = np.random.default_rng(0), np.linspace(0.0, END, saves)
    shape = (len(delta_w), len(inits), len(sides), len(alphas), 1, seeds)
    small = np.reshape(alphas, (-1, 1, 1, 1)) * np.exp(0.3 * rng.normal(size=(*shape, 1)))
    rate = 1.0 + 4.0 * rng.random((*shape, 1))
    drop = np.clip(time + np.log(small) / 3.0, 0.0, None)
    curves = {
        "loss": 10.0 * np.exp(-0.01 * time) * np.exp(-3.0 * rate * drop),
        "alignment_error": np.minimum(1.0, small + np.exp(-rate * time)),
        "norm_z": small * np.exp(np.minimum(time, 3.0)),
        "norm_along": small * np.exp(np.minimum(time, 3.0)),
        "norm_across": 5.0 * small * np.ones_like(time),
        "overlap_": small**2 * np.exp(2.0 * np.minimum(time, 8.0)),
    }
    over_time = {"loss": curves.pop("loss"), "drift": 1e-6 * small * time}
    for i in (1, 2):
        over_time |= {f"{name}{i}": values * i for name, values in curves.items() if name != "alignment_error"}
    over_time |= {"alignment_error": curves["alignment_error"], "alignment_error_2": 0.5 * curves["alignment_error"]}
    status, steps = np.zeros(shape, np.int8), rng.integers(80, 90, shape).astype(np.int32)
    lanes = {"status": status, "initial_loss": over_time["loss"][..., 0], "rounding_floor": np.full(shape, 1e-25)}
    lanes |= {"steps": steps, "dead_directions": np.zeros(shape, np.int32), "loss_floor": np.full(shape, np.nan)}
    coords = {"delta_w": list(delta_w), "init": list(inits), "side": list(sides), "alpha": list(alphas)}
    gains = {"sigma": 1.0, "sigma_w1": np.array(delta_w), "sigma_w2": 1.0, "shift_rank": 1, "aligned": 1}
    return label(
        xr.Dataset(
            {name: ((*DIMS, "time"), values) for name, values in over_time.items()}
            | {name: (DIMS, values) for name, values in lanes.items()},
            coords=coords
            | {"rank": [2], "seed": range(seeds), "time": time}
            | {name: ("delta_w", np.broadcast_to(value, len(delta_w))) for name, value in gains.items()},
            attrs={"t1": END, "solver": "Tsit5", "rtol": 5e-4, "dtype": "float64", "layers": [6, 9, 5, 6]},
        )
    )


def with_gaps(dataset):
    """The same where some lanes have failed, early or late, and others have not run."""
    dataset, time = dataset.copy(deep=True), dataset["time"].values
    lane = np.arange(dataset["status"].size).reshape(dataset["status"].shape)
    failed, waits = lane % 7 == 3, lane % 11 == 5
    dataset["status"].values[failed], dataset["status"].values[waits] = 1, NOT_RUN
    ends = np.where(waits, -1.0, np.where(failed, 5.0 + lane % 5, np.inf))
    known = xr.DataArray(time <= ends[..., None], dims=(*dataset["status"].dims, "time"))
    return dataset.assign({name: one.where(known) for name, one in dataset.items() if "time" in one.dims})


class Stored(xr.backends.BackendArray):
    """An array that notes the bytes of each of its readings."""

    def __init__(self, values, readings):
        self.shape, self.dtype, self._values, self._readings = values.shape, values.dtype, values, readings

    def __getitem__(self, key):
        return explicit_indexing_adapter(key, self.shape, IndexingSupport.OUTER, self._read)

    def _read(self, key):
        values = self._values
        for axis, part in reversed(list(enumerate(key))):
            values = values[(slice(None),) * axis + (part,)]
        self._readings.append(values.nbytes)
        return values.copy()


def opened(dataset, readings):
    """The dataset as if it were stored: every variable is read when it is asked for, as often as it is."""

    def stored(variable):
        held = LazilyIndexedArray(Stored(variable.values, readings))
        return xr.Variable(variable.dims, held, variable.attrs)

    return dataset.assign({name: stored(dataset[name].variable) for name in dataset.data_vars})
