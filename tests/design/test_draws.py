"""What a curve shows of an unknown draw: two sizes along the task, of the chi distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi

from lora_flow import Factorization, aligned_problem, gaussian_init, misaligned
from lora_flow.design.draws import _sized, along_task, directions, start_along, unlikely, why_not_along
from lora_flow.dynamics.flows import as_flow
from lora_flow.dynamics.lanes import solve_lanes, stack
from lora_flow.initialization import as_scheme

TIMES = np.linspace(0.0, 1.0, 21)


def losses(problem, starts):
    return np.asarray(solve_lanes(problem, stack(starts), TIMES, rtol=1e-6, keep=("loss",)).observables["loss"])


@pytest.mark.parametrize("rank", [1, 4])
def test_its_square_is_twice_the_loss_of_log_likelihood(rank):
    ratio = np.geomspace(0.05, 6.0, 40) * np.sqrt(rank)
    log_density = chi(rank).logpdf(ratio) + np.log(ratio)  # of the ratio's logarithm
    likeliest = chi(rank).logpdf(np.sqrt(rank)) + 0.5 * np.log(rank)
    np.testing.assert_allclose(unlikely(jnp.log(ratio), rank) ** 2, 2 * (likeliest - log_density), rtol=1e-9, atol=1e-9)


def test_it_is_smooth_through_the_likeliest_ratio():
    slope = jax.vmap(jax.grad(lambda x: unlikely(x, 4)))(0.5 * jnp.log(4) + jnp.linspace(-2e-3, 2e-3, 9))
    np.testing.assert_allclose(slope, np.sqrt(2 * 4) * (1 + 2 / 3 * np.linspace(-2e-3, 2e-3, 9)), rtol=2e-5)


@pytest.mark.parametrize("side", ["A", "B"])
def test_until_the_task_is_learned_a_run_is_that_of_its_two_sizes(side):
    """A run of any rank is that of 1 x 1 matrices, within 0.5 % while the loss is above a thousandth of its start."""
    problem = aligned_problem(jax.random.key(0), delta_w=0.6)
    v, g, u = directions(problem)
    starts = [gaussian_init(jax.random.key(i), problem, rank=4, alpha=1e-3, side=side) for i in range(3)]
    if side == "A":
        sizes = [[np.linalg.norm(one.a @ x) for one, x in zip(start, (v, g), strict=True)] for start in starts]
    else:
        sizes = [[np.linalg.norm(x @ one.b) for one, x in zip(start, (g, u), strict=True)] for start in starts]
    whole = losses(problem, starts)
    alone = losses(along_task(problem), [start_along(jnp.asarray(one), side) for one in sizes])
    seen = whole > 1e-3 * whole[:, :1]
    assert seen.sum() > 30
    np.testing.assert_allclose(alone[seen], whole[seen], rtol=5e-3)


def test_the_layers_may_change_places():
    """The run along the task is the same with the gains exchanged, and the sizes."""
    one, other = (Factorization(*(np.full((1, 1), x) for x in gains)) for gains in ((1.5, 3.0, 4.0), (3.0, 1.5, 4.0)))
    turned = [losses(one, [start_along(jnp.array([1e-3, 4e-3]), "A")])]
    turned += [losses(other, [start_along(jnp.array([4e-3, 1e-3]), "A")])]
    np.testing.assert_allclose(*turned, rtol=1e-6)


def test_a_part_is_scaled_and_the_rest_stays():
    columns, direction = jax.random.normal(jax.random.key(0), (5, 3)), jnp.eye(5)[2]
    sized = _sized(columns, direction, jnp.asarray(0.3))
    np.testing.assert_allclose(jnp.linalg.norm(sized[2]), 0.3)
    np.testing.assert_array_equal(jnp.delete(sized, 2, axis=0), jnp.delete(columns, 2, axis=0))


def test_a_draw_is_more_than_two_numbers_elsewhere():
    problem, gaussian, plain = (
        aligned_problem(jax.random.key(0), m=3, n=3, h=4),
        as_scheme("gaussian"),
        as_flow("plain"),
    )
    assert not why_not_along(problem, gaussian, plain)
    assert "orthogonal" in why_not_along(problem, as_scheme("orthogonal"), plain)
    assert "ScaledGD" in why_not_along(problem, gaussian, as_flow("scaled:1e-3"))
    turned = misaligned(problem, jax.random.key(0), angle=20.0)
    assert "not aligned" in why_not_along(turned, gaussian, plain)
    two = aligned_problem(jax.random.key(0), m=3, n=3, h=4, component=(0, 1))
    assert "rank above 1" in why_not_along(two, gaussian, plain)
