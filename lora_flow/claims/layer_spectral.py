"""Orthogonalised flows of one layer: how singular values grow and finish under Muon and LoRA-Muon, and how W moves."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_flow.adapter import Adapter, Adapters, pad
from lora_flow.claims.frame import DERIVED, Cases, claim
from lora_flow.claims.layer_runs import Run, adapter, draws, norm, spaces
from lora_flow.dynamics.descend import descend
from lora_flow.dynamics.flows import Flow, LoRAMuon, Muon, Plain
from lora_flow.dynamics.lanes import finished, solve_lanes, stack
from lora_flow.problems.one_layer import SingleLayer
from lora_flow.runtime.compiling import compiled
from lora_flow.theory import spectral_flows as theory

EQUAL = "Kang et al. 2026, abstract"
MANIFOLD = "Cesista et al. 2026, abstract"
M, N = 40, 30
SIGMA = np.array([1.0, 0.5, 0.5, 0.2])
ALPHA, LEVEL = 1e-4, 0.95
EARLY, LATE = 2e-5, 2e-4  # smoothings of runs that end before the first mode has finished, and of whole ones
RANKS = (4, 8)
LEFT, RIGHT = spaces(np.random.default_rng(0), M, N, len(SIGMA))
SHIFT = (LEFT * SIGMA) @ RIGHT.T
LAYER = f"one layer, {M} x {N}, singular values 1, .5, .5, .2"
SMALL = f"{LAYER}, r = 4 and 8, from A of size {ALPHA:g}, one draw for each rank"
BOTH = f"{LAYER}, r = 4, from A and B of sizes of .001, three draws, smoothing = .005"
MIXED = f"{LAYER}, r = 4, random factors, smoothing = .01"


class Grown(NamedTuple):
    """The largest singular values of B A, `(rank, time, 4)`, over times."""

    times: np.ndarray
    values: np.ndarray

    def reached(self, rank: int) -> np.ndarray:
        """The times at which the singular values come to a share of the shift's, the largest one first."""
        found = []
        for sigma, values in zip(SIGMA, self.values[rank].T, strict=True):
            after = int(np.argmax(values >= LEVEL * sigma))
            here = slice(after - 1, after + 1)
            found.append(np.interp(LEVEL * sigma, values[here], self.times[here]) if after else np.nan)
        return np.array(found)


@functools.cache
def grown(name: str) -> Grown:
    """From small adapters, B = 0 but for LoRA-Muon, which needs both factors."""
    flows: dict[str, tuple[Flow, tuple[float, float], float]] = {
        "muon, early": (Muon(EARLY), (ALPHA, 0.0), 0.44),
        "muon": (Muon(LATE), (ALPHA, 0.0), 0.98),
        "lora-muon": (LoRAMuon(0.0, 5e-3), (1e-3, 1e-3), 0.97),
        "plain": (Plain(), (ALPHA, 0.0), 100.0),
    }
    (flow, sizes, end), starts = flows[name], []
    for seed, rank in ((4, 4), (5, 4), (6, 4)) if name == "lora-muon" else zip(RANKS, RANKS, strict=True):
        rng = np.random.default_rng(seed)
        starts.append(adapter(sizes[0] * rng.normal(size=(rank, N)), sizes[1] * rng.normal(size=(M, rank))))
    run = _follow(starts, flow, end)
    return Grown(run.times, np.linalg.svd(run.change, compute_uv=False)[..., : len(SIGMA)])


def _follow(starts: list[Adapter], flow: Flow, end: float, shift: np.ndarray = SHIFT) -> Run:
    """One program for each kind of flow, number of starts and shape.

    By Tsit5, which is soon compiled, until all but one mode have finished.
    """
    times = np.linspace(0.0, end, 241)
    padded = [(one,) if isinstance(flow, LoRAMuon) else pad((one,), max(RANKS)) for one in starts]
    how: Any = {"flow": flow, "solver": "Tsit5", "keep": (), "save_adapters": True}
    return Run.of(solve_lanes(SingleLayer(shift), stack(padded), times, **how), times)


@claim(EQUAL, f"{SMALL}, smoothing = {EARLY:g}", within=0.02)
def muon_equal_rates(seeds: int) -> Cases:
    """Muon: all singular values of B A grow at equal rates: the least over the largest, before one has finished"""
    run = grown("muon, early")
    for rank, values in zip(RANKS, run.values, strict=True):
        for time in (0.1, 0.2, 0.3, 0.4):
            now = values[np.argmin(np.abs(run.times - time))]
            yield f"r = {rank}, t = {time:g}", 1, now[-1] / now[0]


@claim(DERIVED, f"{SMALL}, smoothing = {LATE:g}", within=0.01)
def muon_growth(seeds: int) -> Cases:
    """Muon: the singular values are min{sigma, t^2}, largest error"""
    run = grown("muon")
    for rank, values in zip(RANKS, run.values, strict=True):
        yield f"r = {rank}", 0, np.max(np.abs(values - theory.muon_values(SIGMA, run.times[:, None])))


@claim(EQUAL, f"{SMALL}, smoothing = {LATE:g}", within=0.02, relative=True)
def muon_finishes(seeds: int) -> Cases:
    """Muon: smaller singular values finish first, at t = sqrt(sigma): the time to 95 % of sigma"""
    yield from _finishing("muon", theory.muon_finish)


def _finishing(name: str, formula: Any) -> Cases:
    """The times to finish, which also increase with sigma."""
    for i in range(len(grown(name).values)):
        times = grown(name).reached(i)
        rises = np.all(np.diff(times[[0, 1, 3]]) < 0)
        for sigma, time in zip(SIGMA, times, strict=True):
            yield f"start {i + 1}, sigma = {sigma:g}", formula(LEVEL * sigma), time, True, rises


@claim(EQUAL, SMALL, "<=")
def plain_finishes(seeds: int) -> Cases:
    """gradient flow from the same start: the larger a singular value, the sooner it finishes: times, over the next"""
    for i, rank in enumerate(RANKS):
        times = grown("plain").reached(i)
        for one, other in ((0, 1), (1, 3)):
            yield f"r = {rank}, sigma = {SIGMA[one]:g} and {SIGMA[other]:g}", 1, times[one] / times[other]


SIZES = np.array([[0.3, 0.2, 0.1, 0.05], [0.05, 0.2, 0.3, 0.1]])  # of A's and B's modes


@functools.cache
def aligned() -> Grown:
    """Along the shift's singular vectors, from modes of these sizes, in their own order."""
    start = adapter(SIZES[0][:, None] * RIGHT.T, LEFT * SIZES[1])
    run = _follow([start] * len(RANKS), Muon(LATE), 0.8)
    return Grown(run.times, np.diagonal(LEFT.T @ run.change @ RIGHT, axis1=-2, axis2=-1))


@claim(DERIVED, f"{LAYER}, r = 4, along the singular vectors, smoothing = {LATE:g}", within=0.005)
def muon_aligned(seeds: int) -> Cases:
    """Muon along the shift's singular vectors: min{sigma, (a + t)(b + t)}, largest error"""
    expected = theory.muon_values(SIGMA, aligned().times[:, None], *SIZES)
    error = np.max(np.abs(aligned().values[0] - expected), axis=0)
    for sigma, a, b, worst in zip(SIGMA, *SIZES, error, strict=True):
        yield f"sigma = {sigma:g}, a = {a:g}, b = {b:g}", 0, worst


ENDS = ((0.01, 4), (0.2, 4), (0.2, 6), (0.01, 2), (0.2, 2))


@functools.cache
def ends(seeds: int) -> dict[tuple[float, int], np.ndarray]:
    """(L - least L)/L(0) at t = 12 from random starts of several sizes and ranks, for every draw, of a 9 x 7 layer."""
    left, right = spaces(np.random.default_rng(1), 9, 7, len(SIGMA))
    problem, starts = SingleLayer((left * SIGMA) @ right.T), []
    for size, rank in ENDS:
        for rng in draws(seeds):
            one = adapter(size * rng.normal(size=(rank, 7)), size * rng.normal(size=(9, rank)))
            starts.append(pad((one,), 6))
    how: Any = {"flow": Muon(0.02), "solver": "Tsit5", "rtol": 1e-6, "keep": ("loss",)}
    run = finished(solve_lanes(problem, stack(starts), np.array([0.0, 12.0]), **how))
    loss = np.asarray(run.observables["loss"]).reshape(len(ENDS), seeds, 2)
    least = np.array([problem.lowest_loss(rank) for _, rank in ENDS])[:, None]
    return dict(zip(ENDS, (loss[..., -1] - least) / loss[..., 0], strict=True))


@claim(
    EQUAL,
    "one layer, 9 x 7, r* = 4, random A and B, to t = 12, smoothing = .02, rtol = 1e-6, the worst of {seeds} draws",
    "<=",
)
def muon_converges(seeds: int) -> Cases:
    """Muon ends at a global minimum from random starts: (L - min L)/L(0); it comes there slower where r > r*"""
    for (size, rank), excess in ends(seeds).items():
        yield f"r = {rank}, sizes of {size:g}", 1e-5 if rank > len(SIGMA) else 1e-8, np.max(excess)


# LoRA-Muon


@claim(DERIVED, BOTH, within=0.01)
def lora_muon_growth(seeds: int) -> Cases:
    """LoRA-Muon: the singular values are min{sigma, t}, largest error"""
    run = grown("lora-muon")
    for i, values in enumerate(run.values, start=1):
        yield f"start {i}", 0, np.max(np.abs(values - theory.lora_muon_values(SIGMA, run.times[:, None])))


@claim(DERIVED, BOTH, within=0.02, relative=True)
def lora_muon_finishes(seeds: int) -> Cases:
    """LoRA-Muon: smaller singular values finish first, at t = sigma: the time to 95 % of sigma"""
    yield from _finishing("lora-muon", theory.lora_muon_finish)


@functools.cache
def factorisations() -> dict[str, Adapter]:
    """Factors of one product: the first pair, rescaled, and mixed."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, N)) / np.sqrt(N), rng.normal(size=(M, 4)) / np.sqrt(M)
    mixing = rng.normal(size=(4, 4))
    scaled = {f"c = {c:g}": adapter(a / c, c * b) for c in (1.0, 10.0, 1e-3)}
    return scaled | {"mixed": adapter(np.linalg.solve(mixing, a), b @ mixing)}


@functools.cache
def stepped(flow: str) -> dict[str, float]:
    """The largest distance of B A from that of the first factors, over its size, over 60 steps."""
    driven: Flow = {"muon": Muon(0.01), "lora-muon": LoRAMuon(0.0, 0.01)}[flow]
    runs = {name: _descend(SingleLayer(SHIFT), (one,), driven) for name, one in factorisations().items()}
    return _distances({name: np.asarray(a.b @ a.a) for name, (a,) in runs.items()})


@compiled(quickly=True)
def _descend(problem: SingleLayer, start: Adapters, flow: Flow) -> Any:
    return descend(problem, start, steps=60, step=jnp.asarray(0.02), saves=13, flow=flow, save_adapters=True).history


@functools.cache
def flowed() -> dict[str, float]:
    """The same along LoRA-Muon's flow to t = .6, at rtol = 1e-12."""
    times, named = np.linspace(0.0, 0.6, 13), factorisations()
    how: Any = {"flow": LoRAMuon(0.0, 0.01), "solver": "Dopri8", "rtol": 1e-12, "keep": (), "save_adapters": True}
    solved = solve_lanes(SingleLayer(SHIFT), stack([(one,) for one in named.values()]), times, **how)
    return _distances(dict(zip(named, Run.of(solved, times).change, strict=True)))


def _distances(changes: dict[str, np.ndarray]) -> dict[str, float]:
    first, *_ = changes.values()
    return {name: float(np.max(norm(one - first) / norm(first))) for name, one in list(changes.items())[1:]}


@claim(MANIFOLD, f"{MIXED}, 60 steps of .02; the flow to t = .6, rtol = 1e-12", within=1e-10)
def lora_muon_invariant(seeds: int) -> Cases:
    """LoRA-Muon tells (A, B) neither from (A/c, c B) nor from other factors of B A: relative distance of B A"""
    for name, distance in stepped("lora-muon").items():
        yield f"{name}, descent", 0, distance
    for name, distance in flowed().items():
        yield f"{name}, flow", 0, distance


@claim(DERIVED, f"{MIXED}, 60 steps of .02", ">=")
def muon_variant(seeds: int) -> Cases:
    """Muon tells them apart: the same distance"""
    for name, distance in stepped("muon").items():
        yield f"{name}, descent", 0.1, distance


@compiled(quickly=True)
def _velocity(flow: Flow, descent: Adapter, now: Adapter) -> Adapter:
    return flow.velocity(descent, now)


@claim(DERIVED, f"{LAYER}, r = 4 and 6, random factors, smoothing = .01", within=1e-10, identity=True)
def lora_muon_moves(seeds: int) -> Cases:
    """LoRA-Muon moves W by (msign(P_B G) + msign(G P_A))/2, G = -dL/dW: relative error"""
    for rank in (4, 6):
        rng = np.random.default_rng(rank)
        a, b = rng.normal(size=(rank, N)), rng.normal(size=(M, rank))
        g = SHIFT - b @ a
        velocity = _velocity(LoRAMuon(0.0, 0.01), adapter(b.T @ g, g @ a.T), adapter(a, b))
        moved = np.asarray(velocity.b) @ a + b @ np.asarray(velocity.a)
        expected = theory.lora_muon_movement(b @ np.linalg.pinv(b), g, np.linalg.pinv(a) @ a, 0.01)
        yield f"r = {rank}", 0, norm(moved - expected) / norm(expected)


@functools.cache
def transferred() -> dict[str, float]:
    """The time to L = L(0)/100, of shifts of two shapes, from factors of other sizes."""
    found = {}
    for m, n in ((M, N), (12, 60)):
        rng = np.random.default_rng(5)
        left, right = spaces(rng, m, n, len(SIGMA))
        shift, named = (left * SIGMA) @ right.T, {}
        for c in (1.0, 100.0, 0.01):
            a, b = rng.normal(size=(4, n)), rng.normal(size=(m, 4))
            named[f"{m} x {n}, c = {c:g}"] = adapter(1e-3 / c * a, 1e-3 * c * b)
        run = _follow(list(named.values()), LoRAMuon(0.0, 5e-3), 0.95, shift)
        for name, loss in zip(named, norm(run.change - shift) ** 2 / 2, strict=True):
            after = int(np.argmax(loss <= loss[0] / 100))
            here = slice(after - 1, after + 1)
            found[name] = float(np.interp(np.log(100 / loss[0]), -np.log(loss[here]), run.times[here]))
    return found


@claim(
    MANIFOLD, f"{LAYER.replace(f', {M} x {N}', '')}, r = 4, from sizes of .001/c and .001 c", within=0.02, relative=True
)
def lora_muon_transfers(seeds: int) -> Cases:
    """LoRA-Muon: neither width nor the factors' sizes change the time to L(0)/100"""
    predicted = theory.lora_muon_time(SIGMA, 0.01)
    for where, time in transferred().items():
        yield where, predicted, time
