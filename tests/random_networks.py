"""Random linear networks for tests: drawn from a seed, a shape and a way to start; descent is written out here.

What a bound is compared with is masked below 1e-16 L_0, where the loss is rounding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from lora_flow.theory import linear_flow as flow
from lora_flow.theory import linear_networks as nets

FLOOR = 1e-16
C1, C2 = 0.5, 1.5  # of the experiments of Xu et al. 2023


class Problem(NamedTuple):
    x: np.ndarray
    y: np.ndarray
    w1: np.ndarray
    w2: np.ndarray


class Shape(NamedTuple):
    """Few of them, as each is compiled for."""

    samples: int
    n: int
    m: int
    h: int
    rank: int


SHAPES = (
    Shape(4, 4, 4, 10, 4),
    Shape(7, 3, 5, 9, 3),
    Shape(3, 8, 2, 7, 3),  # fewer samples than inputs
    Shape(9, 6, 4, 5, 4),  # dependent inputs
    Shape(5, 5, 4, 2, 5),  # narrower than its ends
    Shape(1, 1, 1, 1, 1),
)
WIDE = (Shape(4, 4, 4, 100, 4), Shape(7, 3, 5, 60, 3), Shape(3, 8, 2, 40, 3), SHAPES[-1])  # where a1 is not tiny
STARTS = ("gaussian", "balanced", "one large", "uneven", "almost solved", "balanced, almost solved")


def matrix(rng, rows, columns, low=-0.5, high=0.5, rank=None):
    """Any singular vectors; singular values from 10^low to 10^high, `rank` of them."""
    small = min(rows, columns) if rank is None else rank
    left, right = (np.linalg.qr(rng.standard_normal((size, small)))[0] for size in (rows, columns))
    return left * 10 ** rng.uniform(low, high, small) @ right.T


def draw_problem(seed, shape, start, scale):
    rng = np.random.default_rng(seed)
    samples, n, m, h, rank = shape
    x = matrix(rng, samples, n, rank=rank)
    w1, w2 = scale * rng.standard_normal((n, h)), scale * rng.standard_normal((h, m))
    if start.startswith("balanced"):
        u, s, vt = np.linalg.svd(w1 @ w2, full_matrices=False)
        k = min(len(s), h)
        q = np.linalg.qr(rng.standard_normal((h, k)))[0]
        w1, w2 = u[:, :k] * np.sqrt(s[:k]) @ q.T, q * np.sqrt(s[:k]) @ vt[:k]
    elif start == "one large":
        ratio = 10 ** rng.uniform(-1, 1)
        w1, w2 = w1 * ratio, w2 / ratio
    elif start == "uneven":
        w1, w2 = w1 * 10 ** rng.uniform(-1, 0.5, h), w2 * 10 ** rng.uniform(-1, 0.5, (h, 1))
    y = rng.standard_normal((samples, m))
    if start.endswith("almost solved"):
        y = x @ w1 @ w2 + 10 ** rng.uniform(-4, -1) * scale * y
    return Problem(x, y, w1, w2)


def problems(shapes=SHAPES, starts=STARTS, scales=(-1.0, 0.5)):
    seeds = st.integers(0, 2**32 - 1)
    scale = st.floats(*scales).map(lambda exponent: 10**exponent)
    cases = st.tuples(seeds, st.sampled_from(shapes), st.sampled_from(starts), scale)
    return cases.map(lambda case: (draw_problem(*case), case[1]))


def each(count=250):
    return settings(max_examples=count, deadline=None, derandomize=True)


def numpy_results(function, *static):
    compiled = jax.jit(function, static_argnames=static)
    return lambda *args, **kwargs: jax.tree.map(np.asarray, compiled(*args, **kwargs))


reduced = numpy_results(lambda x, y, w1, w2, rank: flow.reduce(x, y, w1, w2, rank).network, "rank")


def full_rank(problem, shape):
    """The problem that flow and descent see: X square and of full rank, the least loss zero."""
    return Problem(*reduced(*problem, rank=shape.rank))


def error(p):
    return p.y - p.x @ p.w1 @ p.w2


def descend(p, eta):
    g = -p.x.T @ error(p)
    return p._replace(w1=p.w1 - eta * g @ p.w2.T, w2=p.w2 - eta * p.w1.T @ g)


def loss(p):
    return 0.5 * np.sum(error(p) ** 2)


def imbalance(p):
    return p.w1.T @ p.w1 - p.w2 @ p.w2.T


def tau_ends(w1, w2):
    """The extreme eigenvalues of tau, from the matrix of the operator itself."""
    operator = np.kron(np.eye(len(w1)), (w2.T @ w2).T) + np.kron(w1 @ w1.T, np.eye(w2.shape[1]))
    return np.linalg.eigvalsh(operator)[[0, -1]]


def sigma(w, k):
    return np.append(np.linalg.svd(w, compute_uv=False), np.zeros(max(w.shape)))[k - 1]


def below(lower, upper, scale=None, slack=1e-9):
    """lower <= upper but for rounding, relative to the largest of what they were computed from."""
    scale = np.maximum(np.abs(lower), np.abs(upper)) if scale is None else scale
    return np.all(lower <= upper + slack * scale)


def along(count, step):
    """Loss, the ends of tau's spectrum, the drift of D, and what `step` yields, along `count` steps of descent."""

    def run(x, y, w1, w2, *extra):
        first = nets.imbalance(w1, w2)

        def one(weights, t):
            eta, more = step(t, x, y, *weights, *extra)
            g1, g2 = nets.gradients(x, y, *weights)
            seen = {
                "loss": nets.loss(x, y, *weights),
                "ends": jnp.stack([nets.tau_smallest(*weights), nets.tau_largest(*weights)]),
                "drift": jnp.linalg.norm(nets.imbalance(*weights) - first),
                "eta": eta,
                **more,
            }
            return (weights[0] - eta * g1, weights[1] - eta * g2), seen

        return jax.lax.scan(one, (w1, w2), jnp.arange(count))[1]

    return numpy_results(run)


fractions = st.floats(-2, 1).map(lambda exponent: 10**exponent)  # of the step 1/(K lmax), whichever theorem applies
