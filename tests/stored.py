"""The numbers that the pictures in docs show, and what it is for a picture drawn anew to agree with them."""

from pathlib import Path

import numpy as np

STORED = Path(__file__).parent.parent / "docs/images"
DECADES = 0.1  # twice what each of two runs may be off by
SHARE = 0.03


def check_agrees(stored, fresh):
    """The same axes, curves and maps; to 0.1 decades on logarithmic axes, to 3 % of what is spanned on others."""
    assert [(one["title"], one["scale"]) for one in fresh] == [(one["title"], one["scale"]) for one in stored]
    for old, new in zip(stored, fresh, strict=True):
        for kind in ("lines", "bands", "maps"):
            before, after = _flat(old[kind]), _flat(new[kind])
            assert before.shape == after.shape, (old["title"], kind)
            np.testing.assert_array_equal(np.isnan(before), np.isnan(after), err_msg=f"{old['title']}, {kind}")
            if old["scale"] == "log" and kind != "maps":
                before, after = np.log10(before), np.log10(after)
                np.testing.assert_allclose(after, before, atol=DECADES, err_msg=f"{old['title']}, {kind}")
            elif before.size:
                atol = SHARE * (np.nanmax(before) - np.nanmin(before)) + 1e-9
                np.testing.assert_allclose(after, before, atol=atol, err_msg=f"{old['title']}, {kind}")


def _flat(nested):
    if not isinstance(nested, list):
        return np.array([np.nan if nested is None else nested])
    return np.concatenate([_flat(one) for one in nested]) if nested else np.zeros(0)
