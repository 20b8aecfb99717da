"""Stable-LoRA's flow, whose shrinking stops for good in each layer by itself, and the optimiser with the same latch."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.integrate import solve_ivp

from lora_flow import (
    Adapter,
    Chain,
    Factorization,
    InputError,
    LoRAPlus,
    ShrinkA,
    SingleLayer,
    StableLoRA,
    StartWarning,
    analyse,
    descend,
    gaussian_init,
    solve,
    stable_lora,
    sweep,
)
from lora_flow.cli import main
from lora_flow.dynamics.flows import parse_flow
from lora_flow.dynamics.integrator import RTOL
from lora_flow.dynamics.lanes import solve_lanes, stack
from lora_flow.theory import stable_lora as theory

T1, RATE = 3.0, 5.0
TIMES = np.linspace(0.0, T1, 31)
OFF = r"flow 'stable-lora:5' never shrinks A of layer 1: \|\|A\|\|/n = 0 is less than \|\|B\|\|/m = "


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def one_layer(m, n, seed=0):
    """Singular values 1, .8, .5."""
    left, right = (np.linalg.qr(random(seed + i, size, 3))[0] for i, size in enumerate((m, n)))
    return left * [1.0, 0.8, 0.5] @ right.T


def start(m, n, rank, size=0.3, seed=5):
    return (Adapter(jnp.asarray(size * random(seed, rank, n)), jnp.zeros((m, rank))),)


TWO = Factorization(random(1, 7, 4) / 2, random(2, 5, 7) / 2, 0.5 * random(3, 5, 4))
START_OF_TWO = tuple(
    Adapter(jnp.asarray(size * random(seed, 3, n)), jnp.zeros((m, 3)))
    for (m, n), size, seed in zip(TWO.layers, (0.5, 1.0), (8, 9), strict=True)
)


def by_scipy(layers, descent, adapters, rate, times=TIMES):
    """The loss-free reference: DOP853 with an event for the layers still on, begun anew after each. (until, states)."""
    shapes = [leaf.shape for pair in adapters for leaf in pair]
    cuts = np.cumsum([np.prod(shape) for shape in shapes])[:-1]

    def factors(y):
        flat = [part.reshape(shape) for part, shape in zip(np.split(y, cuts), shapes, strict=True)]
        return list(zip(flat[::2], flat[1::2], strict=True))

    def excess(i, y):
        (a, b), (m, n) = factors(y)[i], layers[i]
        return np.linalg.norm(a) / n - np.linalg.norm(b) / m

    y = np.concatenate([np.ravel(leaf) for pair in adapters for leaf in pair])
    until, begin, states = np.full(len(layers), np.inf), 0.0, np.empty((len(times), len(y)))
    while begin < times[-1]:
        on = [i for i in range(len(layers)) if until[i] == np.inf]

        def field(t, y, on=on):
            change = descent(factors(y))
            return np.concatenate(
                [
                    np.concatenate([np.ravel(da - rate * a * (i in on)), np.ravel(db)])
                    for i, ((a, _), (da, db)) in enumerate(zip(factors(y), change, strict=True))
                ]
            )

        events = [lambda t, y, i=i: excess(i, y) for i in on]
        for event in events:
            event.terminal, event.direction = True, -1
        found = solve_ivp(
            field, (begin, times[-1]), y, "DOP853", events=events or None, rtol=1e-11, atol=1e-14, dense_output=True
        )
        here = (times >= begin) & (times <= found.t[-1])
        if here.any():
            states[here] = found.sol(times[here]).T
        for i, hits in zip(on, found.t_events or [], strict=True):
            if hits.size:
                until[i] = hits[0]
        begin, y = found.t[-1], found.y[:, -1]
    return until, [factors(state) for state in states]


def of_one(shift):
    def descent(factors):
        ((a, b),) = factors
        rest = shift - b @ a
        return [(b.T @ rest, rest @ a.T)]

    return descent


def of_two(factors):
    w1, w2, shift = map(np.asarray, (TWO.w1, TWO.w2, TWO.shift))
    (a1, b1), (a2, b2) = factors
    whole1, whole2 = w1 + b1 @ a1, w2 + b2 @ a2
    rest = shift + w2 @ w1 - whole2 @ whole1
    g1, g2 = whole2.T @ rest, rest @ whole1.T
    return [(b1.T @ g1, g1 @ a1.T), (b2.T @ g2, g2 @ a2.T)]


def run(problem, begin, flow=None, t1=T1, rtol=RTOL):
    """One compiled program for each shape: all else are its arguments."""
    how = {"solver": "Tsit5", "save_adapters": True, "derivatives": "forward"}
    times = t1 * TIMES / T1
    return solve(
        problem, begin, t1=times[-1], saves=times, flow=StableLoRA(RATE) if flow is None else flow, rtol=rtol, **how
    )


class TestLatch:
    @pytest.mark.parametrize(("m", "n", "rank"), [(9, 9, 4), (8, 18, 3), (18, 8, 2)])
    def test_one_layer_is_scipys_with_events(self, m, n, rank):
        """Square, wide and tall, at a rank above that of the task, at it and below; at the defaults and tight."""
        shift, begin = one_layer(m, n), start(m, n, rank)
        until, states = by_scipy([(m, n)], of_one(shift), begin, RATE)
        assert 0 < until[0] < 1
        loss = [0.5 * np.sum((shift - b @ a) ** 2) for ((a, b),) in states]
        for rtol, of_time, decades in ((RTOL, 1e-3, 0.01), (1e-9, 1e-8, 1e-6)):
            solved = run(SingleLayer(shift), begin, rtol=rtol)
            assert solved.status == 0
            np.testing.assert_allclose(solved.observables["shrunk_until1"], np.minimum(TIMES, until[0]), rtol=of_time)
            assert np.max(np.abs(np.log10(solved.observables["loss"] / np.array(loss)))) < decades

    def test_each_of_two_layers_has_its_own(self):
        """With SciPy's events, one after the other."""
        until, states = by_scipy(TWO.layers, of_two, START_OF_TWO, RATE)
        solved = run(TWO, START_OF_TWO, rtol=1e-8)
        for i in (0, 1):
            told = solved.observables[f"shrunk_until{i + 1}"]
            np.testing.assert_allclose(told, np.minimum(TIMES, until[i]), rtol=1e-6)
        assert abs(until[0] - until[1]) > 0.02
        assert np.all(until < T1)
        for ours, theirs in zip(solved.history, zip(*states, strict=True), strict=True):
            for factor, expected in zip(ours, zip(*theirs, strict=True), strict=True):
                np.testing.assert_allclose(factor, np.array(expected), atol=1e-6)

    @pytest.mark.long
    def test_a_sweep_is_solve(self):
        """In other coordinates, where the layers are smaller; with details, which know what was on."""
        solved = run(TWO, START_OF_TWO, rtol=1e-8)

        def given(key, problem, rank, alpha):
            return START_OF_TWO

        how = {"t1": T1, "saves": TIMES, "flow": f"stable-lora:{RATE}", "rtol": 1e-8, "details": True}
        swept = sweep(TWO, init=given, alpha=1.0, rank=3, progress=False, **how).squeeze()
        for name in ("loss", "shrunk_until1", "shrunk_until2"):
            np.testing.assert_allclose(swept[name], solved.observables[name], rtol=1e-5, err_msg=name)
        assert swept["shrunk_until2"].attrs["long_name"] == "time up to which A_2 was shrunk"
        off = np.asarray(solved.observables["shrunk_until1"]) < TIMES
        for flow, when in (("plain", off), (ShrinkA(RATE), ~off)):
            growth = analyse(TWO, solved.history, flow)["growth_rate_1"]
            np.testing.assert_allclose(swept["growth_rate_1"].values[when], growth[when], rtol=1e-3, atol=1e-6)

    def test_what_is_off_stays_off(self):
        """m > n: the rule is unmet again after the latch, ||A||/n rises above ||B||/m, and A is not shrunk any more."""
        solved = run(SingleLayer(one_layer(18, 8)), start(18, 8, 2), rtol=1e-9)
        a, b = map(np.asarray, solved.history[0])
        off = np.asarray(solved.observables["shrunk_until1"]) < TIMES
        excess = np.linalg.norm(a, axis=(1, 2)) / 8 - np.linalg.norm(b, axis=(1, 2)) / 18
        assert np.all(excess[off][1:] > 1e-4)
        imbalance = a @ a.mT - b.mT @ b
        np.testing.assert_allclose(imbalance[off], np.broadcast_to(imbalance[-1], imbalance[off].shape), atol=1e-8)

    def test_a_start_that_meets_the_rule_is_warned_of_and_never_shrunk(self):
        begin = (Adapter(jnp.zeros((4, 9)), jnp.asarray(0.3 * random(4, 9, 4))),)
        with pytest.warns(StartWarning, match=OFF):
            ours = run(SingleLayer(one_layer(9, 9)), begin)
        with pytest.warns(StartWarning, match="flow 'stable-lora:0' never shrinks"):
            plain = run(SingleLayer(one_layer(9, 9)), begin, StableLoRA(0.0))
        np.testing.assert_array_equal(ours.observables["loss"], plain.observables["loss"])
        assert np.all(ours.observables["shrunk_until1"] == 0)

    @pytest.mark.long
    def test_a_sweep_warns_of_one_side(self, tmp_path, capsys):
        how = {"side": ("A", "B"), "alpha": 0.3, "rank": 3, "t1": T1, "saves": 5, "flow": StableLoRA(RATE)}
        with pytest.warns(StartWarning, match=OFF):
            swept = sweep(SingleLayer(one_layer(9, 9)), progress=False, **how)
        until = swept["shrunk_until1"].isel(time=-1).squeeze()
        assert until.sel(side="B") == 0 < until.sel(side="A") < T1
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            words = ["--flow", "stable-lora:5", "--side", "B", "--saves", "3", "--m", "4", "--n", "4", "--h", "4"]
            assert main(["sweep", "--rank", "2", "--out", str(tmp_path / "run"), *words]) == 0
        assert "| 0.000 | 0.000 |" in (tmp_path / "run/report.md").read_text(), "until when each layer was shrunk"
        told = [line for line in capsys.readouterr().err.splitlines() if "never shrinks" in line]
        assert told[0].startswith("lora-flow: warning: flow 'stable-lora:5' never shrinks A of layer 1: ||A||/n = 0 is")

    def test_without_shrinking_it_is_the_plain_flow(self):
        """At rate 0 the rule is never met: A A^T - B^T B is conserved."""
        problem, begin = SingleLayer(one_layer(9, 9)), start(9, 9, 4)
        ours, theirs = run(problem, begin, StableLoRA(0.0)), run(problem, begin, "plain")
        np.testing.assert_allclose(ours.observables["loss"], theirs.observables["loss"], rtol=1e-9)
        np.testing.assert_allclose(ours.observables["shrunk_until1"], TIMES, rtol=1e-12)
        assert "A shrunk until t = 3" in str(ours)

    def test_scaling(self):
        """s B A from A_0 is B A from sqrt(s) A_0, with the rate over s and s times the time."""
        shift, s = one_layer(9, 9), 4.0
        scaled = SingleLayer(shift, scaling=s)
        ours = run(scaled, start(9, 9, 4), StableLoRA(40.0), t1=1.0, rtol=1e-8)
        theirs = run(SingleLayer(shift), start(9, 9, 4, 0.6), StableLoRA(40.0 / s), t1=s, rtol=1e-8)
        np.testing.assert_allclose(ours.observables["loss"], theirs.observables["loss"], rtol=1e-6)
        until = float(ours.observables["shrunk_until1"][-1])
        assert s * until == pytest.approx(float(theirs.observables["shrunk_until1"][-1]), rel=1e-6)
        predicted = theory.switch_off_time(s * shift, np.asarray(start(9, 9, 4)[0].a), 40.0)
        assert until == pytest.approx(float(predicted), rel=0.1)

    def test_after_lora_plus(self):
        """In a chain: until the latch w A A^T - B^T B drains, and is conserved from then on."""
        flow = Chain(LoRAPlus(2.0), StableLoRA(RATE))
        solved = run(SingleLayer(one_layer(9, 9)), start(9, 9, 4), flow, rtol=1e-9)
        a, b = map(np.asarray, solved.history[0])
        off = np.asarray(solved.observables["shrunk_until1"]) < TIMES
        assert 0 < off.sum() < len(TIMES)
        kept = 2 * a @ a.mT - b.mT @ b
        np.testing.assert_allclose(kept[off], np.broadcast_to(kept[-1], kept[off].shape), atol=1e-8)
        assert np.linalg.norm(kept[0]) > 10 * np.linalg.norm(kept[-1])

    @pytest.mark.long
    def test_of_a_lower_order(self):
        """Heun, between whose steps the state is a straight line."""
        shift, begin = one_layer(9, 9), start(9, 9, 4)
        until, _ = by_scipy([(9, 9)], of_one(shift), begin, RATE)
        solved = solve(SingleLayer(shift), begin, t1=T1, saves=TIMES, flow=StableLoRA(RATE), solver="Heun")
        assert solved.observables["shrunk_until1"][-1] == pytest.approx(until[0], rel=2e-3)


def test_each_lane_has_its_own_time():
    """Some latch early, some late, one not before its end, and one is given up: each as it is alone, steps too."""
    problem = SingleLayer(one_layer(18, 8))
    sizes = ((0.3, 5), (1e-3, 6), (2.0, 7), (0.1, 8), (100.0, 9))
    starts = [start(18, 8, 2, *one) for one in sizes]
    times = np.array([TIMES, TIMES, 0.1 * TIMES, TIMES, TIMES])
    how = {"flow": StableLoRA(RATE), "solver": "Tsit5", "max_steps": 80}
    lanes = solve_lanes(problem, stack(starts), times, **how)
    assert np.asarray(lanes.status).tolist() == [0, 0, 0, 0, 1]
    until = np.asarray(lanes.observables["shrunk_until1"])
    assert len(set(until[:4, -1])) == 4
    assert until[2, -1] == times[2, -1]
    for i, begin in enumerate(starts[:4]):
        alone = run(problem, begin, t1=times[i, -1])
        for name in ("loss", "norm_z1", "shrunk_until1"):
            message = f"{name} of lane {i}"
            np.testing.assert_allclose(lanes.observables[name][i], alone.observables[name], rtol=1e-7, err_msg=message)
        assert lanes.stats["num_steps"][i] == alone.stats["num_steps"]
    loss = np.asarray(lanes.observables["loss"])[4]
    assert np.isfinite(loss[0])
    assert np.isnan(loss[-1])


@pytest.mark.long
class TestDerivatives:
    """Of log L after the latch, and of t*, by (log rate, log size of A_0), across the jump of the field at t*."""

    def told(self, point, derivatives="reverse"):
        begin = jax.tree.map(lambda leaf: jnp.exp(point[1]) * leaf, start(9, 9, 3))
        how = {"t1": 2.0, "saves": 3, "solver": "Tsit5", "rtol": 1e-7, "derivatives": derivatives}
        solved = solve(SingleLayer(one_layer(9, 9)), begin, flow=StableLoRA(5 * jnp.exp(point[0])), **how)
        return jnp.array([jnp.log(solved.observables["loss"][-1]), solved.observables["shrunk_until1"][-1]])

    def forward(self, point):
        return self.told(point, "forward")

    def test_in_both_modes(self):
        step = 1e-4
        values = np.asarray(jax.jit(jax.vmap(self.forward))(step * np.concatenate([np.eye(2), -np.eye(2)])))
        expected = (values[:2] - values[2:]).T / (2 * step)
        assert np.all(np.abs(expected[0]) > 1e-2)
        for found in (jax.jacrev(self.told), jax.jacfwd(self.forward)):
            np.testing.assert_allclose(jax.jit(found)(jnp.zeros(2)), expected, rtol=1e-3, atol=1e-5)

    def test_under_vmap_of_lanes_that_never_latch(self):
        """The third lane's rate is 0; its derivative by the size is that of the plain flow."""
        rates = jnp.log(jnp.array([1.0, 4.0, 0.0]))
        found = jax.jit(jax.vmap(jax.jacrev(self.told)))(jnp.stack([rates, jnp.zeros(3)], axis=1))
        assert np.isfinite(found[:2]).all()
        np.testing.assert_allclose(found[0], jax.jit(jax.jacrev(self.told))(jnp.zeros(2)), rtol=1e-6)
        assert np.isfinite(found[2, :, 1]).all()


class TestRefusals:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: StableLoRA(-1.0), "rate must be at least 0, got -1.0"),
            (lambda: parse_flow("stable-lora"), "flow must come with a number after a colon for 'stable-lora', got"),
            (
                lambda: Chain(StableLoRA(1.0), StableLoRA(2.0)),
                "flows must hold at most one with a latch, got 'stable-lora:1', 'stable-lora:2'",
            ),
            (lambda: stable_lora(optax.sgd(0.1), 1.0), "lam must be at least 0 and below 1, got 1.0"),
            (
                lambda: stable_lora(optax.sgd(0.1), 0.1).init({"a": jnp.ones(3)}),
                "the parameters of stable_lora must be Adapters, of A and B together .*, got a dict",
            ),
        ],
    )
    def test_bad_arguments_get_one_line(self, make, message):
        with pytest.raises(InputError, match=f"^{message}") as caught:
            make()
        assert "\n" not in str(caught.value)

    def test_where_nothing_remembers(self):
        must = r"^flow must have no latch, which only solve and sweep remember \(.* stable_lora\), got a StableLoRA"
        problem, begin = SingleLayer(one_layer(9, 9)), start(9, 9, 3)
        with pytest.raises(InputError, match=must):
            descend(problem, begin, steps=3, step=0.1, flow=StableLoRA(RATE))
        with pytest.raises(InputError, match=must):
            analyse(problem, begin, StableLoRA(RATE))
        with pytest.raises(InputError, match="of A and B together"):
            descend(problem, begin, steps=3, step=stable_lora(optax.sgd(0.1), 0.1), order="A first")


class TestSteps:
    """The optimiser against the authors' algorithm, written out: flag, shrink, then the optimiser's step."""

    shift = one_layer(9, 9)
    begin = start(9, 9, 4)

    def loop(self, steps, step, lam):
        """`step(a, b, da, db)` of the shrunk A and the gradients from before; the factors, and when the decay ends."""
        ((a, b),) = jax.tree.map(np.asarray, self.begin)
        on, until = True, None
        for i in range(steps):
            rest = self.shift - b @ a
            da, db = -b.T @ rest, -rest @ a.T
            if on:
                if np.linalg.norm(a) < a.size / b.size * np.linalg.norm(b):
                    on, until = False, i
                else:
                    a = (1 - lam) * a
            a, b = step(a, b, da, db)
        return a, b, until

    def test_gradient_descent_with_weight_decay(self):
        """SGD whose own decay acts on the A that is shrunk already, as AdamW's in the authors' code does."""
        eta, lam, steps, decay = 0.05, 0.2, 40, 0.1

        def step(a, b, da, db):
            return a - eta * (da + decay * a), b - eta * (db + decay * b)

        a, b, until = self.loop(steps, step, lam)
        assert 3 < until < 30
        optimiser = stable_lora(optax.chain(optax.add_decayed_weights(decay), optax.sgd(eta)), lam)
        solved = descend(SingleLayer(self.shift), self.begin, steps=steps, step=optimiser)
        np.testing.assert_allclose(solved.adapters[0].a, a, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(solved.adapters[0].b, b, rtol=1e-10, atol=1e-13)

    @pytest.mark.long
    def test_adam_has_gradients_without_the_decay(self):
        """Decoupled: its moments see the gradients alone."""
        eta, lam, steps, adam = 0.01, 0.1, 12, optax.adam(0.01)
        memory = {"state": adam.init(self.begin)}

        def step(a, b, da, db):
            updates, memory["state"] = adam.update((Adapter(da, db),), memory["state"], (Adapter(a, b),))
            return a + np.asarray(updates[0].a), b + np.asarray(updates[0].b)

        a, b, _ = self.loop(steps, step, lam)
        solved = descend(SingleLayer(self.shift), self.begin, steps=steps, step=stable_lora(optax.adam(eta), lam))
        np.testing.assert_allclose(solved.adapters[0].a, a, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(solved.adapters[0].b, b, rtol=1e-9, atol=1e-12)

    @pytest.mark.long
    def test_it_becomes_the_flow(self):
        """Half the step, half the distance, with lam = rate eta."""
        flow = run(SingleLayer(self.shift), self.begin, t1=1.0, rtol=1e-8)

        def distance(eta):
            optimiser = stable_lora(optax.sgd(eta), RATE * eta)
            run = descend(SingleLayer(self.shift), self.begin, steps=round(1 / eta), step=optimiser, saves=2)
            return np.linalg.norm(run.adapters[0].b - flow.adapters[0].b)

        # the step at which the latch goes off is late by up to one, which scatters the ratio
        coarse, fine = distance(0.01), distance(0.00125)
        assert 5 < coarse / fine < 12
        assert fine < 2e-3

    def test_layers_by_themselves(self):
        optimiser = stable_lora(optax.sgd(0.02), 0.1)
        state = optimiser.init(START_OF_TWO)
        balanced = START_OF_TWO[0], START_OF_TWO[1]._replace(b=100.0 + START_OF_TWO[1].b)
        nothing = jax.tree.map(jnp.zeros_like, balanced)
        updates, state = optimiser.update(nothing, state, balanced)
        assert [bool(one) for one in state.on] == [True, False]
        np.testing.assert_allclose(updates[0].a, -0.1 * START_OF_TWO[0].a, rtol=1e-12)
        assert not np.any(updates[1].a)
        _, state = optimiser.update(nothing, state, START_OF_TWO)
        assert [bool(one) for one in state.on] == [True, False], "off for good"


def test_names():
    assert str(StableLoRA(0.5)) == "stable-lora:0.5"
    assert eqx.tree_equal(parse_flow("stable-lora:0.5"), StableLoRA(0.5))


def test_gaussian_time_is_that_of_any_size_and_rank():
    shift = one_layer(60, 60)
    draws = [
        gaussian_init(jax.random.key(rank), SingleLayer(shift), rank=rank, alpha=size)[0].a
        for rank, size in ((8, 1e-2), (32, 1.0))
    ]
    for a in draws:
        drawn = theory.switch_off_time(shift, np.asarray(a), RATE)
        assert drawn == pytest.approx(theory.switch_off_time_of_gaussian(shift, RATE), rel=0.1)
