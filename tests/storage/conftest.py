"""A folder with entries of a run's and of other people's."""

import pytest
from entries import FOREIGN, OLD, fill


@pytest.fixture
def folder(tmp_path):
    fill(tmp_path / "run", OLD | FOREIGN)
    return tmp_path / "run"
