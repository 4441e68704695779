"""A cluster of Ray nodes on this machine that share no files: they have object storage and an MLflow server."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
UNSHARE = ["unshare", "--mount", "--propagation", "private"]
# Several nodes, not a local Ray of the tests; whoever joins has the token.
JOINED = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
DRAIN = """
import sys, time, ray
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
address, name, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
gcs = ray._raylet.GcsClient(address=address)
node = next(n.hex() for n, info in gcs.get_all_node_info().items() if info.node_name == name)
reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
print(gcs.drain_node(node, reason, "spot", int(1000 * (time.time() + seconds))))
"""


def missing() -> str:
    """Returns why this machine cannot do it, or nothing."""
    if shutil.which("unshare") is None:
        return "needs unshare (util-linux)"
    if subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        return "needs the right to make mount namespaces (root)"
    return ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Node:
    """A node of one core.

    Attributes:
        raylet: the process that it ends with.
        cache: its own folder for images, a small file system, as it is seen from here.
    """

    name: str
    raylet: psutil.Process
    cache: Path


class Cluster:
    """A head that only plans, and nodes that see no file below `hidden`, with `cache_mib` MiB for images each.

    Attributes:
        address: of the head.
        environment: of who joins.
        trace: the file in which processes of its nodes write down what members they train; see `traced`.
        nodes: those that are alive, without the head.
    """

    def __init__(self, folder: Path, hidden: Path, cache_mib: int) -> None:
        self.folder, self.hidden, self.trace = folder, hidden, folder / "trace"
        self.cache_mib = cache_mib
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        # Short, for the sockets in it, and not Ray's own, where the address would stay and mislead every later Ray.
        self.temporary = tempfile.mkdtemp(dir="/tmp")
        self.environment = {
            **JOINED,
            "PDIFF_TEST_CLUSTER": self.address,
            "PDIFF_TEST_TRACE": str(self.trace),
            "PYTHONPATH": ":".join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/faults/traced"))),
            "RAY_TMPDIR": self.temporary,
        }
        self.nodes: list[Node] = []
        self._started = 0

    def start(self) -> None:
        """Starts the head."""
        self._start("head", "--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false")

    def add(self, **environment: str) -> Node:
        """Starts a node, which joins."""
        self._started += 1
        name, cache = f"node-{self._started}", self.folder / f"cache-{self._started}"
        cache.mkdir()
        hide = f"mount -t tmpfs none {self.hidden} && mount -t tmpfs -o size={self.cache_mib}m none {cache} && "
        prefix = [*UNSHARE, "bash", "-c", f'{hide}exec "$@"', "node"]
        environment = {"PDIFF_CACHE": str(cache), **environment}
        self._start(name, f"--address={self.address}", "--num-cpus=1", prefix=prefix, **environment)
        raylet = next(p for p in self.processes(name) if "raylet/raylet" in cmdline(p))
        self.nodes.append(Node(name, raylet, Path(f"/proc/{raylet.pid}/root{cache}")))
        return self.nodes[-1]

    def _start(self, name: str, *arguments: str, prefix=(), **environment: str) -> None:
        ray = [str(Path(sys.executable).parent / "ray"), "start", "--disable-usage-stats", f"--node-name={name}"]
        own = ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
        environment = {**os.environ, **self.environment, "PDIFF_TEST_NODE": name, **environment}
        started = subprocess.run(
            [*prefix, *ray, *own, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        assert started.returncode == 0, started.stdout + started.stderr

    def processes(self, node: str | None = None) -> list[psutil.Process]:
        """Returns the processes of a node, or of all that belongs to the cluster."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                of = process.environ()
                if of.get("PDIFF_TEST_CLUSTER") == self.address and node in (None, of.get("PDIFF_TEST_NODE")):
                    found.append(process)
        return found

    def workers(self) -> list[psutil.Process]:
        """Returns the processes that do the work."""
        names = ("ray::RayTrainWorker", "ray::ImplicitFunc", "ray::_Worker")
        return [p for node in self.nodes for p in self.processes(node.name) if cmdline(p).startswith(names)]

    def kill(self, node: Node) -> None:
        """Ends a node at once, with all that runs on it."""
        self.nodes.remove(node)
        kill([node.raylet, *self.processes(node.name)])

    def drain(self, node: Node, seconds: float) -> None:
        """Tells a node, as clouds do with spot machines, that it will end after so many seconds."""
        command = [sys.executable, "-c", DRAIN, self.address, node.name, str(seconds)]
        done = subprocess.run(command, env={**os.environ, **self.environment}, capture_output=True, text=True)
        assert "True" in done.stdout, done.stdout + done.stderr

    def kill_all(self) -> None:
        """Ends head and nodes at once."""
        self.nodes.clear()
        kill(self.processes())

    def stop(self) -> None:
        self.kill_all()
        shutil.rmtree(self.temporary, ignore_errors=True)


class MLflow:
    """An MLflow server."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        server = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        store = [
            "--backend-store-uri",
            f"sqlite:///{folder}/mlflow.db",
            "--artifacts-destination",
            str(folder / "files"),
        ]
        self.command = [sys.executable, "-m", *server, *store]
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(
            self.command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def wait(self) -> None:
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            time.sleep(0.5)
        raise TimeoutError(self.uri)

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it may be stopped already
            self.signal(signal.SIGKILL)
        self.process.wait()


def cmdline(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=30)
