"""The small store and training of the runtime's laws, for faults, and which rows every change must pass."""

import os
import pickle

import pytest
from filelock import FileLock

from segfleet.config import TrainingConfig
from tests.faults.studies import Search, Trials, search_config
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


@pytest.fixture
def undisturbed(config: TrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> Trials:
    """What a search leaves that meets no fault: searched once, by whichever process of the tests comes first."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    known = folder / "undisturbed.pickle"
    with FileLock(f"{known}.lock"):
        if not known.exists():
            own = folder / "undisturbed"
            search = Search(search_config(config, own, {}), own)
            assert search.run() == 0, search.log()
            outcome = search.outcome()
            assert {reason for reason, _, _ in outcome.trials.values()} == {"complete"}
            known.write_bytes(pickle.dumps(outcome))
        outcome = pickle.loads(known.read_bytes())  # noqa: S301
        assert isinstance(outcome, Trials)
        return outcome
