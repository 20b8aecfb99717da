"""One factor of a symmetric matrix: equilibria, the cascade, rates and tails, and what they say of LoRA."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_flow import oracles
from lora_flow.claims.frame import DERIVED, Cases, claim
from lora_flow.claims.layer_runs import adapter, norm
from lora_flow.dynamics.lanes import finished, solve_lanes, stack
from lora_flow.problems.one_layer import SingleLayer
from lora_flow.problems.symmetric import SymmetricFactorization
from lora_flow.runtime.compiling import compiled
from lora_flow.theory import symmetric as theory

PAPER = "Mohammadi et al. 2024"
N, WIDEST = 6, 8
FIRST_DRAW = 330  # from which all noise starts at an ordinary size: the less, the later t ||S|| comes to 1/2
OVER = (2.0, 1.0, 0.0, 0.0, 0.0, 0.0)
GAP = (2.0, 1.0, 0.6, 0.3, 0.0, 0.0)
DAMPED = (2.0, 1.0, -0.2, -0.5, -0.5, -0.5)
MIXED = (1.0, 1.0, 0.0, 0.0, -0.5, -0.5)
LONG = (*((OVER, r) for r in (2, 3, 4, 5, 6, 8)), (GAP, 2), (DAMPED, 4), (MIXED, 6))
LATE = (1e2, 1e3, 1e4)
REST = ((0.0,) * 4, (0.0, 0.0, -0.3, -1.0), (-0.1, -0.2, -0.3, -0.4))
CASCADES = tuple(((2.0, 1.0, *rest), r) for rest in REST for r in (2, 3, 4, 6))
SPECTRA = {"a null space": OVER, "repeated": (1.0, 1.0, 1.0, 0.5, 0.0, 0.0), "negative ones too": MIXED}
RUNS = f"n = {N}, one draw for each spectrum and rank"
SHAPE, TASK = (9, 12), (1.0, 0.6)
LORA = f"one layer, {SHAPE[0]} x {SHAPE[1]}, r* = {len(TASK)}, one draw for each rank"


class Long(NamedTuple):
    """The loss beyond its least value at the rank, and ||S||, `(lane, time)`."""

    times: np.ndarray
    excess: np.ndarray
    noise: np.ndarray


def matrix(values: Any) -> tuple[np.ndarray, np.ndarray]:
    """A matrix with these eigenvalues, and its eigenvectors."""
    basis, _ = np.linalg.qr(np.random.default_rng(len(values)).normal(size=(len(values), len(values))))
    return basis * np.array(values) @ basis.T, basis


def follow(lanes: Any, times: np.ndarray, **how: Any) -> tuple[list[SymmetricFactorization], list[np.ndarray], Any]:
    """The problems, starts X of N(0, .3^2), and runs of several spectra and ranks in one program."""
    problems, starts = [], []
    for index, (values, rank) in enumerate(lanes):
        problems.append(SymmetricFactorization(matrix(values)[0]))
        starts.append(0.3 * np.random.default_rng(FIRST_DRAW + index).normal(size=(N, rank)))
    padded = [SymmetricFactorization.adapters(np.pad(x, ((0, 0), (0, WIDEST - x.shape[1])))) for x in starts]
    solved = solve_lanes(stack(problems), stack(padded), times, each=True, keep=("loss", "noise"), **how)
    return problems, starts, finished(solved)


@functools.cache
def long() -> Long:
    """To t = 1e4, at the defaults of `solve`."""
    times = np.concatenate([np.arange(21.0), LATE])
    problems, _, run = follow(LONG, times)
    least = [problem.lowest_loss(rank) for problem, (_, rank) in zip(problems, LONG, strict=True)]
    seen = run.observables
    return Long(times, np.asarray(seen["loss"]) - np.array(least)[:, None], np.asarray(seen["noise"]))


@compiled(quickly=True)
def jacobians(problem: SymmetricFactorization, points: Array) -> Array:
    """Of the flow of X at several points, `(point, n r, n r)`."""

    def flow(flat: Array, shape: Any) -> Array:
        return jnp.ravel(problem.factor(problem.field(problem.adapters(flat.reshape(shape)))))

    return jax.vmap(lambda x: jax.jacfwd(lambda flat: flow(flat, x.shape))(x.ravel()))(points)


@functools.cache
def linearised(name: str, rank: int) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Every equilibrium's J, and the eigenvalues of the Jacobian there, in increasing order."""
    values = np.array(SPECTRA[name])
    target, basis = matrix(values)
    chosen, points, rng = list(theory.equilibria(values, rank)), [], np.random.default_rng(rank)
    for places in chosen:
        rotation, _ = np.linalg.qr(rng.normal(size=(rank, rank)))
        points.append(basis[:, places] * np.sqrt(values[list(places)]) @ rotation[:, : len(places)].T)
    found = jacobians(SymmetricFactorization(target), jnp.asarray(np.stack(points)))
    return chosen, np.linalg.eigvalsh(np.asarray(found))


@claim(DERIVED, f"the Jacobian at every equilibrium, n = {N}", within=1e-10)
def symmetric_spectra(seeds: int) -> Cases:
    """
    eigenvalues of the Jacobian at an equilibrium on J: -(l_a + l_b), l_i - l_a, l_i for unused columns, 0 for
    rotations: largest error
    """
    for name, values in SPECTRA.items():
        for rank in (1, 2, 4):
            chosen, found = linearised(name, rank)
            expected = np.array([theory.spectrum(np.array(values), rank, places) for places in chosen])
            yield f"{name}, r = {rank}, {len(chosen)} equilibria", 0, np.max(np.abs(found - expected))


@claim(f"{PAPER}, abstract; derived here", f"the Jacobian at every equilibrium, n = {N}")
def symmetric_saddles(seeds: int) -> Cases:
    """stable are the equilibria on the min(r, r+) largest eigenvalues alone: unstable directions of all others"""
    for name, values in SPECTRA.items():
        for rank in (1, 2, 4):
            chosen, found = linearised(name, rank)
            counts = [theory.unstable_directions(np.array(values), rank, places) for places in chosen]
            unstable = np.sum(found > 1e-9, axis=1)
            best = np.sort(np.array(values))[::-1][: min(rank, theory.positive_count(np.array(values)))]
            top = [np.isclose(sum(np.array(values)[list(places)]), sum(best)) for places in chosen]
            also = np.all((unstable == counts) & ((unstable == 0) == top))
            yield f"{name}, r = {rank}", sum(counts), np.sum(unstable), True, also


@functools.cache
def staged() -> tuple[list[Any], list[oracles.Cascade]]:
    """S, H and R of runs to t = 6, measured, and in closed form."""
    times = np.linspace(0.0, 6.0, 7)
    problems, starts, run = follow(CASCADES, times, solver="Dopri8", rtol=1e-10, save_adapters=True)
    factors = np.asarray(SymmetricFactorization.factor(run.history))
    closed = [oracles.cascade(problem.matrix, x, times) for problem, x in zip(problems, starts, strict=True)]
    measured = []
    for one, x in zip(closed, factors, strict=True):
        parts, k = np.asarray(one.basis).T @ x, len(one.signal[0])
        p = parts @ parts.mT
        signal: Any = np.linalg.inv(p[:, :k, :k])
        tilt = p[:, k:, :k] @ signal
        measured.append(oracles.Cascade(p[:, k:, k:] - tilt @ p[:, :k, k:], tilt, signal, one.basis))
    return measured, closed


@claim(f"{PAPER}, abstract; derived here", f"{RUNS}, to t = 6, rtol = 1e-10", within=1e-7)
def symmetric_cascade(seeds: int) -> Cases:
    """S = P22 - P21 P11^-1 P12, then H = P21 P11^-1, then P11, in closed form: largest error"""
    for (values, rank), found, closed in zip(CASCADES, *staged(), strict=True):
        p11 = (np.linalg.inv(np.asarray(one.signal)) for one in (found, closed))
        pairs = (found.noise, closed.noise), (found.tilt, closed.tilt), p11
        errors = [np.max(np.abs(np.asarray(one) - other)) for one, other in pairs]
        yield f"-L2 = {values[2:]}, r = {rank}", 0, max(errors)


@claim(f"{PAPER}, abstract; derived here", f"{RUNS}, to t = 1e3, at the defaults", within=(1e-3, 0.0))
def symmetric_noise(seeds: int) -> Cases:
    """r > r+: t ||S||_2 tends to 1/2 whatever the start, on M's null space"""
    run = long()
    for (values, rank), noise in zip(LONG, run.noise, strict=True):
        if theory.tail(np.array(values), rank) > 0:
            yield f"{_told(values)}, r = {rank}", theory.noise_limit(), 1e3 * noise[run.times == 1e3][0]


@claim(DERIVED, f"{RUNS}, to t = 1e4, at the defaults", within=0.01, relative=True)
def symmetric_tail(seeds: int) -> Cases:
    """r > r+: t^2 (f - f*) tends to min(r - r+, dimension of the null space)/16"""
    for (values, rank), excess in zip(LONG, long().excess, strict=True):
        limit = theory.tail(np.array(values), rank)
        if limit > 0:
            yield f"{_told(values)}, r = {rank}", limit, 1e8 * excess[-1]


@claim(DERIVED, f"{RUNS}, to t = 1e4, at the defaults", within=1e-12)
def symmetric_exact(seeds: int) -> Cases:
    """r = r+: S = 0 at all times, largest ||S||_2"""
    yield f"{_told(OVER)}, r = 2", 0, np.max(long().noise[0])


@claim(f"{PAPER}, abstract; derived here", f"{RUNS}, at the defaults", within=0.01, relative=True)
def symmetric_rates(seeds: int) -> Cases:
    """-d log(f - f*)/dt in the end: 2 l_r, 2 (l_r - l_(r+1)) at a gap, 2 l over-parametrised with -l the largest < 0"""
    run = long()
    for (values, rank), excess in zip(LONG, run.excess, strict=True):
        rate = theory.final_rate(np.array(values), rank)
        if rate > 0:
            yield f"{_told(values)}, r = {rank}", rate, np.log(excess[16] / excess[18]) / 2


def _told(values: Any) -> str:
    return "M = diag(" + ", ".join(f"{value:g}" for value in values) + ")"


# LoRA


class Lora(NamedTuple):
    """The loss, B and A over `(lane, time)`, and the basis of Y's columns."""

    times: np.ndarray
    loss: np.ndarray
    a: np.ndarray
    b: np.ndarray
    columns: np.ndarray


STARTS = (("balanced", 3), ("balanced", 4), ("balanced", 6), ("B = 0", 2), ("B = 0", 4), ("B = 0", 6), ("tied", 6))


@functools.cache
def lora() -> Lora:
    """From balanced starts, LoRA's, and tied ones of an indefinite matrix, bordered by zeros to the same shape."""
    rng, times = np.random.default_rng(0), np.array([0.0, 10.0, 20.0, 30.0, 1e4])
    left, right = (np.linalg.qr(rng.normal(size=(size, size)))[0] for size in SHAPE)
    task = left[:, :2] * np.array(TASK) @ right[:, :2].T
    indefinite = np.zeros(SHAPE)
    indefinite[:, : SHAPE[0]] = left[:, :3] * np.array(TIED) @ left[:, :3].T
    shifts, starts = [], []
    for kind, rank in STARTS:
        b = 0.3 * rng.normal(size=(SHAPE[0], rank))
        if kind == "balanced":
            turned = np.linalg.qr(rng.normal(size=(SHAPE[1], SHAPE[0])))[0] @ b
            pair = turned.T, b
        elif kind == "tied":
            b[:, len(TIED) :] = 0  # columns that X does not use
            pair = np.pad(b.T, ((0, 0), (0, SHAPE[1] - SHAPE[0]))) + 1e-10 * rng.normal(size=(rank, SHAPE[1])), b
        else:
            pair = 0.3 * rng.normal(size=(rank, SHAPE[1])), np.zeros_like(b)
        short = 6 - rank
        starts.append((adapter(np.pad(pair[0], ((0, short), (0, 0))), np.pad(pair[1], ((0, 0), (0, short)))),))
        shifts.append(SingleLayer(indefinite if kind == "tied" else task))
    run = finished(solve_lanes(stack(shifts), stack(starts), times, each=True, keep=("loss",), save_adapters=True))
    history: Any = run.history
    a, b = map(np.asarray, history[0])
    return Lora(times, np.asarray(run.observables["loss"]), a, b, left[:, :2])


TIED = (2.0, 1.0, -0.5)


def _lanes(kind: str) -> list[tuple[int, int]]:
    """The ranks of a kind's lanes, and their places."""
    return [(rank, place) for place, (name, rank) in enumerate(STARTS) if name == kind]


@claim(DERIVED, f"{LORA}, to t = 1e4, at the defaults", within=0.01, relative=True)
def balanced_tail(seeds: int) -> Cases:
    """LoRA from balanced adapters, B^T B = A A^T, r > r*: t^2 L tends to (r - r*)/8"""
    for rank, place in _lanes("balanced"):
        yield f"r = {rank}", theory.balanced_tail(SHAPE, len(TASK), rank), 1e8 * lora().loss[place, -1]


@claim(DERIVED, f"{LORA}, to t = 1e4, at the defaults", "<=")
def no_tail(seeds: int) -> Cases:
    """LoRA from B = 0 has no tail at any rank: L at t = 1e4, over that of balanced adapters"""
    run, others = lora(), dict(_lanes("balanced"))
    for rank, place in _lanes("B = 0"):
        yield f"r = {rank}", 1e-15, run.loss[place, -1] / run.loss[others.get(rank, others[3]), -1]


@claim(DERIVED, f"{LORA}, to t = 1e4, at the defaults", within=1e-12)
def columns_stay(seeds: int) -> Cases:
    """LoRA from B = 0: B's columns stay in Y's column space (largest part outside)"""
    run = lora()
    for rank, place in _lanes("B = 0"):
        b = run.b[place]
        yield f"r = {rank}", 0, np.max(norm(b - run.columns @ (run.columns.T @ b)))


@claim(
    DERIVED,
    "one layer, M = diag(2, 1, -.5, 0 ...), 9 x 9, r = 6, A - B^T of 1e-10 at first",
    within=0.02,
    relative=True,
)
def tie_breaks(seeds: int) -> Cases:
    """M with a least eigenvalue -l parts tied adapters A = B^T of one layer: ||A - B^T|| grows like e^(l t), t to 30"""
    run, ((_, place),) = lora(), _lanes("tied")
    apart = norm(run.a[place][..., : SHAPE[0]] - run.b[place].mT)
    yield "l = 0.5", theory.untying_rate(np.array(TIED)), np.log(apart[3] / apart[2]) / 10
