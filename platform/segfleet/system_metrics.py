"""How busy the first worker's node is while it trains, under the names that MLflow's page of system metrics knows."""

import contextlib
import threading
from types import TracebackType
from typing import Any, Self

from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

SAMPLE_INTERVAL_S = 10.0
_PREFIX = "system/"


class SystemMetrics:
    """Samples MLflow's own monitors in a thread; `take` returns what they saw since it was last called."""

    def __init__(self) -> None:
        # Any, because MLflow's monitors are untyped.
        self._monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(ImportError, RuntimeError):  # no GPU, or nvidia-ml-py is not installed
            self._monitors.append(GPUMonitor())
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="system-metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def take(self) -> dict[str, float]:
        """Return the means since the last call, this moment included."""
        with self._lock:
            found: dict[str, float] = {}
            for monitor in self._monitors:
                monitor.collect_metrics()
                found |= {
                    f"{_PREFIX}{name}": float(value) for name, value in monitor.aggregate_metrics().items()
                }
                monitor.clear_metrics()
            return found

    def _sample(self) -> None:
        while not self._is_over.wait(SAMPLE_INTERVAL_S):
            with self._lock:
                for monitor in self._monitors:
                    monitor.collect_metrics()
