"""What the verdict is made from: losses on validation images, never on test images, and held-out members run by run."""

from dataclasses import replace

import pytest
import torch
from helpers import build, tiny

from pdiff_ray.evaluation.geometry import Geometry
from pdiff_ray.stages import verdict
from pdiff_ray.stages.zoo import runs_of
from pdiff_ray.storage.parameters import ParameterStore

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """The tiny experiment with its artifacts, and all networks that it judged."""
    experiment, artifacts = tiny(tmp_path_factory.mktemp("judged"))
    build(experiment, artifacts)
    return experiment, artifacts, ParameterStore(artifacts["evaluation"]).records()


def test_losses_are_those_on_validation_images(judged):
    experiment, artifacts, records = judged
    geometry = Geometry(torch.from_numpy(ParameterStore(artifacts["zoo"]).vectors(experiment.split.learned)))
    found = verdict._losses(records, geometry)
    expected = [record.validation_loss for record in records if record.group == "generated"]
    assert found["generated"].tolist() == pytest.approx(expected)
    other = [replace(r, test_loss=9.0, test_accuracy=0.0, train_loss=9.0) for r in records]
    again = verdict._losses(other, geometry)
    assert all(torch.equal(again[name], losses) for name, losses in found.items())


def test_samples_are_asked_about_with_their_losses(judged, monkeypatch):
    experiment, artifacts, records = judged
    asked, assess = [], verdict.Known.assess
    monkeypatch.setattr(verdict.Known, "assess", lambda self, *given: asked.append(given) or assess(self, *given))
    verdict.summary_of(experiment, artifacts, records, CPU)
    ((samples, losses),) = asked
    assert len(samples) == len(losses) == experiment.sampling.samples
    expected = [record.validation_loss for record in records if record.group == "generated"]
    assert losses.tolist() == pytest.approx(expected)


def test_test_labels_change_nothing_of_what_samples_are(judged):
    """Of what the summary says, test labels are in accuracies and similarities alone."""
    experiment, artifacts, records = judged
    before = verdict.summary_of(experiment, artifacts, records, CPU)
    other = [
        replace(r, test_accuracy=1 - r.test_accuracy, test_loss=9.0 - r.test_loss) if r.test_accuracy is not None else r
        for r in records
    ]
    after = verdict.summary_of(experiment, artifacts, other, CPU)
    assert after["novelty"] == before["novelty"]
    best = [{group["group"]: group["best_id"] for group in summary["groups"]} for summary in (before, after)]
    assert best[0] == best[1]
    assert after["comparison"]["best"] == before["comparison"]["best"]


def test_held_out_members_stand_run_by_run(tmp_path):
    experiment, _ = tiny(tmp_path, "zoo.regime=branches", "zoo.branches=4", "zoo.members=20", "zoo.held_out=0.5")
    found = verdict.held_out_by_run(experiment)
    assert sorted(found) == sorted(experiment.zoo.held_out_ids)
    runs = [next(i for i, run in enumerate(runs_of(experiment.zoo)) if id_ in run.member_ids) for id_ in found]
    assert runs == sorted(runs)
    assert len(set(runs)) > 1
    assert found != sorted(found)
