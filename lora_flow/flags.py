"""Every setting of a sweep, as groups of flags: what each means, and its default."""

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
    balanced, spectral-both[:RATIO], invariant. `lora-flow inits` has the formulas and the needs of each."""
    side: tuple[str, ...] = ("A",)
    """The factor that gaussian draws: A (LoRA's convention, B = 0) or B (the paper's figures, A = 0)."""
    alpha: tuple[float, ...] = (1e-3,)
    """Initialisation scales: for gaussian the standard deviation of the entries, for the others a multiplier of both
    factors (at 1 they have their source's size)."""
    rank: tuple[int, ...] = (4,)
    """LoRA ranks, from 1 to the smallest layer dimension; for networks: any hidden width."""
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
class Trained:
    """The problem. Several values here and below make several problems."""

    problem: str = "aligned"
    """To fine-tune: aligned (two layers, the flags below), pretrained (the same, with weights that are trained first),
    regression (one layer on data), digits (real images), or a .npz or .safetensors file with arrays w1 (h, n),
    w2 (m, h) and shift or target (m, n). To train from scratch: network (two layers; --rank is the width)."""
    m: int = 10
    """Outputs: rows of W2 and of the target, for every problem that is drawn."""
    n: int = 10
    """Inputs: columns of W1 and of the target, for every problem that is drawn."""
    problem_seed: tuple[int, ...] = (0,)
    """The seed of the problem's weights and data, and of the draws of --angle and --noise."""
    angle: tuple[float, ...] = (0.0,)
    """Turn the shift's singular vectors away from the pretrained weights' by this many degrees, 0 to 90."""
    noise: tuple[float, ...] = (0.0,)
    """Noise in each pretrained weight, relative to the weight's norm; the target is kept, so the shift absorbs the
    noise."""


@dataclasses.dataclass(frozen=True)
class Aligned:
    """With --problem aligned: two layers whose weights are aligned with the task.

    --problem pretrained takes all of these but --delta-w.
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
    """The initialisation that pretraining starts from, for instance gaussian-both:RATIO."""
    pretraining_alpha: float = 0.1
    """The scale alpha of that initialisation."""


@dataclasses.dataclass(frozen=True)
class Regression:
    """With --problem regression: one layer on data. --problem network takes --samples and --input-kappa too."""

    samples: int = 0
    """Number of samples; 0 for infinitely many."""
    input_kappa: float = 1.0
    """Condition number of the inputs' covariance (for regression along the weight's directions)."""
    target_rank: int = 2
    """Rank of the shift."""
    kappa: tuple[float, ...] = (1.0,)
    """Condition number of the shift; its singular values go from 1 to 1/kappa."""
    activation: str = "linear"
    """The activation behind the layer: linear or relu."""


@dataclasses.dataclass(frozen=True)
class Network:
    """With --problem network: two layers, trained from scratch."""

    input_rank: int = 0
    """Rank of the inputs' covariance; 0 for full rank."""
    target_noise: float = 0.0
    """Norm of the noise in the targets, relative to the part that the inputs explain."""


@dataclasses.dataclass(frozen=True)
class Solving:
    """The flow, the solver and the devices."""

    flow: str = "plain"
    """The flow that drives the adapters: plain (gradient flow), lora-plus:RATIO (B learns RATIO times as fast as A),
    scaled[:DAMPING] (each factor preconditions the other), lora-pro[:DAMPING] (the gradient's tangent part), or
    shrink-a:RATE (A decays at RATE)."""
    solver: str = "auto"
    """auto (Tsit5; for the plain flow RKC where stability limits the step), RKC (Runge-Kutta-Chebyshev, for long stiff
    runs of the plain flow), Tsit5, Dopri5, Dopri8, Bosh3 or Heun. Python takes any of diffrax's solvers."""
    rtol: float = 5e-4
    """Tolerance, relative to the factors and to the residual. The default keeps the loss within 0.05 decades, down to
    1e-24."""
    max_steps: int = 100_000
    """Solver steps after which a run is given up, with status 1 (max_steps)."""
    precision: str = "double"
    """Floating-point precision: double, or single (the loss then stops near 1e-13 of its start)."""
    batch_size: int = 64
    """The largest number of runs that one device steps together, and that are stored together."""
    devices: int = 0
    """Number of devices to use: GPUs or TPUs, or cores of a CPU; 0 for all."""


GROUPS = (Runs, Times, Trained, Aligned, Pretrained, Regression, Network, Solving)
