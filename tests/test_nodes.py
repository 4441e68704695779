"""A sweep on a cluster whose nodes do not see the driver's files: they share object storage and an MLflow server."""

import contextlib
import csv
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import mlflow
import psutil
import pytest
import yaml
from helpers import TINY
from pyarrow.fs import FileSystem

from pdiff_ray.config import sweep as space
from pdiff_ray.sweeps import report as sweep_report
from pdiff_ray.sweeps.ledger import Ledger

ROOT = Path(__file__).parent.parent
UNSHARE = ["unshare", "--mount", "--propagation", "private"]
# Several nodes, not a local Ray of the tests; whoever joins has the token.
JOINED = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
SWEEP = {"parameters": {"zoo.batch_size": [16, 32], "sampling.sampler": ["ddpm", "ddim"]}}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("unshare") is None or subprocess.run([*UNSHARE, "true"], capture_output=True).returncode != 0,
        reason="needs the right to make mount namespaces (root)",
    ),
]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def bucket():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    options = f"scheme=http&region=us-east-1&allow_bucket_creation=true&endpoint_override=127.0.0.1%3A{port}"
    uri = f"s3://user:secret@bucket/pdiff?{options}"
    FileSystem.from_uri(uri)[0].create_dir("bucket")
    yield uri
    server.stop()


@pytest.fixture
def mlflow_server(tmp_path):
    port, folder = free_port(), tmp_path / "mlflow"
    folder.mkdir()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")]
    process = subprocess.Popen([*command, *store], start_new_session=True, stdout=subprocess.DEVNULL)
    for _ in range(120):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            break
        time.sleep(0.5)
    yield f"http://127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ray_start(*arguments, hidden=(), **environment):
    """Starts a node; `hidden` folders are empty for it and all of its workers."""
    ray = [str(Path(sys.executable).parent / "ray"), "start", "--disable-usage-stats", *arguments]
    hide = "".join(f"mount -t tmpfs none {folder} && " for folder in hidden)
    prefix = [*UNSHARE, "bash", "-c", f'{hide}exec "$@"', "node"] if hidden else []
    started = subprocess.run([*prefix, *ray], env={**os.environ, **environment}, capture_output=True, text=True)
    assert started.returncode == 0, started.stdout + started.stderr


@pytest.fixture
def cluster(tmp_path):
    """A head that only plans, and two nodes of one core that do not see the driver's folder."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    driver = tmp_path / "driver"
    driver.mkdir()
    shared = {**JOINED, "PDIFF_TEST_CLUSTER": address, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    # Short, for the sockets in it, and not Ray's own, where the address would stay and mislead every later Ray.
    shared["RAY_TMPDIR"] = tempfile.mkdtemp(dir="/tmp")
    own = ["--node-ip-address=127.0.0.1", "--object-store-memory=200000000"]
    ray_start("--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", *own, **shared)
    try:
        for node in ("one", "two"):
            cache = {"PDIFF_CACHE": str(tmp_path / node), **shared}
            ray_start(f"--address={address}", "--num-cpus=1", *own, hidden=[driver], **cache)
        yield address, driver
    finally:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("PDIFF_TEST_CLUSTER") == address:
                    process.kill()
        shutil.rmtree(shared["RAY_TMPDIR"], ignore_errors=True)


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
    address, _ = cluster
    ended = subprocess.run([sys.executable, "-c", LOCAL], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() not in ("", address)


def pdiff(arguments, driver, **environment):
    """Runs the command line as a driver of the cluster."""
    code = "from pdiff_ray.cli.main import main; main()"
    environment = {**os.environ, **JOINED, "PDIFF_CACHE": str(driver / "cache"), **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=driver, env=environment, capture_output=True, text=True, timeout=500)


def test_the_doctor_looks_at_every_node(cluster, bucket, tmp_path):
    address, driver = cluster
    mlflow_uri = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    found = pdiff(["doctor", "--address", address, "--storage", bucket], driver, **mlflow_uri)
    lines = [line for line in found.stdout.splitlines() if " node " in line]
    assert found.returncode == 0, found.stdout + found.stderr
    assert len(lines) == 3
    assert all(line.startswith("ok ") and "GiB of memory free" in line for line in lines)
    assert "ok      token: is asked for" in found.stdout

    other = tmp_path / "other"
    shutil.copytree(ROOT / "pdiff_ray", other / "pdiff_ray")
    (other / "pdiff_ray/sweep.py").write_text("# another version")
    shared = {**JOINED, "PDIFF_TEST_CLUSTER": address, "PYTHONPATH": str(other), "PDIFF_CACHE": str(tmp_path / "three")}
    ray_start(f"--address={address}", "--num-cpus=1", "--node-ip-address=127.0.0.1", hidden=[driver], **shared)
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


def test_nodes_share_only_storage_and_mlflow(cluster, bucket, mlflow_server, tmp_path):
    address, driver = cluster
    file = driver / "nodes.yaml"
    resources = {"workers": 2, "actors": 2}
    content = {"base": str(TINY), "name": "nodes", "resources": resources, "sweep": SWEEP}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    places = ["--storage", bucket, "--tracking-uri", mlflow_server, "--address", address]
    done = pdiff(["sweep", file, *places], driver)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 trials finished" in done.stdout
    assert "secret" not in done.stdout + done.stderr
    assert sorted(path.name for path in driver.iterdir()) == ["nodes.yaml"], "the driver wrote beside its file"
    assert list((tmp_path / "one").iterdir())
    assert list((tmp_path / "two").iterdir())

    ledger = Ledger(space.load(file, [f"storage={bucket}", "resources.workers=2"]))
    assert [trial.state for trial in ledger.done()] == ["finished"] * 4
    lines = csv.DictReader(io.StringIO(ledger.storage.read(f"{ledger.folder}/{sweep_report.TRIALS_FILE}").decode()))
    assert all(float(line["generated/mean_test_accuracy"]) > 0 for line in lines)

    client = mlflow.MlflowClient(tracking_uri=mlflow_server)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    kinds = [run.data.tags["kind"] for run in runs]
    assert (kinds.count("sweep"), kinds.count("trial"), kinds.count("zoo")) == (1, 4, 2)
    assert {run.info.status for run in runs} == {"FINISHED"}
