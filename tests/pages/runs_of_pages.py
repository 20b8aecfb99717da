"""A small run, of which pages are made."""

from lora_flow.experiments.present import present
from lora_flow.settings import Settings, build_plan, to_table
from lora_flow.sweeps.run import open_runs, run

SETTINGS = Settings(
    m=4, n=5, h=6, init=("gaussian", "spectral"), alpha=(1e-2, 1e-3, 1e-4), rank=(1, 2), seeds=3, t1=3.0, saves=21,
    side=("B",),
)  # fmt: skip


def presented(out, settings=SETTINGS):
    """A run folder with its report and page, and what was said."""
    with open_runs(out, {"": (to_table(settings), plan := build_plan(settings))}) as folders:
        run(folders[""], plan, progress=False)
    return present(out)
