"""Three tasks in turn: what is forgotten and what is learned, by flow and by descent."""

import functools

import jax
import numpy as np
import pytest

from lora_flow import (
    Adapter,
    InputError,
    Protected,
    ProtectedInputs,
    SafeGradient,
    Tasks,
    gaussian_init,
    learn_in_turn,
    tasks_problem,
)

KEY = jax.random.key(1)
HOW = {"flow": {"t1": 150.0, "saves": 3}, "descent": {"steps": 1500, "step": 0.1, "saves": 3}}
by = pytest.mark.parametrize("how", HOW.values(), ids=HOW)


def with_b(size, key, problem, rank, alpha):
    """A Gaussian, and a B of entries of this size, by whose Gram matrix the exact rule divides."""
    ((a, b),) = gaussian_init(key, problem, rank=rank, alpha=alpha)
    return (Adapter(a, size * jax.random.normal(jax.random.fold_in(key, 1), b.shape)),)


@pytest.fixture(scope="module", params=[0.0, 0.5])
def tasks(request):
    return request.param, tasks_problem(jax.random.key(0), m=10, n=16, overlap=request.param)


@by
def test_the_safe_start_forgets_nothing_and_learns_all(tasks, how):
    _, sequence = tasks
    learned = learn_in_turn(sequence, KEY, rank=4, alpha=0.3, **how)
    assert learned.losses.shape == (4, 3)
    assert np.all(learned.status == 0)
    np.testing.assert_allclose(learned.forgetting, 0, atol=1e-10)
    np.testing.assert_allclose(learned.when_learned, 0, atol=1e-6)
    assert [basis.shape[1] for basis in learned.bases] == [0, 4, 8]
    np.testing.assert_allclose(learned.losses[-1], learned.tasks.losses(), atol=1e-14)
    for j, run in enumerate(learned.runs):
        seen = [run.observables[f"loss_{i}"][-1] for i in (1, 2, 3)]
        np.testing.assert_allclose(learned.losses[j + 1], seen, atol=1e-12)
    assert str(learned).count("\n") == 3
    assert "after 3 tasks: losses" in str(learned)
    assert "success, 8 protected" in str(learned)


@by
def test_plain_lora_forgets_even_orthogonal_tasks(tasks, how):
    overlap, sequence = tasks
    learned = learn_in_turn(sequence, KEY, rank=4, alpha=0.3, flow="plain", away=False, **how)
    np.testing.assert_allclose(learned.when_learned, 0, atol=1e-6)
    assert np.all(learned.forgetting[:2] > (0.003 if overlap == 0 else 0.03))


@pytest.mark.long
@by
def test_the_exact_rule_from_a_generic_start_cannot_learn(tasks, how):
    """k = 4 = r: B's columns never turn. Only what lies in them by chance is learned. B(0) A(0) alone forgets."""
    _, sequence = tasks
    rule = {"away": False, "flow": lambda tasks, basis: Protected(basis, exact=True, damping=1e-6)}
    forgotten = []
    for size in (1e-3, 1e-4):
        learned = learn_in_turn(sequence, KEY, rank=4, alpha=0.3, init=functools.partial(with_b, size), **rule, **how)
        assert learned.when_learned[0] < 1e-6
        assert np.all(learned.when_learned[1:] > 0.05)
        forgotten.append(np.max(np.abs(learned.forgetting)))
    assert forgotten[0] < 2e-3
    assert forgotten[1] < 0.2 * forgotten[0]  # it goes with B(0)


def test_a_class_may_make_the_flow_of_each_task():
    sequence = tasks_problem(jax.random.key(0), m=5, n=8, count=2, width=2)
    asked = {"rank": 2, "alpha": 0.3, "away": False, "steps": 3, "step": 0.1}
    made = learn_in_turn(sequence, KEY, flow=SafeGradient, **asked)
    same = learn_in_turn(sequence, KEY, flow=lambda tasks, basis: SafeGradient(tasks, basis), **asked)
    np.testing.assert_array_equal(made.losses, same.losses)


def test_inputs_that_are_protected_before_stay_protected():
    sequence = tasks_problem(jax.random.key(0), m=10, n=16, count=1)
    old = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 2)))[0]
    learned = learn_in_turn(
        sequence, KEY, rank=4, alpha=0.3, inputs=ProtectedInputs(16).extend(old.T), t1=50.0, saves=2
    )
    assert [basis.shape[1] for basis in learned.bases] == [2]
    np.testing.assert_allclose(np.asarray(learned.tasks.weight - sequence.weight) @ old, 0, atol=1e-10)


def test_they_are_learned_from_the_first_on():
    sequence = tasks_problem(jax.random.key(0), m=5, n=8, count=1)
    again = Tasks(sequence.weight, [(sequence.weight + shift, None) for shift in sequence.shifts])
    first = learn_in_turn(again, KEY, rank=2, alpha=0.3, t1=1.0, saves=2)
    second = learn_in_turn(first.tasks, KEY, rank=2, alpha=0.3, t1=1.0, saves=2)
    assert second.losses[0] == first.losses[-1]
    assert second.losses[1] < second.losses[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "t1 or steps must be given, and not both, got neither"),
        ({"t1": 1.0, "steps": 2}, "t1 or steps must be given, and not both, got steps, t1"),
        (
            {"t1": 1.0, "inputs": ProtectedInputs(5)},
            "inputs must be an estimate of 8 inputs, those of the layer, got 5",
        ),
    ],
)
def test_bad_arguments_get_one_line(change, message):
    sequence = tasks_problem(jax.random.key(0), m=5, n=8, count=1)
    with pytest.raises(InputError, match=f"^{message}"):
        learn_in_turn(sequence, KEY, rank=2, alpha=0.3, **change)
