"""Makes stiff_tail.npz, the true losses of job b: `python -m benchmarks.reference.make_stiff_tail`.

LSODA at rtol 1e-11, atol 1e-15, and the largest difference from rtol 1e-10 as a measure of its own error.
"""

from pathlib import Path

import jax
import numpy as np

from benchmarks.peers import arrays
from benchmarks.peers.numpy_peers import integrate
from benchmarks.tasks import error, stiff_tail


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    task = stiff_tail(1e4)
    coarse, fine = (
        integrate("LSODA", arrays.weights(task), arrays.start(task), task.times, rtol) for rtol in (1e-10, 1e-11)
    )
    decades = error(coarse, fine)
    np.savez(Path(__file__).with_name("stiff_tail.npz"), losses=fine, decades=decades)
    print(f"losses {fine[0, 0]:.3g} to {fine[0, -1]:.3g}; rtol 1e-10 and 1e-11 differ by {decades:.1e} decades")


if __name__ == "__main__":
    main()
