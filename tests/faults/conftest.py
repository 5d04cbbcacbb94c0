"""The small store and training of the runtime's laws, for faults."""

from tests.segfleet_runtime.conftest import config, store_path

__all__ = ["config", "store_path"]
