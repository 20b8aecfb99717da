"""The check of pictures finds each fault that it is for, and the palette has none."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
from picture_faults import APART, distances, faults

from lora_flow.figures.style import BLUE, GREEN, ORANGE, PURPLE, panels, shades


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def told(change, columns=1):
    with panels(1, columns, height=2.5, width=3.5 * columns) as (figure, axes):
        for ax in axes.flat:
            ax.plot([1.0, 2.0, 3.0], [1.0, 0.5, 0.1], color=BLUE, label="one")
            ax.plot([1.0, 2.0, 3.0], [0.8, 0.3, 0.2], color=ORANGE, label="two")
            ax.set(xlabel="time", ylabel="loss", title="curves")
            ax.legend()
        change(figure, axes[0])
    return faults(figure)


def test_a_picture_without_faults_has_none():
    assert told(lambda figure, axes: None) == []


def beyond(figure, axes):
    figure.text(0.9, 0.5, "beyond the paper")


def long_title(figure, axes):
    axes[0].set_title(
        "a title that is wider than its own panel, and so long that it meets that of the next", loc="left"
    )


def crowded(figure, axes):
    axes[0].set_xticks(np.linspace(1, 3, 30), [f"{x:.2f}" for x in range(30)])


def wide_band(figure, axes):
    axes[0].fill_between([1, 2, 3], [0, 0, 0], [1, 9, 1])
    axes[0].set_ylim(0, 1.2)


def third(figure, axes):
    axes[0].plot([1, 2, 3], [1, 1, 1], color=GREEN)


def nearly_blue(figure, axes):
    axes[0].plot([1, 2, 3], [1, 1, 0], color="#0072B8", label="three")


def odd_ticks(figure, axes):
    axes[0].set(yscale="log", ylim=(1e-40, 1), yticks=10.0 ** np.arange(-38, 1, 11))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (beyond, "cut off on the right"),
        (long_title, "lies on"),
        (crowded, "lies on"),
        (wide_band, "a band ends"),
        (third, "no legend names #009e73"),
        (nearly_blue, "are alike to eyes with"),
        (odd_ticks, "ticks every 11 decades on y"),
    ],
)
def test_each_fault_is_found(change, fault):
    found = told(change, columns=2)
    assert any(fault in one for one in found), found


def test_all_eyes_tell_the_colours_of_the_palette_apart():
    for one, two in itertools.combinations((BLUE, ORANGE, GREEN, PURPLE), 2):
        assert min(distances(one, two).values()) > APART, (one, two)
    for count in range(2, 8):
        for one, two in itertools.pairwise(map(tuple, shades(count, until=0.75))):
            assert min(distances(one, two).values()) > APART, count
