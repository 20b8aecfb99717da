"""Muon, LoRA-Muon and BaLoRA in `solve` and `sweep`: at the defaults, in lanes, and with derivatives."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import PROBLEM, RANK, M, N, adapter, conditioned, random

from lora_flow import Adapter, BaLoRA, LoRAMuon, Muon, SingleLayer, gaussian_init, lora_one_init, solve, sweep

pytestmark = pytest.mark.long


@pytest.mark.parametrize(
    ("flow", "init"), [("muon:0.05", "gaussian"), ("lora-muon:0:0.05", "lora-one"), ("balora", "lora-one")]
)
def test_a_sweep_is_solve(flow, init):
    """Rank RANK padded by one in the sweep."""
    how = {"t1": 2.0, "saves": 5, "flow": flow, "solver": "Tsit5", "rtol": 1e-7}
    swept = sweep(PROBLEM, init=init, alpha=0.5, rank=(RANK, RANK + 1), progress=False, **how)
    draw = {"gaussian": gaussian_init, "lora-one": lora_one_init}[init]
    alone = solve(PROBLEM, draw(jax.random.key(0), PROBLEM, rank=RANK, alpha=0.5), **how)
    lane = swept.sel(init=init, alpha=0.5, rank=RANK, seed=0)
    assert lane["status"] == alone.status == 0
    np.testing.assert_allclose(lane["loss"], alone.observables["loss"], rtol=1e-5)


@pytest.mark.parametrize("flow", ["muon", "lora-muon"])
def test_runs_at_the_defaults_come_to_their_end(flow):
    """Where all is learned RKC takes over from Tsit5, whose steps the fast end would hold to thousandths."""
    u, sigma, vt = conditioned(5)
    problem = SingleLayer(u * sigma @ vt)
    run = solve(problem, (adapter(9, 0.1, 0.1),), t1=10.0, saves=3, flow=flow, derivatives="forward")
    assert run.status == 0
    assert run.observables["loss"][-1] < 1e-24
    assert run.stats["num_steps"] < 2000


@pytest.mark.parametrize(
    ("flow", "mode"),
    [(Muon(0.05), "reverse"), (Muon(0.05), "forward"), (LoRAMuon(0.01, 0.05), "reverse"), (BaLoRA(), "reverse")],
    ids=str,
)
def test_runs_have_derivatives(flow, mode):
    differentiate = {"forward": jax.jacfwd, "reverse": jax.grad}[mode]

    def log_loss(size):
        start = (Adapter(size * jnp.asarray(random(1, RANK, N)), jnp.asarray(random(2, M, RANK))),)
        euler = {"solver": diffrax.Euler(), "stepsize_controller": diffrax.ConstantStepSize(), "dt0": 0.02}
        run = solve(PROBLEM, start, t1=0.1, saves=2, flow=flow, derivatives=mode, **euler)
        return jnp.log(run.observables["loss"][-1])

    near = [log_loss(0.8 + step) for step in (1e-5, -1e-5)]
    assert differentiate(log_loss)(0.8) == pytest.approx(float(near[0] - near[1]) / 2e-5, rel=1e-5)
