"""Programs are kept while there is room for them, and are gone once they are forgotten."""

import gc
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_flow import Adapter, SingleLayer, aligned_problem, descend, gaussian_init, solve, sweep
from lora_flow.runtime import compiling
from lora_flow.runtime.compiling import compiled

HOW = {"t1": 0.1, "saves": 2, "solver": "Tsit5"}


@pytest.fixture(autouse=True)
def _none_before():
    compiling._programs.clear()


def maps() -> int:
    return Path("/proc/self/maps").read_bytes().count(b"\n")


def counted(**how):
    """A program, and for every time that it was traced what it was traced for."""
    traced = []

    @compiled(**how)
    def double(x, name="x"):
        traced.append((x.shape, name))
        return 2 * x

    return double, traced


def run(rows):
    """Every kind of run of a problem of that many rows."""
    problem = SingleLayer(np.ones((rows, 2)))
    start = gaussian_init(jax.random.key(0), problem, rank=1, alpha=0.1)
    solve(problem, start, **HOW)
    descend(problem, start, steps=2, step=0.1, saves=2)
    sweep(problem, rank=1, progress=False, **HOW)


class TestCompiled:
    def test_it_is_the_function(self):
        double, _ = counted()
        np.testing.assert_array_equal(double(jnp.arange(3.0)), [0, 2, 4])
        np.testing.assert_array_equal(double(np.arange(3.0)), [0, 2, 4])

    @pytest.mark.parametrize("quickly", [False, True])
    def test_a_program_serves_all_values_of_one_shape_and_what_is_no_array_one_each(self, quickly):
        double, traced = counted(quickly=quickly)
        for x in (np.zeros(3), jnp.ones(3), np.zeros(4), np.ones(3)):
            double(x)
            double(x, "y")
        assert traced == [((3,), "x"), ((3,), "y"), ((4,), "x"), ((4,), "y")]

    def test_types_are_told_apart(self):
        @compiled()
        def double(x, by):
            return x * by

        assert double(jnp.arange(3), 2).dtype == int
        assert double(jnp.arange(3), 2.0).dtype == float
        assert double(jnp.arange(3.0), 2).dtype == float

    @pytest.mark.parametrize("quickly", [False, True])
    def test_transformations_apply(self, quickly):
        double, _ = counted(quickly=quickly)
        x = jnp.arange(3.0)
        np.testing.assert_array_equal(jax.vmap(double)(x), 2 * x)
        np.testing.assert_array_equal(jax.jit(double)(x), 2 * x)
        assert jax.grad(lambda x: double(x).sum())(x).tolist() == [2, 2, 2]

    def test_a_derivative_is_not_compiled_again(self):
        double, traced = counted()
        for _ in range(3):
            jax.grad(lambda x: double(x).sum())(jnp.ones(3))
        assert len(traced) == 1

    @pytest.mark.parametrize("accepted", [True, False])
    def test_an_option_that_this_xla_lacks_is_left_out(self, accepted, monkeypatch):
        asked, jit = [], jax.jit

        def asking(function, *, compiler_options=None, **how):
            asked.append(compiler_options)
            if compiler_options and not accepted:
                compiler_options = {"xla_has_no_such_option": True}
            return jit(function, compiler_options=compiler_options, **how)

        monkeypatch.setattr(jax, "jit", asking)
        compiling._without_emitters.cache_clear()
        assert compiling._without_emitters() == ({"xla_cpu_use_fusion_emitters": False} if accepted else {})
        assert asked == [{"xla_cpu_use_fusion_emitters": False}]
        compiling._without_emitters.cache_clear()


class TestRoom:
    @pytest.fixture(autouse=True)
    def _little_room(self, monkeypatch):
        monkeypatch.setattr(compiling, "FEWEST", 2)
        monkeypatch.setattr(compiling, "_most_maps", lambda: 0)

    def test_what_was_not_used_for_longest_is_forgotten(self):
        double, traced = counted()
        for size in (1, 2, 1, 3, 1, 2):  # 2 makes room for 3, and 3 for 2
            double(np.zeros(size))
        assert [shape for (shape, _) in traced] == [(1,), (2,), (3,), (2,)]
        assert len(compiling._programs) == 2

    def test_it_is_shared_by_all_functions(self):
        (one, traced), (other, _) = counted(), counted()
        for function in (one, other, one):
            function(np.zeros(1))
            function(np.zeros(2))
        assert len(compiling._programs) == 2
        assert len(traced) == 4

    def test_programs_cleared_by_jax_are_counted_when_they_come_again(self, monkeypatch):
        double, _ = counted()
        monkeypatch.setattr(compiling, "FEWEST", 3)
        for size in (1, 2, 3):
            double(np.zeros(size))
        jax.clear_caches()
        monkeypatch.setattr(compiling, "FEWEST", 2)
        double(np.zeros(1))
        assert len(compiling._programs) == 2

    def test_what_is_forgotten_is_gone(self):
        held = []

        class Part:
            pass

        @compiled()
        def double(x, part):
            return 2 * x

        for size in (1, 2, 3):
            part = Part()
            held.append(weakref.ref(part))
            double(np.zeros(size), part)
            del part
        gc.collect()
        assert [one() is None for one in held] == [True, False, False]


def test_programs_are_no_more_than_most(monkeypatch):
    monkeypatch.setattr(compiling, "MOST", 3)
    double, _ = counted()
    for size in range(1, 6):
        double(np.zeros(size))
    assert len(compiling._programs) == 3


def test_where_the_system_does_not_tell_programs_are_kept(monkeypatch):
    monkeypatch.setattr(compiling, "FEWEST", 1)
    monkeypatch.setattr(compiling, "_maps", lambda: 0)
    double, _ = counted()
    for size in range(1, 6):
        double(np.zeros(size))
    assert len(compiling._programs) == 5


def test_the_same_shapes_are_not_compiled_again_and_others_take_the_maps_of_the_first(monkeypatch, caplog):
    run(2)
    programs, before = len(compiling._programs), maps()
    with jax.log_compiles():
        run(2)
        assert not [line for line in caplog.messages if line.startswith("Compiling")]
        jax.jit(lambda x: x)(jnp.ones(7))  # which is told
        assert [line for line in caplog.messages if line.startswith("Compiling")]
    assert len(compiling._programs) == programs
    monkeypatch.setattr(compiling, "FEWEST", 1)
    monkeypatch.setattr(compiling, "_most_maps", lambda: 0)
    run(3)
    assert len(compiling._programs) == 1
    assert maps() < before  # all but the sweep's have gone; kept, they would be 1300 more


def test_an_aligned_problem_is_drawn_by_the_program_of_the_last():
    for seed in range(3):
        aligned_problem(jax.random.key(seed), m=3, n=4, h=5)
    assert len(compiling._programs) == 1


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_hundred_shapes_in_one_process():
    """At 1500 maps a shape they would be 150,000, of 65,530."""
    seen = []
    for rows in range(2, 102):
        run(rows)
        seen.append(maps())
    assert max(seen) < 0.6 * compiling._most_maps()
    assert seen[-1] < 1.2 * max(seen[:30])


def test_a_loop_over_problems_that_are_no_pytrees_forgets_them(monkeypatch):
    monkeypatch.setattr(compiling, "FEWEST", 2)
    monkeypatch.setattr(compiling, "_most_maps", lambda: 0)

    class Own:
        layers = ((1, 1),)

        def loss(self, adapters):
            ((a, b),) = adapters
            return 0.5 * jnp.sum((1 - b @ a) ** 2)

    held = []
    for _ in range(4):
        problem = Own()
        held.append(weakref.ref(problem))
        descend(problem, (Adapter(jnp.ones((1, 1)), jnp.zeros((1, 1))),), steps=1, step=0.1, saves=2)
        del problem
    gc.collect()
    assert [one() is None for one in held] == [True, True, False, False]
