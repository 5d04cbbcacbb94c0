"""The small store and training of the runtime's laws, for faults, and which rows every change must pass."""

import pytest

from tests.segfleet_runtime.conftest import config, store_path

__all__ = ["config", "store_path"]
P0 = {"A1", "A2", "B1", "B4", "C1", "C3", "D1", "D3", "D6", "E1", "E2", "E3"}
P0 |= {"F1", "F2", "F3", "F4", "F5", "G1", "G3", "G4"}


@pytest.hookimpl(tryfirst=True)  # before what -m leaves out is left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave slow rows of lesser urgency to `make faults-all`."""
    for item in items:
        row = item.get_closest_marker("fault")
        if row and row.args[0] not in P0 and item.get_closest_marker("slow"):
            item.add_marker("faults_long")
