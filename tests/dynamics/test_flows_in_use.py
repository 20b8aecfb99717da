"""Flows by name, in `solve` and `sweep`, and held to Dopri8 at tight tolerances."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import (
    PROBLEM,
    RANK,
    SAVES,
    SHRINKING,
    START,
    T1,
    TIMES,
    M,
    N,
    adapter,
    along,
    conditioned,
    driven,
    every,
    random,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from lora_flow import (
    FLOWS,
    Adapter,
    Chain,
    InputError,
    LoRAPlus,
    LoRAPro,
    Plain,
    RungeKuttaChebyshev,
    ScaledGD,
    ShrinkA,
    SingleLayer,
    StableLoRA,
    aligned_problem,
    canonical,
    gaussian_init,
    lora_one_init,
    pad,
    solve,
    sweep,
    zero_adapters,
)
from lora_flow.dynamics.flows import parse_flow
from lora_flow.dynamics.steps import velocity
from lora_flow.solvers.automatic import Automatic


class TestNames:
    positive = st.floats(1e-300, 1e300)

    @settings(max_examples=100, deadline=None)
    @given(kind=st.sampled_from([LoRAPlus, ScaledGD, LoRAPro, ShrinkA, StableLoRA]), number=positive)
    def test_round_trip(self, kind, number):
        flow = kind(number)
        assert eqx.tree_equal(parse_flow(str(flow)), flow)

    def test_numbers_that_are_traced_are_told_as_such(self):
        """A chain names its parts where it is made and checked, so that it can be differentiated by their numbers."""

        def rate(number):
            chain = Chain(StableLoRA(number), LoRAPlus(2.0))
            chain.check_optimiser()
            assert str(chain) == "stable-lora:traced, lora-plus:2"
            return chain.flows[0].rate

        assert jax.grad(rate)(0.5) == 1

    def test_without_a_number(self):
        assert parse_flow("plain") == Plain()
        assert eqx.tree_equal(parse_flow("scaled"), ScaledGD(0.0))
        assert [str(parse_flow(text)) for text in ("lora-plus:16", "scaled:1e-3", "plain")] == [
            "lora-plus:16",
            "scaled:0.001",
            "plain",
        ]
        assert set(FLOWS) == {
            "plain",
            "lora-plus",
            "scaled",
            "lora-pro",
            "shrink-a",
            "stable-lora",
            "muon",
            "lora-muon",
            "balora",
        }

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: parse_flow("sacled"), "flow must be 'plain', 'lora-plus', .*, got 'sacled'"),
            (lambda: parse_flow(""), "flow must be 'plain', .*, got ''"),
            (lambda: parse_flow("plain:2"), "flow must come without a number for 'plain', got 'plain:2'"),
            (
                lambda: parse_flow("lora-plus"),
                "flow must come with a number after a colon for 'lora-plus', got 'lora-p",
            ),
            (lambda: parse_flow("scaled:"), "flow must have a number after the colon, got 'scaled:'"),
            (lambda: parse_flow("scaled:a"), "flow must have a number after the colon, got 'scaled:a'"),
            (lambda: parse_flow("scaled:-1"), "damping must be at least 0, got -1.0"),
            (lambda: parse_flow("lora-plus:nan"), "ratio must be positive, got nan"),
            (lambda: LoRAPlus(0.0), "ratio must be positive, got 0.0"),
            (lambda: LoRAPro(np.inf), "damping must be at least 0, got inf"),
            (lambda: ShrinkA(-0.1), "rate must be at least 0, got -0.1"),
            (lambda: ScaledGD(jnp.ones(2)), "damping must be at least 0, got shape"),
        ],
    )
    def test_bad_ones_get_one_line(self, make, message):
        with pytest.raises(InputError, match=f"^{message}") as caught:
            make()
        assert "\n" not in str(caught.value)


class TestInSolveAndSweep:
    problem = aligned_problem(jax.random.key(1), m=4, n=3, h=9, delta_w=0.5, component=[0, 1], shift_scale=[3.0, 2.0])

    @pytest.mark.parametrize("name", ["scaled", "lora-pro"])
    def test_an_undamped_start_from_zero_is_refused(self, name):
        half = gaussian_init(jax.random.key(0), self.problem, rank=2, alpha=0.1)
        must = "damping must be positive where a factor's rank is below 2, the number of directions, got 0 with B_1 of"
        with pytest.raises(InputError, match=f"{must} rank 0"):
            solve(self.problem, half, t1=1.0, flow=name)
        with pytest.raises(InputError, match=rf"{must} rank 0 \(init gaussian, rank 2\)"):
            sweep(self.problem, init=("lora-one", "gaussian"), rank=2, t1=1.0, flow=name, progress=False)
        full = lora_one_init(jax.random.key(0), self.problem, rank=2, alpha=0.1)
        parse_flow(name).check_start(pad(full, 4))  # directions of padding are none
        parse_flow(f"{name}:1e-3").check_start(half)

    @pytest.mark.parametrize("solver", ["RKC", RungeKuttaChebyshev(), Automatic(RungeKuttaChebyshev())])
    def test_stabilised_methods_are_refused(self, solver):
        start = gaussian_init(jax.random.key(0), self.problem, rank=2, alpha=0.1)
        with pytest.raises(InputError, match="solver must be of another kind than RKC for LoRAPlus"):
            solve(self.problem, start, t1=1.0, flow="lora-plus:2", solver=solver)

    @every
    def test_padding_changes_no_velocity(self, flow):
        descent = Adapter(START.b.T @ PROBLEM.shift, PROBLEM.shift @ START.a.T)
        (wide,) = pad((driven(flow, descent, START),), RANK + 2)
        for ours, theirs in zip(driven(flow, *pad((descent, START), RANK + 2)), wide, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12)

    @pytest.mark.parametrize("flow", [ScaledGD(0.1), SHRINKING], ids=str)
    def test_canonical_coordinates_change_no_velocity(self, flow):
        """Sweeps solve factorisations there, where the parts of the factors outside the weights are turned as well."""
        turned = canonical(self.problem, rank=2)
        assert turned.problem.w1.shape[0] < self.problem.w1.shape[0]
        start = tuple(
            Adapter(*(jnp.asarray(random(i, *leaf.shape)) for leaf in pair))
            for i, pair in enumerate(zero_adapters(self.problem.layers, 2), 60)
        )
        inside, bases = turned.enter(start)
        back = turned.leave(jax.jit(velocity(turned.problem, flow))(inside), bases)
        expected = jax.jit(velocity(self.problem, flow))(start)
        for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize(("flow", "init"), [("scaled", "lora-one"), ("scaled:0.1", "gaussian")])
    def test_a_sweep_is_solve(self, flow, init):
        """Rank RANK padded by one in the sweep; both have errors of about 1e-8."""
        swept = sweep(
            PROBLEM,
            init=init,
            alpha=0.5,
            rank=(RANK, RANK + 1),
            t1=T1,
            saves=TIMES,
            flow=flow,
            rtol=1e-8,
            progress=False,
        )
        draw = {"gaussian": gaussian_init, "lora-one": lora_one_init}[init]
        (start,) = draw(jax.random.key(0), PROBLEM, rank=RANK, alpha=0.5)
        alone = along(parse_flow(flow), PROBLEM, start, saves=TIMES, rtol=1e-8)
        lane = swept.sel(init=init, alpha=0.5, rank=RANK, seed=0)
        assert lane["status"] == alone.status == 0
        np.testing.assert_allclose(lane["loss"], alone.observables["loss"], rtol=1e-6)
        assert np.isnan(lane["drift"]).all()

    @pytest.mark.long
    def test_under_jit_vmap_and_grad(self):
        """One program gives the loss and its gradient at a point and around it: reverse mode against differences."""

        def log_loss(point):
            problem = SingleLayer(PROBLEM.shift + point[0] * jnp.asarray(random(40, M, N)))
            start = jax.tree.map(lambda leaf: point[1] * leaf, START)
            euler = {"solver": diffrax.Euler(), "stepsize_controller": diffrax.ConstantStepSize(), "dt0": 0.05}
            solved = solve(problem, (start,), t1=0.3, saves=2, flow=ScaledGD(damping=point[2]), **euler)
            return jnp.log(solved.observables["loss"][-1])

        at, step = jnp.array([[0.1, 1.2, 0.3]]), 1e-4
        points = at + step * jnp.concatenate([jnp.zeros((1, 3)), jnp.eye(3), -jnp.eye(3)])
        values, gradients = jax.jit(jax.vmap(jax.value_and_grad(log_loss)))(points)
        np.testing.assert_allclose(gradients[0], (values[1:4] - values[4:]) / (2 * step), rtol=1e-5)


class TestAccuracy:
    """The loss at the default tolerance beside diffrax's Dopri8 at rtol 1e-12, atol 1e-16."""

    @staticmethod
    def worst(problem, start, flow, times, ours):
        """In decades, above 1e-20."""
        loss = _reference(problem, start, flow, times)
        return jnp.max(jnp.where(loss > 1e-20, jnp.abs(jnp.log10(ours / loss)), 0.0)), loss

    @pytest.mark.parametrize("flow", [ScaledGD(), LoRAPlus(4.0)], ids=str)
    @pytest.mark.parametrize(("condition", "scales", "t1"), [(1, (0.1, 0.1), 20.0), (1000, (1e-2, 1e-4), 20.0)])
    def test_on_one_layer(self, flow, condition, scales, t1):
        u, sigma, vt = conditioned(condition)
        problem, start = SingleLayer(u * sigma @ vt), adapter(5, *scales)
        times = jnp.linspace(0, t1, SAVES)
        solved = along(flow, problem, start, t1=t1, saves=times, rtol=5e-4)
        worst, loss = self.worst(problem, (start,), flow, times, solved.observables["loss"])
        assert worst < 0.005
        assert loss[-1] < (1e-17 if condition == 1 or isinstance(flow, ScaledGD) else 1e-3)

    @pytest.mark.long
    @pytest.mark.parametrize("flow", [ScaledGD(), LoRAPlus(4.0)], ids=str)
    def test_on_two_layers(self, flow):
        problem = TestInSolveAndSweep.problem
        start = tuple(
            Adapter(*(1e-2 * jnp.asarray(random(i, *leaf.shape)) for i, leaf in enumerate(pair, 50)))
            for pair in zero_adapters(problem.layers, 3)
        )
        times = jnp.linspace(0, 6.0, SAVES)
        solved = solve(problem, start, t1=6.0, saves=times, flow=flow)
        worst, loss = self.worst(problem, start, flow, times, solved.observables["loss"])
        assert worst < 0.005
        assert loss[-1] < 1e-3


@eqx.filter_jit
def _reference(problem, start, flow, times):
    field, (state, unflatten) = velocity(problem, flow), ravel_pytree(start)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: ravel_pytree(field(unflatten(y)))[0]),
        diffrax.Dopri8(),
        t0=0.0,
        t1=times[-1],
        dt0=None,
        y0=state,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=1e-12, atol=1e-16),
        adjoint=diffrax.ForwardMode(),
        max_steps=100_000,
    )
    return jax.vmap(lambda y: problem.loss(unflatten(y)))(solution.ys)
