"""Commands on a cluster whose nodes do not see the driver's files."""

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from faults.cluster import JOINED, ROOT, Cluster, cmdline, missing
from faults.store import Store
from helpers import TINY

from pdiff_ray.distributed import nodes

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]


@pytest.fixture
def bucket():
    store = Store()
    yield store.uri
    store.stop()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head that only plans, and two nodes of one core that do not see the driver's folder."""
    folder = tmp_path_factory.mktemp("cluster")
    driver = folder / "driver"
    driver.mkdir()
    started = Cluster(folder, driver, cache_mib=4096)  # the doctor asks for 2 GiB; what is not written takes none
    try:
        started.start()
        for _ in range(2):
            started.add()
        yield started, driver
    finally:
        started.stop()


LOCAL = """
from pdiff_ray import distributed
from pdiff_ray.config.schema import Resources
from pdiff_ray.common.progress import silent
distributed.prepare(Resources(workers=1, actors=1))
from pdiff_ray.distributed import session
with session.connect(Resources(workers=1, actors=1), silent):
    print(session.ray.get_runtime_context().gcs_address)
"""


def test_without_an_address_ray_is_a_local_one(cluster):
    address = cluster[0].address
    ended = subprocess.run([sys.executable, "-c", LOCAL], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() not in ("", address)


def pdiff(arguments, driver, **environment):
    """Runs the command line as a driver of the cluster."""
    code = "from pdiff_ray.cli.main import main; main()"
    environment = {**os.environ, **JOINED, "PDIFF_CACHE": str(driver / "cache"), **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=driver, env=environment, capture_output=True, text=True, timeout=500)


def test_no_process_and_no_log_has_the_storage_s_password(cluster, bucket, tmp_path):
    started, driver = cluster
    planted, seen = "planted0password", set()
    over = threading.Event()

    def look():
        while not over.wait(0.1):
            for process in psutil.process_iter():
                if planted in cmdline(process):
                    seen.add(cmdline(process))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        places = {
            "PDIFF_STORAGE": bucket.replace("secret@", f"{planted}@"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        }
        done = pdiff(["sweep", TINY, "--address", started.address], driver, **places)
    finally:
        over.set()
        thread.join()
    assert done.returncode == 0, done.stdout + done.stderr
    assert planted not in done.stdout + done.stderr
    assert seen == set()
    logs = [path for path in Path(started.temporary).rglob("*") if path.is_file()]
    assert len(logs) > 20
    assert [path for path in (*logs, tmp_path / "mlflow.db") if planted.encode() in path.read_bytes()] == []


def test_the_doctor_looks_at_every_node(cluster, bucket, tmp_path):
    (started, driver), mlflow_uri = cluster, {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    address = started.address
    found = pdiff(["doctor", "--address", address, "--storage", bucket], driver, **mlflow_uri)
    lines = [line for line in found.stdout.splitlines() if " node " in line]
    assert found.returncode == 0, found.stdout + found.stderr
    assert len(lines) == 3
    assert all(line.startswith("ok ") and "GiB of memory free" in line for line in lines)
    assert "ok      token: is asked for" in found.stdout

    other = tmp_path / "other"
    shutil.copytree(ROOT / "pdiff_ray", other / "pdiff_ray")
    (other / "pdiff_ray/sweep.py").write_text("# another version")
    started.add(PYTHONPATH=str(other))  # and stays: no later test can work on all nodes
    storage = driver / "storage"
    found = pdiff(["doctor", "--address", address, "--storage", storage], driver, **mlflow_uri)
    lines = [line for line in found.stdout.splitlines() if " node " in line]
    assert found.returncode == 1
    assert len(lines) == 4
    assert sum("where the driver has" in line for line in lines) == 1
    assert sum("set storage to what every node reaches" in line for line in lines) == 3  # the head sees it
    refused = pdiff(["sweep", TINY, "--address", address, "--storage", bucket], driver, **mlflow_uri)
    assert refused.returncode == 1
    assert re.fullmatch(
        r"error: node [\d.]+: pdiff_ray \S+ of sources \w+ where the driver has .*\n", refused.stderr
    ), refused.stderr


def test_no_answer_is_no_refusal(monkeypatch):
    monkeypatch.setattr(nodes, "REFUSED_S", 4.0)
    with socket.socket() as taken:  # bound, so that nobody else takes it; it does not listen
        taken.bind(("127.0.0.1", 0))
        assert nodes.open_to_all(f"127.0.0.1:{taken.getsockname()[1]}") is None


NOTICE = """
import time
import ray
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from pdiff_ray.distributed import session

class Worker:
    def __init__(self):
        self.leaving = session.leaving()
    def told(self):
        return self.leaving()

ray.init(address=ADDRESS, log_to_driver=False)
gcs = ray._raylet.GcsClient(address=ADDRESS)
ids = {info.node_name: node.hex() for node, info in gcs.get_all_node_info().items()}
place = lambda name: {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(ids[name], soft=False)}
one, two = (ray.remote(Worker).options(**place(name)).remote() for name in ("node-1", "node-2"))
time.sleep(session.WATCH_S)
assert ray.get([one.told.remote(), two.told.remote()]) == [False, False]
reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
gcs.drain_node(ids["node-1"], reason, "", int(1000 * time.time()) + 60000)
until = time.monotonic() + 30
while not ray.get(one.told.remote()) and time.monotonic() < until:
    time.sleep(0.1)
print(ray.get([one.told.remote(), two.told.remote()]))
"""


def test_workers_of_a_node_that_is_drained_are_told(cluster):
    started, _ = cluster
    code = NOTICE.replace("ADDRESS", repr(started.address))
    environment = {**os.environ, **started.environment}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.stdout.strip() == "[True, False]", ended.stdout + ended.stderr
