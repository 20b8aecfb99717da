"""Tells: `python -m benchmarks.report benchmarks/results/cpu.json` fills docs/benchmarks.md and draws its diagrams.

A table goes between `<!-- table a -->` and `<!-- end -->`; with several results, one for each, headed by its machine.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from benchmarks import diagrams
from benchmarks.run import JOBS
from benchmarks.tables import TABLES

DOCS = Path(__file__).parent.parent / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="what benchmarks.run wrote; diagrams are of the first")
    results = [json.loads(path.read_text()) for path in parser.parse_args().results]
    page = DOCS / "benchmarks.md"
    page.write_text(filled(page.read_text(), results))
    for name in ("a", "b"):
        if name in results[0]["jobs"]:
            diagrams.save(results[0]["jobs"][name], f"{name}. {JOBS[name]}", DOCS / "images" / f"bench-{name}.png")


def filled(page: str, results: list[dict[str, Any]]) -> str:
    """The page with every table that the results have; other tables stay."""
    for name, render in TABLES.items():
        found = [(result["machine"], render(result["jobs"][name])) for result in results if name in result["jobs"]]
        if found:
            text = "\n\n".join(f"{_machine(machine)}\n\n{table}" for machine, table in found)
            page = _between(page, f"table {name}", text)
    return page


def _between(page: str, marker: str, text: str) -> str:
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", page)


def _machine(machine: dict[str, Any]) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    return (
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores, {machine['system']}, "
        f"device {machine['device']}; {libraries}."
    )


if __name__ == "__main__":
    main()
