"""How pictures are written: formats, embedded fonts, the same bytes each time, and the width of a column."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from picture_faults import faults

from lora_flow import InputError
from lora_flow.figures.over_time import save
from lora_flow.figures.style import panels
from lora_flow.figures.written import WIDTHS, drawn_as, picture_lines


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def drawn(rows=1, columns=2, **how):
    with panels(rows, columns, height=2.4 * rows, **how) as (figure, axes):
        for i, ax in enumerate(axes.flat):
            for k, colour in enumerate(("#0072B2", "#D55E00")):
                ax.plot([1, 2, 3], [10.0**-i, 10.0 ** -(k + 1), 1e-4], color=colour, label=f"curve number {k}")
            ax.set(yscale="log", title=f"panel {i}")
        for ax in axes[:, 0]:
            ax.set_ylabel("loss")
        for ax in axes[-1]:
            ax.set_xlabel("time")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def test_all_formats_are_written_with_their_fonts_and_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        with drawn_as(["svg", "pdf"]):
            paths = save({"loss": drawn()}, tmp_path / name)
            assert picture_lines(paths) == [f"picture: {tmp_path / name / 'loss.png'}, .pdf, .svg"]
    for kind in ("png", "pdf", "svg"):
        first, second = ((tmp_path / name / f"loss.{kind}").read_bytes() for name in ("one", "two"))
        assert first == second, kind
    pdf = (tmp_path / "one/loss.pdf").read_bytes()
    assert b"/FontFile2" in pdf, "TrueType outlines are embedded"
    assert b"/Type3" not in pdf
    svg = (tmp_path / "one/loss.svg").read_text()
    assert "<text" not in svg, "letters are shapes, and need no font"


def test_a_picture_that_a_folder_has_in_a_format_is_drawn_anew_in_it(tmp_path):
    with drawn_as(["pdf"]):
        save({"loss": drawn()}, tmp_path)
    before = (tmp_path / "loss.pdf").read_bytes()
    save({"loss": drawn(columns=1), "other": drawn()}, tmp_path)
    assert (tmp_path / "loss.pdf").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.pdf", "loss.png", "other.png"]


@pytest.mark.parametrize("how", [{}, {"sharex": True, "sharey": True}, {"sharey": "row"}])
def test_a_column_has_one_panel_below_the_other_each_with_its_labels(how):
    with drawn_as(width="column"):
        figure = drawn(2, 2, **how)
    assert figure.get_figwidth() == WIDTHS["column"]
    assert faults(figure) == []
    tops = [ax.get_position().y1 for ax in figure.axes]
    assert tops == sorted(tops, reverse=True)
    assert {(ax.get_xlabel(), ax.get_ylabel()) for ax in figure.axes} == {("time", "loss")}
    if how:
        assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


@pytest.mark.parametrize(("place", "columns"), [("outside lower center", 5), ("outside right center", 1)])
def test_legends_come_below_the_panels_of_a_column_and_become_as_narrow(place, columns, tmp_path):
    with drawn_as(width="column"):
        with panels(1, 1, height=2.4) as (figure, axes):
            for k, colour in enumerate(plt.colormaps["viridis"](np.linspace(0, 0.9, 5))):
                axes[0, 0].plot([1, 2], [k, k + 1], color=colour, label=f"a long name of the curve {k}")
            figure.legend(loc=place, ncols=columns)
        assert columns == 1 or any("cut off" in fault for fault in faults(figure))
        save({"loss": figure}, tmp_path)
    assert not [fault for fault in faults(figure) if "cut off" in fault]
    (legend,) = figure.legends
    assert legend.get_window_extent().y1 < axes[0, 0].get_window_extent().y0, "below"


def test_other_formats_and_widths_are_refused():
    for given, message in (
        ({"formats": ["jpg"]}, "format must be 'png', 'pdf' or 'svg', got 'jpg'"),
        ({"formats": []}, "format must name one or several of png, pdf, svg, got none"),
        ({"width": "wide"}, "width must be 'page' or 'column', got 'wide'"),
    ):
        with pytest.raises(InputError, match=re.escape(message)), drawn_as(**given):
            pass
