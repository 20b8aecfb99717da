"""Runs beside each other: the settings in which they differ, the figure, and the page on which their curves lie."""

import json
import re

import xarray as xr

from lora_flow.cli import main
from lora_flow.experiments.compare import differences

SMALL = ["sweep", "--m", "4", "--n", "5", "--h", "6", "--alpha", "1e-2", "1e-3", "--rank", "2", "--saves", "6"]
RUN, DESCENT = [*SMALL, "--t1", "1"], [*SMALL, "--descend", "gd:1e-3", "--steps", "20"]


def test_only_what_differs_is_told():
    one = xr.Dataset(
        {"status": (("alpha", "seed"), [[0, 0]])}, {"alpha": [0.1], "time": [0.0, 1.0]}, {"t1": 1.0, "side": "B"}
    )
    other = one.assign_coords(alpha=[0.01]).assign_attrs(side="A", batch_size=3)
    header, rows = differences({"x": one, "y": other})
    assert header == ["setting", "x", "y"]
    assert rows == [["alpha", "0.1", "0.01"], ["side", "B", "A"]]
    assert differences({"x": one, "y": one.copy()})[1] == []


def test_two_runs_are_compared_on_a_page_and_in_a_figure(tmp_path, capsys):
    for name, words in (("a", [*RUN, "--side", "A"]), ("b", [*RUN, "--side", "B"]), ("descent", DESCENT)):
        assert main([*words, "--out", str(tmp_path / name)]) == 0
    capsys.readouterr()
    out = tmp_path / "compared"
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 0
    assert "| side | A | B |" in capsys.readouterr().out
    assert (out / "figures" / "compare.png").is_file()
    assert "b: alpha 0.001: " in (out / "compare.md").read_text()
    data = re.search(r'id="data">(.*?)</script>', (out / "compare.html").read_text(), re.DOTALL)[1]
    assert [run["name"] for run in json.loads(data)["runs"]] == ["a", "b"]
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "descent"), "--out", str(tmp_path / "none")]) == 2
    said = "runs must be saved over the same clock, got gradient-flow time t and iteration"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
