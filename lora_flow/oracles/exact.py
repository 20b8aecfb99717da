r"""Exact solutions of gradient flows, to test a solver with: matrix Riccati equations and scalar modes.

Time is gradient-flow time, and a loss is a sum of squares. `t` is a number or an array of any shape; its axes come
first in the result. The functions work under `jit` and `vmap` and have derivatives in both modes; traced values cannot
be checked.

The Riccati solutions take sub-steps. Where their number depends on traced values, `steps` must give it: at least
||F||_2/4 times the time, with the F and the time of `riccati`. The solution is NaN where the sub-steps are too few.

Accuracy is the worst difference from the same formulas in 80 digits or more, in double precision, relative to the
solution's largest entry, with no more sub-steps than needed. scipy's DOP853 at rtol = 1e-13 comes within 3e-12.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from lora_flow.adapter import Adapter
from lora_flow.arrays import real_array
from lora_flow.checks import concrete, require, require_number
from lora_flow.oracles import modes
from lora_flow.oracles.given import concrete_all, finite, matrix, multiple_of_identity, require_times, require_zero
from lora_flow.oracles.substeps import count_substeps, riccati_gram


class Products(NamedTuple):
    """The products of W1 and W2, or of A and B, that a Riccati equation determines; it leaves the factors open.

    - `product`: W2 W1, or B A.
    - `gram1`: W1^T W1, or A^T A.
    - `gram2`: W2 W2^T, or B B^T.
    """

    product: Float[Array, "*times m n"]
    gram1: Float[Array, "*times n n"]
    gram2: Float[Array, "*times m m"]


def riccati(target: ArrayLike, w1: ArrayLike, w2: ArrayLike, t: ArrayLike, *, steps: int | None = None) -> Products:
    r"""The flow of `1/2 ||target - W2 W1||_F^2` from lambda-balanced weights, `W2^T W2 - W1 W1^T = lam I`.

    `P = [W1^T; W2] [W1^T; W2]^T` obeys `P' = F P + P F - P^2`, with `F = [[-lam/2 I, target^T], [target, lam/2 I]]` of
    norm `sqrt(lam^2/4 + ||target||_2^2)`. Derived for this project; on such weights see also Dominé et al., arXiv
    2409.14623. Shapes: `target` (m, n), `w1` (h, n), `w2` (m, h). The weights determine lam; derivatives with respect
    to the weights are those of the flow along changes that keep them lambda-balanced. Accurate to 1e-14.

    **Returns:** `Products` of W1 and W2, with the axes of `t` first.

    **Raises:** `InputError` for shapes that do not match, for weights that are not lambda-balanced, for times that are
    negative or not finite, and for a bad number of sub-steps.
    """
    y, w1, w2, t = matrix("target", target), matrix("w1", w1), matrix("w2", w2), real_array("t", t)
    (m, n), h = y.shape, len(w1)
    require(w1.shape[1] == n, "w1", f"have {n} columns", f"shape {w1.shape}")
    require(w2.shape == (m, h), "w2", f"have shape {(m, h)}", w2.shape)
    rate = None
    if known := concrete_all(y, w1, w2):
        goal, first, second = known
        imbalance, size = second.T @ second - first @ first.T, np.sum(first**2) + np.sum(second**2)
        lam = multiple_of_identity(imbalance, size, "w1 and w2", "have W2^T W2 - W1 W1^T = lam I")
        rate = float(np.hypot(lam / 2, np.linalg.norm(goal, 2)))
    return _riccati(y, w1, w2, t, count_substeps(rate, t, steps))


@partial(jax.jit, static_argnames="steps")
def _riccati(target: Array, w1: Array, w2: Array, t: Array, steps: int) -> Products:
    m, n = target.shape
    lam = (jnp.sum(w2**2) - jnp.sum(w1**2)) / len(w1)
    f = jnp.block([[-lam / 2 * jnp.eye(n), target.T], [target, lam / 2 * jnp.eye(m)]])
    p = riccati_gram(f, jnp.concatenate([w1.T, w2]), t, steps)
    return Products(p[..., n:, :n], p[..., :n, :n], p[..., n:, n:])


def single_layer(
    shift: ArrayLike, a: ArrayLike, t: ArrayLike, *, scaling: ArrayLike = 1.0, steps: int | None = None
) -> Products:
    r"""LoRA on one layer, `1/2 ||shift - s B A||_F^2`, from B = 0 and orthogonal rows of A, all of length alpha.

    The flow of a `SingleLayer`; at rank 1 A may be any row. This is `riccati` with lam = -alpha^2, target shift/s and
    time s^2 t. Shapes: `shift` (m, n), `a` (r, n). Derived for this project. Accurate to 1e-14.

    **Returns:** `Products` of A and B, with the axes of `t` first.

    **Raises:** `InputError` for rows that are not orthogonal and of equal length, for a scaling that is not positive,
    and as `riccati` does.
    """
    y, a, s, t = matrix("shift", shift), matrix("a", a), real_array("scaling", scaling), real_array("t", t)
    require_number("scaling", s, "be positive", lambda known: known > 0)
    require(a.shape[1] == y.shape[1], "a", f"have {y.shape[1]} columns", f"shape {a.shape}")
    rate = None
    if known := concrete_all(y, a, s):
        goal, rows, scale = known
        square = multiple_of_identity(rows @ rows.T, np.sum(rows**2), "a", "have orthogonal rows of equal length")
        rate = float(scale * np.hypot(scale * square / 2, np.linalg.norm(goal, 2)))  # ||F||_2 s^2
    return _single_layer(y, a, s, t, count_substeps(rate, t, steps))


@partial(jax.jit, static_argnames="steps")
def _single_layer(shift: Array, a: Array, scaling: Array, t: Array, steps: int) -> Products:
    return _riccati(shift / scaling, a, jnp.zeros((len(shift), len(a))), scaling**2 * t, steps)


def first_layer(shift: ArrayLike, w2: ArrayLike, a: ArrayLike, t: ArrayLike, *, steps: int | None = None) -> Products:
    r"""LoRA below a frozen `W2 = s O` with `O^T O = I`, `1/2 ||shift - W2 B A||_F^2`, from B = 0.

    This is `single_layer` with shift O^T shift and scaling s, and the same condition on A's rows. Shapes: `shift`
    (m, n), `w2` (m, h), `a` (r, n). Derived for this project. Accurate to 1e-14.

    **Returns:** `Products` of A and B, with the axes of `t` first; the product is B A, of shape (h, n), not W2 B A.

    **Raises:** `InputError` unless the columns of W2 are orthogonal and of equal length, and as `single_layer` does.
    """
    y, w2 = matrix("shift", shift), matrix("w2", w2)
    require(len(w2) == len(y), "w2", f"have {len(y)} rows", f"shape {w2.shape}")
    if known := concrete_all(w2):
        gram, must = known[0].T @ known[0], "have orthogonal columns of equal length"
        multiple_of_identity(gram, np.trace(gram), "w2", must)
    with jax.default_matmul_precision("highest"):
        s = jnp.sqrt(jnp.sum(w2**2) / w2.shape[1])
        return single_layer(w2.T @ y / s, a, t, scaling=s, steps=steps)


def scalar(y: ArrayLike, u0: ArrayLike, v0: ArrayLike, t: ArrayLike) -> tuple[Array, Array]:
    r"""u(t) and v(t) from u' = (y - u v) v and v' = (y - u v) u, for any start; all arguments broadcast.

    One mode of a two-layer linear network with imbalance d = u0^2 - v0^2. In the end the residual falls at the rate
    sqrt(4 y^2 + d^2). A mode of LoRA starts from u = 0, v = alpha; below a frozen gain g it has y = sigma/g and time
    g^2 t. Derived for this project.

    **Returns:** u and v, each of the broadcast shape.

    Accuracy: 1e-13 of u and v relative to their norm, for either sign of y, and at all times, down to 1e-140 on the
    way into the saddle u = v = 0. At y = d = 0 the second derivatives are wrong.

    **Raises:** `InputError` for numbers that are not finite, and for times that are negative or not finite.
    """
    mode = [finite(name, value) for name, value in {"y": y, "u0": u0, "v0": v0}.items()]
    times = real_array("t", t)
    require_times(times)
    return modes.imbalanced_mode(*mode, times)


def spectral(
    left: ArrayLike, sigma: ArrayLike, right: ArrayLike, b0: ArrayLike, a0: ArrayLike, t: ArrayLike
) -> Adapter:
    r"""The factors themselves, from a start along singular pairs: `B = left diag(b0)` and `A = diag(a0) right`.

    The flow of `1/2 ||left diag(sigma) right - B A||_F^2`, in which each mode is `scalar` with its own imbalance. From
    a rotated start, B R^T and R A, the solution is rotated likewise. Shapes: `left` (m, k), `sigma` (k,) and `right`
    (k, n), as from a thin singular value decomposition, `b0` and `a0` (k,). Derived for this project. Accurate to
    1e-13.

    **Returns:** an `Adapter` with A `(*times, k, n)` and B `(*times, m, k)`.

    **Raises:** `InputError` for shapes that do not match, for singular vectors that are not orthonormal, for numbers
    that are not finite, and for times that are negative or not finite.
    """
    left, right = matrix("left", left), matrix("right", right)
    sigma, b0, a0 = finite("sigma", sigma), finite("b0", b0), finite("a0", a0)
    require(sigma.ndim == 1, "sigma", "be a vector", f"shape {sigma.shape}")
    k = len(sigma)
    for name, rows, vectors in (("left", left.T, "columns"), ("right", right, "rows")):
        require(len(rows) == k, name, f"have {k} {vectors}", len(rows))
        if known := concrete_all(rows):
            require_zero(known[0] @ known[0].T - np.eye(k), 1.0, name, f"have orthonormal {vectors}")
    for name, start in (("b0", b0), ("a0", a0)):
        require(start.shape == (k,), name, f"have shape {(k,)}", start.shape)
    b, a = scalar(sigma, b0, a0, real_array("t", t)[..., None])
    return Adapter(jnp.einsum("...k,kn->...kn", a, right), jnp.einsum("mk,...k->...mk", left, b))


def symmetric(target: ArrayLike, u: ArrayLike, t: ArrayLike, *, steps: int | None = None) -> Float[Array, "*times n n"]:
    r"""W(t) = U U^T of the symmetric factorisation, `1/4 ||target - U U^T||_F^2` and U' = (target - U U^T) U.

    W' = W target + target W - 2 W^2 (Min and Vidal, "Understanding Incremental Learning with Closed-form Solution to
    Gradient Flow on Overparamerterized Matrix Factorization", CDC 2025), which is `riccati`'s equation for F = target
    and P = 2 W. Shapes: `target` (n, n), symmetric and of either sign, `u` (n, r), any start. Accurate to 1e-14.

    **Returns:** W, of shape `(*times, n, n)`.

    **Raises:** `InputError` for a target that is not symmetric, for shapes that do not match, and as `riccati` does.
    """
    y, u, t = matrix("target", target), matrix("u", u), real_array("t", t)
    require(y.shape[0] == y.shape[1], "target", "be a square matrix", f"shape {y.shape}")
    require(len(u) == len(y), "u", f"have {len(y)} rows", f"shape {u.shape}")
    rate = None
    if known := concrete_all(y):
        rate = float(np.linalg.norm(known[0], 2))
        require_zero(known[0] - known[0].T, rate, "target", "be symmetric")
    return _symmetric(y, u, t, count_substeps(rate, t, steps))


@partial(jax.jit, static_argnames="steps")
def _symmetric(target: Array, u: Array, t: Array, steps: int) -> Array:
    return riccati_gram((target + target.T) / 2, jnp.sqrt(2.0) * u, t, steps) / 2


def symmetric_mode(s: ArrayLike, p0: ArrayLike, t: ArrayLike) -> Array:
    r"""p(t) = p0 s e^{2 s t}/(s + p0 (e^{2 s t} - 1)), which is p0/(1 + 2 p0 t) at s = 0; all arguments broadcast.

    One mode of `symmetric` from a spectral start: p' = 2 p (s - p), with an eigenvalue s of the target and p0 >= 0 of W
    (Min and Vidal, CDC 2025).

    **Returns:** p, of the broadcast shape.

    Accuracy: 1e-13 relative to p, for either sign of s and at all times.

    **Raises:** `InputError` for a negative p0, for numbers that are not finite, and for times that are negative or not
    finite.
    """
    s, p0, t = finite("s", s), finite("p0", p0), real_array("t", t)
    require_times(t)
    start = concrete(p0)
    require(start is None or np.all(start >= 0), "p0", "be at least 0", p0)
    return modes.symmetric_mode(s, p0, t)
