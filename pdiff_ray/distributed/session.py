"""The connection to Ray: a local one or a cluster's, and what travels back to the driver while work goes on."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pdiff_ray.common.devices import exact_float32
from pdiff_ray.common.errors import ConfigError, PdiffError
from pdiff_ray.common.progress import Progress
from pdiff_ray.config.schema import Resources
from pdiff_ray.distributed import ray_address

POLL_S = 0.3
CONNECT_TIMEOUT_S = 5.0
CONTEXT_BYTES = 600 * 2**20  # of a GPU's memory that a process takes for CUDA itself, about


class _Events:
    """Progress and failures of workers, kept for the driver to fetch."""

    def __init__(self) -> None:
        self.updates: dict[str, tuple[str, int, int, str]] = {}
        self.failures: dict[str, str] = {}

    def update(self, task: str, done: int, total: int, note: str) -> None:
        # Only the newest of each task: a slow driver must not fall behind. Parallel runs report out of order.
        newest = self.updates.get(task)
        if newest is None or done >= newest[1] or total != newest[2]:
            self.updates[task] = (task, done, total, note)

    def take(self) -> list[tuple[str, int, int, str]]:
        updates, self.updates = list(self.updates.values()), {}
        return updates

    def fail(self, key: str, message: str) -> None:
        self.failures.setdefault(key, message)

    def failed(self) -> dict[str, str]:
        return self.failures


@contextlib.contextmanager
def connect(resources: Resources, progress: Progress) -> Iterator[str]:
    """Connects to Ray, and yields the name of the actor through which workers report; `progress` hears of it here.

    A Ray that was there before is left running; one that this process has goes before the address.

    Raises:
        PdiffError: nothing listens at the address, or a local Ray has too little.
    """
    address, ours = ray_address(resources), not ray.is_initialized()
    if address:
        _reach(address)
    if ours:
        _init(resources, address)
    name = f"pdiff-events-{uuid.uuid4().hex[:8]}"
    events: Any = ray.remote(_Events).options(name=name, **beside_driver()).remote()
    stop = threading.Event()

    def relay() -> None:
        while not stop.wait(POLL_S):
            for update in ray.get(events.take.remote()):
                progress(*update)

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    try:
        yield name
        stop.set()
        thread.join()
        for update in ray.get(events.take.remote()):
            progress(*update)
    finally:
        stop.set()
        thread.join()
        ray.kill(events)
        if ours:
            _shutdown()


def beside_driver() -> dict[str, Any]:
    """Options of an actor that lives as long as the driver does: on its node, so that no other's loss takes it away."""
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": node}


def _init(resources: Resources, address: str | None) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)  # of its many notices none is about the experiment
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return
    # "local": else Ray would join whatever cluster was last started on this machine.
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        check_resources(resources, ray.cluster_resources())
    except ConfigError:
        _shutdown()
        raise


def _shutdown() -> None:
    """Ends Ray, which ends this process if a reference is released meanwhile, as a collection in any thread may do."""
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()


def check_resources(resources: Resources, available: Mapping[str, float]) -> None:
    """Raises ConfigError if a machine that will not grow has too little: Ray would wait for more for ever."""
    for what, count, cpus, gpus in (
        ("worker", resources.workers, resources.cpus_per_worker, resources.gpus_per_worker),
        ("actor", resources.actors, resources.cpus_per_actor, resources.gpus_per_actor),
        ("trial", 1, resources.cpus_per_trial, resources.gpus_per_trial),
    ):
        for kind, each, name in (("CPU", cpus, "cores"), ("GPU", 0 if gpus == "auto" else float(gpus), "GPUs")):
            if count * each > available.get(kind, 0):
                raise ConfigError(
                    f"resources.{what}s: {count} {what}s with {each:g} {name} each, but this machine has "
                    f"{available.get(kind, 0):g}; lower resources.{what}s or resources.{kind.lower()}s_per_{what}"
                )


def _reach(address: str) -> None:
    """Raises PdiffError unless something listens at `address`; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():  # "auto", or a name that Ray resolves
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise PdiffError(
            f"resources.address: no Ray cluster at {address!r} ({error.strerror or error}); start it with `ray up` or "
            "`ray start --head`, or leave the address (and RAY_ADDRESS) empty for a local Ray"
        ) from None


def cluster_resources() -> dict[str, float]:
    """What the connected cluster has, by Ray's names."""
    return ray.cluster_resources()


def gpu_share(configured: float | str, processes: int) -> float:
    """GPUs for each of some processes; "auto": one, or a fraction such that all find a place on the cluster's."""
    if configured != "auto":
        return float(configured)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    return 1 / math.ceil(processes / gpus) if gpus else 0.0


def take_place(threads: int, gpus: float, device: torch.device | None = None) -> torch.device:
    """Keeps this actor or worker to its share of cores, and of a GPU's memory, so that no neighbour fails for it.

    Float32 is exact from here on.

    Args:
        gpus: its share of them, as it was given by Ray.
        device: its GPU, where it sees several.

    Returns:
        Its device.
    """
    torch.set_num_threads(threads)
    exact_float32()
    device = device or torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    if device.type == "cuda" and 0 < gpus < 1:
        overhead = CONTEXT_BYTES / torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(max(gpus - overhead, gpus / 2), device.index)
    return device


def report_progress(events: str) -> Progress:
    """A progress function for workers; at most a few messages a second reach the driver."""
    actor = ray.get_actor(events)
    last: dict[str, float] = {}

    def progress(task: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if done >= total or now - last.get(task, 0) >= POLL_S:
            last[task] = now
            actor.update.remote(task, done, total, note)

    return progress


def report_failure(events: str, key: str, message: str) -> None:
    """Tells the driver what a user can mend about the artifact (or trial) `key`."""
    ray.get(ray.get_actor(events).fail.remote(key, message))


def failures(events: str) -> dict[str, str]:
    """The first message of `report_failure` for each key."""
    actor: Any = ray.get_actor(events)
    return ray.get(actor.failed.remote())
