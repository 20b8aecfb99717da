"""Every setting of a sweep, as groups of flags: what each means, and its default."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Runs:
    """What is run: all combinations of these.

    Several values are given with spaces or commas between them. A range of numbers is FROM:TO:COUNT, in equal ratios
    (1e-6:1e-2:9), or from 0 in equal steps (0:90:7); one of integers is FROM:TO, without its end (0:60), or
    FROM:TO:STEP.
    """

    init: tuple[str, ...] = ("gaussian",)
    """Initialisations: gaussian (one factor random, the other zero), spectral (along the task's singular vectors),
    lora-one (balanced factors of one gradient step), orthogonal, lora-one-theory, lora-ga, lora-ga-peft, gora, pissa,
    milora, olora, loram, eva. For networks, and taken by any problem: gaussian-both[:RATIO], gaussian-wide[:P],
    balanced, spectral-both[:RATIO], invariant. `lora-flow inits` has the formulas and what each asks for."""
    side: tuple[str, ...] = ("A",)
    """Which factor gaussian draws: A (LoRA's convention, B = 0) or B (the paper's figures, A = 0)."""
    alpha: tuple[float, ...] = (1e-3,)
    """Initialisation scales: the standard deviation of gaussian's entries; for the others both factors are multiplied
    by it (1 is then their source's size)."""
    rank: tuple[int, ...] = (4,)
    """LoRA ranks, from 1 to the smallest layer dimension. Network: hidden widths, any."""
    seeds: int | tuple[int, ...] = 1
    """Number of random initialisations, seeds 0, 1, ...; several values or a range (0 3 7, 10:20) are the seeds
    themselves. Common to all other settings."""


@dataclasses.dataclass(frozen=True)
class Times:
    """How long, and what is stored on the way."""

    t1: float = 5.0
    """End of the flow, in gradient-flow time: n steps of gradient descent with step eta reach n * eta."""
    saves: int = 101
    """Number of times at which observables are saved, 0 and t1 included."""
    spacing: str = "linear"
    """Spacing of these times: linear, or log (0, then the four decades up to t1)."""
    details: bool = False
    """Also store what is computed from the adapters at every saved time: the update's singular values and terms,
    growth rates, the gradient's norm, and alignment errors without a floor."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What is trained. Several values here and below make several problems."""

    problem: str = "aligned"
    """What is fine-tuned: aligned (two layers, the flags below), pretrained (the same, with weights that are trained
    first), regression (one layer on data), digits (real images), or a .npz or .safetensors file with arrays w1 (h, n),
    w2 (m, h) and shift or target (m, n). Or what is trained from scratch: network (two layers; --rank is its width)."""
    m: int = 10
    """Outputs: rows of W2 and of the target. All problems that are drawn."""
    n: int = 10
    """Inputs: columns of W1 and of the target."""
    problem_seed: tuple[int, ...] = (0,)
    """The seed of the problem's weights and data, and of what --angle and --noise draw."""
    angle: tuple[float, ...] = (0.0,)
    """Turn the shift's singular vectors away from the pretrained weights' by this many degrees, 0 to 90."""
    noise: tuple[float, ...] = (0.0,)
    """Noise in each pretrained weight, relative to the weight's norm; the target stays, the shift takes it up."""


@dataclasses.dataclass(frozen=True)
class Aligned:
    """With --problem aligned: two layers whose weights are aligned with the task.

    All but --delta-w go with pretrained too.
    """

    h: int = 100
    """Hidden width, the rows of W1 and columns of W2."""
    delta_w: tuple[float, ...] = (1 / 1.05**2,)
    """sigma_W1 / sigma_W2. Below 1, layer 1's adapter learns faster."""
    shift_scale: tuple[float, ...] = (5.0,)
    """Singular value of the shift; one, or one for each component."""
    component: tuple[str, ...] = ("top",)
    """The shift's singular pair in the pretrained weights: top, bottom or an index; several give a
    shift of higher rank."""


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """With --problem pretrained: the same, with weights that are trained first."""

    pretraining: tuple[str, ...] = ("gaussian-both",)
    """The start that the frozen weights were trained from, gaussian-both:RATIO for instance."""
    pretraining_alpha: float = 0.1
    """The scale of that start."""


@dataclasses.dataclass(frozen=True)
class Regression:
    """With --problem regression: one layer on data. --samples and --input-kappa go with network too."""

    samples: int = 0
    """Number of samples; 0 for infinitely many."""
    input_kappa: float = 1.0
    """Condition number of the inputs' covariance. (Regression: along the weight's directions.)"""
    target_rank: int = 2
    """Rank of the shift."""
    kappa: tuple[float, ...] = (1.0,)
    """Condition number of the shift; its singular values go from 1 to 1/kappa."""
    activation: str = "linear"
    """What follows the layer, linear or relu."""


@dataclasses.dataclass(frozen=True)
class Network:
    """With --problem network: two layers that are trained from scratch."""

    input_rank: int = 0
    """Rank of the inputs' covariance; 0 for all of them."""
    target_noise: float = 0.0
    """Norm of the noise in the targets, relative to what the inputs explain."""


@dataclasses.dataclass(frozen=True)
class Solving:
    """By which flow and solver, and on which devices."""

    flow: str = "plain"
    """What drives the adapters: plain (gradient flow), lora-plus:RATIO (B learns that many times as fast as A),
    scaled[:DAMPING] (each factor preconditioned by the other), lora-pro[:DAMPING] (the gradient's tangent part), or
    shrink-a:RATE (A decays at that rate)."""
    solver: str = "auto"
    """auto (Tsit5, and for the plain flow, where stability limits the step, RKC), RKC (Runge-Kutta-Chebyshev, for long
    stiff runs of the plain flow), Tsit5, Dopri5, Dopri8, Bosh3 or Heun. (From Python, any of diffrax's.)"""
    rtol: float = 5e-4
    """Tolerance, relative to the factors and to the residual. The default keeps the loss within 0.05 decades, down to
    1e-24."""
    max_steps: int = 100_000
    """Solver steps after which a run is given up; its status is then max_steps."""
    precision: str = "double"
    """Floating-point precision: double, or single (the loss then stops near 1e-13 of its start)."""
    batch_size: int = 64
    """The most runs that one device steps together; they are stored together too."""
    devices: int = 0
    """Devices to use, of GPUs and TPUs those present and of a CPU its cores; 0 for all."""


GROUPS = (Runs, Times, Trained, Aligned, Pretrained, Regression, Network, Solving)
