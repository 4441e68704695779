"""`pdiff doctor`: finds out whether everything that an experiment needs is there, and if not, how to get it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from pdiff_ray.common.errors import PdiffError
from pdiff_ray.common.secrets import without_secrets
from pdiff_ray.config.schema import Experiment
from pdiff_ray.storage.files import Storage

PACKAGES = ("ray", "torch", "torchvision", "timm", "mlflow", "optuna", "pyarrow", "scikit-learn")


@dataclass(frozen=True)
class Finding:
    """The result of examining one thing.

    Attributes:
        what: the name of what was examined.
        ok: whether the experiment can use it.
        text: what was found, or what is wrong and the remedy.
    """

    what: str
    ok: bool
    text: str


def examine(experiment: Experiment) -> Iterator[Finding]:
    """Yields a finding as soon as it is there, as some take seconds."""
    yield Finding("python", True, f"{platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores")
    for package in PACKAGES:
        try:
            yield Finding(package, True, metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Finding(package, False, "not installed; run `uv sync`")
    for examined in (_devices, _storage, _cache, _data, _ray, _mlflow):
        what = examined.__name__.removeprefix("_")
        try:
            yield Finding(what, True, examined(experiment))
        except (PdiffError, ImportError, OSError) as error:
            yield Finding(what, False, str(error))
    yield from _cluster(experiment)


def _devices(experiment: Experiment) -> str:
    import torchvision  # noqa: F401  (fails here if it does not fit torch)

    from pdiff_ray.common.devices import describe_devices

    return describe_devices() or "no GPU; everything runs on the CPU"


def _storage(experiment: Experiment) -> str:
    storage = Storage(experiment.storage_uri)
    storage.check_writable()
    free = f", {shutil.disk_usage(storage.local).free / 2**30:.0f} GiB free" if storage.local else ""
    return f"{storage.place}: writable{free}"


def _cache(experiment: Experiment) -> str:
    from pdiff_ray.data.kept import default_cache

    cache = default_cache()
    cache.mkdir(parents=True, exist_ok=True)
    return f"{cache}: {shutil.disk_usage(cache).free / 2**30:.0f} GiB free"


def _data(experiment: Experiment) -> str:
    from pdiff_ray.data import sources

    sources.check_data(experiment.data)
    images = sources.inventory(experiment.data).images
    return f"{experiment.data.name}: {', '.join(f'{split} {count:,}' for split, count in images.items())} images"


def _ray(experiment: Experiment) -> str:
    from pdiff_ray import distributed

    distributed.prepare(experiment.resources)
    from pdiff_ray.distributed import session

    with session.connect(experiment.resources, lambda *_: None, equal=False):
        resources = session.cluster_resources()
    where = distributed.ray_address(experiment.resources) or "a local Ray starts"
    return f"{where}: {resources.get('CPU', 0):g} cores, {resources.get('GPU', 0):g} GPUs"


def _mlflow(experiment: Experiment) -> str:
    from pdiff_ray import tracking

    uri = tracking.tracking_uri(experiment, Storage(experiment.storage_uri))
    return f"{without_secrets(uri)}: {tracking.reachable(uri, tracking.experiment_name(experiment))}"


# By whether a cluster lets in who has no token.
_TOKEN = {
    True: Finding(
        "token", False, "lets in who has no token; start Ray with RAY_AUTH_MODE=token on all nodes (cluster/README.md)"
    ),
    False: Finding("token", True, "is asked for"),
    None: Finding(
        "token", False, "without one there was no answer, not even a refusal; look at the cluster's load and try again"
    ),
}


def _cluster(experiment: Experiment) -> Iterator[Finding]:
    """Yields what the nodes of a cluster say of themselves, and whether it asks for a token."""
    from pdiff_ray import distributed

    address = distributed.ray_address(experiment.resources)
    if not address:
        return
    from pdiff_ray.distributed import nodes, session

    try:
        with session.connect(experiment.resources, lambda *_: None, equal=False):
            for node in nodes.examine(experiment.data, Storage(experiment.storage_uri)):
                text = "; ".join([*node.problems, node.text] if node.text else node.problems)
                yield Finding(f"node {node.address}", not node.problems, text)
    except PdiffError as error:
        yield Finding("nodes", False, str(error))
        return
    yield _TOKEN[nodes.open_to_all(address)]
