"""What a peer is."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from benchmarks.tasks import Task

Run = Callable[[float], "np.ndarray"]  # a rung of the ladder in, losses (lanes, times) out, ready on the host

DECADES = tuple(10.0**-k for k in range(3, 14))
ATOL_SHARE = 1e-4  # of rtol; of 1e-3, 1e-4 and 1e-6 the fastest for diffrax's solvers on three lanes of Figure 1


class Peer(NamedTuple):
    """`prepare` does what can be done before the clock starts; a rung is a tolerance, or gradient descent's step."""

    name: str
    prepare: Callable[[Task], Run]
    ladder: tuple[float, ...] = DECADES
    rung: str = "rtol"
    needs: str = "numpy"

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None
