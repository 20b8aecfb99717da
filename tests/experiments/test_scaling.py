"""The best scaling against the rank."""

import numpy as np
import pytest
import xarray as xr

from lora_flow.experiments import scaling


def test_the_best_lora_alpha_is_found_between_the_grid_points():
    """On losses that are a parabola in log2(lora_alpha) about 3 + p log2(r), at every rank."""
    exponent = 0.5
    grid, ranks = np.log2(scaling.LORA_ALPHAS)[None], np.log2(scaling.RANKS)[:, None]
    loss = np.exp((grid - 3.1 - exponent * ranks) ** 2)
    found = scaling.best(
        xr.Dataset(
            {"loss": (("seed", "rank", "lora_alpha"), loss[None])},
            coords={"rank": list(scaling.RANKS), "lora_alpha": scaling.LORA_ALPHAS},
        )
    )
    np.testing.assert_allclose(np.log2(found["lora_alpha"][0]), 3.1 + exponent * ranks[:, 0], atol=1e-9)
    assert float(found["exponent"][0]) == pytest.approx(exponent)
