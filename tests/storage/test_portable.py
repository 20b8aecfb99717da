"""Attributes that every file format takes."""

import numpy as np

from lora_flow.storage.portable import portable_attrs


def test_attributes_of_every_kind_are_made_portable():
    given = {"a": [[6, 5], [4, 6]], "b": True, "c": ["x", "y"], "d": (True, 2.5), "e": np.float32(0.5), "f": 2**40}
    told = portable_attrs(given | {"g": None, "h": np.array([[1.0, 2.0]]), "j": ("top",)})
    expected = {"a": [6, 5, 4, 6], "b": 1, "c": "x, y", "d": [1, 2.5], "e": 0.5, "f": 2.0**40, "h": [1.0, 2.0]}
    assert told == expected | {"j": "top"}
    assert type(told["b"]) is int
