"""The nodes of a cluster: whether each runs the driver's software, and has what an experiment needs."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pdiff_ray.common.devices import describe_devices
from pdiff_ray.common.errors import PdiffError, StorageError, UnavailableError
from pdiff_ray.config.schema import Data, Resources
from pdiff_ray.data import sources
from pdiff_ray.data.kept import default_cache
from pdiff_ray.distributed import ray_address
from pdiff_ray.storage.files import TEMPORARY, Storage

ANSWER_S = 120.0  # that a node may take to start a process and to look at its data
CLOCK_S = 2.0  # by which clocks may differ: what is signed for object storage has a time, and so have MLflow's charts
LEAST_GIB = 2  # of memory, for a worker's imports and images; of disk, for a data set's images
REFUSED_S = 15.0  # in which a cluster that asks for no token has let everybody in


@dataclass(frozen=True)
class Node:
    """What is known of a node.

    Attributes:
        address: its IP address.
        text: what it has.
        problems: what it lacks, with remedies.
    """

    address: str
    text: str
    problems: tuple[str, ...]


def software() -> dict[str, str]:
    """Returns the versions that have to be equal on all nodes, the sources of this project by a digest."""
    versions = {"Python": platform.python_version(), **{name: metadata.version(name) for name in ("ray", "torch")}}
    return versions | {"pdiff_ray": f"{metadata.version('pdiff-ray')} of sources {_sources()}"}


def expected_software(resources: Resources) -> dict[str, str]:
    """Returns what workers compare their software with: nothing on a local Ray, which has this process's."""
    return software() if ray_address(resources) else {}


@functools.cache
def _sources() -> str:
    folder, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def differences(expected: Mapping[str, str]) -> str:
    """Returns how this process's software differs from what is expected; empty if it does not."""
    return ", ".join(
        f"{name} {found} where the driver has {expected.get(name)}"
        for name, found in software().items()
        if found != expected.get(name)
    )


def check_software(expected: Mapping[str, str]) -> None:
    """Finds, on a node, that its software is not the driver's: results would differ, or end in errors of any kind.

    Raises:
        UnavailableError
    """
    if expected and (found := differences(expected)):
        raise UnavailableError(_refusal(ray.util.get_node_ip_address(), found))


def check_nodes() -> None:
    """Finds nodes whose software is not the driver's, among those that are there and answer.

    One that is busy or goes is left to `check_software`, by which its workers begin.

    Raises:
        PdiffError
    """
    for _, address, found in list(_ask(differences, software())):  # Ray prints errors that nobody has asked for
        if isinstance(found, RayTaskError):
            raise PdiffError(_refusal(address, f"cannot load this project ({_last_line(found)})"))
        if found and not isinstance(found, RayError):
            raise PdiffError(_refusal(address, found))


def examine(data: Data, storage: Storage) -> list[Node]:
    """Returns what each node has for experiments with these images and this storage."""
    name, content = f"{TEMPORARY}/doctor-{uuid.uuid4().hex}", uuid.uuid4().hex.encode()
    storage.write(name, content)
    nodes = []
    try:
        looked = list(_ask(_look, software(), data, storage.uri, name, content))
        late = _clocks()
        for node_id, address, found in looked:
            if isinstance(found, Exception):
                nodes.append(Node(address, "", (f"cannot look: {_last_line(found)}",)))
                continue
            text, problems, answer = found
            if late.get(node_id, 0.0) > CLOCK_S:
                problems.append(f"its clock is {late[node_id]:.0f} s off; have both ask a time server (chrony)")
            if answer is not None:
                try:
                    arrived = storage.read(answer) == content
                    storage.delete(answer)
                except StorageError:
                    arrived = False
                problems += [] if arrived else [f"storage {storage.place}: what it writes does not arrive here"]
            nodes.append(Node(address, text, tuple(problems)))
    finally:
        storage.delete(name)
    return nodes


def open_to_all(address: str) -> bool | None:
    """Tells whether a cluster lets in who has no token, and runs his code; None if it neither did nor refused to."""
    code = f"import ray; ray.init({address!r}, log_to_driver=False, logging_level='CRITICAL')"
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    try:
        process = subprocess.run(
            [sys.executable, "-c", code],
            env={**without, "RAY_AUTH_MODE": "disabled"},
            capture_output=True,
            timeout=REFUSED_S,
        )
    except subprocess.TimeoutExpired as late:  # it asks again and again
        said = late.stderr or b""
    else:
        if process.returncode == 0:
            return True
        said = process.stderr
    return False if b"Unauthenticated" in said else None


def _ask(function: Callable[..., Any], *arguments: Any) -> Iterator[tuple[str, str, Any]]:
    """Runs a function on every node that is there; yields ids and addresses with what it returns, or why it did not."""
    task = ray.remote(function)
    asked = []
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            answer = task.options(num_cpus=0, scheduling_strategy=there, max_retries=0).remote(*arguments)
            asked.append((node["NodeID"], node["NodeManagerAddress"], answer))
    deadline = time.monotonic() + ANSWER_S
    for node_id, address, answer in asked:
        try:
            yield node_id, address, ray.get(answer, timeout=max(1.0, deadline - time.monotonic()))
        except RayError as error:
            yield node_id, address, error


def _clocks() -> dict[str, float]:
    """Returns how many seconds, at least, each node's clock is away from this one's."""
    before, late = time.time(), {}
    for node_id, _, found in _ask(_now):
        if not isinstance(found, Exception):
            late[node_id] = max(before - found, found - time.time(), 0.0)
    return late


def _now() -> float:
    return time.time()


def _look(
    expected: Mapping[str, str], data: Data, storage_uri: str, name: str, content: bytes
) -> tuple[str, list[str], str | None]:
    """Returns what this node has, what it lacks, and the file that it has written, if it could."""
    if not os.environ.get("CUDA_VISIBLE_DEVICES", "all"):  # Ray hides GPUs from who has asked for none
        del os.environ["CUDA_VISIBLE_DEVICES"]
    problems, answer = [], None
    if found := differences(expected):
        problems.append(f"{found}; bring this checkout and its environment to all nodes")
    try:
        devices = describe_devices() or "no GPU"
    except PdiffError as error:
        devices = "no usable GPU"
        problems.append(str(error))
    cache = default_cache()
    cache.mkdir(parents=True, exist_ok=True)
    memory, disk = psutil.virtual_memory().available / 2**30, shutil.disk_usage(cache).free / 2**30
    if memory < LEAST_GIB:
        problems.append(f"{memory:.1f} GiB of memory free, where a worker takes {LEAST_GIB}; end what else runs there")
    if disk < LEAST_GIB:
        problems.append(
            f"{disk:.1f} GiB free for the cache {cache}, where images take up to {LEAST_GIB}; free some, or set "
            "PDIFF_CACHE to a folder of another disk"
        )
    try:
        storage = Storage(storage_uri)
        if storage.read(name) != content:
            raise PdiffError(f"storage {storage.place}: holds other files than where the driver runs")
        answer = f"{name}-{uuid.uuid4().hex}"
        storage.write(answer, content)
    except (PdiffError, OSError) as error:
        problems.append(f"{error}; set storage to what every node reaches, such as object storage")
    try:
        sources.check_data(data)
    except (PdiffError, OSError) as error:
        problems.append(str(error))
    text = (
        f"{os.cpu_count()} cores, {devices}, {memory:.0f} GiB of memory free, {disk:.0f} GiB free for the cache {cache}"
    )
    return text, problems, answer


def _refusal(address: str, found: str) -> str:
    return f"node {address}: {found}; bring this checkout and its environment to all nodes, and start Ray there again"


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
