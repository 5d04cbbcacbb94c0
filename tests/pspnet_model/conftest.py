"""Where the real images and labels are, for the tests that compare with the official tools."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def data_dir() -> Path:
    default = Path(__file__).parents[2].parent / "shared" / "data"
    path = Path(os.environ.get("SEGFLEET_DATA", default))
    if not path.is_dir():
        pytest.skip(f"needs the real images and labels of SEGFLEET_DATA, which are not at {path}")
    return path
