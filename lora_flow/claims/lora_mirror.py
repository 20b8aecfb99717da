"""delta_w > 1: transposing the problem exchanges the two layers."""

from __future__ import annotations

import jax
import numpy as np

from lora_flow.adapter import Adapter
from lora_flow.claims import lora_runs as runs
from lora_flow.claims.frame import Cases, Tried, claim
from lora_flow.claims.lora_runs import DELTA_W, case_name
from lora_flow.dynamics.solve import solve
from lora_flow.initialization import gaussian_init
from lora_flow.problems.factorization import Factorization
from lora_flow.recipes.aligned import aligned_problem
from lora_flow.results.phases import phases
from lora_flow.sweeps.sweep import sweep
from lora_flow.theory import gradient_flow as theory

SYMMETRY = "symmetry"


@claim(SYMMETRY, "gaussian, side B, alpha = 1e-4, to tau = 30", within=1e-3, identity=True)
def mirror(seeds: int) -> Cases:
    """delta_w -> 1/delta_w: transposing the problem exchanges the layers and leaves L(t) (decades)"""
    for delta_w in DELTA_W:
        problem = runs.problem(delta_w)
        turned = Factorization(problem.w2.T, problem.w1.T, problem.shift.T)
        start = gaussian_init(jax.random.key(0), problem, rank=4, alpha=1e-4, side="B")
        end = 30 / runs.gains(delta_w).rate
        swapped = tuple(Adapter(b.T, a.T) for a, b in reversed(start))
        losses = [
            np.asarray(solve(one, adapters, t1=end, saves=61, derivatives="forward").observables["loss"])
            for one, adapters in ((problem, start), (turned, swapped))
        ]
        error = np.max(np.abs(np.log10(losses[1] / losses[0]))[losses[0] > 1e-24])
        yield f"delta_w = {1 / delta_w:.3g} for {delta_w:.3g}", 0, error


@claim(SYMMETRY, "gaussian, side A, alpha = 1e-5", within=(0.4, 0.1))
def mirror_t1(seeds: int) -> Cases:
    """delta_w > 1: layer 2 is selected, at T1 = log(1/alpha) / (sigma sigma_W1)"""
    problems = {ratio: aligned_problem(jax.random.key(0), delta_w=ratio) for ratio in (4.0, 100.0)}
    swept = sweep(problems, alpha=1e-5, seeds=seeds, t1=0.8, saves=401, progress=False)
    t1, chosen = phases(swept)["t1"], (swept["norm_b2a2"] > swept["norm_b1a1"]).isel(time=-1)
    for ratio, problem in problems.items():
        c = theory.gains(problem)
        exchanged = theory.Gains(c.sigma, c.s2, c.s1)
        wins = bool(chosen.sel(problem=ratio).all())
        where = f"{case_name(ratio)}, layer 2 {'wins' if wins else 'does not win'}"
        yield Tried(where, 1, t1.sel(problem=ratio) / theory.t1_slides(exchanged, 1e-5), also=wins)
