"""The connection to Ray: a local one or a cluster's, and what travels back to the driver while work goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any

import ray

from pdiff_ray.config import Resources
from pdiff_ray.errors import ConfigError, PdiffError
from pdiff_ray.stages import Progress

POLL_S = 0.3


class _Events:
    """Progress and failures of workers, kept for the driver to fetch."""

    def __init__(self) -> None:
        self.updates: dict[str, tuple[str, int, int, str]] = {}
        self.failure: str | None = None

    def update(self, task: str, done: int, total: int, note: str) -> None:
        # Only the newest of each task: a slow driver must not fall behind. Parallel runs report out of order.
        newest = self.updates.get(task)
        if newest is None or done >= newest[1] or total != newest[2]:
            self.updates[task] = (task, done, total, note)

    def take(self) -> list[tuple[str, int, int, str]]:
        updates, self.updates = list(self.updates.values()), {}
        return updates

    def fail(self, message: str) -> None:
        self.failure = self.failure or message

    def failed(self) -> str | None:
        return self.failure


@contextlib.contextmanager
def connect(resources: Resources, progress: Progress) -> Iterator[Any]:
    """Connects to Ray, and yields the actor through which workers report; `progress` hears of it here.

    A Ray that was there before, a cluster or this process's, is left running.
    """
    ours = not ray.is_initialized()
    if ours:
        _init(resources)
    events = ray.remote(_Events).options(num_cpus=0).remote()
    stop = threading.Event()

    def relay() -> None:
        while not stop.wait(POLL_S):
            for update in ray.get(events.take.remote()):
                progress(*update)

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    try:
        yield events
        stop.set()
        thread.join()
        for update in ray.get(events.take.remote()):
            progress(*update)
    finally:
        stop.set()
        thread.join()
        ray.kill(events)
        if ours:
            ray.shutdown()


def _init(resources: Resources) -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the default of the next version, without its notice
    logging.getLogger("ray").setLevel(logging.ERROR)  # of its many notices none is about the experiment
    address = resources.address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            return
        # Loopback: nobody else on the network can reach a laptop's Ray.
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, _node_ip_address="127.0.0.1")
    except ConnectionError as error:
        raise PdiffError(
            f"resources.address: no Ray cluster at {address!r} ({str(error).splitlines()[0]}); start it with `ray up` or "
            "`ray start --head`, or leave the address (and RAY_ADDRESS) empty for a local Ray"
        ) from None
    available = ray.cluster_resources()
    for what, count, each in (
        ("worker", resources.workers, resources.cpus_per_worker),
        ("actor", resources.actors, resources.cpus_per_actor),
    ):
        if count * each > available.get("CPU", 0):
            ray.shutdown()
            raise ConfigError(
                f"resources: {count} {what}s with {each} cores each, but this machine has {available.get('CPU', 0):g}; "
                f"lower resources.{what}s or resources.cpus_per_{what}"
            )


def num_gpus() -> float:
    """GPUs of the connected cluster."""
    return ray.cluster_resources().get("GPU", 0)


def report_progress(events: Any) -> Progress:
    """A progress function for workers; at most a few messages a second reach the driver."""
    import time

    last: dict[str, float] = {}

    def progress(task: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if done >= total or now - last.get(task, 0) >= POLL_S:
            last[task] = now
            events.update.remote(task, done, total, note)

    return progress
