"""What all theorems about linear networks share: every bound holds on random problems, the misprinted one does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_networks import (
    C1,
    C2,
    SHAPES,
    STARTS,
    WIDE,
    Problem,
    below,
    draw_problem,
    each,
    imbalance,
    loss,
    numpy_results,
    problems,
    tau_ends,
)

from lora_flow.theory import linear_descent as descent
from lora_flow.theory import linear_flow as flow
from lora_flow.theory import linear_local as local
from lora_flow.theory import linear_networks as nets


def at_point(x, y, w1, w2):
    n, m = w1.shape[0], w2.shape[1]
    w, spectrum = w1 @ w2, nets.imbalance_spectrum(w1, w2)
    s_m, s_n, s_1 = nets.singular_values(w, m, n, 1)
    smallest = jnp.linalg.svd(w, compute_uv=False)[-1]
    return {
        "alpha": nets.alpha(spectrum, s_m, s_n, n, m),
        "printed": nets.alpha_as_printed(spectrum, smallest, n, m),
        "beta": nets.beta(spectrum, s_1),
        "ends": jnp.stack([nets.tau_smallest(w1, w2), nets.tau_largest(w1, w2)]),
        "tau": nets.tau(w, w1, w2),
        "imbalance": nets.imbalance(w1, w2),
        "spectrum": spectrum,
        "loss": nets.loss(x, y, w1, w2),
        "gradients": nets.gradients(x, y, w1, w2),
        "slopes": jax.grad(lambda w1, w2: 0.5 * jnp.sum((y - x @ w1 @ w2) ** 2), argnums=(0, 1))(w1, w2),
        "curvature": nets.curvature(x),
    }


point = numpy_results(at_point)


@each(400)
@given(problems())
def test_alpha_and_beta_enclose_the_spectrum_of_tau(drawn):
    p, _ = drawn
    at = point(*p)
    ends = tau_ends(p.w1, p.w2)
    np.testing.assert_allclose(at["ends"], ends, atol=1e-12 * ends[1])
    np.testing.assert_allclose(at["tau"], p.w1 @ (p.w2 @ p.w2.T + p.w1.T @ p.w1) @ p.w2, atol=1e-12 * ends[1] ** 2)
    assert below(at["alpha"], ends[0], ends[1])
    assert below(ends[1], at["beta"])
    assert at["alpha"] >= 0


def test_the_printed_alpha_is_a_bound_for_square_products_only():
    """The document's counts: none of 813 for n = m, 1679 of 3187 otherwise."""
    broken = {True: [], False: []}
    for seed in range(40):
        for shape in SHAPES:
            for start in STARTS[:4]:
                p = draw_problem(seed, shape, start, 1.0)
                at = point(*p)
                lowest, highest = tau_ends(p.w1, p.w2)
                broken[shape.n == shape.m].append(not below(at["printed"], lowest, highest))
    assert not any(broken[True])
    assert 0.2 < np.mean(broken[False]) < 0.8, np.mean(broken[False])


@each()
@given(problems(shapes=(SHAPES[-1],)))
def test_alpha_is_the_eigenvalue_itself_for_scalars(drawn):
    """And the exact rate of Min et al. 2021 is twice that, times S."""
    p, _ = drawn
    at, u, v = point(*p), p.w1.item(), p.w2.item()
    assert at["alpha"] == pytest.approx(u**2 + v**2, rel=1e-12)
    assert flow.scalar_rate(u**2 - v**2, u * v, p.x.item() ** 2) == pytest.approx(
        2 * p.x.item() ** 2 * (u**2 + v**2), rel=1e-12
    )


@each()
@given(problems())
def test_loss_gradients_imbalance_and_curvature_are_what_they_are_called(drawn):
    p, shape = drawn
    at = point(*p)
    assert at["loss"] == pytest.approx(loss(p), rel=1e-12)
    for ours, theirs in zip(at["gradients"], at["slopes"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-11 * np.abs(theirs).max())
    np.testing.assert_allclose(at["imbalance"], imbalance(p), atol=1e-12 * np.abs(imbalance(p)).max() + 1e-14)
    spectrum = np.linalg.eigvalsh(imbalance(p))
    found = np.append(at["spectrum"], np.zeros(max(0, shape.h - shape.n - shape.m)))
    np.testing.assert_allclose(np.sort(found), spectrum, atol=1e-12 * np.sum(p.w1**2 + 0) + 1e-12 * np.sum(p.w2**2))
    hessian = np.linalg.eigvalsh(p.x.T @ p.x)
    np.testing.assert_allclose(at["curvature"], [max(hessian[0], 0), hessian[-1]], atol=1e-12 * hessian[-1])


def test_gaps_of_a_spectrum_by_hand():
    """h = 6, eigenvalues 5, 3, 1, 0, -2, -4, zeros given or left out; n = 2, m = 2 and n = 3, m = 1."""
    for spectrum in ([5.0, 3.0, 1.0, 0.0, -2.0, -4.0], [-4.0, 1.0, 5.0, -2.0, 3.0]):
        assert nets.gaps(np.array(spectrum), 2, 2) == (3 + 2, 5 - 3, 4 - 2)
        assert nets.gaps(np.array(spectrum), 3, 1) == (1 + 4, 5 - 1, 4 - 4)
        assert nets.gaps(np.array(spectrum), 8, 9) == (0, 5, 4)
    spectrum = np.array([5.0, 3.0, 1.0, -2.0, -4.0])
    by_hand = 0.5 * (-2 + np.sqrt(49 + 4 * 9)) + 0.5 * (-2 + np.sqrt(49 + 4 * 0.25))
    assert nets.alpha(spectrum, 3.0, 0.5, 2, 2) == pytest.approx(by_hand, rel=1e-14)
    assert nets.alpha(spectrum, 0.5, 3.0, 3, 1) != nets.alpha(spectrum, 3.0, 0.5, 3, 1)
    assert nets.beta(spectrum, 1.5) == pytest.approx(0.5 * (5 + np.sqrt(34)) + 0.5 * (4 + 5), rel=1e-14)


polynomial_root = jax.jit(nets.root_of_increasing)


@each()
@given(
    st.lists(st.floats(-6, 6), min_size=3, max_size=3),
    st.floats(-6, 6),
    st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_the_root_of_an_increasing_polynomial(exponents, where, kept):
    """Coefficients over twelve decades and zeros among them; no root is lost however far it is from any one term's."""
    coefficients = [10**e * k for e, k in zip(exponents, (True, *kept[1:]), strict=True)]
    root = 10**where
    target = sum(c * root ** (i + 1) for i, c in enumerate(coefficients))
    assert float(polynomial_root(target, tuple(coefficients))) == pytest.approx(root, rel=1e-12)
    assert polynomial_root(0.0, tuple(coefficients)) == 0


@pytest.mark.long
def test_all_of_it_can_be_jitted_mapped_and_differentiated():
    """The relative derivatives of rates and roots along one direction, summed, against a central difference."""
    shape = WIDE[1]
    p = draw_problem(4, shape, "gaussian", 1.0)
    towards = Problem(*(np.random.default_rng(9).standard_normal(matrix.shape) for matrix in p))

    def summary(x, y, w1, w2):
        reduced = flow.reduce(x, y, w1, w2, shape.rank)
        x, y, u1, w2 = reduced.network
        start = descent.constants(x, y, u1, w2)
        theorem = local.constants(nets.curvature(x), start.loss, jnp.linalg.solve(x, y), u1, w2)
        steps = *descent.largest_step(start, C1, C2), *local.largest_step(theorem)
        smooth = local.smoothness(theorem.K, theorem.loss, u1, w2).step()
        best = descent.current_rate_bound(x, y, u1, w2).best_step()
        drift = local.Schedule(theorem, 0.5 * steps[2]).imbalance_drift_bound()
        return jnp.log(jnp.stack([flow.global_rate(reduced), *steps, smooth, best, drift]))

    points = Problem(*(np.stack([a + by * b for by in (1e-6, 0, -1e-6)]) for a, b in zip(p, towards, strict=True)))
    ahead, here, behind = np.sum(jax.jit(jax.vmap(summary))(*points), axis=1)
    value, slopes = jax.jit(jax.value_and_grad(lambda p: jnp.sum(summary(*p))))(p)
    assert float(value) == pytest.approx(float(here), rel=1e-9)
    slope = sum(np.sum(a * b) for a, b in zip(slopes, towards, strict=True))
    assert float(slope) == pytest.approx(float(ahead - behind) / 2e-6, rel=1e-6)
