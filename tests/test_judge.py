"""Judging many networks at once against one by one, recalibrated statistics, similarities and the summary."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from pdiff_ray.common.errors import PdiffError
from pdiff_ray.config.schema import Data, Network, SubsetRule
from pdiff_ray.data import dataset as data
from pdiff_ray.evaluation import recalibration
from pdiff_ray.evaluation.diagnostics import diagnose
from pdiff_ray.evaluation.geometry import Geometry
from pdiff_ray.evaluation.judge import Judge, Judgement, judged
from pdiff_ray.evaluation.metrics import METRICS, JudgedGroup, named_metrics, same_mistakes, verdict_words
from pdiff_ray.evaluation.novelty import assess
from pdiff_ray.evaluation.similarity import distances, iou, mean_within, unpack_wrong
from pdiff_ray.evaluation.summary import summarize
from pdiff_ray.networks.build import build_network
from pdiff_ray.networks.subset import Subset, resolve
from pdiff_ray.storage.parameters import Record

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
    vectors = make_vectors(network, subset, 5)
    one, stacked = (Judge(network, subset, dataset, CPU, networks_per_program=stacked) for stacked in (1, 2))
    for a, b in zip(one.judge(vectors), stacked.judge(vectors), strict=True):
        assert a.wrong == b.wrong
        assert a.test_loss == pytest.approx(b.test_loss, rel=1e-5)
    assert stacked.capacity.networks == 2


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


# --- similarity -------------------------------------------------------------------------------------------------------


def test_iou_is_that_of_sets():
    random = np.random.default_rng(0)
    first, second = random.random((4, 37)) < 0.3, random.random((5, 37)) < 0.6
    first[0] = False  # gets everything right, as does one of the others
    second[1] = False
    found = iou(first, second)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            a_set, b_set = set(np.flatnonzero(a)), set(np.flatnonzero(b))
            expected = len(a_set & b_set) / len(a_set | b_set) if a_set | b_set else 1
            assert found[i, j] == pytest.approx(expected)
    assert found[0, 1] == 1
    assert found[0, 0] == 0


def test_mean_within_counts_each_pair_once():
    wrong = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1]], dtype=bool)
    assert mean_within(wrong) == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert mean_within(wrong[:1]) is None


def test_packed_bits_come_back():
    wrong = np.random.default_rng(0).random((3, 13)) < 0.5
    packed = [np.packbits(row).tobytes() for row in wrong]
    np.testing.assert_array_equal(unpack_wrong(packed, 13), wrong)
    assert unpack_wrong([], 13).shape == (0, 13)


def test_distances_of_close_vectors():
    base = np.random.default_rng(0).standard_normal((1, 1000)).astype(np.float32) * 100
    vectors = np.concatenate([base, base + 1e-3, base + 1])
    expected = np.linalg.norm(vectors[:, None].astype(np.float64) - vectors[None].astype(np.float64), axis=2)
    np.testing.assert_allclose(distances(vectors, vectors), expected, rtol=1e-6, atol=1e-6)
    assert distances(vectors[:1], vectors).shape == (1, 3)


# --- summary ----------------------------------------------------------------------------------------------------------


def make_record(id_, group, train, test, wrong, **fields):
    packed = np.packbits(np.isin(np.arange(10), wrong)).tobytes()
    losses = {"train_loss": 1 - train, "validation_loss": 0.1, "test_loss": 1 - test}
    judged = {"train_accuracy": train, "validation_accuracy": test, "test_accuracy": test, **losses}
    return Record(id_, group, wrong=packed, **{**judged, **fields})


def summary_of(generated, **novelty):
    originals = [
        make_record(0, "original", 0.9, 0.8, [0, 1], nearest_distance=1.0),
        make_record(1, "original", 0.8, 0.7, [1, 2, 3], nearest_distance=1.0),
        make_record(2, "original", 0.7, 0.7, [0, 4, 5], nearest_distance=1.0),
    ]
    unknown = assess(Geometry(torch.eye(3)), torch.eye(3), {}, {})
    return summarize([*originals, *generated], 10, 10, replace(unknown, **novelty), diagnose(None, [0, 0, 0]))


def groups_of(summary):
    return {line["group"]: line for line in summary["groups"]}


def test_best_is_chosen_on_training_data():
    """The network with the highest test accuracy is not the best one, as test labels choose nothing."""
    generated = [
        make_record(3, "generated", 0.80, 0.9, [3], parent=0, nearest_distance=1.0),
        make_record(4, "generated", 0.95, 0.5, [0, 1, 2, 3, 4], parent=1, nearest_distance=1.0, train_loss=0.3),
        make_record(5, "generated", 0.95, 0.6, [0, 1, 2, 3], parent=2, nearest_distance=1.0, train_loss=0.2),
    ]
    line = groups_of(summary_of(generated))["generated"]
    assert (line["best"], line["best_id"]) == (0.6, 2)
    assert line["mean"] == pytest.approx(2 / 3)
    assert line["median"] == 0.6
    assert line["std"] == pytest.approx(np.std([0.9, 0.5, 0.6]))
    assert line["networks"] == 3


def test_where_all_fit_the_training_images_held_out_ones_choose():
    """Networks that fit the training images worse are not chosen, whatever validation images say."""
    generated = [
        make_record(3, "generated", 1.0, 0.9, [3], parent=0, train_loss=0.1, validation_loss=0.3),
        make_record(4, "generated", 1.0, 0.8, [3, 4], parent=1, train_loss=0.3, validation_loss=0.1),
        make_record(5, "generated", 0.9995, 0.9, [3], parent=2, train_loss=0.2, validation_loss=0.2),
        make_record(6, "generated", 0.95, 1.0, [], parent=3, train_loss=0.2, validation_loss=0.2),
    ]
    generated = [replace_distance(record) for record in generated]
    line = groups_of(summary_of(generated))["generated"]
    assert (line["best_id"], line["chosen_on"]) == (2, "validation")
    assert groups_of(summary_of(generated))["original"]["chosen_on"] == "training"
    # Shuffled test labels choose the same.
    wrong = [np.packbits(np.arange(10) > number).tobytes() for number in range(4)]
    shuffled = [
        replace(r, wrong=bits, test_accuracy=number / 10, test_loss=1.0)
        for number, (r, bits) in enumerate(zip(generated, wrong, strict=True), 1)
    ]
    again = groups_of(summary_of(shuffled))["generated"]
    assert (again["best_id"], again["chosen_on"], again["best"]) == (2, "validation", 0.3)


def test_same_mistakes_are_those_of_the_most_similar_original():
    """Sample 0 gets images 1 and 2 wrong as original 1 does, and takes one of them for the same class."""
    classes = {0: [1, 1], 1: [2, 3, 4], 2: [5, 5, 5]}
    generated = [
        make_record(0, "generated", 0.8, 0.8, [1, 2], wrong_classes=bytes([2, 9])),
        make_record(1, "generated", 0.8, 0.8, [0, 4, 5], wrong_classes=bytes([5, 5, 5])),
        make_record(2, "generated", 0.8, 0.8, [9], wrong_classes=bytes([5])),  # shares none
    ]
    originals = [
        replace(record, wrong_classes=bytes(classes[record.id]))
        for record in (
            make_record(0, "original", 0.9, 0.8, [0, 1]),
            make_record(1, "original", 0.8, 0.7, [1, 2, 3]),
            make_record(2, "original", 0.7, 0.7, [0, 4, 5]),
        )
    ]
    assert same_mistakes(JudgedGroup(generated, originals, 10, 10)) == pytest.approx((1 / 2 + 1) / 2)
    assert same_mistakes(JudgedGroup(originals, originals, 10, 10)) == 0  # 0 and 1 share image 1, 2 and 0 share image 0
    assert same_mistakes(JudgedGroup(generated[2:], originals, 10, 10)) is None
    earlier = [replace(record, wrong_classes=None) for record in originals]
    assert same_mistakes(JudgedGroup(generated, earlier, 10, 10)) is None


def test_correlation_of_what_chooses_with_test_accuracy():
    def correlation(accuracies, **fields):
        generated = [
            make_record(number, "generated", train, test, [], **fields)
            for number, (train, test) in enumerate(accuracies)
        ]
        return groups_of(summary_of([replace_distance(record) for record in generated]))["generated"]

    line = correlation([(0.5, 0.1), (0.6, 0.2), (0.7, 0.9)])
    assert (line["selection_correlation"], line["chosen_on"]) == (pytest.approx(1), "training")
    assert correlation([(0.5, 0.9), (0.6, 0.2), (0.7, 0.1)])["selection_correlation"] == pytest.approx(-1)
    # 1, 2.5, 2.5, 4 against 2, 1, 3, 4: equals share their ranks.
    line = correlation([(0.5, 0.2), (0.6, 0.1), (0.6, 0.3), (0.7, 0.4)], train_loss=0.1)
    assert line["selection_correlation"] == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [2, 1, 3, 4])[0, 1])
    assert correlation([(0.5, 0.2), (0.6, 0.2)])["selection_correlation"] is None
    assert correlation([(0.5, 0.1), (0.5, 0.2)], validation_accuracy=0.5)["selection_correlation"] is None


def test_lines_have_intervals_and_leads():
    """The samples' own lead is that over the best baseline, which validation images choose."""
    generated = [
        replace_distance(make_record(number, "generated", 0.8, 0.8, [number, number + 1], parent=number))
        for number in range(3)
    ]
    others = [
        make_record(3, "ensemble", 0.9, 0.9, [0], validation_accuracy=0.8),
        make_record(4, "noise_added", 0.9, 0.3, range(7), sigma=0.5, validation_accuracy=0.9),
    ]
    summary = summary_of([*map(replace_distance, others), *generated])
    lines, names = groups_of(summary), named_metrics(summary)
    assert lines["original"]["mean_lower"] <= lines["original"]["mean"] <= lines["original"]["mean_upper"]
    assert lines["original"]["lead"] == pytest.approx(0.8 - np.mean([0.8, 0.7, 0.7]))
    assert lines["ensemble"]["lead"] == pytest.approx(-0.1)
    assert lines["generated"]["lead"] == lines["noise-added 0.5"]["lead"] == pytest.approx(0.5)
    assert names["generated/samples_lead_lower"] == lines["generated"]["lead_lower"] < 0.5
    assert METRICS["lead"].text(0.0123, 0.01) == "+1.23±1.00"
    words = verdict_words(summary)
    assert (words["baseline"], words["accuracy"]) == ("noise-added 0.5", summary["comparison"]["word"])
    assert verdict_words({"verdict": {"word": "new", "text": ""}}) == {"verdict": "new"}  # of an earlier version
    assert "generated/samples_lead" not in named_metrics(summary_of(generated))  # without baselines


def test_similarities_of_groups():
    generated = [make_record(0, "generated", 0.8, 0.8, [0, 1]), make_record(1, "generated", 0.8, 0.8, [1, 2])]
    lines = groups_of(summary_of([replace_distance(r) for r in generated]))
    pairs = {"01": 1 / 4, "02": 1 / 4, "12": 0}
    assert lines["original"]["similarity"] == pytest.approx(sum(pairs.values()) / 3)
    assert lines["original"]["similarity_to_originals"] == pytest.approx(sum(pairs.values()) / 3)
    assert lines["original"]["max_similarity"] == pytest.approx(1 / 4)
    assert lines["generated"]["similarity"] == pytest.approx(1 / 3)
    with_originals = [[1, 1 / 4, 1 / 4], [1 / 3, 2 / 3, 0]]
    assert lines["generated"]["similarity_to_originals"] == pytest.approx(np.mean(with_originals))
    assert lines["generated"]["max_similarity"] == pytest.approx((1 + 2 / 3) / 2)


def replace_distance(record, distance=1.0):
    return Record(**{**vars(record), "nearest_distance": distance})


def test_failed_networks_are_nearer_to_chance():
    generated = [
        make_record(i, "generated", 0.5, accuracy, [i], nearest_distance=1.0) for i, accuracy in enumerate([0.41, 0.42])
    ]
    # Halfway between chance (0.1) and the originals' mean validation accuracy (0.7333) is 0.4167.
    assert groups_of(summary_of(generated))["generated"]["failed"] == 0.5


@pytest.mark.parametrize(
    ("accuracies", "collapsed", "word"),
    [
        ((0.8, 0.8), False, "new"),
        ((0.8, 0.8), True, "collapsed"),
        ((0.1, 0.2), True, "failed"),
        ((0.8, 0.2), False, "new"),
    ],
)
def test_the_verdict_says_whether_samples_work_are_new_and_better(accuracies, collapsed, word):
    generated = [make_record(i, "generated", 0.8, a, [i], nearest_distance=1.0) for i, a in enumerate(accuracies)]
    ensemble = make_record(9, "ensemble", 0.8, 0.8, [7, 8])
    found = summary_of(
        [ensemble, *generated], word="new", text="new: 100% new of 2 samples. More.", collapsed=collapsed
    )
    verdict, failed = found["verdict"], sum(a < 0.4 for a in accuracies) / 2
    assert (verdict["word"], verdict["collapsed"], verdict["failed"]) == (word, collapsed, failed)
    assert verdict["text"].startswith(f"{word}: ")
    assert "100% new of 2 samples. " in verdict["text"]
    assert "More" not in verdict["text"]
    assert ("collapsed: all alike" in verdict["text"]) == collapsed
    assert (f"{failed:.0%} of the samples failed" in verdict["text"]) == (failed > 0)
    assert verdict["baseline"] == "ensemble"
    assert verdict["accuracy"] == found["comparison"]["word"]
    assert found["comparison"]["text"] in verdict["text"]


def test_noise_is_grouped_by_sigma():
    noised = [make_record(i, "noise_added", 0.8, 0.8, [i], sigma=sigma) for i, sigma in enumerate([0.5, 0.15, 0.5])]
    generated = [make_record(i, "generated", 0.8, 0.8, [i], nearest_distance=1.0) for i in range(2)]
    lines = groups_of(summary_of([*noised, *generated]))
    assert list(lines) == ["original", "noise-added 0.5", "noise-added 0.15", "generated"]
    assert lines["noise-added 0.5"]["networks"] == 2


def test_distances_are_those_of_whole_vectors(monkeypatch):
    monkeypatch.setattr("pdiff_ray.evaluation.similarity.CHUNK_VALUES", 50)  # several chunks, the last one shorter
    random = np.random.default_rng(0)
    first, second = random.standard_normal((3, 23)), random.standard_normal((4, 23))
    expected = np.linalg.norm(first[:, None] - second[None], axis=2)
    np.testing.assert_allclose(distances(first, second), expected, rtol=1e-12)
