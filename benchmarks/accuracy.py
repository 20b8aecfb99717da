"""How far from the true loss do solvers end up? `python benchmarks/accuracy.py` prints the table of docs/accuracy.md.

Figure 1's problem, side "B", alpha = 1e-3, 1e-4, 1e-5, five seeds, T = 5, 101 times. An error is the worst
|log10 L - reference| over lanes and times while the reference is above 1e-20; the reference is diffrax's Dopri8 at
rtol 1e-12, atol 1e-16.
"""

import diffrax
import jax
import jax.numpy as jnp

from lora_flow import aligned_problem, gaussian_init, solve

ALPHAS, SEEDS = jnp.array([1e-3, 1e-4, 1e-5]), jnp.arange(5)


def usual(rtol, atol):
    return diffrax.PIDController(rtol=rtol, atol=atol)


def trajectories(problem, **how):
    def lane(alpha, seed):
        start = gaussian_init(jax.random.key(seed), problem, rank=4, alpha=alpha, side="B")
        trajectory = solve(problem, start, t1=5.0, **how)
        return trajectory.observables["loss"], trajectory.stats["num_steps"]

    return jax.jit(jax.vmap(jax.vmap(lane, (None, 0)), (0, None)))(ALPHAS, SEEDS)


def main():
    jax.config.update("jax_enable_x64", True)
    problem = aligned_problem(jax.random.key(0))
    reference, _ = trajectories(problem, solver=diffrax.Dopri8(), stepsize_controller=usual(1e-12, 1e-16))
    rows = {
        f"Tsit5, rtol 1e-{digits}, atol 1e-{digits + 3}": {"stepsize_controller": usual(rtol, rtol / 1e3)}
        for digits, rtol in ((3, 1e-3), (6, 1e-6), (9, 1e-9))
    }
    rows['**the default here** ("auto", all Tsit5 here), rtol 5e-4 of the residual'] = {}
    print("| solver | worst error (decades of loss) | steps |\n| --- | --- | --- |")
    for name, how in rows.items():
        loss, steps = trajectories(problem, **how)
        error = jnp.where(reference > 1e-20, jnp.abs(jnp.log10(loss / reference)), 0.0)
        print(f"| {name} | {float(error.max()):.3f} | {int(steps.min())}-{int(steps.max())} |", flush=True)


if __name__ == "__main__":
    main()
