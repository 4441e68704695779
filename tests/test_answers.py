"""Did it work, is it new, is it better than the simplest thing that works: from summaries, for every place."""

import numpy as np
import pytest

from pdiff_ray.evaluation.comparison import compare
from pdiff_ray.evaluation.diagnostics import diagnose
from pdiff_ray.evaluation.metrics import METRICS
from pdiff_ray.reports.answers import answers, conclusion, points, warnings, wilson
from pdiff_ray.reports.tables import headline, table_rows

IMAGES = 2000
SHARES = {"replica": 0.0, "interpolation": 0.9, "new": 0.097, "noise": 0.003}


def packed(errors, networks=40, seed=0):
    """Wrong predictions of networks that miss about so many of the images, most of them the same."""
    random = np.random.default_rng(seed)
    hard = np.arange(IMAGES) < errors * IMAGES
    return [np.packbits(hard ^ (random.random(IMAGES) < 0.002)).tobytes() for _ in range(networks)]


def summary(errors=0.1, average=0.1, word="interpolation", shares=SHARES, failed=0.0, collapsed=False, zoo=()):
    """A summary of samples with so many errors beside members with 0.1, and averages of members."""
    wrong = {"original": packed(0.1), "average of 2": packed(average, seed=1), "generated": packed(errors, seed=2)}
    found = compare(wrong, IMAGES, dict.fromkeys(wrong, [0.9] * 40), ["average of 2"])
    distances = {name: {"nearest": 0.25, "cosine": 0.9} for name in ("samples", "members", "held_out")}
    headline = f"{word}: all of it of 40 samples."
    return {
        "groups": [dict.fromkeys(METRICS) | {"group": name, "networks": 40} for name in wrong],
        "verdict": {
            "word": "failed" if failed > 0.5 else "collapsed" if collapsed else word,
            "text": f"{word}: because",
            "failed": failed,
            "collapsed": collapsed,
        },
        "novelty": {"word": word, "shares": shares, "distances": distances, "headline": headline, "undecided": []},
        "comparison": found.to_dict(),
        "zoo": list(zoo),
    }


@pytest.mark.parametrize(
    ("given", "short"),
    [
        ({}, "yes"),
        ({"errors": 0.2}, "partly: accuracy is lost"),
        ({"failed": 0.2}, "partly: some failed"),
        ({"failed": 0.8}, "no: failed"),
        ({"collapsed": True}, "no: collapsed"),
    ],
)
def test_it_worked_if_no_sample_fails_and_no_accuracy_is_lost(given, short):
    first = answers(summary(**given))[0]
    assert (first.question, first.short) == ("Did it work?", short)
    assert ("None failed." in first.text) == ("failed" not in given)
    assert ("-9.99 [" in first.text) == ("errors" in given)


@pytest.mark.parametrize(
    ("word", "shares", "short"),
    [
        ("new", {"new": 1.0}, "yes"),
        ("replica", {"replica": 0.8, "new": 0.2}, "no: replica"),
        ("gaussian-like", {"gaussian-like": 1.0}, "no: gaussian-like"),
        ("mixture", {"replica": 0.5, "new": 0.5}, "partly: mixture"),
        ("mixture", {"replica": 0.5, "interpolation": 0.5, "new": 0.0}, "no: mixture"),
        ("unknown", {}, "unknown"),
    ],
)
def test_it_is_new_if_its_samples_are(word, shares, short):
    second = answers(summary(word=word, shares=shares))[1]
    assert (second.question, second.short) == ("Is it new?", short)
    assert second.text.startswith("all of it of 40 samples. ")
    assert f"New are {shares.get('new', 0):.0%} [" in second.text or not shares
    assert "(members 0.25, held out 0.25)" in second.text


def test_what_is_open_is_said_with_the_number_that_would_decide():
    known = summary()
    known["novelty"]["undecided"] = [
        {"question": "how many samples are new", "remedy": "weights tell 60%", "n": None},
        {"question": "whether samples are new", "remedy": "it has 4 vectors", "n": 10},
    ]
    text = answers(known)[1].text
    assert text.endswith(
        " Undecided how many samples are new: weights tell 60%. "
        "Undecided whether samples are new: it has 4 vectors; 10 would decide."
    )


def test_the_headline_has_means_the_interval_and_the_best_baseline():
    known = summary(errors=0.05)
    for line, mean in zip(known["groups"], (0.9, 0.91, 0.95), strict=True):
        line["mean"] = mean
    known["groups"].append({"group": "ensemble", "mean": 0.92})
    lower, upper = (100 * known["comparison"]["means"]["generated"][end] for end in ("lower", "upper"))
    difference = points(known["comparison"]["differences"]["average of 2"])
    assert headline(known) == (
        f"original / ensemble / generated 90.00 / 92.00 / 95.00 [{lower:.1f}, {upper:.1f}]; "
        f"best baseline average of 2: {difference}, better"
    )
    del known["comparison"]
    assert headline(known) == "original / ensemble / generated 90.00 / 92.00 / 95.00"


@pytest.mark.parametrize(
    ("errors", "average", "short"),
    [(0.05, 0.1, "yes"), (0.1, 0.1, "no: equal"), (0.1, 0.05, "no: worse")],
)
def test_it_is_better_if_it_is_better_than_every_baseline(errors, average, short):
    third = answers(summary(errors, average))[2]
    assert third.short == short
    assert "points" in third.text
    assert "average of 2" in third.text


@pytest.mark.parametrize(("hits", "count"), [(0, 100), (1, 20), (50, 100), (20, 20)])
def test_shares_have_intervals(hits, count):
    """Where a share this far from what is seen has a z-score of 1.96."""
    low, high = wilson(hits / count, count)
    for bound in (low, high):
        z = abs(hits / count - bound) / np.sqrt(max(1e-12, bound * (1 - bound)) / count)
        assert z == pytest.approx(1.96, abs=0.01) or bound in (0.0, 1.0)
    assert 0 <= low <= hits / count <= high <= 1


def test_without_a_baseline_nothing_is_said_to_be_better():
    known = summary()
    known["comparison"] |= {"word": None, "best": None, "text": "There is no baseline to compare the samples with."}
    assert answers(known)[2].short == "unknown"


def test_the_conclusion_is_the_answers_and_what_is_wrong_with_the_zoo():
    line = np.outer(np.arange(50), np.random.default_rng(0).normal(size=9))
    zoo = diagnose(line, np.zeros(50))
    lines = conclusion(summary(zoo=zoo.to_list()))
    questions = [text.partition("?")[0] for text in lines[:3]]
    assert questions == ["Did it work", "Is it new", "Is it better than the simplest thing that works"]
    assert len(lines) == 3 + len(zoo.bad)
    assert all(finding.advice in text for finding, text in zip(zoo.bad, lines[3:], strict=True))
    assert lines[3].startswith("Zoo: effective rank 1. ")


def test_summaries_of_earlier_versions_have_a_verdict_alone():
    old = {"groups": [], "verdict": {"word": "new", "text": "new: because"}}
    assert answers(old) == ()
    assert warnings(old) == []
    assert conclusion(old) == ["verdict: new: because"]


def test_the_table_tells_differences_with_their_intervals():
    known = summary(errors=0.05)
    plain, told = table_rows(known), table_rows(known, differences=True)
    assert told[0][-2:] == ["generated - group", ""]
    assert [row[: len(plain[0])] for row in told] == plain
    assert told[1][-2:] == [points(known["comparison"]["differences"]["original"]), "better"]
    assert told[-1][-2:] == ["-", ""]
    assert table_rows({"groups": known["groups"]}, differences=True) == plain
    assert points({"estimate": -1e-6, "lower": -0.001, "upper": 0.012}) == "+0.00 [-0.10, +1.20]"
