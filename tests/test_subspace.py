"""The members' subspace against a plain SVD, vectors that stay in their files, encoders with processes."""

import tracemalloc
from pathlib import Path

import pytest
import torch
from helpers import build, tiny

from pdiff_ray.common.errors import ConfigError, StorageError
from pdiff_ray.config import loading
from pdiff_ray.config.schema import Generator, Sampling
from pdiff_ray.generators.baselines import GaussianSettings
from pdiff_ray.generators.encoders import ENCODERS
from pdiff_ray.generators.interface import Fitting
from pdiff_ray.generators.latent import LatentSettings
from pdiff_ray.generators.processes import PROCESSES
from pdiff_ray.generators.subspace import Subspace
from pdiff_ray.generators.table import make_generator
from pdiff_ray.networks.subset import Entry, Subset
from pdiff_ray.storage import matrix, parameters
from pdiff_ray.storage.matrix import HeldVectors, StoredVectors
from pdiff_ray.storage.parameters import ParameterStore, Record
from pdiff_ray.storage.trees import load_tree, save_tree

CPU = torch.device("cpu")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def subset_of(dimension):
    return Subset((Entry("a", (dimension,), 0, "parameter"),))


def stored(artifact, vectors, part=4):
    """A store of vectors (K, D), in several parts."""
    store = ParameterStore(artifact)
    for start in range(0, len(vectors), part):
        rows = [
            Record(start + i, "original", vector=row.numpy()) for i, row in enumerate(vectors[start : start + part])
        ]
        store.append(rows, subset_of(vectors.shape[1]))
    return store


@pytest.fixture
def narrow(monkeypatch):
    """Blocks and chunks of a few values, so that small vectors have many."""
    for module in (parameters, matrix):
        monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(matrix, "CHUNK_BYTES", 4 * 10 * 32)
    monkeypatch.setattr(matrix, "ROWS_BYTES", 4 * 100 * 3)


def members(count=10, dimension=100):
    """Members around a far mean, whose values differ in scale."""
    return (
        50
        + draw(count, 4) @ draw(4, dimension, seed=1) * torch.logspace(-2, 1, dimension)
        + 0.01 * draw(count, dimension, seed=2)
    )


# --- vectors in files -------------------------------------------------------------------------------------------------


def kept_elsewhere(store, monkeypatch):
    """As if the storage was no folder: vectors are found nowhere."""
    monkeypatch.setattr(ParameterStore, "position", lambda self, id_: None)
    return store


@pytest.mark.parametrize("elsewhere", [False, True])
def test_columns_and_rows_are_the_vectors(artifact, narrow, monkeypatch, elsewhere):
    vectors = members()
    store = stored(artifact, vectors)
    if elsewhere:
        kept_elsewhere(store, monkeypatch)
    ids = [3, 9, 0, 5]
    view = StoredVectors(store, ids)
    assert view.shape == (4, 100)
    assert torch.equal(view.rows([2, 0]), vectors[[0, 3]])
    for start, stop in ((0, 100), (0, 1), (15, 17), (16, 48), (99, 100)):
        assert torch.equal(view.columns(start, stop), vectors[ids, start:stop])
    chunks = list(view.chunks())
    assert len(chunks) > 1
    assert torch.equal(torch.cat([values for _, values in chunks], 1), vectors[ids])
    assert [columns.start for columns, _ in chunks[1:]] == [columns.stop for columns, _ in chunks[:-1]]


def test_a_file_that_changes_while_it_is_in_use_is_noticed(artifact, narrow):
    store = stored(artifact, members())
    view = StoredVectors(store)
    view.columns(0, 16)
    position = store.position(0)
    with Path(artifact.storage.path(position.name)).open("r+b") as file:
        file.seek(position.offset + 4 * 40)
        file.write(b"\0\0\0\0")
    assert view.columns(0, 16).shape == (10, 16)  # blocks beside it are whole
    with pytest.raises(StorageError, match="damaged Parquet file"):
        view.columns(32, 48)


def test_fitting_holds_some_columns_alone(artifact, monkeypatch):
    monkeypatch.setattr(matrix, "CHUNK_BYTES", 2**20)
    view = StoredVectors(stored(artifact, draw(40, 100_000), part=1))  # 16 MB
    generator = make_generator(latent("subspace", "gaussian"), subset_of(100_000))
    tracemalloc.start()  # NumPy tells it what it holds
    generator.fit(view, Fitting(CPU, 0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
    assert len(save_tree(generator.state())) < 1e5


# --- the subspace -----------------------------------------------------------------------------------------------------


def test_components_are_those_of_a_plain_svd(artifact, narrow):
    vectors = members(12)
    found, share = Subspace.fit(StoredVectors(stored(artifact, vectors)))
    exact = vectors.double() - vectors.double().mean(0)
    _, singular, components = torch.linalg.svd(exact, full_matrices=False)
    assert share == pytest.approx(1)
    assert len(found.variances) == 11  # K - 1
    torch.testing.assert_close(found.variances, singular[:11].square() / 11, rtol=1e-9, atol=0)
    expected = exact @ components[:11].T
    signs = (found.coordinates_of_members() * expected).sum(0).sign()
    torch.testing.assert_close(found.coordinates_of_members() * signs, expected, rtol=1e-6, atol=1e-6)
    other = vectors[:3] + draw(3, 100, seed=5)
    torch.testing.assert_close(
        found.coordinates(HeldVectors(other)) * signs, (other.double() - vectors.double().mean(0)) @ components[:11].T
    )
    torch.testing.assert_close(
        found.points(found.coordinates(HeldVectors(vectors)).float()).all(), vectors, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("settings", "kept"), [({"rank": 3}, 3), ({"share": 0.5}, 2), ({"share": 0.9999}, 4), ({}, 9)])
def test_rank_by_number_and_by_share_of_the_variance(settings, kept):
    vectors = members(10)
    found, share = Subspace.fit(HeldVectors(vectors), **settings)
    variances = torch.linalg.svdvals(vectors.double() - vectors.double().mean(0)).square()
    assert len(found.variances) == kept
    assert share == pytest.approx(float(variances[:kept].sum() / variances.sum()))


def test_members_that_repeat_add_no_components():
    found, share = Subspace.fit(HeldVectors(draw(5, 30).repeat(3, 1)))
    assert (len(found.variances), share) == (4, pytest.approx(1))


# --- encoder and process ----------------------------------------------------------------------------------------------

BRIEF = {
    "autoencoder": {"channels": (4, 8), "latent_dim": 4, "steps": 20},
    "diffusion": {"width": 16, "depth": 1, "num_timesteps": 20, "steps": 20},
    "flow": {"width": 16, "depth": 1, "steps": 20},
}


def latent(encoder, process, **more):
    parts = {
        "encoder": {"name": encoder, **BRIEF.get(encoder, {})},
        "process": {"name": process, **BRIEF.get(process, {})},
    }
    return Generator.model_validate({"name": "latent", "seed": 0, **parts, **more})


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("process", PROCESSES)
def test_every_encoder_with_every_process(artifact, narrow, encoder, process):
    vectors = members()
    view = StoredVectors(stored(artifact, vectors))
    settings = latent(encoder, process)
    generator, fitting = make_generator(settings, subset_of(100)), Fitting(CPU, 0)
    generator.fit(view, fitting)
    sampling = Sampling(samples=7, seed=1)
    drawn = generator.sample(7, sampling, CPU)
    assert drawn.shape == (7, 100)
    assert drawn.isfinite().all()
    chunks = list(generator.draw(7, sampling, CPU))
    assert [len(chunk) for chunk in chunks] == [3, 3, 1]
    assert torch.equal(torch.cat(chunks), drawn)
    again = make_generator(settings, subset_of(100))
    again.load_state(load_tree(save_tree(generator.state())), view)
    assert torch.equal(again.sample(7, sampling, CPU), drawn)
    latents = again.encode(vectors)
    torch.testing.assert_close(again.encode(view), latents)
    assert latents.shape == (10, again.num_latents)
    if not settings.lossy:
        torch.testing.assert_close(again.decode(latents), vectors, rtol=1e-4, atol=1e-4)
    in_memory = make_generator(settings, subset_of(100))
    in_memory.fit(vectors, Fitting(CPU, 0))
    torch.testing.assert_close(in_memory.sample(7, sampling, CPU), drawn)


def test_the_gaussian_process_has_the_moments_of_the_members():
    vectors = members(30, 20)
    generator = make_generator(latent("subspace", "gaussian"), subset_of(20))
    generator.fit(vectors, Fitting(CPU, 0))
    drawn = generator.sample(20_000, Sampling(seed=0), CPU)
    std = vectors.std(0)
    assert ((drawn.mean(0) - vectors.mean(0)) / std).abs().max() < 0.05
    torch.testing.assert_close(torch.cov(drawn.T), torch.cov(vectors.T), rtol=0.1, atol=0.05 * float(std.max()) ** 2)


@pytest.mark.parametrize("standardize", ["dimension", "together", "none"])
def test_latents_are_standardized_as_asked_for(standardize):
    generator = make_generator(latent("subspace", "gaussian", standardize=standardize), subset_of(100))
    vectors = members()
    generator.fit(vectors, Fitting(CPU, 0))
    stds = generator.encode(vectors).std(0, correction=0)
    spread = float(stds.max() / stds.min())
    assert (spread == pytest.approx(1, rel=1e-3)) == (standardize == "dimension")
    if standardize == "together":
        assert float(stds.square().mean()) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    ("process", "sampler", "message"),
    [
        ("flow", "ddpm", "sampling.sampler is 'ddpm', which is none of process flow; take one of midpoint, euler, rk4"),
        ("diffusion", "rk4", "which is none of process diffusion; take one of ddpm, ddim, dpmsolver"),
        ("gaussian", "ddpm", "which is none of process gaussian; leave it out"),
    ],
)
def test_a_sampler_of_another_process_is_refused(process, sampler, message):
    text = ["generator.name=latent", f"generator.process.name={process}", f"sampling.sampler={sampler}"]
    with pytest.raises(ConfigError, match=message):
        loading.load(Path(__file__).parent / "tiny.yaml", text)
    generator = make_generator(latent("subspace", process), subset_of(100))
    generator.fit(members(), Fitting(CPU, 0))
    with pytest.raises(ConfigError, match=message):
        generator.sample(2, Sampling(sampler=sampler), CPU)


def test_the_papers_generator_takes_no_flow_sampler():
    with pytest.raises(ConfigError, match=r"sampling\.sampler is 'euler', which is none of process diffusion"):
        loading.load(Path(__file__).parent / "tiny.yaml", ["sampling.sampler=euler"])


@pytest.mark.parametrize(
    ("changes", "sampler"),
    [
        ([], "ddpm"),
        (["generator.name=gaussian"], "ddpm"),
        (["generator.name=latent", "generator.process.name=flow"], "midpoint"),
        (["generator.name=latent", "generator.process.name=gaussian"], None),
    ],
)
def test_each_process_has_a_sampler_of_its_own(changes, sampler):
    experiment = loading.load(Path(__file__).parent / "tiny.yaml", changes)
    assert experiment.sampling.sampler == sampler


def test_fields_of_another_encoder_are_dropped_where_a_later_layer_chooses_one(tmp_path):
    first = tmp_path / "first.yaml"
    first.write_text(
        "name: x\ngenerator: {name: latent, encoder: {name: autoencoder, stride: 4}, process: {name: flow, width: 8}}"
    )
    changed = loading.load(first, ["generator.encoder.name=subspace", "generator.process.depth=1"]).generator
    assert changed.encoder.keyed() == {"name": "subspace", "rank": None, "variance": 1.0}
    assert (changed.process.width, changed.process.depth) == (8, 1)
    with pytest.raises(ConfigError, match=r"generator\.encoder\.stride: unknown key"):
        loading.load(first, ["generator.encoder={name: subspace, stride: 4}"])
    with pytest.raises(ConfigError, match=r"no process 'floww'.*did you mean 'flow'"):
        loading.load(first, ["generator.process.name=floww"])


def test_generators_of_earlier_versions_open():
    """The parts' states stood beside each other, and Gaussians kept the members."""
    vectors = members()
    settings = Generator.model_validate(
        {"seed": 0, "autoencoder": BRIEF["autoencoder"], "diffusion": BRIEF["diffusion"]}
    )
    generator = make_generator(settings, subset_of(100))
    generator.fit(vectors, Fitting(CPU, 0))
    state = generator.state()
    earlier = {**state["encoder"], **state["process"], "latents": state["latents"]}
    assert set(earlier) == {"autoencoder", "normalizer", "diffusion", "latents"}
    for kept, chosen in ((earlier, settings), ({"mean": vectors.mean(0), "factor": vectors}, GaussianSettings())):
        again, new = (make_generator(chosen, subset_of(100)) for _ in range(2))
        again.load_state(load_tree(save_tree(kept)), vectors)
        new.fit(vectors, Fitting(CPU, 0))
        torch.testing.assert_close(again.sample(3, Sampling(seed=0), CPU), new.sample(3, Sampling(seed=0), CPU))


def test_messages_name_the_fields_of_the_section():
    with pytest.raises(ConfigError, match=r"raise generator\.encoder\.stride"):
        latent("autoencoder", "flow").check_dimension(10**9)
    LatentSettings().check_dimension(10**9)
    with pytest.raises(ValueError, match=r"generator\.process\.num_timesteps is 20"):
        latent("subspace", "diffusion").check_sampling(Sampling(steps=21))


def test_a_whole_experiment_in_the_subspace(tmp_path):
    changes = ["generator.name=latent", "generator.process={name: flow, width: 16, steps: 20}"]
    experiment, artifacts = tiny(tmp_path, *changes)
    build(experiment, artifacts)
    drawn = torch.from_numpy(ParameterStore(artifacts["samples"]).vectors())
    learned = torch.from_numpy(ParameterStore(artifacts["zoo"]).vectors(experiment.split.learned))
    moved, basis = drawn - learned.mean(0), torch.linalg.qr((learned - learned.mean(0)).T).Q
    torch.testing.assert_close(moved @ basis @ basis.T, moved, rtol=1e-3, atol=1e-4)  # combinations of the members
    assert artifacts["generator"].manifest().info["unexplained_variance"] < 1e-6
    groups = {record.group for record in ParameterStore(artifacts["evaluation"]).records()}
    assert "generated" in groups
    assert not {"decoded", "autoencoder"} & groups  # what comes back whole is the members
