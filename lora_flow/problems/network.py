"""Two-layer linear networks that are trained from scratch, for pretraining."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.adapter import Adapters
from lora_flow.algebra.diagonal import Diagonal, as_matrix, check_task, dense
from lora_flow.algebra.spectra import frobenius_norm, norm, singular_values, spectral_norm
from lora_flow.arrays import AnyArray
from lora_flow.checks import concrete, require, require_integer, require_number
from lora_flow.coordinates.base import Coordinates
from lora_flow.problems.base import Layers, Problem, kind_of, matrix_rank
from lora_flow.problems.factorization import Factorization, spectrum_text
from lora_flow.problems.formulas import keeps_loss
from lora_flow.problems.one_layer import AdaptedLayer, tail

Matrix = Array | np.ndarray


class LinearNetwork(AdaptedLayer):
    r"""A two-layer linear network trained as a whole: `1/2 ||Y - X W1 W2||_F^2`, in excess of its minimum.

    These are the networks of Min et al. 2021 (arXiv 2105.06351), Xu et al. 2023 (AISTATS) and Xu et al. 2025 (arXiv
    2505.11664), with W1 `(n, h)` and W2 `(h, m)`. For the rest of the package the network is one adapted layer of rank
    h without a pretrained weight, with `B A = (W1 W2)^T`. Start and state are `(Adapter(a=W1.T, b=W2.T),)`, and h may
    be any width.

    With `W* = X^+ Y`, the solution of least norm, `L - L* = 1/2 ||X (W* - W1 W2)||_F^2`. This excess is the `loss`. It
    can fall to zero whatever Y is, unless the layer is narrower than W* (`lowest_loss`). `least_loss` is L*. The
    observable `distance` is `||W1 W2 - W*||_F`.

    **Arguments:**

    - `targets`: Y, of shape `(N, m)`.
    - `inputs`: X, of shape `(N, n)`, of any spectrum and rank; without inputs X = I, the factorisation of Y.
    - `rank`: the rank of X, which must be given where X is traced.
    - `tolerance`: singular values of X up to this fraction of the largest count as zero, in W*, in L* and in the loss;
      `10 max(N, n) eps` by default, which is rounding alone. Columns that are nearly dependent, but less than this,
      make W* large and L* smaller.

    **Raises:** `InputError` for shapes that do not match, for entries that are not finite, for a bad rank or tolerance,
    and for inputs that say nothing of the targets, X^T Y = 0.
    """

    features: Float[Array, "rows n"] | None  # X, or its triangular factor where that has fewer rows; None for X = I
    solution: Float[Array, "n m"]  # W*
    basis: Float[Array, "n r"] | None  # Phi1, of the row space of X where that is less than everything
    least_loss: Float[Array, ""]
    scaling: Float[Array, ""]
    weight: None

    any_width = True  # h may be larger than n and m

    def __init__(
        self,
        targets: AnyArray,
        inputs: AnyArray | None = None,
        rank: int | None = None,
        tolerance: float | None = None,
    ):
        if tolerance is not None:
            require_number("tolerance", tolerance, "lie between 0 and 1", lambda known: 0 < known < 1)
        y = dense(as_matrix("targets", targets))
        self.scaling, self.weight = jnp.ones(()), None
        if inputs is None:
            self.features, self.solution, self.basis, self.least_loss = None, y, None, jnp.zeros(())
            check_task("targets", y)
        else:
            x = dense(as_matrix("inputs", inputs))
            require(len(x) == len(y), "inputs", f"have {len(y)} rows, as the targets have", f"shape {x.shape}")
            self.basis = _row_space(x, rank, tolerance)
            if self.basis is not None:
                x = x - jax.lax.stop_gradient(x - x @ self.basis @ self.basis.T)  # without what counts as zero
            self.features = jnp.linalg.qr(x)[1] if x.shape[0] > x.shape[1] else x
            self.solution = jnp.linalg.pinv(x, rtol=tolerance) @ y
            outputs = x @ self.solution
            rounding = (10 * max(x.shape) * jnp.finfo(y.dtype).eps) ** 2 * jnp.sum(y**2)
            learned, least = concrete(jnp.sum(outputs**2) > rounding), 0.5 * jnp.sum((y - outputs) ** 2)
            require(learned is None or learned, "targets", "depend on the inputs, X^T Y not 0", "nothing to learn")
            self.least_loss = jnp.where(least > rounding, least, 0.0)

    @property
    def layers(self) -> Layers:
        n, m = self.solution.shape
        return ((m, n),)

    @property
    def layer_inputs(self) -> tuple[Float[Array, "rows n"] | None]:
        """X up to a rotation of its rows; None for X = I."""
        return (self.features,)

    @property
    def inputs(self) -> Float[Array, "rows n"]:
        """X, up to a rotation of its rows."""
        return jnp.eye(len(self.solution)) if self.features is None else self.features

    def network(self, adapters: Adapters) -> tuple[Matrix, Matrix, Matrix, Matrix]:
        """(X, Y, W1, W2) as `lora_flow.theory.linear_networks` takes them: the same loss and flow, with L* = 0.

        The returned X has independent columns. Where the given X has not, W1 is Phi1^T W1, on which the loss depends.
        """
        ((a, b),) = adapters
        x, w1 = self.inputs, a.mT
        if self.basis is not None:
            x, w1 = x @ self.basis, self.basis.T @ w1
        return x, x @ self.optimum, w1, b.mT

    @property
    def optimum(self) -> Float[Array, "r m"]:
        """The only solution of the problem that `network` returns."""
        return self.solution if self.basis is None else self.basis.T @ self.solution

    def for_lora(
        self, adapters: Adapters, shift: AnyArray | Diagonal | None = None, target: AnyArray | None = None
    ) -> Factorization:
        """The problem of fine-tuning the network with these weights frozen, `w1 = W1^T` and `w2 = W2^T`.

        **Arguments:** `shift` or `target` of shape `(m, n)`, as for `Factorization`, which has white inputs.

        **Returns:** a `Factorization` with `w1` `(h, n)` and `w2` `(m, h)`.
        """
        ((a, b),) = adapters
        return Factorization(w1=a, w2=b, shift=shift, target=target)

    def loss_of(self, change: Float[Array, "m n"]) -> Float[Array, ""]:
        return 0.5 * jnp.sum(self._outputs(self.solution - change.T) ** 2)

    def descent_of(self, change: Float[Array, "m n"]) -> Float[Array, "m n"]:
        missing = self._outputs(self.solution - change.T)
        return missing.T if self.features is None else missing.T @ self.features

    @property
    def coordinates(self) -> type[Coordinates]:
        """Narrow ones, but for a subclass with an `observe` of its own: that may see in which basis adapters are."""
        return super().coordinates if type(self).observe is LinearNetwork.observe else Coordinates

    def observe(self, adapters: Adapters) -> dict[str, Float[Array, ""]]:
        """`distance`: ||W1 W2 - X^+ Y||_F, which need not go to zero where X has dependent columns."""
        return {"distance": norm(self.solution - self._change(adapters).T)}

    def meanings(self) -> dict[str, str]:
        return {
            "distance": "distance from the solution of least norm: ||W1 W2 - X^+ Y||_F",
            "least_loss": "L*: what the loss of a network is measured from",
        }

    def task_sizes(self) -> tuple[Array]:
        fed = jnp.ones(()) if self.features is None else frobenius_norm(self.features) ** 2
        return (fed * frobenius_norm(self.solution),)

    def characteristics(self) -> dict[str, float | int]:
        """`least_loss`, L*."""
        return {"least_loss": float(self.least_loss)}

    def smoothness(self) -> Float[Array, ""]:
        """The Lipschitz constant of dL/d(W1 W2): the largest singular value of X, squared."""
        return jnp.ones(()) if self.features is None else spectral_norm(self.features) ** 2

    def lowest_loss(self, rank: int, frozen: np.ndarray | None = None) -> float:
        """The least of L - L* at a hidden width of `rank`; `frozen` as for `SingleLayer`."""
        goal = np.asarray(self.solution) + (0.0 if frozen is None else frozen.T)
        return tail(np.asarray(self._outputs(goal)), rank)

    def _outputs(self, weight: Float[Array | np.ndarray, "n m"]) -> Array:
        return jnp.asarray(weight) if self.features is None else self.features @ weight

    def __str__(self) -> str:
        n, m = self.solution.shape
        x = singular_values(self.inputs)
        rank = n if self.basis is None else self.basis.shape[1]
        fed = f"X of rank {rank} with singular values {x[0]:.3g} to {x[rank - 1]:.3g}"
        goal = singular_values(self.solution)
        about = spectrum_text(goal[: matrix_rank(goal, self.solution.shape)], "solution")
        least = f"L* = {float(self.least_loss):.3g}"
        return f"LinearNetwork: n = {n}, m = {m}; {'X = I' if self.features is None else fed}; {about}; {least}"


def check_network(problem: Problem, what: str) -> None:
    """Raises for what has not the loss of a `LinearNetwork`, for `what` is proved for that loss."""
    must = f"be a LinearNetwork, with its loss, for {what}"
    require(keeps_loss(problem, LinearNetwork), "problem", must, kind_of(problem))


def _row_space(x: Array, rank: int | None, tolerance: float | None) -> Float[Array, "n r"] | None:
    """An orthonormal basis of the row space; None where the columns are independent."""
    n, most, known = x.shape[1], min(x.shape), concrete(x)
    require(rank is not None or known is not None, "rank", "be given where the inputs are traced", rank)
    if rank is not None:
        require_integer("rank", rank, f"be from 1 to {most}", 1, most)
    else:
        rank = matrix_rank(singular_values(x), x.shape, tolerance)
    return None if rank == n else jnp.linalg.svd(x, full_matrices=False)[2][:rank].T
