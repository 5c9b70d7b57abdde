"""Logs the use of processors, memory, disk, network and GPUs of this machine while a run is active.

MLflow's monitor measures. The values go through the run's outbox, so none is lost while MLflow cannot be reached. The
step of a value is the number of seconds since the start of the run, so a resumed run continues the steps without
reading them. MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL sets the pause between two values (MLflow's default: 10 s). Rank 0
only.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from trainer.tracking.outbox import SYSTEM_PREFIX, Point

LOGGER = logging.getLogger("miniplm.trainer.tracking")


class SystemMetrics:
    """Measures in a thread until `stop`. A failure ends it with a warning.

    Args:
        run_id: the MLflow run.
        run_started: when the run was started, in milliseconds since 1970.
        log: receives each point.
    """

    def __init__(self, run_id: str, run_started: int, log: Callable[[Point], None]) -> None:
        self._run_started, self._log = run_started, log
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(run_id,), name="system metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stops measuring; returns when the thread has ended."""
        self._stopped.set()
        self._thread.join()

    def _work(self, run_id: str) -> None:
        try:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            monitor: Any = SystemMetricsMonitor(run_id)
            while not self._stopped.wait(monitor.sampling_interval):
                monitor.collect_metrics()
                values = {f"{SYSTEM_PREFIX}{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
                for part in monitor.monitors:
                    part.clear_metrics()
                now = time.time_ns() // 1_000_000
                self._log(Point(values, (now - self._run_started) // 1000, now))
        except Exception as error:  # psutil and the GPU's driver have errors of many classes
            LOGGER.warning("no further system metrics: %s: %s; the work continues", type(error).__name__, error)
