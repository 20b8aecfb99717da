"""Starts are the simulator's own, matched in norm; and what is measured of adapters, literally as it is defined."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from lora_flow_vision.measures import MEASURES, measure, misalignment, targets
from lora_flow_vision.settings import INITS
from lora_flow_vision.starts import STARTS, norm, start
from lora_flow_vision.task import Classification
from sklearn.metrics import log_loss

from lora_flow import Adapter, Adapters, InputError, SingleLayer, gaussian_init
from lora_flow.initialization.learned import LearnedStart

KEY, ALPHA = jax.random.key(5), 0.03
LAYERS = ((4, 6), (4, 6))
GRADIENTS = tuple(jnp.asarray(np.random.default_rng(i).standard_normal(shape)) for i, shape in enumerate(LAYERS))

misaligned = jax.jit(misalignment)


def starts(name, rank=2, alpha=ALPHA, gradients=GRADIENTS):
    return start(name, KEY, gradients, rank=rank, alpha=alpha)


compiled = functools.partial(jax.jit, static_argnums=(0, 1))(starts)


def svd(matrix):
    u, s, vt = np.linalg.svd(np.asarray(matrix), full_matrices=False)
    return u, s, vt.T


def test_each_start_has_its_name_in_the_settings():
    assert tuple(STARTS) == INITS


@pytest.mark.parametrize("side", ["A", "B"])
def test_gaussian_starts_are_the_simulators_on_each_layer_with_a_key_of_its_own(side):
    keys = jax.random.split(KEY, len(LAYERS))
    for key, gradient, found in zip(keys, GRADIENTS, starts(f"gaussian-{side}"), strict=True):
        (expected,) = gaussian_init(key, SingleLayer(gradient), rank=2, alpha=ALPHA, side=side)
        np.testing.assert_array_equal(found.a, expected.a)
        np.testing.assert_array_equal(found.b, expected.b)
        assert np.any(found.a) == (side == "A")
        assert np.any(found.b) == (side == "B")


@pytest.mark.parametrize("name", ["spectral", "lora-one"])
def test_matched_starts_have_the_root_mean_square_norm_of_a_gaussian_a(name):
    """E ||A||_F^2 = alpha^2 rank in; theirs is that in every draw and every layer, whatever the gradient's size."""
    scaled = tuple(1e-3 * gradient for gradient in GRADIENTS)
    for gradients in (GRADIENTS, scaled):
        for (_, n_in), adapter in zip(LAYERS, compiled(name, 3, ALPHA, gradients), strict=True):
            np.testing.assert_allclose(norm(adapter), ALPHA * np.sqrt(3 * n_in), rtol=1e-12)
            np.testing.assert_allclose(norm(adapter), np.linalg.norm(adapter.stacked), rtol=1e-12)


def test_the_root_mean_square_norm_of_a_gaussian_a_is_alpha_root_rank_in():
    """1000 draws of 12 entries: the mean of 12000 squares is 1 to within 4 sqrt(2/12000) = 5%."""
    draw = jax.vmap(lambda key: start("gaussian-A", key, GRADIENTS[:1], rank=2, alpha=ALPHA))
    (drawn,) = draw(jax.random.split(KEY, 1000))
    squares = jax.vmap(norm)(drawn) ** 2
    np.testing.assert_allclose(jnp.mean(squares), ALPHA**2 * 2 * 6, rtol=0.05)


@pytest.mark.parametrize("name", list(STARTS))
def test_alpha_only_scales_a_start(name):
    for small, large in zip(*(compiled(name, 3, alpha, GRADIENTS) for alpha in (ALPHA, 100 * ALPHA)), strict=True):
        np.testing.assert_allclose(100 * small.a, large.a, rtol=1e-12)
        np.testing.assert_allclose(100 * small.b, large.b, rtol=1e-12)


def test_spectral_rows_lie_along_the_gradients_right_singular_vectors_and_b_is_zero():
    for gradient, (a, b) in zip(GRADIENTS, compiled("spectral", 3, ALPHA, GRADIENTS), strict=True):
        overlaps = np.abs(np.asarray(a) @ svd(gradient)[2][:, :3])
        np.testing.assert_allclose(overlaps, np.diag(np.linalg.norm(a, axis=1)), atol=1e-15)
        assert np.all(np.diag(overlaps) > 1e-4)
        assert not np.any(b)


def test_spectral_takes_the_first_directions_of_a_gradient_in_single_precision_too():
    """What rounding leaves of the others is no direction to learn."""
    single = tuple(gradient.astype(jnp.float32) for gradient in GRADIENTS)
    for one, other in zip(starts("spectral", gradients=single), starts("spectral"), strict=True):
        np.testing.assert_allclose(np.abs(one.a), np.abs(other.a), atol=1e-6 * ALPHA)


def test_lora_one_starts_are_aligned_balanced_and_along_the_gradient():
    """Their update is a multiple of the best approximation of the negative gradient, so that the loss falls at once."""
    found = compiled("lora-one", 3, ALPHA, GRADIENTS)
    for gradient, adapter, aim in zip(GRADIENTS, found, targets(GRADIENTS, 3), strict=True):
        u, s, v = svd(gradient)
        best = (u[:, :3] * s[:3]) @ v[:, :3].T
        update = np.asarray(adapter.b @ adapter.a)
        np.testing.assert_allclose(update / np.linalg.norm(update), best / np.linalg.norm(best), atol=1e-14)
        np.testing.assert_allclose(adapter.imbalance, np.zeros((3, 3)), atol=1e-16)
        np.testing.assert_allclose(misaligned(adapter, aim), 0.0, atol=1e-7)  # the root of a rounding


def test_a_learned_rule_starts_a_layer_of_any_shape_at_the_norm_of_the_others(tmp_path):
    """A rule that is LoRA-One's, learned on two layers of other shapes."""
    learned = tuple(Adapter(np.ones((1, 2)), np.ones((3, 1))) for _ in range(2))
    numbers = {"mix": np.array(np.pi / 4), "power": np.array(0.5), "layers": np.zeros(2)}
    LearnedStart(learned, 1e-3, numbers).save(tmp_path)
    for one, other in zip(starts(f"learned:{tmp_path}"), starts("lora-one"), strict=True):
        np.testing.assert_allclose(one.stacked, other.stacked, atol=1e-12 * ALPHA)


@pytest.mark.parametrize("name", ["gaussian-B", "spectral"])
def test_starts_can_be_drawn_for_many_seeds_and_scales_in_one_program(name):
    draw = jax.jit(jax.vmap(lambda key, alpha: start(name, key, GRADIENTS, rank=2, alpha=alpha)))
    keys, alphas = jax.random.split(KEY, 3), jnp.array([0.1, 1.0, 10.0])
    together = draw(keys, alphas)
    for lane in range(3):
        alone = start(name, keys[lane], GRADIENTS, rank=2, alpha=alphas[lane])
        for one, other in zip(together, alone, strict=True):
            np.testing.assert_allclose(one.stacked[lane], other.stacked, rtol=1e-10, atol=1e-12)


def test_what_no_start_can_be_drawn_for_is_named():
    with pytest.raises(
        InputError, match=r"init must be 'gaussian-A', .* or 'lora-one' or learned:FOLDER, got 'gaussian' "
    ):
        starts("gaussian")
    with pytest.raises(InputError, match="rank must lie between 1 and 4, the smallest layer dimension, got 5"):
        starts("gaussian-A", rank=5)
    with pytest.raises(InputError, match="shift must have a non-zero entry, got nothing to learn"):
        starts("lora-one", gradients=(jnp.zeros((4, 6)),))


def by_definition(adapter, gradient):
    """Equation 215 of arXiv 2503.06982, with the projectors written out."""
    rank = adapter.rank
    u, _, v = svd(gradient)
    target = np.concatenate([u[:, :rank], v[:, :rank]]) / np.sqrt(2)
    found = svd(np.concatenate([adapter.b, np.asarray(adapter.a).T]))[0][:, :rank]
    return np.linalg.norm(found @ found.T - target @ target.T) / np.sqrt(2 * rank)


def drawn(shape, rank, seed):
    rng, (n_out, n_in) = np.random.default_rng(seed), shape
    return Adapter(jnp.asarray(rng.standard_normal((rank, n_in))), jnp.asarray(rng.standard_normal((n_out, rank))))


@pytest.mark.parametrize("rank", [1, 3])
def test_misalignment_is_equation_215(rank):
    """For adapters that are drawn, and for nearly aligned ones."""
    for shape, gradient, aim in zip(LAYERS, GRADIENTS, targets(GRADIENTS, rank), strict=True):
        for seed in range(5):
            for push in (0.0, 3.0):
                a, b = drawn(shape, rank, seed)
                adapter = Adapter(a + push * aim[shape[0] :].T, b + push * aim[: shape[0]])
                np.testing.assert_allclose(misaligned(adapter, aim), by_definition(adapter, gradient), rtol=1e-10)


def test_misalignment_is_0_on_the_targets_span_and_1_where_orthogonal_to_it():
    """[U; V] spans the same for every mix of its columns; [U; -V] is orthogonal to it."""
    (aim,) = targets(GRADIENTS[:1], 2)
    u, v = aim[:4], aim[4:]
    mix = jnp.array([[2.0, -1.0], [0.5, 3.0]])
    np.testing.assert_allclose(misaligned(Adapter((v @ mix).T, u @ mix), aim), 0.0, atol=1e-7)
    np.testing.assert_allclose(misaligned(Adapter(-(v @ mix).T, u @ mix), aim), 1.0, rtol=1e-14)
    np.testing.assert_allclose(misaligned(Adapter(jnp.zeros((2, 6)), jnp.zeros((4, 2))), aim), 1.0, rtol=1e-14)


def test_misalignment_does_not_depend_on_size_or_on_a_rotation_within_the_rank():
    adapter, (aim,) = drawn(LAYERS[0], 2, seed=0), targets(GRADIENTS[:1], 2)
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    for size in (1e-6, 1e6):
        scaled = Adapter(size * turn.T @ adapter.a, size * adapter.b @ turn)
        np.testing.assert_allclose(misaligned(scaled, aim), misaligned(adapter, aim), rtol=1e-12)
    assert 0.5 < misaligned(adapter, aim) < 1.0


class Fixed(Classification):
    """Two layers, and logits that are the inputs: what is measured of the adapters is then the adapters' alone."""

    weight: Array

    @property
    def layers(self):
        return LAYERS

    def logits(self, adapters: Adapters, inputs: Array) -> Array:
        return inputs @ self.weight


def test_all_is_measured_as_it_is_named():
    rng = np.random.default_rng(0)
    (x, y), (labels, others) = rng.standard_normal((2, 9, 3)), rng.integers(0, 3, (2, 9))
    adapters = tuple(drawn(shape, 2, seed) for seed, shape in enumerate(LAYERS))
    task, aims = Fixed(jnp.asarray(x), jnp.asarray(labels), jnp.eye(3)), targets(GRADIENTS, 2)
    seen = jax.jit(measure)(task, (jnp.asarray(y), jnp.asarray(others)), aims, adapters)
    chances = [np.exp(one) / np.exp(one).sum(1, keepdims=True) for one in (x, y)]
    z = [np.linalg.norm(np.concatenate([b, np.asarray(a).T])) for a, b in adapters]
    expected = {
        "train_loss": log_loss(labels, chances[0], labels=range(3)),
        "test_loss": log_loss(others, chances[1], labels=range(3)),
        "train_accuracy": np.mean(x.argmax(1) == labels),
        "test_accuracy": np.mean(y.argmax(1) == others),
        "alignment": np.mean([by_definition(one, g) for one, g in zip(adapters, GRADIENTS, strict=True)]),
        "norm_z": np.sqrt(np.mean(np.square(z))),
        "norm_update": np.sqrt(np.mean([np.linalg.norm(b @ a) ** 2 for a, b in adapters])),
    }
    assert seen.keys() == MEASURES.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(seen[name], value, rtol=1e-6, err_msg=name)
