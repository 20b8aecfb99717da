"""Tasks that one layer learns in turn, and an estimate of the inputs that past tasks have used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lora_flow.adapter import Adapters
from lora_flow.algebra.diagonal import as_matrix, dense
from lora_flow.algebra.spectra import eigenvalue_rounding, frobenius_norm, spectral_norm
from lora_flow.arrays import AnyArray, real_array
from lora_flow.checks import kind, require, require_integer, require_number
from lora_flow.problems.base import Layers
from lora_flow.problems.one_layer import AdaptedLayer, tail


class Tasks(AdaptedLayer):
    r"""Linear regressions that one layer learns one after another, `l_j(W) = 1/(2 N_j) ||X_j (W_j - W)^T||_F^2`.

    The layer computes W = weight + s B A. The loss is that of the task `now`, and the losses of all tasks are observed
    as "loss_1", "loss_2", ... `merged` puts adapters into the weight and turns to the next task; `learn_in_turn` does
    so for all of them.

    **Arguments:** `weight` W0 of shape `(out, in)`; `tasks`, a pair (W_j, X_j) for each, with the solution W_j
    `(out, in)` and the inputs X_j `(N_j, in)`, a row a sample, or None for white inputs; `now`, the place of the task
    that is learned, from 0; the `scaling` s.

    **Raises:** `InputError` for no tasks, shapes that do not match, or entries that are not finite.
    """

    weight: Float[Array, "out in"]
    shifts: Float[Array, "tasks out in"]  # W_j - weight
    features: Float[Array, "tasks rows in"]  # of X_j/sqrt(N_j) the triangular factor, with rows of zeros
    now: Int[Array, ""]
    scaling: Float[Array, ""]

    def __init__(
        self,
        weight: AnyArray,
        tasks: Sequence[Any],
        now: int = 0,
        scaling: Any = 1.0,
    ):
        self.weight = dense(as_matrix("weight", weight))
        several = isinstance(tasks, (list, tuple)) and len(tasks) > 0
        require(several, "tasks", "hold at least one pair (W, X)", kind(tasks))
        read = [_read(f"tasks[{j}]", one, self.weight.shape) for j, one in enumerate(tasks)]
        rows = max(len(features) for _, features in read)
        self.shifts = jnp.stack([solution for solution, _ in read]) - self.weight[None]
        self.features = jnp.stack([jnp.pad(one, ((0, rows - len(one)), (0, 0))) for _, one in read])
        require_integer("now", now, f"lie between 0 and {len(tasks) - 1}, the place of a task", 0, len(tasks) - 1)
        self.now = jnp.asarray(now)
        self.scaling = real_array("scaling", scaling, "be one number")
        require_number("scaling", self.scaling, "be positive and finite", lambda known: known > 0)

    @property
    def count(self) -> int:
        """The number of tasks."""
        return len(self.shifts)

    @property
    def layers(self) -> Layers:
        return (self.weight.shape,)  # type: ignore[return-value]

    @property
    def layer_inputs(self) -> tuple[Float[Array, "rows in"]]:
        """The inputs of the task that is learned, up to a rotation of the samples and their number."""
        return (self.features[self.now],)

    def loss_of(self, change: Float[Array, "out in"]) -> Float[Array, ""]:
        return 0.5 * jnp.sum((self.features[self.now] @ (self.shifts[self.now] - change).T) ** 2)

    def descent_of(self, change: Float[Array, "out in"]) -> Float[Array, "out in"]:
        features = self.features[self.now]
        return (features @ (self.shifts[self.now] - change).T).T @ features

    def losses(self, change: Float[Array, "out in"] | None = None) -> Float[Array, " tasks"]:
        """The loss of every task, with the weight as it is or changed by `change`."""
        missing = self.shifts if change is None else self.shifts - change[None]
        return 0.5 * jnp.sum((self.features @ missing.mT) ** 2, axis=(1, 2))

    def merged(self, adapters: Adapters) -> Tasks:
        """The tasks with s B A added to the weight, where the next one is learned; after the last, the last again."""
        change = self._change(adapters)
        following = jnp.minimum(self.now + 1, self.count - 1)
        changed = self.weight + change, self.shifts - change[None], following
        return eqx.tree_at(lambda tasks: (tasks.weight, tasks.shifts, tasks.now), self, changed)

    @property
    def second_moments(self) -> Float[Array, "in in"]:
        """X^T X/N of the inputs of the task that is learned."""
        features = self.features[self.now]
        return features.T @ features

    def observe(self, adapters: Adapters) -> dict[str, Array]:
        losses = self.losses(self._change(adapters))
        return {f"loss_{j}": loss for j, loss in enumerate(losses, start=1)}

    def meanings(self) -> dict[str, str]:
        return {f"loss_{j}": f"loss of task {j}, 1/(2 N) ||X (W_{j} - W)^T||_F^2" for j in range(1, self.count + 1)}

    def task_sizes(self) -> tuple[Array]:
        features, shift = self.features[self.now], self.shifts[self.now]
        return (self.scaling * frobenius_norm(features) ** 2 * frobenius_norm(shift),)

    def smoothness(self) -> Float[Array, ""]:
        """The Lipschitz constant of dL/d(B A): s^2 times the largest eigenvalue of X^T X/N."""
        return (self.scaling * spectral_norm(self.features[self.now])) ** 2

    def lowest_loss(self, rank: int, frozen: np.ndarray | None = None) -> float:
        """As for `Regression`."""
        shift = np.asarray(self.shifts[self.now]) + (0.0 if frozen is None else frozen)
        return tail(shift @ np.asarray(self.features[self.now]).T, rank)

    def _about(self) -> str:
        return f", task {int(self.now) + 1} of {self.count}"


def _read(name: str, task: Any, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """W_j, and a matrix with at most `in` rows whose Gram matrix is X_j^T X_j/N_j."""
    pair = isinstance(task, (list, tuple)) and len(task) == 2
    require(pair, name, "be a pair (W, X)", kind(task))
    solution = dense(as_matrix(f"{name}[0]", task[0]))
    require(solution.shape == shape, f"{name}[0]", f"have the weight's shape {shape}", solution.shape)
    if task[1] is None:
        return solution, jnp.eye(shape[1])
    inputs = dense(as_matrix(f"{name}[1]", task[1]))
    must = f"have {shape[1]} columns, as the weight has"
    require(inputs.shape[1] == shape[1], f"{name}[1]", must, f"shape {inputs.shape}")
    features = inputs / np.sqrt(len(inputs))
    return solution, jnp.linalg.qr(features)[1] if len(features) > shape[1] else features


class ProtectedInputs(eqx.Module):
    r"""An estimate of the inputs that past tasks have used, which keeps their second moments and no samples.

    `C <- decay C + X^T X/N` after each task. The `basis` V has the top eigenvectors of C, as many as hold 1 - eps of
    its trace. A stand-in derived for this project for the online estimation of Janus-LoRA (arXiv 2605.28495), whose
    formula is not public. The span is exact for inputs that are white in subspaces, as long as no direction has less
    than the share eps.

    **Arguments:** `size`, the number of inputs of the layer; `eps`, the share of tr C to be left unprotected; `decay`,
    of older tasks, 1 for none.

    **Raises:** `InputError` for a size below 1, an eps outside 0 <= eps < 1 or a decay outside 0 < decay <= 1.
    """

    covariance: Float[np.ndarray, "in in"]
    eps: float
    decay: float

    def __init__(self, size: int, eps: float = 1e-3, decay: float = 1.0):
        require_integer("size", size, "be at least 1, the number of inputs", 1)
        require_number("eps", eps, "be at least 0 and below 1", lambda share: 0 <= share < 1)
        require_number("decay", decay, "be positive and at most 1", lambda share: 0 < share <= 1)
        self.covariance, self.eps, self.decay = np.zeros((size, size)), float(eps), float(decay)

    def extend(self, inputs: AnyArray) -> ProtectedInputs:
        """The estimate after a task with these inputs, `(N, in)`, a row a sample.

        **Raises:** `InputError` unless they are a finite matrix with a column for each input.
        """
        known, size = np.asarray(dense(as_matrix("inputs", inputs))), len(self.covariance)
        require(known.shape[1] == size, "inputs", f"have {size} columns, one for each input", f"shape {known.shape}")
        return self.extend_by(known.T @ known / len(known))

    def extend_by(self, moments: AnyArray) -> ProtectedInputs:
        """The estimate after a task whose inputs have these second moments, X^T X/N, `(in, in)`.

        **Raises:** `InputError` unless they are a finite matrix of the inputs' size.
        """
        known, shape = np.asarray(dense(as_matrix("moments", moments))), self.covariance.shape
        require(known.shape == shape, "moments", f"have the shape {shape}", known.shape)
        return eqx.tree_at(lambda one: one.covariance, self, self.decay * self.covariance + known)

    @property
    def basis(self) -> Float[np.ndarray, "in k"]:
        """V, the largest eigenvalue's vector first; without a task `(in, 0)`."""
        values, vectors = np.linalg.eigh(self.covariance)
        values, vectors = values[::-1], vectors[:, ::-1]
        known = np.where(values > eigenvalue_rounding(values), values, 0.0)
        held = np.concatenate([[0.0], np.cumsum(known)])
        enough = held >= (1 - self.eps) * held[-1] - eigenvalue_rounding(values)
        return vectors[:, : int(np.argmax(enough))]

    def __str__(self) -> str:
        return f"ProtectedInputs: {self.basis.shape[1]} of {len(self.covariance)} directions, eps = {self.eps:g}"
