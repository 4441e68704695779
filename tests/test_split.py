"""Which members are learned, and which are kept back to compare with."""

import numpy as np
import pytest
from helpers import build, interrupted_zoo, tiny, with_vectors

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config import loading
from pdiff_ray.config.schema import Experiment, Zoo
from pdiff_ray.stages import evaluation
from pdiff_ray.stages.verdict import held_out_by_run
from pdiff_ray.stages.zoo import runs_of
from pdiff_ray.storage.parameters import ParameterStore

TRAJECTORY = ("zoo.regime=trajectory", "zoo.held_out=0.2", "zoo.members=10", "zoo.second_run=3")


def blocks(ids):
    return 1 + int((np.diff(sorted(ids)) > 1).sum())


def split(**zoo):
    return Experiment(name="x", zoo=Zoo(**zoo)).split


@pytest.mark.parametrize("members", [1, 2, 3, 7, 39, 40, 200, 1000])
@pytest.mark.parametrize("regime", ["trajectory", "branches", "independent"])
def test_every_member_has_one_place(members, regime):
    zoo = {
        "regime": regime,
        "members": members,
        "branches": max(2, min(5, members)),
        "subset": "all",
        "batchnorm": "included",
    }
    if regime == "branches" and members < 2:
        return
    found = split(**zoo)
    assert sorted([*found.learned, *found.held_out]) == list(range(members))
    assert len(found.held_out) == pytest.approx(members / 5, abs=0.5 if regime != "branches" else members / 2)
    assert len(found.second_run) == (round(members / 5) if regime == "trajectory" else 0)
    assert not {*found.second_run} & {*range(members)}


def test_what_is_held_out_is_not_next_to_what_is_learned():
    for seed in range(50):
        assert blocks(split(members=200, seed=seed).held_out) <= 2
        assert {id_ % 5 for id_ in split(regime="branches", branches=5, members=200, seed=seed).held_out} == {
            split(regime="branches", branches=5, members=200, seed=seed).held_out[0] % 5
        }
    independent = split(regime="independent", members=200, subset="all", batchnorm="included")
    assert blocks(independent.held_out) > 20


def test_another_seed_holds_out_others_and_none_is_held_out_on_demand():
    chosen = {split(members=200, seed=seed).held_out for seed in range(5)}
    assert len(chosen) == 5
    assert split(members=200, seed=3) == split(members=200, seed=3)
    assert split(members=200, held_out=0).learned == tuple(range(200))


def test_a_generator_may_learn_fewer_but_none_that_is_held_out():
    whole = Experiment(name="x").split
    fewer = Experiment.model_validate({"name": "x", "generator": {"members": 20}}).split
    assert fewer.learned == whole.learned[:20]
    assert fewer.held_out == whole.held_out
    with pytest.raises(ConfigError, match=r"161.*200 \(zoo.members\); 20% are held out.*160 can be learned"):
        loading.parse_experiment({"name": "x", "generator": {"members": 161}}, "x.yaml")


def test_the_second_run_is_as_long_as_the_first():
    first, second = runs_of(Zoo(members=200))
    assert (len(first.places), len(second.places)) == (200, 40)
    assert (second.places[0], second.places[-1]) == (4, 199)
    assert [runs.places for runs in runs_of(Zoo(members=5, second_run=5))] == [(0, 1, 2, 3, 4)] * 2
    assert len(runs_of(Zoo(members=200, second_run=0))) == 1
    assert len(runs_of(Zoo(members=200, regime="branches", branches=4))) == 4


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    experiment, artifacts = tiny(tmp_path_factory.mktemp("split"), *TRAJECTORY, "generator.name=gaussian")
    build(experiment, artifacts)
    return experiment, artifacts


def test_members_are_judged_in_their_groups(done):
    experiment, artifacts = done
    rows = ParameterStore(artifacts["evaluation"]).records()
    for group, ids in experiment.split.groups.items():
        assert tuple(row.id for row in rows if row.group == group) == ids
        assert all(row.number == row.id and row.judged for row in rows if row.group == group)
    assert len({row.id for row in rows}) == len(rows) == evaluation.num_networks(experiment)
    zoo = ParameterStore(artifacts["zoo"])
    members, kept_back = zoo.vectors(experiment.split.learned), zoo.vectors(experiment.split.held_out)
    nearest = [row.nearest_distance for row in rows if row.group == "held_out"]
    distances = np.linalg.norm(kept_back[:, None] - members[None], axis=2).min(1)
    np.testing.assert_allclose(np.array(nearest) / nearest[0], distances / distances[0], rtol=1e-4)


def test_nothing_learns_from_what_is_kept_back(done, tmp_path):
    """The generator, and all that is drawn, is the same when other members are kept back beside the same learned."""
    experiment, artifacts = done
    zoo = ParameterStore(artifacts["zoo"])
    learned, all_rows = set(experiment.split.learned), with_vectors(zoo)
    changed = [row if row.id in learned else np.zeros_like(row.vector) for row in all_rows]
    other, there = tiny(tmp_path, *TRAJECTORY, "generator.name=gaussian")
    build(other, there, "base")
    rows = [
        row if row.id in learned else type(row)(**{**vars(row), "vector": vector})
        for row, vector in zip(all_rows, changed, strict=True)
    ]
    ParameterStore(there["zoo"]).append(rows, zoo.subset())
    build(other, there)
    for stage in ("samples", "generator"):
        names = artifacts[stage].manifest().files
        weights = [name for name in names if name.endswith("safetensors")]
        assert weights
        assert all(artifacts[stage].read(name) == there[stage].read(name) for name in weights)
    drawn, again = (ParameterStore(found["evaluation"]).records() for found in (artifacts, there))
    kept_back = {"held_out", "second_run"}
    assert [r.wrong for r in drawn if r.group not in kept_back] == [r.wrong for r in again if r.group not in kept_back]


def test_an_interrupted_second_run_goes_on(done, tmp_path):
    experiment, artifacts = tiny(tmp_path, *TRAJECTORY)
    build(experiment, artifacts, "base")
    kept = interrupted_zoo(experiment, artifacts, 11)
    assert kept.ids == list(range(10))
    build(experiment, artifacts, "base", "zoo")
    again, whole = ParameterStore(artifacts["zoo"]), ParameterStore(done[1]["zoo"])
    np.testing.assert_array_equal(again.vectors(), whole.vectors())
    assert [row.step for row in again.records()][-3:] == [row.step for row in whole.records()][-3:]
    assert [row.group for row in again.records()] == ["original"] * 10 + ["second_run"] * 3
    assert whole.records([12])[0].step == whole.records([9])[0].step  # both runs end together
    assert (whole.vectors([12]) != whole.vectors([9])).any()


def test_held_out_members_of_a_run_stay_together():
    zoo = Zoo(regime="branches", branches=10, members=50)
    found = held_out_by_run(Experiment(name="x", zoo=zoo))
    assert sorted(found) == sorted(zoo.held_out_ids)
    assert [id_ % 10 for id_ in found] == sorted(id_ % 10 for id_ in found)
    assert held_out_by_run(Experiment(name="x", zoo=Zoo(members=50))) == sorted(Zoo(members=50, seed=0).held_out_ids)
