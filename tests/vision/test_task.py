"""A classifier's loss, its gradients with respect to weights, and the flow that gradient descent tends to."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lora_flow_vision import task as module
from lora_flow_vision.lora import linear_layers
from lora_flow_vision.task import HeadTask, NetworkTask, cross_entropy
from lora_flow_vision.training import train
from scipy.special import softmax
from sklearn.metrics import accuracy_score, log_loss
from small import SHALLOW, adapters, images, logits, network

from lora_flow import Adapter, InputError, SoftmaxRegression, gaussian_init, rounding_floor, solve, zero_adapters

COUNT, WIDTH, CLASSES, SCALING = 40, 6, 4, 1.5
QUERY, UP, HEAD = "blocks/0/attention/query", "blocks/0/mlp/up", "head"
PATHS = QUERY, UP, HEAD


@pytest.fixture(scope="module")
def head():
    rng = np.random.default_rng(0)
    features, weight = rng.standard_normal((COUNT, WIDTH)), 0.3 * rng.standard_normal((CLASSES, WIDTH))
    return HeadTask(features, rng.integers(0, CLASSES, COUNT), weight, rng.standard_normal(CLASSES), SCALING)


@pytest.fixture(scope="module")
def deep():
    return NetworkTask(network(SHALLOW), images(12), np.arange(12) % 10, PATHS, SCALING)


def drawn(layers, rank=2, scale=0.5, seed=3):
    rng = np.random.default_rng(seed)
    return tuple(
        Adapter(*(jnp.asarray(scale * rng.standard_normal(s)) for s in ((rank, n_in), (n_out, rank))))
        for n_out, n_in in layers
    )


def slope(task, adapters):
    """The loss and its gradient, in one program."""
    return jax.jit(jax.value_and_grad(task.loss))(adapters)


def test_the_heads_loss_and_accuracy_are_those_of_softmax_regression(head):
    """Against scikit-learn, with the weight written out."""
    ((a, b),) = start = drawn(head.layers)
    scores = head.inputs @ (head.weight + SCALING * b @ a).T + head.bias[None]
    chances = softmax(scores, axis=1)
    np.testing.assert_allclose(head.loss(start), log_loss(head.labels, chances), rtol=1e-12)
    loss, accuracy = head.evaluate(start, head.inputs[:7], head.labels[:7])
    np.testing.assert_allclose(loss, log_loss(head.labels[:7], chances[:7], labels=range(CLASSES)), rtol=1e-12)
    assert accuracy == accuracy_score(head.labels[:7], np.argmax(scores[:7], 1))


def test_the_heads_linearised_task_is_minus_the_gradient_of_the_dense_loss(head):
    def dense(weight):
        return cross_entropy(head.inputs @ (head.weight + SCALING * weight).T + head.bias[None], head.labels)

    (task,) = head.linearised_task()
    np.testing.assert_allclose(task, -jax.grad(dense)(jnp.zeros(head.weight.shape)), atol=1e-14)


@pytest.mark.parametrize("gap", [1.0, 30.0])
def test_the_head_has_the_loss_and_the_rounding_floor_of_softmax_regression(gap):
    """Down to 1e-13, where a logarithm of sums that are as large as the logits would be wrong by tens of percent."""
    labels = np.arange(COUNT) % CLASSES
    inputs = np.eye(CLASSES)[labels]
    weight = 100.0 + gap * np.eye(CLASSES)
    head = HeadTask(inputs, labels, weight, np.zeros(CLASSES), SCALING)
    regression = SoftmaxRegression(inputs, labels, weight, SCALING)
    start = zero_adapters(head.layers, 1)
    floor = 100 * np.finfo(float).eps
    for task in (head, regression):
        np.testing.assert_allclose(rounding_floor(task, start), floor, rtol=1e-12, atol=0)
        np.testing.assert_allclose(
            task.loss(start), np.log1p(3 * np.exp(-gap)), rtol=1e-2 if gap > 10 else 1e-12, atol=0
        )


def test_the_rounding_floor_of_a_network_is_of_the_precision_that_it_computes_in(deep):
    floor = 100 * np.finfo(np.float32).eps
    np.testing.assert_allclose(rounding_floor(deep, drawn(deep.layers)), floor, rtol=1e-6, atol=0)


def test_lora_on_the_head_of_a_network_is_softmax_regression_on_its_features():
    """To single precision, which the network computes in."""
    model, x, labels = network(SHALLOW), images(12), np.arange(12) % 10
    inside = NetworkTask(model, x, labels, HEAD, SCALING)
    features = jax.jit(lambda x: model.features(x))
    outside = HeadTask(features(x), labels, model.head.kernel[...].T, model.head.bias[...], SCALING)
    assert inside.layers == outside.layers == ((10, 16),)
    start = drawn(inside.layers)
    (value, ((a, b),)), (expected, ((c, d),)) = (slope(one, start) for one in (inside, outside))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(a, c, atol=1e-5)
    np.testing.assert_allclose(b, d, atol=1e-5)
    np.testing.assert_allclose(eqx.filter_jit(inside.linearised_task)()[0], outside.linearised_task()[0], atol=1e-5)


def test_a_networks_linearised_task_is_minus_the_gradient_with_respect_to_its_weights(deep):
    def dense(kernels):
        changed = network(SHALLOW)
        for path, kernel in kernels.items():
            linear_layers(changed)[path].kernel[...] = kernel
        return cross_entropy(changed(deep.inputs), deep.labels)

    layers = linear_layers(network(SHALLOW))
    slopes = jax.jit(jax.grad(dense))({path: layers[path].kernel[...] for path in PATHS})
    assert deep.layers == ((16, 16), (32, 16), (10, 16))
    for path, task in zip(PATHS, eqx.filter_jit(deep.linearised_task)(), strict=True):
        np.testing.assert_allclose(task, -SCALING * slopes[path].T, atol=1e-6)
        assert jnp.abs(task).max() > 1e-3


def test_a_network_knows_its_weights_and_what_its_head_is_fed_with(deep):
    model = network(SHALLOW)
    features = np.asarray(model.features(deep.inputs), float)
    for path, weight in zip(PATHS, deep.weights, strict=True):
        np.testing.assert_array_equal(weight, linear_layers(model)[path].kernel[...].T)
    found = deep.layer_inputs[-1]
    np.testing.assert_allclose(found @ found.T, features @ features.T, atol=1e-4)
    assert deep.scaling == SCALING


def test_a_networks_loss_is_that_of_its_weights_with_the_products_added(deep):
    """Which the problem that it holds computes, by way of whole matrices."""
    start = drawn(deep.layers)
    (value, slopes), (expected, others) = slope(deep, start), slope(deep.network, start)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(slopes), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_networks_adapters_go_where_their_paths_say(deep):
    """The order is that of the patterns, here not that of the layers."""
    model, paths = network(SHALLOW), (HEAD, UP, QUERY)
    turned = NetworkTask(model, deep.inputs, deep.labels, paths, SCALING)
    given = adapters(model, paths)
    value = eqx.filter_jit(deep.loss)(tuple(given[path] for path in PATHS))
    np.testing.assert_allclose(eqx.filter_jit(turned.loss)(tuple(given[path] for path in paths)), value, rtol=1e-6)
    for path, (a, b) in given.items():
        kernel = linear_layers(model)[path].kernel
        kernel[...] = kernel[...] + jnp.asarray(SCALING * (b @ a).T, jnp.float32)
    np.testing.assert_allclose(value, cross_entropy(logits(model, deep.inputs), deep.labels), rtol=1e-5)


def test_a_task_leaves_the_model_that_it_was_made_of_alone():
    model = network(SHALLOW)
    before = np.asarray(model.head.kernel[...])
    NetworkTask(model, images(2), [0, 1], HEAD)
    np.testing.assert_array_equal(model.head.kernel[...], before)


def test_images_that_pass_in_chunks_give_the_same_loss_and_gradient(monkeypatch):
    """12 of them as two fives and a two."""
    shallow = network(dataclasses.replace(SHALLOW, depth=0))
    task = NetworkTask(shallow, images(12), np.arange(12) % 10, HEAD)
    start = drawn(task.layers)
    value, whole = slope(task, start)
    monkeypatch.setattr(module, "CHUNK", 5)
    chunked, parts = slope(task, start)
    np.testing.assert_allclose(chunked, value, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5)


def test_a_batch_of_everything_is_the_loss_and_batches_average_to_it(head):
    start = drawn(head.layers)
    everything = jnp.asarray(np.random.default_rng(0).permutation(COUNT))
    np.testing.assert_allclose(head.batch_loss(start, everything), head.loss(start), rtol=1e-12)
    parts = [head.batch_loss(start, part) for part in everything.reshape(4, 10)]
    np.testing.assert_allclose(np.mean(parts), head.loss(start), rtol=1e-12)
    assert np.ptp(parts) > 0.1


def test_the_flow_of_a_classifier_conserves_the_imbalance_to_the_solvers_tolerance(head):
    """A A^T - B^T B, for softmax regression as for any loss of B A."""
    start = drawn(head.layers)
    drifts = []
    for rtol in (1e-4, 1e-7):
        solved = solve(head, start, t1=20.0, saves=2, rtol=rtol, solver="Tsit5")
        assert solved.status == 0
        drifts.append(float(jnp.abs(solved.adapters[0].imbalance - start[0].imbalance).max()))
        assert drifts[-1] < rtol
    assert jnp.abs(solved.adapters[0].a - start[0].a).max() > 0.1
    assert solved.observables["loss"][1] < 0.8 * solved.observables["loss"][0]
    assert drifts[0] > 1e-9  # and is not zero by the method


def test_gradient_descent_with_a_small_step_and_the_flow_agree_to_first_order(head):
    """Halving the step halves the distance (Euler's method)."""
    start, t1 = gaussian_init(jax.random.key(0), head, rank=2, alpha=0.3), 10.0
    (flow,) = solve(head, start, t1=t1, saves=2, rtol=1e-10, solver="Tsit5").adapters
    distances = []
    for steps in (500, 1000):
        (found,), _ = train(
            head,
            jax.tree.map(lambda leaf: leaf[None], start),
            optimizer=optax.sgd(t1 / steps),
            saves=np.array([steps]),
            look=lambda task, adapters, _: {"loss": task.loss(adapters)},
        )
        distances.append(float(jnp.sqrt(sum(jnp.sum((x[0] - y) ** 2) for x, y in zip(found, flow, strict=True)))))
    assert distances[0] < 0.02
    np.testing.assert_allclose(distances[0] / distances[1], 2.0, rtol=0.05)


def test_what_does_not_fit_together_is_named(head):
    arguments = {"features": head.inputs, "labels": head.labels, "weight": head.weight, "bias": head.bias}
    for changed, message in (
        ({"features": head.inputs[:, :5]}, r"features must have 6 columns, got \(40, 5\)"),
        ({"bias": head.bias[:3]}, r"bias must have shape \(4,\), got \(3,\)"),
    ):
        with pytest.raises(InputError, match=message):
            HeadTask(**(arguments | changed))
    with pytest.raises(
        InputError, match=r"^layers must match a matrix of the parameters, such as .*, head, got 'neck'$"
    ):
        NetworkTask(network(SHALLOW), images(2), [0, 1], "neck")


@pytest.mark.parametrize(
    ("labels", "got"),
    [
        ([0, 1.5], r"float64 of shape \(2,\)"),
        ([0, CLASSES], f"0 to {CLASSES}"),
        ([-1, 0], "-1 to 0"),
        ([True, False], "entries of type bool"),
        ([[0, 1]], r"int64 of shape \(1, 2\)"),
        (np.ma.masked_array([0, 1], [False, True]), "an array with masked entries"),
        (np.array([0, 1], "timedelta64[s]"), r"entries of type timedelta64\[s\]"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, got):
    """Each of these would have counted as some class."""
    with pytest.raises(InputError, match=f"labels must be integers from 0 to {CLASSES - 1}, got {got}$"):
        HeadTask(np.ones((2, 3)), labels, np.ones((CLASSES, 3)), np.zeros(CLASSES))


@pytest.mark.parametrize("kind", [np.int8, ">i4", np.uint16, np.int64])
def test_labels_of_every_kind_of_integer_are_the_same_classes(kind):
    task = HeadTask(np.ones((2, 3)), np.array([0, 3], kind), np.ones((CLASSES, 3)), np.zeros(CLASSES))
    np.testing.assert_array_equal(task.labels, [0, 3])
