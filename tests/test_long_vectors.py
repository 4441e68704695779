"""Vectors that no step holds all of: what is said of them is what is said of held ones."""

import json

import numpy as np
import pytest
import torch
from helpers import build, tiny
from test_subspace import draw, members, narrow, stored  # noqa: F401  # a fixture

from pdiff_ray.config.schema import Generator, Sampling
from pdiff_ray.evaluation import diagnostics, geometry, similarity
from pdiff_ray.evaluation.diagnostics import diagnose
from pdiff_ray.evaluation.geometry import Geometry
from pdiff_ray.evaluation.similarity import distances
from pdiff_ray.generators.interface import Fitting
from pdiff_ray.generators.table import make_generator
from pdiff_ray.networks.subset import Entry, Subset
from pdiff_ray.stages import evaluation
from pdiff_ray.stages.stored import Networks
from pdiff_ray.storage import matrix
from pdiff_ray.storage.matrix import HeldVectors, StoredVectors
from pdiff_ray.storage.parameters import ParameterStore

CPU = torch.device("cpu")
# What lets no more than three rows of the tiny experiment, of 16 values, be in memory.
SHORT = {(matrix, "HELD_BYTES"): 0, (matrix, "ROWS_BYTES"): 3 * 64, (evaluation, "TASK_BYTES"): 3 * 64}


@pytest.fixture
def in_files(monkeypatch):
    """No vectors are held, whatever their length."""
    for (module, name), value in SHORT.items():
        monkeypatch.setattr(module, name, value)


def test_what_is_said_of_stored_vectors_is_what_is_said_of_held_ones(artifact, narrow, monkeypatch):  # noqa: F811
    for module in (geometry, similarity, diagnostics):
        monkeypatch.setattr(module, "CHUNK_VALUES", 10 * 40)
    held = members()
    files, others = StoredVectors(stored(artifact, held)), members(6)
    ours, plain = Geometry(files), Geometry(held)
    torch.testing.assert_close(ours.gram, plain.gram)
    for mine, theirs in zip(vars(ours.place(others)).values(), vars(plain.place(others)).values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-4)
    assert torch.equal(ours.place(files).distances, ours.place(held).distances)
    np.testing.assert_allclose(distances(files, others.numpy()), distances(held.numpy(), others.numpy()), rtol=1e-12)
    assert diagnose(files, np.zeros(10)).values == pytest.approx(diagnose(held.numpy(), np.zeros(10)).values)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "gaussian"},
        {"name": "gaussian_pca", "rank": 2},
        {"name": "gaussian_diagonal"},
        {"name": "average", "count": 2},
        {"name": "interpolation"},
        {"name": "noise", "sigma": 0.5},
    ],
    ids=lambda settings: settings["name"],
)
def test_draws_by_columns_are_of_the_same_distribution(artifact, monkeypatch, settings):
    monkeypatch.setattr(matrix, "HELD_BYTES", 0)
    vectors = members(12, 90)
    subset = Subset((Entry("a", (30,), 0, "parameter"), Entry("b", (60,), 30, "parameter")))
    generator = make_generator(Generator.model_validate(settings), subset)
    generator.fit(StoredVectors(stored(artifact, vectors)), Fitting(CPU, 0))
    sampling = Sampling(samples=2000, seed=3)
    drawn, plain = generator.drawn(2000, sampling, CPU), generator.sample(2000, sampling, CPU)
    assert not drawn.in_memory
    found = drawn.all()
    torch.testing.assert_close(drawn.columns(7, 61), found[:, 7:61])  # however they are read
    if settings["name"] in ("gaussian_diagonal", "noise"):  # by other random numbers
        torch.testing.assert_close(found.mean(0), plain.mean(0), rtol=0.01, atol=0.2)
        torch.testing.assert_close((found - vectors.mean(0)).std(0), (plain - vectors.mean(0)).std(0), rtol=0.1, atol=0)
        apart = [torch.cdist(one.double(), vectors.double()).amin(1).mean() for one in (found, plain)]
        assert float(apart[0] / apart[1]) == pytest.approx(1, abs=0.02)
    else:
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-4)


def test_no_step_holds_all_vectors(tmp_path, in_files, monkeypatch):
    """From zoo to export, of an experiment with a decoder that loses something: every kind and group is made."""
    most = {"read": 0, "written": 0, "held": 0}

    def watched(kind, method, count):
        def call(self, *args, **kwargs):
            most[kind] = max(most[kind], count(self, *args))
            return method(self, *args, **kwargs)

        return call

    read, written, held = ParameterStore.vectors, ParameterStore.append, HeldVectors.__init__
    monkeypatch.setattr(ParameterStore, "vectors", watched("read", read, lambda self, ids=None: len(ids or self.ids)))
    rows = lambda self, records, *_: sum(record.vector is not None for record in records)  # noqa: E731
    monkeypatch.setattr(ParameterStore, "append", watched("written", written, rows))
    monkeypatch.setattr(HeldVectors, "__init__", watched("held", held, lambda self, vectors: len(vectors)))
    short = "generator={name: latent, encoder: {name: subspace, rank: 3}, process: {name: gaussian}}"
    changes = [short, "zoo.members=20", "zoo.held_out=0.5", "sampling.samples=12"]
    experiment, artifacts = tiny(tmp_path / "files", *changes)
    build(experiment, artifacts)
    list(Networks(artifacts["samples"]).export(tmp_path / "exported"))
    assert max(most.values()) <= 3, most
    summary = json.loads(artifacts["evaluation"].read(evaluation.SUMMARY_FILE))
    assert {"decoded", "autoencoder", "gaussian", "noise 0.5"} <= set(summary["novelty"]["families"])
    monkeypatch.undo()
    plain, ours = tiny(tmp_path / "held", *changes)[1], artifacts
    build(experiment, plain)
    numbers = [_numbers(ParameterStore(found["evaluation"])) for found in (plain, ours)]
    np.testing.assert_allclose(*numbers, rtol=1e-4)
    held_summary = json.loads(plain["evaluation"].read(evaluation.SUMMARY_FILE))
    assert summary["verdict"]["word"] == held_summary["verdict"]["word"]
    assert summary["zoo"] == held_summary["zoo"]


def _numbers(store):
    """Accuracies, losses and distances of the networks whose vectors have the same random numbers, or none."""
    return [
        (record.test_accuracy, record.validation_loss, record.nearest_distance)
        for record in store.records()
        if record.group != "original"
    ]
