"""Samples of another tool, brought in as checkpoints and as vectors, and judged in place of drawn ones."""

import io
import math
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import build, tiny
from test_import import prefixed

from pdiff_ray.common.errors import ConfigError, PdiffError
from pdiff_ray.networks.subset import Subset
from pdiff_ray.stages.base import load_network
from pdiff_ray.stages.checkpoints import Options, import_samples
from pdiff_ray.storage.parameters import ParameterStore, Record, encode
from pdiff_ray.storage.vectors import read_vectors


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A storage with the tiny experiment's base and zoo."""
    folder = tmp_path_factory.mktemp("zoo")
    build(*tiny(folder), "base", "zoo")
    return folder


@pytest.fixture
def sampled(zoo, tmp_path):
    """The tiny experiment with imported samples and its artifacts in a storage of its own; eight samples (8, D)."""
    shutil.copytree(zoo, tmp_path / "s")
    experiment, artifacts = tiny(tmp_path / "s", "generator.name=imported", "generator.label=theirs")
    members = ParameterStore(artifacts["zoo"]).vectors()
    return experiment, artifacts, torch.from_numpy(members[:8] + np.float32(0.25))


def as_states(experiment, artifacts, vectors):
    """State dicts of the base with vectors in place of its subset."""
    network, subset = load_network(experiment, artifacts), ParameterStore(artifacts["zoo"]).subset()
    whole = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    return [{**whole, **subset.unflatten(vector)} for vector in vectors]


def as_parquet(artifacts, vectors, subset=None):
    subset = subset or ParameterStore(artifacts["zoo"]).subset()
    return encode([Record(i, "generated", vector=vector.numpy()) for i, vector in enumerate(vectors)], subset, {})


SOURCES = {
    "npy": lambda e, a, v: {"v.npy": npy(v.double().numpy())},
    "npy by columns": lambda e, a, v: {"v.npy": npy(np.asfortranarray(v.numpy()))},
    "safetensors": lambda e, a, v: {"v.safetensors": {"vectors": v}},
    "torch.save": lambda e, a, v: {"v.pt": v},
    "torch.save of a dict": lambda e, a, v: {"v.pth": {"vectors": v, "epoch": 3}},
    "parquet": lambda e, a, v: {"v.parquet": as_parquet(a, v)},
    "networks": lambda e, a, v: {
        f"g{i}.pth": {"net": prefixed("module.", s)} for i, s in enumerate(as_states(e, a, v))
    },
    "subsets": lambda e, a, v: {
        f"g{i}.safetensors": {n: t for n, t in s.items() if n.startswith("layers.1.bn.") and t.is_floating_point()}
        for i, s in enumerate(as_states(e, a, v))
    },
}


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def source_of(folder, contents):
    """The file, if there is one, else its folder."""
    return folder / next(iter(contents)) if len(contents) == 1 else folder


@pytest.mark.parametrize("contents", SOURCES.values(), ids=SOURCES)
def test_samples_of_others_take_the_place_of_drawn_ones(sampled, files, contents):
    experiment, artifacts, vectors = sampled
    with pytest.raises(ConfigError, match=r"generator\.label: no samples 'theirs' .*--as samples"):
        build(experiment, artifacts, "generator")
    source = source_of(files(made := contents(experiment, artifacts, vectors)), made)
    report = import_samples(source, experiment, artifacts)
    assert "samples: 8, in the order of " in str(report)
    build(experiment, artifacts, "generator", "samples")  # of which the first is there
    store = ParameterStore(artifacts["samples"])
    assert torch.equal(torch.from_numpy(store.vectors()), vectors[: experiment.sampling.samples])
    assert {record.group for record in store.records()} == {"generated"}
    before = artifacts["generator"].manifest()
    import_samples(source, experiment, artifacts)  # changes nothing
    assert artifacts["generator"].manifest() == before
    fewer = source_of(files({"other.npy": npy(vectors.flip(0).numpy())}), {"other.npy": 0})
    with pytest.raises(
        ConfigError, match=r"other samples than .*, which the label 'theirs' stands for; choose another"
    ):
        import_samples(fewer, experiment, artifacts)


def with_value(vectors, value):
    vectors = vectors.clone()
    vectors[3, 5] = value
    return vectors


REFUSED_SAMPLES = {
    "too few": (lambda e, a, v: {"v.pt": v[:2]}, {}, r"holds 2 samples, but sampling\.samples is 6; lower it"),
    "another length": (lambda e, a, v: {"v.pt": v[:, 1:]}, {}, r"shape \(8, 15\); .* 16 values .* so \(n, 16\)"),
    "one vector": (lambda e, a, v: {"v.pt": v[0]}, {}, r"shape \(16,\)"),
    "not finite": (lambda e, a, v: {"v.pt": with_value(v, math.nan)}, {}, r"1 of 8 .* not finite .*first: 3"),
    "beyond float32": (
        lambda e, a, v: {"v.npy": npy(with_value(v.double(), 1e300).numpy())},
        {},
        r"v\.npy: 1 of 8 .* not finite in float32",
    ),
    "whole numbers": (lambda e, a, v: {"v.npy": npy(v.long().numpy())}, {}, "v.npy: holds int64; .*floating-point"),
    "objects": (lambda e, a, v: {"v.npy": npy(np.array([None, 1]))}, {}, "v.npy: cannot be read as an array"),
    "a cut array": (lambda e, a, v: {"v.npy": npy(v.numpy())[:-100]}, {}, "v.npy: cannot be read as an array"),
    "no array": (lambda e, a, v: {"v.npy": b"epoch 1"}, {}, "v.npy: cannot be read as an array"),
    "no table": (lambda e, a, v: {"v.parquet": b"epoch 1" * 9}, {}, r"v\.parquet: no Parquet file of networks"),
    "several tensors": (lambda e, a, v: {"v.pt": {"a": v, "b": v}}, {}, "holds 2 tensors, .*--weights"),
    "no such tensor": (lambda e, a, v: {"v.pt": {"a": v}}, {"weights": "b"}, r"no tensor 'b' \(--weights\); it has a"),
    "a network": (
        lambda e, a, v: {"v.safetensors": as_states(e, a, v)[0]},
        {},
        r"holds 14 tensors, .* the folder",
    ),
    "text": (lambda e, a, v: {"v.csv": b"1.0,2.0\n" * 20}, {}, r"v\.csv: .*neither of torch\.save nor safetensors"),
    "options of folders": (lambda e, a, v: {"v.pt": v}, {"pattern": "*"}, "--pattern is for the checkpoints"),
    "a base": (lambda e, a, v: {"v.pt": v}, {"base": "x"}, "--base is for zoos"),
    "another base": (
        lambda e, a, v: {f"{i}.pt": {**s, "fc.bias": s["fc.bias"] + 1} for i, s in enumerate(as_states(e, a, v))},
        {},
        r"0\.pt: fc\.bias is not in zoo\.subset but differs from the base's",
    ),
    "other statistics": (
        lambda e, a, v: {
            f"{i}.pt": {**s, "layers.0.bn.running_var": torch.ones(4)} for i, s in enumerate(as_states(e, a, v))
        },
        {},
        r"0\.pt: layers\.0\.bn\.running_var is not in zoo\.subset",
    ),
    "half a subset": (
        lambda e, a, v: {f"{i}.pt": {"layers.1.bn.weight": torch.ones(8)} for i in range(8)},
        {},
        r"0\.pt: lacks .* or all of the subset",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("contents", "options", "message"), REFUSED_SAMPLES.values(), ids=REFUSED_SAMPLES)
@pytest.mark.filterwarnings("error")
def test_samples_that_are_refused(sampled, files, contents, options, message):
    experiment, artifacts, vectors = sampled
    source = source_of(files(made := contents(experiment, artifacts, vectors)), made)
    with pytest.raises(PdiffError, match=message) as caught:
        import_samples(source, experiment, artifacts, Options(**options))
    assert options or str(source) in str(caught.value)
    assert not artifacts["generator"].exists()


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".pt"])
def test_a_named_pipe_holds_no_samples(tmp_path, suffix):
    file = tmp_path / f"samples{suffix}"
    os.mkfifo(file)
    with pytest.raises(ConfigError, match=rf"{file}: is no regular file"):
        read_vectors(file, Subset(()))


def test_vectors_of_another_networks_tensors_are_refused(sampled, files):
    experiment, artifacts, vectors = sampled
    weight, bias = ParameterStore(artifacts["zoo"]).subset().entries
    content = as_parquet(artifacts, vectors, Subset((weight, replace(bias, name="layers.0.bn.bias"))))
    with pytest.raises(ConfigError, match=r"holds other tensors \(.*layers\.0\.bn\.bias .*\) than the zoo"):
        import_samples(files({"v.parquet": content}) / "v.parquet", experiment, artifacts)


def test_samples_stand_under_a_label(zoo, files):
    experiment, artifacts = tiny(zoo)
    with pytest.raises(ConfigError, match=r"generator\.name is latent_diffusion; .*generator\.label=my-samples"):
        import_samples(files({"v.pt": torch.ones(8, 16)}) / "v.pt", experiment, artifacts)
    with pytest.raises(ConfigError, match=r"generator\.label: .*required"):
        tiny(zoo, "generator.name=imported")


def test_more_samples_than_were_brought_in(sampled, files):
    experiment, artifacts, vectors = sampled
    import_samples(files({"v.pt": vectors}) / "v.pt", experiment, artifacts)
    more, its = tiny(experiment.storage, "generator.name=imported", "generator.label=theirs", "sampling.samples=9")
    with pytest.raises(ConfigError, match=r"sampling\.samples is 9, but 'theirs' \(generator\.label\) has 8; lower"):
        build(more, its, "samples")
