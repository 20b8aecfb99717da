"""`lora-flow sweep --extend`: a run that gets further values along its axes."""

from __future__ import annotations

import contextlib

from lora_flow.cli.cluster import Make, executor_of
from lora_flow.growth import growing, united
from lora_flow.runtime.interrupts import whole
from lora_flow.runtime.start import start_jax
from lora_flow.settings import Settings
from lora_flow.storage.remote import run_path


def solve_larger(out: str, then: Settings, asked: Settings, go_on: str, cluster: Make | None = None) -> int:
    """Solves what is asked for beside what a run has, which was started with the settings `then`, and draws it."""
    from lora_flow.cli.plot import draw
    from lora_flow.sweeps.run import run

    path = run_path("out", out)
    now = united(path, then, asked)
    start_jax(now.precision, now.devices)
    with contextlib.ExitStack() as held:
        with whole(f"solved boxes are stored, continue with: {go_on}"):
            folder, plan = held.enter_context(growing(path, then, now))
        if folder.damaged:
            print(f"damaged, and solved again: {', '.join(folder.damaged)}")
        if then == now:
            print(f"nothing new: '{out}' has all of these values")
        left = sum(map(plan.layout.boxes.size, folder.pending()))
        print(f"{plan.grid.size} runs, {left} of them to solve, {plan.layout.width} at a time on each device")
        with executor_of(cluster) as executor:
            run(folder, plan, executor)
        return draw(out)
