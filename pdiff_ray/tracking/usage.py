"""What this machine was doing while runs were made: MLflow's system metrics."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

FIRST_S, MAX_SAMPLES = 2.0, 256  # the pause doubles, and every other sample goes, whenever there are more

Sample = tuple[int, dict[str, float]]  # milliseconds since 1970, metrics by their names on MLflow


class Usage:
    """Samples taken while the context is entered, by MLflow's monitors of processors, memory, disks, network, GPUs.

    Args:
        node: the machine's name in those of the metrics, where the work may be done by others.
    """

    def __init__(self, node: str = "") -> None:
        self.prefix = f"system/{node}/" if node else "system/"
        self.samples: list[Sample] = []
        self._over = threading.Event()

    def __enter__(self) -> Usage:
        threading.Thread(target=self._sample, daemon=True, name="usage").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def between(self, started: int, ended: int) -> list[Sample]:
        """Returns the samples of a time, in milliseconds since 1970."""
        return [sample for sample in self.samples if started <= sample[0] <= ended]

    def _sample(self) -> None:
        monitors, pause = _monitors(), FIRST_S
        for monitor in monitors:  # a processor's use is that since the time before
            monitor.collect_metrics()
            monitor.clear_metrics()
        while not self._over.wait(pause):
            taken: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                taken |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            named = {f"{self.prefix}{name}": float(value) for name, value in taken.items()}
            self.samples = [*self.samples, (int(1000 * time.time()), named)]
            if len(self.samples) > MAX_SAMPLES:
                self.samples, pause = self.samples[1::2], 2 * pause


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)  # not every GPU tells everything, each time
    found = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        return [*found, GPUMonitor()]
    except Exception:  # there is none
        return found
