"""Exact solutions of gradient flows, to test a solver with."""

from lora_flow.oracles.exact import Products as Products
from lora_flow.oracles.exact import first_layer as first_layer
from lora_flow.oracles.exact import riccati as riccati
from lora_flow.oracles.exact import scalar as scalar
from lora_flow.oracles.exact import schur_complement as schur_complement
from lora_flow.oracles.exact import single_layer as single_layer
from lora_flow.oracles.exact import spectral as spectral
from lora_flow.oracles.exact import symmetric as symmetric
from lora_flow.oracles.exact import symmetric_mode as symmetric_mode
