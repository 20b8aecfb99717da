import io
import sys

import pytest

from lora_flow.runtime import progress
from lora_flow.runtime.progress import Progress, each, span


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_a_log_gets_a_line_every_five_per_cent_with_the_time_left_and_no_carriage_return(clock, capsys):
    with Progress(240, "lanes") as bar:
        bar.describe("solving")
        for _ in range(240):
            clock.now += 0.5
            bar.update()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert "\r" not in err
    assert len(lines) == 20
    assert lines[0] == "solving: 12 of 240 lanes (5 %), 6 s so far, 1 min 54 s left"
    assert lines[-1] == "solving: 240 of 240 lanes (100 %), 2 min 0 s so far, 0 s left"


def test_the_time_left_leaves_out_what_was_compiled_before_the_first_units(clock, capsys):
    """Rounds of 16 lanes, 3 s a round, after 97 s in which programs were compiled."""
    with Progress(240, "lanes") as bar:
        clock.now += 97
        for _ in range(4):
            clock.now += 3
            bar.update(16)
    assert capsys.readouterr().err.splitlines() == [
        "16 of 240 lanes (7 %), 1 min 40 s so far",
        "32 of 240 lanes (13 %), 1 min 43 s so far, 39 s left",
        "48 of 240 lanes (20 %), 1 min 46 s so far, 36 s left",
        "64 of 240 lanes (27 %), 1 min 49 s so far, 33 s left",
    ]


def test_a_slow_run_gets_a_line_a_minute_and_a_resumed_one_counts_only_what_is_new(clock, capsys):
    with Progress(1000, "lanes", done=500) as bar:
        for _ in range(4):
            clock.now += 40
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "502 of 1000 lanes (50 %), 1 min 20 s so far, 5 h 32 min left",
        "504 of 1000 lanes (50 %), 2 min 40 s so far, 5 h 30 min left",
    ]


def test_a_minute_without_anything_done_is_told_too(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.1)
    monkeypatch.setattr(progress, "APART", 0.0)
    with Progress(1, "lanes", what="compiling") as bar:
        bar._over.wait(0.35)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3
    assert lines[0] == "compiling: 0 of 1 lanes (0 %), 0 s so far"


def test_a_short_run_says_nothing_and_lines_are_two_seconds_apart(clock, capsys):
    assert list(each(range(20), "parts")) == list(range(20))
    assert capsys.readouterr().err == ""
    with Progress(100, "lanes") as bar:
        for _ in range(100):
            clock.now += 0.0625
            bar.update()
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "32 of 100 lanes (32 %)",
        "64 of 100 lanes (64 %)",
        "96 of 100 lanes (96 %)",
    ]


def test_a_terminal_gets_a_bar(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    assert list(each([1, 2, 3], "parts")) == [1, 2, 3]
    assert "3/3" in screen.getvalue()
    assert "so far" not in screen.getvalue()


def test_nothing_is_said_where_it_is_not_wanted_or_there_is_no_standard_error(monkeypatch, capsys):
    with Progress(1, "lanes", shown=False) as bar:
        bar.update()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stderr", None)
    with Progress(1, "lanes") as bar:
        bar.update()


def test_spans_of_time():
    assert [span(s) for s in (0.0, 59.4, 59.6, 3599.0, 3600.0, 86400.0)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "59 min 59 s",
        "1 h 0 min",
        "24 h 0 min",
    ]
