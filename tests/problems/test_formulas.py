"""A formula of a loss is not used for another loss: subclasses, objects and wrappers that change it, in every path."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from formulas_in_use import formula

from lora_flow import (
    Adapter,
    AdmissibleStep,
    DeepLinear,
    Factorization,
    InputError,
    LinearNetwork,
    MuKlabjan,
    Offset,
    SingleLayer,
    analyse,
    canonical,
    descend,
    gaussian_init,
    linearised_task,
    lora_ga_init,
    misaligned,
    noisy,
    solve,
    sweep,
)
from lora_flow.problems.base import vector_field
from lora_flow.problems.formulas import FORMULAS, keeps_all
from lora_flow.problems.tasks import fastest_rate, task_rank
from lora_flow.sweeps.plan import plan_sweep

DECAY = 0.3
RNG = np.random.default_rng(0)
W1, W2, SHIFT = RNG.normal(size=(4, 5)), RNG.normal(size=(4, 4)), RNG.normal(size=(4, 5))
PLAIN = {
    "Factorization": lambda kind: kind(w1=W1, w2=W2, shift=SHIFT),
    "SingleLayer": lambda kind: kind(SHIFT),
    "DeepLinear": lambda kind: kind([W1, W2], SHIFT),
    "LinearNetwork": lambda kind: kind(SHIFT.T),
}
KINDS = {"Factorization": Factorization, "SingleLayer": SingleLayer, "DeepLinear": DeepLinear}
KINDS["LinearNetwork"] = LinearNetwork


def decay(adapters):
    return 0.5 * DECAY * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(adapters))


def with_decay(kind):
    """A subclass with weight decay, as a user writes it."""

    class Decayed(kind):
        def loss(self, adapters):
            return super().loss(adapters) + decay(adapters)

    return Decayed


def textbook(name, adapters):
    """The loss with its decay, from the definition, and from nothing that the library computes."""
    changed = [b @ a for a, b in adapters]
    learned = (W2 + changed[1]) @ (W1 + changed[0]) - W2 @ W1 if len(changed) == 2 else changed[0]
    missing = SHIFT - learned
    return 0.5 * jnp.sum(missing**2) + decay(adapters)


def runge_kutta(name, start, t1, saves, steps=200):
    """The loss at equally spaced times, by the classical method of order 4 on the gradient of the definition."""

    def slope(x):
        return jax.tree.map(jnp.negative, jax.grad(lambda x: textbook(name, x))(x))

    def step(x, _):
        def moved(k, h):
            return jax.tree.map(lambda x, k: x + h * k, x, k)

        h = t1 / steps
        k1 = slope(x)
        k2 = slope(moved(k1, h / 2))
        k3 = slope(moved(k2, h / 2))
        k4 = slope(moved(k3, h))
        x = jax.tree.map(lambda x, a, b, c, d: x + h / 6 * (a + 2 * b + 2 * c + d), x, k1, k2, k3, k4)
        return x, textbook(name, x)

    losses = jax.jit(lambda start: jax.lax.scan(step, start, length=steps)[1])(start)
    return np.asarray([textbook(name, start), *losses[steps // saves - 1 :: steps // saves]])


def start_of(problem, rank=2):
    rng = np.random.default_rng(1)
    return tuple(
        Adapter(jnp.asarray(rng.normal(size=(rank, n_in))), jnp.asarray(rng.normal(size=(n_out, rank))))
        for n_out, n_in in problem.layers
    )


LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("DeepLinear", "LinearNetwork")]


@pytest.mark.parametrize("name", ["Factorization", "SingleLayer", *LONG])
def test_the_flow_of_a_subclass_with_weight_decay(name):
    """`solve` and `sweep` against a Runge-Kutta method on the definition; inherited formulas had ended elsewhere."""
    problem = PLAIN[name](with_decay(KINDS[name]))
    alpha, how = 0.1, {"t1": 2.0, "saves": 5, "solver": "Tsit5"}
    swept = sweep(problem, alpha=alpha, rank=2, progress=False, **how)
    assert np.isnan(swept["loss_floor"]).all()
    drawn = gaussian_init(jax.random.key(0), problem, rank=2, alpha=alpha)
    solved = solve(problem, drawn, save_adapters=True, derivatives="forward", **how)
    reference = runge_kutta(name, drawn, 2.0, 4)
    np.testing.assert_allclose(solved.observables["loss"], reference, rtol=2e-3)
    np.testing.assert_allclose(swept["loss"].values.ravel(), reference, rtol=2e-3)
    assert np.all(np.diff(reference) < 0)
    # what is analysed afterwards: the gradient is that of the loss, and of two layers no parts are told
    analysed = analyse(problem, solved.history)
    gradients = jax.vmap(jax.grad(lambda x: textbook(name, x)))(solved.history)
    squared = sum(jnp.sum(leaf**2, axis=(1, 2)) for leaf in jax.tree.leaves(gradients))
    np.testing.assert_allclose(analysed["gradient_norm"] ** 2, squared, rtol=1e-9)
    assert "loss_signal" not in analysed


@pytest.mark.parametrize("name", PLAIN)
def test_formulas_of_a_subclass_with_weight_decay(name):
    problem = PLAIN[name](with_decay(KINDS[name]))
    plain = PLAIN[name](KINDS[name])
    for own in FORMULAS - {"descent_of"}:
        assert formula(problem, own) is None, own
    start = start_of(problem)
    np.testing.assert_allclose(problem.loss(start), textbook(name, start), rtol=1e-12)
    gradient = jax.grad(lambda x: textbook(name, x))(start)
    for ours, theirs in zip(jax.tree.leaves(vector_field(problem)(start)), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(ours, -theirs, atol=1e-11)
    for ours, theirs in zip(linearised_task(problem), linearised_task(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)  # decay has no gradient at the pretrained weights
    assert fastest_rate(problem) == pytest.approx(fastest_rate(plain), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "step"),
    [*(pytest.param(name, 1e-2, id=name) for name in PLAIN), pytest.param("Factorization", optax.sgd(1e-2), id="sgd")],
)
def test_descent_steps_along_the_gradient_of_the_loss_in_force(name, step):
    problem = PLAIN[name](with_decay(KINDS[name]))
    start = start_of(problem)
    after = descend(problem, start, steps=2, saves=2, step=step)
    expected = start
    for _ in range(2):
        slope = jax.grad(lambda x: textbook(name, x))(expected)
        expected = jax.tree.map(lambda x, dx: x - 1e-2 * dx, expected, slope)
    np.testing.assert_allclose(after.observables["loss"][-1], textbook(name, expected), rtol=1e-12)


def test_what_the_loss_is_made_of_counts_as_the_loss():
    class Doubled(Factorization):  # `residual` is in the loss and not in the field
        def residual(self, adapters):
            return 2 * super().residual(adapters)

    class Squashed(SingleLayer):  # `loss_of` is in the loss, `descent_of` was written for another one
        def loss_of(self, change):
            return jnp.log1p(super().loss_of(change))

    class Both(SingleLayer):  # two that belong together; the field comes from the loss all the same
        def loss_of(self, change):
            return 3 * super().loss_of(change)

        def descent_of(self, change):
            return 3 * super().descent_of(change)

    class Halved(DeepLinear):
        def _factors(self, adapters):
            left, right = super()._factors(adapters)
            return left / 2, right

    for problem in (Doubled(W1, W2, SHIFT), Squashed(SHIFT), Both(SHIFT), Halved([W1, W2], SHIFT)):
        start = start_of(problem)
        for ours, theirs in zip(
            jax.tree.leaves(vector_field(problem)(start)), jax.tree.leaves(jax.grad(problem.loss)(start)), strict=True
        ):
            np.testing.assert_allclose(ours, -theirs, atol=1e-11)
    ours, theirs = linearised_task(Both(SHIFT)), 3 * SHIFT
    np.testing.assert_allclose(ours[0], theirs, rtol=1e-12)
    assert formula(Both(SHIFT), "descent_of") is not None
    tasks = zip(linearised_task(Doubled(W1, W2, SHIFT)), linearised_task(Factorization(W1, W2, SHIFT)), strict=True)
    for ours, theirs in tasks:
        np.testing.assert_allclose(ours, 4 * theirs, rtol=1e-11)


def test_what_changes_no_loss_keeps_the_formulas():
    class Named(Factorization):
        name: str = "mine"

        def observe(self, adapters):
            return {"size": decay(adapters)}

        def __str__(self):
            return self.name

    class Told(Factorization):
        def meanings(self):
            return {}

    class OwnField(Factorization):  # the author's word
        def field(self, adapters):
            return jax.tree.map(jnp.zeros_like, adapters)

    class Mixed(Factorization):
        pass

    class Layer(SingleLayer.__bases__[0]):  # a user's own layer completes what `AdaptedLayer` leaves open
        scaling: jax.Array
        weight: None = None
        layers = ((4, 5),)

        def loss_of(self, change):
            return 0.5 * jnp.sum((SHIFT - change) ** 2)

        def descent_of(self, change):
            return SHIFT - change

    for kind in (Named, Told, OwnField, Mixed):
        assert formula(kind(W1, W2, SHIFT), "field") is not None
        assert formula(kind(W1, W2, SHIFT), "growth_bound") is not None
    assert not np.any(np.asarray(vector_field(OwnField(W1, W2, SHIFT))(start_of(Mixed(W1, W2, SHIFT)))[0].a))
    assert formula(Layer(jnp.ones(())), "field") is not None
    assert [keeps_all(kind(W1, W2, SHIFT), Factorization) for kind in (Named, Told, Mixed)] == [False, True, True]
    still = sweep(OwnField(W1, W2, SHIFT), alpha=0.1, rank=2, t1=1.0, saves=2, solver="Tsit5", progress=False)
    assert np.ptp(still["loss"].values) == 0  # no coordinates in which another field would be used


def test_objects_and_wrappers_that_change_the_loss():
    """An attribute of the object, a mixin before the class, a wrapper that hands everything else on."""
    layer = SingleLayer(SHIFT)

    class Layer:
        layers = layer.layers

        def loss(self, adapters):
            return layer.loss(adapters)

        def field(self, adapters):
            return layer.field(adapters)

    class Wrapper:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        @property
        def layers(self):
            return self.inner.layers

        def loss(self, adapters):
            return self.inner.loss(adapters) + decay(adapters)

    class Decay:
        def loss(self, adapters):
            return super().loss(adapters) + decay(adapters)

    class Mixed(Decay, Layer):
        pass

    changed = Layer()
    assert formula(changed, "field") is not None
    changed.loss = lambda adapters: layer.loss(adapters) + decay(adapters)
    start = start_of(layer)
    slope = jax.grad(lambda x: textbook("SingleLayer", x))(start)
    for problem in (changed, Mixed(), Wrapper(layer), Wrapper(Layer())):
        for ours, theirs in zip(jax.tree.leaves(vector_field(problem)(start)), jax.tree.leaves(slope), strict=True):
            np.testing.assert_allclose(ours, -theirs, atol=1e-12)


def test_own_observables_are_recorded_in_every_path():
    """In canonical coordinates `sweep` had stored NaN for them, with status 0."""

    class Watched(Factorization):
        def observe(self, adapters):
            return {"entry": adapters[0].a[0, 0]}  # not invariant under changes of coordinates

    problem = Watched(W1, W2, SHIFT)
    swept = sweep(
        problem, init=("gaussian", "lora-ga"), alpha=0.1, rank=2, t1=1.0, saves=3, solver="Tsit5", progress=False
    )
    assert int(swept["status"].max()) == 0
    start = gaussian_init(jax.random.key(0), problem, rank=2, alpha=0.1)
    entry = swept["entry"].sel(init="gaussian").values.ravel()
    assert entry[0] == start[0].a[0, 0]
    moved = swept["entry"].sel(init="lora-ga").values.ravel()  # an offset start, which is taken off the weights
    np.testing.assert_allclose(moved[0], lora_ga_init(jax.random.key(0), problem, rank=2, alpha=0.1)[0].a[0, 0])
    assert np.isfinite(swept["entry"]).all()
    stepped = descend(problem, start, steps=1, saves=2, step=1e-3)
    np.testing.assert_allclose(stepped.observables["entry"][0], start[0].a[0, 0], rtol=1e-14)
    offset = Offset(problem, start)
    assert offset.observe(start)["entry"] == start[0].a[0, 0]


def test_what_is_proved_for_a_class_is_refused_for_another_loss():
    network, layer = (PLAIN[name](with_decay(KINDS[name])) for name in ("LinearNetwork", "SingleLayer"))
    decayed = PLAIN["Factorization"](with_decay(Factorization))
    with pytest.raises(InputError, match="problem must be a LinearNetwork, with its loss, for AdmissibleStep"):
        descend(network, start_of(network), steps=1, step=AdmissibleStep())
    with pytest.raises(InputError, match="problem must adapt one layer"):
        descend(layer, start_of(layer), steps=1, step=MuKlabjan())
    for make in (
        lambda: canonical(decayed, rank=2),
        lambda: misaligned(decayed, jax.random.key(0), angle=10.0),
        lambda: noisy(decayed, jax.random.key(0), noise=0.1),
    ):
        with pytest.raises(InputError, match="problem must be a Factorization as it is, got Decayed"):
            make()
    assert task_rank(decayed)[0] == task_rank(Factorization(W1, W2, SHIFT))[0] == 4


def test_ranks_share_a_sweep_only_where_padding_changes_nothing():
    """A penalty that is a mean over the rank is another one after padding."""

    class Mean(eqx.Module):
        layers: tuple = eqx.field(static=True, default=((4, 5),))

        def loss(self, adapters):
            ((a, b),) = adapters
            return 0.5 * jnp.sum((SHIFT - b @ a) ** 2) + jnp.mean(a**2)

    with pytest.raises(InputError, match="rank must be one number for a problem whose loss depends on it by itself"):
        sweep(Mean(), alpha=0.1, rank=(1, 2), t1=0.5, saves=2, progress=False)


def test_wide_starts_are_narrowed_only_where_the_loss_allows():
    """A penalty on single entries is not invariant under rotations of the rank, of which `narrow` makes use."""

    class Peaked(LinearNetwork):
        def loss(self, adapters):
            return super().loss(adapters) + 0.01 * sum(jnp.sum(leaf**4) for leaf in jax.tree.leaves(adapters))

    network = Peaked(SHIFT[:2, :2])
    plan = plan_sweep(
        network,
        init="gaussian",
        side="A",
        alpha=1.0,
        rank=6,
        seeds=1,
        t1=1.0,
        saves=2,
        solver="auto",
        rtol=1e-3,
        max_steps=100,
        batch_size=1,
        devices=1,
    )
    _, _, drawn, *_ = plan._start([np.asarray([0])], 1)
    start = gaussian_init(jax.random.key(0), network, rank=6, alpha=1.0)
    np.testing.assert_allclose(network.loss(jax.tree.map(lambda leaf: leaf[0], drawn)), network.loss(start), rtol=1e-12)
