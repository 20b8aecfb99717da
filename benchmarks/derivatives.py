"""How right are gradients of a run? `python benchmarks/derivatives.py` prints the table of docs/derivatives.md.

One layer and a start with orthogonal rows of A, from which everything is learned: the closed form gives log L at every
time, and so its derivatives. An error is relative to them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lora_flow import Adapter, SingleLayer, oracles, solve
from lora_flow.dynamics.integrator import RTOL

ROWS = np.array([[0.8, 0.6], [-0.6, 0.8]])
SHIFT = np.array([[1.5, 0.3], [-0.2, 1.2]])
AT = np.log([1e-2, 1.0])  # of alpha, and of the size of the shift
TIMES = np.array([5.27656, 8.16960, 11.96040])  # at which L = 1e-2, 1e-8 and 1e-16


def log_losses(x):
    """log L at the times, in closed form, from log alpha and the log of the shift's size."""
    alpha, size = jnp.exp(x)
    product = oracles.single_layer(size * SHIFT, alpha * ROWS, TIMES, steps=12).product
    return jnp.log(0.5 * jnp.sum(((size * SHIFT)[None] - product) ** 2, axis=(1, 2)))


def errors(solver):
    """rtol -> the relative errors of the derivatives of log L, (times, by log alpha and by the log of the size)."""
    expected = jax.jacfwd(log_losses)(AT)

    def losses(x, rtol):
        alpha, size = jnp.exp(x)
        start = (Adapter(alpha * ROWS, jnp.zeros((2, 2))),)
        how = {"solver": solver, "rtol": rtol, "derivatives": "forward"}
        return jnp.log(solve(SingleLayer(size * SHIFT), start, t1=12.0, saves=TIMES, **how).observables["loss"])

    slopes = jax.jit(jax.jacfwd(losses))
    return lambda rtol: np.abs(np.asarray(slopes(AT, jnp.asarray(rtol)) / expected) - 1)


def main():
    jax.config.update("jax_enable_x64", True)
    print("| solver | rtol | by log alpha | by the log of the shift's size |\n| --- | --- | --- | --- |")
    for solver, where, tolerances in (("auto", ", Tsit5 here", (RTOL, 2e-4)), ("RKC", "", (RTOL, 5e-5, 5e-6))):
        of = errors(solver)
        for rtol in tolerances:
            by = [", ".join(f"{one:.1e}" for one in column) for column in of(rtol).T]
            row = [f"`{solver}`{where}", f"{rtol:.0e}{', the default' if rtol == RTOL else ''}", *by]
            print(f"| {' | '.join(row)} |".replace("e-0", "e-"), flush=True)


if __name__ == "__main__":
    main()
