import dataclasses
import warnings

import diffrax
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from solves import SQUARE, START, random, swept

from lora_flow import (
    Adapter,
    Factorization,
    InputError,
    PrecisionWarning,
    SingleLayer,
    aligned_problem,
    descend,
    gaussian_init,
    oracles,
    pad,
    solve,
    spectral_init,
    zero_adapters,
)
from lora_flow.dynamics.flows import Plain
from lora_flow.dynamics.looks import KEPT_STATE, conserved_by
from lora_flow.runtime import compiling

TIGHT = 1e-10
WIDTH = 100  # of the problem of Figure 1: at its shapes, with rank 4 and 101 times, most tests share one program


def one_layer(y):
    """1/2 ||Y - B A||^2 as a Factorization: W2 = [I 0], and a second adapter that stays at zero."""
    m, n = y.shape
    return Factorization(w1=np.zeros((WIDTH, n)), w2=np.eye(m, WIDTH), shift=y)


def first_layer_only(problem, a, b):
    rank, (n_out, n_in) = a.shape[0], problem.layers[1]
    return Adapter(a, b), Adapter(np.zeros((rank, n_in)), np.zeros((n_out, rank)))


class TestClosedForms:
    """The flow at rtol 1e-10, to 1e-7."""

    @pytest.mark.parametrize(
        ("m", "n", "rank"),
        [
            (10, 10, 4),
            *(pytest.param(*one, marks=pytest.mark.long) for one in ((5, 5, 5), (4, 7, 3), (7, 4, 2), (6, 6, 1))),
        ],
    )
    def test_one_layer_from_orthonormal_rows_is_a_matrix_riccati_equation(self, m, n, rank):
        alpha = 0.3
        y = random(1, m, n)
        rows = alpha * np.linalg.qr(random(2, n, rank))[0].T
        problem = one_layer(y)
        start = first_layer_only(problem, rows, np.zeros((WIDTH, rank)))
        trajectory = solve(problem, start, t1=6.0, rtol=TIGHT)
        expected = oracles.single_layer(y, rows, trajectory.times)
        losses = 0.5 * np.sum((y[None] - np.asarray(expected.product)) ** 2, axis=(1, 2))
        np.testing.assert_allclose(trajectory.observables["loss"], losses, rtol=0, atol=1e-7)
        a, b = map(np.asarray, trajectory.adapters[0])
        assert not b[m:].any()
        b = b[:m]
        for got, products in zip((b @ a, a.T @ a, b @ b.T), expected, strict=True):
            np.testing.assert_allclose(got, products[-1], rtol=0, atol=1e-7)

    @pytest.mark.long
    def test_rank_one_from_any_gaussian_row_is_a_matrix_riccati_equation(self):
        y, row = random(3, 6, 4), 0.1 * random(4, 1, 4)
        problem = one_layer(y)
        trajectory = solve(problem, first_layer_only(problem, row, np.zeros((WIDTH, 1))), t1=5.0, rtol=TIGHT)
        a, b = trajectory.adapters[0]
        np.testing.assert_allclose(b[:6] @ a, oracles.single_layer(y, row, 5.0).product, rtol=0, atol=1e-7)

    @pytest.mark.long
    def test_a_frozen_isometric_w2_rescales_time(self):
        """W2 = s O with O^T O = I: the flow of O^T shift, at time s^2 t."""
        s, t1 = 1.7, 3.0
        isometry = np.linalg.qr(random(5, 8, 4))[0]
        y = random(6, 4, 5)
        rows = 0.2 * np.linalg.qr(random(7, 5, 3))[0].T
        problem = Factorization(w1=np.zeros((4, 5)), w2=s * isometry, shift=s * isometry @ y)
        trajectory = solve(problem, first_layer_only(problem, rows, np.zeros((4, 3))), t1=t1, rtol=TIGHT)
        a, b = trajectory.adapters[0]
        expected = oracles.first_layer(problem.shift, problem.w2, rows, t1).product
        np.testing.assert_allclose(b @ a, expected, rtol=0, atol=1e-7)

    def test_each_spectral_mode_follows_the_scalar_closed_form(self):
        """One layer behind a frozen W2: mode k is u' = (y - u v) v with y = sigma_k / s2 and time s2^2 t."""
        problem = aligned_problem(jax.random.key(3), component=[0, 2, 5], shift_scale=[5.0, 3.0, 2.0])
        start = spectral_init(jax.random.key(4), problem, rank=4, alpha=0.05)[0]
        trajectory = solve(problem, first_layer_only(problem, *start), t1=1.5, rtol=TIGHT)
        u, _, vt = np.linalg.svd(problem.shift)
        gains = np.linalg.norm(problem.w2.T @ u[:, :3], axis=0)
        sizes = np.linalg.norm(np.asarray(start.a) @ vt[:3].T, axis=0)
        learned = u[:, :3].T @ np.asarray(problem.update(trajectory.adapters)) @ vt[:3].T
        expected = []
        for sigma, s2, size in zip([5.0, 3.0, 2.0], gains, sizes, strict=True):
            b, a = oracles.scalar(sigma / s2, 0.0, size, s2**2 * 1.5)
            expected.append(s2 * b * a)
        np.testing.assert_allclose(learned, np.diag(expected), atol=1e-7)
        assert expected[1] < 0.98 * 3.0 or expected[2] < 0.98 * 2.0, "all modes done: the test sees nothing"


@dataclasses.dataclass
class Unhashable:
    layers: tuple = ((100, 10), (10, 100))

    def loss(self, adapters):
        return 0.0


class OnlyALoss:
    """A problem of one adapter that offers only a loss: its field, task and residual come by differentiation."""

    def __init__(self, y):
        self.y = y
        self.layers = (y.shape,)

    def loss(self, adapters):
        ((a, b),) = adapters
        return 0.5 * jnp.sum((self.y - b @ a) ** 2)


def test_a_problem_with_nothing_but_a_loss_is_solved_to_the_closed_form():
    y, row = random(8, 5, 6), 0.1 * random(9, 1, 6)
    trajectory = solve(OnlyALoss(y), (Adapter(row, np.zeros((5, 1))),), t1=4.0, rtol=TIGHT)
    a, b = trajectory.adapters[0]
    np.testing.assert_allclose(b @ a, oracles.single_layer(y, row, 4.0).product, rtol=0, atol=1e-7)
    sizes = {"norm_z1", "norm_b1a1", "norm_along1", "norm_across1", "overlap_1"}
    assert set(trajectory.observables) == {"loss", "alignment_error", "drift"} | sizes
    assert 0 < np.max(trajectory.observables["drift"]) < 1e-8
    assert "drift of the conserved quantities" in str(trajectory)


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize(("rtol", "bound"), [(5e-4, 1e-2), (1e-10, 1e-8)])
def test_the_conserved_quantities_drift_less_than_promised(figure1_problem, side, rtol, bound):
    for alpha in (1e-1, 1e-5):
        start = gaussian_init(jax.random.key(0), figure1_problem, rank=4, alpha=alpha, side=side)
        drift = solve(figure1_problem, start, t1=5.0, rtol=rtol).observables["drift"]
        assert 0 < np.max(drift) < bound


class OfFactors(OnlyALoss):
    """The same loss, and a part that depends on the factors beside their product."""

    def __init__(self, y, part):
        super().__init__(y)
        self.part = part

    def loss(self, adapters):
        return super().loss(adapters) + 0.1 * self.part(*adapters[0])


def decay(a, b):
    return jnp.sum(b**2)


class TestALossByWhichTheImbalanceChanges:
    """Its drift had been told as an error of the integration, of .5 here."""

    @pytest.mark.parametrize(
        ("part", "conserves"),
        [
            (lambda a, b: jnp.sum((b @ a) ** 2), 1.0),
            (decay, np.nan),
            (lambda a, b: jnp.sum(a**4) + jnp.sum(b**2), np.nan),
            (lambda a, b: jnp.sum(jnp.tril(a @ a.T, -1) ** 2), np.nan),
        ],
        ids=["of the product", "decay", "of both", "between directions"],
    )
    def test_conserves_nothing(self, part, conserves):
        problem = OfFactors(random(8, 5, 6), part)
        np.testing.assert_array_equal(jax.jit(lambda: conserved_by(problem, Plain()))(), conserves)

    def test_has_no_drift(self):
        problem, start = OfFactors(random(8, 5, 6), decay), (Adapter(random(9, 2, 6), np.zeros((5, 2))),)
        changed = solve(problem, start, t1=1.0, saves=5, solver="Tsit5")
        assert np.isnan(changed.observables["drift"]).all()
        assert "drift" not in str(changed)
        assert np.isfinite(changed.observables["loss"]).all()
        assert np.isnan(descend(problem, start, steps=3, step=1e-2).observables["drift"]).all()


class TestTheStart:
    """What is measured from the start is measured from t = 0, whichever times are saved."""

    problem, start = SQUARE, START
    times = np.linspace(0.0, 2.0, 21), np.linspace(1.0, 2.0, 21)

    def test_of_a_flow(self):
        whole, late = (solve(self.problem, self.start, t1=2.0, saves=times, solver="Tsit5") for times in self.times)
        begin, end, size = self.start[0].imbalance, late.adapters[0].imbalance, late.adapters[0].stacked
        assert np.linalg.norm(end - begin) > 1e-10 * np.linalg.norm(begin), "no drift to tell of"
        for trajectory in (whole, late):
            drift = np.linalg.norm(end - begin) / np.linalg.norm(size, 2) ** 2
            np.testing.assert_allclose(trajectory.observables["drift"][-1], drift, rtol=1e-6)
            assert trajectory.initial_loss == pytest.approx(float(self.problem.loss(self.start)), rel=1e-14)
            assert f"loss {float(self.problem.loss(self.start)):.4g} -> " in str(trajectory)
        np.testing.assert_allclose(late.observables["drift"][0], whole.observables["drift"][10], rtol=1e-6)
        assert whole.observables["drift"][0] == 0

    def test_of_a_sweep(self):
        whole, late = (swept(self.problem, t1=2.0, saves=times) for times in self.times)
        start = gaussian_init(jax.random.key(0), self.problem, rank=2, alpha=0.1)
        alone = solve(self.problem, start, t1=2.0, saves=self.times[0], solver="Tsit5")
        for dataset in (whole, late):
            np.testing.assert_allclose(dataset["initial_loss"], whole["loss"][0], rtol=1e-14)
            np.testing.assert_allclose(dataset["drift"][-1], alone.observables["drift"][-1], rtol=1e-3)
        np.testing.assert_allclose(late["drift"][0], whole["drift"][10], rtol=1e-6)

    def test_of_gradient_descent(self):
        whole, late = (descend(self.problem, self.start, steps=9, step=0.01, saves=saves) for saves in ([0, 9], [5, 9]))
        np.testing.assert_allclose(late.observables["drift"][-1], whole.observables["drift"][-1], rtol=1e-6)
        assert whole.observables["drift"][-1] > 1e-6
        for descent in (whole, late):
            assert descent.initial_loss == pytest.approx(float(self.problem.loss(self.start)), rel=1e-14)
            assert f"loss {float(self.problem.loss(self.start)):.4g} -> " in str(descent)

    def test_of_a_state_so_large_that_it_is_looked_at_along_the_way(self):
        large = pad(self.start, 200)
        assert sum(leaf.size for leaf in jax.tree.leaves(large)) > KEPT_STATE
        along, kept = (
            solve(self.problem, large, t1=2.0, saves=self.times[1], solver="Tsit5", save_adapters=keep)
            for keep in (False, True)
        )
        assert along.initial_loss == pytest.approx(float(self.problem.loss(self.start)), rel=1e-13)
        assert set(along.observables) == set(kept.observables)
        for name, values in kept.observables.items():
            np.testing.assert_allclose(along.observables[name], values, rtol=1e-9, atol=1e-15, err_msg=name)


def test_the_flow_commutes_with_rotations_of_its_coordinates(figure1_problem):
    """Orthogonal changes of basis in every space, the rank's included, change neither loss nor the steps taken."""
    q = [np.linalg.qr(random(seed, size, size))[0] for seed, size in enumerate((10, 10, WIDTH, 4))]
    w1, w2, shift = map(np.asarray, (figure1_problem.w1, figure1_problem.w2, figure1_problem.shift))
    start = gaussian_init(jax.random.key(0), figure1_problem, rank=4, alpha=1e-2)
    turned = Factorization(w1=q[2] @ w1 @ q[1].T, w2=q[0] @ w2 @ q[2].T, shift=q[0] @ shift @ q[1].T)
    (a1, b1), (a2, b2) = jax.tree.map(np.asarray, start)
    turned_start = (
        Adapter(q[3] @ a1 @ q[1].T, q[2] @ b1 @ q[3].T),
        Adapter(q[3] @ a2 @ q[2].T, q[0] @ b2 @ q[3].T),
    )
    ours, theirs = solve(figure1_problem, start, t1=3.0), solve(turned, turned_start, t1=3.0)
    steps = int(ours.stats["num_steps"]), int(theirs.stats["num_steps"])
    assert steps[0] == pytest.approx(steps[1], rel=0.01)  # rounding may decide on a step
    for name in ("loss", "alignment_error", "norm_z1", "norm_z2"):
        np.testing.assert_allclose(ours.observables[name], theirs.observables[name], rtol=1e-6, atol=1e-20)


@pytest.mark.parametrize(
    ("solver", "worst"),
    [
        (diffrax.Tsit5(), 0.01),
        (diffrax.Dopri5(), 0.01),
        (diffrax.Dopri8(), 0.01),
        (diffrax.Bosh3(), 0.05),
        (diffrax.Heun(), 0.05),
        pytest.param(diffrax.Kvaerno5(), 0.05, marks=pytest.mark.long),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, float) else "",
)
def test_any_diffrax_solver_gives_the_same_trajectory(solver, worst):
    """On one layer, to losses of 1e-12 of the first."""
    rows, (left, right) = 1e-2 * np.linalg.qr(random(11, 6, 2))[0].T, (random(seed, 6)[:, None] for seed in (12, 13))
    shift = 5 * left @ right.T / np.linalg.norm(left) / np.linalg.norm(right)
    trajectory = solve(SingleLayer(shift), (Adapter(rows, np.zeros((6, 2))),), t1=4.0, saves=21, solver=solver)
    assert trajectory.status == 0
    residual = shift - np.asarray(oracles.single_layer(shift, rows, trajectory.times).product)
    exact = 0.5 * np.sum(residual**2, axis=(1, 2))
    assert exact[-1] < 1e-12 * exact[0]
    assert np.max(np.abs(np.log10(trajectory.observables["loss"] / exact))) < worst


def test_gradient_descent_is_the_euler_solver():
    y, (a, b) = random(8, 5, 6), (0.1 * random(9, 2, 6), np.zeros((5, 2)))
    eta, steps = 1e-3, 200
    trajectory = solve(
        SingleLayer(y),
        (Adapter(a, b),),
        t1=eta * steps,
        saves=5,
        solver=diffrax.Euler(),
        stepsize_controller=diffrax.ConstantStepSize(),
        dt0=eta,
    )
    for _ in range(steps):
        a, b = a + eta * b.T @ (y - b @ a), b + eta * (y - b @ a) @ a.T
    np.testing.assert_allclose(trajectory.observables["loss"][-1], 0.5 * np.sum((y - b @ a) ** 2), rtol=1e-10)
    assert trajectory.stats["num_steps"] == steps


@pytest.mark.long
def test_vmap_over_lanes_is_a_loop_over_solves(figure1_problem):
    keys = jax.random.split(jax.random.key(6), 3)
    alphas = jnp.array([1e-1, 1e-2, 1e-3])
    together = jax.vmap(
        lambda k, a: solve(figure1_problem, gaussian_init(k, figure1_problem, rank=2, alpha=a), t1=1.0)
    )(keys, alphas)
    assert "3 lanes" in str(together)
    for i in range(3):
        alone = solve(figure1_problem, gaussian_init(keys[i], figure1_problem, rank=2, alpha=float(alphas[i])), t1=1.0)
        assert together.stats["num_steps"][i] == alone.stats["num_steps"]
        np.testing.assert_allclose(together.observables["loss"][i], alone.observables["loss"], rtol=1e-9)


def test_a_run_that_is_given_up_is_a_status_and_keeps_what_it_reached():
    y, row = random(8, 5, 6), 1e-3 * random(9, 1, 6)
    trajectory = solve(SingleLayer(y), (Adapter(row, np.zeros((5, 1))),), t1=5.0, max_steps=20)
    assert trajectory.status == 1
    assert trajectory.stats["num_steps"] == 20
    loss = trajectory.observables["loss"]
    assert loss[0] == pytest.approx(0.5 * np.sum(y**2), rel=1e-14)
    assert np.isnan(loss[-1])
    assert "max_steps after 20 steps" in str(trajectory)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(trajectory.adapters))


def test_a_step_so_long_that_it_overflows_is_shortened():
    """From this start the loss falls while the step is still that of the slow growth, and its stages overflow."""
    problem = aligned_problem(jax.random.key(0), component="bottom")
    start = spectral_init(jax.random.key(5), problem, rank=4, alpha=1e-4)
    trajectory = solve(problem, start, t1=12.0)
    assert trajectory.status == 0
    assert trajectory.stats["num_steps"] <= 1000
    assert trajectory.stats["num_rejected_steps"] >= 1
    assert trajectory.observables["loss"][-1] < 1e-24


@pytest.mark.long
def test_values_may_be_traced(figure1_problem):
    """Under jit the end, the tolerance, and adapters drawn inside or closed over."""
    start = gaussian_init(jax.random.key(0), figure1_problem, rank=1, alpha=1e-2)

    @jax.jit
    def final(t1, rtol, alpha):
        drawn = gaussian_init(jax.random.key(0), figure1_problem, rank=1, alpha=alpha)
        return [solve(figure1_problem, y, t1=t1, rtol=rtol, saves=3).observables["loss"][-1] for y in (start, drawn)]

    expected = solve(figure1_problem, start, t1=0.7, rtol=1e-5, saves=3).observables["loss"][-1]
    np.testing.assert_allclose(final(0.7, 1e-5, 1e-2), expected, rtol=1e-9)


def test_what_a_person_reads(figure1_problem):
    start = gaussian_init(jax.random.key(0), figure1_problem, rank=4, alpha=1e-3)
    text = str(solve(figure1_problem, start, t1=5.0))
    for part in ("t = 5", "success after", "rank 4", "loss 12.5 ->", "drift"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rtol": 0.0}, "rtol must lie between 0 and 1, got 0.0"),
        ({"dt0": -1.0}, "dt0 must be positive, got -1.0"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"solver": diffrax.Euler()}, "solver must estimate its error, or come with stepsize_controller=.*got Euler"),
        ({"problem": Unhashable()}, "problem must be a PyTree, .* got an unhashable Unhashable"),
        (
            {"adapters": ((np.ones((0, 10)), np.ones((100, 0))),) * 2},
            "adapters.0. must have a rank of at least 1, got 0",
        ),
        ({"adapters": ()}, "adapters must be a tuple and hold one Adapter for each of 2 layers, got"),
        ({"adapters": None}, "adapters must be a tuple and hold one Adapter for each of 2 layers, got None"),
        ({"adapters": {"a": 1}}, "adapters must be a tuple and hold one Adapter for each of 2 layers, got a dict"),
        ({"adapters": (one for one in ())}, "adapters must be a tuple and .* of 2 layers, got a generator"),
        (
            {"adapters": Adapter(jnp.ones((2, 10)), jnp.ones((100, 2)))},
            "adapters must be a tuple and .* of 2 layers, got an Adapter by itself, not in a tuple",
        ),
        (
            {"adapters": (np.ones((2, 10)), np.ones((100, 2)))},
            r"adapters\[0\] must be an Adapter\(a, b\), got shape \(2, 10\) of float64",
        ),
        ({"t1": "5"}, "t1 must be positive and finite, got '5'"),
        ({"t1": np.ones(1)}, r"t1 must be positive and finite, got shape \(1,\) of float64"),
        ({"max_steps": 1e3}, "max_steps must be an integer, got 1000.0"),
        (
            {
                "adapters": (
                    Adapter(jnp.ones((2, 9)), jnp.ones((100, 2))),
                    Adapter(jnp.ones((2, 100)), jnp.ones((10, 2))),
                )
            },
            r"adapters\[0\].a must have shape \(2, 10\), got \(2, 9\)",
        ),
        (
            {
                "adapters": (
                    Adapter(jnp.ones((2, 10)), jnp.ones((100, 2))),
                    Adapter(jnp.full((2, 100), jnp.nan), jnp.ones((10, 2))),
                )
            },
            r"adapters\[1\].a must be finite",
        ),
    ],
)
def test_bad_arguments_are_named(figure1_problem, arguments, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users have it
    good = {"problem": figure1_problem, "adapters": zero_adapters(figure1_problem.layers, 1), "t1": 1.0}
    with pytest.raises(InputError, match=message):
        solve(**(good | arguments))


def test_single_precision_warns_only_where_it_cannot_carry_the_tolerance():
    with jax.enable_x64(False):
        problem = aligned_problem(jax.random.key(0))
        start = gaussian_init(jax.random.key(0), problem, rank=4, alpha=1e-3, side="B")
        assert problem.w1.dtype == jnp.float32
        with pytest.warns(PrecisionWarning, match="rtol must be at least 1e-05 for float32 to carry it, got 1e-06"):
            solve(problem, start, t1=0.1, rtol=1e-6)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trajectory = solve(problem, start, t1=5.0)
    assert trajectory.status == 0
    assert trajectory.stats["num_steps"] < 200
    assert trajectory.observables["loss"][-1] < 1e-12 * 12.5


def test_new_values_do_not_recompile(figure1_problem):
    start = gaussian_init(jax.random.key(0), figure1_problem, rank=4, alpha=1e-3)
    other = aligned_problem(jax.random.key(9))
    solve(figure1_problem, start, t1=1.0, rtol=1e-3)
    before = set(compiling._programs)
    solve(other, jax.tree.map(lambda leaf: 2 * leaf, start), t1=2.0, rtol=1e-4)
    assert set(compiling._programs) == before
