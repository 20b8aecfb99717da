"""Problems: frozen weights, the shift that the adapters must learn, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.adapter import Adapter, Adapters, check_layers, pad, zero_adapters
from lora_flow.algebra.matrices import (
    Diagonal,
    Matrix,
    as_matrix,
    check_task,
    column_norms,
    dense,
    frobenius_norm,
    norm,
    norm_on_host,
    singular_values,
    spectral_norm,
    squared_norm_of_product,
)
from lora_flow.arrays import AnyArray
from lora_flow.checks import kind, require
from lora_flow.problems.formulas import formula, keeps_all, keeps_loss

Layers = tuple[tuple[int, int], ...]


@runtime_checkable
class Problem(Protocol):
    """Anything whose adapters can be trained by gradient flow.

    `layers` holds the `(out, in)` shape of each adapted layer, and `loss` maps a tuple of adapters,
    one for each layer, to a scalar that is at least 0. The flow is then `-jax.grad(loss)`; a problem
    that knows a faster way to it offers `field(adapters)`, and `linearised_task()` likewise: formulas, which are used
    where they are about the loss in force (`lora_flow.problems.formulas`). `weights`, `layer_inputs`
    and `scaling`, LoRA's output multiplier, are what some initialisations are made from, and what
    `observe(adapters)` returns, scalars by name, is recorded along the way beside the loss. `any_width` says that ranks
    above the layer's dimensions make sense, as of a network's hidden layer; `of_products`, that the loss is one of the
    products B_i A_i alone. An object that is not
    a PyTree must be hashable, and must not change once it has been solved: the compiled program keeps its arrays.
    """

    @property
    def layers(self) -> Layers: ...

    def loss(self, adapters: Adapters) -> Array: ...


def require_problem(problem: Any, otherwise: str = "") -> None:
    """Raises for what is no problem; the message says what else would do."""
    fits = isinstance(problem, Problem) and not isinstance(problem, type)
    require(fits, "problem", f"have layers and loss(adapters){otherwise}", kind(problem))
    check_layers("problem.layers", problem.layers)


class Factorization(eqx.Module):
    r"""Fine-tuning a two-layer linear network by LoRA: `1/2 ||shift - update||_F^2`.

    The network `W2 W1` is frozen; the adapters add `B_i A_i` to each `W_i` and must learn
    `shift = Yft - W2 W1` (Xu et al., arXiv 2503.06982, equation 2). A loss is a sum of squares, not
    a mean; time is gradient-flow time.

    **Arguments:** `w1` of shape `(h, n)`, `w2` of shape `(m, h)`, and either `shift` or
    `target = Yft`, of shape `(m, n)`. Arrays take JAX's default floating-point type; a `Diagonal`, which is
    not written out, is welcome for `w1`, `w2` and `shift`.

    **Raises:** `InputError` (a `ValueError`) for shapes that do not match, for entries that are not
    finite, and for a shift of zero.
    """

    w1: Float[Array, "h n"] | Diagonal
    w2: Float[Array, "m h"] | Diagonal
    shift: Float[Array, "m n"] | Diagonal

    of_products = True

    def __init__(
        self,
        w1: AnyArray | Diagonal,
        w2: AnyArray | Diagonal,
        shift: AnyArray | Diagonal | None = None,
        target: AnyArray | None = None,
    ):
        self.w1, self.w2 = as_matrix("w1", w1), as_matrix("w2", w2)
        (h, n), (m, h2) = self.w1.shape, self.w2.shape
        transposed = "; is w1 transposed?" if h2 == n else "; is w2 transposed?" if m == h else ""
        require(h == h2, "w2", f"have as many columns as w1 has rows ({h})", f"shape {(m, h2)}{transposed}")
        require((shift is None) != (target is None), "shift or target", "be given, and not both", _given(shift, target))
        if shift is not None:
            self.shift = as_matrix("shift", shift)
            require(self.shift.shape == (m, n), "shift", f"have shape {(m, n)}", self.shift.shape)
        else:
            goal = as_matrix("target", target)
            require(goal.shape == (m, n), "target", f"have shape {(m, n)}", goal.shape)
            self.shift = dense(goal) - dense(self.w2 @ self.w1)
        check_task("shift", self.shift)

    @property
    def layers(self) -> Layers:
        (h, n), m = self.w1.shape, self.w2.shape[0]
        return (h, n), (m, h)

    @property
    def weights(self) -> tuple[Matrix, Matrix]:
        """The frozen weights by layer."""
        return self.w1, self.w2

    @property
    def layer_inputs(self) -> tuple[None, Matrix]:
        """Each layer's inputs when the network's are white, a row a sample: None for white, then the columns of W1."""
        return None, self.w1.T

    def update(self, adapters: Adapters) -> Float[Array, "m n"]:
        """F = W2 B1 A1 + B2 A2 W1 + B2 A2 B1 A1, by thin products in O((mh + hn + mn) r)."""
        _, x, y = self._factors(adapters)
        return x @ y

    def residual(self, adapters: Adapters) -> Float[Array, "m n"]:
        """E = shift - update, without the cancellation of `Yft - (W2 + B2 A2)(W1 + B1 A1)`."""
        return dense(self.shift) - self.update(adapters)

    def loss(self, adapters: Adapters) -> Float[Array, ""]:
        """L = 1/2 ||E||_F^2; where the shift is a `Diagonal` of low rank, from thin factors in O((m + n) r^2)."""
        _, x, y = self._factors(adapters)
        if isinstance(self.shift, Diagonal) and 2 * (self.shift.rank + x.shape[1]) < min(self.shift.shape):
            u, v = self.shift.factors()
            return 0.5 * squared_norm_of_product(jnp.concatenate([u, -x], axis=1), jnp.concatenate([v, y]))
        return 0.5 * jnp.sum(self.residual(adapters) ** 2)

    def field(self, adapters: Adapters) -> Adapters:
        """The gradient flow's right-hand side, -dL/dA_i and -dL/dB_i (Lemma A.5 of the paper)."""
        (a1, b1), (a2, b2) = adapters
        coupling, x, y = self._factors(adapters)
        if isinstance(self.shift, Diagonal):
            residual_y, x_residual = self.shift @ y.T - x @ (y @ y.T), x.T @ self.shift - (x.T @ x) @ y
        else:
            residual = self.shift - x @ y
            residual_y, x_residual = residual @ y.T, x.T @ residual
        r = a1.shape[0]
        residual_a1, b2_residual = residual_y[:, :r], x_residual[r:]
        joint = b2.T @ residual_a1
        return (
            Adapter(x_residual[:r] + coupling.T @ b2_residual, self.w2.T @ residual_a1 + a2.T @ joint),
            Adapter(b2_residual @ self.w1.T + joint @ b1.T, residual_y[:, r:]),
        )

    def _factors(self, adapters: Adapters) -> tuple[Array, Array, Array]:
        """A2 B1, and thin factors of the update: F = [W2 B1, B2] [A1; A2 (W1 + B1 A1)]."""
        (a1, b1), (a2, b2) = adapters
        coupling = a2 @ b1
        return (
            coupling,
            jnp.concatenate([self.w2 @ b1, b2], axis=1),
            jnp.concatenate([a1, a2 @ self.w1 + coupling @ a1]),
        )

    def linearised_task(self) -> tuple[Matrix, Matrix]:
        """(W2^T shift, shift W1^T), the changes that each layer's adapter learns first, while it is small."""
        return self.w2.T @ self.shift, self.shift @ self.w1.T

    def task_sizes(self) -> tuple[Array, Array]:
        shift = frobenius_norm(self.shift)
        return frobenius_norm(self.w2) * shift, shift * frobenius_norm(self.w1)

    def growth_bound(self) -> Callable[[Adapters], Float[Array, ""]]:
        """A function from a state to a bound on the growth rate of small modes: the largest ||dL/dW_i||_F, in O(N^2 r).

        Small modes of layer i grow by the gradient with respect to its weight: W2'^T E for the first layer and E W1'^T
        for the second, with W_i' = W_i + B_i A_i. A `Diagonal` shift is not written out; the bound is then
        max ||W_i||_2 ||E||_F.
        """
        if isinstance(self.shift, Diagonal):
            gain = jnp.maximum(spectral_norm(self.w1), spectral_norm(self.w2))
            return lambda adapters: gain * jnp.sqrt(2 * self.loss(adapters))
        task1, task2 = map(dense, self.linearised_task())

        def bound(adapters: Adapters) -> Array:
            (a1, b1), (a2, b2) = adapters
            _, x, y = self._factors(adapters)
            first = task1 - (self.w2.T @ x) @ y + a2.T @ (b2.T @ self.shift - (b2.T @ x) @ y)
            second = task2 - x @ (y @ self.w1.T) + (self.shift @ a1.T - x @ (y @ a1.T)) @ b1.T
            return jnp.maximum(norm(first), norm(second))

        return bound

    def spectrum(self) -> dict[str, Any]:
        """The singular values that theory is written in, as plain numbers.

        `sigma_shift` and `sigma_pretrained` are the non-zero singular values of the shift and of
        `W2 W1`. `sigma_w1 = ||W1 v||` and `sigma_w2 = ||W2^T u||` are the weights' gains along the shift's
        top pair (u, v), and `delta_w` is their ratio. `aligned` says whether the shift, W1 and W2
        have their singular vectors in common (Assumptions 2.1 and 2.2).
        """
        sigma, s1, s2 = self._gains()
        host = on_host(self)
        pretrained = host.w2 @ host.w1
        return {
            "sigma_shift": _non_zero(sigma, self.shift.shape),
            "sigma_pretrained": _non_zero(singular_values(pretrained), pretrained.shape),
            "sigma_w1": float(s1[0]),
            "sigma_w2": float(s2[0]),
            "delta_w": float(s1[0] / s2[0]) if s2[0] else float("inf"),
            "aligned": self._is_aligned(),
        }

    def leading_gains(self) -> tuple[float, float, float]:
        """(sigma, ||W1 v||, ||W2^T u||) of the shift's singular pair (u, v) that is learned first.

        That is the pair with the largest sigma max(||W1 v||, ||W2^T u||); a shift of rank one has only one pair.
        """
        sigma, s1, s2 = self._gains()
        first = int(np.argmax(sigma * np.maximum(s1, s2)))
        return float(sigma[first]), float(s1[first]), float(s2[first])

    def _gains(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(sigma, ||W1 v||, ||W2^T u||) of all the shift's singular pairs, the largest sigma first."""
        host = on_host(self)
        if isinstance(host.shift, Diagonal):  # along the coordinate axes
            sigma, gains = np.abs(host.shift.values), (host.w1, host.w2.T)
        else:
            left, sigma, right = np.linalg.svd(host.shift, full_matrices=False)
            gains = host.w1 @ right.T, host.w2.T @ left
        order = np.argsort(-sigma, kind="stable")
        s1, s2 = map(column_norms, gains)
        return sigma[order], s1[order], s2[order]

    def _is_aligned(self) -> bool:
        matrices = self.w1, self.w2, self.shift
        if all(isinstance(matrix, Diagonal) for matrix in matrices):
            return True
        w1, w2, shift = map(np.asarray, matrices)
        pretrained = w2 @ w1
        return all(
            _is_symmetric(product) for product in (pretrained @ shift.T, pretrained.T @ shift, w2.T @ pretrained @ w1.T)
        )

    def __str__(self) -> str:
        spectrum = self.spectrum()
        aligned, along = ("aligned", "") if spectrum["aligned"] else ("not aligned", " along the shift's top pair")
        return (
            f"{type(self).__name__}: W1 {self.w1.shape[0]} x {self.w1.shape[1]}, "
            f"W2 {self.w2.shape[0]} x {self.w2.shape[1]}; "
            f"{spectrum_text(spectrum['sigma_shift'])}, {aligned} with the weights; "
            f"delta_w = {spectrum['delta_w']:.4g}{along}"
        )


def spectrum_text(sigma: Sequence[float] | np.ndarray, name: str = "shift") -> str:
    """A matrix's non-zero singular values, for people."""
    shown = ", ".join(f"{s:.3g}" for s in sigma[:4]) + (", ..." if len(sigma) > 4 else "")
    return f"{name} of rank {len(sigma)} with singular values {shown}"


def check_factorization(problem: Any) -> None:
    """Raises for what no other factorisation can stand in for: a subclass that changes or adds something."""
    got = type(problem).__name__ if isinstance(problem, Problem) and not isinstance(problem, type) else kind(problem)
    require(keeps_all(problem, Factorization), "problem", "be a Factorization as it is", got)


def check_padding(problem: Problem, ranks: Sequence[int]) -> None:
    """Raises where padding with zero rows of A and columns of B changes the loss, or where the padding moves.

    A loss of the products B_i A_i needs no check. Other losses are tried at one state.
    """
    least, most = min(ranks), max(ranks)
    if least == most or of_products(problem):
        return
    small = probe(problem.layers, least)
    slope, before, after = jax.grad(problem.loss)(pad(small, most)), problem.loss(small), problem.loss(pad(small, most))
    moved = [(one.a[least:], one.b[:, least:]) for one in slope]
    same = jnp.abs(after - before) <= jnp.sqrt(jnp.finfo(after.dtype).eps) * jnp.abs(before)
    stays = all(not jnp.any(leaf) for leaf in jax.tree.leaves(moved))
    must = "be one number for a problem whose loss depends on it by itself, beside the products B A"
    require(bool(same) and stays, "rank", must, sorted(set(map(int, ranks))))


def of_products(problem: Any) -> bool:
    """Whether the loss is known to be one of the products B_i A_i alone."""
    return bool(formula(problem, "of_products"))


def probe(layers: Layers, rank: int) -> Adapters:
    """Adapters at which nothing vanishes, always the same."""

    def wave(rows: int, columns: int, phase: float) -> Array:
        return jnp.cos(phase + jnp.arange(rows)[:, None] + 0.7 * jnp.arange(columns)[None] ** 1.5) / np.sqrt(rank)

    return tuple(Adapter(wave(rank, n_in, 0.1), wave(n_out, rank, 0.5)) for n_out, n_in in layers)


def vector_field(problem: Problem) -> Callable[[Adapters], Adapters]:
    """The problem's own field where it has one of its loss, else -grad of that."""
    own = formula(problem, "field")
    if own is not None:
        return own
    return lambda adapters: jax.tree.map(jnp.negative, jax.grad(problem.loss)(adapters))


def own_observables(problem: Problem, adapters: Adapters) -> dict[str, Array]:
    """The problem's own observables of adapters, beside those that every problem has.

    **Raises:** `InputError` for a value that is not a scalar.
    """
    observe = getattr(problem, "observe", None)
    own = {} if observe is None else {name: jnp.asarray(value, float) for name, value in observe(adapters).items()}
    for name, value in own.items():
        require(value.ndim == 0, f"the observable '{name}' of the problem", "be a scalar", f"shape {value.shape}")
    return own


def linearised_task(problem: Problem) -> tuple[Matrix, ...]:
    """-dL/dW_i at the pretrained weights, the change that each layer's adapter learns while it is small.

    A problem without a formula for its loss is differentiated: with A = 0 and B = I the gradient with respect to A is
    the gradient with respect to the layer's weight, since B A = 0 changes no layer.

    **Returns:** one `(out, in)` matrix for each layer.

    **Raises:** `InputError` for what is no problem.
    """
    require_problem(problem)
    own = formula(problem, "linearised_task")
    if own is not None:
        return own()

    return tuple(_task(problem, index, jnp.eye(n_out)) for index, (n_out, _) in enumerate(problem.layers))


def _task(problem: Problem, index: int, b: Array, a: float | Array = 0.0) -> Array:
    """Minus the gradient with respect to one layer's A, at B = I the layer's task."""
    start = list(zero_adapters(problem.layers, len(b)))
    start[index] = Adapter(start[index].a + a, b)
    return -jax.grad(problem.loss)(tuple(start))[index].a


def task_sizes(problem: Problem, tasks: Sequence[Matrix]) -> tuple[Float[Array, ""], ...]:
    """For each linearised task the product of its factors' norms: beside this product the task may be rounding.

    A task is J^T E, with E the residual and J its derivative. For a problem that offers no formula of their norms,
    ||E|| is that of a sum of squares, (2 L)^(1/2), and ||J||^2 the curvature along some change of the layer.
    """
    own = formula(problem, "task_sizes")
    if own is not None:
        return own()
    loss = problem.loss(zero_adapters(problem.layers, 1))

    def size(index: int, task: Array) -> Array:
        ((change, _),) = probe(((task.shape[0], task.shape[1]),), len(task))
        change = change / norm(change)
        unit = jnp.eye(len(task))
        try:
            _, slope = jax.jvp(lambda a: _task(problem, index, unit, a), (jnp.zeros_like(change),), (change,))
        except Exception:  # of a loss that is not made to be differentiated twice, exact zeros are all that is known
            slope = jnp.zeros_like(change)
        norms = jnp.sqrt(2 * jnp.abs(loss) * norm(slope))
        return jnp.where(jnp.isfinite(norms), norms, 0.0)

    return tuple(size(index, dense(task)) for index, task in enumerate(tasks))


def scaling_of(problem: Problem) -> Float[Array, ""]:
    """s, LoRA's output multiplier: the problem's, or 1."""
    return jnp.asarray(getattr(problem, "scaling", 1.0), float)


def on_host(tree: Any) -> Any:
    """The PyTree with NumPy's arrays, for which no operation is compiled."""
    return jax.tree.map(np.asarray, tree)


def fastest_rate(problem: Problem) -> float:
    """The largest singular value of the linearised tasks: the rate at which small adapters grow."""
    known = on_host(problem) if keeps_all(problem, Factorization) else problem
    return max(float(singular_values(task)[0]) for task in linearised_task(known))


def task_rank(problem: Problem) -> tuple[int, str]:
    """The largest rank to be learned, and the matrix that has it: the shift, or else one of the linearised tasks."""
    if keeps_loss(problem, Factorization):
        return matrix_rank(singular_values(problem.shift), problem.shift.shape), "the shift"
    ranks = [matrix_rank(singular_values(task), task.shape) for task in linearised_task(problem)]
    return max(ranks), f"-dL/dW of layer {1 + int(np.argmax(ranks))} without adapters"


def matrix_rank(singular_values: np.ndarray, shape: tuple[int, ...], tolerance: float | None = None) -> int:
    """The number of singular values above rounding, for a matrix that came out of a product or two.

    Or above the `tolerance`, relative to the largest, which is 10 max(shape) eps by default.
    """
    tolerance = 10 * max(shape) * np.finfo(singular_values.dtype).eps if tolerance is None else tolerance
    return int(np.sum(singular_values > tolerance * singular_values[0]))


def _non_zero(singular_values: np.ndarray, shape: tuple[int, ...]) -> list[float]:
    return singular_values[: matrix_rank(singular_values, shape)].tolist()


def _is_symmetric(product: np.ndarray) -> bool:
    tolerance = np.sqrt(np.finfo(product.dtype).eps) * norm_on_host(product)
    return product.shape[0] == product.shape[1] and bool(norm_on_host(product - product.T) <= tolerance)


def _given(shift: Any, target: Any) -> str:
    return "neither" if shift is None and target is None else "both"
