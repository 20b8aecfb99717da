"""The work of `lora-flow vision`: check the settings, train, draw, and give the verdicts."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from lora_flow.checks import require
from lora_flow.results.report import table
from lora_flow.runtime.interrupts import whole
from lora_flow.runtime.start import start_jax
from lora_flow.storage.locks import locked
from lora_flow.storage.reading import listed
from lora_flow.storage.swap import write_atomically
from lora_flow_vision.folder import CHECK, stored_settings, units
from lora_flow_vision.results import VisionFolder, load_vision
from lora_flow_vision.settings import VisionSettings


def check(out: Path, settings: VisionSettings, resume: bool, overwrite: bool) -> int:
    """Runs or continues a check, and reports on it. Bad input is refused before anything is written."""
    settings.check()
    if resume:
        for name, value in dataclasses.asdict(stored_settings(out)).items():
            got = getattr(settings, name)
            require(got == value, name, f"be {value}, as '{out}' was started, to resume it", got)
    else:
        CHECK.check_free(out, overwrite)
    start_jax(devices=1)
    from lora_flow_vision.base import checkpoint
    from lora_flow_vision.check import build, run
    from lora_flow_vision.measures import MEASURES

    weights = checkpoint(settings)
    settings = dataclasses.replace(settings, revision=weights.commit)
    bench, attrs = build(settings, weights.folder)
    with locked(out):
        if not resume:
            CHECK.check_free(out, overwrite)  # nobody can have made it since
        note = f"trained units are stored, continue with: lora-flow vision --out {out} --resume"
        with whole(note):
            folder = (VisionFolder if resume else VisionFolder.create)(out, settings, MEASURES, attrs)
        if folder.damaged:
            print(f"lora-flow: damaged or missing {listed(folder.damaged)}; trained again", file=sys.stderr)
        lanes = len(units(settings)[0].seeds) * len(settings.alphas)
        print(f"{attrs['train_images']} training and {attrs['test_images']} test images of {attrs['data_name']}")
        print(f"LoRA on {', '.join(bench.paths)}; {len(units(settings))} units of {lanes} runs", flush=True)
        run(folder, bench)
        return tell(out)


def tell(out: Path) -> int:
    """Draws a finished check's pictures, writes its report and prints its verdicts."""
    import matplotlib as mpl

    mpl.use("Agg")
    from lora_flow.figures.over_time import save
    from lora_flow.figures.written import picture_lines
    from lora_flow.pages.page import page
    from lora_flow_vision.claims import lines, report_steps, rows
    from lora_flow_vision.figures import draw

    dataset = load_vision(out)
    found, last = (rows(lines(dataset, steps)) for steps in (report_steps(dataset), report_steps(dataset)[-1:]))
    pictures = save(draw(dataset), out / "figures")
    attrs = dataset.attrs
    adapted = attrs["adapted"] if isinstance(attrs["adapted"], str) else ", ".join(attrs["adapted"])
    about = (
        f"{attrs['train_images']} training and {attrs['test_images']} test images of {attrs['data_name']}; LoRA on "
        f"{adapted}; {dataset.sizes['seed']} seeds. SGD with rate {attrs['sgd_rate']:g}, Adam with "
        f"{attrs['adam_rate']:g}, {attrs['steps']} steps; the flow to T = {attrs['sgd_rate'] * attrs['steps']:g}."
    )
    links = [f"![{picture.stem}](figures/{picture.name})" for picture in pictures]
    about += " rho is Spearman's correlation of the standard deviation with the quantity, mean over seeds, as are the"
    about += " quantities beside it; pictures show medians over seeds, and bands and bars from quartile to quartile."
    parts = ["# LoRA on images: what holds", about, table(["verdict", "claim", "where", "statistic"], found), *links]
    text = "\n\n".join(parts) + "\n"
    write_atomically(out / "report.md", text)
    told = {str(name): value.tolist() if hasattr(value, "tolist") else value for name, value in attrs.items()}
    write_atomically(out / "report.html", page(text, out, settings=told))
    print(*(f"{claim}: {where}: {statistic}: {verdict}" for verdict, claim, where, statistic in last), sep="\n")
    print(f"rho is Spearman's correlation of the std with the quantity; {len(found)} verdicts: {out / 'report.md'}")
    print(f"results: {out / 'results.zarr'} (lora_flow_vision.results.load_vision), final adapters: {out / 'adapters'}")
    print(*picture_lines(pictures), f"page: {out / 'report.html'}", sep="\n")
    return 0
