"""What someone writes who has diffrax and no lora_flow: three lanes of Figure 1, stored and drawn. Job e's peer.

`python benchmarks/plain_script.py FOLDER`. It has no labels, checks, report, progress or error control.
"""

import sys
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

M, N, H, RANK, SHIFT, T1 = 10, 10, 100, 4, 5.0, 5.0
ALPHAS = (1e-3, 1e-4, 1e-5)

rng = np.random.default_rng(0)
u, sigma, vt = np.linalg.svd(rng.standard_normal((M, N)))
root = np.sqrt(np.interp(sigma, (sigma[-1], sigma[0]), (0.099, 6.5)))
frame = np.linalg.qr(rng.standard_normal((H, M)))[0]
w1, w2 = frame * root @ vt * 1.05**-1, 1.05 * u * root @ frame.T
target = w2 @ w1 + SHIFT * np.outer(u[:, 0], vt[0])


def loss(adapters):
    (a1, b1), (a2, b2) = adapters
    return 0.5 * jnp.sum(((w2 + b2 @ a2) @ (w1 + b1 @ a1) - target) ** 2)


def field(t, adapters, args):
    return jax.tree.map(jnp.negative, jax.grad(loss)(adapters))


def start(alpha):
    b1, b2 = rng.standard_normal((H, RANK)), rng.standard_normal((M, RANK))
    return (np.zeros((RANK, N)), alpha * b1), (np.zeros((RANK, H)), alpha * b2)


@jax.jit
@jax.vmap
def run(adapters):
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Dopri8(),
        t0=0.0,
        t1=T1,
        dt0=None,
        y0=adapters,
        stepsize_controller=diffrax.PIDController(rtol=1e-11, atol=1e-16),
        saveat=diffrax.SaveAt(ts=jnp.linspace(0, T1, 101)),
        max_steps=100_000,
    )
    return solution.ts, jax.vmap(loss)(solution.ys)


starts = jax.tree.map(lambda *lanes: np.stack(lanes), *map(start, ALPHAS))
times, losses = map(np.asarray, run(starts))
folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
np.savez(folder / "losses.npz", alpha=ALPHAS, time=times[0], loss=losses)
for alpha, one in zip(ALPHAS, losses, strict=True):
    plt.semilogy(times[0], one, label=f"alpha = {alpha:g}")
plt.xlabel("time")
plt.ylabel("loss")
plt.legend()
plt.savefig(folder / "losses.png")
