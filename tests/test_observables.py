import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_flow import Adapter, Factorization, digits_problem, gaussian_init, linearised_task, solve
from lora_flow.observables import measure, observables, principal_directions


def read_off(adapters, directions):
    measured = measure(adapters, directions)
    return {k: float(v[0]) for k, v in observables(jax.tree.map(lambda leaf: leaf[None], measured)).items()}


def random_adapter(rng, n_out, n_in, rank):
    return Adapter(jnp.asarray(rng.normal(size=(rank, n_in))), jnp.asarray(rng.normal(size=(n_out, rank))))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), tilt=st.floats(-12, 0), second=st.sampled_from([0.0, 1e-3, 1.0]))
def test_alignment_error_and_norm_are_those_of_the_singular_value_decomposition(seed, tilt, second):
    """Against 60-digit arithmetic, for stacked factors tilted away from gamma by 10^tilt."""
    rng = np.random.default_rng(seed)
    gamma = rng.normal(size=9)
    gamma /= np.linalg.norm(gamma)
    z = 2.0 * np.outer(gamma, rng.normal(size=3)) + 10**tilt * rng.normal(size=(9, 3))
    z += second * np.outer(np.cross(gamma[:3], [1.0, 2.0, 3.0]).repeat(3) * gamma.sum(), rng.normal(size=3))
    adapter = Adapter(jnp.asarray(z[5:].T), jnp.asarray(z[:5]))
    got = read_off((adapter,), (jnp.asarray(gamma),))
    with mpmath.workdps(60):
        u, sigma, _ = mpmath.svd_r(mpmath.matrix(z.tolist()))
        g = mpmath.matrix(gamma.tolist())
        norm_g = mpmath.sqrt(sum(x**2 for x in g))
        error = 1 - abs(sum(u[i, 0] * g[i] for i in range(9))) / norm_g
    assert got["norm_z1"] == pytest.approx(float(sigma[0]), rel=1e-12)
    # the sine is right to a few roundings of z and the error half its square; beside a second large direction the Gram
    # matrix of the part across gamma rounds at eps ||R||^2 / ||Z||^2, over the gap of the eigenvalues
    eps, sine = np.finfo(float).eps, np.sqrt(2 * float(error))
    across = np.linalg.norm(z - np.outer(gamma, gamma @ z)) ** 2 / float(sigma[0]) ** 2
    gap = 1 - float(sigma[1] / sigma[0]) ** 2
    bound = 20 * eps * (sine + across) / gap + 1e-30
    assert got["alignment_error"] == pytest.approx(float(error), rel=1e-9 / gap, abs=bound)


def test_directions_of_an_aligned_problem_are_the_papers(figure1_problem):
    u, _, vt = np.linalg.svd(figure1_problem.shift)
    g = np.asarray(figure1_problem.w2).T @ u[:, 0]
    g /= np.linalg.norm(g)
    first, second = principal_directions(figure1_problem)
    assert abs(first @ np.concatenate([g, vt[0]])) / np.sqrt(2) == pytest.approx(1.0, abs=1e-14)
    assert abs(second @ np.concatenate([u[:, 0], g])) / np.sqrt(2) == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("name", ["digits", "unaligned"])
def test_on_any_problem_small_adapters_align_with_the_linearised_task(name):
    """The definition where nothing is aligned: while Z is small it turns towards the task's top singular pair."""
    problem = digits_problem() if name == "digits" else unaligned_problem()
    fastest = max(np.linalg.norm(task, 2) for task in linearised_task(problem))
    alpha = 1e-40
    start = gaussian_init(jax.random.key(0), problem, rank=2, alpha=alpha)
    trajectory = solve(problem, start, t1=0.8 * np.log(1 / alpha) / fastest, saves=11)
    loss = trajectory.observables["loss"]
    assert loss[-1] > 0.99 * loss[0], "no longer the early phase"
    for layer in ("alignment_error", "alignment_error_2"):
        assert trajectory.observables[layer][0] > 0.1
        assert trajectory.observables[layer][-1] < 1e-3


def unaligned_problem():
    rng = np.random.default_rng(4)
    return Factorization(w1=rng.normal(size=(7, 5)), w2=rng.normal(size=(6, 7)), shift=rng.normal(size=(6, 5)))


def test_drift_is_the_change_of_the_imbalance_relative_to_the_squared_norm():
    rng = np.random.default_rng(0)
    before, after = random_adapter(rng, 4, 3, 2), random_adapter(rng, 4, 3, 2)
    gamma = jnp.eye(7)[0]
    measured = jax.tree.map(lambda x, y: jnp.stack([x, y]), measure((before,), (gamma,)), measure((after,), (gamma,)))
    change = (after.a @ after.a.T - after.b.T @ after.b) - (before.a @ before.a.T - before.b.T @ before.b)
    expected = np.linalg.norm(change) / np.linalg.norm(after.stacked, 2) ** 2
    np.testing.assert_allclose(observables(measured)["drift"], [0.0, expected], rtol=1e-12)


def test_linearised_task_is_the_gradient_at_the_pretrained_weights():
    problem = unaligned_problem()
    target = problem.shift + problem.w2 @ problem.w1
    gradient = jax.grad(lambda w1, w2: 0.5 * jnp.sum((target - w2 @ w1) ** 2), argnums=(0, 1))(problem.w1, problem.w2)
    for task, g in zip(linearised_task(problem), gradient, strict=True):
        np.testing.assert_allclose(task, -g, atol=1e-12)
