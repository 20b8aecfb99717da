"""One factor of a symmetric matrix, indefinite and with repeated eigenvalues too."""

import jax
import numpy as np
import pytest

from lora_flow import Adapter, InputError, SymmetricFactorization, load_run, oracles, solve, symmetric_problem
from lora_flow.adapter import zero_adapters
from lora_flow.cli import main
from lora_flow.recipes.kinds import KINDS
from lora_flow.settings import Settings

RNG = np.random.default_rng(0)
BASIS = np.linalg.qr(RNG.normal(size=(5, 5)))[0]
VALUES = np.array([2.0, 1.0, 1.0, 0.0, -0.5])
M = BASIS * VALUES @ BASIS.T
PROBLEM = SymmetricFactorization(M)
X = RNG.normal(size=(5, 4))
UNTIED = (Adapter(RNG.normal(size=(4, 5)), RNG.normal(size=(5, 4))),)


def test_the_loss_is_that_of_one_factor_beyond_its_least_value():
    for adapters, x in ((PROBLEM.adapters(X), X), (UNTIED, (UNTIED[0].b + UNTIED[0].a.T) / np.sqrt(2))):
        expected = np.sum((M - x @ x.T) ** 2) / 4
        assert float(PROBLEM.loss(adapters) + PROBLEM.least_loss) == pytest.approx(expected, rel=1e-13)
    assert float(PROBLEM.least_loss) == pytest.approx(0.25 / 4)
    np.testing.assert_allclose(PROBLEM.matrix, M, atol=1e-15)
    optimum = BASIS[:, :3] * np.sqrt(VALUES[:3])
    assert float(PROBLEM.loss(PROBLEM.adapters(optimum))) < 1e-28, "with all its digits, though M is indefinite"


def test_the_flow_of_the_adapters_is_that_of_the_factor_and_the_rest_stands_still():
    (a, b), slope = UNTIED[0], jax.grad(PROBLEM.loss)(UNTIED)
    (moved,) = PROBLEM.field(UNTIED)
    np.testing.assert_allclose(moved.a, -slope[0].a, atol=1e-13)
    np.testing.assert_allclose(moved.b, -slope[0].b, atol=1e-13)
    np.testing.assert_array_equal(moved.a.T, moved.b)
    x = (b + a.T) / np.sqrt(2)
    np.testing.assert_allclose(PROBLEM.factor((moved,)), (M - x @ x.T) @ x, atol=1e-13)


def test_derivatives_with_respect_to_the_matrix():
    """Of the loss, and of its least value, at equal eigenvalues, whose eigenvectors have none."""

    def both(m):
        problem = SymmetricFactorization(m)
        return problem.loss(PROBLEM.adapters(X)), problem.least_loss

    loss, least = jax.jacrev(both)(M)
    np.testing.assert_allclose(least, -0.25 * np.outer(BASIS[:, 4], BASIS[:, 4]), atol=1e-14)
    np.testing.assert_allclose(loss + least, (M - X @ X.T) / 2, atol=1e-13)
    direction = RNG.normal(size=(5, 5))
    direction = direction + direction.T
    differences = (np.array(both(M + 1e-5 * direction)) - np.array(both(M - 1e-5 * direction))) / 2e-5
    # the null space counts on either side of 0, so the least loss has a kink of second order there
    assert [np.sum(np.asarray(one) * direction) for one in (loss, least)] == pytest.approx(differences, rel=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 4, 7])
def test_noise_is_the_schur_complement(rank):
    x = RNG.normal(size=(5, rank))
    parts = BASIS.T @ x @ x.T @ BASIS
    expected = 0.0
    if rank > 3:
        expected = np.linalg.norm(parts[3:, 3:] - parts[3:, :3] @ np.linalg.inv(parts[:3, :3]) @ parts[:3, 3:], 2)
    padded = np.concatenate([x, np.zeros((5, 7 - rank))], axis=1)
    for factor in (x, padded):
        assert float(PROBLEM.observe(PROBLEM.adapters(factor))["noise"]) == pytest.approx(expected, rel=1e-9, abs=1e-25)


def test_what_it_knows_of_itself():
    assert PROBLEM.fastest_rate() == pytest.approx(2.0)
    assert PROBLEM.task_rank()[0] == 3
    assert [PROBLEM.lowest_loss(r) for r in (1, 2, 3, 6)] == pytest.approx([0.5, 0.25, 0.0, 0.0])
    np.testing.assert_allclose(PROBLEM.summary()["eigenvalues"], VALUES, atol=1e-14)
    assert "positive part of rank 3 with singular values 2, 1, 1; least loss 0.0625" in str(PROBLEM)
    assert float(PROBLEM.loss(zero_adapters(PROBLEM.layers, 1))) == pytest.approx(6 / 4)
    assert float(PROBLEM.growth_bound()(UNTIED)) >= np.linalg.eigvalsh(M - X @ X.T)[-1] - 1e-9


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.ones((2, 3)), r"matrix must be square, got shape \(2, 3\)"),
        (np.triu(np.ones((2, 2))), "matrix must be symmetric, got a difference of 1"),
        (np.zeros((2, 2)), "matrix must"),
        (-(M @ M), "matrix must have a positive eigenvalue, got a largest one of"),
    ],
)
def test_other_matrices_are_refused(matrix, message):
    with pytest.raises(InputError, match=message):
        SymmetricFactorization(matrix)


def test_starts_that_offset_weights_are_refused():
    with pytest.raises(InputError, match="init must not offset weights, of which a SymmetricFactorization has none"):
        PROBLEM.offset(UNTIED)


def test_a_sweep_by_its_kind_ends_at_the_best_of_every_rank(tmp_path):
    """From tied starts at the defaults, in one program, with M indefinite: a floor, an exponential, and a tail."""
    words = "--m 5 --eigenvalues 2 1 1 -0.5 --init tied --alpha 0.3 --rank 1 3 4 --seeds 2 --t1 40 --saves 5"
    assert main(["sweep", "--problem", "symmetric", *words.split(), "--out", str(tmp_path / "run")]) == 0
    dataset = load_run(tmp_path / "run").isel(time=-1).squeeze()
    assert (dataset["status"] == 0).all()
    np.testing.assert_allclose(dataset["loss"].sel(rank=1), dataset["loss_floor"].sel(rank=1), rtol=1e-6)
    assert dataset["loss"].sel(rank=3).max() < 1e-24
    assert dataset["noise"].sel(rank=[1, 3]).max() < 1e-24
    np.testing.assert_allclose(dataset["loss"].sel(rank=4), dataset["noise"].sel(rank=4) ** 2 / 4, rtol=1e-3)
    assert 0.3 < 40 * dataset["noise"].sel(rank=4).min() <= 40 * dataset["noise"].sel(rank=4).max() < 0.5


def test_the_defaults_follow_the_closed_form():
    start = PROBLEM.adapters(0.3 * X)
    run = solve(PROBLEM, start, t1=6.0, saves=5, save_adapters=True)
    x = np.asarray(PROBLEM.factor(run.history))
    np.testing.assert_allclose(x @ x.mT, oracles.symmetric(M, 0.3 * X, run.times), atol=1e-3)
    np.testing.assert_array_equal(run.history[0].a.mT, run.history[0].b)


def test_a_draw_has_the_eigenvalues_asked_for():
    problem = symmetric_problem(jax.random.key(0), m=6, eigenvalues=(1.0, 1.0, -0.25))
    np.testing.assert_allclose(problem.summary()["eigenvalues"], [1, 1, 0, 0, 0, -0.25], atol=1e-14)
    for eigenvalues in ((), (0.0, 0.0), (-1.0,), (1e-20, -1.0)):
        with pytest.raises(InputError, match="eigenvalues must have a positive one"):
            symmetric_problem(jax.random.key(0), m=6, eigenvalues=eigenvalues)
    with pytest.raises(InputError, match="eigenvalues must be finite numbers, got"):
        symmetric_problem(jax.random.key(0), m=6, eigenvalues=(1.0, np.nan))
    with pytest.raises(InputError, match="eigenvalues must be at most m = 1 in number, got 2"):
        KINDS["symmetric"].draw(Settings(problem="symmetric", m=1), jax.random.key(0))
