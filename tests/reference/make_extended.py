"""Makes the extended-precision references beside this script: `python tests/reference/make_extended.py`.

Classical Runge-Kutta with fixed steps in numpy.longdouble (64 mantissa bits on x86), from the textbook form of the
field, independent of the library's. Every setting is run with its steps and with half of them; the finer is stored,
with the largest difference between the two in decades. Takes about ten minutes on two cores.
"""

import concurrent.futures
import itertools
import sys
from pathlib import Path

import numpy as np

SAVES = 51
STEP = 4e-4

# name -> (aligned_problem arguments, initialisation, side, alpha, rank, T)
SETTINGS = {
    "top-B": ({}, "gaussian", "B", 1e-6, 4, 5.0),
    "top-A": ({}, "gaussian", "A", 1e-6, 4, 5.0),
    "quarter-A": ({"delta_w": 0.25}, "gaussian", "A", 1e-6, 4, 10.0),
    "hundredth-B": ({"delta_w": 0.01}, "gaussian", "B", 1e-4, 4, 15.0),
    "rectangular-A": ({"m": 8, "n": 12, "h": 30}, "gaussian", "A", 1e-6, 3, 5.0),
    "rank3-spectral": ({"component": [0, 2, 4], "shift_scale": [5.0, 4.0, 3.0]}, "spectral", "A", 1e-4, 4, 4.0),
}
OFFSET = "offset-pissa"  # stiff: PiSSA's start on weights whose product is 100 times the shift


def longdouble_flow(w1, w2, shift, a1, b1, a2, b2, times, step, offset=False):
    """The loss at `times`, by RK4 in extended precision, with at least twenty steps between two times."""
    w1, w2, shift, *state = (np.asarray(x, np.longdouble) for x in (w1, w2, shift, a1, b1, a2, b2))
    if offset:  # the start is subtracted from the weights, and the task is the same as before
        a1, b1, a2, b2 = state
        frozen1, frozen2 = w1 - b1 @ a1, w2 - b2 @ a2
        shift, w1, w2 = shift + w2 @ w1 - frozen2 @ frozen1, frozen1, frozen2

    def residual(a1, b1, a2, b2):
        return shift - (w2 @ b1) @ a1 - b2 @ (a2 @ w1) - b2 @ ((a2 @ b1) @ a1)

    def field(state):
        a1, b1, a2, b2 = state
        e = residual(*state)
        w2_e, e_w1 = w2.T @ e + a2.T @ (b2.T @ e), e @ w1.T + (e @ a1.T) @ b1.T
        return b1.T @ w2_e, w2_e @ a1.T, b2.T @ e_w1, e_w1 @ a2.T

    def move(state, k, h):
        return [x + h * dx for x, dx in zip(state, k, strict=True)]

    losses = [np.sum(residual(*state) ** 2) / 2]
    for start, end in itertools.pairwise(times):
        count = max(20, int(np.ceil((end - start) / step - 1e-9)))
        h = np.longdouble(end - start) / count
        for _ in range(count):
            k1 = field(state)
            k2 = field(move(state, k1, h / 2))
            k3 = field(move(state, k2, h / 2))
            k4 = field(move(state, k3, h))
            mean = [(p + 2 * q + 2 * r + s) / 6 for p, q, r, s in zip(k1, k2, k3, k4, strict=True)]
            state = move(state, mean, h)
        losses.append(np.sum(residual(*state) ** 2) / 2)
    return np.array(losses)


def make(name):
    import jax

    jax.config.update("jax_enable_x64", True)
    from lora_flow import Factorization, aligned_problem, pissa_init
    from lora_flow.initialization import initialize

    if name == OFFSET:
        rng = np.random.default_rng(0)
        w1, w2, left, right = (rng.normal(size=shape) for shape in ((7, 6), (5, 7), (5, 2), (2, 6)))
        shift = left @ right
        shift *= np.linalg.norm(w2 @ w1, 2) / np.linalg.norm(shift, 2) / 100
        problem = Factorization(w1, w2, shift)
        (a1, b1), (a2, b2) = pissa_init(jax.random.key(0), problem, rank=4, alpha=1.0)
        # stable: the fastest rate is 166
        times, step = np.concatenate([[0.0], np.geomspace(1e-3, 100, 20), np.linspace(120, 580, 30)]), 0.013
    else:
        arguments, init, side, alpha, rank, t1 = SETTINGS[name]
        problem = aligned_problem(jax.random.key(0), **arguments)
        (a1, b1), (a2, b2) = initialize(init, jax.random.key(1), problem, rank=rank, alpha=alpha, side=side)
        times, step = np.linspace(0.0, t1, SAVES), STEP
    arrays = {"w1": problem.w1, "w2": problem.w2, "shift": problem.shift, "a1": a1, "b1": b1, "a2": a2, "b2": b2}
    offset = name == OFFSET
    coarse = longdouble_flow(**arrays, times=times, step=step, offset=offset)
    fine = longdouble_flow(**arrays, times=times, step=step / 2, offset=offset)
    log10_loss = np.log10(fine).astype(float)
    difference = float(np.max(np.abs(np.log10(fine) - np.log10(coarse))[fine > 1e-25]))
    stored = Path(__file__).with_name(f"{name}.npz")
    np.savez_compressed(stored, times=times, log10_loss=log10_loss, difference=difference, offset=offset, **arrays)
    return f"{name}: log10 L ends at {log10_loss[-1]:.3f}; halving the step changed it by {difference:.1e} decades"


if __name__ == "__main__":
    if np.finfo(np.longdouble).nmant < 63:
        sys.exit("numpy.longdouble has no extended precision on this machine")
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        for line in pool.map(make, [*SETTINGS, OFFSET]):
            print(line, flush=True)
