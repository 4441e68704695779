"""Judging many networks at once against one by one, and recalibrated statistics."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from pdiff_ray.common.errors import PdiffError
from pdiff_ray.config.schema import Data, Network, SubsetRule
from pdiff_ray.data import dataset as data
from pdiff_ray.evaluation import recalibration
from pdiff_ray.evaluation.judge import Judge, Judgement, judged
from pdiff_ray.evaluation.similarity import unpack_wrong
from pdiff_ray.networks.build import build_network
from pdiff_ray.networks.subset import Subset, resolve
from pdiff_ray.storage.parameters import Record
from pdiff_ray.storage.trees import load_tree

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return data.load(Data(selection_images=200), tmp_path_factory.mktemp("digits"))


@pytest.fixture
def network(dataset):
    network = build_network(Network(name="convnet", args={"widths": [4, 8]}), dataset.info, 0)
    with torch.no_grad():  # statistics as of a trained network, and a dropout that eval mode must switch off
        for images, _ in dataset.train.in_order(300):
            network(dataset.prepare(images, CPU))
    network.layers[0].pool = nn.Sequential(nn.Dropout(0.5), network.layers[0].pool)
    return network


def make_vectors(network, subset, count=5):
    vector = subset.flatten(network.state_dict())
    return vector + 0.3 * torch.randn((count, subset.size), generator=torch.Generator().manual_seed(0)) * vector.std()


@torch.no_grad()
def judge_one(network, dataset, split):
    """Accuracy, loss and misses of one network, image by image."""
    network.eval()
    loss, wrong = 0.0, []
    for images, labels in getattr(dataset, split).in_order(1):
        logits = network(dataset.prepare(images, CPU))
        loss += functional.cross_entropy(logits, labels).item()
        wrong.append(logits.argmax().item() != labels.item())
    return 1 - sum(wrong) / len(wrong), loss / len(wrong), wrong


@pytest.mark.parametrize(
    ("rule", "policy"),
    [({"last_norm_layers": 1}, "frozen"), ({"all": True}, "included"), ({"names": ["fc.*"]}, "frozen")],
)
def test_judge_agrees_with_a_loop_over_networks(dataset, network, rule, policy):
    subset = resolve(SubsetRule(**rule), network, policy)
    vectors = make_vectors(network, subset, 3)
    before = copy.deepcopy(network.state_dict())
    judgements = Judge(network.train(), subset, dataset, CPU, policy, batch_size=64).judge(vectors)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    for vector, judgement in zip(vectors, judgements, strict=True):
        one = copy.deepcopy(network)
        one.load_state_dict(subset.unflatten(vector), strict=False)
        for split, column in (("selection", "train"), ("validation", "validation"), ("test", "test")):
            accuracy, loss, wrong = judge_one(one, dataset, split)
            assert getattr(judgement, f"{column}_accuracy") == pytest.approx(accuracy)
            assert getattr(judgement, f"{column}_loss") == pytest.approx(loss, rel=1e-4)
        assert unpack_wrong([judgement.wrong], len(dataset.test))[0].tolist() == wrong
    assert len({judgement.test_loss for judgement in judgements}) == 3


def test_only_the_wanted_splits_are_judged(dataset, network):
    (judgement,) = Judge(network, Subset(()), dataset, CPU).judge(torch.empty(1, 0), ["validation"])
    assert judgement.validation_accuracy is not None
    assert judgement == Judgement(
        validation_accuracy=judgement.validation_accuracy, validation_loss=judgement.validation_loss
    )


@torch.no_grad()
def recalibrated(network, dataset):
    """The network with statistics of the first training images, batch by batch, layer by layer."""
    network = copy.deepcopy(network).eval()
    for bn in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        sums, batches = [], np.array_split(np.arange(len(dataset.train)), -(-len(dataset.train) // recalibration.BATCH))

        def batch_statistics(module, inputs, output, sums=sums):
            pixels = inputs[0].transpose(0, 1).flatten(1).double()
            mean, var = pixels.mean(1), pixels.var(1)
            sums.append((mean, var))
            shape = (1, -1, 1, 1)
            normalized = (inputs[0] - mean.view(shape)) / (pixels.var(1, correction=0).view(shape) + module.eps).sqrt()
            return (normalized * module.weight.view(shape) + module.bias.view(shape)).float()

        # All layers normalize by the batch while statistics are taken.
        others = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d) and m is not bn]
        hooks = [bn.register_forward_hook(batch_statistics)]
        hooks += [m.register_forward_hook(lambda *args: batch_statistics(*args, sums=[])) for m in others]
        for images, _ in dataset.train.batches(batches):
            network(dataset.prepare(images, CPU))
        for hook in hooks:
            hook.remove()
        bn.new = [torch.stack(values).mean(0).float() for values in zip(*sums, strict=True)]
    for bn in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.running_mean, bn.running_var = bn.new
    return network


def test_recalibrated_statistics_are_those_of_a_plain_loop(dataset, network):
    subset = resolve(SubsetRule(names=["layers.*.conv.weight"]), network)
    vectors = make_vectors(network, subset, 2)
    before = copy.deepcopy(network.state_dict())
    judgements = Judge(network.train(), subset, dataset, CPU, "recalibrated").judge(vectors)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [layer.bn.momentum for layer in network.layers] == [0.1, 0.1]
    plain = Judge(network, subset, dataset, CPU).judge(vectors)
    for vector, judgement, unchanged in zip(vectors, judgements, plain, strict=True):
        one = copy.deepcopy(network)
        one.load_state_dict(subset.unflatten(vector), strict=False)
        accuracy, loss, _ = judge_one(recalibrated(one, dataset), dataset, "test")
        assert judgement.test_accuracy == pytest.approx(accuracy, abs=2 / 897)
        assert judgement.test_loss == pytest.approx(loss, rel=1e-4)
        assert judgement.test_loss != pytest.approx(unchanged.test_loss, rel=1e-2)


def test_batch_size_changes_no_result(dataset, network):
    subset = resolve(SubsetRule(last_norm_layers=1), network)
    for policy in ("frozen", "recalibrated"):
        one, other = (
            Judge(network, subset, dataset, CPU, policy, batch_size).judge(make_vectors(network, subset, 1))[0]
            for batch_size in (101, 500)
        )
        assert one.wrong == other.wrong
        assert one.test_loss == pytest.approx(other.test_loss, rel=1e-6)


@pytest.mark.parametrize("name", ["convnet", "vit_tiny_patch16_224"])
def test_stacked_networks_are_judged_alike(dataset, name):
    args = {"widths": [4, 8]} if name == "convnet" else {"patch_size": 4, "depth": 2}
    network = build_network(Network(name=name, args=args), dataset.info, 0)
    subset = resolve(SubsetRule(last_norm_layers=2), network)
    vectors = make_vectors(network, subset, 20)
    alone = Judge(network, subset, dataset, CPU, networks_per_program=1).judge(vectors)
    for count in (2, 16):
        stacked = Judge(network, subset, dataset, CPU, networks_per_program=count)
        in_order, reverse = stacked.judge(vectors), stacked.judge(vectors.flip(0))[::-1]
        assert stacked.capacity.networks == count
        for one, *others in zip(alone, in_order, reverse, strict=True):
            for other in others:
                assert (one.wrong, one.wrong_classes) == (other.wrong, other.wrong_classes)
                assert one.test_loss == pytest.approx(other.test_loss, rel=1e-5)


def test_what_is_wrong_is_kept_with_the_class_it_was_taken_for(dataset, network):
    subset = resolve(SubsetRule(last_norm_layers=1), network)
    vectors = make_vectors(network, subset, 3)
    judge = Judge(network, subset, dataset, CPU)
    for judgement, classes in zip(judge.judge(vectors), judge.predictions(vectors), strict=True):
        wrong = unpack_wrong([judgement.wrong], len(dataset.test))[0]
        assert judgement.wrong_classes == classes[torch.from_numpy(wrong)].numpy().astype(np.uint8).tobytes()
    assert judge.judge(vectors, ["validation"])[0].wrong_classes is None


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, images):
        logits = self.head(images.flatten(1))
        return logits if logits.mean() > 0 else logits + 1


def test_less_is_taken_at_a_time_where_memory_ends(monkeypatch, dataset, network):
    """Fewer images, then fewer networks, then single images; what one image of one network exceeds is an error."""
    subset = resolve(SubsetRule(last_norm_layers=1), network)
    vectors = make_vectors(network, subset, 4)
    expected = Judge(network, subset, dataset, CPU).judge(vectors)
    judge = Judge(network, subset, dataset, CPU, batch_size=100, networks_per_program=4)
    assert (judge.capacity.networks, judge.capacity.images) == (4, 100)
    suffix, room, tried = judge.partitioned.suffix, 30, []

    def with_little_memory(frontier, tensors):
        tried.append((judge.capacity.networks, len(frontier[0])))
        if judge.capacity.networks * len(frontier[0]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return suffix(frontier, tensors)

    monkeypatch.setattr(judge.partitioned, "suffix", with_little_memory)
    for a, b in zip(judge.judge(vectors), expected, strict=True):
        assert a.wrong == b.wrong
        assert a.test_loss == pytest.approx(b.test_loss)
    assert (judge.capacity.networks, judge.capacity.images) == (1, 25)
    stages = [(stacked, images) for stacked, images in dict.fromkeys(tried) if images in (100, 50, 25)]
    assert stages == [(4, 100), (4, 50), (2, 50), (1, 50), (1, 25)]
    again = Judge(network, subset, dataset, CPU, batch_size=100, networks_per_program=4)
    assert again.capacity.networks == 4
    monkeypatch.setattr(again.partitioned, "suffix", with_little_memory)
    assert torch.equal(again.predictions(vectors), Judge(network, subset, dataset, CPU).predictions(vectors))
    room = 0
    with pytest.raises(PdiffError, match=r"judging: CUDA out of memory; lower evaluation\.networks_per_task"):
        judge.judge(vectors)


def test_less_is_taken_where_memory_ends_while_a_frontier_is_made(monkeypatch, dataset, network, tmp_path):
    judge = Judge(
        network, resolve(SubsetRule(last_norm_layers=1), network), dataset, CPU, cache=tmp_path, batch_size=100
    )
    prefix = judge.partitioned.prefix

    def with_little_memory(images):
        if len(images) > 50:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return prefix(images)

    monkeypatch.setattr(judge.partitioned, "prefix", with_little_memory)
    assert len(judge.frontier("test").frontier) == len(dataset.test)
    assert judge.capacity.images == 50


def test_what_cannot_be_stacked_is_judged_in_a_loop(dataset):
    network = Branching()
    judge = Judge(network, resolve(SubsetRule(all=True), network), dataset, CPU, networks_per_program=4)
    assert judge.judge(make_vectors(network, judge.subset, 2), ["test"])[1].test_accuracy is not None
    assert judge.partitioned.reason
    assert judge.capacity.networks == 1


class Counting(nn.Module):
    """Its operations are others for few images."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, images):
        logits = self.fc(images.flatten(1))
        return logits if len(images) < 3 else logits.exp().log()


def test_a_network_that_branches_has_chunks(dataset):
    network = Counting()
    judge = Judge(network, resolve(SubsetRule(all=True), network), dataset, CPU)
    assert judge.partitioned.reason
    assert judge.capacity.images == 500
    assert judge.judge(make_vectors(network, judge.subset, 1), ["test"])[0].test_accuracy is not None


def test_kept_frontiers_change_no_result(dataset, network, tmp_path):
    subset = resolve(SubsetRule(last_norm_layers=1), network)
    vectors = make_vectors(network, subset, 3)
    computed, kept, again = (Judge(network, subset, dataset, CPU, cache=c) for c in (None, tmp_path, tmp_path))
    expected = computed.judge(vectors)
    for judge in (kept, again):
        assert judge.frontier("test").frontier is not None
        for a, b in zip(judge.judge(vectors), expected, strict=True):
            assert a.wrong == b.wrong
            assert a.test_loss == pytest.approx(b.test_loss, rel=1e-6)
    assert computed.frontier("test").reason == "no cache is given"
    _, seconds = kept.timed(vectors)
    assert seconds.unshared > seconds.suffix > 0


def test_chunks_are_as_large_as_caches(dataset, network, monkeypatch):
    """The largest tensor of an image: 4 channels of 8 x 8 float32."""
    judge = Judge(network, Subset(()), dataset, CPU)
    assert judge.capacity.images == 500
    monkeypatch.setattr("pdiff_ray.evaluation.memory.CPU_TENSOR_BYTES", 4 * 8 * 8 * 4 * 100)
    assert Judge(network, Subset(()), dataset, CPU).capacity.images == 100
    monkeypatch.setattr("pdiff_ray.evaluation.memory.CPU_TENSOR_BYTES", 1)
    assert Judge(network, Subset(()), dataset, CPU).capacity.images == 32


def test_half_the_precision_changes_few_predictions(dataset, network):
    subset = resolve(SubsetRule(last_norm_layers=1), network)
    vectors = make_vectors(network, subset, 2)
    full = Judge(network, subset, dataset, CPU)
    half = full.at("bfloat16")
    assert full.at("float32") is full
    assert full.at("bfloat16") is half
    predicted, rounded = full.predictions(vectors), half.predictions(vectors)
    assert predicted.shape == (2, len(dataset.test))
    assert (predicted != rounded).float().mean() < 0.05
    for row, judgement in zip(predicted, full.judge(vectors), strict=True):
        assert (row == dataset.test.source.labels).float().mean() == pytest.approx(judgement.test_accuracy)
    assert half.partitioned.reason is None
    assert half.judge(vectors)[0].test_loss != full.judge(vectors)[0].test_loss


def test_judged_record_keeps_what_it_has():
    record = Record(3, "original", parent=1, validation_loss=0.5)
    found = judged(record, Judgement(test_accuracy=0.25, wrong=b"x"))
    assert found == Record(3, "original", parent=1, validation_loss=0.5, test_accuracy=0.25, wrong=b"x")
    assert found.judged
    assert not record.judged


def test_networks_without_batchnorm_are_not_measured(dataset, network, monkeypatch):
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    subset = resolve(SubsetRule(all=True), plain)
    monkeypatch.setattr(recalibration, "call_with", None)  # no pass is made
    (judgement,) = Judge(plain, subset, dataset, CPU, "recalibrated").judge(make_vectors(plain, subset, 1))
    assert load_tree(judgement.statistics, "it") == {}
