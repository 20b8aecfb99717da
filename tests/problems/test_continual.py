"""Tasks in turn as a problem, random tasks with overlapping inputs, and the estimate of what past inputs span."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_flow import Adapter, InputError, ProtectedInputs, Regression, Tasks, solve, tasks_problem

M, N, RANK = 4, 6, 2


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


WEIGHT = random(0, M, N)
SOLUTIONS, INPUTS = (random(1, M, N), random(2, M, N)), (random(3, 9, N), random(4, 3, N))
TASKS = Tasks(WEIGHT, list(zip(SOLUTIONS, INPUTS, strict=True)), scaling=2.0)
NOW = Adapter(jnp.asarray(random(5, RANK, N)), jnp.asarray(random(6, M, RANK)))


def loss(j, weight):
    return np.sum((INPUTS[j] @ (SOLUTIONS[j] - weight).T) ** 2) / (2 * len(INPUTS[j]))


class TestTasks:
    def test_losses_are_those_of_regressions(self):
        weight = WEIGHT + 2 * np.asarray(NOW.b @ NOW.a)
        for j in (0, 1):
            tasks = Tasks(WEIGHT, list(zip(SOLUTIONS, INPUTS, strict=True)), now=j, scaling=2.0)
            one = Regression(INPUTS[j], SOLUTIONS[j] - WEIGHT, scaling=2.0)
            np.testing.assert_allclose(tasks.loss((NOW,)), loss(j, weight), rtol=1e-12)
            np.testing.assert_allclose(tasks.loss((NOW,)), one.loss((NOW,)), rtol=1e-12)
            for ours, theirs in zip(tasks.field((NOW,))[0], one.field((NOW,))[0], strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-10)
            np.testing.assert_allclose(tasks.lowest_loss(1), one.lowest_loss(1), rtol=1e-10)
            np.testing.assert_allclose(tasks.smoothness(), one.smoothness(), rtol=1e-10)
            np.testing.assert_allclose(tasks.second_moments, INPUTS[j].T @ INPUTS[j] / len(INPUTS[j]), atol=1e-12)
        seen = TASKS.observe((NOW,))
        np.testing.assert_allclose([seen["loss_1"], seen["loss_2"]], [loss(0, weight), loss(1, weight)], rtol=1e-12)
        assert set(TASKS.meanings()) == set(seen)

    def test_merging_changes_no_loss_and_turns_to_the_next(self):
        merged = TASKS.merged((NOW,))
        np.testing.assert_allclose(merged.weight, WEIGHT + 2 * np.asarray(NOW.b @ NOW.a), rtol=1e-12)
        np.testing.assert_allclose(merged.losses(), [*TASKS.observe((NOW,)).values()], rtol=1e-12)
        assert (int(merged.now), int(merged.merged((NOW,)).now)) == (1, 1)
        np.testing.assert_allclose(merged.loss((NOW._replace(b=0 * NOW.b),)), merged.losses()[1], rtol=1e-12)

    def test_white_inputs_need_none(self):
        white = Tasks(WEIGHT, [(SOLUTIONS[0], None)])
        np.testing.assert_allclose(white.losses(), [0.5 * np.sum((SOLUTIONS[0] - WEIGHT) ** 2)], rtol=1e-12)

    def test_a_task_that_is_solved_stays_so(self):
        solved = Tasks(WEIGHT, [(WEIGHT, None), (SOLUTIONS[0], None)])
        run = solve(solved, (NOW._replace(b=0 * NOW.b),), t1=1.0, saves=3)
        assert run.status == 0
        assert np.all(run.observables["loss"] == 0)

    def test_print(self):
        assert str(TASKS) == "Tasks: 4 x 6, task 1 of 2; scaling 2"

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Tasks(WEIGHT, []), r"tasks must hold at least one pair \(W, X\)"),
            (lambda: Tasks(WEIGHT, [SOLUTIONS[0]]), r"tasks\[0\] must be a pair \(W, X\), got shape"),
            (lambda: Tasks(WEIGHT, [(INPUTS[0], None)]), r"tasks\[0\]\[0\] must have the weight's shape"),
            (lambda: Tasks(WEIGHT, [(WEIGHT, WEIGHT[:, :2])]), r"tasks\[0\]\[1\] must have 6 columns"),
            (
                lambda: Tasks(WEIGHT, [(WEIGHT, None)], now=1),
                "now must lie between 0 and 0, the place of a task, got 1",
            ),
            (lambda: Tasks(WEIGHT, [(WEIGHT, None)], scaling=0.0), "scaling must be positive and finite, got 0.0"),
        ],
    )
    def test_bad_ones_get_one_line(self, make, message):
        with pytest.raises(InputError, match=f"^{message}"):
            make()


class TestProtectedInputs:
    def test_white_subspaces_are_found_exactly(self):
        first, second = (np.linalg.qr(random(seed, 12, 3))[0] for seed in (1, 2))
        known = ProtectedInputs(12).extend(first.T).extend(7 * second.T)
        both = np.linalg.qr(np.concatenate([first, second], axis=1))[0]
        assert known.basis.shape == (12, 6)
        np.testing.assert_allclose(known.basis @ known.basis.T, both @ both.T, atol=1e-12)
        assert ProtectedInputs(12).basis.shape == (12, 0)
        assert ProtectedInputs(12, eps=0.0).extend(first.T).basis.shape == (12, 3)
        assert str(known) == "ProtectedInputs: 6 of 12 directions, eps = 0.001"

    def test_as_few_directions_as_hold_the_share(self):
        inputs = np.diag(np.sqrt([8.0, 1.0, 0.6, 0.4]))
        counts = [
            ProtectedInputs(4, eps=eps).extend(inputs).basis.shape[1] for eps in (0.5, 0.2, 0.11, 0.09, 0.041, 0.0)
        ]
        assert counts == [1, 1, 2, 3, 3, 4]

    def test_older_tasks_decay(self):
        one, two = np.eye(3)[:1], np.eye(3)[1:2]
        known = ProtectedInputs(3, decay=0.1).extend(one).extend(two)
        np.testing.assert_allclose(np.diag(known.covariance), [0.1, 1.0, 0.0])
        np.testing.assert_allclose(np.abs(known.basis[:, 0]), [0, 1, 0])

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: ProtectedInputs(0), "size must be at least 1, the number of inputs, got 0"),
            (lambda: ProtectedInputs(3, eps=1.0), "eps must be at least 0 and below 1, got 1.0"),
            (lambda: ProtectedInputs(3, decay=0.0), "decay must be positive and at most 1, got 0.0"),
            (lambda: ProtectedInputs(3).extend(np.eye(2)), "inputs must have 3 columns, one for each input, got shape"),
            (lambda: ProtectedInputs(3).extend_by(np.eye(2)), r"moments must have the shape \(3, 3\), got \(2, 2\)"),
            (lambda: ProtectedInputs(3).extend_by(np.full((3, 3), np.nan)), "moments must be finite"),
        ],
    )
    def test_bad_ones_get_one_line(self, make, message):
        with pytest.raises(InputError, match=f"^{message}"):
            make()


class TestRandomTasks:
    @pytest.mark.parametrize(("overlap", "samples"), [(0.0, 0), (0.3, 0), (1.0, 0), (0.3, 500)])
    def test_inputs_overlap_as_asked(self, overlap, samples):
        tasks = tasks_problem(jax.random.key(0), m=5, n=20, overlap=overlap, samples=samples)
        spans = [np.linalg.svd(np.asarray(one))[2][:4] for one in tasks.features]
        for i, j in ((0, 1), (0, 2), (1, 2)):
            cosines = np.linalg.svd(spans[i] @ spans[j].T, compute_uv=False)
            np.testing.assert_allclose(cosines, overlap, atol=1e-6)
        if not samples:
            np.testing.assert_allclose(tasks.losses(), 0.5, rtol=1e-10)
        assert [np.linalg.matrix_rank(shift, tol=1e-10) for shift in np.asarray(tasks.shifts)] == [2, 2, 2]

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ({"width": 9}, r"width must be at most n/\(count \+ 1\) = 6, got 9"),
            ({"rank": 5}, "rank must be at most 4, the width or m, got 5"),
            ({"overlap": 1.5}, "overlap must lie between 0 and 1, got 1.5"),
            ({"count": 0}, "count must be at least 1, got 0"),
        ],
    )
    def test_bad_ones_get_one_line(self, how, message):
        with pytest.raises(InputError, match=f"^{message}"):
            tasks_problem(jax.random.key(0), **how)
