"""The stage `alignment`: members permuted, the same functions, which everything that learns from members then reads."""

import shutil

import numpy as np
import pytest
import torch
from helpers import TINY, build, build_missing, context, tiny

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config import sweep
from pdiff_ray.running.experiment import check_plan, make_plan
from pdiff_ray.running.sweep import check_sweep
from pdiff_ray.stages import alignment
from pdiff_ray.stages.alignment import members_of
from pdiff_ray.stages.judging import base_judge
from pdiff_ray.stages.stored import Networks
from pdiff_ray.storage.parameters import ParameterStore
from pdiff_ray.sweeps.ledger import Ledger

WHOLE = (
    *("zoo.regime=independent", "zoo.subset=all", "zoo.batchnorm=included", "zoo.members=6", "zoo.held_out=0.2"),
    *("generator={name: gaussian}", "evaluation.fine_tuned_networks=1", "training.epochs=1"),
)
ALIGNED = (*WHOLE, "alignment.method=weight_matching", "alignment.reference=first")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder with base and zoo of independent members."""
    folder = tmp_path_factory.mktemp("independent")
    experiment, artifacts = tiny(folder, *WHOLE)
    build(experiment, artifacts, "base", "zoo")
    return folder


@pytest.fixture
def storage(zoo, tmp_path):
    return shutil.copytree(zoo, tmp_path / "storage")


def spread(store, experiment):
    vectors = store.vectors(experiment.split.learned).astype(np.float64)
    return np.sqrt(((vectors - vectors.mean(0)) ** 2).sum(1).mean())


def test_aligned_members_are_the_same_networks_nearer_to_each_other(storage):
    experiment, artifacts = tiny(storage, *ALIGNED)
    build(experiment, artifacts)
    before, after = ParameterStore(artifacts["zoo"]), members_of(artifacts)
    assert before.records() == after.records()
    assert after.subset() == before.subset()
    info = artifacts["alignment"].manifest().info
    assert (info["groups"], info["units"], info["not_permuted"]) == (2, 12, [])
    assert info["spread_before"] == pytest.approx(spread(before, experiment))
    assert info["spread"] == pytest.approx(spread(after, experiment))
    assert info["spread"] < 0.97 * info["spread_before"]
    first = experiment.split.learned[:1]
    np.testing.assert_array_equal(before.vectors(first), after.vectors(first))
    judge = base_judge(experiment, artifacts, after.subset(), context())
    predictions = [judge.predictions(torch.from_numpy(store.vectors())) for store in (before, after)]
    assert (predictions[0] != predictions[1]).float().mean() < 0.01
    # What learns from members has read the aligned ones; members are judged as before.
    plain, others = tiny(storage, *WHOLE)
    build(plain, others)
    mean = after.vectors(experiment.split.learned).mean(0)
    mine, theirs = (
        np.linalg.norm(ParameterStore(a["samples"]).vectors() - mean, axis=1).mean() for a in (artifacts, others)
    )
    assert mine < 0.97 * theirs
    records = [ParameterStore(a["evaluation"]).records() for a in (artifacts, others)]
    judged = [[r.wrong for r in rows if r.group in ("original", "held_out")] for rows in records]
    assert judged[0] == judged[1]
    drawn = [[r.wrong for r in rows if r.group.startswith("average")] for rows in records]
    assert drawn[0] != drawn[1]
    assert {stage: artifact.key for stage, artifact in others.items()}.items().isdisjoint(
        {stage: artifacts[stage].key for stage in ("generator", "samples", "evaluation", "report")}.items()
    )
    exported = list(Networks(artifacts["alignment"]).export(storage / "files", [0]))
    assert len(exported) == 1


def test_balanced_members_are_the_same_networks_of_smaller_norm(storage):
    experiment, artifacts = tiny(storage, *ALIGNED, "alignment.scales=balanced")
    build(experiment, artifacts, "alignment")
    before, after = ParameterStore(artifacts["zoo"]), members_of(artifacts)
    assert artifacts["alignment"].manifest().info["scaled"] == 2
    assert (np.linalg.norm(after.vectors(), axis=1) < np.linalg.norm(before.vectors(), axis=1)).all()
    judge = base_judge(experiment, artifacts, after.subset(), context())
    predictions = [judge.predictions(torch.from_numpy(store.vectors())) for store in (before, after)]
    assert (predictions[0] != predictions[1]).float().mean() < 0.01


def test_interrupted_it_goes_on_where_it_was(storage, tmp_path, monkeypatch):
    def built(folder, stop=None):
        experiment, artifacts = tiny(folder, *ALIGNED, "alignment.reference=mean")
        calls = []

        def progress(task, done, total, note=""):
            calls.append((note, done))
            if len(calls) == stop:
                raise KeyboardInterrupt

        try:
            build_missing("alignment", experiment, artifacts, context(progress=progress))
        except KeyboardInterrupt:
            return calls, None
        return calls, artifacts["alignment"]

    monkeypatch.setattr(alignment, "BLOCK_VALUES", 1)  # a member at a time
    other = shutil.copytree(storage, tmp_path / "other")
    whole, expected = built(other)
    assert [call for call in whole if call[0] == "round 1"] == [("round 1", i) for i in range(1, 7)]
    assert expected.manifest().info["rounds"] > 1
    made = []
    for stop in (4, 8, 3):
        calls, artifact = built(storage, stop)
        made += calls
        assert artifact is None
    assert made == whole[: len(made)], "what was matched is not matched again"
    calls, artifact = built(storage)
    np.testing.assert_array_equal(ParameterStore(artifact).vectors(), ParameterStore(expected).vectors())
    assert artifact.manifest().info == expected.manifest().info


def test_the_mean_brings_members_as_near_as_the_first(storage):
    spreads = {}
    for reference in ("first", "mean"):
        experiment, artifacts = tiny(storage, *ALIGNED, f"alignment.reference={reference}")
        build(experiment, artifacts, "alignment")
        spreads[reference] = artifacts["alignment"].manifest().info["spread"]
    assert spreads["mean"] <= spreads["first"]


def test_keys_follow_what_the_reference_is(tmp_path):
    def key(*changes):
        return tiny(tmp_path, *ALIGNED, *changes)[1]["alignment"].key

    assert key() == key("generator.members=4") != key("alignment.reference=mean")
    assert key("alignment.reference=mean") != key("alignment.reference=mean", "generator.members=4")
    assert "alignment" not in tiny(tmp_path, *WHOLE)[1]
    with pytest.raises(ConfigError, match=r"alignment\.method: is none"):
        make_plan(tiny(tmp_path, *WHOLE)[0], target="alignment")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (("zoo.subset={last_norm_layers: 1}",), r"layers\.1\.conv\.weight is not generated"),
        (("zoo.subset=all",), r"running_mean is not generated"),
    ],
)
def test_what_cannot_be_aligned_is_said_before_anything_is_trained(tmp_path, changes, reason):
    experiment, _ = tiny(tmp_path, "alignment.method=weight_matching", *changes)
    message = rf"^alignment\.method: convnet cannot be aligned, .*{reason}.*zoo\.subset: all"
    with pytest.raises(ConfigError, match=message):
        check_plan(make_plan(experiment))


def test_a_sweep_checks_each_way_of_aligning(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"base: {TINY}\nname: tries\nsweep: {{parameters: {{alignment.method: [none, weight_matching]}}}}\n"
    )
    with pytest.raises(ConfigError, match=r"^alignment\.method: convnet cannot be aligned"):
        check_sweep(Ledger(sweep.load(file, [f"storage={tmp_path}"])))


def test_statistics_that_are_measured_anew_stand_in_no_way(tmp_path):
    changes = ("zoo.subset=all", "zoo.batchnorm=recalibrated", "alignment.method=weight_matching")
    check_plan(make_plan(tiny(tmp_path, *changes)[0]))
