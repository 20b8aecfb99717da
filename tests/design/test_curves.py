"""Loss curves from CSV files: which columns are read, and what is refused in one line."""

import numpy as np
import pytest

from lora_flow import read_curves
from lora_flow.checks import InputError


def written(tmp_path, text):
    path = tmp_path / "curve.csv"
    path.write_text(text)
    return path


def test_a_curve_has_a_column_of_times_and_one_of_losses_in_any_order(tmp_path):
    found = read_curves(written(tmp_path, "loss,step\n4,0\n2,10\n\n1,20\n"))
    assert (found.clock, found.names) == ("step", ("loss",))
    np.testing.assert_array_equal(found.times, [0, 10, 20])
    np.testing.assert_array_equal(found.losses, [[4, 2, 1]])


def test_several_runs_are_the_columns_whose_names_begin_with_loss(tmp_path):
    path = written(tmp_path, "\ufeffiteration, loss_a, lr, loss_b\n0,4,1,5\n1,3,1,4\n2,2,1,3\n")
    assert read_curves(path).names == ("loss_a", "loss_b")
    assert read_curves(path, columns=("lr",)).losses.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "curve must begin with a line of names, such as step,loss, got an empty file"),
        ("0,1\n1,2\n2,3\n", "curve must begin with a line of names that differ, such as step,loss, got '0,1'"),
        ("step,loss\n0,1\n1\n", "curve must have 2 cells in each line, got another number in line 3"),
        ("step,loss\n0,1\n1,\n2,1\n", "column 'loss' must have numbers, got '' in line 3"),
        ("step,loss\n0,1\n1,nan\n2,1\n", "losses must be positive and finite, got nan at 1"),
        ("step,loss\n0,1\n1,-2\n2,1\n", "losses must be positive and finite, got -2.0 at 1"),
        ("step,loss\n0,1\n2,1\n1,1\n", "times must increase, got 1.0 after 2.0"),
        ("step,loss\n-1,1\n0,1\n1,1\n", "times must be at least 0, got -1.0"),
        ("step,loss\nnan,1\n0,1\n1,1\n", "times must be finite, got nan"),
        ("step,loss\n0,1\n1,1\n", "times must be at least three times or steps, got [0.0, 1.0]"),
        (
            "step,train,test\n0,1,1\n1,1,1\n2,1,1\n",
            "columns must be named, where several may be losses, got train, test",
        ),
    ],
)
def test_what_is_no_curve_is_refused(text, message, tmp_path):
    with pytest.raises(InputError) as refused:
        read_curves(written(tmp_path, text))
    assert str(refused.value) == message


def test_the_nearest_column_is_suggested(tmp_path):
    with pytest.raises(InputError, match=r"clock must be .*did you mean 'iteration'"):
        read_curves(written(tmp_path, "iteration,loss\n0,1\n1,1\n2,1\n"), clock="iterations")
