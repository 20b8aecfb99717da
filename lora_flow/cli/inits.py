"""`lora-flow inits`: lists the initialisations."""

from __future__ import annotations

import dataclasses

from lora_flow.runtime.start import start_jax


@dataclasses.dataclass(frozen=True)
class Inits:
    """List the initialisations: the formula and the needs of each.

    alpha multiplies both factors; G = -dL/dW = U S V^T is the negative gradient at the pretrained weight W, s the
    scaling, r the rank. An initialisation that "changes the frozen weight" freezes W - s B A, so the function does not
    change at t = 0. One "for networks" is meant for networks that are trained from scratch, --problem network. A number
    goes after a colon, as in gaussian-both:25.

    For example: lora-flow inits
    """

    def run(self) -> int:
        start_jax()
        from lora_flow.initialization import INITIALIZATIONS

        width = max(map(len, INITIALIZATIONS))
        for name, scheme in INITIALIZATIONS.items():
            takes = f"; takes :{scheme.parameter.upper()}" if scheme.parameter else ""
            needs = f"; needs {scheme.asks}" if scheme.asks else ""
            kind = "; changes the frozen weight" if scheme.offset else "; for networks" if scheme.network else ""
            print(f"{name:{width}}  {scheme.about}{takes}{needs}{kind}")
        print("learned:FOLDER: what lora-flow optimise has learned, at the norm of gaussian starts")
        return 0
