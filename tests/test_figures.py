"""The figures of a report, of many groups and of few."""

import itertools
import re
from dataclasses import asdict

import numpy as np
import pytest
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_info

from pdiff_ray.evaluation.comparison import compare
from pdiff_ray.evaluation.groups import GROUPS
from pdiff_ray.evaluation.summary import by_title
from pdiff_ray.reports import figures
from pdiff_ray.storage.parameters import Record

IMAGES = 200


def networks(*groups, count=12, wrong=0.1, **fields):
    """So many judged networks of each group."""
    random, records = np.random.default_rng(0), []
    for group in groups:
        for _ in range(1 if group == "ensemble" else count):
            missed = random.random(IMAGES) < wrong
            made = {"test_accuracy": 1 - float(missed.mean()), "wrong": np.packbits(missed).tobytes(), **fields}
            records.append(Record(len(records), group, **made))
    return records


@pytest.fixture
def drawn(monkeypatch):
    """Figures, in place of the PNG files that are made of them."""
    monkeypatch.setattr(figures, "png", lambda figure: figure)


def all_groups():
    noise = [record for s in (0.05, 0.5, 3.0) for record in networks("noise_added", sigma=s, wrong=0.1 + s / 6)]
    return noise + networks(*(name for name in GROUPS if name != "noise_added"))


def differences(records):
    lines = by_title(records)
    wrong = {name: [record.wrong for record in line] for name, line in lines.items()}
    found = compare(wrong, IMAGES, {name: [0.9] for name in wrong}, ["ensemble"])
    return {name: asdict(one) for name, one in found.differences.items()}


@pytest.mark.parametrize("many", [True, False])
def test_figures_have_names_on_their_axes_and_legends_beside_them(drawn, many):
    records = all_groups() if many else networks("original", "generated", count=3)
    latents = {"original": np.random.default_rng(0).normal(size=(8, 4)), "generated": np.zeros((3, 4))}
    made = [
        figures.accuracy_by_group(records),
        figures.similarity_matrix(records, IMAGES),
        figures.accuracy_against_similarity(records, IMAGES),
        figures.latent_map(latents, 0),
        figures.loss_curves({"base": [2.0, 1.0], "diffusion": [1.0] * 200}),
    ]
    if many:
        made.append(figures.accuracy_by_group(records, differences=differences(records)))
    for figure in made:
        figure.draw_without_rendering()
        for axes in figure.axes:
            ticks = "".join(tick.get_text() for tick in axes.get_xticklabels())
            names = axes.get_xlabel() or axes.get_ylabel() or figure.get_supxlabel() or ticks
            assert names.strip("0123456789.- ") or not axes.axison
            assert axes.get_legend() is None
            assert all(not legend.get_window_extent().overlaps(axes.get_window_extent()) for legend in figure.legends)
    assert sum(len(figure.legends) for figure in made) == 2


def test_latents_are_placed_with_one_thread(monkeypatch):
    """More of them take forty times as long where the machine has other work."""
    threads = []

    def fit_transform(self, points):
        threads.extend(library["num_threads"] for library in threadpool_info())
        return points[:, :2]

    monkeypatch.setattr(TSNE, "fit_transform", fit_transform)
    figures.latent_map({"original": np.eye(9), "generated": np.eye(9)}, 0)
    assert set(threads) == {1}


@pytest.mark.parametrize("draw", ["accuracy_by_group", "similarity_matrix"])
def test_names_of_many_groups_do_not_touch(drawn, draw):
    records = all_groups()
    figure = getattr(figures, draw)(records, *([IMAGES] if draw == "similarity_matrix" else []))
    figure.draw_without_rendering()
    labels = [label for label in figure.axes[0].get_yticklabels() if label.get_text()]
    assert len(labels) == len(by_title(records)) == len(GROUPS) + 2
    boxes = sorted((label.get_window_extent().y0, label.get_window_extent().y1) for label in labels)
    assert all(upper <= lower + 1 for (_, upper), (lower, _) in itertools.pairwise(boxes))


def test_groups_are_told_apart_and_many_sigmas_do_not_drown_them(drawn):
    records = all_groups()
    figure = figures.accuracy_against_similarity(records, IMAGES)
    everything, near = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(by_title(records))
    styles = {figures._style(record, GROUPS, records) for record in records}
    assert len(styles) == len(by_title(records))
    (low, high), accuracies = near.get_ylim(), [100 * r.test_accuracy for r in records if r.group == "generated"]
    assert low < min(accuracies) < max(accuracies) < high
    noise = [100 * r.test_accuracy for r in records if r.sigma == 3.0]
    assert everything.get_ylim()[0] < min(noise) < max(noise) < low


def test_what_lies_far_below_is_counted_at_the_edge(drawn):
    records = networks("original", "generated", count=100) + networks("noise_added", count=5, sigma=3.0, wrong=0.9)
    figure = figures.accuracy_by_group(records)
    assert re.search(r"; 5 below \d+\.\d\d are at the edge", figure.axes[0].get_xlabel())
    assert "; 5 below" in figure.axes[0].get_xlabel()
    assert figure.axes[0].get_xlim()[0] > 50
    assert "below" not in figures.accuracy_by_group(networks("original", "generated")).axes[0].get_xlabel()


def test_a_matrix_has_forty_of_a_group_and_shows_a_lone_network(drawn):
    figure = figures.similarity_matrix(networks("original", "ensemble", "generated", count=90), IMAGES)
    assert figure.axes[0].images[0].get_array().shape == (40 + 8 + 40,) * 2
