"""The flags of `lora-flow sweep` in groups: what each means, and its default.

Those of its problem stand in `lora_flow.recipes.kinds`. `lora_flow.settings.Settings` has all of them together.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Runs:
    """The axes of the sweep, which runs all combinations.

    Separate several values by spaces or commas. A range of numbers is FROM:TO:COUNT, in equal ratios (1e-6:1e-2:9), or
    from 0 in equal steps (0:90:7). A range of integers is FROM:TO, without its end (0:60), or FROM:TO:STEP.
    """

    init: tuple[str, ...] = ("gaussian",)
    """Initialisations: gaussian (one factor random, the other zero), spectral (along the task's singular vectors),
    lora-one (balanced factors of one gradient step), orthogonal, lora-one-theory, lora-ga, lora-ga-peft, gora, pissa,
    milora, olora, loram, eva. For networks, but allowed for any problem: gaussian-both[:RATIO], gaussian-wide[:P],
    balanced, tied, spectral-both[:RATIO], invariant. learned:FOLDER: what lora-flow optimise has learned.
    `lora-flow inits` has the formulas and the needs of each."""
    side: tuple[str, ...] = ("A",)
    """The factor that gaussian draws: A (LoRA's convention, B = 0) or B (the paper's figures, A = 0)."""
    alpha: tuple[float, ...] = (1e-3,)
    """Initialisation scales: for gaussian the standard deviation of the entries, for the others a multiplier of both
    factors (at 1 they have their source's size)."""
    rank: tuple[int, ...] = (4,)
    """LoRA ranks, from 1 to the smallest layer dimension; for networks and symmetric: any."""
    seeds: int | tuple[int, ...] = 1
    """Number of random initialisations, seeds 0, 1, ...; several values or a range (0 3 7, 10:20) are the seeds
    themselves. All combinations share the seeds."""


@dataclasses.dataclass(frozen=True)
class Times:
    """The length of the runs, and the times and quantities to store."""

    t1: float = 5.0
    """End of the flow, in gradient-flow time: n steps of gradient descent with step eta reach n * eta."""
    saves: int = 101
    """Number of saved times, 0 and t1 included."""
    spacing: str = "linear"
    """Spacing of the saved times: linear, or log (0, then the four decades up to t1)."""
    details: bool = False
    """At every saved time also store the update's singular values and terms, growth rates, the gradient's norm, and
    alignment errors without a floor."""


@dataclasses.dataclass(frozen=True)
class Descents:
    """Gradient descent in place of a flow, through --steps iterations.

    --saves then counts iterations, and --t1, --spacing, --flow, --solver, --rtol and --max-steps are left out.
    """

    descend: tuple[str, ...] = ()
    """Optimisers with their step sizes: gd:STEP (gradient descent), sign:STEP (sign descent) or adam:STEP (Adam with
    beta 0.9, 0.999 and epsilon 1e-8). Step sizes may be a range, adam:FROM:TO:COUNT, and are the same for all
    optimisers."""
    steps: int = 0
    """Number of iterations."""
    gradient_noise: tuple[float, ...] = (0.0,)
    """Standard deviations of the noise in every entry of dL/dW at every step, as of minibatches."""


@dataclasses.dataclass(frozen=True)
class Solving:
    """The flow, the solver and the devices."""

    flow: str = "plain"
    """The flow that drives the adapters: plain (gradient flow), lora-plus:RATIO (B learns RATIO times as fast as A),
    scaled[:DAMPING] (each factor preconditions the other), lora-pro[:DAMPING] (the gradient's tangent part),
    shrink-a:RATE (A decays at RATE), stable-lora:RATE (the same until ||A||/n < ||B||/m, layer by layer),
    muon[:SMOOTHING] (orthogonalised gradients), lora-muon[:DAMPING[:SMOOTHING]] (spectral steepest descent at rank r),
    or balora (balanced factors)."""
    solver: str = "auto"
    """auto (Tsit5; for plain, balora, muon and lora-muon RKC where stability limits the step), RKC
    (Runge-Kutta-Chebyshev, for long stiff runs of these flows), Tsit5, Dopri5, Dopri8, Bosh3 or Heun. Python takes any
    of diffrax's solvers."""
    rtol: float = 5e-4
    """Tolerance, relative to the factors and to the residual. The default keeps the loss within 0.05 decades, down to
    1e-26 on the problem of Figure 1."""
    max_steps: int = 100_000
    """Solver steps after which a run is given up, with status 1 (max_steps)."""
    precision: str = "double"
    """Floating-point precision: double, or single (losses below 1e-10 of the start are then rounding)."""
    batch_size: int = 0
    """The largest number of runs that one device steps together; 0 for what suits the device: 64 on a CPU, 2048
    elsewhere."""
    devices: int = 0
    """Number of devices to use: GPUs or TPUs, or cores of a CPU; 0 for all."""
