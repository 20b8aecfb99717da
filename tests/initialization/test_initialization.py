"""Adapters at t = 0: every scheme against its formula, written out in NumPy, and in a sweep by its name."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from scipy import stats
from scipy.integrate import solve_ivp

from lora_flow import (
    INITIALIZATIONS,
    Diagonal,
    Factorization,
    InputError,
    Offset,
    Regression,
    SingleLayer,
    aligned_problem,
    canonical,
    digits_problem,
    eva_init,
    gaussian_init,
    gora_init,
    linearised_task,
    lora_one_init,
    orthogonal_init,
    solve,
    spectral_init,
    sweep,
)
from lora_flow.algebra.diagonal import dense
from lora_flow.initialization import check_rank, initialize
from lora_flow.sweeps.values import start_values

KEY = jax.random.key(7)


@pytest.mark.parametrize("side", ["A", "B"])
def test_gaussian_draws_one_factor_from_the_normal_and_leaves_the_other_zero(figure1_problem, side):
    drawn = []
    for adapter in gaussian_init(KEY, figure1_problem, rank=10, alpha=1e-3, side=side):
        random, zero = (adapter.a, adapter.b) if side == "A" else (adapter.b, adapter.a)
        assert not jnp.any(zero)
        drawn.append(np.asarray(random).ravel())
    assert stats.kstest(np.concatenate(drawn) / 1e-3, "norm").pvalue > 1e-3
    assert not np.allclose(drawn[0][:50], drawn[1][:50])


@pytest.mark.parametrize("side", ["A", "B"])
def test_gaussian_draws_are_nested_in_rank_and_proportional_to_alpha(figure1_problem, side):
    small = gaussian_init(KEY, figure1_problem, rank=2, alpha=1e-5, side=side)
    large = gaussian_init(KEY, figure1_problem, rank=7, alpha=1e-3, side=side)
    for narrow, wide in zip(small, large, strict=True):
        np.testing.assert_allclose(100 * narrow.a, wide.a[:2], rtol=1e-14)
        np.testing.assert_allclose(100 * narrow.b, wide.b[:, :2], rtol=1e-14)


def test_spectral_rows_lie_along_the_shifts_right_singular_vectors():
    problem = aligned_problem(KEY, component=[0, 4], shift_scale=[5.0, 2.0])
    first, second = spectral_init(KEY, problem, rank=4, alpha=1e-2)
    _, _, vt = np.linalg.svd(problem.shift)
    overlaps = np.abs(np.asarray(first.a) @ vt.T)
    # two rows along v_1, v_5 (in the order of sigma_shift sigma_W2), the rest orthogonal to both
    assert np.all(np.sort((overlaps > 1e-8).sum(axis=1))[:2] == 1)
    np.testing.assert_allclose(overlaps[2:, :2], 0.0, atol=1e-15)
    gram = np.asarray(first.a @ first.a.T)
    np.testing.assert_allclose(gram - np.diag(np.diag(gram)), 0.0, atol=1e-17)
    assert not jnp.any(first.b)
    assert not jnp.any(second.b)


def test_under_spectral_initialisation_the_modes_never_mix():
    """Section 4: U_Y^T W2 B1 A1 V_Y and U_Y^T B2 A2 W1 V_Y stay diagonal along the flow."""
    problem = aligned_problem(KEY, m=4, n=5, h=6, component=[0, 2], shift_scale=[5.0, 2.0])
    start = spectral_init(KEY, problem, rank=2, alpha=1e-2)
    final = solve(problem, start, t1=2.0, saves=5, solver="Tsit5").adapters
    u, _, vt = np.linalg.svd(problem.w2 @ problem.w1)
    (a1, b1), (a2, b2) = final
    for term in (problem.w2 @ b1 @ a1, b2 @ a2 @ problem.w1):
        rotated = u.T @ np.asarray(term) @ vt.T
        np.testing.assert_allclose(np.where(np.eye(4, 5, dtype=bool), 0.0, rotated), 0.0, atol=1e-13)


def test_spectral_uses_ranks_above_the_tasks(figure1_problem):
    first, _ = spectral_init(KEY, figure1_problem, rank=10, alpha=1.0)
    assert np.linalg.matrix_rank(first.a) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0, "alpha": 1.0}, "rank must lie between 1 and 10, the smallest layer dimension, got 0"),
        ({"rank": 11, "alpha": 1.0}, "rank must lie between 1 and 10, the smallest layer dimension, got 11"),
        ({"rank": 2, "alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
        ({"rank": 2, "alpha": -1e-3}, "alpha must be positive and finite, got -0.001"),
        ({"rank": 2, "alpha": float("inf")}, "alpha must be positive and finite, got inf"),
        ({"rank": 2, "alpha": 1.0, "side": "C"}, "side must be 'A' or 'B', got 'C'"),
    ],
)
def test_bad_arguments_are_named(figure1_problem, arguments, message):
    with pytest.raises(InputError, match=message):
        gaussian_init(KEY, figure1_problem, **arguments)


class Perceptron(eqx.Module):
    """A loss that no formula is known of: two layers with tanh between them, 3 - 4 - outputs."""

    layers: tuple = eqx.field(static=True)

    def __init__(self, outputs=2):
        self.layers = ((4, 3), (outputs, 4))

    def loss(self, adapters):
        (a1, b1), (a2, b2) = adapters
        w1, w2, x, y = (jax.random.normal(KEY, shape) for shape in (*self.layers, (3, 6), (len(b2), 6)))
        return 0.5 * jnp.sum(((w2 + b2 @ a2) @ jnp.tanh((w1 + b1 @ a1) @ x) - y) ** 2)


def test_spectral_needs_the_rank_of_what_a_layer_must_learn():
    problem = aligned_problem(KEY, component=[0, 1, 2])
    with pytest.raises(InputError, match="rank must be at least 3, the rank of the shift, for spectral_init, got 2"):
        spectral_init(KEY, problem, rank=2, alpha=1e-3)
    with pytest.raises(InputError, match="rank must be at least 9"):
        spectral_init(KEY, digits_problem(), rank=8, alpha=1e-3)


def test_spectral_speaks_of_no_shift_where_there_is_none():
    refused = "rank must be at least 3, the rank of -dL/dW of layer 1 without adapters, for {}, for which the smallest "
    refused += "layer dimension, 2, leaves no room, got 2"
    with pytest.raises(InputError, match=refused.format("spectral_init")):
        spectral_init(KEY, Perceptron(), rank=2, alpha=1e-3)
    with pytest.raises(InputError, match=refused.format("init spectral")):
        sweep(Perceptron(), init="spectral", rank=2, t1=1.0)
    with pytest.raises(
        InputError, match="at least 4, the rank of -dL/dW of layer 2 without adapters, for spectral_init"
    ):
        spectral_init(KEY, Perceptron(outputs=5), rank=2, alpha=1e-3)


def test_a_rank_is_an_integer(figure1_problem):
    with pytest.raises(InputError, match=r"rank must be an integer, got 2\.5"):
        check_rank(2.5, figure1_problem.layers)


def test_lora_one_is_a_balanced_multiple_of_the_gradients_best_approximation():
    """B A = gamma P_r(G)/S_1 and A A^T = B^T B (arXiv 2502.01235v3, section 3 and Algorithm 1)."""
    problem = digits_problem()
    for adapter, task in zip(lora_one_init(KEY, problem, rank=3, alpha=0.1), linearised_task(problem), strict=True):
        u, s, vt = np.linalg.svd(task)
        np.testing.assert_allclose(adapter.b @ adapter.a, 0.01 * (u[:, :3] * s[:3] / s[0]) @ vt[:3], atol=1e-14)
        np.testing.assert_allclose(adapter.imbalance, 0.0, atol=1e-14)


def test_lora_one_leaves_out_directions_that_the_gradient_lacks():
    shift = np.outer(np.arange(1.0, 6.0), np.arange(2.0, 9.0))
    ((a, b),) = lora_one_init(KEY, SingleLayer(shift), rank=4, alpha=1.0)
    np.testing.assert_allclose(b[:, :1] @ a[:1], shift / np.linalg.norm(shift), atol=1e-14)
    assert not jnp.any(a[1:])
    assert not jnp.any(b[:, 1:])


def test_lora_one_is_the_same_in_canonical_coordinates():
    problem = aligned_problem(KEY, component=[0, 4], shift_scale=[5.0, 2.0])
    turned = canonical(problem, rank=2)
    inner = lora_one_init(KEY, turned.problem, rank=2, alpha=0.3)
    entered, _ = turned.enter(lora_one_init(KEY, problem, rank=2, alpha=0.3))
    for one, other in zip(inner, entered, strict=True):
        np.testing.assert_allclose(np.abs(one.b @ one.a), np.abs(other.b @ other.a), atol=1e-12)


def test_a_balanced_single_layer_at_rank_one_is_logistic():
    """With balanced rank-one factors along a singular pair, p = b a obeys p' = 2 p (sigma - p): the logistic curve."""
    sigma, t1 = 1.7, 3.0
    u, v = np.eye(5)[0], np.eye(7)[2]
    problem = SingleLayer(sigma * np.outer(u, v))
    start = lora_one_init(KEY, problem, rank=1, alpha=1e-2)
    ((a, b),) = solve(problem, start, t1=t1, rtol=1e-10, solver="Tsit5").adapters
    grown = 1e-4 * np.exp(2 * sigma * t1)
    np.testing.assert_allclose(b @ a, sigma * grown / (sigma - 1e-4 + grown) * np.outer(u, v), atol=1e-8)


RNG = np.random.default_rng(0)
W1, W2, SHIFT = (RNG.standard_normal(shape) for shape in ((9, 7), (6, 9), (6, 7)))
WEIGHT, INPUTS = RNG.standard_normal((6, 7)), RNG.standard_normal((12, 7)) + 0.5
PROBLEMS = {
    "single": SingleLayer(SHIFT, 0.5, weight=WEIGHT),
    "linear": Regression(INPUTS, SHIFT, weight=WEIGHT, scaling=0.5),
    "relu": Regression(INPUTS, SHIFT, weight=WEIGHT, activation="relu", scaling=0.5),
    "two": Factorization(W1, W2, SHIFT),
}


def by_hand(problem):
    """(W, s, -dL/dW) of each layer, the gradient at the pretrained weights and differentiated by hand."""
    now, goal = INPUTS @ WEIGHT.T, INPUTS @ (WEIGHT + SHIFT).T
    missing = np.maximum(goal, 0) - np.maximum(now, 0)
    return {
        "single": [(WEIGHT, 0.5, SHIFT)],
        "linear": [(WEIGHT, 0.5, (goal - now).T @ INPUTS / 12)],
        "relu": [(WEIGHT, 0.5, (missing * (now > 0)).T @ INPUTS / 12)],
        "two": [(W1, 1.0, W2.T @ SHIFT), (W2, 1.0, SHIFT @ W1.T)],
    }[problem]


def thin(matrix):
    return np.linalg.svd(matrix, full_matrices=False)


def pissa(w, s, g, r):
    u, sigma, vt = thin(w)
    return np.sqrt(sigma[:r, None] / s) * vt[:r], u[:, :r] * np.sqrt(sigma[:r] / s)


def milora(w, s, g, r):
    u, sigma, vt = thin(w)
    return np.sqrt(sigma[-r:, None] / s) * vt[-r:], u[:, -r:] * np.sqrt(sigma[-r:] / s)


def olora(w, s, g, r):
    q, upper = np.linalg.qr(w)
    return upper[:r], q[:, :r]


def loram(w, s, g, r):
    """Columns of the discrete sine transform; B A has log_m(r) times the weight's mean square, m its smaller side."""
    left, right = (scipy.fft.dst(np.eye(size), type=1, norm="ortho")[:, :r] for size in w.shape)
    share = np.emath.logn(min(w.shape), r) * np.mean(w**2) / np.mean((left @ right.T) ** 2)
    return share**0.25 * right.T, share**0.25 * left


def lora_one(w, s, g, r):
    u, sigma, vt = thin(g)
    size = np.sqrt(sigma[:r] / sigma[0])
    return size[:, None] * vt[:r], u[:, :r] * size


def lora_one_theory(w, s, g, r):
    u, sigma, vt = thin(g)
    return np.sqrt(sigma[:r, None]) * vt[:r], u[:, :r] * np.sqrt(sigma[:r])


def lora_ga(w, s, g, r):
    u, _, vt = thin(g)
    return len(g) ** 0.25 * vt[:r], len(g) ** 0.25 * u[:, r : 2 * r]


def lora_ga_peft(w, s, g, r):
    u, sigma, vt = thin(g)
    return vt[:r], len(g) ** 0.25 * u[:, r : 2 * r] * sigma[r : 2 * r]


FORMULAS = {  # of the sources, alpha = 1
    "pissa": pissa,
    "milora": milora,
    "olora": olora,
    "loram": loram,
    "lora-one": lora_one,
    "lora-one-theory": lora_one_theory,
    "lora-ga": lora_ga,
    "lora-ga-peft": lora_ga_peft,
}


def assert_same_pairs(adapter, a, b, atol):
    """The same rank-one pairs b_j a_j but for a sign, which a singular vector leaves open, and the same norms."""
    ours, theirs = (np.einsum("ij,jk->jik", *pair) for pair in ((adapter.b, adapter.a), (b, a)))
    signs = np.sign(np.sum(ours * theirs, axis=(1, 2), keepdims=True))
    np.testing.assert_allclose(ours, signs * theirs, rtol=0, atol=atol)
    np.testing.assert_allclose(np.linalg.norm(adapter.a, axis=1), np.linalg.norm(a, axis=1), rtol=0, atol=atol)
    np.testing.assert_allclose(np.linalg.norm(adapter.b, axis=0), np.linalg.norm(b, axis=0), rtol=0, atol=atol)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("scheme", FORMULAS)
def test_schemes_that_draw_nothing_are_their_formulas(scheme, problem):
    start = INITIALIZATIONS[scheme].init(KEY, PROBLEMS[problem], rank=3, alpha=0.5)
    for adapter, layer in zip(start, by_hand(problem), strict=True):
        a, b = FORMULAS[scheme](*layer, 3)
        assert_same_pairs(adapter, 0.5 * a, 0.5 * b, atol=1e-12)
        if scheme in ("pissa", "milora", "lora-one", "lora-one-theory"):
            np.testing.assert_allclose(adapter.imbalance, 0.0, atol=1e-12)
        if scheme == "olora":
            np.testing.assert_allclose(adapter.b.T @ adapter.b, 0.25 * np.eye(3), atol=1e-14)


# what the sweep below is about: 10 x 12, a shift of rank two, inputs whose principal directions have gains 1 to 1.5
OUT, IN, SAMPLES, SCALING = 10, 12, 20, 0.5


def frame(size, count):
    return np.linalg.qr(RNG.standard_normal((size, count)))[0]


X = np.sqrt(SAMPLES) * (frame(SAMPLES, IN) * np.linspace(1, 1.5, IN)) @ frame(IN, IN).T
TRUE = (frame(OUT, 2) * [2.0, 1.5]) @ frame(IN, 2).T
PRETRAINED = 0.5 * RNG.standard_normal((OUT, IN))
LAYER = Regression(X, TRUE, weight=PRETRAINED, scaling=SCALING)
RANKS, ALPHAS = (2, 4), (0.5, 1.0)
DRAWN = ("gaussian", "orthogonal", "spectral", "gora", *(name for name, one in INITIALIZATIONS.items() if one.network))


def starts(scheme, rank, alpha, seed=0):
    return initialize(scheme, jax.random.key(seed), LAYER, rank=rank, alpha=alpha, side="A")


@pytest.mark.parametrize("scheme", INITIALIZATIONS)
def test_alpha_multiplies_both_factors(scheme):
    (small,), (large,) = starts(scheme, 4, 0.5), starts(scheme, 4, 1.5)
    np.testing.assert_allclose(large.a, 3 * small.a, rtol=1e-12)
    np.testing.assert_allclose(large.b, 3 * small.b, rtol=1e-12)


@pytest.mark.parametrize("scheme", INITIALIZATIONS)
def test_only_some_schemes_draw(scheme):
    (one,), (other,) = starts(scheme, 4, 1.0, seed=1), starts(scheme, 4, 1.0, seed=2)
    same = np.array_equal(one.a, other.a) and np.array_equal(one.b, other.b)
    assert same == (scheme not in DRAWN)


def test_orthogonal_factors_share_no_direction_of_the_rank():
    """B A = 0, each factor has half the rank, and the squared norms of N and M, which it is made of, chi-squared."""
    problem, r = SingleLayer(np.ones((40, 60))), 8
    ((a, b),) = orthogonal_init(KEY, problem, rank=r, alpha=0.3)
    np.testing.assert_allclose(b @ a, 0.0, atol=1e-15)
    for factor in (a, b):
        sigma = np.linalg.svd(factor, compute_uv=False)
        assert np.sum(sigma > 1e-12 * sigma[0]) == r // 2
        entries = factor.size // 2
        assert 1e-3 < stats.chi2(entries).cdf(np.sum((factor / 0.03) ** 2)) < 1 - 1e-3


def test_gora_is_a_gradient_step_projected_on_random_rows():
    """B A = alpha^2 G A^+ A with A uniform in ±alpha/sqrt(in): of all B the one with which B A is nearest to G."""
    problem = Regression(RNG.standard_normal((50, 60)), RNG.standard_normal((20, 60)), scaling=3.0)
    ((a, b),) = gora_init(KEY, problem, rank=8, alpha=0.3)
    assert stats.kstest(np.ravel(a) * np.sqrt(60) / 0.3, stats.uniform(-1, 2).cdf).pvalue > 1e-3
    gradient = np.asarray(problem.shift @ problem.features.T @ problem.features)
    nearest = gradient @ np.linalg.pinv(a) @ a
    np.testing.assert_allclose(b @ a, 0.09 * nearest, atol=1e-13 * np.linalg.norm(nearest))


def test_eva_keeps_most_of_what_the_layer_is_fed_with():
    """Of all orthonormal rows the ones that the inputs are largest along: the sum of their largest squared gains."""
    ((a, b),) = eva_init(KEY, PROBLEMS["relu"], rank=3, alpha=0.3)
    np.testing.assert_allclose(a @ a.T, 0.09 * np.eye(3), atol=1e-15)
    largest = np.linalg.svd(INPUTS, compute_uv=False)[:3]
    np.testing.assert_allclose(np.linalg.norm(INPUTS @ a.T / 0.3, axis=0), largest, rtol=1e-12)
    assert not jnp.any(b)


@pytest.mark.parametrize("scheme", ["spectral", *(name for name in FORMULAS if "lora-" in name)])
def test_a_diagonal_problem_starts_as_the_same_one_written_out(scheme):
    """Although the diagonals hold fewer values than the rank asks for."""
    short = Factorization(
        Diagonal(jnp.arange(6.0, 0.0, -1), (8, 6)),
        Diagonal(jnp.arange(5.0, 0.0, -1), (5, 8)),
        Diagonal(jnp.array([2.0, 1.0]), (5, 6)),
    )
    full = Factorization(*(dense(matrix) for matrix in (short.w1, short.w2, short.shift)))
    rank = 2 if "ga" in scheme else 4
    one, other = (INITIALIZATIONS[scheme].init(KEY, problem, rank=rank, alpha=0.5) for problem in (short, full))
    for diagonal, written, task in zip(one, other, linearised_task(full), strict=True):
        assert diagonal.a.shape == written.a.shape
        assert diagonal.b.shape == written.b.shape
        for x, y in ((diagonal.a, written.a), (diagonal.b.T, written.b.T)):
            np.testing.assert_allclose(x @ x.T, y @ y.T, atol=1e-14)
        # up to signs, and where the task is zero up to the choice of a basis
        for x, y in ((task @ diagonal.a.T, task @ written.a.T), (diagonal.b.T @ task, written.b.T @ task)):
            np.testing.assert_allclose(np.abs(x), np.abs(y), atol=1e-13)


@pytest.mark.parametrize("scheme", INITIALIZATIONS)
@pytest.mark.parametrize(
    ("rank", "alpha", "message"),
    [
        (0, 1.0, "rank must lie between 1 and 10, the smallest layer dimension, got 0"),
        (11, 1.0, "rank must lie between 1 and 10, the smallest layer dimension, got 11"),
        (2, -1.0, "alpha must be positive and finite, got -1.0"),
    ],
)
def test_every_scheme_names_a_bad_rank_and_alpha(scheme, rank, alpha, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        starts(scheme, rank, alpha)


class OnlyLoss:
    layers = ((4, 3),)

    def loss(self, adapters):
        ((a, b),) = adapters
        return jnp.sum((1 - b @ a) ** 2)


NO_WEIGHTS = "problem must know its pretrained weights, as `weights`, for {}, got {} without them"


@pytest.mark.parametrize(
    ("scheme", "problem", "rank", "message"),
    [
        *((name, SingleLayer(SHIFT), 2, NO_WEIGHTS.format(name, "SingleLayer")) for name in list(FORMULAS)[:4]),
        ("pissa", OnlyLoss(), 2, NO_WEIGHTS.format("pissa", "OnlyLoss")),
        (
            "eva",
            PROBLEMS["single"],
            2,
            "problem must know what its layers are fed with, as `layer_inputs`, for eva, got SingleLayer without it",
        ),
        (
            "eva",
            PROBLEMS["two"],
            2,
            "problem must feed every layer with inputs that have principal directions, for eva, "
            "got white inputs of layer 1",
        ),
        ("eva", Regression(INPUTS[:2], SHIFT), 3, "rank must be at most 2, the number of samples, for eva, got 3"),
        ("orthogonal", PROBLEMS["two"], 3, "rank must be even for orthogonal, got 3"),
        ("loram", PROBLEMS["two"], 1, "rank must be at least 2 for loram, whose size is log(rank), got 1"),
        (
            "lora-ga",
            PROBLEMS["two"],
            4,
            "rank must be at most 3, half the smallest layer dimension, for lora-ga, got 4",
        ),
        (
            "lora-ga-peft",
            OnlyLoss(),
            2,
            "rank must be at most 1, half the smallest layer dimension, for lora-ga-peft, got 2",
        ),
    ],
)
def test_what_a_scheme_asks_for_is_told_in_one_line(scheme, problem, rank, message):
    with pytest.raises(InputError) as one:
        INITIALIZATIONS[scheme].init(KEY, problem, rank=rank, alpha=1.0)
    assert str(one.value) == message
    with pytest.raises(InputError) as other:  # before anything is solved
        sweep(problem, init=["gaussian", scheme], alpha=1.0, rank=rank, t1=1.0)
    assert str(other.value) == message


HOW = {"t1": 200.0, "saves": (0.0, 0.5, 1.0, 5.0, 20.0, 100.0, 200.0), "solver": "Tsit5", "rtol": 1e-6}


@pytest.fixture(scope="module")
def swept():
    """Every scheme, to where nothing moves any more."""
    schemes = list(INITIALIZATIONS)
    return sweep(LAYER, init=schemes, alpha=ALPHAS, rank=RANKS, seeds=(3,), **HOW, progress=False)


def flow_by_hand(scheme, a, b):
    """The loss at t = 0, 0.5, 1 of the layer, its weight frozen at W - s B(0) A(0) where the scheme is of this kind.

    In NumPy by SciPy's solver, from the definition: 1/(2 N) ||X (frozen + s B A)^T - X (W + shift)^T||_F^2.
    """
    frozen = PRETRAINED - SCALING * b @ a * INITIALIZATIONS[scheme].offset
    labels, size = X @ (PRETRAINED + TRUE).T, a.size

    def missing(state):
        a, b = state[:size].reshape(-1, IN), state[size:].reshape(OUT, -1)
        return a, b, labels - X @ (frozen + SCALING * b @ a).T

    def velocity(t, state):
        a, b, rest = missing(state)
        descent = SCALING * rest.T @ X / SAMPLES
        return np.concatenate([(b.T @ descent).ravel(), (descent @ a.T).ravel()])

    start = np.concatenate([np.ravel(a), np.ravel(b)])
    states = solve_ivp(velocity, (0, 1), start, "DOP853", t_eval=(0, 0.5, 1), rtol=1e-10, atol=1e-13).y.T
    return [np.sum(missing(state)[2] ** 2) / (2 * SAMPLES) for state in states]


def solve_shifted(scheme, start):
    """As the sweep does it; an offset of nothing is none, and takes no other program."""
    subtracted = jax.tree.map(lambda leaf: leaf * INITIALIZATIONS[scheme].offset, start)
    return solve(Offset(LAYER, subtracted), start, **HOW)


@pytest.mark.parametrize("scheme", INITIALIZATIONS)
@pytest.mark.long
def test_a_scheme_in_a_sweep_is_the_flow_of_its_frozen_weights(swept, scheme):
    """Padded, batched and by name it is what SciPy makes of the start, and what `solve` does."""
    for rank in RANKS:
        for alpha in ALPHAS:
            lane = swept.sel(init=scheme, alpha=alpha, rank=rank, seed=3)
            ((a, b),) = start = starts(scheme, rank, alpha, seed=3)
            assert int(lane["status"]) == 0
            np.testing.assert_allclose(lane["loss"][:3], flow_by_hand(scheme, a, b), rtol=1e-5)
    alone = solve_shifted(scheme, start)
    for name, values in alone.observables.items():
        if name == "drift":
            continue  # which is an error itself
        size, defined = float(jnp.max(jnp.abs(values))), slice(name == "alignment_error", None)
        # at t = 0 several schemes have Z with equal singular values, none of which is the top one
        np.testing.assert_allclose(lane[name][defined], values[defined], rtol=1e-5, atol=1e-9 * size, err_msg=name)


@pytest.mark.long
def test_no_start_gets_below_its_floor_and_all_reach_it(swept):
    """The floor is half the squared norm of what Eckart and Young's approximation of all there is to learn leaves."""
    first = swept["loss"].isel(time=0)
    above = (swept["loss"] - swept["loss_floor"]) / first
    assert float(above.min()) > -1e-12
    assert float(above.isel(time=-1).max()) < 1e-5
    for scheme, kind in INITIALIZATIONS.items():
        for rank in RANKS:
            for alpha in ALPHAS:
                ((a, b),) = starts(scheme, rank, alpha, seed=3)
                frozen = SCALING * b @ a * kind.offset
                left = np.linalg.svd(X @ (TRUE + frozen).T / np.sqrt(SAMPLES), compute_uv=False)[rank:]
                floor = float(swept["loss_floor"].sel(init=scheme, rank=rank, alpha=alpha, seed=3))
                np.testing.assert_allclose(floor, 0.5 * np.sum(left**2), rtol=1e-12, atol=1e-25)
                assert floor == 0 or kind.offset
    for scheme in ("pissa", "milora", "olora", "loram"):
        assert np.all(swept["loss_floor"].sel(init=scheme) > 1e-3 * first.sel(init=scheme))


@pytest.mark.parametrize(("scheme", "dead"), [("pissa", 2), ("milora", 4), ("lora-one", 1), ("gaussian", 0)])
def test_directions_beyond_a_matrixs_rank_are_dead_and_not_small(scheme, dead):
    """Zero to the last digit, where rounding would grow: of a weight of rank two and a gradient of rank three."""
    weight, shift = (RNG.standard_normal((8, r)) @ RNG.standard_normal((r, 9)) for r in (2, 3))
    problem = SingleLayer(shift, weight=weight)
    ((a, b),) = start = initialize(scheme, KEY, problem, rank=4, alpha=1.0, side="B")
    batch = jax.tree.map(lambda leaf: leaf[None], start)
    assert start_values([problem], [4], [INITIALIZATIONS[scheme].offset], batch)["dead_directions"] == [dead]
    both_zero = ~np.any(a, axis=1) & ~np.any(b, axis=0)
    assert np.sum(both_zero) == dead


@pytest.mark.long
def test_directions_beyond_the_gradients_rank_never_move(swept):
    """The gradient has rank two: of LoRA-One's four directions two are zero in both factors, and stay so."""
    dead = swept["dead_directions"].sel(rank=4, seed=3)
    assert np.all(dead.sel(init=["lora-one", "lora-one-theory"]) == 2)
    assert np.all(dead.drop_sel(init=["lora-one", "lora-one-theory"]) == 0)
    assert not np.any(swept["dead_directions"].sel(rank=2))
    start = starts("lora-one", 4, 1.0)
    turn = frame(4, 4)  # whatever the coordinates of the rank
    turned = tuple(adapter._replace(a=turn @ adapter.a, b=adapter.b @ turn.T) for adapter in start)
    ((a, b),) = solve_shifted("lora-one", turned).adapters
    assert np.linalg.norm(a - turned[0].a) > 0.1
    np.testing.assert_allclose(turn[:, 2:].T @ a, 0.0, atol=1e-14)
    np.testing.assert_allclose(b @ turn[:, 2:], 0.0, atol=1e-14)
