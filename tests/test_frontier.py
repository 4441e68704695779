"""Kept frontiers against those computed for each batch: their values, the training that reads them, and their files."""

import os
import random

import numpy as np
import pytest
import torch
from helpers import build, context, interrupted_zoo, tiny
from test_partition import CONVNET, CONVNEXT, LAST_NORMS, RESNET, SMALL_VIT, Twice, names
from torch import nn

from pdiff_ray.config.schema import Data, Experiment
from pdiff_ray.data.cache import Cached
from pdiff_ray.data.dataset import Dataset, Split
from pdiff_ray.data.kept import build_once
from pdiff_ray.data.sources import DataInfo
from pdiff_ray.evaluation.judge import Judge
from pdiff_ray.networks import frontier as frontiers
from pdiff_ray.networks.build import build_network
from pdiff_ray.networks.frontier import Kept, keep
from pdiff_ray.networks.partition import PartitionedNetwork
from pdiff_ray.networks.subset import resolve
from pdiff_ray.stages import zoo
from pdiff_ray.storage.parameters import ParameterStore
from pdiff_ray.training import subset as subset_training

CPU = torch.device("cpu")
IMAGES = 48


def noise(size, **changes):
    """A data set of noise, with 3 channels and 10 classes."""
    images = np.random.default_rng(size).integers(256, size=(IMAGES, 3, size, size), dtype=np.uint8)
    source = Cached(images, np.arange(IMAGES) % 10, f"noise-{size}")
    split = Split(source, np.arange(IMAGES))
    info = DataInfo(3, size, 10, (0.5,) * 3, (0.25,) * 3)
    return Dataset(info, Data(**changes), split, split, split, split)


def judge_of(network, rule, dataset, cache, policy="frozen"):
    if not isinstance(network, nn.Module):
        network = build_network(network, dataset.info, 0)
    return Judge(network.eval(), resolve(rule, network, policy), dataset, CPU, policy, cache=cache)


def experiment_of(dataset, **changes):
    optimizer = {"name": "sgd", "lr": 0.01}
    return Experiment(name="noise", data=dataset.config, zoo={"batch_size": 16, "optimizer": optimizer, **changes})


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "size", "rule"),
    [
        (CONVNET, 8, LAST_NORMS),
        (CONVNEXT, 32, LAST_NORMS),  # whose frontier holds a constant
        (SMALL_VIT, 8, names("blocks.1.attn.qkv.*")),
    ],
    ids=["convnet", "convnext", "vit"],
)
def test_what_is_kept_is_the_prefix_s(tmp_path, network, size, rule):
    dataset = noise(size)
    judge = judge_of(network, rule, dataset, tmp_path)
    kept = judge.frontier("train").frontier
    images = dataset.prepare(dataset.train.source.images, CPU)
    expected = judge.partitioned.prefix(images)
    some = torch.randperm(IMAGES)[:7]
    for chosen in (slice(3, 9), some):
        found, labels = kept.batch(chosen)
        assert labels.tolist() == (torch.arange(IMAGES) % 10)[chosen].tolist()
        for ours, plain in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, plain[chosen])
            if ours.ndim == 4:
                assert ours.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        own = judge.capacity.own
        torch.testing.assert_close(
            judge.partitioned.suffix(kept.batch(some)[0], own), judge.partitioned(images[some], own)
        )


def test_it_is_computed_once(tmp_path, monkeypatch):
    kept = judge_of(CONVNET, LAST_NORMS, noise(8), tmp_path).frontier("train").frontier
    again = judge_of(CONVNET, LAST_NORMS, noise(8), tmp_path)
    calls, prefix = [], PartitionedNetwork.prefix
    monkeypatch.setattr(
        PartitionedNetwork, "prefix", lambda self, images: calls.append(len(images)) or prefix(self, images)
    )
    (ours,), _ = again.frontier("train").frontier.batch(slice(None))
    assert torch.equal(ours, kept.batch(slice(None))[0][0])
    assert max(calls) < IMAGES  # examples alone


def test_other_weights_and_images_are_kept_apart(tmp_path):
    network, size = build_network(CONVNET, noise(8).info, 0), 8
    for change in (lambda: None, lambda: network.layers[0].conv.weight.data.mul_(2)):
        change()
        judge_of(network, LAST_NORMS, noise(size), tmp_path).frontier("train")
    judge_of(network, LAST_NORMS, noise(10), tmp_path).frontier("train")
    assert len([f for f in tmp_path.glob("frontier-*") if f.is_dir()]) == 3
    network.fc.weight.data.mul_(2)  # is no part of the prefix
    judge_of(network, LAST_NORMS, noise(size), tmp_path).frontier("train")
    assert len([f for f in tmp_path.glob("frontier-*") if f.is_dir()]) == 3


# --- training ---------------------------------------------------------------------------------------------------------


def trained(experiment, judge, dataset, frontier, steps):
    """Gradients of the last step, and the vector after it."""
    network = build_network(experiment.network, dataset.info, 0)
    network.load_state_dict(judge.network.state_dict())
    training = subset_training.SubsetTraining(experiment, network, judge.subset, steps, CPU, frontier)
    training.run(dataset, 0, steps, seeds=[0])
    return [tensor.grad for tensor in training.tensors.values()], training.vectors()[0]


@pytest.mark.parametrize(
    ("network", "size", "precision"),
    [
        (RESNET, 8, "float32"),
        (CONVNEXT, 32, "float32"),
        (CONVNET, 8, "float32"),
        (CONVNET, 8, "bfloat16"),
        (SMALL_VIT, 8, "float32"),
        (SMALL_VIT, 8, "bfloat16"),
    ],
)
def test_steps_are_those_of_full_passes(tmp_path, network, size, precision):
    dataset = noise(size)
    parameters = [name for name, _ in build_network(network, dataset.info).named_parameters()]
    chosen = random.Random(precision).sample(parameters[len(parameters) // 2 :], 4)
    experiment = experiment_of(dataset, precision=precision).model_copy(update={"network": network})
    judge = judge_of(network, names(*chosen), dataset, tmp_path)
    kept = subset_training.training_frontier(experiment, judge.subset, judge, 100)
    assert kept.frontier is not None, kept.reason
    # Some processors' kernels round to bfloat16 elsewhere in the whole network than in its parts.
    rounding = 1e-5 if precision == "float32" else 2**-7
    for steps in (1, 5):
        ours, vector = trained(experiment, judge, dataset, kept.frontier, steps)
        plain, expected = trained(experiment, judge, dataset, None, steps)
        for a, b in zip(ours, plain, strict=True):
            assert (a - b).abs().max() <= rounding * b.abs().max()
        torch.testing.assert_close(vector, expected, rtol=rounding, atol=rounding / 10)


class WithDropout(nn.Module):
    """Dropout in the suffix, which frozen networks train and are judged without."""

    def __init__(self, always=False):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.always, self.dropout, self.head = always, nn.Dropout(0.5), nn.Linear(8, 10)

    def forward(self, images):
        hidden = self.norm(self.first(images)).mean((2, 3))
        hidden = nn.functional.dropout(hidden) if self.always else self.dropout(hidden)
        return self.head(hidden)


@pytest.mark.parametrize(
    ("network", "rule"),
    [(WithDropout(), names("norm.*", "head.*")), (Twice(), names("second.weight"))],
    ids=["dropout", "twice"],
)
def test_peculiar_networks_train_alike(tmp_path, monkeypatch, network, rule):
    dataset = noise(4)
    experiment, judge = experiment_of(dataset), judge_of(network, rule, dataset, tmp_path)
    monkeypatch.setitem(globals(), "build_network", lambda *args: type(network)())
    kept = subset_training.training_frontier(experiment, judge.subset, judge, 100).frontier
    (ours, vector), (plain, expected) = (trained(experiment, judge, dataset, f, 3) for f in (kept, None))
    assert kept is not None
    assert all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(ours, plain, strict=True))
    torch.testing.assert_close(vector, expected)


@pytest.mark.parametrize(
    ("network", "rule", "changes", "reason"),
    [
        (CONVNET, names("layers.0.conv.weight"), {}, "no layer is shared"),
        (CONVNET, names("*"), {}, "no layer is shared"),
        (CONVNET, LAST_NORMS, {"batchnorm": "recalibrated"}, "statistics of their batches"),
        (CONVNET, LAST_NORMS, {"batchnorm": "included"}, "statistics of their batches"),
        (WithDropout(always=True), names("head.*"), {}, "two forward passes"),
        (CONVNET, LAST_NORMS, {"augment": "flip"}, "augment"),
        (CONVNET, LAST_NORMS, {"train_noise": 0.1}, "train_noise"),
        (CONVNET, LAST_NORMS, {"steps": 2}, "32 images are read, fewer than the 48"),
    ],
)
def test_full_steps_for_a_reason(tmp_path, network, rule, changes, reason):
    policy, steps = changes.pop("batchnorm", "frozen"), changes.pop("steps", 100)
    dataset = noise(8, **changes)
    judge = judge_of(network, rule, dataset, tmp_path, policy)
    training = experiment_of(dataset, batchnorm=policy)
    assert reason in subset_training.training_frontier(training, judge.subset, judge, steps).reason


def test_a_zoo_on_a_kept_frontier_resumes(tmp_path, monkeypatch):
    """In one go, interrupted, and with full passes: the same members."""

    vectors = {}
    for way in ("whole", "interrupted", "plain"):
        experiment, artifacts = tiny(tmp_path / way, "data.train_noise=0", "zoo.steps_per_member=6")
        build(experiment, artifacts, "base")
        if way == "interrupted":
            interrupted_zoo(experiment, artifacts, 8)
        if way == "plain":
            monkeypatch.setattr(zoo, "training_frontier", lambda *args: Kept(reason="a test"))
        build(experiment, artifacts, "zoo")
        vectors[way] = ParameterStore(artifacts["zoo"]).vectors()
        info = artifacts["zoo"].manifest().info
        assert info["runs_whole"] is None
        assert 0.2 < info["shared"] < 1
        assert info["full_steps"] == ("a test" if way == "plain" else None)
        assert info["steps_saving"] is None if way == "plain" else info["steps_saving"] > 1
    np.testing.assert_array_equal(vectors["interrupted"], vectors["whole"])
    np.testing.assert_allclose(vectors["plain"], vectors["whole"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("network", "size", "precision", "optimizer"),
    [
        (RESNET, 8, "float32", "adamw"),
        (CONVNEXT, 32, "float32", "sgd"),
        (SMALL_VIT, 8, "float32", "adam"),
        (SMALL_VIT, 8, "bfloat16", "sgd"),
    ],
)
def test_networks_trained_as_one_program_are_those_trained_alone(tmp_path, network, size, precision, optimizer):
    dataset = noise(size)
    settings = {"name": optimizer, "lr": 0.01, "schedule": "cosine"}
    experiment = experiment_of(dataset, precision=precision, optimizer=settings)
    judge = judge_of(network, LAST_NORMS, dataset, tmp_path)
    kept = subset_training.training_frontier(experiment, judge.subset, judge, 100).frontier
    starts = judge.subset.flatten(judge.network.state_dict()) * torch.tensor([[1.0], [0.9], [1.1]])

    def training(count):
        return subset_training.SubsetTraining(experiment, judge.network, judge.subset, 6, CPU, kept, count)

    together, halfway = training(3), training(3)
    together.load(starts)
    together.run(dataset, 0, 3, seeds=[5, 6, 7])
    halfway.restore(together.states(1))
    halfway.run(dataset, 3, 6, seeds=[5, 6, 7])
    for index, start in enumerate(starts):
        alone = training(1)
        alone.load(start[None])
        alone.run(dataset, 0, 6, seeds=[5 + index])
        moved = (alone.vectors()[0] - start).abs().max()
        assert (halfway.vectors()[index] - alone.vectors()[0]).abs().max() <= 1e-3 * moved


@pytest.mark.parametrize(
    ("network", "precision", "stacks"),
    [
        (CONVNET, "float32", True),
        (SMALL_VIT, "bfloat16", True),
        (CONVNET, "bfloat16", False),  # CPUs have no such BatchNorm
    ],
)
def test_what_cannot_be_stacked_is_trained_alone(tmp_path, network, precision, stacks):
    judge = judge_of(network, LAST_NORMS, noise(8), tmp_path).at(precision)
    assert judge.capacity.trained_together(16, most=3) == (3 if stacks else 1)
    assert judge.capacity.trained_together(16) == 1  # on a CPU


def test_a_layout_is_kept(tmp_path):
    """With one channel the weights' layout decides on that of all that follows."""
    experiment, artifacts = tiny(tmp_path, "zoo.subset=all")
    build(experiment, artifacts, "base")
    network = zoo.load_network(experiment, artifacts)
    training = subset_training.SubsetTraining(
        experiment, network, zoo.zoo_subset(experiment, artifacts), 1, CPU, "a test"
    )
    assert training.tensors
    for name, tensor in training.tensors.items():
        assert tensor[0].stride() == network.get_parameter(name).stride(), name


@pytest.mark.parametrize(("stack", "then"), [(3, 3), (3, 2), (1, 3)])
def test_branches_as_one_program_go_on_in_other_stacks(tmp_path, stack, then):
    """Those of an interrupted zoo, in stacks of the same and of another size: the members of branches made alone."""
    options = ("data.train_noise=0", "zoo.steps_per_member=6", "zoo.branches=3", "evaluation.networks_per_task=2")
    alone, its = tiny(tmp_path / "alone", *options)
    build(alone, its, "base", "zoo")
    experiment, artifacts = tiny(tmp_path / "stacked", *options, f"zoo.runs_per_program={stack}")
    build(experiment, artifacts, "base")

    interrupted_zoo(experiment, artifacts, 2 * stack)
    saved = [artifacts["zoo"].load_work(f"run-{index}.safetensors") for index in range(3)]
    assert sum(state is not None for state in saved) == stack
    notes = []
    experiment, artifacts = tiny(tmp_path / "stacked", *options, f"zoo.runs_per_program={then}")
    zoo.build(experiment, artifacts, context(progress=lambda task, done, total, note="": notes.append(note)))
    first = [note for note in notes if note.startswith("run 0")]
    assert [note.partition("step ")[2] for note in first] == ["23", "29"]  # of 11, 17, 23 and 29
    expected = ParameterStore(its["zoo"]).vectors()
    np.testing.assert_allclose(ParameterStore(artifacts["zoo"]).vectors(), expected, rtol=1e-3, atol=1e-4)


# --- files ------------------------------------------------------------------------------------------------------------


def test_too_large_a_frontier_is_not_kept(tmp_path):
    kept = judge_of(CONVNET, LAST_NORMS, noise(8, max_cache_gib=1e-5), tmp_path).frontier("train")
    assert "max_cache_gib" in kept.reason
    assert not list(tmp_path.iterdir())


def test_the_longest_unused_makes_room(tmp_path):
    dataset = noise(8, max_cache_gib=5e-4)  # two of 200 KB each
    folders = []
    for seed in range(3):
        judge = judge_of(build_network(CONVNET, dataset.info, seed), LAST_NORMS, dataset, tmp_path)
        assert judge.frontier("train").frontier is not None
        (new,) = {f for f in tmp_path.glob("frontier-*") if f.is_dir()} - set(folders)
        folders.append(new)
        if seed == 1:  # the second was used before the first
            os.utime(new, (1, 1))
    assert [folder.exists() for folder in folders] == [True, False, True]


def test_a_prefix_that_is_as_fast_as_a_disk_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(frontiers, "SMALL_BYTES", 1000)
    assert "no longer than reading" in judge_of(CONVNET, LAST_NORMS, noise(8), tmp_path).frontier("train").reason


def test_a_full_disk_is_a_reason(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    judge = judge_of(CONVNET, LAST_NORMS, noise(8), tmp_path)
    assert "No space left" in judge.frontier("train").reason
    assert judge.judge(judge.subset.flatten(judge.network.state_dict())[None])[0].test_accuracy is not None
    assert not [f for f in tmp_path.iterdir() if f.is_dir()]


def test_damaged_frontiers_are_computed_anew(tmp_path):
    expected = judge_of(CONVNET, LAST_NORMS, noise(8), tmp_path).frontier("train").frontier.rows[0].clone()
    random = np.random.default_rng(0)
    for name in ("0", "labels.npy", "seconds.npy", "checksums.txt"):
        (file,) = tmp_path.glob(f"frontier-*/{name}")
        content = bytearray(file.read_bytes())
        content[random.integers(len(content))] ^= 1 << random.integers(8)
        file.write_bytes(content)
        kept = judge_of(CONVNET, LAST_NORMS, noise(8), tmp_path).frontier("train")
        assert torch.equal(kept.frontier.rows[0], expected)


def test_few_reads_use_what_is_there(tmp_path):
    judge_of(CONVNET, LAST_NORMS, noise(8), tmp_path).frontier("train")
    judge = judge_of(CONVNET, LAST_NORMS, noise(8), tmp_path)
    kept = keep(judge.partitioned, judge.dataset, judge.dataset.train, CPU, tmp_path, 16, reads=1)
    assert kept.frontier is not None


def test_what_a_killed_worker_left_is_removed(tmp_path):
    left = tmp_path / "folder.1234.tmp"
    left.mkdir()
    build_once(tmp_path / "folder", lambda temporary: (temporary / "file").touch())
    assert (tmp_path / "folder" / "file").exists()
    assert not left.exists()


def test_room_is_not_made_of_what_others_write(tmp_path):
    for name in ("frontier-a", f"frontier-b.{'0' * 32}.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0").write_bytes(bytes(2**20))
    assert frontiers._make_room(tmp_path, 2**20, 1 / 1024)
    assert [folder.name for folder in tmp_path.iterdir()] == [f"frontier-b.{'0' * 32}.tmp"]
