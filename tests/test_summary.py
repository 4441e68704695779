"""Similarities and distances of networks, and what is said of groups of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pdiff_ray.evaluation.diagnostics import diagnose
from pdiff_ray.evaluation.geometry import Geometry
from pdiff_ray.evaluation.metrics import METRICS, JudgedGroup, named_metrics, same_mistakes, verdict_words
from pdiff_ray.evaluation.novelty import assess
from pdiff_ray.evaluation.similarity import distances, iou, mean_within, unpack_wrong
from pdiff_ray.evaluation.summary import summarize
from pdiff_ray.storage.parameters import Record


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
