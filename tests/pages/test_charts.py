"""The charts of pages are made once, and kept for the commands that follow."""

import pytest

from lora_flow.pages import charts
from lora_flow.runtime import kept_files

pytest.importorskip("altair")


@pytest.fixture
def folder(tmp_path):
    charts.made.cache_clear()
    kept_files.start(tmp_path)
    yield tmp_path
    kept_files.stop()
    charts.made.cache_clear()


def test_another_process_reads_the_charts_that_one_made(folder, monkeypatch):
    specifications, script = charts.made()
    assert set(specifications) == {"curves", "map"}
    assert "vega" in script
    monkeypatch.setattr(charts, "_javascript", lambda: "made again")
    charts.made.cache_clear()
    assert charts.made() == (specifications, script)
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-1])  # damaged, so not read
    charts.made.cache_clear()
    assert charts.made() == (specifications, "made again")


def test_charts_of_other_versions_are_not_read(folder, monkeypatch):
    charts.made()
    monkeypatch.setattr(charts, "version", lambda package: "0")
    monkeypatch.setattr(charts, "_javascript", lambda: "of version 0")
    charts.made.cache_clear()
    assert charts.made()[1] == "of version 0"
