"""Arrays folded to matrices: a product with the matrix is the product over the axes that the letters say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_flow.problems.kernels import fold, folded_shape, letters_of, unfold


@st.composite
def kernels(draw):
    letters = draw(st.text("io", min_size=2, max_size=4).filter(lambda text: set(text) == {"i", "o"}))
    shape = tuple(draw(st.integers(1, 4)) for _ in letters)
    return letters, np.random.default_rng(draw(st.integers(0, 99))).normal(size=shape)


@given(kernels())
def test_to_unfold_is_to_undo_to_fold(drawn):
    letters, kernel = drawn
    matrix = fold(kernel, letters)
    assert matrix.shape == folded_shape(letters, kernel.shape)
    np.testing.assert_array_equal(unfold(matrix, letters, kernel.shape), kernel)


@given(kernels())
def test_the_matrix_multiplies_what_the_axes_of_inputs_do(drawn):
    letters, kernel = drawn
    axes = "abcd"[: kernel.ndim]
    ins, outs = ("".join(a for a, one in zip(axes, letters, strict=True) if one == kind) for kind in "io")
    x = np.random.default_rng(0).normal(size=[kernel.shape[axes.index(a)] for a in ins])
    expected = np.einsum(f"{axes},{ins}->{outs}", kernel, x)
    np.testing.assert_allclose(fold(kernel, letters) @ x.ravel(), expected.ravel(), atol=1e-12)


@given(kernels())
def test_the_letters_are_read_off_the_places_of_the_entries(drawn):
    """In any order of the rows and of the columns; axes of length 1 may be either."""
    letters, kernel = drawn
    index = fold(np.arange(kernel.size).reshape(kernel.shape), letters)
    rng = np.random.default_rng(1)
    found = letters_of(index[rng.permutation(len(index))][:, rng.permutation(index.shape[1])], kernel.shape)
    long = [axis for axis, size in enumerate(kernel.shape) if size > 1]
    assert found is not None
    assert [found[axis] for axis in long] == [letters[axis] for axis in long]


@pytest.mark.parametrize("index", [np.arange(6).reshape(2, 3)[:, :2], np.arange(8).reshape(2, 4)])
def test_a_part_of_a_matrix_and_a_mixture_have_none(index):
    shape = (2, 3) if index.size < 8 else (4, 2)
    assert letters_of(index, shape) is None
