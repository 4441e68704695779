"""One thread, as tests share the machine, signals, a cache of their own, and a Ray on the loopback interface."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import pixels, write_parquet
from safetensors.torch import save_file

from pdiff_ray import distributed
from pdiff_ray.common.devices import limit_threads
from pdiff_ray.config.schema import Data, Network, Resources
from pdiff_ray.data.sources import DATASETS
from pdiff_ray.networks.build import build_network
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.files import Storage

limit_threads(1)
# Signals as a terminal leaves them, also for child processes: under nohup or with & they are ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
distributed.prepare(Resources())  # before any test imports Ray


def pytest_collection_modifyitems(items):
    """The tests of a file run in one process, which makes its fixtures once, and so do all files that share the Ray."""
    with_ray = {item.path for item in items if "ray" in item.fixturenames}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if item.path in with_ray else item.path.stem))
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.timeout(0))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    os.environ["PDIFF_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def ray():
    """One local Ray for all tests that want one; without GPUs, as results are compared with this process's."""
    import ray

    # Workers find the networks in `helpers`.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ray.init(address="local", include_dashboard=False, num_cpus=4, num_gpus=0)
    yield ray
    ray.shutdown()


@pytest.fixture
def artifact(tmp_path):
    """An artifact that does not exist yet."""
    return Artifact(Storage(str(tmp_path / "storage")), "zoo", {"members": 5}, {"base": "0123456789abcdef"})


@pytest.fixture
def parquet(tmp_path):
    """Configuration, training pixels (40, in two files) and test pixels (10) of a custom set of 3 classes."""
    train, test = pixels(40), pixels(10, seed=1)
    labels = np.arange(40) % 3
    write_parquet(tmp_path / "root/train-0.parquet", train[:25], labels[:25])
    write_parquet(tmp_path / "root/train-1.parquet", train[25:], labels[25:])
    write_parquet(tmp_path / "root/test.parquet", test, np.arange(10) % 3)
    config = Data(name="custom", source="parquet", root=str(tmp_path / "root"), loader_workers=0)
    return config, train, test


@pytest.fixture
def files(tmp_path):
    """Writes checkpoints below a folder, by name; content that is no bytes is given to torch.save or safetensors."""
    folder = tmp_path / "files"

    def write(contents):
        for name, content in contents.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                file.write_bytes(content)
            elif name.endswith(".json"):
                file.write_text(json.dumps(content))
            else:
                (save_file if name.endswith(".safetensors") else torch.save)(content, file)
        return folder

    return write


@pytest.fixture(scope="module")
def resnet18():
    return build_network(Network(name="resnet18", source="torchvision"), DATASETS["cifar10"], 0)


@pytest.fixture(scope="session")
def empty(tmp_path_factory):
    """MLflow's database before any run."""
    from pdiff_ray.tracking.database import prepare_database

    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    prepare_database(file)
    return file
