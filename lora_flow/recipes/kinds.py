"""The kinds of problems that a command can name: the flags of each, how it is drawn from them, and how large it is.

One class a kind; a class without fields has no flags of its own. Imports no JAX.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from lora_flow.checks import InputError, require, require_choice

if TYPE_CHECKING:
    from jaxtyping import Array

    from lora_flow.problems.base import Problem
    from lora_flow.problems.factorization import Factorization
    from lora_flow.sweeps.grid import Problems

TURNED = ("problem_seed", "angle", "noise")  # flags that every fine-tuned pair of layers takes
LAYERS = ("m", "n", "h", "shift_scale", "component")
DATA = ("m", "n", "samples", "input_kappa")


class Kind:
    """A kind of problem on the command line: its flags, its draw and its size."""

    takes: ClassVar[tuple[str, ...]] = TURNED
    """The flags of this kind; any other must be left out."""

    continuous: ClassVar[tuple[str, ...]] = ()
    """The axes of this kind by which its problem can be differentiated."""

    @staticmethod
    def draw(asked: Flags, key: Array) -> Problem:
        """The problem that the flags ask for, each axis with one value."""
        raise NotImplementedError

    @staticmethod
    def made(asked: Flags, key: Array, **continuous: Any) -> Problem:
        """The same at other values of the `continuous` axes, which JAX may trace."""
        raise NotImplementedError

    @staticmethod
    def shape(asked: Flags) -> tuple[int, int, int]:
        """Outputs, inputs, and the hidden width, 0 without a hidden layer; zeros where the sizes are not known."""
        return 0, 0, 0

    @staticmethod
    def written_out(asked: Flags) -> dict[str, int | float]:
        """The count of numbers in large weights and data, by the flag that sets it; a `Diagonal` counts as none."""
        return {}

    @staticmethod
    def together(members: tuple[Problem, ...]) -> tuple[Problem, ...]:
        """The problems with arrays of the same shapes, as one program takes them."""
        return members


@dataclasses.dataclass(frozen=True)
class Trained:
    """The problem. Several values here and below make several problems."""

    problem: str = "aligned"
    """To fine-tune: aligned (two layers, the flags below), pretrained (the same, with weights that are trained first),
    regression (one layer on data), attention (a head with labels of a teacher), digits (real images), or a .npz or
    .safetensors file: two layers w1 (h, n), w2 (m, h) with shift or target (m, n); or one layer's weight (out, in) with
    its gradient dL/dW, or with the shift that it has to learn (-gradient for white inputs), and inputs (samples, in)
    or covariance (in, in) where they are not white; or two .npy files, weight.npy,gradient.npy. To train from scratch:
    network (two layers; --rank is the width), symmetric (one factor)."""
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
    axes: ClassVar[tuple[str, ...]] = ("problem_seed", "angle", "noise")


@dataclasses.dataclass(frozen=True)
class Aligned(Kind):
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
    axes: ClassVar[tuple[str, ...]] = ("delta_w",)
    takes: ClassVar[tuple[str, ...]] = (*LAYERS, *TURNED, "delta_w")
    continuous: ClassVar[tuple[str, ...]] = ("delta_w", "angle", "noise")

    @staticmethod
    def draw(asked: Flags, key: Array) -> Problem:
        return Aligned.made(asked, key, delta_w=asked.delta_w[0], angle=asked.angle[0], noise=asked.noise[0])

    @staticmethod
    def made(asked: Flags, key: Array, **continuous: Any) -> Problem:
        from lora_flow.recipes.aligned import aligned_problem

        problem = aligned_problem(key, **layers(asked), delta_w=continuous["delta_w"])
        return turned(problem, key, continuous["angle"], continuous["noise"])

    @staticmethod
    def shape(asked: Flags) -> tuple[int, int, int]:
        return asked.m, asked.n, asked.h


@dataclasses.dataclass(frozen=True)
class Pretrained(Kind):
    """With --problem pretrained: the same, with weights that are trained first."""

    pretraining: tuple[str, ...] = ("gaussian-both",)
    """The initialisation that pretraining starts from, for instance gaussian-both:RATIO."""
    pretraining_alpha: float = 0.1
    """The scale alpha of that initialisation."""
    axes: ClassVar[tuple[str, ...]] = ("pretraining",)
    takes: ClassVar[tuple[str, ...]] = (*LAYERS, *TURNED, "pretraining", "pretraining_alpha")

    @staticmethod
    def draw(asked: Flags, key: Array) -> Problem:
        from lora_flow.initialization import find_scheme
        from lora_flow.recipes.network import pretrained_problem

        alpha, init = asked.pretraining_alpha, asked.pretraining[0]
        require(0 < alpha < math.inf, "pretraining_alpha", "be positive and finite", alpha)
        try:
            scheme = find_scheme(init)
        except InputError as error:
            raise InputError(f"pretraining: {error}") from error
        must = "be an initialisation of networks (lora-flow inits marks them)"
        require(scheme.network, "pretraining", must, f"'{init}'")
        return turned(
            pretrained_problem(key, **layers(asked), init=init, alpha=alpha), key, asked.angle[0], asked.noise[0]
        )

    @staticmethod
    def shape(asked: Flags) -> tuple[int, int, int]:
        return asked.m, asked.n, asked.h

    @staticmethod
    def written_out(asked: Flags) -> dict[str, int | float]:
        m, n, h = asked.m, asked.n, asked.h
        return {"m": m * max(n, h), "n": n * max(m, h), "h": h * max(m, n)}


@dataclasses.dataclass(frozen=True)
class Regression(Kind):
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
    """The activation behind the layer, linear or relu; of attention, linear or softmax."""
    axes: ClassVar[tuple[str, ...]] = ("kappa",)
    takes: ClassVar[tuple[str, ...]] = (*DATA, "problem_seed", "angle", "target_rank", "kappa", "activation")
    continuous: ClassVar[tuple[str, ...]] = ("kappa", "angle")

    @staticmethod
    def draw(asked: Flags, key: Array) -> Problem:
        return Regression.made(asked, key, kappa=asked.kappa[0], angle=asked.angle[0])

    @staticmethod
    def made(asked: Flags, key: Array, **continuous: Any) -> Problem:
        from lora_flow.recipes.one_layer import regression_problem

        return regression_problem(
            key,
            m=asked.m,
            n=asked.n,
            target_rank=asked.target_rank,
            samples=asked.samples,
            input_kappa=asked.input_kappa,
            activation=asked.activation,
            **continuous,
        )

    @staticmethod
    def shape(asked: Flags) -> tuple[int, int, int]:
        return asked.m, asked.n, 0

    @staticmethod
    def written_out(asked: Flags) -> dict[str, int | float]:
        m, n = asked.m, asked.n
        return {"m": m * max(m, n), "n": n * n, "samples": asked.samples * n}


@dataclasses.dataclass(frozen=True)
class Network(Kind):
    """With --problem network: two layers, trained from scratch."""

    input_rank: int = 0
    """Rank of the inputs' covariance; 0 for full rank."""
    target_noise: float = 0.0
    """Norm of the noise in the targets, relative to the part that the inputs explain."""
    axes: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = (*DATA, "problem_seed", "input_rank", "target_noise")
    shape, written_out = Regression.shape, Regression.written_out

    @staticmethod
    def draw(asked: Flags, key: Array) -> Problem:
        from lora_flow.recipes.network import network_problem

        return network_problem(
            key,
            m=asked.m,
            n=asked.n,
            samples=asked.samples,
            input_rank=asked.input_rank,
            input_kappa=asked.input_kappa,
            target_noise=asked.target_noise,
        )


@dataclasses.dataclass(frozen=True)
class Symmetric(Kind):
    """With --problem symmetric: one factor X of a symmetric matrix of size m, X X^T (--init tied)."""

    eigenvalues: tuple[float, ...] = (2.0, 1.0)
    """Eigenvalues of the matrix, of either sign, one of them positive; the others are 0."""
    axes: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ("m", "problem_seed", "eigenvalues")

    @staticmethod
    def draw(asked: Flags, key: Array) -> Problem:
        from lora_flow.recipes.symmetric import symmetric_problem

        return symmetric_problem(key, m=asked.m, eigenvalues=asked.eigenvalues)

    @staticmethod
    def shape(asked: Flags) -> tuple[int, int, int]:
        return asked.m, asked.m, 0

    @staticmethod
    def written_out(asked: Flags) -> dict[str, int | float]:
        return {"m": 2 * asked.m**2}


@dataclasses.dataclass(frozen=True)
class Attention(Kind):
    """With --problem attention: LoRA on a pre-trained attention head with tokens of dimension m (--rank 1).

    It takes --activation too, linear or softmax.
    """

    tokens: tuple[int, ...] = (3,)
    """T, the number of tokens in a sequence."""
    sample_ratio: tuple[float, ...] = (3.0,)
    """alpha', the number of sequences over m."""
    ridge: tuple[float, ...] = (0.5,)
    """lambda', the ridge on the adapters."""
    label_noise: tuple[float, ...] = (0.5,)
    """Delta, the variance of the noise behind the labels."""
    task_rank: int = 1
    """Columns of w*, which the adapters have to learn."""
    pretraining_ratio: tuple[float, ...] = (0.1,)
    """alpha, the number of sequences of pre-training over m^2."""
    pretraining_ridge: tuple[float, ...] = (0.1,)
    """lambda, the ridge of pre-training."""
    teacher_width: float = 1.0
    """kappa0, the rank of the teacher's map over m."""
    pretrained_by: str = "law"
    """law (a draw of the frozen map from its law for large m) or descent (L-BFGS on the loss of pre-training)."""
    beta: tuple[float, ...] = (1.0,)
    """Multiplier of the frozen map."""
    kept: tuple[float, ...] = (1.0,)
    """Share that is kept of a pool of sequences: those with the smallest frozen pre-activations."""
    reused: bool = False
    """Fine-tune on sequences of pre-training (by descent)."""
    axes: ClassVar[tuple[str, ...]] = (
        *("tokens", "sample_ratio", "ridge", "label_noise", "pretraining_ratio", "pretraining_ridge"),
        *("beta", "kept"),
    )
    takes: ClassVar[tuple[str, ...]] = (
        *("m", "problem_seed", "activation", "task_rank", "teacher_width", "pretrained_by", "reused"),
        *axes,
    )

    @staticmethod
    def draw(asked: Flags, key: Array) -> Problem:
        from lora_flow.recipes.attention import attention_problem

        one = {name: getattr(asked, name)[0] for name in Attention.axes}
        rest = ("m", "activation", "task_rank", "teacher_width", "pretrained_by", "reused")
        return attention_problem(key, **one, **{name: getattr(asked, name) for name in rest})

    @staticmethod
    def shape(asked: Flags) -> tuple[int, int, int]:
        return asked.m, asked.m, 0

    @staticmethod
    def written_out(asked: Flags) -> dict[str, int | float]:
        problems = math.prod(len(getattr(asked, name)) for name in (*Attention.axes, "problem_seed"))
        row, longest = asked.m * problems, max(asked.tokens)
        return {"m": row * asked.m, "sample_ratio": row * asked.m * longest * max(asked.sample_ratio)}

    @staticmethod
    def together(members: tuple[Problem, ...]) -> tuple[Problem, ...]:
        from lora_flow.problems.attention import AttentionLoRA

        attention = [member for member in members if isinstance(member, AttentionLoRA)]
        sequences, length = (max(member.tokens.shape[axis] for member in attention) for axis in (0, 1))
        return tuple(member.padded(sequences, length) for member in attention)


class Digits(Kind):
    """With --problem digits: two layers, and real images."""

    @staticmethod
    def draw(asked: Flags, key: Array) -> Problem:
        from lora_flow.recipes.files import digits_problem

        return turned(digits_problem(), key, asked.angle[0], asked.noise[0])

    @staticmethod
    def shape(asked: Flags) -> tuple[int, int, int]:
        return 10, 64, 64


class File(Kind):
    """With --problem PATH: a problem of one's own."""

    @staticmethod
    def draw(asked: Flags, key: Array) -> Problem:
        from lora_flow.problems.factorization import Factorization
        from lora_flow.recipes.files import load_problem

        problem = load_problem(asked.problem)
        if isinstance(problem, Factorization):
            return turned(problem, key, asked.angle[0], asked.noise[0])
        for name in ("angle", "noise"):
            (value,) = getattr(asked, name)
            require(value == 0, name, "be left out with a file of one layer", value)
        return problem


@dataclasses.dataclass(frozen=True)
class Flags(Attention, Symmetric, Network, Regression, Pretrained, Aligned, Trained):
    """All flags of all kinds."""


KINDS: dict[str, type[Kind]] = {
    "aligned": Aligned,
    "pretrained": Pretrained,
    "regression": Regression,
    "network": Network,
    "symmetric": Symmetric,
    "attention": Attention,
    "digits": Digits,
}
# several values: several problems
AXES = (*Aligned.axes, *Trained.axes, *Regression.axes, *Pretrained.axes, *Attention.axes)


def kind_of(problem: str) -> type[Kind]:
    """The kind that `--problem` names."""
    if is_file_name(problem):
        return File
    require_choice("problem", problem, KINDS, "or an .npz or .safetensors file")
    return KINDS[problem]


def is_file_name(problem: str) -> bool:
    return "." in problem or "/" in problem


def draw_all(asked: Flags) -> Problems:
    """The problems that the flags name: one, or one for each combination of the axes that have several values.

    **Raises:** `InputError` for a flag of another kind, and for what the kind refuses.
    """
    import jax

    from lora_flow.sweeps.grid import Problems

    check_flags(asked)
    kind = kind_of(asked.problem)
    axes = {name: getattr(asked, name) for name in AXES}
    members = []
    for values in itertools.product(*axes.values()):
        one: dict[str, Any] = {name: (value,) for name, value in zip(AXES, values, strict=True)}
        (seed,) = one["problem_seed"]
        members.append(kind.draw(dataclasses.replace(asked, **one), jax.random.key(seed)))
    for name, listed in axes.items():
        require(len(set(listed)) == len(listed), name, "name each value once", listed)
    return Problems(kind.together(tuple(members)), {name: listed for name, listed in axes.items() if len(listed) > 1})


def family(asked: Flags) -> tuple[Callable[..., Problem], dict[str, float]]:
    """The problem that the flags name as a function of its kind's continuous parameters, and their values.

    **Raises:** `InputError` as `draw_all` does, and for an axis with several values.
    """
    import jax

    check_flags(asked)
    for name in AXES:
        values = getattr(asked, name)
        require(len(values) == 1, name, "have one value, at which derivatives are taken", values)
    kind = kind_of(asked.problem)
    key = jax.random.key(asked.problem_seed[0])
    values = {name: getattr(asked, name)[0] for name in kind.continuous}
    if not values:
        return functools.partial(kind.draw, asked, key), values
    return functools.partial(kind.made, asked, key), values


def check_flags(asked: Flags) -> None:
    """Raises for a flag of another kind than the one that the flags name."""
    kind = kind_of(asked.problem)
    for field in dataclasses.fields(Flags):
        value, free = getattr(asked, field.name), field.name in ("problem", *kind.takes)
        must = f"be left out with problem '{asked.problem}'"
        require(free or value == field.default, field.name, must, value)


def layers(asked: Flags) -> dict[str, Any]:
    """The common arguments of `aligned_problem` and `pretrained_problem`."""
    told: dict[str, Any] = {name: getattr(asked, name) for name in LAYERS}
    if len(asked.shift_scale) == 1:
        told["shift_scale"] = asked.shift_scale[0]
    return told


def turned(problem: Factorization, key: Array, angle: Any, noise: Any) -> Factorization:
    """The problem with its shift turned away and noise in its weights."""
    import jax

    from lora_flow.recipes.turned import is_zero, misaligned, noisy

    if is_zero(angle) and is_zero(noise):
        return problem
    away = misaligned(problem, jax.random.fold_in(key, 1), angle=angle)
    return noisy(away, jax.random.fold_in(key, 2), noise=noise)
