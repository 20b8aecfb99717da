"""Descents by the optimisers of optax."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from descents import SINGLE, adapters_for, assert_same, by_optax

from lora_flow import Adapter, Chain, InputError, LoRAPlus, Plain, ScaledGD, descend

OPTIMISERS = {
    "lbfgs": optax.lbfgs(),
    "polyak": optax.polyak_sgd(),
    "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15)),
    "every third": optax.MultiSteps(optax.adam(0.02), 3),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(optax.cosine_decay_schedule(0.02, 10))),
    "plateau": optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
}


class TestOptimisersOfOptax:
    start = adapters_for(SINGLE, 3)

    def loop(self, optimisers, steps, order="simultaneous"):
        """As optax's own examples have it; in turns with an optimiser and its loss for each factor."""
        optimisers = [
            optax.with_extra_args_support(one.gradient_transformation() if isinstance(one, optax.MultiSteps) else one)
            for one in optimisers
        ]
        groups = {"simultaneous": [("a", "b")], "A first": [("a",), ("b",)]}[order]

        def with_factors(now, group, factors):
            return tuple(x._replace(**dict(zip(group, new, strict=True))) for x, new in zip(now, factors, strict=True))

        def chosen(now, group):
            return now if len(group) == 2 else tuple(tuple(getattr(x, name) for name in group) for x in now)

        @jax.jit
        def advance(now, states):
            after = []
            for optimiser, group, state in zip(optimisers, groups, states, strict=True):
                factors = chosen(now, group)

                def loss(factors, now=now, group=group):
                    return SINGLE.loss(with_factors(now, group, factors))

                value, grad = jax.value_and_grad(loss)(factors)
                updates, state = optimiser.update(grad, state, factors, value=value, grad=grad, value_fn=loss)
                now = with_factors(now, group, optax.apply_updates(factors, updates))
                after.append(state)
            return now, after

        now = jax.tree.map(jnp.asarray, self.start)
        states = [one.init(chosen(now, group)) for one, group in zip(optimisers, groups, strict=True)]
        for _ in range(steps):
            now, states = advance(now, states)
        return now

    @pytest.mark.parametrize("name", OPTIMISERS)
    def test_is_its_own_loop(self, name):
        seen = descend(SINGLE, self.start, steps=7, step=OPTIMISERS[name], saves=[0, 7])
        assert_same(seen.adapters, self.loop([OPTIMISERS[name]], 7), rtol=1e-13)
        assert seen.observables["loss"][-1] < seen.observables["loss"][0]

    def test_in_turns_a_line_search_sees_the_loss_of_its_factor(self):
        seen = descend(SINGLE, self.start, steps=4, step=OPTIMISERS["lbfgs"], saves=[0, 4], order="A first")
        assert_same(seen.adapters, self.loop([OPTIMISERS["lbfgs"]] * 2, 4, "A first"), rtol=1e-13)

    def test_a_schedule_is_that_of_sgd(self):
        schedule = optax.exponential_decay(0.1, 3, 0.7)
        ours = descend(SINGLE, self.start, steps=7, step=schedule, saves=8)
        assert_same(ours.adapters, self.loop([optax.sgd(schedule)], 7), rtol=1e-13)
        sizes = 0.1 * 0.7 ** (np.arange(8) / 3)  # which optax computes of its integer count, in single precision
        np.testing.assert_allclose(ours.observables["step_size"], sizes, rtol=1e-6)
        np.testing.assert_allclose(ours.times, np.cumsum([0, *sizes[:-1]]), rtol=1e-6)

    @pytest.mark.parametrize(
        ("flow", "order"),
        [(Chain(Plain(), LoRAPlus(4.0), LoRAPlus(4.0)), "simultaneous"), (LoRAPlus(16.0), "A first")],
    )
    def test_lora_plus_is_two_learning_rates(self, flow, order):
        """As PEFT's `create_loraplus_optimizer` and the source have it: B's rate is that of A times the ratio."""
        slow, fast = optax.adam(0.01), optax.adam(0.16)
        together = optax.multi_transform({"a": slow, "b": fast}, lambda factors: (Adapter("a", "b"),))
        rates = {"simultaneous": [together], "A first": [slow, fast]}[order]
        ours = descend(SINGLE, self.start, steps=7, step=slow, saves=[0, 7], flow=flow, order=order)
        assert_same(ours.adapters, self.loop(rates, 7, order), rtol=1e-13)
        sgd = descend(SINGLE, self.start, steps=7, step=optax.sgd(0.01), saves=[0, 7], flow=flow, order=order)
        constant = descend(SINGLE, self.start, steps=7, step=0.01, saves=[0, 7], flow=flow, order=order)
        assert_same(sgd.adapters, constant.adapters, rtol=1e-13)

    def test_a_preconditioner_comes_before_the_optimiser_and_rates_after(self):
        """Scaled AdamW of arXiv 2402.02347: Adam of the preconditioned gradient."""
        adam = optax.adam(0.01)
        chain = optax.chain(optax.stateless(ScaledGD(0.1)), adam, optax.stateless(LoRAPlus(3.0)))
        flow = Chain(ScaledGD(0.1), LoRAPlus(3.0))
        ours = descend(SINGLE, self.start, steps=7, step=adam, saves=[0, 7], flow=flow)
        assert_same(ours.adapters, by_optax(SINGLE, self.start, chain, 7), rtol=1e-12)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"flow": Chain(LoRAPlus(3.0), ScaledGD(0.1))}, "flow must have its learning rates, LoRAPlus, last in the"),
            ({"step": OPTIMISERS["polyak"], "flow": "lora-plus:2"}, "step must be an optimiser .*, without a loss"),
            ({"step": OPTIMISERS["lbfgs"], "flow": ScaledGD(0.1)}, "step must be an optimiser .*, without a loss"),
            ({"step": optax.contrib.sophia(0.1)}, "step must be an optimiser .* and the loss, got one that fails with"),
            ({"step": optax.adam}, "step must be a positive number, .*: a schedule makes one number of an iteration"),
            ({"step": lambda iteration: "fast"}, "step must be a positive number, .*: a schedule makes one number"),
            ({"step": optax.adam(0.1).init}, "step must be a positive number, .*: a schedule makes one number"),
        ],
    )
    def test_what_cannot_be_is_refused_in_one_line(self, arguments, message, monkeypatch):
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users have it
        good = {"problem": SINGLE, "adapters": self.start, "steps": 3, "step": optax.adam(0.1)}
        with pytest.raises(InputError, match=f"^{message}") as caught:
            descend(**(good | arguments))
        assert "\n" not in str(caught.value)
