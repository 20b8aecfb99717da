"""Jobs a and b: who solves the same task to the same accuracy, and how fast?

A peer qualifies in a process of its own: on a probe, which it must pass if it passes the task, it walks its ladder to
the loosest rung that is right to 0.05 decades, and goes on from there on the task. Those that qualify are then timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.children import Failed, in_child
from benchmarks.peers import jax_peers, numpy_peers, ours, torch_peers
from benchmarks.peers.peer import Peer
from benchmarks.tasks import ENOUGH, Task, error, figure1, stiff_tail
from benchmarks.timing import interleaved, peak_bytes, seconds

ROUNDS, QUICK_ROUNDS = 7, 3
QUICK_PEERS = ("longest step", "LSODA", "torchode tsit5", "Dopri8")  # one of a kind, beside ours
FAST, SLOW = 0.5, 2.0  # seconds


class Race(NamedTuple):
    """`reference` gives the true losses of the task, `(lanes, times)`; `patience` is for one peer, in seconds."""

    task: Task
    probe: Task
    reference: Callable[[], np.ndarray]
    peers: tuple[Peer, ...]
    patience: float
    budget: float


def race_a(quick: bool) -> Race:
    probe = figure1(1)
    task = probe if quick else figure1(30)
    (dopri8,) = (peer for peer in jax_peers.DIFFRAX if "Dopri8" in peer.name)
    peers = (
        ours.SWEEP,
        numpy_peers.PAPER,
        jax_peers.PAPER,
        jax_peers.longest_step(5e-4, 2e-4, 1e-4),
        *_but(numpy_peers.SCIPY, "LSODA"),
        *torch_peers.PEERS,
        *_but(jax_peers.DIFFRAX, "Kvaerno5"),
        jax_peers.DOPRI8_CANONICAL,
    )
    # rtol 1e-12, atol 1e-16
    return Race(task, probe, lambda: dopri8.prepare(task)(1e-12), _entered(peers, quick), *_limits(quick))


def race_b(quick: bool) -> Race:
    """Without the paper's gradient descent, whose 10^8 steps take hours; its longest step that is right takes part.

    torchdiffeq and torchode took more than a minute whenever they were tried.
    """
    probe = stiff_tail(1e2)
    task = probe if quick else stiff_tail(1e4)

    def reference() -> np.ndarray:
        with np.load(Path(__file__).parent / "reference" / "stiff_tail.npz") as stored:
            return stored["losses"][:, : len(task.times)]

    peers = (
        ours.SOLVE,
        jax_peers.longest_step(0.2, 0.1, 0.05, 0.02, 0.01, 5e-3),
        *_but(numpy_peers.SCIPY, "DOP853"),
        *jax_peers.DIFFRAX,
        jax_peers.DOPRI8_CANONICAL,
    )
    return Race(task, probe, reference, _entered(peers, quick), *_limits(quick))


def _but(peers: tuple[Peer, ...], slow: str) -> tuple[Peer, ...]:
    """Without the one that took more than a minute whenever it was tried, which the page says."""
    return tuple(peer for peer in peers if slow not in peer.name)


def _entered(peers: tuple[Peer, ...], quick: bool) -> tuple[Peer, ...]:
    chosen = [peer for peer in peers[1:] if not quick or any(one in peer.name for one in QUICK_PEERS)]
    return peers[0], *chosen


def _limits(quick: bool) -> tuple[float, float]:
    """The patience and the budget."""
    return (15, 2) if quick else (60, 6)


RACES = {"a": race_a, "b": race_b}


def run(name: str, quick: bool) -> dict[str, Any]:
    race = RACES[name](quick)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        reference = str(Path(folder) / "reference.npy")
        np.save(reference, race.reference())
        for peer in race.peers:
            rows[peer.name] = _qualify(name, peer, quick, reference, race.patience)
            print(f"  {peer.name}: {_told(rows[peer.name])}", flush=True)
    entrants = {peer.name: peer for peer in race.peers if "rung" in rows[peer.name]}
    calls = {}
    for peer in entrants.values():
        solve = peer.prepare(race.task)
        calls[peer.name] = lambda solve=solve, rung=rows[peer.name]["rung"]: solve(rung)
        rows[peer.name]["first_s"] = seconds(calls[peer.name])
    for peer_name, times in interleaved(calls, QUICK_ROUNDS if quick else ROUNDS, race.budget).items():
        rows[peer_name] |= times
    lanes = len(race.task.alphas) * race.task.seeds
    return {"lanes": lanes, "t1": race.task.t1, "saves": len(race.task.times), "peers": rows}


def qualify(name: str, peer_name: str, quick: bool, reference_file: str) -> dict[str, Any]:
    """Runs in a child. `points` are (rung, error, seconds) on the task, best of two, for the work-precision diagram."""
    race = RACES[name](quick)
    (peer,) = (peer for peer in race.peers if peer.name == peer_name)
    reference = np.load(reference_file)
    grid = reference.reshape(len(race.task.alphas), race.task.seeds, -1)
    probed = grid[:, : race.probe.seeds, : len(race.probe.times)].reshape(-1, len(race.probe.times))
    before = peak_bytes()
    first = 0 if race.probe is race.task else _first_rung(peer, race.probe, probed)
    solve = peer.prepare(race.task)
    points: list[tuple[float, float, float]] = []
    for rung in peer.ladder[first:]:
        took = seconds(lambda rung=rung: points.append((rung, error(solve(rung), reference), 0.0)))
        compiled = len(points) == 1
        again = seconds(lambda rung=rung: solve(rung)) if compiled or took < SLOW else took
        points[-1] = (*points[-1][:2], min(again, took))
        if points[-1][1] <= ENOUGH:
            break
    rung, decades, _ = points[-1]
    reached = {"rung": rung, "what": peer.rung, "error": decades} if decades <= ENOUGH else {}
    best = min(decades for _, decades, _ in points)
    return reached | {"best_error": best, "points": points, "peak_mb": (peak_bytes() - before) / 1e6}


def _first_rung(peer: Peer, probe: Task, reference: np.ndarray) -> int:
    """Where on the ladder to begin: at what the probe passes, for fast peers a little before, for the diagram."""
    solve = peer.prepare(probe)
    for index, rung in enumerate(peer.ladder):
        right = error(solve(rung), reference) <= ENOUGH
        if right or index == len(peer.ladder) - 1:
            break
    return max(0, index - 3) if seconds(lambda: solve(rung)) < FAST else index


def _qualify(name: str, peer: Peer, quick: bool, reference: str, patience: float) -> dict[str, Any]:
    if not peer.installed:
        return {"missing": "not installed"}
    try:
        return in_child("benchmarks.races:qualify", name, peer.name, quick, reference, timeout=patience)
    except Failed as failure:
        return {"missing": str(failure)}


def _told(row: dict[str, Any]) -> str:
    if "rung" in row:
        return f"{row['what']} {row['rung']:.0e}, {row['error']:.3f} decades"
    return row.get("missing") or f"not reached, best {row['best_error']:.2f} decades"
