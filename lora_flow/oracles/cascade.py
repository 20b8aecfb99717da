r"""The symmetric factorisation in three stages, each of which is driven by the ones before: closed forms.

The stages are those of Mohammadi, Tinati, Tu, Soltanolkotabi and Jovanović, "Stability properties of gradient flow
dynamics for the symmetric low-rank matrix factorization problem", arXiv 2411.15972, of which the abstract was read; the
equations and their solutions are derived for this project.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from lora_flow.algebra.spectra import eigenvalue_rounding
from lora_flow.arrays import real_array
from lora_flow.checks import concrete, require
from lora_flow.oracles import modes
from lora_flow.oracles.given import ROUNDING, finite, matrix, require_times, require_zero


class Cascade(NamedTuple):
    """The stages of `cascade`, in the target's eigenbasis, its k positive eigenvalues first.

    - `noise`: S = P22 - P21 P11^{-1} P12.
    - `tilt`: H = P21 P11^{-1}.
    - `signal`: R = P11^{-1}.
    - `basis`: the eigenvectors, as columns.
    """

    noise: Float[Array, "*times n-k n-k"]
    tilt: Float[Array, "*times n-k k"]
    signal: Float[Array, "*times k k"]
    basis: Float[Array, "n n"]

    @property
    def gram(self) -> Float[Array, "*times n n"]:
        """P = U U^T, in the coordinates of the target."""
        p11 = jnp.linalg.inv(self.signal)
        p21 = self.tilt @ p11
        rows = (p11, p21.mT), (p21, self.noise + p21 @ self.tilt.mT)
        p = jnp.concatenate([jnp.concatenate(row, axis=-1) for row in rows], axis=-2)
        return self.basis @ p @ self.basis.T


def cascade(target: ArrayLike, u: ArrayLike, t: ArrayLike) -> Cascade:
    r"""U' = (target - U U^T) U in three stages, of P = U U^T in the eigenbasis where the target is diag(L1, -L2).

    L1 > 0 has k entries, and L2 >= 0. Noise, tilt and signal are `Cascade`'s S, H and R:

        S' = -L2 S - S L2 - 2 S^2,   H' = -(L2 + 2 S) H - H L1,   R' = -L1 R - R L1 + 2 (I + H^T H)

    With G the integral of e^{-2 L2 s} over 0 ... t and Phi = e^{-L2 t} (I + 2 S_0 G)^{-1} the solution is

        S = Phi S_0 e^{-L2 t},   H = Phi H_0 e^{-L1 t},
        R = (I - e^{-2 L1 t}) L1^{-1} + e^{-L1 t} (R_0 + 2 H_0^T G (I + 2 S_0 G)^{-1} H_0) e^{-L1 t}

    S has rank r - k, or n - k where that is less: with r = k it is zero. On the target's null space t ||S||_2 tends to
    1/2. Shapes: `target` (n, n), symmetric, of any sign but with a positive eigenvalue, and known where JAX traces the
    rest; `u` (n, r), with a projection of rank k on the eigenvectors of positive eigenvalues, as almost all with r >= k
    have. Eigenvalues that are rounding count as zero. Accurate to 1e-13 of P, but for the condition number of P11(0).

    **Returns:** a `Cascade`, with the axes of `t` first.

    **Raises:** `InputError` for shapes that do not match, for a target that is not symmetric, is traced or has no
    positive eigenvalue, for a u that misses one, and for times that are negative or not finite.
    """
    y, u, t = matrix("target", target), matrix("u", u), real_array("t", t)
    require(y.shape[0] == y.shape[1], "target", "be a square matrix", f"shape {y.shape}")
    require(len(u) == len(y), "u", f"have {len(y)} rows", f"shape {u.shape}")
    fixed = concrete(y)
    require(fixed is not None, "target", "be known", "one that JAX traces")
    goal: np.ndarray = fixed  # type: ignore[assignment]
    require_zero(goal - goal.T, np.abs(goal).max(), "target", "be symmetric")
    values, basis = (part[..., ::-1] for part in np.linalg.eigh((goal + goal.T) / 2))
    values = np.where(np.abs(values) > eigenvalue_rounding(values), values, 0.0)
    k = int(np.sum(values > 0))
    require(k > 0, "target", "have a positive eigenvalue", f"a largest one of {values[0]:.2g}")
    require_times(t)
    start = concrete(u)
    if start is not None:
        found = np.linalg.matrix_rank(basis[:, :k].T @ start)
        require(found == k, "u", f"reach the {k} eigenvectors of positive eigenvalues", f"a projection of rank {found}")
    return _cascade(jnp.asarray(values[:k]), jnp.asarray(np.abs(values[k:])), jnp.asarray(basis), u, t)


@jax.jit
def _cascade(l1: Array, l2: Array, basis: Array, u: Array, t: Array) -> Cascade:
    k = len(l1)

    def at(time: Array) -> tuple[Array, Array, Array]:
        s, phi, gain = _damped(s0, l2, time)
        grown = jnp.exp(-time * l1)
        learned = 2 * time * modes.mean_exponential(-2 * time * l1)
        return s, (phi @ h0) * grown[None], jnp.diag(learned) + grown[:, None] * (r0 + h0.T @ gain @ h0) * grown[None]

    with jax.default_matmul_precision("highest"):
        x = basis.T @ u
        q, upper = jnp.linalg.qr(x[:k].T)
        along = x[k:] @ q
        rest = x[k:] - along @ q.T
        inverse = jax.scipy.linalg.solve_triangular(upper, jnp.eye(k))
        s0, h0, r0 = rest @ rest.T, along @ inverse.T, inverse @ inverse.T
        stages = jax.vmap(at)(t.ravel())
    s, h, r = (one.reshape(*t.shape, *one.shape[1:]) for one in stages)
    return Cascade(s, h, r, basis)


def _damped(s0: Array, l2: Array, time: Array) -> tuple[Array, Array, Array]:
    """S, Phi and 2 G (I + 2 S_0 G)^{-1}."""
    s0, one = (s0 + s0.T) / 2, jnp.eye(len(l2))
    damped, moved = jnp.exp(-time * l2), 2 * time * modes.mean_exponential(-2 * time * l2)
    inverse = jnp.linalg.solve(one + s0 * moved[None], jnp.concatenate([s0, one], axis=1))
    s, inverse = inverse[:, : len(l2)], inverse[:, len(l2) :]
    return damped[:, None] * ((s + s.T) / 2) * damped[None], damped[:, None] * inverse, moved[:, None] * inverse


def schur_complement(s0: ArrayLike, l2: ArrayLike, t: ArrayLike) -> Float[Array, "*times k k"]:
    r"""S(t) from S' = -L2 S - S L2 - 2 S^2: the part of `symmetric` that must vanish, by itself.

    In the basis where the target is diag(L1, -L2), L1 > 0 and L2 >= 0, take the blocks of W = U U^T: then
    S = W22 - W21 W11^{-1} W12 evolves regardless of the rest, the first stage of `cascade`. If L2 = 0, then
    S = S0 (I + 2 t S0)^{-1}, and t ||S||_2 tends to 1/2. Shapes: `s0` (k, k), symmetric and positive semi-definite,
    and `l2` (k,), the diagonal of L2. Accurate to 1e-13.

    **Returns:** S, of shape `(*times, k, k)`.

    **Raises:** `InputError` for shapes that do not match, for an s0 that is not symmetric and positive semi-definite,
    for a value of L2 that is negative or not finite, and for times that are negative or not finite.
    """
    s0, l2, t = matrix("s0", s0), finite("l2", l2), real_array("t", t)
    require(l2.ndim == 1, "l2", "be a vector", f"shape {l2.shape}")
    require(s0.shape == (len(l2), len(l2)), "s0", f"have shape {(len(l2), len(l2))}", s0.shape)
    require_times(t)
    start, damping = concrete(s0), concrete(l2)
    if start is not None:
        values = np.linalg.eigvalsh(start)
        require_zero(start - start.T, values[-1], "s0", "be symmetric")
        positive = values[0] >= -ROUNDING * jnp.finfo(float).eps * values[-1]
        require(positive, "s0", "be positive semi-definite", f"an eigenvalue of {values[0]:.2g}")
    require(damping is None or np.all(damping >= 0), "l2", "be at least 0", l2)
    return _schur_complement(s0, l2, t)


@jax.jit
def _schur_complement(s0: Array, l2: Array, t: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        flat = jax.vmap(lambda time: _damped(s0, l2, time)[0])(t.ravel())
        return flat.reshape(*t.shape, *s0.shape)
