"""What is no direction is NaN, and what ties is taken together: the same in every path and coordinate system."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_flow import (
    Adapter,
    DeepLinear,
    Diagonal,
    Factorization,
    LinearNetwork,
    Regression,
    SingleLayer,
    SoftmaxRegression,
    analyse,
    canonical,
    descend,
    gaussian_init,
    solve,
    sweep,
)
from lora_flow.dynamics.measurements import measure, principal_directions
from lora_flow.dynamics.observables import observables

ONE, OTHER = np.diag([1.0, 0.0]), np.diag([0.0, 1.0])
RELATIVE = ("alignment_error", "norm_along1", "norm_across1", "overlap_1")


def turned(matrices, seed):
    """W1, W2 and the shift in other coordinates, where zeros become rounding."""
    rng = np.random.default_rng(seed)
    w1, w2, shift = matrices
    v, g, u = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (w1.shape[1], w1.shape[0], w2.shape[0]))
    return g @ w1 @ v.T, u @ w2 @ g.T, u @ shift @ v.T


def read_off(problem, adapters):
    measured = measure(adapters, principal_directions(problem))
    named = observables(jax.tree.map(lambda leaf: leaf[None], measured))
    return {name: float(values[0]) for name, values in named.items()}


def own(problem):
    """The same loss without any formula."""

    class Own:
        layers = problem.layers
        loss = staticmethod(lambda adapters: problem.loss(adapters))

    return Own()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_a_task_that_is_zero_is_zero_in_other_coordinates(seed, scale):
    """The shift lies where neither weight reaches: W2^T shift and shift W1^T are 0, or rounding."""
    matrices = scale * ONE, ONE / scale, scale * OTHER
    w1, w2, shift = turned(matrices, seed)
    problem = Factorization(w1, w2, shift)
    adapters = gaussian_init(jax.random.key(seed), problem, rank=1, alpha=0.1)
    coordinates = canonical(problem, rank=1)
    for one, state in (
        (Factorization(*matrices), adapters),
        (Factorization(*(Diagonal(np.diag(x), (2, 2)) for x in matrices)), adapters),
        (problem, adapters),
        (own(problem), adapters),
        (DeepLinear([w1, w2], shift), adapters),
        (coordinates.problem, coordinates.enter(adapters)[0]),
    ):
        seen = read_off(one, state)
        assert all(np.isnan(seen[name]) for name in RELATIVE), type(one)
        sizes = [np.linalg.norm(np.asarray(x.stacked), 2) for x in adapters]
        assert [seen["norm_z1"], seen["norm_z2"]] == pytest.approx(sizes, rel=1e-12)


def test_every_path_says_nan():
    """`alignment_error` had been .315 by `solve` and .825 by `sweep`."""
    problem = Factorization(*turned((ONE, ONE, OTHER), 0))
    how = {"t1": 0.5, "saves": 3, "solver": "Tsit5"}
    start = gaussian_init(jax.random.key(0), problem, rank=1, alpha=0.1)
    swept = sweep(problem, alpha=0.1, rank=1, details=True, progress=False, **how)
    solved = solve(problem, start, adjoint=diffrax.ForwardMode(), **how)
    stepped = descend(problem, start, steps=2, step=0.1, saves=2)
    analysed = analyse(problem, jax.tree.map(lambda leaf: leaf[None], start))
    for name in (*RELATIVE, "alignment_error_2"):
        for values in (swept[name], solved.observables[name], stepped.observables[name]):
            assert np.isnan(np.asarray(values)).all(), name
    assert np.isnan(swept["growth_rate_1"]).all()
    assert np.isnan(analysed["alignment_error"]).all()
    np.testing.assert_allclose(swept["loss"].values.ravel(), solved.observables["loss"], rtol=1e-3)
    assert np.isfinite(swept["norm_z1"]).all()
    assert "no direction to align with" in str(solved)


@pytest.mark.parametrize("single", [False, True], ids=["double", "single"])
def test_a_task_that_is_small_and_not_zero_keeps_its_direction(single):
    """Beside the weights it is 1e-4 in single precision and 1e-12 in double."""
    with jax.enable_x64(not single):
        small = 1e-4 if single else 1e-12
        problem = Factorization(*turned((np.diag([1.0, small]), np.diag([1.0, small]), OTHER), 1))
        first, second = principal_directions(problem)
        assert float(jnp.linalg.norm(first.gamma)) == pytest.approx(1.0, rel=1e-5)
        assert float(jnp.linalg.norm(second.gamma)) == pytest.approx(1.0, rel=1e-5)
        zero = Factorization(*turned((ONE, ONE, OTHER), 1))
        assert not jnp.any(principal_directions(zero)[0].gamma)


def test_tasks_of_every_problem_can_be_rounding():
    """Data that the shift does not touch, a classifier that is right already, a layer that does not reach it."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    inputs, shift = rng.normal(size=(5, 2)) @ q[:, :2].T, rng.normal(size=(2, 1)) @ q[:, 2:].T
    sure = 1e3 * np.eye(3)
    untouched = (
        Regression(inputs, shift),
        SoftmaxRegression(sure, [0, 1, 2], sure),
        DeepLinear([q @ np.diag([1.0, 0, 0]) @ q.T, q], q @ q @ np.diag([0.0, 1, 0]) @ q.T),
    )
    for problem in untouched:
        direction = principal_directions(problem)[-1]  # the first of two layers reaches the shift
        assert not jnp.any(direction.gamma), type(problem)
    for problem in (Regression(inputs, q[:2]), SoftmaxRegression(sure, [1, 2, 0], sure), LinearNetwork(q[:, :2])):
        direction = principal_directions(problem)[0]
        assert float(jnp.linalg.norm(direction.gamma)) == pytest.approx(1.0, rel=1e-12), type(problem)


@pytest.mark.parametrize("ties", [2, 3])
@pytest.mark.parametrize("single", [False, True], ids=["double", "single"])
def test_singular_pairs_that_tie_are_taken_together(ties, single):
    """cos^2 = ||G^T z||^2 with G of all of them; any one, which rounding picks, gave another number in each frame."""
    rng = np.random.default_rng(2)
    u, v = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (4, 5))
    sigma = np.asarray([2.0] * ties + [1.0] * (4 - ties))
    a, b = rng.normal(size=(2, 5)), rng.normal(size=(4, 2))
    top = np.linalg.svd(np.concatenate([b, a.T]))[0][:, 0]
    frame = np.concatenate([u[:, :ties], v[:, :ties]]) / np.sqrt(2)
    expected = 1 - np.linalg.norm(frame.T @ top)
    with jax.enable_x64(not single):
        for left, right in ((np.eye(4), np.eye(5)), (u, v)):
            turn_left, turn_right = left @ u.T, right @ v.T
            problem = SingleLayer(turn_left @ (u * sigma @ v[:, :4].T) @ turn_right.T)
            adapters = (Adapter(jnp.asarray(a @ turn_right.T), jnp.asarray(turn_left @ b)),)
            seen = read_off(problem, adapters)
            assert seen["alignment_error"] == pytest.approx(expected, abs=1e-5 if single else 1e-12)
            history = jax.tree.map(lambda leaf: leaf[None], adapters)
            assert analyse(problem, history)["alignment_error"][0] == pytest.approx(
                expected, abs=2e-5 if single else 1e-12
            )
        wide = Diagonal(jnp.asarray(sigma), (4, 5))
        plain = Factorization(jnp.eye(5), jnp.eye(4, 5), wide)
        assert int(jnp.sum(jnp.any(principal_directions(plain)[0].pairs[0] != 0, axis=1))) == ties


def test_of_more_than_eight_that_tie_there_is_none():
    for count, defined in ((8, True), (9, False)):
        for shift in (jnp.eye(count), np.linalg.qr(np.random.default_rng(0).normal(size=(count, count)))[0]):
            assert bool(jnp.any(principal_directions(SingleLayer(shift))[0].gamma)) == defined


@pytest.mark.parametrize("single", [False, True], ids=["double", "single"])
def test_singular_vectors_of_the_adapter_that_tie_count_as_the_nearest(single):
    """Z of a start with orthonormal factors, as LoRA-GA has: which vector is the top one, rounding would decide."""
    with jax.enable_x64(not single):
        shift = np.diag([3.0, 2.0, 1.0])
        for seed in range(4):
            u, v, q = (np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0] for n in (3, 3, 2))
            u, v = (np.eye(3), np.eye(3)) if seed == 0 else (u, v)
            a, b = v[:, :2].T, u[:, 1:]  # V_1..2, U_2..3
            adapters = (Adapter(jnp.asarray(q.T @ a), jnp.asarray(b @ q)),)
            seen = read_off(SingleLayer(u @ shift @ v.T), adapters)["alignment_error"]
            history = jax.tree.map(lambda leaf: leaf[None], adapters)
            after = analyse(SingleLayer(u @ shift @ v.T), history)["alignment_error"][0]
            # Z^T gamma = (0 + 1, 0)/sqrt(2) in the frame of A and B, over ||Z q|| = sqrt(2): a cosine of 1/2
            expected = 0.5
            assert seen == pytest.approx(expected, abs=1e-5 if single else 1e-12)
            assert after == pytest.approx(expected, abs=1e-5 if single else 1e-12)


def test_adapters_that_are_zero_or_lost_have_no_direction():
    problem = SingleLayer(np.diag([2.0, 1.0]))
    zero = (Adapter(jnp.zeros((1, 2)), jnp.zeros((2, 1))),)
    assert np.isnan(read_off(problem, zero)["alignment_error"])
    lost = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), zero)
    assert np.isnan(read_off(problem, lost)["alignment_error"])


def test_directions_of_stacked_problems_are_those_of_each():
    several = [Factorization(*turned((np.diag([1.0, x]), ONE, OTHER), 0)) for x in (0.0, 0.5)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    together = eqx.filter_jit(eqx.filter_vmap(principal_directions))(stacked)
    assert not jnp.any(together[1].left[0])
    for one, both in zip(principal_directions(several[1]), together, strict=True):
        np.testing.assert_allclose(np.abs(both.gamma[1]), np.abs(one.gamma), atol=1e-12)
