"""Boxes tile the grid; batches tile the boxes; small grids lose nothing by it, and large ones have few files."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_flow.storage.lanes import Boxes
from lora_flow.sweeps.layout import Layout, choose_layout

SHAPES = st.lists(st.integers(1, 12), min_size=1, max_size=5).map(tuple).filter(lambda shape: math.prod(shape) <= 300)


@given(SHAPES, st.data())
def test_boxes_tile_a_grid_and_their_lanes_are_their_blocks(shape, data):
    boxes = Boxes(shape, tuple(data.draw(st.integers(1, size)) for size in shape))
    grid = np.arange(math.prod(shape)).reshape(shape)
    for number in range(boxes.count):
        np.testing.assert_array_equal(boxes.lanes(number), grid[boxes.block(number)].ravel())
        assert tuple(part.start for part in boxes.block(number)) == tuple(np.multiply(boxes.place(number), boxes.box))
    lanes = np.concatenate([boxes.lanes(number) for number in range(boxes.count)])
    np.testing.assert_array_equal(np.sort(lanes), grid.ravel())
    lane = data.draw(st.integers(0, grid.size - 1))
    (number,) = boxes.where(grid == lane)
    assert lane in boxes.lanes(number)


@given(SHAPES, st.integers(1, 70), st.data())
def test_a_layout_has_whole_trailing_axes_and_batches_of_at_most_so_many_lanes(shape, most, data):
    problems = data.draw(st.integers(0, len(shape)))
    costs = np.asarray(10.0 ** np.random.default_rng(data.draw(st.integers(0, 99))).uniform(0, 3, shape[:problems]))
    layout = choose_layout(shape, costs, most)
    cut = [i for i, (size, length) in enumerate(zip(shape, layout.boxes.box, strict=True)) if length < size]
    assert all(length == 1 for length in layout.boxes.box[: max(cut, default=0)])
    assert 1 <= layout.width <= most
    for number in range(layout.boxes.count):
        batches = layout.batches(number)
        assert all(1 <= len(lanes) <= layout.width for lanes in batches)
        np.testing.assert_array_equal(np.concatenate(batches), layout.boxes.lanes(number))


@pytest.mark.parametrize(
    ("shape", "box", "width"),
    [
        ((2, 1, 3, 1, 30), (1, 1, 3, 1, 30), 45),  # Figure 1: four full batches
        ((12, 1, 3, 1, 5), (6, 1, 3, 1, 5), 45),  # many initialisations, few seeds
        ((50, 1, 1, 1, 1), (50, 1, 1, 1, 1), 25),
        ((1, 1, 1, 1, 1), (1, 1, 1, 1, 1), 1),
    ],
)
def test_small_grids_fill_their_batches(shape, box, width):
    assert choose_layout(shape, np.array(1.0), 64) == Layout(Boxes(shape, box), width)


@pytest.mark.parametrize("seeds", [3_333, 33_334, 333_334])
def test_large_grids_have_boxes_of_thousands_of_lanes_and_hardly_an_empty_place(seeds):
    layout = choose_layout((1, 1, 3, 1, seeds), np.array(1.0), 64)
    assert layout.boxes.count <= max(100, seeds // 400)
    places = sum(len(layout.batches(number)) for number in range(layout.boxes.count)) * layout.width
    assert 3 * seeds <= places <= 1.02 * 3 * seeds


def test_problems_of_unlike_cost_share_no_batch_and_of_like_cost_do():
    shape = (4, 1, 1, 1, 1, 16)
    assert choose_layout(shape, np.array([1.0, 1.1, 1.2, 1.3]), 64).width == 32
    assert choose_layout(shape, np.array([1.0, 3.0, 10.0, 300.0]), 64).width <= 16
