"""Wrong kinds of values for every argument of all that is public: one line that names it, and says what it must be.

Types are not checked at run time for users, and so not here: `jaxtyping_disable`.
"""

import datetime
import functools
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
import xarray as xr

import lora_flow
from lora_flow import (
    Adapter,
    Factorization,
    InputError,
    LinearNetwork,
    Plain,
    Regression,
    SingleLayer,
    oracles,
)
from lora_flow.checks import require_number

EYE, MASKED, KEY, NAN, DATE = (
    np.eye(3),
    np.ma.masked_less(np.eye(3), 1),
    jax.random.key(0),
    float("nan"),
    datetime.date(2026, 1, 1),
)
CUBE = np.ones((2, 3, 3))
CURVE = Path(__file__).parents[1] / "reference" / "loss_curve.csv"
TENTHS, HALVES = (np.array([0.0, 0.1, 0.2]), np.array([1.0, 0.5, 0.25]))
ROW, COLUMN = np.ones((1, 3)), np.zeros((3, 1))
ONE, TWO, NOWHERE = ((Adapter(a, COLUMN),) * count for a, count in ((ROW, 1), (ROW, 2), (NAN * ROW, 1)))


class Own:
    """Has what a problem has, but is a class."""

    layers = ((3, 3),)

    def loss(self, adapters):
        return 0.0


def made():
    yield 1.0


def ragged():
    return [[1.0, 2.0], [3.0]]


LISTS = [{"a": 1.0}, made, [1.0], [[1.0, 2.0], [3.0, 4.0]], np.ones(1), jnp.ones(1)]
NUMBERS = ["1", "", None, NAN, 1j, True, DATE, *LISTS]
ARRAYS = ["1", {"a": 1.0}, made, ragged, ["a"], [DATE], EYE > 0, 1j * EYE, EYE.astype(object), MASKED]
TIMES = [*ARRAYS, None, 1.5, -1, 1, True, NAN, [1], [[0, 1]], [2, 1], [-1, 1], [0, 10**9]]
ANYTHING = ["no such", None, 5, 1.5, {"a": 1}, made, [], [1.0, 2.0], EYE, object]
NO_TUPLES = [*ANYTHING, (), {"layer": ONE[0]}, ONE[0], (ROW, COLUMN), [None], [1.0], ["ab"], [(ROW, COLUMN, ROW)]]
NO_FACTORS = [("a", "b"), (None, None), (1.0, 2.0), (made(), made()), (ragged(), COLUMN), (ROW.astype(object), COLUMN)]
WRONG: dict[str, list[Any]] = {  # by the kind of the argument
    "number": NUMBERS,
    "positive": [*NUMBERS, -1.0, 0.0, np.inf],
    "not negative": [*NUMBERS, -1.0, np.inf],
    "fraction": [*NUMBERS, -1.0, 0.0, 1.0, np.inf],
    "above one": [*NUMBERS, 0.5, -1.0, np.inf],
    "angle": [*NUMBERS, -1.0, 91.0, np.inf],
    "integer": [*NUMBERS, 1.5, 2.0, -1, [1], np.ones(1, int)],
    "array": [*ARRAYS, None],
    "matrix": [*ARRAYS, None, 1.0, np.ones(3), np.ones((3, 3, 3)), np.ones((0, 3)), np.full((3, 3), NAN)],
    "other matrix": [np.ones((2, 4)), np.ones((4, 2))],  # of a shape that does not fit
    "flag": ["yes", "", None, 2, 0.0, {"a": 1}, made, [True], np.ones(2, bool), object],
    "choice": ANYTHING,
    "key": ["0", None, 0, 1.5, {"a": 1}, made, [], np.ones(2), jnp.ones(2), [KEY], jax.random.split(KEY), EYE],
    "problem": [*ANYTHING, EYE, (EYE, EYE, EYE), Own, SingleLayer, ONE],
    "factorisation": [*ANYTHING, SingleLayer],
    "adapters": [*NO_TUPLES, *([pair] for pair in NO_FACTORS), [(ROW[0], COLUMN)], [(ROW, ROW)], [{"a": 1, "b": 2}]],
    "times": [*TIMES, [0.0, NAN]],
    "iterations": [*TIMES, [0.0, 1.0]],
    "shape": ["33", None, 3, {"a": 3, "b": 3}, made, [3], [3, 3, 3], [3.0, 3.0], [-1, 3], [True, 3], EYE],
    "path": [None, 5, 1.5, {"a": 1}, made, [], ["a"], EYE, b"a", object, "no such"],
    "new path": [None, 5, 1.5, {"a": 1}, made, [], ["a"], EYE, b"a", object],
    "dataset": [*ANYTHING, {"loss": EYE}, xr.DataArray(EYE), xr.Dataset()],
    "callable": ["no such", None, 5, {"a": 1}, [], EYE],
    "component": [None, 1.5, "middle", {}, {"top": 1}, made, [], [[0]], [None], True, NAN, 7, [0, 0], EYE, object],
    "pair": ["12", None, 5, {"a": 1, "b": 2}, made, [1.0], [1.0, 2.0], [NAN, 1.0], [2.0, -1.0], [True, True], EYE],
}


class Argument(NamedTuple):
    """A good value, the kind, its name in messages if that is another, what of the kind is welcome, what else not."""

    good: Any
    kind: str
    named: str = ""
    welcome: tuple[Any, ...] = ()
    also: tuple[Any, ...] = ()


def of(good, kind, named="", welcome=(), also=()):
    return Argument(good, kind, named, welcome, also)


key = of(KEY, "key")
two_layers = of(Factorization(EYE, EYE, EYE), "problem")
one_layer = of(SingleLayer(EYE), "problem")
known = of(Regression(EYE, EYE, weight=EYE), "problem")
network = of(LinearNetwork(EYE, np.diag([1.0, 2.0, 3.0])), "problem")
rank, alpha = of(1, "integer", also=(0, 7)), of(0.1, "positive")
size, flow = of(3, "integer", also=(0,)), of("plain", "choice", also=(Plain, "plain:1", "lora-plus:x"))
initialisation = {"key": key, "problem": known, "rank": rank, "alpha": alpha}
of_network = {**initialisation, "problem": network, "rank": of(1, "integer", also=(0,))}
start, starts = of(ONE, "adapters", also=(TWO, NOWHERE)), of(TWO, "adapters", also=(ONE, NOWHERE * 2))
time = of(1.0, "array", also=(-1.0, NAN, [NAN], np.inf))
substeps = of(64, "integer", also=(0,))
basis = of(np.eye(3)[:, :1], "matrix", also=(np.ones((3, 2)),))
away_from = of(None, "matrix", welcome=(None,), also=(np.ones((3, 2)), np.eye(2)))
in_turn = lora_flow.Tasks(np.zeros((3, 3)), [(EYE, EYE)])
constants = {"c1": of(0.5, "fraction"), "c2": of(1.5, "above one", also=(1.0,))}
dataset = xr.Dataset(
    {name: ("time", np.geomspace(1, 2, 3)) for name in ("loss", "norm_along1", "norm_across1", "overlap_1")}
    | {name: ("time", np.geomspace(1, 2, 3)) for name in ("norm_along2", "norm_across2", "overlap_2")},
    coords={"time": [0.0, 1.0, 2.0], "alpha": 0.1, "sigma": 1.0, "sigma_w1": 0.5, "sigma_w2": 1.0},
)
loss = dataset["loss"]
whole_gradient = xr.Dataset({"by_shift": (("shift_0", "shift_1"), np.ones((3, 2))), "by_bias": ("bias_0", np.ones(3))})

TABLE: dict[str, dict[str, Argument]] = {
    "adapted": {
        "loss": of(lambda w, x: jnp.sum((w @ x) ** 2), "callable", also=(lambda w, x: w, lambda w, x: NAN)),
        "params": of(EYE, "choice", welcome=(EYE,), also=(np.ones(3), NAN * EYE, 1j * EYE, MASKED, EYE.astype(object))),
        "layers": of("all", "choice", also=("(", {"all": "oo"}, {"all": 5}, [None])),
        "data": of((EYE,), "choice", also=((EYE, EYE), [MASKED])),
        "scaling": of(1.0, "positive"),
    },
    "advise": {
        "problem": of(one_layer.good, "problem", also=({}, "none.npz", two_layers.good)),
        "init": of("lora-one", "choice", also=("lora-on", ["lora-one", "lora-one"], [None])),
        "size": of(0.1, "array", also=(None, NAN, 0.0, -1.0, True, [0.1, "a"], [0.1, 0.1], [[0.1], [0.2]], [], np.inf)),
        "rank": of(1, "array", also=(None, NAN, 1.5, 0, -1, True, [1, "a"], [1, 1], [[1], [2]], [], 7)),
        "level": of(0.9, "fraction"),
        "seeds": of(1, "integer", also=(0,)),
        "lr": of(0.1, "positive"),
        "steps": of(5, "integer", also=(0,)),
        "optimizer": of("gd", "choice", also=("adamw",)),
        "progress": of(False, "flag"),
    },
    "AdaptiveStep": {"rate": of("rho", "choice"), **constants},
    "AdmissibleStep": constants,
    "AroraStep": {},
    "Automatic": {"chebyshev": of(lora_flow.RungeKuttaChebyshev(), "choice", also=(diffrax.Tsit5(),))},
    "AttentionLoRA": {
        "tokens": of(CUBE, "array", also=(EYE, NAN * CUBE, np.ones((0, 3, 3)))),
        "labels": of(CUBE, "array", also=(EYE, NAN * CUBE, CUBE[:1], CUBE[:, :1])),
        "frozen": of(CUBE, "array", also=(EYE, NAN * CUBE, CUBE[:1])),
        "lengths": of(np.array([3, 2]), "array", also=([0, 0], [4, 1], [-1, 1], [1.5, 1], [1, 1, 1], NAN, [NAN, 1])),
        "ridge": of(0.1, "not negative"),
        "activation": of("linear", "choice"),
        "direction": of(COLUMN, "array", also=(np.ones(3), np.ones((4, 1)), NAN * EYE)),
        "missing": of(EYE, "array", also=("other matrix", NAN * EYE)),
        "noise": of(0.1, "not negative"),
        "held_out": of(
            lora_flow.AttentionLoRA(CUBE, CUBE), "problem", also=(lora_flow.AttentionLoRA(CUBE[..., :2], CUBE),)
        ),
    },
    "Backtracking": {
        "first": of(1.0, "positive"),
        "factor": of(0.5, "fraction"),
        "constant": of(0.5, "fraction"),
    },
    "Chain": {"flows": of((Plain(),), "choice", "flows", also=((Plain(), "plain"), (Plain,)))},
    "BaLoRA": {},
    "DeepLinear": {
        "weights": of((EYE, EYE), "array", also=(EYE[0], (EYE, np.ones((2, 2))), [EYE, None], (), 5, "ab", np.ones(3))),
        "shift": of(EYE, "matrix", also=("other matrix",)),
    },
    "DeepLinear target": {"weights": of((EYE,), "array"), "target": of(2 * EYE, "matrix", also=("other matrix",))},
    "Diagonal": {
        "values": of(np.ones(3), "array", also=(1.0, EYE, np.ones(4))),
        "shape": of((3, 3), "shape"),
    },
    "DuStep": {"epsilon": of(1e-3, "positive")},
    "Factorization": {name: of(EYE, "matrix", also=("other matrix",)) for name in ("w1", "w2", "shift")},
    "Factorization target": {
        "w1": of(EYE, "matrix"),
        "w2": of(EYE, "matrix"),
        "target": of(2 * EYE, "matrix", also=("other matrix",)),
    },
    "GrowingStep": {
        "fraction": of(0.5, "fraction"),
        "c": of(0.5, "fraction"),
        "d": of(1.01, "above one", also=(1.0,)),
        "by_bound": of(False, "flag"),
    },
    "LinearNetwork": {
        "targets": of(EYE, "matrix", also=(np.ones((2, 3)),)),
        "inputs": of(EYE, "matrix", also=(np.ones((2, 3)),)),
        "rank": of(1, "integer", also=(0, 4)),
        "tolerance": of(1e-6, "fraction"),
    },
    "LoRAMuon": {"damping": of(0.1, "not negative"), "smoothing": of(0.1, "positive")},
    "LoRAPlus": {"ratio": of(16.0, "positive")},
    "Protected": {
        "basis": basis,
        "exact": of(True, "flag"),
        "damping": of(0.1, "not negative"),
    },
    "ProtectedInputs": {
        "size": size,
        "eps": of(1e-3, "fraction", welcome=(0.0,)),
        "decay": of(0.5, "fraction", welcome=(1.0,)),
    },
    "SafeGradient": {"problem": one_layer, "basis": basis},
    "Tasks": {
        "weight": of(EYE, "matrix", also=("other matrix",)),
        "tasks": of([(EYE, EYE)], "choice", also=([(EYE,)], [(EYE, np.ones((2, 2)))], [(np.ones((2, 2)), EYE)])),
        "now": of(0, "integer", also=(1,)),
        "scaling": of(1.0, "positive"),
    },
    "keep_away": {"adapters": of(ONE, "choice"), "basis": basis},
    "learn_in_turn": {
        "tasks": of(in_turn, "choice", also=(SingleLayer(EYE),)),
        "key": key,
        "rank": rank,
        "alpha": alpha,
        "init": of("gaussian", "choice"),
        "away": of(True, "flag"),
        "flow": of(None, "choice", "flow", welcome=(None, made, object), also=("plain:1",)),
        "inputs": of(None, "choice", welcome=(None,), also=(lora_flow.ProtectedInputs(5),)),
    },
    "tasks_problem": {
        "key": key,
        "m": size,
        "n": size,
        "count": of(2, "integer", also=(0,)),
        "width": of(1, "integer", also=(0, 9)),
        "overlap": of(0.5, "fraction", welcome=(0.0, 1.0)),
        "rank": of(1, "integer", also=(0, 9)),
        "samples": of(0, "integer"),
    },
    "LoRAPro": {"damping": of(0.1, "not negative")},
    "Muon": {"smoothing": of(0.1, "positive")},
    "MuKlabjan": {"smoothness": of(1.0, "positive")},
    "Offset": {"problem": one_layer, "start": start},
    "Plain": {},
    "Regression": {
        "inputs": of(EYE, "matrix", also=("other matrix",)),
        "shift": of(EYE, "matrix"),
        "weight": of(EYE, "matrix", also=("other matrix",)),
        "activation": of("linear", "choice"),
        "scaling": of(1.0, "positive"),
    },
    "ResidualController": {
        "rtol": of(1e-3, "fraction"),
        "relative_residual": of(lambda state: jnp.ones(()), "callable"),
        "growth_bound": of(lambda state: jnp.ones(()), "callable"),
        "factors": of(lambda state: state, "callable"),
        "atol": of(1e-16, "not negative"),
        "norm": of(jnp.linalg.norm, "callable"),
        "pid": of(diffrax.PIDController(rtol=1.0, atol=0.0), "choice", also=(diffrax.PIDController,)),
    },
    "RungeKuttaChebyshev": {
        "max_stages": of(2000, "integer", also=(1,)),
        "scan_kind": of("lax", "choice"),
        "tell_rounding": of(False, "flag"),
    },
    "ScaledGD": {"damping": of(0.1, "not negative")},
    "ShrinkA": {"rate": of(0.1, "not negative")},
    "StableLoRA": {"rate": of(0.1, "not negative")},
    "SingleLayer": {
        "shift": of(EYE, "matrix"),
        "scaling": of(1.0, "positive"),
        "weight": of(EYE, "matrix", also=("other matrix",)),
    },
    "SoftmaxRegression": {
        "inputs": of(EYE, "matrix", also=("other matrix",)),
        "labels": of(np.arange(3), "array", also=(np.ones(3), np.arange(2), EYE.astype(int), 1, [0, 1, 3], [-1, 0, 1])),
        "weight": of(EYE, "matrix"),
        "scaling": of(1.0, "positive"),
    },
    "attention_problem": {
        "key": key,
        "m": size,
        "tokens": of(2, "integer", also=(0,)),
        **dict.fromkeys(
            ("sample_ratio", "pretraining_ratio", "pretraining_ridge", "teacher_width"), of(1.0, "positive")
        ),
        **dict.fromkeys(("ridge", "label_noise", "beta"), of(0.5, "not negative")),
        "task_rank": of(1, "integer", also=(0,)),
        "pretrained_by": of("law", "choice"),
        "kept": of(1.0, "positive", also=(1.5,)),
        "reused": of(False, "flag"),
        "activation": of("linear", "choice"),
    },
    "aligned_problem": {
        "key": key,
        **dict.fromkeys(("m", "n", "h"), size),
        "delta_w": of(0.5, "positive"),
        "shift_scale": of(5.0, "array", also=(None, NAN, 1j, True, DATE, [], [1.0, 2.0], -1.0, 0.0, EYE)),
        "component": of("top", "component"),
        "spectrum": of((2.0, 1.0), "pair", welcome=(None,)),
    },
    "analyse": {"problem": two_layers, "adapters": of(TWO, "adapters", also=(ONE,)), "flow": flow},
    **{
        f"{name}_init": initialisation
        for name in ("eva", "gora", "lora_ga", "lora_ga_peft", "lora_one", "olora", "pissa", "milora")
    },
    "lora_one_theory_init": initialisation,
    "loram_init": {**initialisation, "rank": of(2, "integer", also=(0, 1, 4))},
    "orthogonal_init": {**initialisation, "rank": of(2, "integer", also=(0, 3, 4)), "away_from": away_from},
    "spectral_init": {**initialisation, "rank": of(3, "integer", also=(0, 2, 4))},
    "gaussian_init": {**initialisation, "side": of("A", "choice", also=("a", "AB")), "away_from": away_from},
    "balance": {"adapters": of(ONE, "adapters")},
    "balanced_init": of_network,
    "gaussian_both_init": {**of_network, "ratio": of(4.0, "positive")},
    "gaussian_wide_init": {**of_network, "p": of(0.5, "not negative")},
    "invariant_init": of_network,
    "spectral_both_init": {**of_network, "ratio": of(4.0, "positive")},
    "tied_init": of_network,
    "canonical": {"problem": of(two_layers.good, "factorisation"), "rank": of(1, "integer", also=(0,))},
    "descend": {
        "problem": one_layer,
        "adapters": start,
        "steps": of(2, "integer", also=(0,)),
        "step": of(0.1, "positive", also=("adam", lambda t: "a", lambda: 1.0, optax.adam, lora_flow.MuKlabjan)),
        "saves": of(3, "iterations"),
        "order": of("A first", "choice"),
        "derivatives": of("forward", "choice", also=("backward", diffrax.ForwardMode())),
        "flow": flow,
        "save_adapters": of(False, "flag"),
    },
    "digits_problem": {"h": of(64, "integer", also=(3,))},
    "as_problem": {"problem": two_layers},
    "linearised_task": {"problem": two_layers},
    "effective": {
        **dict.fromkeys(("scaling", "std", "step"), of(0.5, "array", also=(None, NAN, -1.0, 0.0, True, [0.0], np.inf))),
        "optimizer": of("gd", "choice"),
    },
    "lora_alpha": {
        "rank": of(2, "array", also=(None, NAN, -1, 0, 0.5, True, [0, 1], np.inf)),
        "coefficient": of(256.0, "array", also=(None, NAN, -1.0, 0.0, True, [0.0], np.inf)),
    },
    "gradient_noise": {"std": of(0.1, "not negative"), "key": key, "scaling": of(1.0, "positive")},
    "load_problem": {"path": of("none.npz", "path", "problem", also=("none.npz", "a.txt"))},
    "load_run": {"path": of("none", "path", "the run folder"), "partial": of(False, "flag")},
    "misaligned": {
        "problem": of(two_layers.good, "factorisation"),
        "key": key,
        "angle": of(0.0, "angle"),
    },
    "narrow": {"adapters": of(ONE, "adapters")},
    "network_problem": {
        "key": key,
        **dict.fromkeys(("m", "n"), size),
        "samples": of(4, "integer"),
        "input_rank": of(2, "integer", also=(4,)),
        "input_kappa": of(2.0, "above one"),
        "target_noise": of(0.1, "not negative"),
    },
    "noisy": {"problem": of(two_layers.good, "factorisation"), "key": key, "noise": of(0.1, "not negative")},
    "oracles.first_layer": {
        "shift": of(EYE, "matrix"),
        "w2": of(EYE, "matrix", also=("other matrix",)),
        "a": of(ROW, "matrix", also=(np.ones((1, 4)),)),
        "t": time,
        "steps": substeps,
    },
    "oracles.cascade": {
        "target": of(EYE, "matrix", also=("other matrix", -EYE)),
        "u": of(EYE, "matrix", also=("other matrix", np.ones((3, 3)))),
        "t": time,
    },
    "oracles.large_start": {
        "shift": of(EYE, "matrix"),
        "rows": of(EYE, "matrix", also=("other matrix", 2 * EYE)),
        "a": of(2.0, "positive"),
        "t": time,
        "steps": substeps,
    },
    "oracles.riccati": {
        "target": of(EYE, "matrix"),
        "w1": of(EYE, "matrix", also=("other matrix",)),
        "w2": of(EYE, "matrix", also=("other matrix",)),
        "t": time,
        "steps": substeps,
    },
    "oracles.scalar": {name: of(1.0, "array", also=(NAN, np.inf)) for name in ("y", "u0", "v0")} | {"t": time},
    "oracles.schur_complement": {
        "s0": of(EYE, "matrix", also=("other matrix",)),
        "l2": of(np.ones(3), "array", also=(1.0, -np.ones(3), EYE, np.full(3, np.inf))),
        "t": time,
    },
    "oracles.single_layer": {
        "shift": of(EYE, "matrix"),
        "a": of(ROW, "matrix", also=(np.ones((1, 4)),)),
        "t": time,
        "scaling": of(1.0, "positive"),
        "steps": substeps,
    },
    "oracles.spectral": {
        "left": of(EYE, "matrix", also=("other matrix", 2 * EYE)),
        "sigma": of(np.ones(3), "array", also=(1.0, EYE, np.full(3, NAN))),
        "right": of(EYE, "matrix", also=("other matrix", 2 * EYE)),
        "b0": of(np.ones(3), "array", also=(np.ones(2), np.full(3, np.inf))),
        "a0": of(np.ones(3), "array", also=(np.ones(2), np.full(3, NAN))),
        "t": time,
    },
    "oracles.symmetric": {
        "target": of(EYE, "matrix", also=("other matrix", np.triu(np.ones((3, 3))))),
        "u": of(EYE, "matrix", also=("other matrix",)),
        "t": time,
        "steps": substeps,
    },
    "oracles.symmetric_mode": {
        "s": of(1.0, "array", also=(NAN, np.inf)),
        "p0": of(1.0, "array", also=(-1.0, NAN, np.inf)),
        "t": time,
    },
    "pad": {"adapters": of(ONE, "adapters"), "rank": of(2, "integer", also=(0,))},
    "phases": {
        "dataset": of(dataset, "dataset", also=(dataset.isel(time=-1), dataset.drop_vars("loss"), dataset["loss"])),
    },
    "pretrained_problem": {
        "key": key,
        **dict.fromkeys(("m", "n", "h"), size),
        "init": of("balanced", "choice", also=(["balanced"], "balanced:2")),
        "alpha": alpha,
        "shift_scale": of(5.0, "array", also=(NAN, -1.0, [1.0, 2.0])),
        "component": of("top", "component"),
        "spectrum": of((2.0, 1.0), "pair", welcome=(None,)),
        "pretraining_t1": of(1.0, "positive"),
    },
    "regression_problem": {
        "key": key,
        **dict.fromkeys(("m", "n", "target_rank"), size),
        "kappa": of(1.0, "above one"),
        "angle": of(0.0, "angle"),
        "samples": of(4, "integer"),
        "input_kappa": of(1.0, "above one"),
        "activation": of("linear", "choice"),
    },
    "rounding_floor": {"problem": one_layer, "adapters": start},
    "save_times": {"t1": of(1.0, "positive"), "saves": of(3, "times"), "spacing": of("log", "choice")},
    "solve": {
        "problem": two_layers,
        "adapters": starts,
        "t1": of(1.0, "positive"),
        "saves": of(3, "times"),
        "flow": flow,
        "solver": of("Tsit5", "choice", also=(diffrax.Tsit5, "tsit5", diffrax.Euler())),
        "rtol": of(1e-3, "fraction"),
        "stepsize_controller": of(None, "choice", also=(diffrax.PIDController,)),
        "dt0": of(None, "positive"),
        "derivatives": of("forward", "choice", also=("backward", diffrax.ForwardMode())),
        "max_steps": of(100, "integer", also=(0,)),
        "save_adapters": of(False, "flag"),
    },
    "stable_lora": {"optimizer": of(optax.sgd(0.1), "choice"), "lam": of(0.1, "not negative", also=(1.0,))},
    "SymmetricFactorization": {"matrix": of(EYE, "matrix", also=(np.ones((2, 3)), np.triu(np.ones((3, 3))), -EYE))},
    "symmetric_problem": {
        "key": key,
        "m": size,
        "eigenvalues": of((2.0, 1.0), "array", also=(1.0, (), (0.0,), (NAN,), (-1.0, 1e-20), (1.0,) * 4)),
    },
    "sensitivity": {
        "problem": of(one_layer.good, "problem", also=({}, SingleLayer, lambda: 5, lambda size: size)),
        "with_respect_to": of("alpha", "choice", also=("alpa", (), ["alpha", "alpha"], [None], [["alpha"]])),
        "observable": of("t_align", "choice", also=("t1", (), ["t_align", "t_align"], [None], "time to", "time to -1")),
        "at": of(0.5, "positive", also=(2.0,)),
        "parameters": of(None, "choice", also=({"size": 1.0}, {"size": None}, {5: 1.0}, ["size"])),
        "init": of("gaussian", "choice", also=(["gaussian", None], "lora-ga")),
        "side": of("A", "choice", also=("a", ["A", "A"], ["A", None])),
        "alpha": of(0.1, "array", also=(None, NAN, -1.0, 0.0, True, [0.1, "a"], [0.1, 0.1], [[0.1], [0.2]], [], DATE)),
        "rank": of(1, "array", also=(None, NAN, 1.5, 0, -1, True, [1, "a"], [1, 1], [[1], [2]], [], 7)),
        "seeds": of(1, "array", also=(None, NAN, 1.5, 0, -1, True, [1, "a"], [1, 1], [[1], [2]], [], [-1])),
        "t1": of(1.0, "positive"),
        "flow": flow,
        "solver": of("Tsit5", "choice", also=(diffrax.Tsit5, diffrax.Tsit5())),
        "rtol": of(1e-3, "fraction"),
        "max_steps": of(100, "integer", also=(0,)),
        "progress": of(False, "flag"),
    },
    "optimise": {
        "problem": of(one_layer.good, "problem", also=({}, SingleLayer, lambda: 5)),
        "parameters": of("adapters", "choice", also=("adapter",)),
        "objective": of("log10 loss", "choice", also=("t1", "time to", "time to -1", "time to 1e-40")),
        "over": of("mean", "choice", also=("means",)),
        "at": of(0.5, "positive", also=(2.0,)),
        "t1": of(1.0, "positive"),
        "alpha": alpha,
        "rank": rank,
        "restarts": of(1, "integer", also=(0,)),
        "seed": of(0, "integer", also=(-1,)),
        "steps": of(1, "integer", also=(0,)),
        "optimizer": of(None, "choice", also=(optax.sgd,)),
        "flow": flow,
        "solver": of("Tsit5", "choice", also=(diffrax.Tsit5, diffrax.Tsit5())),
        "rtol": of(1e-3, "fraction"),
        "max_steps": of(100, "integer", also=(0,)),
        "progress": of(False, "flag"),
    },
    "load_learned": {"folder": of(".", "path")},
    "fit": {
        "times": of(TENTHS, "array", also=(1.0, [0.0, 1.0], [0.0, 2.0, 1.0], [-1.0, 0.0, 1.0], [0.0, NAN, 1.0])),
        "losses": of(HALVES, "array", also=(1.0, [1.0, 0.5], [1.0, NAN, 0.2], [1.0, 0.0, 0.2], [1.0, -1.0, 0.2])),
        "problem": of(two_layers.good, "problem", also=({},)),
        "unknown": of("alpha", "choice", also=("alpa", (), ["alpha", "alpha"], [None])),
        "alpha": alpha,
        "rate": of(1.0, "positive"),
        "init": of("gaussian", "choice", also=("lora-ga",)),
        "side": of("A", "choice", also=("a",)),
        "rank": rank,
        "seed": of(0, "choice", welcome=(5,), also=(-1, True, [0, 1], [1.5])),
        "error": of(None, "positive"),
        "level": of(0.9, "fraction"),
        "flow": flow,
        "solver": of("Tsit5", "choice", also=(diffrax.Tsit5, diffrax.Tsit5())),
        "rtol": of(1e-3, "fraction"),
        "progress": of(False, "flag"),
    },
    "fit_told": {"dataset": of(dataset, "dataset", also=(dataset,))},
    "read_curves": {
        "path": of(CURVE, "path", "curve", also=(__file__,)),
        "clock": of("step", "choice", welcome=(None,), also=("steps",)),
        "columns": of(("loss",), "choice", welcome=(ANYTHING[6],), also=("loss", ("step",), ("los",))),
    },
    "leading_pairs": {
        "dataset": of(whole_gradient, "dataset", also=(dataset,)),
        "name": of("shift", "choice", also=("bias",)),
        "count": of(1, "integer", also=(0, 3)),
    },
    "sweep": {
        "problem": of(two_layers.good, "problem", also=({}, {"a": 1}, {None: two_layers.good}, [two_layers.good])),
        "init": of("gaussian", "choice", also=(["gaussian", None], "gaussian:2", "gaussian-both:x", [["gaussian"]])),
        "side": of("A", "choice", also=("a", ["A", "A"], ["A", None])),
        "alpha": of(0.1, "array", also=(None, NAN, -1.0, 0.0, True, [0.1, "a"], [0.1, 0.1], [[0.1], [0.2]], [], DATE)),
        "rank": of(1, "array", also=(None, NAN, 1.5, 0, -1, True, [1, "a"], [1, 1], [[1], [2]], [], 7)),
        "seeds": of(1, "array", also=(None, NAN, 1.5, 0, -1, True, [1, "a"], [1, 1], [[1], [2]], [], [-1])),
        "t1": of(1.0, "positive"),
        "saves": of(3, "times"),
        "flow": flow,
        "solver": of("Tsit5", "choice", also=(diffrax.Tsit5, diffrax.Euler())),
        "rtol": of(1e-3, "fraction"),
        "max_steps": of(100, "integer", also=(0,)),
        "batch_size": of(64, "integer", also=(-1,)),
        "devices": of(1, "integer", also=(1000,)),
        "details": of(False, "flag"),
        "progress": of(False, "flag"),
        "out": of(None, "new path"),
        "overwrite": of(False, "flag"),
        "extend": of(False, "flag"),
        "client": of(None, "callable"),
        "executor": of(None, "callable"),
    },
    "sweep descent": {
        "problem": one_layer,
        "rank": of(1, "array"),
        "descend": of("gd:0.1", "choice", also=("gd", "gd:", "gd:0", "gd:0.1:1", "no:0.1", ["gd:0.1", "adam:1"])),
        "steps": of(2, "integer", also=(0, 2**40)),
        "saves": of(2, "iterations"),
        "gradient_noise": of(
            0.1, "array", also=(None, NAN, -1.0, True, [0.1, "a"], [0.1, 0.1], [[0.1], [0.2]], [], DATE)
        ),
        "progress": of(False, "flag"),
    },
    "time_to": {
        "loss": of(loss, "dataset", also=(loss.isel(time=-1), dataset, loss.drop_vars("time"))),
        "level": of(1.5, "number", welcome=(NAN,), also=(-1.0, dataset, loss)),
    },
    "zero_adapters": {
        "layers": of(((3, 3),), "shape", also=([(3,)], [(3, 3, 3)], [(0, 3)], [])),
        "rank": of(1, "integer", also=(0,)),
    },
}
# which users are given, and do not make
RESULTS = {
    "Adapted",
    "Advice",
    "Optimised",
    "Canonical",
    "Descent",
    "Learned",
    "Trajectory",
    "WorkersLost",
    "oracles.Cascade",
    "oracles.Products",
}
PAIRS = {"Adapter", "Scheme"}  # which hold anything: whoever takes them checks them, as the rows above do
ABSTRACT = {
    "AbstractProblem",
    "Adapters",
    "Flow",
    "Problem",
    "StepRule",
    "InputError",
    "PrecisionWarning",
    "StartWarning",
}


def values(argument):
    """Those of the kind and the further ones; kinds by name among these too."""
    for value in [*WRONG[argument.kind], *argument.also]:
        if isinstance(value, str) and value in WRONG:
            yield from WRONG[value]
        else:
            yield value


def function(name):
    name = name.partition(" ")[0]
    if name == "Chain":
        return lambda flows: lora_flow.Chain(*flows) if isinstance(flows, tuple) else lora_flow.Chain(flows)
    if name == "learn_in_turn":
        return lambda **row: lora_flow.learn_in_turn(**row, t1=1.0)
    return functools.reduce(getattr, name.split("."), lora_flow)


@pytest.mark.filterwarnings("ignore:A JAX array is being set as static", "ignore:Python iterable type")  # by Equinox
@pytest.mark.parametrize(("name", "argument"), [(name, one) for name, row in TABLE.items() for one in row])
def test_wrong_values_are_told_in_one_line(name, argument, monkeypatch, tmp_path):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.chdir(tmp_path)
    call, row = function(name), TABLE[name]
    one = row[argument]
    signature = inspect.signature(call).parameters
    told = []
    for value in values(one):
        default = signature[argument].default if argument in signature else NAN
        if any(value is good for good in one.welcome) or (value is None and default is None):
            continue
        given = value() if value is made or value is ragged else value
        try:
            with jax.numpy_rank_promotion("allow"):
                call(**{other: it.good for other, it in row.items()} | {argument: given})
        except InputError as error:
            line = str(error)
            said = re.fullmatch(rf"(.*\W)?{re.escape(one.named or argument)}\W.*, got .{{1,400}}", line)
            if not said or " must " not in line or " at 0x" in line:
                told.append(f"{value!r}: {line}")
        except BaseException as error:
            told.append(f"{value!r}: {type(error).__name__}: {error}"[:300])
        else:
            told.append(f"{value!r} is taken")
    assert not told, "\n".join(told)


ELSEWHERE = {"extend", "observed_told", "peft_apply", "peft_convert", "peft_init", "peft_observe"}
ELSEWHERE |= {"advise_checkpoint", "read_peft", "write_peft"}
"""Those that need a run to extend, or a checkpoint: see tests/test_growth.py and tests/bridge."""


def test_the_table_has_all_that_is_public():
    public = [*lora_flow.__all__, *(f"oracles.{name}" for name in oracles.__all__)]
    callables = {name for name in public if callable(function(name))}
    rows: dict[str, set[str]] = {}
    for name, row in TABLE.items():
        rows.setdefault(name.partition(" ")[0], set()).update(row)
    assert set(rows) == callables - RESULTS - PAIRS - ABSTRACT - ELSEWHERE
    for name, arguments in rows.items():
        wanted = set(inspect.signature(functools.reduce(getattr, name.split("."), lora_flow)).parameters)
        assert arguments == wanted - {"origin", "how"}, name


HOST = {name for name in TABLE if "problem" in name} | {
    "misaligned",
    "noisy",
    "ProtectedInputs",
    "learn_in_turn",
}  # draws
SOLVES = {
    "solve",
    "sweep",
    "descend",
    "sensitivity",
    "optimise",
    "fit",
    "advise",
    "time_to",
}  # whose traced values are tested beside each
FUNCTIONS = {"gradient_noise", "stable_lora"}  # what they return has no arrays
NUMERIC = {"number", "positive", "not negative", "fraction", "above one"}
TRACED = [
    (name, argument)
    for name, row in TABLE.items()
    for argument, one in row.items()
    if one.kind in NUMERIC and name not in HOST | SOLVES | FUNCTIONS and argument not in ("tolerance", "atol")
]


@pytest.mark.parametrize(("name", "argument"), TRACED)
def test_numbers_that_are_traced_pass_and_vectors_do_not(name, argument, monkeypatch):
    """Under `jit`, `vmap` and `grad` nothing is known of a number but that it is one."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    call, row = function(name), TABLE[name]
    good = row[argument].good

    def use(value):
        made_of = call(**{other: it.good for other, it in row.items()} | {argument: value})
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(made_of) if eqx.is_inexact_array(leaf))

    for transformed, example in ((jax.jit(use), good), (jax.vmap(use), good * jnp.ones(2)), (jax.grad(use), good)):
        assert jax.eval_shape(transformed, jnp.asarray(example)).shape == jnp.shape(example)
    with pytest.raises(InputError, match=rf"^{argument} must .*, got shape \(1,\) of float64"):
        jax.eval_shape(use, jnp.ones(1))


def test_a_number_is_checked_where_it_is_known():
    def positive(known):
        return known > 0

    for good in (1, 1.5, np.float32(2), np.ones(()), jnp.asarray(3)):
        require_number("x", good, "be positive", positive)
    for wrong in (0, -1.0, NAN, np.inf, True, "1", [1.0], np.ones(1), None, 1j):
        with pytest.raises(InputError, match=r"^x must be positive, got "):
            require_number("x", wrong, "be positive", positive)
