"""The digits, images made ready for a network, and batches that use all samples alike."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import IMAGES, drawn
from lora_flow_vision import data
from lora_flow_vision.data import epochs, load_dataset, prepare
from sklearn.datasets import load_digits

from lora_flow import InputError


def test_the_digits_are_all_there_once_split_with_their_strata():
    dataset = load_dataset("digits")
    pixels, digit = load_digits(return_X_y=True)
    train, test = dataset.train, dataset.test
    assert train.images.shape == (1347, 8, 8, 1)
    assert test.images.shape == (450, 8, 8, 1)
    assert train.images.dtype == test.images.dtype == np.float32
    both, labels = np.concatenate([train.images, test.images]), np.concatenate([train.labels, test.labels])
    samples = {(*row, label) for row, label in zip(both.reshape(-1, 64) * 16, labels, strict=True)}
    assert samples == {(*row, label) for row, label in zip(pixels, digit, strict=True)}
    # each class has its share of the 450, to within one image
    share = np.bincount(digit) * 450 / len(digit)
    assert np.all(np.abs(np.bincount(test.labels) - share) < 1)
    np.testing.assert_array_equal(load_dataset("digits").test.labels, test.labels)


@pytest.mark.parametrize("size", [3, 8, 13])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("given_channels", [1, 3])
def test_constant_images_stay_constant(size, channels, given_channels):
    images = np.broadcast_to(np.array([0, 51, 255], np.uint8)[:, None, None, None], (3, 8, 6, given_channels))
    prepared = prepare(images, size, channels, mean=0.2, std=0.5)
    assert prepared.dtype == np.float32
    expected = np.broadcast_to(np.array([-0.4, 0.0, 1.6])[:, None, None, None], (3, size, size, channels))
    np.testing.assert_allclose(prepared, expected, atol=2e-6)


def test_enlarging_by_a_whole_factor_keeps_each_images_mean():
    """Each old pixel's bilinear weights then add up to the factor squared, at the borders too."""
    images, _ = drawn(4, 6, 6, 3)
    prepared = prepare(images, 18, 3, mean=0.0, std=1.0)
    np.testing.assert_allclose(prepared.mean(axis=(1, 2)), images.mean(axis=(1, 2)) / 255, rtol=1e-5)


def test_resizing_is_linear_interpolation_between_the_centres_of_pixels():
    images = np.array([0, 51, 204], np.uint8).reshape(1, 1, 3, 1)
    row = prepare(images, 6, 1, mean=0.0, std=1.0)[0, 2, :, 0]
    np.testing.assert_allclose(row, np.interp((np.arange(6) + 0.5) / 2 - 0.5, np.arange(3), [0, 0.2, 0.8]), atol=1e-6)


def test_at_their_own_size_images_are_only_scaled_and_normalised_by_channel():
    images, _ = drawn(5, 4, 4, 3)
    mean, std = np.array([0.1, 0.5, 0.9]), np.array([0.5, 1.0, 2.0])
    np.testing.assert_allclose(prepare(images, 4, 3, mean, std), (images / 255 - mean) / std, atol=1e-6)
    np.testing.assert_array_equal(
        prepare((images / 255).astype(np.float32), 4, 3, mean, std), prepare(images, 4, 3, mean, std)
    )
    grey = prepare(images, 4, 1, mean=0.0, std=1.0)
    np.testing.assert_allclose(grey[..., 0], images @ [0.299, 0.587, 0.114] / 255, atol=1e-6)
    np.testing.assert_array_equal(
        prepare(images[..., :1], 4, 3, mean=0.0, std=1.0), np.repeat(images[..., :1] / np.float32(255), 3, axis=-1)
    )


@pytest.mark.parametrize("count", [1, 4, 5])
def test_images_are_prepared_alike_in_chunks_and_at_once(monkeypatch, count):
    images, _ = drawn(count, 5, 7, 3)
    at_once = prepare(images, 6, 3, mean=0.3, std=0.2)
    monkeypatch.setattr(data, "_CHUNK", 2 * 3 * 7**2)  # two images at a time
    np.testing.assert_allclose(prepare(images, 6, 3, mean=0.3, std=0.2), at_once, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": IMAGES}, r"images must have the shape \(count, height, width, 1 or 3\) .*, got \(7, 5, 4\)"),
        ({"images": IMAGES[:0, ..., None]}, r"images must .* not be empty, got \(0, 5, 4, 1\)"),
        ({"images": np.zeros((1, 2, 2, 2), np.uint8)}, r"images must have the shape .*, got \(1, 2, 2, 2\)"),
        ({"images": np.zeros((1, 2, 2, 1))}, "images must be uint8 or float32, got float64"),
        ({"images": np.full((1, 2, 2, 1), 16, np.float32)}, r"images must lie in 0\.\.1 where .*, got 16\.0\.\.16\.0"),
        ({"images": np.full((1, 2, 2, 1), np.nan, np.float32)}, r"images must lie in 0\.\.1 where .*, got nan"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
        ({"mean": (0.1, 0.2)}, r"mean must be a finite number, or 3 of them, got \(0\.1, 0\.2\)"),
        ({"mean": float("nan")}, "mean must be a finite number, or 3 of them, got nan"),
        ({"std": (1.0, 1.0, 0.0)}, r"std must be positive, got \(1\.0, 1\.0, 0\.0\)"),
    ],
)
def test_bad_arguments_of_prepare_are_named(changed, message):
    arguments = {"images": IMAGES[..., None], "size": 4, "channels": 3, "mean": 0.5, "std": 0.5}
    with pytest.raises(InputError, match=message):
        prepare(**(arguments | changed))


RUNS = {"seed": st.integers(0, 1000), "count": st.integers(1, 40), "batch_size": st.integers(1, 50)}


@settings(max_examples=50, deadline=None)
@given(**RUNS, steps=st.integers(0, 30))
def test_every_epoch_uses_every_index_once(seed, count, batch_size, steps):
    batches = epochs(seed, count, batch_size, steps)
    assert batches.shape == (steps, batch_size)
    assert batches.dtype == np.int32
    run = batches.ravel()
    whole = len(run) // count * count
    np.testing.assert_array_equal(
        np.sort(run[:whole].reshape(-1, count)), np.tile(np.arange(count), (whole // count, 1))
    )
    last = run[whole:]
    assert len(set(last)) == len(last)
    assert np.all((last >= 0) & (last < count))


@settings(max_examples=50, deadline=None)
@given(**RUNS, steps=st.integers(0, 15), more=st.integers(0, 15))
def test_a_longer_run_begins_with_a_shorter_one(seed, count, batch_size, steps, more):
    longer = epochs(seed, count, batch_size, steps + more)
    np.testing.assert_array_equal(longer[:steps], epochs(seed, count, batch_size, steps))


def test_epochs_and_seeds_have_orders_of_their_own():
    """Of 60! permutations, two drawn at random are never the same."""
    orders = [*epochs(0, 60, 60, 3), *epochs(1, 60, 60, 3), np.arange(60)]
    assert len({tuple(order) for order in orders}) == 7


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"steps": -1}, "steps must be at least 0, got -1"),
    ],
)
def test_bad_arguments_of_epochs_are_named(changed, message):
    with pytest.raises(InputError, match=message):
        epochs(**({"seed": 0, "count": 5, "batch_size": 2, "steps": 3} | changed))
