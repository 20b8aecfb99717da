"""A model of any framework as a problem: its layers, its flow, and the framework's own training."""

import itertools
from collections import deque

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from perceptrons import MODELS, PATHS, SIZES, WEIGHTS, X, Y, plain, squares

from lora_flow import (
    INITIALIZATIONS,
    Adapter,
    InputError,
    adapted,
    descend,
    gaussian_init,
    sensitivity,
    solve,
    sweep,
    zero_adapters,
)
from lora_flow.initialization import initialize

LAYERS, SCALING = ((5, 3), (4, 5), (2, 4)), 1.5


def problem_of(name, **options):
    loss, params = MODELS[name]()
    return adapted(loss, params, data=(X, Y), scaling=SCALING, **options)


def drawn(layers, rank=2, scale=0.5):
    rng = np.random.default_rng(3)
    return tuple(
        Adapter(*(jnp.asarray(scale * rng.standard_normal(s)) for s in ((rank, n_in), (n_out, rank))))
        for n_out, n_in in layers
    )


def outputs(weights, x=X):
    first, second, third = weights
    return np.tanh(np.tanh(x @ first.T) @ second.T) @ third.T


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_that_of_the_weights_with_the_adapters_added(name):
    problem = problem_of(name)
    assert problem.layers == LAYERS
    assert problem.paths == PATHS[name]
    start = drawn(problem.layers)
    weights = [w + SCALING * b @ a for w, (a, b) in zip(WEIGHTS, start, strict=True)]
    expected = 0.5 * np.sum((outputs(weights) - Y) ** 2) / len(Y)
    np.testing.assert_allclose(problem.loss(start), expected, rtol=1e-12)
    for found, weight in zip(problem.weights, WEIGHTS, strict=True):
        np.testing.assert_allclose(found, weight, rtol=1e-14)


@pytest.mark.parametrize("name", MODELS)
def test_the_inputs_of_a_layer_are_what_the_loss_multiplies_it_by(name):
    """Seven samples; those of the first layers, more than it has inputs, up to a rotation."""
    hidden = np.tanh(X @ WEIGHTS[0].T)
    for found, inputs in zip(problem_of(name).layer_inputs, (X, hidden, np.tanh(hidden @ WEIGHTS[1].T)), strict=True):
        np.testing.assert_allclose(found.T @ found, inputs.T @ inputs, atol=1e-12)
        assert len(found) == min(inputs.shape)


@pytest.mark.parametrize("name", MODELS)
def test_the_task_is_minus_the_gradient_in_the_weights_times_the_scaling(name):
    problem = problem_of(name)

    def of_weights(weights):
        hidden = jnp.tanh(jnp.tanh(X @ weights[0].T) @ weights[1].T)
        return squares(hidden @ weights[2].T, Y)

    slopes = jax.grad(of_weights)([jnp.asarray(w) for w in WEIGHTS])
    for task, slope in zip(problem.linearised_task(), slopes, strict=True):
        np.testing.assert_allclose(task, -SCALING * slope, atol=1e-12)


def sgd_in_plain_jax(start, steps, step):
    loss, params = plain()

    @jax.jit
    def descent(adapters):
        def of(adapters):
            return loss({k: params[k] + SCALING * (b @ a).T for k, (a, b) in zip(params, adapters, strict=True)}, X, Y)

        return jax.tree.map(lambda x, slope: x - step * slope, adapters, jax.grad(of)(adapters))

    for _ in range(steps):
        start = descent(start)
    return start


def sgd_in_nnx(start, steps, step):
    """By Flax's own `LoRALinear`, x W + x A B in its letters, and its optimiser; each factor takes a root of s."""

    double = {"param_dtype": float, "lora_param_dtype": float}

    class Adapted(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List(
                [
                    nnx.LoRALinear(n_in, n_out, lora_rank=2, use_bias=False, rngs=rngs, **double)
                    for n_in, n_out in itertools.pairwise(SIZES)
                ]
            )

        def __call__(self, x):
            x = jnp.tanh(self.layers[1](jnp.tanh(self.layers[0](x))))
            return self.layers[2](x)

    model, root = Adapted(nnx.Rngs(0)), np.sqrt(SCALING)
    for layer, weight, (a, b) in zip(model.layers, WEIGHTS, start, strict=True):
        layer.kernel[...] = weight.T
        layer.lora.lora_a[...], layer.lora.lora_b[...] = root * a.T, root * b.T
    optimizer = nnx.Optimizer(model, optax.sgd(SCALING * step), wrt=nnx.LoRAParam)

    @nnx.jit
    def descent(model, optimizer):
        slopes = nnx.grad(lambda model: squares(model(X), Y), argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, slopes)

    for _ in range(steps):
        descent(model, optimizer)
    return tuple(Adapter(x.lora.lora_a[...].T / root, x.lora.lora_b[...].T / root) for x in model.layers)


class LoRA(eqx.Module):
    weight: jax.Array
    a: jax.Array
    b: jax.Array

    def __call__(self, x):
        return jax.lax.stop_gradient(self.weight) @ x + SCALING * self.b @ (self.a @ x)


def sgd_in_equinox(start, steps, step):
    model = [LoRA(jnp.asarray(w), *one) for w, one in zip(WEIGHTS, start, strict=True)]
    optimizer = optax.sgd(step)
    state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def descent(model, state):
        def of(model):
            first, second, third = map(jax.vmap, model)
            return squares(third(jnp.tanh(second(jnp.tanh(first(X))))), Y)

        updates, state = optimizer.update(eqx.filter_grad(of)(model), state)
        return eqx.apply_updates(model, updates), state

    for _ in range(steps):
        model, state = descent(model, state)
    return tuple(Adapter(layer.a, layer.b) for layer in model)


SGD = {"plain": sgd_in_plain_jax, "nnx": sgd_in_nnx, "equinox": sgd_in_equinox}


@pytest.mark.parametrize("name", SGD)
def test_the_flow_is_what_the_frameworks_own_training_tends_to(name):
    """Halving the step of gradient descent halves the distance (Euler's method)."""
    problem, t1 = problem_of(name), 2.0
    start = gaussian_init(jax.random.key(0), problem, rank=2, alpha=0.5)
    flow = solve(problem, start, t1=t1, saves=2, rtol=1e-10, solver="Tsit5")
    assert flow.observables["loss"][-1] < 0.8 * flow.observables["loss"][0]
    distances = []
    for steps in (100, 200):
        found = SGD[name](start, steps, t1 / steps)
        gaps = jax.tree.map(lambda x, y: jnp.sum((x - y) ** 2), found, flow.adapters)
        distances.append(float(jnp.sqrt(sum(jax.tree.leaves(gaps)))))
    assert distances[0] < 0.05
    np.testing.assert_allclose(distances[0] / distances[1], 2.0, rtol=0.05)


@pytest.mark.parametrize("name", ["plain", "nnx", "equinox"])
def test_a_model_is_swept_over_alpha_and_rank(name):
    runs = sweep(problem_of(name), alpha=[0.1, 0.3], rank=[1, 2], t1=1.0, saves=3, progress=False)
    assert runs.sizes["alpha"] == runs.sizes["rank"] == 2
    assert (runs["status"] == 0).all()
    assert (runs["loss"].isel(time=-1) < runs["loss"].isel(time=0)).all()
    assert runs.attrs["paths"] == ", ".join(PATHS[name])


@pytest.mark.parametrize("init", [name for name, scheme in INITIALIZATIONS.items() if not scheme.network])
def test_every_initialisation_starts_a_model_and_none_raises_its_loss(init):
    """Of two samples, so that each layer's task has rank 2, which `spectral` asks for."""
    rng = np.random.default_rng(0)
    params = {f"w{i}": rng.normal(size=(8, 8)) / 3 for i in (1, 2, 3)}
    problem = adapted(plain()[0], params, data=(rng.normal(size=(2, 8)), rng.normal(size=(2, 8))))
    start = initialize(init, jax.random.key(0), problem, rank=2, alpha=0.1, side="A")
    problem = problem.offset(start) if INITIALIZATIONS[init].offset else problem
    done = solve(problem, start, t1=0.5, saves=2)
    assert done.status == 0
    assert done.observables["loss"][-1] < done.observables["loss"][0]


def test_descents_are_those_of_any_problem():
    problem = problem_of("plain")
    start = gaussian_init(jax.random.key(0), problem, rank=2, alpha=0.3)
    descent = descend(problem, start, steps=20, step=0.05, saves=2)
    flow = solve(problem, start, t1=1.0, saves=2)
    np.testing.assert_allclose(descent.observables["loss"][-1], flow.observables["loss"][-1], rtol=0.05)


def test_the_sensitivity_to_the_scaling_is_a_difference_of_runs():
    loss, params = plain()

    def of(scaling):
        return adapted(loss, params, data=(X, Y), scaling=scaling)

    how = {"observable": "log10 loss", "at": 1.0, "alpha": 0.3, "rank": 2, "t1": 1.0, "progress": False}
    found = sensitivity(of(1.5), with_respect_to="scaling", rtol=1e-8, **how)["derivative"].item()
    start = gaussian_init(jax.random.key(0), of(1.5), rank=2, alpha=0.3)
    runs = [solve(of(1.5 + h), start, t1=1.0, saves=2, rtol=1e-10, solver="Tsit5") for h in (-1e-4, 1e-4)]
    down, up = (np.log10(run.observables["loss"][-1]) for run in runs)
    np.testing.assert_allclose(found, (up - down) / 2e-4, rtol=1e-4)


def test_problems_of_other_data_share_a_sweep():
    loss, params = plain()
    problems = {name: adapted(loss, params, data=(X, scale * Y)) for name, scale in (("half", 0.5), ("whole", 1.0))}
    how = {"alpha": 0.3, "rank": 1, "t1": 1.0, "saves": 2, "progress": False}
    both = sweep(problems, **how)["loss"].squeeze()
    for name, problem in problems.items():
        np.testing.assert_allclose(both.sel(problem=name), sweep(problem, **how)["loss"].squeeze(), rtol=1e-4)


def test_a_problem_is_solved_within_a_program_of_the_users():
    problem = problem_of("plain")
    start = gaussian_init(jax.random.key(0), problem, rank=2, alpha=0.3)
    solved = jax.jit(lambda start: solve(problem, start, t1=0.1, saves=2, solver="Tsit5").observables["loss"])
    np.testing.assert_allclose(solved(start)[0], problem.loss(start), rtol=1e-12)


def test_one_layer_knows_its_descent_and_is_a_matrix_to_learn():
    """With a linear model, `Regression`."""
    (weight,), rng = WEIGHTS[:1], np.random.default_rng(1)
    y = rng.normal(size=(len(X), 5))
    problem = adapted(lambda w, x, y: squares(x @ w.T, y), weight, data=(X, y))
    start = drawn(problem.layers)
    ((a, b),) = start
    residual = y - X @ (weight + b @ a).T
    np.testing.assert_allclose(problem.product_descent(start), residual.T @ X / len(X), atol=1e-12)


def attention(module):
    """A model with one head of attention more than one, its loss, and the parameters."""
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 6, 8)))
    if module == "nnx":
        model = nnx.MultiHeadAttention(2, 8, qkv_features=12, decode=False, rngs=nnx.Rngs(0), param_dtype=float)
        return (lambda model, x: jnp.mean(model(x) ** 2)), model, x
    if module == "linen":
        model = linen.MultiHeadDotProductAttention(2, qkv_features=12, param_dtype=float)
        return (lambda params, x: jnp.mean(model.apply(params, x) ** 2)), model.init(jax.random.key(0), x), x
    model = eqx.nn.MultiheadAttention(2, 8, qk_size=6, vo_size=6, key=jax.random.key(0))
    return (lambda model, x: jnp.mean(jax.vmap(lambda one: model(one, one, one))(x) ** 2)), model, x


@pytest.mark.parametrize(("module", "letters"), [("nnx", "ioo iio"), ("linen", "ioo iio"), ("equinox", "oi oi")])
def test_attentions_kernels_are_folded(module, letters):
    loss, params, x = attention(module)
    names = {"equinox": "(query|value)_proj"}.get(module, "query|value")
    last = {"equinox": "output_proj"}.get(module, "out")
    problem = adapted(loss, params, [names, last], data=(x,))
    assert problem.layers == ((12, 8), (12, 8), (8, 12))
    assert [one.letters for one in problem.chosen] == [letters.split()[0]] * 2 + [letters.split()[1]]
    flat = x.reshape(-1, 8)
    for inputs in problem.layer_inputs[:2]:
        np.testing.assert_allclose(inputs.T @ inputs, flat.T @ flat, atol=1e-10)
    context = problem.layer_inputs[2]  # of which the loss is a function, through the layer and its bias alone
    weight = problem.weights[2]
    total = jnp.trace(weight @ context.T @ context @ weight.T) / (x.size)
    np.testing.assert_allclose(total, loss(params, x), rtol=1e-10)


@pytest.mark.parametrize("letters", ["io", "oi"])
def test_a_convolution_is_a_layer_of_its_windows(letters):
    rng = np.random.default_rng(0)
    x, axes = jnp.asarray(rng.normal(size=(2, 9, 3))), ("NWC", "WIO" if letters == "io" else "OIW", "NWC")
    kernel = rng.normal(size=(4, 3, 5) if letters == "io" else (5, 3, 4))

    def loss(kernel, x):
        return jnp.mean(jax.lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=axes) ** 2)

    problem = adapted(loss, jnp.asarray(kernel), data=(x,))
    assert problem.layers == ((5, 12),)
    assert problem.layer_inputs is None
    start = drawn(problem.layers)
    ((a, b),) = start
    windows = jnp.stack([x[:, i : i + 4] for i in range(6)], axis=1)  # sample, place, width, channel
    order = "nlwc" if letters == "io" else "nlcw"
    flat = jnp.einsum(f"nlwc->{order}", windows).reshape(-1, 12)
    weight = problem.weights[0] + b @ a
    np.testing.assert_allclose(problem.loss(start), jnp.mean((flat @ weight.T) ** 2), rtol=1e-10)


def test_a_matrix_in_a_loop_is_chosen_and_its_inputs_are_out_of_sight():
    def loss(params, x):
        def step(hidden, one):
            return jnp.tanh(params["recurrent"] @ hidden + params["into"] @ one), None

        return jnp.sum(jax.lax.scan(step, jnp.zeros(4), x)[0] ** 2)

    rng = np.random.default_rng(0)
    params = {"recurrent": rng.normal(size=(4, 4)), "into": rng.normal(size=(4, 3))}
    problem = adapted(loss, params, ["recurrent", "into"], data=(X,))
    assert problem.layers == ((4, 4), (4, 3))
    assert problem.layer_inputs is None


def test_letters_say_what_the_loss_does_not_show():
    tokens, table = jnp.asarray([0, 2, 2, 1]), np.random.default_rng(0).normal(size=(3, 5))

    def loss(params, tokens):
        return jnp.sum(params["embedding"][tokens] ** 2)

    with pytest.raises(InputError, match=r"^layer 'embedding' must be a matrix that the loss multiplies by.*gather"):
        adapted(loss, {"embedding": table}, "embedding", data=(tokens,))
    problem = adapted(loss, {"embedding": table}, {"embedding": "io"}, data=(tokens,))
    assert problem.layers == ((5, 3),)


def test_the_order_is_that_of_the_patterns_and_then_of_the_numbers():
    def loss(params, x):
        for one in params["blocks"]:
            x = jnp.tanh(x @ one)
        return jnp.sum((x @ params["head"]) ** 2)

    params = {"blocks": [np.eye(3)] * 12, "head": np.ones((3, 2))}
    found = adapted(loss, params, ["head", "blocks/.*"], data=(X,)).paths
    assert found == ("head", *(f"blocks/{i}" for i in range(12)))
    assert adapted(loss, params, "blocks/1[01]", data=(X,)).paths == ("blocks/10", "blocks/11")


def test_a_model_that_is_changed_later_does_not_reach_the_problem():
    zero = zero_adapters(LAYERS, 1)
    (of_model, model), (of_arrays, arrays), y = MODELS["nnx"](), plain(), Y.copy()
    problems = [adapted(of_model, model, data=(X, y)), adapted(of_arrays, arrays, data=(X, y))]
    before = [one.loss(zero) for one in problems]
    model.layers[0].kernel[...] = 0 * model.layers[0].kernel[...]
    arrays["w1"][:] = y[:] = 0.0
    assert [one.loss(zero) for one in problems] == before


@pytest.mark.parametrize("where", ["closure", "out of sight"])
def test_data_that_the_loss_holds_itself_and_that_change_are_noticed(where):
    held = [X.copy()] if where == "closure" else deque([X.copy()])
    problem = adapted(lambda params: squares(plain()[0](params, held[0], Y), 0 * Y[:, :1]), plain()[1])
    start = zero_adapters(problem.layers, 1)
    for _ in range(2):
        solve(problem, start, t1=0.1, saves=2)
    held[0][0, 0] += 1.0
    with pytest.raises(InputError, match=r"^problem must not change once it has been solved"):
        solve(problem, start, t1=0.1, saves=2)


def test_what_does_not_fit_is_named():
    loss, params = plain()
    for given, message in (
        ({"layers": "w4"}, r"^layers must match a matrix of the parameters, such as w1, w2, w3, got 'w4'$"),
        ({"layers": "w("}, r"^layers must be a regular expression, got 'w\('"),
        ({"layers": []}, r"^layers must be a pattern, several, or a mapping from patterns to letters, got \[\]$"),
        (
            {"layers": {"w1": "iio"}},
            r"^layers\['w1'\] must have 2 letters, one for each axis of \(3, 5\), got",
        ),
        ({"layers": {"w1": "xy"}}, r"^layers\['w1'\] must be a letter for each axis"),
        (
            {"params": params | {"b": np.ones(2)}, "layers": "b"},
            r"^layer 'b' must be a matrix of real numbers, got shape",
        ),
        (
            {"params": params | {"w2": np.full((5, 4), np.nan)}},
            r"^layer 'w2' must be finite, got entries that are NaN or infinite$",
        ),
        ({"params": {"w1": np.ones(3)}}, r"^params must hold a matrix at least, got 1 leaves and none$"),
        (
            {"loss": lambda params, x, y: x},
            r"^loss\(params, \*data\) must be one finite .* got shape \(7, 3\) of float64$",
        ),
        ({"loss": lambda params, x, y: -jnp.sum(x**2)}, r"^loss\(params, \*data\) must be one .*at least 0"),
        ({"scaling": 0.0}, r"^scaling must be positive and finite, got 0.0$"),
    ):
        with pytest.raises(InputError, match=message):
            adapted(**({"loss": loss, "params": params, "data": (X, Y)} | given))
