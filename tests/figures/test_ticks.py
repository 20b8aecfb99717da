"""A logarithmic axis has at least three labels, whatever its range, and keeps the ticks that were put on it."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from lora_flow.figures.style import panels
from lora_flow.figures.ticks import label_ticks


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def labelled(axis):
    """The places of a drawn axis that are in view and have a label, with the labels; those of minor ticks too."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    told = {tick.get_loc(): tick.label1.get_text() for tick in ticks if tick.label1.get_text()}
    return {place: text for place, text in told.items() if low * (1 - 1e-9) <= place <= high * (1 + 1e-9)}


RANGES = [
    (0.024, 1.3),
    (8.0, 500.0),
    (0.9, 11.0),
    (0.2, 0.9),
    (2.1, 2.9),
    (1.0, 1.001),
    (1.0, 1 + 1e-6),
    (2.5, 2.5 * (1 + 3e-8)),
    (3e-9, 3e-9 * (1 + 1e-7)),
    (3e20, 3e20 * (1 + 1e-6)),
    (3e-9, 2e-8),
    (1.0, 1e3),
    (1e-30, 1.0),
    (0.001, 2e5),
]


@pytest.mark.parametrize("height", [1.0, 3.0])
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_at_least_three_labels_at_their_places(low, high, height):
    with panels(1, 2, height=height) as (figure, axes):
        for ax, scale in zip(axes.flat, ("yscale", "xscale"), strict=True):
            ax.set(xlim=(low, high), ylim=(low, high), **{scale: "log"})
    figure.draw_without_rendering()
    for axis in (axes[0, 0].yaxis, axes[0, 1].xaxis):
        shown = labelled(axis)
        assert 3 <= len(shown) <= 12
        assert len(set(shown.values())) == len(shown)
        for place, text in shown.items():
            number = text.strip("$").replace(r"\mathdefault{", "").replace("}", "").replace("{", "")
            number = number.replace(r"\times10^", "e").replace("10^", "1e")
            assert float(number) == pytest.approx(place, rel=1e-9), text


def test_labels_follow_the_axis_when_its_range_changes():
    ax = plt.subplots()[1]
    ax.set_yscale("log")
    assert label_ticks(ax) is ax
    ax.set_ylim(1e-6, 1.0)
    ax.figure.draw_without_rendering()
    assert set(labelled(ax.yaxis)) >= {1e-6, 1e-4, 1.0}
    ax.set_ylim(0.02, 1.5)
    ax.figure.draw_without_rendering()
    assert list(labelled(ax.yaxis).values()) == ["0.03", "0.1", "0.3", "1"]


def test_ticks_that_were_chosen_stay_and_linear_axes_are_left_alone():
    ax = plt.subplots()[1]
    ax.set(xscale="log", xlim=(0.02, 1.2))
    ax.set_xticks([0.025, 0.4], ["a", "b"])
    ax.minorticks_off()
    linear = ax.yaxis.get_major_locator()
    label_ticks(ax)
    ax.figure.draw_without_rendering()
    assert list(labelled(ax.xaxis).values()) == ["a", "b"]
    assert ax.yaxis.get_major_locator() is linear
    np.testing.assert_allclose(ax.get_xlim(), (0.02, 1.2))
