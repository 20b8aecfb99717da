"""Fine-tuning a two-layer linear network by LoRA, the problem of Xu et al. (2025)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.adapter import Adapter, Adapters
from lora_flow.algebra.diagonal import Diagonal, Matrix, as_matrix, check_task, dense
from lora_flow.algebra.spectra import frobenius_norm, norm, norm_on_host, singular_values, spectral_norm
from lora_flow.algebra.thin import column_norms, squared_norm_of_product
from lora_flow.arrays import AnyArray
from lora_flow.checks import kind, require
from lora_flow.coordinates.base import Coordinates
from lora_flow.problems.base import AbstractProblem, Layers, Problem, kind_of, matrix_rank, on_host
from lora_flow.problems.formulas import keeps_all
from lora_flow.problems.update import OF_THE_UPDATE, of_the_update

OF_THE_GAINS = {
    "sigma": "sigma: singular value of the shift's pair (u, v) that is learned first",
    "sigma_w1": "||W1 v||: with the shift's pair (u, v) that is learned first",
    "sigma_w2": "||W2^T u||: with the shift's pair (u, v) that is learned first",
    "shift_rank": "rank of the shift",
    "aligned": "whether all is aligned: 1 where the shift, W1 and W2 have their singular vectors in common",
}


class Factorization(AbstractProblem):
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

    @property
    def coordinates(self) -> type[Coordinates]:
        """Canonical ones, where they are found quickly."""
        from lora_flow.coordinates.canonical import Canonical, is_quick_to_turn

        return Canonical if is_quick_to_turn(self) else super().coordinates

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

    def fastest_rate(self) -> float:
        known = on_host(self) if keeps_all(self, Factorization) else self
        return max(float(singular_values(task)[0]) for task in known.linearised_task())

    def task_rank(self) -> tuple[int, str]:
        """The rank of the shift."""
        return matrix_rank(singular_values(self.shift), self.shift.shape), "the shift"

    def details(self, adapters: Adapters) -> dict[str, np.ndarray]:
        """The update's singular values, terms and direction, and the parts of the loss."""
        w1, w2, shift = (np.asarray(matrix) for matrix in (self.w1, self.w2, self.shift))
        return of_the_update(w1, w2, shift, adapters)

    def meanings(self) -> dict[str, str]:
        return OF_THE_UPDATE | OF_THE_GAINS

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
        sigma, s1, s2 = self.gains()
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

    def summary(self) -> dict[str, Any]:
        return self.spectrum()

    def characteristics(self) -> dict[str, float | int]:
        """`leading_gains` as sigma, sigma_w1 and sigma_w2, the shift's rank, and whether all is aligned."""
        gains = dict(zip(("sigma", "sigma_w1", "sigma_w2"), self.leading_gains(), strict=True))
        spectrum = self.spectrum()
        return gains | {"shift_rank": len(spectrum["sigma_shift"]), "aligned": int(spectrum["aligned"])}

    def leading_gains(self) -> tuple[float, float, float]:
        """(sigma, ||W1 v||, ||W2^T u||) of the shift's singular pair (u, v) that is learned first.

        That is the pair with the largest sigma max(||W1 v||, ||W2^T u||); a shift of rank one has only one pair.
        """
        sigma, s1, s2 = self.gains()
        first = int(np.argmax(sigma * np.maximum(s1, s2)))
        return float(sigma[first]), float(s1[first]), float(s2[first])

    def gains(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
    got = kind_of(problem) if isinstance(problem, Problem) and not isinstance(problem, type) else kind(problem)
    require(keeps_all(problem, Factorization), "problem", "be a Factorization as it is", got)


def _non_zero(singular_values: np.ndarray, shape: tuple[int, ...]) -> list[float]:
    return singular_values[: matrix_rank(singular_values, shape)].tolist()


def _is_symmetric(product: np.ndarray) -> bool:
    tolerance = np.sqrt(np.finfo(product.dtype).eps) * norm_on_host(product)
    return product.shape[0] == product.shape[1] and bool(norm_on_host(product - product.T) <= tolerance)


def _given(shift: Any, target: Any) -> str:
    return "neither" if shift is None and target is None else "both"
