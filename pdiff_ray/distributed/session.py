"""The connection to a local Ray or a cluster, and the channel through which workers report to the driver."""

from __future__ import annotations

import _thread
import contextlib
import gc
import logging
import math
import re
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
import torch
from pyarrow import fs as pafs
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.markup import escape

from pdiff_ray.common import signals
from pdiff_ray.common.devices import exact_float32, limit_threads
from pdiff_ray.common.errors import ConfigError, PdiffError
from pdiff_ray.common.progress import Progress, console
from pdiff_ray.config.schema import Resources
from pdiff_ray.distributed import nodes, ray_address
from pdiff_ray.distributed.events import Events
from pdiff_ray.storage.files import TEMPORARY, Storage

POLL_S = 0.3
ANSWER_S = 60.0  # that an actor beside the driver may take to answer, on a busy machine
WATCH_S = 2.0  # how often Ray's head and node are looked for
HEAD_LOST_S, NODE_LOST_S = 30.0, 3.0  # after which they count as lost: a head may come back, a node does not
CONNECT_TIMEOUT_S = 5.0
CONTEXT_BYTES = 600 * 2**20  # about what CUDA itself takes of a GPU's memory for each process


@contextlib.contextmanager
def connect(resources: Resources, progress: Progress, *, equal: bool = True) -> Iterator[str]:
    """Connects to Ray, and yields the name of the actor through which workers report.

    If this process is connected to Ray already, that connection is used, and is left open at the end.

    Args:
        progress: called in this process with the progress that workers report.
        equal: refuses a cluster with a node whose software is not this process's.

    Raises:
        PdiffError: nothing listens at the address, software differs, or a local Ray has too few cores or GPUs.
    """
    address, ours = ray_address(resources), not ray.is_initialized()
    if address:
        _reach(address)
    if ours:
        _init(address)
    problems = shortages(resources, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    if problems and ours and not address:  # nothing will come beside what is there
        _shutdown()
        raise ConfigError(problems[0])
    for problem in [
        *(f"{one}, or wait until there is more" for one in problems),
        *idle_gpus(resources, ray.cluster_resources()),
    ]:
        console.print(f"[bold yellow]warning:[/] {escape(problem)}")
    name = f"pdiff-events-{uuid.uuid4().hex[:8]}"
    events: Any = ray.remote(Events).options(name=name, **beside_driver()).remote()
    stop = threading.Event()

    def relay() -> None:
        with contextlib.suppress(RayError):  # the work finds out for itself what is lost
            for update in ray.get(events.take.remote(), timeout=ANSWER_S):
                progress(*update)

    def keep_relaying() -> None:
        while not stop.wait(POLL_S):
            relay()

    thread = threading.Thread(target=keep_relaying, daemon=True)
    thread.start()
    try:
        with told_of_losses(), watched(address):
            if address and equal:
                nodes.check_nodes()
            yield name
            stop.set()
            thread.join()
            relay()
    finally:
        stop.set()
        thread.join()
        with contextlib.suppress(RayError):
            ray.kill(events)
        if ours:
            _shutdown()


@contextlib.contextmanager
def told_of_losses() -> Iterator[None]:
    """Turns what Ray raises when it has lost more than it can make up for into one message; bugs keep their traceback.

    Raises:
        PdiffError
    """
    try:
        yield
    except RayTaskError:  # an exception of the code that it runs
        raise
    except RayError as error:
        raise lost(error) from None


def lost(error: Exception) -> PdiffError:
    """Returns the message on a process, node or object that Ray has lost."""
    return PdiffError(f"Ray: {reason_of(error)}; what is finished is kept, and the same command goes on from there")


def reason_of(error: Exception) -> str:
    """Returns what an error of Ray says, without names and logs of its processes."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", str(error)).splitlines()
    said = [line.split(". ")[0] for line in lines if line and not line.startswith((" ", "\t"))]
    return "; ".join(sentence.rstrip(".") for sentence in said[:2]) or type(error).__name__


@contextlib.contextmanager
def watched(cluster: str | None) -> Iterator[None]:
    """Interrupts the work where Ray's head does not answer any more, or where this machine is no node of it any more.

    Ray would end the process after a minute, or let it wait for ever.

    Raises:
        PdiffError: either is gone.
    """
    if (cluster or "").startswith("ray://") or threading.current_thread() is not threading.main_thread():
        yield
        return
    here = ray.get_runtime_context()
    own = next(node for node in ray.nodes() if node["NodeID"] == here.get_node_id())
    head, _, port = here.gcs_address.rpartition(":")
    needed = {  # by name: address, and the seconds after which it counts as lost
        f"its head at {here.gcs_address}": ((head, int(port)), HEAD_LOST_S),
        "its node on this machine": ((own["NodeManagerAddress"], own["NodeManagerPort"]), NODE_LOST_S),
    }
    over, gone = threading.Event(), list[str]()

    def look() -> None:
        answered = dict.fromkeys(needed, time.monotonic())
        while not over.wait(WATCH_S):
            for name, (address, patience) in needed.items():
                try:
                    socket.create_connection(address, timeout=CONNECT_TIMEOUT_S).close()
                    answered[name] = time.monotonic()
                except OSError:
                    if time.monotonic() - answered[name] > patience and not over.is_set():
                        gone.append(f"{name} does not answer any more")
                        _thread.interrupt_main()
                        return

    threading.Thread(target=look, daemon=True, name="head").start()
    try:
        yield
    except KeyboardInterrupt:
        if gone:
            raise lost(ConnectionError(gone[0])) from None
        raise
    finally:
        over.set()


def beside_driver() -> dict[str, Any]:
    """Returns options that place an actor on the driver's node, so that the loss of another node does not end it.

    It is restarted if it dies, without what it knew, which the work can do without.
    """
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": node, "max_restarts": -1, "max_task_retries": -1}


def _init(address: str | None) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)  # none of its many notices is about the experiment
    # Without "local", Ray would join whatever cluster was last started on this machine.
    where: dict[str, Any] = {"address": address} if address else {"address": "local", "include_dashboard": False}
    try:
        with signals.kept():
            ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    except SystemExit:  # what Ray makes of SIGTERM
        signals.interrupt(signal.SIGTERM)
    except (ConnectionError, RuntimeError, ValueError) as error:  # no cluster, one of another version, or no address
        said = " ".join(str(error).split())
        raise PdiffError(
            f"resources.address: {address or 'a local Ray'}: {said}; name a cluster that runs, with this Ray and "
            "Python, or leave the address (and RAY_ADDRESS) empty for a local Ray"
        ) from None


def _shutdown() -> None:
    """Shuts Ray down with garbage collection off.

    Ray ends this process if a reference is released during the shutdown, which a collection in any thread may do.
    """
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()


def shortages(resources: Resources, nodes: Sequence[Mapping[str, float]]) -> list[str]:
    """Returns what is asked for that a Ray of nodes with these resources has too few cores or GPUs for."""
    found = []
    for what, count, cpus, gpus in (
        ("worker", resources.workers, resources.cpus_per_worker, resources.gpus_per_worker),
        ("actor", resources.actors, resources.cpus_per_actor, resources.gpus_per_actor),
        ("trial", 1, resources.cpus_per_trial, resources.gpus_per_trial),
    ):
        for kind, each, name in (("CPU", cpus, "cores"), ("GPU", 0 if gpus == "auto" else float(gpus), "GPUs")):
            there = [node.get(kind, 0.0) for node in nodes]
            field = f"resources.{kind.lower()}s_per_{what}"
            if each > max(there, default=0.0):
                largest = f"no node has more than {max(there, default=0.0):g}"
                found.append(f"{field}: a {what} with {each:g} {name}, but {largest}; lower it")
            elif count * each > sum(there):
                asked = f"resources.{what}s: {count} {what}s with {each:g} {name} each"
                found.append(f"{asked}, but this Ray has {sum(there):g}; lower it or {field}")
    return found


def idle_gpus(resources: Resources, available: Mapping[str, float]) -> list[str]:
    """Returns where processes that share GPUs leave some of them without any."""
    gpus, found = int(available.get("GPU", 0)), []
    for what, count, each in (
        ("workers", resources.workers, resources.gpus_per_worker),
        ("actors", resources.actors, resources.gpus_per_actor),
    ):
        share = math.ceil(count / gpus) if gpus else 0
        if each == "auto" and share > 1 and (idle := gpus - math.ceil(count / share)):
            found.append(
                f"resources.{what}: {count} {what}, {share} to a GPU, leave {idle} of {gpus} GPUs idle; "
                f"{count // gpus * gpus} or {share * gpus} use all"
            )
    return found


def _reach(address: str) -> None:
    """Raises PdiffError if nothing listens at `address`; Ray itself would try for minutes."""
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
    """Returns how much the connected cluster has of each resource, by Ray's names, such as CPU and GPU."""
    return ray.cluster_resources()


def own_files(storage: Storage) -> tuple[pafs.FileSystem, str]:
    """Returns where Ray Train and Tune keep files of their own, of which nothing is needed.

    That is not in object storage: while that is away, they would end.
    """
    if storage.local is None:
        return pafs.LocalFileSystem(), tempfile.gettempdir()
    return storage.fs, storage.path(TEMPORARY)


def gpu_share(configured: float | str, processes: int) -> float:
    """Returns the number of GPUs for each of so many processes.

    With `configured` "auto", this is one, or a fraction with which all processes fit on the cluster's GPUs.
    """
    if configured != "auto":
        return float(configured)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    return 1 / math.ceil(processes / gpus) if gpus else 0.0


def take_place(threads: int, gpus: float, device: torch.device | None = None) -> torch.device:
    """Limits this actor or worker to its share of the cores and of a GPU's memory, and makes float32 exact.

    Without the limit, the processes that share a GPU could make each other run out of memory.

    Args:
        threads: the number of cores for torch.
        gpus: the number of GPUs, or the share of one, that Ray has given to this process.
        device: its device, if that is known; default: the GPU that Ray has given to it, or else the CPU.

    Returns:
        The device of this process.
    """
    limit_threads(threads)
    exact_float32()
    device = device or torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    if device.type == "cuda" and 0 < gpus < 1:
        overhead = CONTEXT_BYTES / torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(max(gpus - overhead, gpus / 2), device.index)
    return device


def leaving() -> Callable[[], bool]:
    """Returns a function for workers, which tells whether their node is being drained, as spot machines are before they
    go."""
    node, told, looked = ray.get_runtime_context().get_node_id(), False, time.monotonic()

    def is_told() -> bool:
        nonlocal told, looked
        if not told and time.monotonic() - looked >= WATCH_S:
            told, looked = node in ray._private.state.state.get_draining_nodes(), time.monotonic()
        return told

    return is_told


def report_progress(events: str) -> Progress:
    """Returns a progress function for workers, which sends at most a few messages a second for each task."""
    actor = ray.get_actor(events)
    last: dict[str, float] = {}

    def progress(task: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if done >= total or now - last.get(task, 0) >= POLL_S:
            last[task] = now
            actor.update.remote(task, done, total, note)

    return progress


def report_failure(events: str, key: str, message: str) -> None:
    """Tells the driver why the artifact or the trial named `key` could not be made."""
    ray.get(ray.get_actor(events).fail.remote(key, message))


def failures(events: str) -> dict[str, str]:
    """Returns the first message that `report_failure` was given for each key."""
    actor: Any = ray.get_actor(events)
    return ray.get(actor.failed.remote(), timeout=ANSWER_S)
