"""Samples the machine's load for MLflow's system metrics."""

from __future__ import annotations

import time

from mlflow.entities import Metric
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

PERIOD_SECONDS = 10.0


class SystemSampler:
    """CPU, memory, disk, network and GPU use, every 10 s.

    MLflow's own thread stops permanently at the first failure of the server, takes no sample in a short run and delays
    the end of a run; so only its collectors are used, and the sender schedules the samples. The step of a sample is the
    number of periods since the run was created: a resumed run continues after its earlier samples.

    Args:
        uri: the store.
        run_id: the run.
        start_ms: when the run was created, milliseconds since 1970.
    """

    def __init__(self, uri: str, run_id: str, start_ms: int) -> None:
        self._monitor = SystemMetricsMonitor(run_id, tracking_uri=uri)
        self._start_ms = start_ms
        self._next = time.monotonic()

    def sample(self) -> list[Metric]:
        """Take a sample if one is due; the first is due at once."""
        if time.monotonic() < self._next:
            return []
        self._next = time.monotonic() + PERIOD_SECONDS
        self._monitor.collect_metrics()
        values = self._monitor.aggregate_metrics()
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()
        now = time.time_ns() // 1_000_000
        step = int((now - self._start_ms) / (PERIOD_SECONDS * 1000))
        return [Metric(f"system/{name}", float(value), now, step) for name, value in values.items()]
