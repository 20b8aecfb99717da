"""The claims in the order in which they are tried: of arXiv 2503.06982 and the talk on it, then on one adapted layer,
then on linear networks that are trained from scratch, on symmetric factorisations, on large starts, on attention, on
LoRA's scaling, on spectral flows, and on continual learning.

A formula that a paper states in two forms has a line for each: the right reading is meant to hold, the other to fail.
"""

from lora_flow.claims import (
    attention,
    attention_softmax,
    continual,
    layer_alignment,
    layer_balanced,
    layer_descent,
    layer_exponents,
    layer_flows,
    layer_large,
    layer_scaling,
    layer_spectral,
    layer_stable,
    layer_starts,
    lora_alignment,
    lora_convergence,
    lora_early,
    lora_mirror,
    lora_spectral,
    network_bias,
    network_descent,
    network_flow,
    network_local,
    network_weights,
    symmetric,
)
from lora_flow.claims.frame import ENTERED, Claim

BEGINNING = (
    *(lora_early, lora_alignment, lora_convergence, lora_spectral, lora_mirror),
    *(layer_alignment, layer_starts, layer_flows, layer_descent, layer_stable),
    *(network_flow, network_bias, network_weights, network_descent, network_local),
    *(symmetric, layer_large),
)
REST = (
    *(attention, attention_softmax, layer_scaling, layer_exponents),
    *(layer_spectral, layer_balanced, continual),
)
CHAPTERS = (*BEGINNING, *REST)
CLAIMS: dict[str, Claim] = {
    name: claim for chapter in CHAPTERS for name, claim in ENTERED.items() if claim.__module__ == chapter.__name__
}
