"""Exact solutions of gradient flows, to test a solver with."""

from lora_flow.oracles.exact import (
    Products,
    first_layer,
    riccati,
    scalar,
    schur_complement,
    single_layer,
    spectral,
    symmetric,
    symmetric_mode,
)

__all__ = [
    "Products",
    "first_layer",
    "riccati",
    "scalar",
    "schur_complement",
    "single_layer",
    "spectral",
    "symmetric",
    "symmetric_mode",
]
