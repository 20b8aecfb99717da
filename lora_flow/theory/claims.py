"""The claims of arXiv 2503.06982 and of the talk on it, in the order in which they are tried.

What the paper prints in two versions has a line for each: the right reading is meant to hold, the other one to fail.
"""

from lora_flow.theory import alignment, convergence, linear, spectral
from lora_flow.theory.lines import ENTERED, Case, Claim, Line

CLAIMS: dict[str, Claim] = {
    name: claim
    for module in (linear, alignment, convergence, spectral)
    for name, claim in ENTERED.items()
    if claim.__module__ == module.__name__
}

__all__ = ["CLAIMS", "Case", "Claim", "Line"]
