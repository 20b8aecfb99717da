"""`lora-flow inits`: the initialisations that there are."""

from __future__ import annotations

import dataclasses

from lora_flow.settings import Settings, start_jax


@dataclasses.dataclass(frozen=True)
class Inits:
    """List the initialisations: formula, what each asks for, and whether it offsets the frozen weights.

    alpha multiplies both factors; G = -dL/dW = U S V^T is the negative gradient at the pretrained weight W, s the
    scaling, r the rank. Those marked "offset" freeze W - s B A, so that the function does not change at t = 0. Those
    marked "network" are for networks that are trained from scratch, --problem network; a number goes after a colon, as
    in gaussian-both:25.

    For example: lora-flow inits
    """

    def run(self) -> int:
        start_jax(Settings())
        from lora_flow.initialization import INITIALIZATIONS

        width = max(map(len, INITIALIZATIONS))
        for name, scheme in INITIALIZATIONS.items():
            asks = f"; asks for {scheme.asks}" if scheme.asks else ""
            takes = f"; takes :{scheme.parameter.upper()}" if scheme.parameter else ""
            kind = "; offset" if scheme.offset else "; network" if scheme.network else ""
            print(f"{name:{width}}  {scheme.about}{takes}{asks}{kind}")
        return 0
