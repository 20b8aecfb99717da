"""The size of a sweep, estimated from its settings alone: a sweep that cannot fit is refused before JAX starts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lora_flow.checks import require
from lora_flow.recipes.kinds import AXES, kind_of
from lora_flow.runtime.memory import require_memory
from lora_flow.settings import Settings
from lora_flow.storage.disk import require_room
from lora_flow.storage.remote import RunPath
from lora_flow.sweeps.descents import parse_descents
from lora_flow.sweeps.limits import BATCH_SIZE, BATCHES, COPIES, LANE, LARGEST, OBSERVABLES

LARGEST_SEED = {"double": 2**63 - 1, "single": 2**31 - 1}
_LISTS = ("init", "side", "gradient_noise", "alpha", "rank", *AXES)
_COUNTS = ("m", "n", "h", "saves", "max_steps", "steps", "batch_size", "devices", "samples")
_RANKS = ("input_rank", "target_rank", "task_rank")


def check_sizes(settings: Settings, devices: int, out: RunPath, stored: int = 0) -> None:
    """Raises where a list is empty, an integer is out of all range, or the sweep fits neither memory nor the disk.

    `devices` is the number of devices to use, `stored` the bytes of the results that are on the disk already. The
    shapes of a problem from a file are not known here, and not counted.
    """
    for name, value in vars(settings).items():
        require(value != () or name == "descend", name, "hold at least one value", "none")
    for name in (*_COUNTS, *_RANKS):
        value = getattr(settings, name)
        require(value <= LARGEST, name, f"be at most {LARGEST}", value)
    for rank in settings.rank:
        require(rank <= LARGEST, "rank", f"be at most {LARGEST}", rank)
    largest = LARGEST_SEED.get(settings.precision, LARGEST)
    listed = settings.seeds if isinstance(settings.seeds, tuple) else (settings.seeds,)
    for name, seeds in (("seeds", listed), ("problem_seed", settings.problem_seed)):
        for seed in seeds:
            require(abs(seed) <= largest, name, f"be at most {largest}", seed)
    _check_room(settings, devices, out, stored)


def _counts(settings: Settings) -> dict[str, int]:
    """The number of values along each axis."""
    counts = {name: len(getattr(settings, name)) for name in _LISTS}
    names, steps = parse_descents(settings.descend)
    counts |= {"descend": len(names) * len(steps) or 1}
    return counts | {"seeds": len(settings.seeds) if isinstance(settings.seeds, tuple) else max(settings.seeds, 0)}


def _check_room(settings: Settings, devices: int, out: RunPath, stored: int) -> None:
    number = 4 if settings.precision == "single" else 8
    counts = _counts(settings)
    lanes = math.prod(counts.values())
    times = max(min(settings.saves, settings.steps + 1) if settings.descend else settings.saves, 0)
    of_a_lane = LANE + 8 * OBSERVABLES * times
    batch = min(lanes, (max(settings.batch_size, 0) or BATCH_SIZE) * devices)
    results = COPIES * (min(lanes, BATCHES * batch) * of_a_lane + lanes * LANE)
    many = max({"saves": times} | counts, key=lambda name: ({"saves": times} | counts)[name])
    require_room(out, max(lanes * of_a_lane - stored, 0), f"{many} {_told(getattr(settings, many))}")
    _require(settings, many, results)

    m, n, h = (max(size, 0) for size in kind_of(settings.problem).shape(settings))
    rank = max(max(settings.rank), 0)
    hidden = 2 * h if h else 0  # of two layers
    rows = batch * rank * number
    of_dims = {"m": m, "n": n, "h": h, "rank": rank}
    of_dims = {name: size for name, size in of_dims.items() if name == "rank" or size}
    widest = max(of_dims, key=lambda name: of_dims[name])
    _require(settings, widest, COPIES * rows * (m + n + hidden))
    if settings.details:
        _require(settings, "details", rows * times * (m + n + hidden))
    _require(settings, *_weights(settings, number))


def _weights(settings: Settings, number: int) -> tuple[str, int | float]:
    """The flag that asks for most of the frozen weights, and their size where they are written out."""
    sizes: dict[str, Any] = {name: max(getattr(settings, name), 0) for name in ("m", "n", "h", "samples")}
    parts = {"m": 0} | kind_of(settings.problem).written_out(dataclasses.replace(settings, **sizes))
    most = max(parts, key=lambda name: parts[name])
    return most, COPIES * number * sum(parts.values())


def _require(settings: Settings, name: str, needed: int | float) -> None:
    require_memory(name, _told(getattr(settings, name)), needed)


def _told(value: Any) -> Any:
    return f"{len(value)} values" if isinstance(value, tuple) and len(value) > 3 else value
