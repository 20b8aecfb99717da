"""Results as Markdown, one function a job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

OURS = "lora_flow"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def time_of(row: dict[str, Any]) -> str:
    """Median, spread and rounds."""
    return f"{_s(row['median_s'])} ({_s(row['min_s'])}-{_s(row['max_s'])}; {row['rounds']:.0f})"


def race(job: dict[str, Any]) -> str:
    peers = job["peers"]
    ours = next(row for name, row in peers.items() if name.startswith(OURS))
    rows = []
    for name, row in sorted(peers.items(), key=lambda item: item[1].get("median_s", float("inf"))):
        if "median_s" not in row:
            why = row.get("missing") or f"not reached, best error {row['best_error']:.2f}"
            rows.append([name, why, "", "", "", "", ""])
            continue
        ratio = f"{row['median_s'] / ours['median_s']:.1f}" if "median_s" in ours else ""
        tolerance, error = f"{row['what']} {row['rung']:.0e}", f"{row['error']:.3f}"
        rows.append([name, tolerance, error, time_of(row), ratio, _s(row["first_s"]), f"{row['peak_mb']:.0f}"])
    header = ("peer", "loosest that is right", "error, decades", "seconds", "times ours", "first call, s", "memory, MB")
    return table(header, rows)


def unequal(job: dict[str, Any]) -> str:
    ours = job["rows"]["lora_flow.sweep"]["median_s"]
    rows = [
        [name, f"{row['error']:.3f}", time_of(row), f"{row['median_s'] / ours:.1f}", _s(row["compile_s"])]
        for name, row in job["rows"].items()
    ]
    return table(("how", "error, decades", "seconds", "times ours", "compiling, s"), rows)


def size(job: dict[str, Any]) -> str:
    widths = list(max(job["rows"].values(), key=len))
    rows = []
    for name, row in job["rows"].items():
        cells = [_s(row[width]["median_s"]) if width in row else "" for width in widths]
        exponent = job["exponents"][name]
        rows.append([name, *cells, "" if exponent is None else f"{exponent:.2f}"])
    text = table(("one evaluation, s", *(f"N = {width}" for width in widths), "exponent"), rows)
    return text + ("\n\n" + _large(job["large"]) if "large" in job else "")


def _large(found: dict[str, Any]) -> str:
    what = "Aligned, m = n = 4096, h = 8192, r = 8, three seeds to T = 5, set-up included: "
    if "missing" in found:
        return what + found["missing"] + "."
    return what + f"{found['seconds']:.0f} s, {found['peak_mb']:.0f} MB, {found['finished']} of 3 finished."


def cold(job: dict[str, Any]) -> str:
    return table(("command", "seconds"), [[name, time_of(row)] for name, row in job["rows"].items()])


def gradients(job: dict[str, Any]) -> str:
    rows, of = [], {}
    for name, row in job["rows"].items():  # each beside the last that is forward
        of = row if "forward" in name else of
        called, first = (f"{row[key] / of[key]:.1f}" for key in ("median_s", "first_s"))
        rows.append([name, time_of(row), called, _s(row["first_s"]), first])
    memory = [
        [f"{row['rtol']:.0e}", f"{row['steps']}", f"{row['run_mb']:.1f}", f"{row['temporary_mb']:.2f}"]
        for row in job["memory"]
    ]
    return (
        table(("what", "seconds", "over forward", "first call, s", "over forward's"), rows)
        + "\n\n"
        + table(("rtol", "steps", "reverse mode: memory added, MB", "of it planned by XLA, MB"), memory)
    )


def training(job: dict[str, Any]) -> str:
    rows = []
    for name, row in job["rows"].items():
        ours = job["rows"][f"{name.split(',')[0]}, lora_flow vision"]["median_s"]
        ratio = f"{row['median_s'] / ours:.2f}"
        rows.append([name, f"{row['images_per_s']:.0f}", time_of(row), ratio, _s(row["first_s"])])
    return table(("model and library", "images/s", "seconds a step", "times ours", "first call, s"), rows)


def many(job: dict[str, Any]) -> str:
    header = ("how", "lanes/s", "share of storing", "memory, MB", "boxes", "files", "first boxes, s")
    rows = []
    for name, row in job["rows"].items():
        if "seconds" not in row:
            rows.append([name, row["missing"], *[""] * (len(header) - 2)])
            continue
        storing = f"{100 * row['stored_s'] / row['seconds']:.1f} %" if "stored_s" in row else ""
        cells = [f"{row['lanes'] / row['seconds']:.0f}", storing, f"{row['peak_mb']:.0f}"]
        rows.append([name, *cells, f"{row['boxes']}", f"{row['files']}", _s(row["first_s"])])
    return table(header, rows)


TABLES = {"a": race, "b": race, "c": unequal, "d": size, "e": cold, "f": gradients, "g": training, "h": many}


def _s(seconds: float) -> str:
    return f"{seconds:.3g}"
