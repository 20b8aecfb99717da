"""The figure of spectral flows: the times in its table are those of theory, and its picture shows all flows."""

import matplotlib.pyplot as plt
import pytest

from lora_flow.experiments import muon


@pytest.mark.long
def test_times_are_those_of_theory_and_all_is_drawn(small, reported):
    dataset = small(muon, SAVES=101)
    rows = {tuple(row.split(" | ")[:2]): row.split(" | ")[2:] for row in muon.notes(dataset).splitlines() if "|" in row}
    measured = {
        key: [float("inf") if cell == "-" else float(cell) for cell in cells[:4]]  # - where a mode does not finish
        for key, cells in rows.items()
        if key[0].startswith("| ") and cells[0].replace(".", "").isdigit()
    }
    apart = muon.ENDS["lora-muon"][0] / 100  # two saves, between which a time is interpolated
    for start in ("small A", "large A"):
        assert measured["| LoRA-Muon", start] == pytest.approx(0.95 * muon.SIGMA, rel=0.05, abs=apart)
    assert measured["| Muon", "small A"] == pytest.approx((0.95 * muon.SIGMA) ** 0.5, rel=0.1)
    small_a = measured["| gradient flow", "small A"]
    assert small_a == sorted(small_a)
    assert measured["| gradient flow", "large A"][-1] > 2 * measured["| BaLoRA", "large A"][-1]
    figure = muon.draw(dataset)
    assert [ax.get_title(loc="left")[:3] for ax in figure.axes] == [f"({letter})" for letter in "abcdefgh"]
    assert all(len(ax.lines) >= 4 for ax in figure.axes)
    plt.close(figure)
    assert "LoRA-Muon finishes the smallest first" in reported("muon", dataset)
