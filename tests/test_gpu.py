"""The fast ways on each device there is: the CPU, and a GPU where the machine has one."""

import json

import numpy as np
import pytest
import torch
from helpers import EVALUATED, build_missing, tiny
from test_frontier import IMAGES, experiment_of, judge_of, noise
from test_partition import CONVNET, CONVNEXT, LAST_NORMS, RESNET, SMALL_VIT
from torch.func import functional_call

from pdiff_ray.common import devices
from pdiff_ray.data.kept import default_cache
from pdiff_ray.evaluation.judge import Judge
from pdiff_ray.evaluation.similarity import unpack_wrong
from pdiff_ray.stages.context import Context
from pdiff_ray.training import subset as subset_training

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=no_gpu)])
def device(request):
    devices.exact_float32()
    return torch.device(request.param)


def on(device, network, size, cache, **settings):
    """A judge of a network on noise, and three vectors of it."""
    there = judge_of(network, LAST_NORMS, noise(size), cache)
    vector = there.subset.flatten(there.network.state_dict())
    vectors = vector + 0.1 * torch.randn(3, len(vector), generator=torch.Generator().manual_seed(0))
    return Judge(there.network, there.subset, there.dataset, device, cache=cache, **settings), vectors


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("network", "size"), [(RESNET, 8), (CONVNEXT, 32), (SMALL_VIT, 8), (CONVNET, 8)])
def test_predictions_are_those_of_full_passes(tmp_path, device, network, size, keep):
    together = None if device.type == "cuda" else 2
    judge, vectors = on(device, network, size, tmp_path if keep else None, networks_per_program=together)
    judgements = judge.judge(vectors, ["test"])
    assert judge.partitioned.reason is None
    assert judge.capacity.networks > 1
    assert (judge.frontier("test").frontier is not None) == keep
    images, labels = next(judge.dataset.test.in_order(len(judge.dataset.test)))
    prepared = judge.dataset.prepare(images, device)
    for vector, judgement in zip(vectors, judgements, strict=True):
        with torch.no_grad():
            logits = functional_call(judge.network, judge.subset.unflatten(vector.to(device)), (prepared,))
        loss = torch.nn.functional.cross_entropy(logits, labels.to(device))
        assert judgement.test_loss == pytest.approx(loss.item(), rel=1e-4)
        wrong = (logits.argmax(1).cpu() != labels).numpy()
        np.testing.assert_array_equal(unpack_wrong([judgement.wrong], len(labels))[0], wrong)


@pytest.mark.parametrize(("network", "size"), [(RESNET, 8), (CONVNEXT, 32), (SMALL_VIT, 8)])
def test_half_the_precision_is_split_as_well(tmp_path, device, network, size):
    judge, vectors = on(device, network, size, tmp_path, precision="bfloat16")
    assert judge.judge(vectors, ["test"])[0].test_loss > 0
    assert judge.partitioned.reason is None


@pytest.mark.parametrize(("network", "size"), [(RESNET, 8), (SMALL_VIT, 8)])
def test_branches_are_those_trained_alone(tmp_path, device, network, size):
    judge, vectors = on(device, network, size, tmp_path)
    experiment = experiment_of(judge.dataset)
    kept = subset_training.training_frontier(experiment, judge.subset, judge, 100).frontier
    assert judge.capacity.trained_together(16, most=3) == 3

    def trained(starts, seeds):
        training = subset_training.SubsetTraining(experiment, judge.network, judge.subset, 4, device, kept, len(starts))
        training.load(starts.to(device))
        training.run(judge.dataset, 0, 4, seeds)
        return training.vectors().cpu()

    together = trained(vectors, [5, 6, 7])
    for index, start in enumerate(vectors):
        (alone,) = trained(start[None], [5 + index])
        moved = (alone - start).abs().max()
        assert moved > 0
        assert (together[index] - alone).abs().max() <= 1e-3 * moved


def test_an_experiment(tmp_path, device):
    experiment, artifacts = tiny(tmp_path, "data.train_noise=0", "zoo.regime=branches", "zoo.branches=3")
    for stage in EVALUATED:
        build_missing(stage, experiment, artifacts, Context(device, default_cache()))
    info = artifacts["zoo"].manifest().info
    assert info["full_steps"] is None
    assert info["runs_whole"] is None
    groups = json.loads(artifacts["evaluation"].read("summary.json"))["groups"]
    assert {group["group"] for group in groups} >= {"original", "ensemble", "generated"}


def test_images_are_there_when_they_are_on_the_cpu(device):
    dataset = noise(64)
    images, _ = next(dataset.test.in_order(IMAGES))
    expected = dataset.prepare(images, torch.device("cpu"))
    for _ in range(20):
        assert torch.equal(dataset.prepare(images.to(device), torch.device("cpu")), expected)
