"""The benchmarks, at sizes that say nothing of speed: each runs, compares equal results and writes what it found."""

import json
import os

import pytest
from helpers import marked
from test_partition import CONVNET, LAST_NORMS

from benchmarks import __main__ as command
from benchmarks import aligning, cluster, core, judging, latents, scale, searching, verdict
from pdiff_ray.config import loading
from pdiff_ray.estimates.estimate import Estimator
from pdiff_ray.running.experiment import make_plan
from pdiff_ray.stages.table import STAGES

SMALL = judging.Case("a small ConvNet", CONVNET, LAST_NORMS, 8, 60, 2, (2, 20), 20.0)
BRIEF_STEPS = {"autoencoder": {"channels": [4], "steps": 2}, "diffusion": {"steps": 2, "num_timesteps": 10}}
BRIEF_FIT = {
    "training": {"epochs": 1},
    "zoo": {"members": 6, "warmup_steps": 1, "steps_per_member": 1, "subset": {"last_norm_layers": 1}},
    "generator": BRIEF_STEPS,
}
RUNS = {
    "evaluate": lambda: judging.evaluate(3, [SMALL]),
    "zoo_step": lambda: judging.zoo_step(8, 2, SMALL),
    "sampling": lambda: core.sampling(samples=4, steps=20),
    "training": lambda: core.training(members=8, dimension=64, steps=4),
    "searching": lambda: searching.searching(trials=12, seeds=2),
    "store": lambda: core.store(count=60, k=10, dimension=32),
    "align": lambda: aligning.align(6, ("s1",)),
    "fit": lambda: latents.fit(
        samples=3, network={"name": "convnet", "args": {"widths": [4, 8]}}, data={"image_size": 8}, **BRIEF_FIT
    ),
    "fit_memory": lambda: latents.fit_memory(members=8, values=20_000),
    "growth_D": lambda: latents.growth_D((1000,), members=4, samples=2),
    "verdict_D": lambda: latents.verdict_D(1000, members=12, samples=12),
    "scale": lambda: scale.scale([(8, 2)], zoos=2),
    "requests": lambda: scale.requests(8, 2, zoos=2, latency_s=0.0),
    "growth": lambda: judging.growth((2, 4, 8), (20, 40, 60), (LAST_NORMS,)),
}
SLOW = ("fit", "growth_D", "verdict_D", "scale", "requests")
BRIEF_ZOO = {"training": {"epochs": 2}, "zoo": {"members": 50, "steps_per_member": 2}}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in RUNS])
def test_it_runs(name):
    results = list(RUNS[name]())
    assert results
    for result in results:
        assert result.name == name
        assert 0 < result.spread[0] <= result.ratio <= result.spread[1]
        assert result.n >= 1
        assert command.row(result).startswith(name)


def test_the_verdict_is_asked_for_over_seeds(tmp_path):
    (found,) = verdict.verdict(1, ["trajectory"], storage=str(tmp_path), **BRIEF_ZOO)
    assert (found.ours_s, found.other_s) == (pytest.approx(22, abs=4), 22)
    assert "| members | 1 |" in found.note


@pytest.mark.parametrize("kind", [*marked("slow", "trajectory"), *marked("long", "branches", "independent")])
def test_the_verdict_is_right_on_known_kinds(kind, tmp_path):
    """Of each sort of zoo one seed; `docs/method.md` has ten."""
    (found,) = verdict.verdict(1, [kind], storage=str(tmp_path))
    assert found.ours_s / found.other_s > 0.9, found.note


def test_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    small = list(RUNS["store"]())
    monkeypatch.setattr(core, "store", lambda: iter(small))
    command.main(["store", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"name", "ours_s", "other_s", "ratio", "n", "spread", "hardware", "versions"} <= found[0].keys()
    assert capsys.readouterr().out.count("\nstore ") == len(found)
    with pytest.raises(SystemExit) as caught:
        command.main(["stor"])
    assert caught.value.code == 2


def test_ways_that_differ_are_noticed(monkeypatch):
    monkeypatch.setattr(judging.Subject, "plain", lambda *_: [])
    with pytest.raises(AssertionError, match="predict otherwise"):
        next(judging.evaluate(3, [SMALL]))


@pytest.mark.long
def test_work_is_spread_over_nodes():
    found = list(cluster.nodes(counts=(2,), workers=2, members=(20, 60), n=1))
    assert [result.what for result in found] == [
        "a member by workers, 2 of them on 2 nodes",
        "a sample by actors, 2 of them on 2 nodes",
    ]


@pytest.mark.long
def test_a_second_run_prints_the_same_table():
    (result,) = cluster.rerun(cluster.BRIEF)
    assert result.ratio > 1


@pytest.mark.long
def test_the_quickstart_prints_the_same_table_with_and_without_ray():
    (result,) = cluster.start(cluster.BRIEF, n=1)
    assert result.ratio > 0


@pytest.mark.long
def test_whole_networks_are_measured():
    brief = ("network.name=s1", "network.cifar_stem=false", "zoo.members=20", "sampling.samples=4")
    (result,) = latents.whole(brief)
    assert 0.3 < result.ours_s < 6


@pytest.mark.long
def test_the_quickstart_runs_without_baselines():
    (result,) = cluster.baselines((*cluster.BRIEF, "zoo.members=20", "sampling.samples=4"), n=1)
    assert result.ratio > 0


def test_the_resnets_can_be_built(tmp_path):
    plan = make_plan(loading.load(latents.RESNET, [f"storage={tmp_path}"]))
    assert Estimator(plan.storage).counts(plan.experiment).subset.size == 11_172_810
    plan = make_plan(loading.load(cluster.RESNET, [f"storage={tmp_path}"]))
    assert Estimator(plan.storage).counts(plan.experiment).subset.size == 2048
    assert STAGES["evaluation"].about(plan.experiment).startswith("177 networks")


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="compares actors of a core each")
@pytest.mark.parametrize("work", [cluster.ray_overhead, cluster.actors])
def test_evaluations_are_compared(work):
    brief = (*cluster.BRIEF, "zoo.members=20", "sampling.samples=8", "evaluation.fine_tuned_networks=2")
    first, *_ = work([(cluster.QUICKSTART, brief, 1)]) if work is cluster.actors else work(brief, n=1)
    target = {"actors": 1.7, "ray_overhead": 1 / 1.1}[work.__name__]
    assert first.what.startswith("evaluation of 107 convnets on")  # 1 + 2 + 8, and 12 baselines of 8
    assert (first.name, first.n, first.target) == (work.__name__, 1, target)
