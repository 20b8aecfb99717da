"""The initialisations against PEFT's own: the same factors from the same weight, gradient, inputs or draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lora_flow import (
    Regression,
    SingleLayer,
    eva_init,
    gaussian_init,
    gora_init,
    lora_ga_peft_init,
    olora_init,
    orthogonal_init,
    pissa_init,
)

KEY = jax.random.key(7)
RANK, SCALING = 4, 0.75
SHAPES = ((8, 12), (12, 8))  # (out, in); 4 r is not less than the smaller, and PEFT's random decomposition exact
SINGLE = 1e-5  # of the largest entry: PEFT's rounding of 1e-7, times what a gap to the next singular value makes of it


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """Here and not above, where every worker would wait for them though one runs this file."""
    global torch, peft
    torch, peft = map(pytest.importorskip, ("torch", "peft"))


def draw(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape)


def spread(seed, shape):
    """A matrix with singular values 3 to 1, none of them close to another."""
    u, _, vt = np.linalg.svd(draw(seed, shape), full_matrices=False)
    return u * np.linspace(3, 1, min(shape)) @ vt


def adapted(weight, init, gradient=None, rank=RANK, **config):
    """A model of one layer with that weight, `(out, in)`, which PEFT has adapted."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(*weight.shape[::-1], bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.from_numpy(weight))
    if gradient is not None:
        model[0]._peft_loraga_grad = torch.from_numpy(gradient).float()
    alpha = SCALING * rank  # the scaling is lora_alpha/r
    return peft.get_peft_model(
        model, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], init_lora_weights=init, **config)
    )


def factors(model):
    """(A, B) and the frozen weight."""
    layer = model.base_model.model[0]
    assert layer.scaling["default"] == SCALING
    parts = layer.lora_A["default"], layer.lora_B["default"], layer.base_layer
    return tuple(part.weight.detach().double().numpy() for part in parts)


def assert_same(start, model, weight):
    """Rank-one pairs that differ by no more than a sign, and the weight less s times their sum."""
    a, b, frozen = factors(model)
    ((our_a, our_b),) = start
    ours, theirs = np.einsum("ij,jk->jik", our_b, our_a), np.einsum("ij,jk->jik", b, a)
    ours *= np.sign(np.sum(ours * theirs, axis=(1, 2), keepdims=True))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=SINGLE * np.abs(theirs).max())
    np.testing.assert_allclose(np.linalg.norm(our_a, axis=1), np.linalg.norm(a, axis=1), rtol=10 * SINGLE)
    np.testing.assert_allclose(np.linalg.norm(our_b, axis=0), np.linalg.norm(b, axis=0), rtol=10 * SINGLE)
    left = weight - SCALING * ours.sum(axis=0)
    np.testing.assert_allclose(frozen, left, rtol=0, atol=SINGLE * np.abs(weight).max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("init", "mine"), [("pissa", pissa_init), ("olora", olora_init)])
def test_from_the_weight(shape, init, mine):
    weight = spread(0, shape)
    ((a, b),) = start = mine(KEY, SingleLayer(np.ones(shape), SCALING, weight), rank=RANK, alpha=1.0)
    model = adapted(weight, init)
    assert_same(start, model, weight)
    their_a, their_b, _ = factors(model)
    np.testing.assert_allclose(b @ a, their_b @ their_a, rtol=0, atol=SINGLE * np.abs(b @ a).max())  # signs included


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_ga_from_the_gradient(shape):
    """Which PEFT is handed, dL/dW of a regression."""
    weight, shift, inputs = draw(0, shape), spread(1, shape), draw(2, (60, shape[1]))
    start = lora_ga_peft_init(KEY, Regression(inputs, shift, weight, scaling=SCALING), rank=RANK, alpha=1.0)
    gradient = inputs.T @ inputs @ -shift.T / 60
    config = peft.LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=1)
    assert_same(start, adapted(weight, "lora_ga", gradient.T, lora_ga_config=config), weight)


@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False")
def test_eva_from_the_inputs():
    """PEFT subtracts the inputs' mean: of inputs without one the directions are the same."""
    inputs = spread(0, (64, 8))
    inputs -= inputs.mean(axis=0)
    model = adapted(draw(1, (12, 8)), "eva", eva_config=peft.EvaConfig(rho=1.0, tau=0.999))
    batch = {"input": torch.from_numpy(inputs).float()}
    how = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}
    peft.initialize_lora_eva_weights(model, [batch], **how)
    start = eva_init(KEY, Regression(inputs, np.ones((12, 8)), scaling=SCALING), rank=RANK, alpha=1.0)
    a, b, _ = factors(model)
    ((our_a, our_b),) = start
    signs = np.sign(np.sum(our_a * a, axis=1, keepdims=True))
    np.testing.assert_allclose(signs * our_a, a, rtol=0, atol=SINGLE)
    assert not np.any(b)
    assert not jnp.any(our_b)


def test_orthogonal_from_the_same_draws(monkeypatch):
    weight, drawn, randn = draw(0, (12, 8)), [], torch.randn

    def recorded(*shape, **how):
        drawn.append(randn(*shape, **how))
        return drawn[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", recorded)
        model = adapted(weight, "orthogonal")
    x, n, m = (one.double().numpy() for one in drawn)
    draws = iter((x, n, m.T))
    with monkeypatch.context() as patch:
        patch.setattr(jax.random, "normal", lambda key, shape: jnp.asarray(next(draws)).reshape(shape))
        ((our_a, our_b),) = orthogonal_init(KEY, SingleLayer(np.ones((12, 8))), rank=RANK, alpha=1.0)
    a, b, frozen = factors(model)
    np.testing.assert_allclose(our_a, a, rtol=0, atol=SINGLE)
    np.testing.assert_allclose(our_b, b, rtol=0, atol=SINGLE)
    np.testing.assert_allclose(b @ a, 0.0, atol=SINGLE)
    np.testing.assert_allclose(frozen, weight, rtol=0, atol=SINGLE)


def test_gaussian_has_the_same_distribution():
    """Standard deviation 1/r, B = 0."""
    a, b, _ = factors(adapted(draw(0, (8, 2000)), "gaussian"))
    ((our_a, our_b),) = gaussian_init(KEY, SingleLayer(np.ones((8, 2000))), rank=RANK, alpha=1 / RANK)
    assert stats.ks_2samp(np.ravel(a), np.ravel(our_a)).pvalue > 1e-3
    assert not np.any(b)
    assert not jnp.any(our_b)


def test_gora_draws_a_as_lora_does_by_default():
    """Uniform in ±1/sqrt(in); B is the one that PEFT leaves zero."""
    a, b, _ = factors(adapted(draw(0, (8, 2000)), True))
    ((our_a, _),) = gora_init(KEY, SingleLayer(np.ones((8, 2000))), rank=RANK, alpha=1.0)
    assert stats.ks_2samp(np.ravel(a), np.ravel(our_a)).pvalue > 1e-3
    assert not np.any(b)
