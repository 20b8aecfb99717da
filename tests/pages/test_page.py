"""What a page holds: the numbers of a run, the text of its report as HTML, and the command that repeats it."""

import base64
import json
import re
import shlex

import numpy as np
import pytest
from runs_of_pages import SETTINGS

from lora_flow import InputError, load_run, phases
from lora_flow.cli import main
from lora_flow.cli.parse import parse
from lora_flow.experiments import on_page
from lora_flow.experiments import present as presenting
from lora_flow.pages import charts
from lora_flow.pages.markdown import to_html
from lora_flow.pages.thinned import curves, thinned
from lora_flow.results.answers import answers
from lora_flow.settings import Settings, command_of, to_table


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def data(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_its_curves_are_the_quartiles_of_the_run_in_single_precision(folder, data):
    (run,), dataset = data["runs"], load_run(folder)
    names = [one["name"] for one in run["quantities"]]
    assert names[:2] == ["loss", "alignment_error"]
    assert [axis["name"] for axis in run["axes"]] == ["init", "alpha", "rank"]
    values = np.frombuffer(base64.b64decode(run["curves"]), "<f4").reshape(12, len(names), 3, 21)
    middle = dataset["norm_z1"].median("seed").values.reshape(12, 21)
    np.testing.assert_allclose(values[:, names.index("norm_z1"), 1], middle, rtol=1e-5)
    floor = float(dataset["rounding_floor"].median())
    loss = np.maximum(dataset["loss"].median("seed").values.reshape(12, 21), floor)
    np.testing.assert_allclose(values[:, 0, 1], loss, rtol=1e-5)
    assert (np.diff(values, axis=2) >= 0).all(), "low, median, high"


def test_its_cells_tell_the_times_of_phases(folder, data):
    (run,), spans = data["runs"], phases(load_run(folder))
    told = {one["name"]: np.array(one["values"], float) for one in run["measures"]}
    t1 = spans["t1"].where(np.isfinite(spans["t1"])).median("seed")  # of the seeds that reach it
    np.testing.assert_allclose(told["t1"], t1.values.ravel(), rtol=1e-3)
    np.testing.assert_allclose(told["t1_predicted"], spans["t1_predicted"].median("seed").values.ravel(), rtol=1e-3)
    assert len(run["endings"]) == 12


def test_it_is_one_file_that_says_how_to_repeat_it(folder, page):
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page.partition('id="data"')[0])
    command = re.search('<pre id="command">(.*?)</pre>', page)[1]
    assert command == command_of(to_table(SETTINGS), str(folder))
    assert "lora_flow_version" in page
    assert len(page) < 3_000_000


def test_the_command_that_repeats_a_run_has_its_settings():
    for settings in (
        SETTINGS,
        Settings(descend=("adam:0.001",), steps=30, gradient_noise=(0.0, 0.5), seeds=(3, 7)),
        Settings(problem="network", init=("gaussian-both:25",), alpha=(0.1,), rank=(50,), details=True, t1=20.0),
        Settings(problem="a file's.npz", spacing="log"),
    ):
        words = shlex.split(command_of(to_table(settings), "runs/a b"))
        assert words[:2] == ["lora-flow", "sweep"]
        again = parse(words[1:])
        assert again.settings == settings
        assert again.out == "runs/a b"


def test_the_command_report_makes_it_again(folder, page, capsys):
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"page: {folder / 'report.html'}\n"
    assert (folder / "report.html").read_text() == page


def test_without_what_draws_its_charts_a_run_is_drawn_and_says_how_to_get_it(folder, monkeypatch):
    monkeypatch.setattr(charts, "are_to_be_had", lambda: False)
    lines = presenting.present(folder).lines
    assert lines[-1] == "no report.html: it needs Altair and vl-convert, to be had with pip install 'lora-flow[report]'"
    with pytest.raises(InputError, match="report must have altair and vl-convert-python installed"):
        presenting.present_page(folder)


def test_a_large_run_is_thinned_with_a_word(folder):
    dataset = load_run(folder)
    few, words = thinned(dataset, 5_000)
    sizes = [few.sizes[dim] for dim in ("time", "init", "alpha", "rank")]
    assert 3 * len(curves(few)) * np.prod(sizes) <= 5_000
    assert words[0] == f"5 of {len(curves(dataset))} quantities"
    assert set(curves(few)) <= set(curves(dataset))
    assert few["time"][-1] == dataset["time"][-1]
    assert thinned(dataset) == (dataset, [])


def test_the_phases_of_a_run_that_is_thinned_are_those_of_all_its_quantities(folder, data, monkeypatch):
    dataset = load_run(folder)
    monkeypatch.setattr(on_page, "thinned", lambda one: thinned(one, 5_000))
    small = on_page.explored("run", dataset, answers(dataset))
    assert small["thinned"]
    assert len(small["quantities"]) < len(data["runs"][0]["quantities"])
    assert small["measures"] == data["runs"][0]["measures"]


def test_the_markdown_of_reports_becomes_html():
    text = "# A\n\nOn `x < y` & **more**:\n\n| a | b |\n| --- | --- |\n| 1 | <2 |\n\n- one\n- two\n\n![what](p.png)\n"
    found = to_html(text, lambda link: f"data:{link}")
    assert "<h2>A</h2>" in found
    assert "<code>x &lt; y</code> &amp; <strong>more</strong>:" in found
    assert '<th scope="col">a</th>' in found
    assert "<td>1</td><td>&lt;2</td>" in found
    assert "<ul><li>one</li><li>two</li></ul>" in found
    assert '<img alt="what" src="data:p.png">' in found
