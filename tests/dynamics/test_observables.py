import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_flow import Adapter, Factorization, analyse, digits_problem, gaussian_init, linearised_task, solve
from lora_flow.dynamics.measurements import Direction, measure, principal_directions
from lora_flow.dynamics.observables import observables


def read_off(adapters, directions):
    measured = measure(adapters, directions)
    return {k: float(v[0]) for k, v in jit_observables(jax.tree.map(lambda leaf: leaf[None], measured)).items()}


jit_observables = jax.jit(observables)


def random_adapter(rng, n_out, n_in, rank):
    return Adapter(jnp.asarray(rng.normal(size=(rank, n_in))), jnp.asarray(rng.normal(size=(n_out, rank))))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), tilt=st.floats(-12, 0), second=st.sampled_from([0.0, 1e-3, 1.0]))
def test_alignment_error_and_norm_are_those_of_the_singular_value_decomposition(seed, tilt, second):
    """Against 60-digit arithmetic, for stacked factors tilted away from gamma by 10^tilt."""
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=5), rng.normal(size=4)
    direction = Direction(jnp.asarray(left / np.linalg.norm(left)), jnp.asarray(right / np.linalg.norm(right)))
    gamma = np.asarray(direction.gamma)
    z = 2.0 * np.outer(gamma, rng.normal(size=3)) + 10**tilt * rng.normal(size=(9, 3))
    z += second * np.outer(np.cross(gamma[:3], [1.0, 2.0, 3.0]).repeat(3) * gamma.sum(), rng.normal(size=3))
    adapter = Adapter(jnp.asarray(z[5:].T), jnp.asarray(z[:5]))
    got = read_off((adapter,), (direction,))
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
    assert abs(first.gamma @ np.concatenate([g, vt[0]])) / np.sqrt(2) == pytest.approx(1.0, abs=1e-14)
    assert abs(second.gamma @ np.concatenate([u[:, 0], g])) / np.sqrt(2) == pytest.approx(1.0, abs=1e-14)


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
    direction = (Direction(jnp.eye(4)[0], jnp.eye(3)[0]),)
    measured = jax.tree.map(lambda x, y: jnp.stack([x, y]), measure((before,), direction), measure((after,), direction))
    change = (after.a @ after.a.T - after.b.T @ after.b) - (before.a @ before.a.T - before.b.T @ before.b)
    expected = np.linalg.norm(change) / np.linalg.norm(after.stacked, 2) ** 2
    np.testing.assert_allclose(observables(measured)["drift"], [0.0, expected], rtol=1e-12)


def test_linearised_task_is_the_gradient_at_the_pretrained_weights():
    problem = unaligned_problem()
    target = problem.shift + problem.w2 @ problem.w1
    gradient = jax.grad(lambda w1, w2: 0.5 * jnp.sum((target - w2 @ w1) ** 2), argnums=(0, 1))(problem.w1, problem.w2)
    for task, g in zip(linearised_task(problem), gradient, strict=True):
        np.testing.assert_allclose(task, -g, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), rank=st.integers(1, 4), layer=st.sampled_from([0, 1]))
def test_sizes_of_the_adapters_are_those_of_numpy(seed, rank, layer):
    """Norms, overlaps and the selection of an adapter, against dense matrices."""
    rng = np.random.default_rng(seed)
    problem = unaligned_problem()
    adapters = tuple(random_adapter(rng, *shape, rank) for shape in problem.layers)
    adapters = (adapters[0]._replace(a=1e-6 * adapters[0].a), adapters[1])
    got = read_off(adapters, principal_directions(problem))
    (a, b), task = adapters[layer], np.asarray(linearised_task(problem)[layer])
    u, _, vt = np.linalg.svd(task)
    gamma = np.concatenate([u[:, 0], vt[0]]) / np.sqrt(2)
    stacked = np.concatenate([b, a.T])
    i = layer + 1
    assert got[f"norm_b{i}a{i}"] == pytest.approx(np.linalg.norm(b @ a, 2), rel=1e-7)
    assert got[f"overlap_{i}"] == pytest.approx(float(u[:, 0] @ b @ a @ vt[0]), rel=1e-9, abs=1e-20)
    assert got[f"norm_along{i}"] == pytest.approx(np.linalg.norm(gamma @ stacked), rel=1e-12)
    rest = stacked - np.outer(gamma, gamma @ stacked)
    assert got[f"norm_across{i}"] == pytest.approx(np.linalg.norm(rest), rel=1e-12)


def test_details_against_dense_algebra():
    """Singular values of F, its three terms, the loss's split, and the gradient by automatic differentiation."""
    rng, problem = np.random.default_rng(1), unaligned_problem()
    adapters = tuple(random_adapter(rng, *shape, 2) for shape in problem.layers)
    got = analyse(problem, adapters)
    (a1, b1), (a2, b2) = adapters
    terms = [problem.w2 @ b1 @ a1, b2 @ a2 @ problem.w1, b2 @ a2 @ b1 @ a1]
    u_f, sigma, vt_f = np.linalg.svd(sum(terms))
    u, _, vt = np.linalg.svd(problem.shift)
    np.testing.assert_allclose(got["update_singular_values"], sigma[:4], rtol=1e-10)
    for name, term in zip(("term_1", "term_2", "term_12"), terms, strict=True):
        assert got[name] == pytest.approx(np.linalg.norm(term))
    cosine = abs(u[:, 0] @ u_f[:, 0] + vt[0] @ vt_f[0]) / 2
    assert got["update_alignment_error"] == pytest.approx(1 - cosine, abs=1e-12)
    assert got["loss_signal"] + got["loss_rest"] == pytest.approx(float(problem.loss(adapters)))
    u, vt = u[:, :5], vt  # the shift has rank 5: the rest is what lies outside its column space
    outside = (np.eye(6) - u @ u.T) @ (problem.shift - sum(terms))
    assert got["loss_rest"] == pytest.approx(0.5 * float(np.sum(outside**2)))
    gradient = jax.tree.leaves(jax.grad(problem.loss)(adapters))
    assert got["gradient_norm"] == pytest.approx(np.sqrt(sum(np.sum(np.square(g)) for g in gradient)))


def test_growth_rates_are_derivatives_along_the_flow():
    problem = unaligned_problem()
    start = gaussian_init(jax.random.key(0), problem, rank=2, alpha=1e-2)
    step = 1e-4
    trajectory = solve(
        problem, start, t1=0.1 + step, saves=[0.1 - step, 0.1, 0.1 + step], rtol=1e-10, save_adapters=True
    )
    rates = analyse(problem, trajectory.history)
    for i in (1, 2):
        before, _, after = 2 * np.log(trajectory.observables[f"norm_along{i}"])
        assert rates[f"growth_rate_{i}"][1] == pytest.approx((after - before) / (2 * step), rel=1e-5)
    loss = trajectory.observables["loss"]
    assert -(rates["gradient_norm"][1] ** 2) == pytest.approx(float(loss[2] - loss[0]) / (2 * step), rel=1e-5)


def test_analysis_keeps_small_angles_that_gram_matrices_round_away():
    """Beside a second large direction the solve's alignment error stops at 1e-16, that of the adapters does not."""
    left, right = np.eye(6)[0], np.eye(5)[0]
    tilt = 1e-10
    b = np.outer(left, [1.0, 0.0]) + np.outer(np.eye(6)[1], [tilt, 0.9])
    a = np.outer([1.0, 0.0], right) + np.outer([0.0, 0.9], np.eye(5)[1])

    class OneLayer:
        layers = ((6, 5),)

        def loss(self, adapters):
            ((a, b),) = adapters
            return 0.5 * jnp.sum((3.0 * jnp.outer(left, right) - b @ a) ** 2)

    got = analyse(OneLayer(), (Adapter(jnp.asarray(a), jnp.asarray(b)),))
    with mpmath.workdps(60):
        u, _, _ = mpmath.svd_r(mpmath.matrix(np.concatenate([b, a.T]).tolist()))
        exact = 1 - abs(u[0, 0] + u[6, 0]) / mpmath.sqrt(2)
    assert 1e-21 < float(exact) < 1e-18
    assert got["alignment_error"] == pytest.approx(float(exact), rel=1e-4)


def test_layers_may_have_different_ranks():
    problem = unaligned_problem()
    start = gaussian_init(jax.random.key(0), problem, rank=3, alpha=1e-1)
    start = (start[0]._replace(a=start[0].a[:2], b=start[0].b[:, :2]), start[1])
    trajectory = solve(problem, start, t1=0.2, saves=2)
    for i, adapter in enumerate(trajectory.adapters, start=1):
        found = float(trajectory.observables[f"norm_z{i}"][-1])
        assert found == pytest.approx(float(np.linalg.norm(adapter.stacked, 2)), rel=1e-10)


@pytest.mark.parametrize("start", ["tied values", "tied and across", "B zero", "all zero"])
def test_derivatives_are_finite_where_singular_values_tie_and_norms_are_zero(start):
    a, b = {
        "tied values": (np.eye(2, 4), np.eye(5, 2)),
        "tied and across": (np.eye(2, 4, k=2), np.eye(5, 2, k=-2)),  # so that none of the tied vectors is the nearest
        "B zero": (np.eye(2, 4), np.zeros((5, 2))),
        "all zero": (np.zeros((2, 4)), np.zeros((5, 2))),
    }[start]
    direction = Direction(jnp.eye(5)[1] * 0.6 + jnp.eye(5)[4] * 0.8, jnp.eye(4)[1])

    def seen(a, b):
        measured = measure((Adapter(a, b),), (direction,))
        return {name: values[0] for name, values in observables(jax.tree.map(lambda x: x[None], measured)).items()}

    for mode in (jax.jacrev, jax.jacfwd):
        found = jax.jit(mode(seen, argnums=(0, 1)))(jnp.asarray(a), jnp.asarray(b))
        for name, by in found.items():
            assert all(np.all(np.isfinite(one)) for one in by), name
    if start == "all zero":
        assert not np.any(found["norm_z1"][0])
