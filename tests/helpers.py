"""What several test files use."""

import io
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pdiff_ray.config import loading
from pdiff_ray.config import schema as config
from pdiff_ray.data.kept import default_cache
from pdiff_ray.data.sources import DATASETS
from pdiff_ray.networks.build import build_network
from pdiff_ray.stages import zoo
from pdiff_ray.stages.context import Context
from pdiff_ray.stages.table import STAGES, artifacts_of, build_missing
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.parameters import ParameterStore

EVALUATED = [stage for stage in STAGES if stage not in ("alignment", "report")]  # the tiny experiment's
TINY = Path(__file__).parent / "tiny.yaml"


def marked(marker, *values):
    """Returns values of a test's parameter that only `pytest -m MARKER` tries."""
    return [pytest.param(value, marks=getattr(pytest.mark, marker)) for value in values]


def tiny(storage, *overrides):
    """The tiny experiment with its results in a folder, and its artifacts."""
    experiment = loading.load(TINY, [f"storage={storage}", *overrides])
    return experiment, artifacts_of(experiment, Storage(str(storage)))


def context(**changes):
    return Context(torch.device("cpu"), default_cache(), **changes)


def build(experiment, artifacts, *stages):
    for stage in stages or [stage for stage in artifacts if stage != "report"]:
        build_missing(stage, experiment, artifacts, context())


def with_vectors(store, ids=None):
    """Rows of a store with their vectors."""
    return [replace(r, vector=v) for r, v in zip(store.records(ids), store.vectors(ids), strict=True)]


def interrupted_zoo(experiment, artifacts, members):
    """Builds a zoo as if Ctrl-C came once it has told of so many members; gives the store of those kept."""

    def stop(task, done, total, note=""):
        if task == "zoo" and done >= members:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zoo.build(experiment, artifacts, context(progress=stop))
    kept = ParameterStore(artifacts["zoo"])
    assert 0 < len(kept.ids) < experiment.zoo.size
    return kept


def deadly_network(num_classes, in_channels, deadly=False, **_):
    """The tiny network; if it is deadly, building it in a trial of Ray Tune kills the process."""
    if deadly and "ImplicitFunc" in Path("/proc/self/cmdline").read_text():
        os._exit(1)
    return build_network(config.Network(args={"widths": [4, 8]}), DATASETS["digits"], 0)


def pixels(count, size=8, channels=3, seed=0):
    shape = (count, size, size, channels) if channels == 3 else (count, size, size)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, format="PNG", **options):
    """A PIL image or an array as the bytes of a file."""
    stream = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(stream, format, **options)
    return stream.getvalue()


def write_parquet(path, images, labels, image="img", label="label", type=None, names=None):
    """Images, as bytes of files or arrays, and their labels; `names` are those of the classes in the metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    column = pa.array([{"bytes": i if isinstance(i, bytes) else encoded(i), "path": None} for i in images])
    table = pa.table({image: column, label: pa.array(labels, type)})
    if names:
        features = {label: {"names": names, "_type": "ClassLabel"}, image: {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=10)


def images_of(split, batch_size=7):
    batches = list(split.in_order(batch_size))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def with_(config, **changes):
    return config.model_copy(update=changes)


def until(condition, timeout=60):
    """Waits for a condition, which must come to hold."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
