"""What is no direction is NaN, and what ties is taken together: the same in every path and coordinate system."""

import itertools

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
from lora_flow.dynamics.lanes import stack
from lora_flow.dynamics.measurements import directions_of, measure
from lora_flow.dynamics.observables import observables
from lora_flow.runtime.compiling import compiled

ONE, OTHER = np.diag([1.0, 0.0]), np.diag([0.0, 1.0])
RELATIVE = ("alignment_error", "norm_along1", "norm_across1", "overlap_1")


def turned(matrices, seed):
    """W1, W2 and the shift in other coordinates, where zeros become rounding."""
    rng = np.random.default_rng(seed)
    w1, w2, shift = matrices
    v, g, u = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (w1.shape[1], w1.shape[0], w2.shape[0]))
    return g @ w1 @ v.T, u @ w2 @ g.T, u @ shift @ v.T


def read_off(problem, adapters):
    return {name: float(values[0]) for name, values in _observed(adapters, directions_of(problem)).items()}


def over_time(adapters):
    """At a single time."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[None], adapters)


def lengths(problem):
    """||gamma|| of each layer, 0 without a direction."""
    return [np.linalg.norm([*one.left, *one.right]) / np.sqrt(2) for one in directions_of(problem)]


@compiled()
def _observed(adapters, directions):
    return observables(jax.tree.map(lambda leaf: leaf[None], measure(adapters, directions)))


class Own(eqx.Module):
    """The same loss without any formula."""

    problem: Factorization

    @property
    def layers(self):
        return self.problem.layers

    def loss(self, adapters):
        return self.problem.loss(adapters)


def test_a_task_that_is_zero_is_zero_in_other_coordinates():
    """The shift lies where neither weight reaches: W2^T shift and shift W1^T are 0, or rounding."""
    for seed, scale in itertools.product(range(4), (1.0, 1e-9, 1e9)):
        matrices = scale * ONE, ONE / scale, scale * OTHER
        w1, w2, shift = turned(matrices, seed)
        problem = Factorization(w1, w2, shift)
        adapters = gaussian_init(jax.random.key(seed), problem, rank=1, alpha=0.1)
        coordinates = canonical(problem, rank=1)
        for one, state in (
            (Factorization(*matrices), adapters),
            (Factorization(*(Diagonal(np.diag(x), (2, 2)) for x in matrices)), adapters),
            (problem, adapters),
            (Own(problem), adapters),
            (DeepLinear([w1, w2], shift), adapters),
            (coordinates.problem, coordinates.enter(adapters)[0]),
        ):
            seen = read_off(one, state)
            assert all(np.isnan(seen[name]) for name in RELATIVE), (type(one), seed, scale)
            sizes = [np.linalg.norm(np.concatenate([x.b, np.asarray(x.a).T]), 2) for x in adapters]
            assert [seen["norm_z1"], seen["norm_z2"]] == pytest.approx(sizes, rel=1e-12)


def test_every_path_says_nan():
    """`alignment_error` had been .315 by `solve` and .825 by `sweep`."""
    problem = Factorization(*turned((ONE, ONE, OTHER), 0))
    how = {"t1": 0.5, "saves": 3, "solver": "Tsit5"}
    start = gaussian_init(jax.random.key(0), problem, rank=1, alpha=0.1)
    swept = sweep(problem, alpha=0.1, rank=1, details=True, progress=False, **how)
    solved = solve(problem, start, derivatives="forward", **how)
    stepped = descend(problem, start, steps=2, step=0.1, saves=2)
    analysed = analyse(problem, over_time(start))
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
        assert lengths(problem) == pytest.approx([1.0, 1.0], rel=1e-5)
        assert lengths(Factorization(*turned((ONE, ONE, OTHER), 1)))[0] == 0.0


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
        assert lengths(problem)[-1] == 0.0, type(problem)  # the first of two layers reaches the shift
    for problem in (Regression(inputs, q[:2]), SoftmaxRegression(sure, [1, 2, 0], sure), LinearNetwork(q[:, :2])):
        assert lengths(problem)[0] == pytest.approx(1.0, rel=1e-12), type(problem)


@pytest.mark.parametrize("single", [False, True], ids=["double", "single"])
@pytest.mark.parametrize("ties", [2, 3])
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
            assert analyse(problem, over_time(adapters))["alignment_error"][0] == pytest.approx(
                expected, abs=2e-5 if single else 1e-12
            )
        wide = Diagonal(jnp.asarray(sigma), (4, 5))
        top = directions_of(Factorization(np.eye(5), np.eye(4, 5), wide))[0]
        assert np.count_nonzero(np.any([top.left, *top.tied[0]], axis=1)) == ties


def test_of_more_than_eight_that_tie_there_is_none():
    for count, defined in ((8, True), (9, False)):
        for shift in (np.eye(count), np.linalg.qr(np.random.default_rng(0).normal(size=(count, count)))[0]):
            assert bool(lengths(SingleLayer(shift))[0]) == defined


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
            after = analyse(SingleLayer(u @ shift @ v.T), over_time(adapters))["alignment_error"][0]
            # Z^T gamma = (0 + 1, 0)/sqrt(2) in the frame of A and B, over ||Z q|| = sqrt(2): a cosine of 1/2
            expected = 0.5
            assert seen == pytest.approx(expected, abs=1e-5 if single else 1e-12)
            assert after == pytest.approx(expected, abs=1e-5 if single else 1e-12)


def test_adapters_that_are_zero_or_lost_have_no_direction():
    problem = SingleLayer(np.diag([2.0, 1.0]))
    for value in (0.0, np.nan):
        adapters = (Adapter(jnp.asarray(np.full((1, 2), value)), jnp.asarray(np.full((2, 1), value))),)
        assert np.isnan(read_off(problem, adapters)["alignment_error"])


def test_directions_of_stacked_problems_are_those_of_each():
    several = [Factorization(*turned((np.diag([1.0, x]), ONE, OTHER), 0)) for x in (0.0, 0.5)]
    together = directions_of(stack(several), True)
    assert not np.any(together[1].left[0])
    for one, both in zip(directions_of(several[1]), together, strict=True):
        np.testing.assert_allclose(np.abs(both.left[1]), np.abs(one.left), atol=1e-12)
        np.testing.assert_allclose(np.abs(both.right[1]), np.abs(one.right), atol=1e-12)
