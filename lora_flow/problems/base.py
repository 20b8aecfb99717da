"""What can be trained: layers and a loss, and what is known of any such problem."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_flow.adapter import Adapter, Adapters, check_layers, zero_adapters
from lora_flow.algebra.diagonal import Matrix
from lora_flow.algebra.spectra import singular_values
from lora_flow.checks import kind, require
from lora_flow.coordinates.base import Coordinates
from lora_flow.coordinates.narrow import Narrow
from lora_flow.fields import take_new_fields
from lora_flow.problems.derivatives import task, task_size
from lora_flow.problems.formulas import FORMULAS, default, formula, outdated
from lora_flow.solvers.control import ROUNDING_FLOOR

Layers = tuple[tuple[int, int], ...]
ROUNDING = 2 * ROUNDING_FLOOR  # in eps of the relative residual


@runtime_checkable
class Problem(Protocol):
    """Anything whose adapters can be trained by gradient flow.

    `layers` holds the `(out, in)` shape of each adapted layer, and `loss` maps a tuple of adapters,
    one for each layer, to a scalar that is at least 0. The flow is then `-jax.grad(loss)`. `AbstractProblem` has
    defaults for all else that a problem may know. An object that does not derive from `AbstractProblem` may have
    methods and attributes of the same names, but for `coordinates` and `offset`, which may mean anything there. An
    object that is not a PyTree must be hashable, and must not change once it has been solved: the compiled program
    keeps its arrays.
    """

    @property
    def layers(self) -> Layers: ...

    def loss(self, adapters: Adapters) -> Array: ...


class AbstractProblem(eqx.Module):
    """A problem with a default for everything but `layers` and `loss`.

    A subclass may override each method, and have a field, a property or a value for each attribute. A subclass of such
    a class takes new fields by name, beside the arguments of its parent. It may change the loss or what the loss is
    made of. The formulas that it then inherits are about the old loss: for each that the subclass does not define
    itself, the default takes its place.
    """

    if TYPE_CHECKING:  # else a field of that name could not take its place

        @property
        @abc.abstractmethod
        def layers(self) -> Layers:
            """The `(out, in)` shape of each adapted layer."""

    @abc.abstractmethod
    def loss(self, adapters: Adapters) -> Array:
        """A scalar that is at least 0."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in outdated(cls, AbstractProblem):
            setattr(cls, name, vars(AbstractProblem)[name])
        take_new_fields(cls)

    @default
    def scaling(self) -> Array:
        """s, LoRA's output multiplier: 1."""
        return jnp.ones(())

    @default
    def weights(self) -> Sequence[Matrix] | None:
        """The frozen weight of each layer, `(out, in)`, which initialisations start from; None where not known."""
        return None

    @default
    def layer_inputs(self) -> Sequence[Matrix | None] | None:
        """The inputs of each layer, `(samples, in)`, None for white ones; None where not known."""
        return None

    @default
    def any_width(self) -> bool:
        """Whether ranks above the layer's dimensions make sense, as of a network's hidden layer: no."""
        return False

    @default
    def of_products(self) -> bool:
        """Whether the loss is known to be one of the products B_i A_i alone: no."""
        return False

    @default
    def coordinates(self) -> type[Coordinates]:
        """The kind of coordinates in which the problem costs least.

        That is `Narrow` for a loss of the products alone, and else `Coordinates`, in which the problem is as it is.
        """
        return Narrow if self.of_products else Coordinates

    def field(self, adapters: Adapters) -> Adapters:
        """The gradient flow's right-hand side, -dL/dA_i and -dL/dB_i: by differentiation."""
        return jax.tree.map(jnp.negative, jax.grad(self.loss)(adapters))

    def linearised_task(self) -> tuple[Matrix, ...]:
        """-dL/d(B_i A_i) at the pretrained weights, an `(out, in)` matrix for each layer: by differentiation."""
        return tuple(task(self.loss, self.layers, index) for index in range(len(self.layers)))

    def task_sizes(self) -> tuple[Float[Array, ""], ...]:
        """For each task the product of its factors' norms, beside which the task may be rounding: by differentiation.

        A task is J^T E, with E the residual and J its derivative. The default takes the loss for a sum of squares.
        """
        return tuple(task_size(self.loss, self.layers, index) for index in range(len(self.layers)))

    def fastest_rate(self) -> float:
        """The rate at which small adapters grow: the largest singular value of the linearised tasks."""
        return max(float(singular_values(one)[0]) for one in self.linearised_task())

    def task_rank(self) -> tuple[int, str]:
        """The largest rank to be learned, and the matrix that has it: one of the linearised tasks."""
        ranks = [matrix_rank(singular_values(one), one.shape) for one in self.linearised_task()]
        return max(ranks), f"-dL/dW of layer {1 + int(np.argmax(ranks))} without adapters"

    def product_descent(self, adapters: Adapters) -> Float[Array, "out in"]:
        """-dL/d(B A) of a problem `of_products` with one layer: by differentiation."""
        ((a, b),), ((n_out, n_in),) = adapters, self.layers
        unit = jnp.eye(n_out, dtype=b.dtype)

        def loss(change: Array) -> Array:
            return self.loss((Adapter(jnp.concatenate([a, change]), jnp.concatenate([b, unit], axis=1)),))

        return -jax.grad(loss)(jnp.zeros((n_out, n_in), a.dtype))

    def smoothness(self) -> Float[Array, ""] | None:
        """A Lipschitz constant of dL/d(B A), for a problem with one layer; None where not known."""
        return None

    def growth_bound(self) -> Callable[[Adapters], Float[Array, ""]] | None:
        """A function from a state to a bound on the growth rate of small modes; None where not known."""
        return None

    def lowest_loss(self, rank: int, frozen: np.ndarray | None = None) -> float:
        """The least loss of any adapters of that rank, for a problem with one layer; NaN where not known.

        `frozen` is `s B_0 A_0` where the frozen weight is `W_0 - s B_0 A_0`.
        """
        return float("nan")

    def rounding_floor(self, adapters: Adapters) -> Float[Array, ""]:
        """The loss below which a computed loss is rounding, from this start: that of a sum of squares."""
        largest = jnp.maximum(self.loss(zero_adapters(self.layers, rank=1)), self.loss(adapters))
        return jax.lax.stop_gradient((ROUNDING * jnp.finfo(largest.dtype).eps) ** 2 * largest)

    def pretrained(self) -> tuple[AbstractProblem, Callable[[Adapters], Adapters]]:
        """The problem whose weights are the pretrained ones, and the map from these adapters to adapters of that one.

        Progress is measured there. By default it is the problem itself.
        """
        return self, lambda adapters: adapters

    def offset(self, start: Adapters) -> AbstractProblem:
        """The problem with the start subtracted from its frozen weights: `Offset(self, start)`."""
        from lora_flow.problems.offset import Offset

        return Offset(self, start)

    def observe(self, adapters: Adapters) -> dict[str, Array]:
        """Scalars by name that are recorded along the way, beside the loss: none."""
        return {}

    def details(self, adapters: Adapters) -> dict[str, np.ndarray]:
        """What `analyse` adds, by name, from NumPy's adapters with one leading axis: nothing."""
        return {}

    def meanings(self) -> dict[str, str]:
        """The meaning by name of what `observe`, `details` and `characteristics` return: none is told."""
        return {}

    def characteristics(self) -> dict[str, float | int]:
        """Plain numbers by name that a sweep has as coordinates over its problems: none."""
        return {}

    def summary(self) -> dict[str, Any]:
        """Plain numbers and lists by name that the dataset of one problem has as attributes: none."""
        return {}


class Known(AbstractProblem):
    """An object with `layers` and `loss`, and its own formulas, which count as long as they are about its loss."""

    problem: Any

    if not TYPE_CHECKING:

        def __getattribute__(self, name: str) -> Any:
            if name in HANDED_ON:
                problem = super().__getattribute__("problem")
                own = formula(problem, name) if name in FORMULAS else getattr(problem, name, None)
                if own is not None:
                    return own
            return super().__getattribute__(name)

    @property
    def layers(self) -> Layers:
        return self.problem.layers

    def loss(self, adapters: Adapters) -> Array:
        return self.problem.loss(adapters)


HANDED_ON = (FORMULAS | {"scaling", "weights", "layer_inputs", "any_width", "observe", "meanings"}) - {"coordinates"}


def as_problem(problem: Any) -> AbstractProblem:
    """The problem itself, or around an object of another kind one that has the defaults for all that it lacks.

    The object's own formulas, observables and attributes count, all but `coordinates` and `offset`. A formula does not
    count where a subclass or the object has changed the loss and not the formula.

    **Raises:** `InputError` for what is no problem.
    """
    if isinstance(problem, AbstractProblem):
        return problem
    require_problem(problem)
    return Known(problem)


def kind_of(problem: Problem) -> str:
    """The name of the problem's class, for people."""
    return type(problem.problem if isinstance(problem, Known) else problem).__name__


def require_problem(problem: Any, otherwise: str = "") -> None:
    """Raises for what is no problem; the message says what else would do."""
    fits = isinstance(problem, Problem) and not isinstance(problem, type)
    require(fits, "problem", f"have layers and loss(adapters){otherwise}", kind(problem))
    check_layers("problem.layers", problem.layers)


def vector_field(problem: Problem) -> Callable[[Adapters], Adapters]:
    """The field of anything with a loss."""
    return as_problem(problem).field


def own_observables(problem: Problem, adapters: Adapters) -> dict[str, Array]:
    """The problem's own observables of adapters, beside those that every problem has.

    **Raises:** `InputError` for a value that is not a scalar.
    """
    own = {name: jnp.asarray(value, float) for name, value in as_problem(problem).observe(adapters).items()}
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
    return as_problem(problem).linearised_task()


def on_host(tree: Any) -> Any:
    """The PyTree with NumPy's arrays, for which no operation is compiled."""
    return jax.tree.map(np.asarray, tree)


def matrix_rank(singular_values: np.ndarray, shape: tuple[int, ...], tolerance: float | None = None) -> int:
    """The number of singular values above rounding, for a matrix that came out of a product or two.

    Or above the `tolerance`, relative to the largest, which is 10 max(shape) eps by default.
    """
    tolerance = 10 * max(shape) * np.finfo(singular_values.dtype).eps if tolerance is None else tolerance
    return int(np.sum(singular_values > tolerance * singular_values[0]))
