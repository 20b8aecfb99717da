"""LoRA on an attention head: its loss written out, its flow, what it observes, and its draws beside their law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_flow import Adapter, AttentionLoRA, InputError, attention_problem, load_run, solve, sweep, tied_init
from lora_flow.cli import main
from lora_flow.recipes import attention as recipe
from lora_flow.recipes.kinds import KINDS
from lora_flow.settings import Settings, build_plan
from lora_flow.theory import attention as theory

RNG = np.random.default_rng(0)
COUNT, T, D = 7, 3, 5
X = RNG.normal(size=(COUNT, T, D))
Z, Y = (one + one.mT for one in RNG.normal(size=(2, COUNT, T, T)))
LENGTHS = np.array([3, 3, 2, 1, 3, 0, 2])
UNTIED = (Adapter(RNG.normal(size=(2, D)), RNG.normal(size=(D, 2))),)


def written_out(x, z, y, lengths, adapters, activation):
    """The errors sequence by sequence."""
    ((a, b),) = adapters
    errors = []
    for tokens, frozen, label, length in zip(x, z, y, lengths, strict=True):
        tokens, made = tokens[:length], frozen[:length, :length]
        made = made + (tokens @ b @ a @ tokens.T - np.trace(b @ a) * np.eye(length)) / D
        up = np.exp(made)
        given = made / max(length, 1) if activation == "linear" else up / up.sum(axis=1, keepdims=True)
        errors.append(np.sum((given - label[:length, :length]) ** 2))
    return np.array(errors)


@pytest.mark.parametrize("activation", ["linear", "softmax"])
def test_the_loss_is_the_sum_over_sequences_and_the_ridge(activation):
    whole = written_out(X, Z, Y, [T] * COUNT, UNTIED, activation)
    problem = AttentionLoRA(X, Y, Z, ridge=0.3, activation=activation)
    squares = sum(np.sum(np.asarray(factor) ** 2) for factor in UNTIED[0])
    assert float(problem.loss(UNTIED)) == pytest.approx(whole.sum() + 0.15 * squares)
    assert float(problem.observe(UNTIED)["train_error"]) == pytest.approx(whole.mean())
    short = written_out(X, Z, Y, LENGTHS, UNTIED, activation)
    problem = AttentionLoRA(X, Y, Z, LENGTHS, ridge=0.3, activation=activation)
    for one in (problem, problem.padded(COUNT + 3, T + 2)):
        assert float(one.loss(UNTIED)) == pytest.approx(short.sum() + 0.15 * squares)
        assert float(one.observe(UNTIED)["train_error"]) == pytest.approx(short.sum() / 6), "one has no tokens"
        slope = jax.tree.map(np.asarray, one.field(UNTIED))
        assert all(np.all(np.isfinite(factor)) for factor in slope[0])
    assert float(AttentionLoRA(X, Y).loss(UNTIED)) == pytest.approx(
        written_out(X, 0 * Z, Y, [T] * COUNT, UNTIED, "linear").sum()
    )


def test_tied_adapters_stay_tied_and_small_ones_grow_at_the_fastest_rate():
    problem = AttentionLoRA(X, Y, Z, ridge=0.3)
    b = RNG.normal(size=(D, 1))
    ((moved_a, moved_b),) = problem.field((Adapter(b.T, b),))
    np.testing.assert_allclose(moved_a.T, moved_b, atol=1e-12)
    (task,) = problem.linearised_task()
    values, vectors = np.linalg.eigh(np.asarray(task))
    largest = np.argmax(np.abs(values))
    assert problem.fastest_rate() == pytest.approx(np.abs(values[largest]) - 0.3)
    assert AttentionLoRA(X, Y, Z, ridge=1e4).fastest_rate() == 0
    tiny = 1e-6 * vectors[:, [np.argmax(values)]]
    ((_, grown),) = problem.field((Adapter(tiny.T, tiny),))
    np.testing.assert_allclose(grown, (values.max() - 0.3) * tiny, rtol=1e-6, atol=1e-14)


def test_the_test_error_is_that_of_new_sequences():
    """Closed form against 50,000 of them, of untied adapters, and of the same problem with shorter ones."""
    rng, noise = np.random.default_rng(1), 0.4
    s0, s = (one @ one.T for one in rng.normal(size=(2, D, D)))
    w = rng.normal(size=(D, 2))
    problem = AttentionLoRA(X, Y, Z, direction=w, missing=s0 - s, noise=noise)
    drawn = recipe.sequences(jax.random.key(0), 50_000, T, D)
    fresh = recipe.labelled(drawn, s0, s, w, ridge=0.0, noise=noise, activation="linear")
    expected = float(problem.observe(UNTIED)["test_error"])
    assert float(fresh.observe(UNTIED)["train_error"]) == pytest.approx(expected, rel=0.02)
    held = AttentionLoRA(X, Y, Z, direction=w, missing=s0 - s, noise=noise, held_out=fresh)
    assert float(held.observe(UNTIED)["test_error"]) == float(fresh.observe(UNTIED)["train_error"])
    single = AttentionLoRA(fresh.tokens, fresh.labels * T, fresh.frozen, np.ones(50_000))
    shorter = AttentionLoRA(X, Y, Z, np.ones(COUNT), direction=w, missing=s0 - s, noise=noise)
    assert float(single.observe(UNTIED)["train_error"]) == pytest.approx(
        float(shorter.observe(UNTIED)["test_error"]), rel=0.06
    )
    assert problem.characteristics()["effective_noise"] == pytest.approx(noise / 2 + np.sum((s0 - s) ** 2) / D)


def test_the_overlap_is_the_cosine_of_one_direction_and_whole_at_the_teacher():
    w, b = RNG.normal(size=(D, 1)), RNG.normal(size=(D, 1))
    problem = AttentionLoRA(X, Y, Z, direction=w)
    cosine = abs(np.sum(w * b)) / np.linalg.norm(w) / np.linalg.norm(b)
    seen = problem.observe((Adapter(b.T, b),))
    assert float(seen["overlap"]) == pytest.approx(cosine)
    assert float(seen["q"]) == pytest.approx(np.sum(b**2) / D)
    assert set(seen) == {"q", "train_error", "overlap"}
    w = RNG.normal(size=(D, 2))
    turned = w @ np.linalg.qr(RNG.normal(size=(2, 2)))[0]
    seen = AttentionLoRA(X, Y, Z, direction=w).observe((Adapter(turned.T, turned),))
    assert float(seen["overlap"]) == pytest.approx(1.0)
    nothing = problem.observe((Adapter(0 * b.T, b),))
    assert float(nothing["overlap"]) == 0.0


@pytest.mark.parametrize("wrong", [{"missing": np.eye(D)}, {"held_out": AttentionLoRA(X, Y, activation="softmax")}])
def test_what_does_not_belong_together_is_refused(wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))} must (come with direction|be of the same D = 5)"):
        AttentionLoRA(X, Y, Z, **wrong)


def test_a_draw_has_the_law_of_its_teacher_and_its_sequences():
    problem = attention_problem(
        jax.random.key(0), m=60, tokens=2, sample_ratio=100.0, label_noise=0.5, pretraining_ratio=0.2, task_rank=2
    )
    assert problem.tokens.shape == (6000, 2, 60)
    residual = 2 * np.asarray(problem.labels) - np.asarray(problem.frozen)
    w = np.asarray(problem.direction)
    chi = np.asarray(problem.tokens) @ w
    left = residual - (chi @ chi.mT - np.sum(w**2) * np.eye(2)) / 60
    missed = problem.characteristics()["effective_noise"]
    assert np.var(left[:, 0, 1]) == pytest.approx(missed, rel=0.05)
    assert np.var(left[:, [0, 1], [0, 1]]) == pytest.approx(2 * missed, rel=0.07)
    np.testing.assert_allclose(left, left.mT, atol=1e-12)
    law = theory.pretrain(0.2, 0.1, tokens=2)
    assert missed == pytest.approx(law.effective_noise(), rel=0.1)


def test_a_map_that_is_trained_has_the_least_loss_of_pretraining():
    """Its first-order conditions, and the law's order parameters to within what m = 40 leaves."""
    m, alpha, ridge = 40, 0.3, 0.02
    keys = jax.random.split(jax.random.key(0), 3)
    s0 = recipe.teacher_map(keys[0], m, 1.0)
    shown = recipe.sequences(keys[1], round(alpha * m**2), 2, m)
    s = recipe.trained_map(keys[2], s0, shown, ridge, 0.5, "linear")
    z, goal = (
        recipe.preactivations(shown.tokens, s),
        recipe.preactivations(shown.tokens, s0) + np.sqrt(0.5) * shown.noise,
    )
    left = (z - goal) / 4  # half the derivative of ||z - goal||^2/T^2
    slope = 2 * np.einsum("ntd,ntu,nue->de", shown.tokens, left, shown.tokens, optimize=True)
    slope = (slope - 2 * np.einsum("ntt->", left) * np.eye(m)) / np.sqrt(m) + ridge * m * np.eye(m)
    values, vectors = np.linalg.eigh(s)
    used = vectors[:, values > 1e-3 * values.max()]
    scale = np.linalg.norm(ridge * m * np.eye(m))
    assert np.linalg.norm(slope @ used) < 0.02 * scale, "no slope along what is learned"
    assert np.linalg.eigvalsh(slope).min() > -0.05 * ridge * m, "nor downwards across it"
    law = theory.pretrain(alpha, ridge, tokens=2)
    assert np.sum(s**2) / m == pytest.approx(law.q, rel=0.15)
    assert np.sum(s * s0) / m == pytest.approx(law.m, rel=0.15)


def test_sequences_are_selected_and_reused():
    common = {"m": 30, "tokens": 2, "sample_ratio": 2.0, "pretraining_ridge": 0.05}
    drawn, chosen = (attention_problem(jax.random.key(1), **common, kept=kept) for kept in (1.0, 0.01))
    np.testing.assert_array_equal(drawn.missing, chosen.missing)
    sizes = [np.sum(np.asarray(one.frozen) ** 2, axis=(1, 2)) for one in (drawn, chosen)]
    assert sizes[1].max() < np.quantile(sizes[0], 0.1)
    again = attention_problem(jax.random.key(1), **common, pretrained_by="descent", reused=True)
    new = attention_problem(jax.random.key(1), **common, pretrained_by="descent")
    np.testing.assert_array_equal(again.missing, new.missing)
    nothing = tied_init(jax.random.key(0), new, rank=1, alpha=1e-9)
    w = np.asarray(new.direction)

    def left(problem):
        """What the frozen map leaves of the labels without w*."""
        chi = np.asarray(problem.tokens) @ w
        known = 2 * np.asarray(problem.labels) - (chi @ chi.mT - np.sum(w**2) * np.eye(2)) / 30
        return np.mean((known - np.asarray(problem.frozen)) ** 2)

    assert left(again) < 0.6 * left(new)
    assert float(new.observe(nothing)["test_error"]) == pytest.approx(float(again.observe(nothing)["test_error"]))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"reused": True}, "reused must come with pretrained_by 'descent', got 'law'"),
        ({"reused": True, "pretrained_by": "descent", "kept": 0.5}, "reused must be left out where kept is below 1"),
        (
            {"reused": True, "pretrained_by": "descent", "sample_ratio": 9.0},
            "sample_ratio must be at most 0.888889, the seq",
        ),
    ],
)
def test_draws_that_contradict_themselves_are_refused(asked, message):
    with pytest.raises(InputError, match=message):
        attention_problem(jax.random.key(0), m=9, **asked)


def test_softmax_draws_have_sequences_held_out():
    problem = attention_problem(jax.random.key(0), m=12, tokens=2, activation="softmax", sample_ratio=2.0)
    assert problem.held_out.tokens.shape == (1000, 2, 12)
    np.testing.assert_allclose(jnp.sum(problem.labels, axis=2), 1.0)
    start = tied_init(jax.random.key(0), problem, rank=1, alpha=0.1)
    run = solve(problem, start, t1=5.0, saves=2, solver="Tsit5")
    assert run.observables["loss"][-1] < run.observables["loss"][0]
    assert np.all(np.isfinite(run.observables["test_error"]))


def test_a_sweep_over_tokens_and_ratios_is_one_program(tmp_path):
    """Problems with fewer sequences and tokens come out as they do by themselves."""
    words = "--m 20 --tokens 2 4 --sample-ratio 1 2.5 --rank 1 --alpha 0.1 --t1 2 --saves 2 --solver Tsit5"
    assert main(["sweep", "--problem", "attention", *words.split(), "--out", str(tmp_path / "run")]) == 0
    dataset = load_run(tmp_path / "run")
    assert dataset.sizes["tokens"] == dataset.sizes["sample_ratio"] == 2
    alone = attention_problem(jax.random.key(0), m=20, tokens=2, sample_ratio=1.0)
    expected = sweep(alone, rank=1, alpha=0.1, t1=2.0, saves=2, solver="Tsit5").squeeze()
    one = dataset.sel(tokens=2, sample_ratio=1.0).squeeze()
    for name in ("loss", "train_error", "test_error", "overlap", "q"):
        np.testing.assert_allclose(one[name], expected[name], rtol=5e-3)
    assert float(one["effective_noise"]) == pytest.approx(float(expected["effective_noise"]))
    plan = build_plan(Settings(problem="attention", m=20, rank=(1,), tokens=(2, 3), saves=3))
    assert [str(member).split(":")[0] for member in plan.problems.members] == ["AttentionLoRA"] * 2
    assert KINDS["attention"].shape(Settings(problem="attention", m=20)) == (20, 20, 0)
