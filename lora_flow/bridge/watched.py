"""What one layer's adapter does over a run: the simulator's observables, and those of its update of the weight.

States are taken one at a time, and leave matrices of the rank's size behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lora_flow.adapter import Adapter
from lora_flow.dynamics.layer_spectra import layers_over_time
from lora_flow.dynamics.measurements import Direction, Measurement, measure
from lora_flow.dynamics.observables import OBSERVABLES
from lora_flow.runtime.compiling import compiled

ROUNDING = 1e-12  # of the factors' sizes, up to which an update is zero

OF_UPDATES = {
    "norm_a": "Frobenius norm of A",
    "norm_b": "Frobenius norm of B",
    "imbalance": "||A A^T - B^T B||_F",
    "update_norm": "Frobenius norm of the update: s B A, less the start's where that is taken off the weight",
    "update_error": "1 - cos of the update's top singular pair (u, v) and the direction's: cos = (l^T u)(r^T v)",
    "effective_rank": "effective rank of the update: exp of the entropy of its singular values over their sum",
    "loss_change": "change of the loss since the start to first order: <dL/dW, update>",
}


class Watched(NamedTuple):
    """A layer, and what its adapter is held against.

    - `left`, `right`: the direction that alignment is told of, a singular pair.
    - `scaling`: the output multiplier s.
    - `descent`: -dL/dW where it is known.
    - `start`: the factors at the start, where they are known; `offset` says that s B A of them is off the weight.
    """

    left: Float[np.ndarray, " out"]
    right: Float[np.ndarray, " in"]
    scaling: float
    descent: Float[np.ndarray, "out in"] | None = None
    start: Adapter | None = None
    offset: bool = False


class State(NamedTuple):
    """What is left of a layer's factors at one step."""

    measured: Measurement
    singular_values: Float[np.ndarray, " k"]  # of the update
    update_error: float
    gain: float  # <-dL/dW, s B A>
    norm_a: float
    norm_b: float
    imbalance: float


def meanings() -> dict[str, str]:
    """Name -> meaning of all that `watch` returns of every step."""
    own = {_name(name): one.about.replace("_{i}", "").replace("{i}", "") for name, one in OBSERVABLES.entries.items()}
    own["drift"] = "drift of A A^T - B^T B from the start, relative to ||Z||^2: 0 for gradient flow"
    return own | OF_UPDATES


def watch(layer: Watched, states: Iterable[Adapter]) -> dict[str, np.ndarray]:
    """The observables of a layer by name over its states, and `singular_value` of the update over states and modes.

    `drift` is that from the start, or else from the first state. Without `descent` there is no `loss_change`; where the
    start is not known it is NaN.
    """
    seen = [_state(layer, one) for one in states]
    start = seen[0] if layer.start is None else _state(layer, layer.start)
    stacked: Measurement = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[one.measured for one in seen])
    found = {name: np.asarray(values) for name, values in _observables(stacked, start.measured).items()}
    spectra = np.stack([one.singular_values for one in seen])
    own = ("norm_a", "norm_b", "imbalance", "update_error")
    found |= {name: np.array([getattr(one, name) for one in seen]) for name in own}
    found |= {"update_norm": np.linalg.norm(spectra, axis=1), "effective_rank": np.asarray(effective_rank(spectra))}
    found["singular_value"] = spectra
    if layer.descent is not None:
        since = np.nan if layer.start is None else start.gain
        found["loss_change"] = np.array([since - one.gain for one in seen])
    return found


def effective_rank(singular_values: Float[np.ndarray, "*states k"]) -> Float[np.ndarray, "*states"] | float:
    """The exponential of the entropy of the values over their sum (Roy and Vetterli 2007); NaN where all are zero."""
    total = singular_values.sum(axis=-1, keepdims=True)
    share = singular_values / np.where(total > 0, total, np.nan)
    return np.exp(-np.sum(share * np.log(np.where(share > 0, share, 1.0)), axis=-1))


def update_pairs(layer: Watched, adapter: Adapter) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The singular triplets U, S, V^T of the update, in decreasing order; S is zero where it is rounding."""
    a, b = (np.asarray(factor, np.float64) for factor in adapter)
    if layer.offset and layer.start is not None:
        a, b = np.concatenate([a, layer.start.a]), np.concatenate([b, -np.asarray(layer.start.b)], axis=1)
    q, left = np.linalg.qr(b)
    p, right = np.linalg.qr(a.T)
    u, s, vt = np.linalg.svd(left @ right.T)
    s = np.where(s > ROUNDING * np.linalg.norm(left) * np.linalg.norm(right), s, 0.0)
    kept = len(s)
    return q @ u[:, :kept], layer.scaling * s, vt[:kept] @ p.T


def _state(layer: Watched, adapter: Adapter) -> State:
    a, b = (np.asarray(factor, np.float64) for factor in adapter)
    u, s, vt = update_pairs(layer, adapter)
    cosine = (layer.left @ u[:, 0]) * (vt[0] @ layer.right) if s[0] > 0 and layer.left.any() else np.nan
    gain = np.nan if layer.descent is None else layer.scaling * float(np.sum((b.T @ layer.descent) * a))
    measured = _measured(Adapter(jnp.asarray(a), jnp.asarray(b)), jnp.asarray(layer.left), jnp.asarray(layer.right))
    sizes = (float(np.linalg.norm(one)) for one in (a, b, a @ a.T - b.T @ b))
    return State(measured, s, float(1 - cosine), gain, *sizes)


@compiled()
def _measured(adapter: Adapter, left: jax.Array, right: jax.Array) -> Measurement:
    return measure((adapter,), (Direction(left, right),))[0]


@compiled()
def _observables(measured: Measurement, start: Measurement) -> dict[str, jax.Array]:
    values = OBSERVABLES.values(layers_over_time((measured,), 1.0, (start,)))
    names = [name for one in OBSERVABLES.entries.values() for name, _ in one.told(1)]
    return {_name(key): values[name] for key, name in zip(OBSERVABLES.entries, names, strict=True)}


def _name(of_layers: str) -> str:
    """An observable's name without the layer's number."""
    return of_layers.replace("_{i}", "").replace("{i}", "")
