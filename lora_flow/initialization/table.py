"""The table of initialisations by name, for sweeps and the command line."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from jaxtyping import Array

from lora_flow.adapter import Adapters
from lora_flow.checks import InputError, kind, require, require_choice
from lora_flow.initialization.checks import check, check_drawn
from lora_flow.initialization.from_gradient import (
    gora_init,
    lora_ga_init,
    lora_ga_peft_init,
    lora_one_init,
    lora_one_theory_init,
    spectral_init,
)
from lora_flow.initialization.from_inputs import eva_init
from lora_flow.initialization.from_weights import loram_init, milora_init, olora_init, pissa_init
from lora_flow.initialization.learned import LEARNED, learned_in
from lora_flow.initialization.of_networks import (
    balanced_init,
    gaussian_both_init,
    gaussian_wide_init,
    invariant_init,
    spectral_both_init,
    tied_init,
)
from lora_flow.initialization.random import SIDES, gaussian_init, orthogonal_init
from lora_flow.problems.base import Problem


class Scheme(NamedTuple):
    """A named initialisation: one of `INITIALIZATIONS`, or one of your own. `sweep(init=...)` takes it like a name.

    - `init`: a function `init(key, problem, *, rank, alpha)`, with `side` where it is `sided`, that returns an
      `Adapter(a, b)` for each layer: A `(rank, in)` and B `(out, rank)`. Sweeps trace it, so write it in jax.numpy.
    - `about`, `asks`: the formula, and the needs of the problem and the rank, in a few words.
    - `sided`: whether the function takes `side`.
    - `offset`: whether the weights are frozen at `W_0 - s B_0 A_0`, so that the function does not change at t = 0.
    - `parameter`: the argument that a number after a colon stands for, as in "gaussian-both:25".
    - `network`: whether the scheme is meant for networks trained from scratch, `LinearNetwork`; any problem takes it.
    - `name`: the label in a sweep; by default the function's own name.
    """

    init: Callable[..., Adapters]
    about: str = ""
    asks: str = ""
    sided: bool = False
    offset: bool = False
    parameter: str = ""
    network: bool = False
    name: str = ""


_TABLE = {
    "gaussian": Scheme(gaussian_init, "one factor N(0, alpha^2), the other 0 (LoRA)", sided=True),
    "orthogonal": Scheme(orthogonal_init, "both random, in orthogonal halves of the rank: B A = 0", "an even rank"),
    "spectral": Scheme(spectral_init, "A = alpha z_j v_j, task's right vectors; B = 0", "rank >= the task's"),
    "lora-one": Scheme(lora_one_init, "B A = alpha^2 P_r(G)/S_1, balanced, G = -dL/dW"),
    "lora-one-theory": Scheme(lora_one_theory_init, "B A = alpha^2 P_r(G), balanced"),
    "lora-ga": Scheme(lora_ga_init, "A, B = alpha out^(1/4) (V_1..r^T, U_r+1..2r)", "2 r <= min(out, in)", offset=True),
    "lora-ga-peft": Scheme(
        lora_ga_peft_init, "A = alpha V_1..r^T, B = alpha out^(1/4) (U S)_r+1..2r", "2 r <= min(out, in)", offset=True
    ),
    "gora": Scheme(gora_init, "A = alpha U(±in^(-1/2)), B A = alpha^2 G P_A"),
    "pissa": Scheme(pissa_init, "B A = alpha^2/s (W's r largest triplets), balanced", "known weights", offset=True),
    "milora": Scheme(milora_init, "B A = alpha^2/s (W's r smallest triplets)", "known weights", offset=True),
    "olora": Scheme(olora_init, "W = Q R: B = alpha Q[:, :r], A = alpha R[:r]", "known weights", offset=True),
    "loram": Scheme(
        loram_init, "alpha times sines of W's size, growing with log r", "known weights, rank >= 2", offset=True
    ),
    "eva": Scheme(
        eva_init,
        "A = alpha (the inputs' r principal directions), B = 0",
        "known inputs, not white (--samples or --input-kappa)",
    ),
    "gaussian-both": Scheme(
        gaussian_both_init, "A ~ N(0, alpha^2 ratio), B ~ N(0, alpha^2/ratio)", parameter="ratio", network=True
    ),
    "gaussian-wide": Scheme(gaussian_wide_init, "both N(0, alpha^2 r^(-2p)), p = 1/2", parameter="p", network=True),
    "balanced": Scheme(balanced_init, "the product of gaussian-both, with A A^T = B^T B", network=True),
    "tied": Scheme(tied_init, "A = B^T ~ N(0, alpha^2), on square layers", network=True),
    "spectral-both": Scheme(
        spectral_both_init,
        "A = alpha ratio^(1/2) R V^T, B = alpha ratio^(-1/2) U R^T",
        parameter="ratio",
        network=True,
    ),
    "invariant": Scheme(
        invariant_init,
        "gaussian-both, its part outside the inputs' rows made orthogonal to the rest",
        "known inputs, not white (--samples or --input-kappa)",
        network=True,
    ),
}


_UNTRACED = {
    jax.errors.TracerArrayConversionError: "an operation of NumPy on an array",
    jax.errors.TracerBoolConversionError: "a condition of Python on an array",
    jax.errors.ConcretizationTypeError: "a number of Python made from an array",
    jax.errors.TracerIntegerConversionError: "a number of Python made from an array",
    jax.errors.JAXIndexError: "an index or a length made from an array",
}  # what raises each of JAX's errors


INITIALIZATIONS = {name: scheme._replace(name=name) for name, scheme in _TABLE.items()}
Init = str | Scheme | Callable[..., Adapters]  # a name, with a number after a colon or not, or one of one's own


def find_scheme(name: str) -> Scheme:
    """The scheme of a name, or of a name and its number, "gaussian-both:25", or its folder, "learned:runs/opt"."""
    base, colon, number = name.partition(":")
    if base == LEARNED:
        require(bool(number), "init", "name a folder of lora-flow optimise, as learned:runs/opt", repr(name))
        return Scheme(learned_in("init", Path(number)), f"learned in {number}", name=name)
    require_choice("init", base, INITIALIZATIONS, f"or {LEARNED}:FOLDER")
    scheme = INITIALIZATIONS[base]
    if not colon:
        return scheme
    require(bool(scheme.parameter), "init", f"come without a number for '{base}'", repr(name))
    try:
        value = float(number)
    except ValueError:
        raise InputError(f"init must have a number after the colon, got {name!r}") from None
    return scheme._replace(init=_with_number(scheme.init, scheme.parameter, value), name=name)


@functools.cache  # for what is compiled is kept by the function
def _with_number(init: Callable[..., Adapters], parameter: str, value: float) -> Callable[..., Adapters]:
    return functools.partial(init, **{parameter: value})


def as_scheme(init: Init) -> Scheme:
    """The scheme of a name, or a user's own initialisation: a `Scheme`, or a function under its name.

    **Raises:** `InputError` for anything else, and for an own scheme with a name that `INITIALIZATIONS` has.
    """
    if isinstance(init, str):
        return find_scheme(init)
    must = "be a name, a Scheme, or a function init(key, problem, rank, alpha) or (..., side)"
    function = init.init if isinstance(init, Scheme) else init
    require(callable(function) and not isinstance(function, type), "init", must, kind(init))
    try:
        hash(init)
        takes = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise InputError(f"init must be hashable, and have a signature, got a {type(function).__name__}") from None
    inner = function.func if isinstance(function, functools.partial) else function
    if not isinstance(init, Scheme):
        init = Scheme(function, str(inner.__doc__ or "").partition("\n")[0], sided="side" in takes)
    named = init if init.name else init._replace(name=str(getattr(inner, "__name__", type(inner).__name__)))
    taken = named.name.partition(":")[0] in (*INITIALIZATIONS, LEARNED) and find_scheme(named.name) != named
    require(
        not taken, "init", "have a name that is not one of INITIALIZATIONS, as in Scheme(init, name='mine')", named.name
    )
    return named


def initialize(init: Init, key: Array, problem: Problem, *, rank: int, alpha: float | Array, side: str) -> Adapters:
    """The start of a scheme, by its name or as `as_scheme` takes it; `side` goes to the schemes that take one.

    `Scheme.offset` says whether to solve `Offset`. **Raises:** `InputError` where an own scheme returns no adapters.
    """
    scheme = as_scheme(init)
    how = {"side": side} if scheme.sided else {}
    if scheme.name.partition(":")[0] in INITIALIZATIONS:
        return scheme.init(key, problem, rank=rank, alpha=alpha, **how)
    require_choice("side", side, SIDES)
    check(key, problem, rank, alpha, any_width=True)
    try:
        drawn = scheme.init(key, problem, rank=rank, alpha=alpha, **how)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        got = next((told for kind, told in _UNTRACED.items() if isinstance(error, kind)), "another operation on arrays")
        raise InputError(f"init '{scheme.name}' must be written in jax.numpy and jax.random, got {got}") from error
    return check_drawn(scheme.name, drawn, problem.layers, rank)
