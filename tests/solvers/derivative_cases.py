"""Three small runs with derivatives by five numbers, and the central differences that they are held against.

log10 L at three times is a function of the log of alpha, of the adapters, w1 and the shift along a direction each, and
of the log of the unit of time, by which the whole run is longer. One program serves all three.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lora_flow import Adapter, Factorization, aligned_problem, descend, misaligned, solve

PARAMETERS = ("alpha", "adapters", "w1", "shift", "t1")
CASES = ("aligned", "misaligned", "stiff")
LEVELS = (-2, -8, -16)  # of log10 L, at which it is differentiated
ALPHA = {"aligned": 1e-6, "misaligned": 0.3, "stiff": 0.1}  # aligned runs stop at a loss of about alpha^4
END = {"aligned": 6.0, "misaligned": 25.0, "stiff": 100.0}
RANK = 4
STEP = {"aligned": 1e-3, "misaligned": 1e-2, "stiff": 1e-2}  # an aligned loss falls by 20 decades a unit of time
NEAR = 1e-3  # distance of first differences
FAR = {
    "aligned": 5e-3,
    "misaligned": 2e-2,
    "stiff": 5e-3,
}  # of second ones, beyond rounding
ALONG = np.array([0.3, -0.5, 0.4, 0.6, 0.2])  # of second derivatives
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def case_of(name):
    """The problem, alpha, how w1 and the shift are moved, and a step size for gradient descent.

    An aligned problem stays aligned: else its loss would stop.
    """
    problem, rng = problem_of(name), np.random.default_rng(4)
    moves = tuple(rng.standard_normal(value.shape) / 10 for value in (problem.w1, problem.shift))
    return problem, ALPHA[name], (problem.w1, problem.shift) if name == "aligned" else moves, STEP[name]


def problem_of(name):
    aligned = aligned_problem(jax.random.key(0), m=4, n=4, h=6)
    if name == "aligned":
        return aligned
    if name == "misaligned":
        return misaligned(aligned, jax.random.key(1), angle=30.0)
    rng = np.random.default_rng(2)
    left, right = (np.linalg.qr(rng.standard_normal((4, 2)))[0] for _ in range(2))
    w1, w2 = rng.standard_normal((6, 4)), rng.standard_normal((4, 6))
    return Factorization(jnp.asarray(w1), jnp.asarray(w2), jnp.asarray(left * [5.0, 0.5] @ right.T))


def moved(case, x):
    problem, alpha, (w1, shift), _ = case
    rng = np.random.default_rng(3)
    start, along = (
        tuple(Adapter(rng.standard_normal((RANK, n)), rng.standard_normal((m, RANK))) for m, n in problem.layers)
        for _ in range(2)
    )
    adapters = jax.tree.map(lambda one, step: alpha * jnp.exp(x[0]) * (one + x[1] * step), start, along)
    return Factorization(problem.w1 + x[2] * w1, problem.w2, problem.shift + x[3] * shift), adapters


def flowed(case, times, x, **how):
    times = times * jnp.exp(x[4])
    return jnp.log10(solve(*moved(case, x), t1=times[-1], saves=times, **how).observables["loss"])


def stepped(case, saves, x, **how):
    """After so many steps of gradient descent, whose size takes the place of the unit of time."""
    run = descend(*moved(case, x), steps=saves[-1], step=case[3] * jnp.exp(x[4]), saves=np.array(saves), **how)
    return jnp.log10(run.observables["loss"])


def times_of(case, end):
    """When the flow has the LEVELS."""
    times = jnp.linspace(0.0, end, 2001)
    losses = flowed(case, times, jnp.zeros(5), solver="Dopri8", rtol=1e-8, derivatives="forward")
    return jnp.interp(-jnp.array(LEVELS, float), -losses, times)


def steps_of(case, end):
    """After how many steps gradient descent has come down to the LEVELS."""
    steps = round(end / case[3])
    losses = np.asarray(jit(lambda case: stepped(case, range(steps + 1), jnp.zeros(5), derivatives="forward"))(case))
    return tuple(int(np.argmax(losses < level)) for level in LEVELS)


def points(name, order):
    """Those that `differences` needs, (points, parameter): the first is 0."""
    steps = np.array([-2, -1, 1, 2])[:, None, None] * NEAR * np.eye(5)
    if order == 2:
        corners = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
        steps = np.stack(
            [size * (u * ALONG + v * np.eye(5)) for size in (FAR[name], 2 * FAR[name]) for u, v in corners]
        )
    return np.concatenate([np.zeros((1, 5)), steps.reshape(-1, 5)])


def differences(name, order, values):
    """Derivatives from the values at the points, (points, time), with Richardson's extrapolation.

    The first are (time, parameter). The second are the product of ALONG with the Hessian of the sum over times.
    """
    if order == 1:
        first = np.asarray(values[1:]).reshape(4, 5, -1)
        narrow, wide = (first[2] - first[1]) / (2 * NEAR), (first[3] - first[0]) / (4 * NEAR)
        return ((4 * narrow - wide) / 3).T
    sums = np.sum(np.asarray(values[1:]).reshape(2, 4, 5, -1), axis=-1)
    sizes = FAR[name], 2 * FAR[name]
    at, beyond = (np.array([1, -1, -1, 1]) @ one / (4 * size**2) for one, size in zip(sums, sizes, strict=True))
    return (4 * at - beyond) / 3


def derivative(function, mode):
    """By jacrev or jacfwd, (time, parameter); "forward over reverse" is the product of the Hessian with ALONG."""
    if mode != "forward over reverse":
        return {"reverse": jax.jacrev, "forward": jax.jacfwd}[mode](function)
    gradient = jax.grad(lambda x: jnp.sum(function(x)))
    return lambda x: jax.jvp(gradient, (x,), (jnp.asarray(ALONG),))[1]
