"""What does single precision resolve? `python benchmarks/single_precision.py` prints the table of docs/accuracy.md.

Figure 1's problem, side "B", rank 4, five seeds, T = 5, 101 times, at the defaults, with 64-bit types off and on. The
starts are drawn in double precision and rounded, so that both runs are of the same lanes.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lora_flow import aligned_problem, gaussian_init, solve

ALPHAS, SEEDS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6), range(5)


def drawn():
    """Figure 1's problem and the starts, leaves `(alpha, seed, ...)`, in NumPy and double precision."""
    problem = aligned_problem(jax.random.key(0))

    def start(alpha, seed):
        return gaussian_init(jax.random.key(seed), problem, rank=4, alpha=alpha, side="B")

    starts = jax.vmap(jax.vmap(start, (None, 0)), (0, None))(jnp.array(ALPHAS), jnp.array(SEEDS))
    return jax.tree.map(np.asarray, (problem, starts))


def trajectories(problem, starts, dtype):
    """Loss, alignment error and drift, each `(alpha, seed, time)`."""
    problem, starts = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (problem, starts))

    def lane(start):
        seen = solve(problem, start, t1=5.0, derivatives="forward").observables
        return seen["loss"], seen["alignment_error"], seen["drift"]

    return map(np.asarray, jax.jit(jax.vmap(jax.vmap(lane)))(starts))


def main():
    with jax.enable_x64(True):
        problem, starts = drawn()
        true, alignment64, _ = trajectories(problem, starts, np.float64)
    with jax.enable_x64(False):
        loss, alignment, drift = trajectories(problem, starts, np.float32)
    error = np.abs(np.log10(np.maximum(loss, 1e-38) / true))
    print(
        "| alpha | log10 L at T, 64 bits | 32 bits | within 0.05 decades down to | log10(1 - cos), 64 bits | 32 bits |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for i, alpha in enumerate(ALPHAS):
        wrong = true[i][error[i] > 0.05]
        down_to = "the end" if wrong.size == 0 else f"L = {wrong.max():.0e}"
        ends = [
            f"{np.mean(np.log10(np.maximum(x[i, :, -1], 1e-38))):.1f}" for x in (true, loss, alignment64, alignment)
        ]
        print(f"| {alpha:.0e} | {ends[0]} | {ends[1]} | {down_to} | {ends[2]} | {ends[3]} |")
    print(f"\nlargest drift of the conserved quantities in 32 bits: {drift.max():.0e}")


if __name__ == "__main__":
    main()
