"""The claims in the order in which they are tried: of arXiv 2503.06982 and the talk on it, then on one adapted layer,
then on linear networks that are trained from scratch.

What a paper prints in two versions has a line for each: the right reading is meant to hold, the other one to fail.
"""

from lora_flow.claims import layer_alignment as one_layer
from lora_flow.claims import layer_descent as descending
from lora_flow.claims import layer_flows as preconditioned
from lora_flow.claims import layer_starts as starts
from lora_flow.claims import lora_alignment as alignment
from lora_flow.claims import lora_convergence as convergence
from lora_flow.claims import lora_linear as linear
from lora_flow.claims import lora_spectral as spectral
from lora_flow.claims import network_descent as network_descending
from lora_flow.claims import network_flow as networks
from lora_flow.claims.frame import ENTERED, Case, Claim, Line

CLAIMS: dict[str, Claim] = {
    name: claim
    for module in (
        linear,
        alignment,
        convergence,
        spectral,
        one_layer,
        starts,
        preconditioned,
        descending,
        networks,
        network_descending,
    )
    for name, claim in ENTERED.items()
    if claim.__module__ == module.__name__
}

__all__ = ["CLAIMS", "Case", "Claim", "Line"]
