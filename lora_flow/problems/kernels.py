"""Arrays of any number of axes as the matrix W of a linear layer, `(out, in)`, and back.

`letters` has one letter for each axis of the array, "i" for the inputs' and "o" for the outputs': "io" is Flax's
kernel and GPT-2's Conv1D, "oi" Equinox's and PyTorch's weight, "ioo" a kernel of queries, keys or values with heads,
"iio" the one that joins the heads again, and a kernel of a convolution over one axis. Several axes are folded in their
order.
"""

from __future__ import annotations

import numpy as np

from lora_flow.arrays import AnyArray
from lora_flow.checks import kind, require


def check_letters(name: str, letters: str, shape: tuple[int, ...]) -> None:
    """Raises unless the letters are those of a kernel of that shape."""
    text = isinstance(letters, str) and set(letters) == {"i", "o"}
    require(text, name, "be a letter for each axis, i for inputs and o for outputs, 'io' for instance", kind(letters))
    require(len(letters) == len(shape), name, f"have {len(shape)} letters, one for each axis of {shape}", letters)


def folded_shape(letters: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """`(out, in)`."""
    sizes = [int(np.prod([shape[axis] for axis in axes])) for axes in _axes(letters)]
    return sizes[0], sizes[1]


def fold(kernel: AnyArray, letters: str) -> AnyArray:
    """The matrix of a kernel, `(out, in)`."""
    outs, ins = _axes(letters)
    return kernel.transpose(*outs, *ins).reshape(folded_shape(letters, kernel.shape))


def unfold(matrix: AnyArray, letters: str, shape: tuple[int, ...]) -> AnyArray:
    """The kernel of that shape with this matrix, `(out, in)`."""
    outs, ins = _axes(letters)
    axes = [*outs, *ins]
    return matrix.reshape([shape[axis] for axis in axes]).transpose(*np.argsort(axes))


def letters_of(index: np.ndarray, shape: tuple[int, ...]) -> str | None:
    """The letters of a kernel whose flat indices stand in `index`, `(out, in)`; None where it is not folded so.

    An axis of the kernel is the inputs' where its place is the same in all rows, and the outputs' where it is the same
    in all columns. One of length 1 is either, so that both have one if they can.
    """
    if index.size != np.prod(shape):
        return None
    letters = []
    for place in np.unravel_index(index, shape):
        fits = {"i": bool((place == place[:1]).all()), "o": bool((place == place[:, :1]).all())}
        if not any(fits.values()):
            return None
        letters.append("?" if all(fits.values()) else "i" if fits["i"] else "o")
    for wanted in "io":
        if wanted not in letters and "?" in letters:
            letters[letters.index("?")] = wanted
    text = "".join(letters).replace("?", "i")
    return text if set(text) == {"i", "o"} else None


def _axes(letters: str) -> tuple[list[int], list[int]]:
    """Those of the outputs, and those of the inputs."""
    outs = [axis for axis, letter in enumerate(letters) if letter == "o"]
    return outs, [axis for axis, letter in enumerate(letters) if letter == "i"]
