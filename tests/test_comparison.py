"""Intervals of accuracies and of their differences, on predictions whose truth is known."""

import json
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from pdiff_ray.evaluation import comparison
from pdiff_ray.evaluation.comparison import Difference, compare


def predictions(random, sizes, num_images, hard=1.0, network=0.1, noise=0.5, shifts=None):
    """Wrong predictions (n, T) of each group: images are hard for all, networks good or bad, and the rest is chance."""
    images = random.normal(0, hard, num_images)
    return {
        name: images + random.normal(0, network, (n, 1)) + random.normal(0, noise, (n, num_images))
        > 1.2 + (shifts or {}).get(name, 0.0)
        for name, n in sizes.items()
    }


def accuracy(hard=1.0, network=0.1, noise=0.5, shift=0.0):
    """What networks and images without end would have."""
    return NormalDist(0, np.hypot(np.hypot(hard, network), noise)).cdf(1.2 + shift)


def compared(wrong, validation=None, against=("original",), **options):
    packed = {name: [np.packbits(row).tobytes() for row in rows] for name, rows in wrong.items()}
    validation = validation or {name: [0.5] for name in packed}
    return compare(packed, next(iter(wrong.values())).shape[1], validation, against, **options)


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture
def fewer(monkeypatch):
    monkeypatch.setattr(comparison, "RESAMPLES", 400)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"generated": 30, "original": 60}, {}),
        ({"generated": 6, "original": 6}, {"network": 0.3}),  # few networks, which differ much
        ({"generated": 40, "original": 40}, {"network": 0.0}),  # all alike: chance alone
    ],
)
def test_intervals_hold_the_truth_and_equal_groups_are_rarely_told_apart(random, fewer, sizes, options):
    runs, right, outside = 250, 0, {"better": 0, "worse": 0}
    truth = accuracy(**options)
    for seed in range(runs):
        found = compared(predictions(random, sizes, 200, **options), seed=seed)
        mean, difference = found.means["generated"], found.differences["original"]
        right += mean.lower <= truth <= mean.upper
        if difference.word in outside:
            outside[difference.word] += 1
    assert 0.91 <= right / runs <= 0.99
    assert outside["better"] / runs <= 0.05
    assert 0.01 <= sum(outside.values()) / runs <= 0.09


def test_differences_hold_the_truth(random, fewer):
    runs, right, options = 200, 0, {"shifts": {"generated": 0.1}, "network": 0.2}
    truth = accuracy(shift=0.1, network=0.2) - accuracy(network=0.2)
    for seed in range(runs):
        found = compared(predictions(random, {"generated": 20, "original": 40}, 300, **options), seed=seed)
        difference = found.differences["original"]
        right += difference.lower <= truth <= difference.upper
    assert 0.91 <= right / runs <= 0.99


def test_an_interval_is_that_of_resampling_networks_and_images(random):
    wrong = predictions(random, {"generated": 40, "original": 50}, 400, network=0.2)
    difference = compared(wrong).differences["original"]
    plain = []
    for _ in range(2000):
        images = random.integers(0, 400, 400)
        means = {g: rows[random.integers(0, len(rows), len(rows))][:, images].mean() for g, rows in wrong.items()}
        plain.append(means["original"] - means["generated"])
    assert difference.estimate == pytest.approx(wrong["original"].mean() - wrong["generated"].mean())
    np.testing.assert_allclose([difference.lower, difference.upper], np.quantile(plain, [0.025, 0.975]), atol=0.003)


def test_the_same_by_however_many_threads(random):
    wrong = predictions(random, {"generated": 23, "original": 31, "ensemble": 7}, 777)
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads, user_api="blas"):
            found.append(compared(wrong))
    assert found[0] == found[1]


def test_all_networks_see_the_same_images(random):
    """What is hard for all makes accuracies uncertain, and not their difference."""
    found = compared(predictions(random, {"generated": 50, "original": 50}, 500, network=0.02, noise=0.1))
    of_means = [mean.upper - mean.lower for mean in found.means.values()]
    difference = found.differences["original"]
    assert difference.upper - difference.lower < 0.3 * np.hypot(*of_means)


def test_a_small_difference_is_found_on_the_same_images(random):
    shifts = {"generated": 0.05}
    found = compared(predictions(random, {"generated": 100, "original": 100}, 2000, network=0.05, shifts=shifts))
    assert found.word == "better"
    assert 0 < found.differences["original"].lower < found.differences["original"].estimate < 0.03
    assert found.text.startswith(f"better: {found.differences['original'].points} original, the simplest of the best ")
    assert found.text.endswith("Better than all others, too.")


def test_one_network_is_compared_on_resampled_images(random):
    wrong = predictions(random, {"generated": 30, "original": 30}, 300)
    wrong["ensemble"] = wrong["original"].mean(0, keepdims=True) > 0.5
    found = compared(wrong, against=["ensemble"])
    mean, accuracy = found.means["ensemble"], 1 - wrong["ensemble"].mean()
    half = 1.96 * np.sqrt(accuracy * (1 - accuracy) / 300)
    assert mean.networks == 1
    np.testing.assert_allclose([mean.lower, mean.upper], [accuracy - half, accuracy + half], atol=0.006)
    assert "30 samples and 1 of ensemble on 300 test images" in found.text


def test_the_same_predictions_are_equal(random):
    wrong = predictions(random, {"original": 1}, 300)
    difference = compared({**wrong, "generated": wrong["original"]}).differences["original"]
    assert (difference.estimate, difference.lower, difference.upper, difference.word) == (0, 0, 0, "equal")
    assert difference.needed == {}


def test_equal_within_a_margin_that_shrinks_with_the_error(random):
    """Half a point is nothing at 80 %, and half of all that is wrong at 99 %."""
    wrong = predictions(random, {"generated": 100, "original": 60}, 20_000, network=0.01)
    assert compared(wrong).word == "equal"
    validation = {name: [0.99] * len(rows) for name, rows in wrong.items()}
    found = compared(wrong, validation)
    difference = found.differences["original"]
    assert 0.001 < max(-difference.lower, difference.upper) < 0.005
    assert difference.word == "undecided"
    # It is the error on validation images: shuffled test labels leave it as it is, and test accuracy sets no limit.
    rarely = {name: rows & (random.random(rows.shape) < 0.02) for name, rows in wrong.items()}
    found = compared(rarely)
    assert found.means["original"].estimate > 0.99
    assert found.differences["original"].word == "equal"


@pytest.mark.parametrize(
    ("limit", "sizes", "num_images", "options"),
    [
        ("images", {"generated": 50, "original": 1}, 150, {"network": 0.01}),
        ("networks", {"generated": 12, "original": 12}, 1500, {"network": 0.2}),
    ],
)
def test_what_would_decide(random, fewer, monkeypatch, limit, sizes, num_images, options):
    """So many networks, or images, do decide, but where the spread was underestimated."""
    monkeypatch.setattr(comparison, "EQUAL", 0.03)
    monkeypatch.setattr(comparison, "EQUAL_OF_ERROR", 0.2)
    decided = tried = 0
    for seed in range(12):
        found = compared(predictions(random, sizes, num_images, **options), seed=seed).differences["original"]
        if found.word != "undecided":
            continue
        assert found.limit == limit
        assert limit in found.needed
        count, larger = found.needed.get("networks"), found.needed.get("images", num_images)
        groups = {name: count if count and n > 1 else n for name, n in sizes.items()}
        again = compared(predictions(random, groups, larger, **options), seed=seed).differences["original"]
        tried, decided = tried + 1, decided + (again.word != "undecided")
    assert tried >= 6
    assert decided >= 0.75 * tried


def test_what_is_too_few_is_said(random):
    found = compared(predictions(random, {"generated": 50, "original": 1}, 150))
    assert found.word == "undecided"
    assert found.text.startswith("undecided: ")
    needed = found.differences["original"].needed["images"]
    assert found.text.endswith(f" {needed:,} test images would decide.")


def test_the_best_baseline_is_chosen_on_validation_images(random):
    """The one that is best on test images is another one, and shuffled test labels choose the same."""
    shifts = {"average": 0.5, "noise": -0.5}
    wrong = predictions(random, {"generated": 20, "original": 20, "average": 5, "noise": 20}, 500, shifts=shifts)
    validation = {"original": [0.8, 0.9], "average": [0.7], "noise": [0.95, 0.9]}
    found = compared(wrong, validation, list(validation))
    assert found.best == "noise"
    assert max(found.means, key=lambda name: found.means[name].estimate) == "average"
    shuffled = {name: rows[:, random.permutation(500)] for name, rows in wrong.items()}
    assert compared(shuffled, validation, list(validation)).best == "noise"
    # Within a standard error of the best, 0.083 with 10 images, the simplest one is.
    assert compared(wrong, validation, list(validation), num_validation=16).best == "noise"
    assert compared(wrong, validation, list(validation), num_validation=10).best == "original"


def test_one_baseline_that_is_clearly_above_is_enough_to_be_worse(random):
    """Whichever one has been chosen; what is better must be better than all of them."""
    sizes = {"generated": 30, "original": 30, "average": 1, "noise": 30}
    shifts = {"average": 0.3, "noise": -0.5, "original": 0.03}
    validation = {"noise": [0.9], "original": [0.8], "average": [0.8]}
    found = compared(predictions(random, sizes, 2000, shifts=shifts), validation, list(validation))
    assert found.best == "noise"
    assert found.differences["noise"].word == "better"
    assert (found.word, found.ahead) == ("worse", ("average",))
    assert found.text.startswith(f"worse: {found.differences['average'].points} average, ")
    found = compared(predictions(random, sizes, 2000, shifts=shifts), validation, ["noise", "original"])
    assert (found.word, found.ahead) == ("undecided", ())
    assert found.text.endswith("Not better than original.")
    assert compared(predictions(random, sizes, 2000, shifts=shifts), validation, ["noise"]).word == "better"
    both = compared(predictions(random, sizes, 2000, shifts=shifts | {"noise": 0.3}), validation, list(validation))
    assert both.text.startswith(f"worse: {both.differences['noise'].points} noise, the simplest ")
    assert f" Also {both.differences['average'].points} average" in both.text


def test_the_best_of_many_equal_baselines_is_not_above(random, fewer):
    names = [f"baseline-{index}" for index in range(12)]
    words = [
        compared(predictions(random, dict.fromkeys(["generated", *names], 10), 150), against=names, seed=seed).word
        for seed in range(60)
    ]
    assert words.count("better") == 0
    assert words.count("worse") <= 6


def test_another_group_changes_nothing_of_the_others(random):
    wrong = predictions(random, {"generated": 20, "original": 20, "own": 5}, 300)
    more = compared(wrong)
    less = compared({name: rows for name, rows in wrong.items() if name != "own"})
    assert set(more.differences) == {"original", "own"}
    for name, mean in less.means.items():
        np.testing.assert_allclose(mean.lower, more.means[name].lower, rtol=1e-12)
    assert more == compared(wrong)
    assert more != compared(wrong, seed=1)


def test_a_comparison_is_json(random):
    found = compared(predictions(random, {"generated": 6, "original": 12}, 100))
    values = json.loads(json.dumps(found.to_dict()))
    assert values["word"] == found.word
    assert values["differences"]["original"] == {
        "networks": 12,
        **{name: getattr(found.differences["original"], name) for name in ("estimate", "lower", "upper", "word")},
        **{name: getattr(found.differences["original"], name) for name in ("limit", "needed")},
    }
    alone = compared(predictions(random, {"generated": 6}, 100), against=())
    assert (alone.best, alone.word) == (None, None)
    assert "no baseline" in alone.text


def test_points_are_said_in_words():
    below = Difference(1, -0.005, -0.0092, -0.0009, "worse", "images", {})
    assert below.points == "0.50 [0.09, 0.92] points below"
    above = replace(below, estimate=0.0038, lower=-0.0004, upper=0.0072, word="undecided")
    assert above.points == "0.38 [-0.04, 0.72] points above"


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1e9, 1.960), (30, 2.042), (10, 2.228), (5, 2.571), (3, 3.182), (2, 4.303), (1, 12.706)]
)
def test_quantiles_of_student(freedom, quantile):
    assert comparison.student(freedom) == pytest.approx(quantile, rel=0.01)


def test_accuracies_are_no_more_than_all_images(random):
    wrong = {"original": random.random((3, 20)) < 0.1, "generated": random.random((2, 20)) < 0.05}
    for mean in compared(wrong).means.values():
        assert 0 <= mean.lower <= mean.estimate <= mean.upper <= 1
