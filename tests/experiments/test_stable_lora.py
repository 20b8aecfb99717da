"""The figure of Stable-LoRA: where the shrinking stops, what it buys from large starts and costs from small ones."""

import dataclasses
import re

import pytest

from lora_flow.cli import main
from lora_flow.experiments.stable_lora import EXPERIMENT, GRADIENT_FLOW
from lora_flow.experiments.table import EXPERIMENTS


@pytest.mark.long
def test_shrinking_buys_time_from_large_starts_alone(tmp_path, monkeypatch, capsys):
    short = {name: dataclasses.replace(part, seeds=2) for name, part in EXPERIMENT.parts.items()}
    monkeypatch.setitem(EXPERIMENTS, "stable-lora", dataclasses.replace(EXPERIMENT, parts=short))
    assert main(["figure", "stable-lora", "--out", str(tmp_path / "run")]) == 0
    rows = [
        row.strip("| ").split(" | ") for row in capsys.readouterr().out.splitlines() if re.match(r"\| [\d.]+ \|", row)
    ]
    assert len(rows) == len(GRADIENT_FLOW.alpha) * len(short)
    by_place = {(float(row[0]), int(row[1])): row for row in rows}
    for (alpha, rate), row in by_place.items():
        if rate >= 5 and alpha < 0.2:  # a larger A(0) learns before it is shrunk
            assert float(row[2]) == pytest.approx(float(row[3]), rel=0.1)

    def loss(alpha, rate, column):
        return float(by_place[alpha, rate][column].split()[0])

    assert loss(1.0, 0, 6) > -0.5
    assert loss(1.0, 5, 6) < -5
    assert loss(0.01, 0, 5) < loss(0.01, 5, 5)
    assert (tmp_path / "run/figures/figure-stable-lora.png").exists()
