"""Sweeps on Ray Tune: the same results as in this process, each zoo once, and trials that fail, stop or die."""

import json
import math
import os
import queue
import signal
import time
from types import SimpleNamespace

import psutil
import pytest
import yaml
from helpers import TINY

from pdiff_ray.common.errors import PdiffError
from pdiff_ray.config import sweep as space
from pdiff_ray.running import sweep as sweep_running
from pdiff_ray.running.sweep import run_trials
from pdiff_ray.stages.report import load_summary
from pdiff_ray.sweeps.ledger import Ledger, needs

pytestmark = pytest.mark.usefixtures("ray")

GRID = {"parameters": {"generator.members": [6, 12], "sampling.sampler": ["ddpm", "ddim"]}, "repeats": 2}


def ledger_of(storage, sweep, **more):
    path = storage.parent / f"{storage.name}.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "base": str(TINY), "sweep": sweep, **more}, sort_keys=False))
    return Ledger(space.load(path, [f"storage={storage}"]))


def groups(ledger):
    """The tables of all trials."""
    return {
        trial.number: [load_summary(ledger.artifacts(e))["groups"] for e in ledger.experiments(trial)]
        for trial in ledger.done()
    }


def made(ledger, stage):
    """When each artifact of a stage was written."""
    return {p.parent.name: p.stat().st_mtime_ns for p in ledger.storage.local.glob(f"{stage}/*/manifest.json")}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The grid, run in this process."""
    ledger = ledger_of(tmp_path_factory.mktemp("here") / "storage", GRID)
    run_trials(ledger, in_process=True)
    return ledger


@pytest.mark.parametrize("concurrency", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_grid_gives_the_same_however_many_run_at_a_time(here, tmp_path, concurrency):
    ledger = ledger_of(tmp_path / "storage", {**GRID, "max_concurrent": concurrency})
    needed = needs(ledger)
    assert len(needed.jobs) == 2
    assert needed.counts == {
        "base": (2, 0), "zoo": (2, 0), "generator": (4, 0), "samples": (8, 0), "evaluation": (8, 0), "report": (8, 0)
    }  # fmt: skip
    heard = queue.SimpleQueue()  # which cannot be pickled
    run_trials(ledger, on_result=heard.put)
    assert [t.state for t in ledger.done()] == ["finished"] * 8
    assert sorted(heard.get().number for _ in range(heard.qsize())) == list(range(8))
    assert groups(ledger) == groups(here)
    assert [t.objective for t in ledger.done()] == [t.objective for t in here.done()]
    counts = {stage: len(made(ledger, stage)) for stage in ("base", "zoo", "generator", "samples")}
    assert counts == {"base": 2, "zoo": 2, "generator": 4, "samples": 8}, "shared work was done more than once"
    before = [made(ledger, stage) for stage in counts]
    again = ledger_of(tmp_path / "storage", {**GRID, "max_concurrent": 3})
    assert again.key == ledger.key
    run_trials(again, on_result=lambda trial: pytest.fail("a finished trial was run again"))
    assert [made(again, stage) for stage in counts] == before
    assert not list((tmp_path / "storage" / "tmp").iterdir())


@pytest.mark.slow
def test_what_cannot_be_built_fails_its_trials_alone(tmp_path):
    optimizers = {
        "good": {"zoo.optimizer.lr": 0.01},
        "too large": {"zoo.optimizer": {"name": "sgd", "lr": 1.0e30}},
    }
    sweep = {"parameters": {"optimizer": {"variants": optimizers}, "generator.members": [6, 12]}}
    ledger = ledger_of(tmp_path / "storage", sweep)
    run_trials(ledger)
    assert [t.state for t in ledger.done()] == ["finished", "finished", "failed", "failed"]
    assert all("zoo.optimizer.lr" in t.reason for t in ledger.done()[2:])
    again, ran = ledger_of(tmp_path / "storage", sweep), []
    run_trials(again, on_result=ran.append)
    assert sorted(t.number for t in ran) == [2, 3], "only what has failed is tried again"


@pytest.mark.slow
def test_values_that_do_not_fit_together_fail_a_trial_of_a_search(tmp_path):
    sweep = {
        "search": "random",
        "num_trials": 6,
        "parameters": {"generator.diffusion.num_timesteps": [5, 20], "sampling.steps": [5, 10]},
    }
    with pytest.raises(PdiffError, match=r"sampling\.steps is 10"):
        ledger_of(tmp_path / "storage", {**sweep, "search": "grid", "num_trials": None})
    ledger = ledger_of(tmp_path / "storage", sweep)
    run_trials(ledger)
    wrong = [t for t in ledger.done() if t.assignment == {"generator.diffusion.num_timesteps": 5, "sampling.steps": 10}]
    assert wrong
    assert all(t.state == "failed" and "sampling.steps is 10" in t.reason for t in wrong)
    assert all(t.state == "finished" for t in ledger.done() if t not in wrong)


@pytest.mark.slow
def test_a_killed_trial_is_taken_up_again(here, tmp_path):
    sweep = {**GRID, "max_concurrent": 1}
    ledger, killed = ledger_of(tmp_path / "storage", sweep), []

    class Killer(sweep_running.SweepDisplay):
        """Kills the actor in the middle of the second trial."""

        def __call__(self, task, done, total, note=""):
            if task.startswith("trial 1|") and not killed:
                for process in psutil.Process().children(recursive=True):
                    if "ImplicitFunc" in " ".join(process.cmdline()):
                        killed.append(process.pid)
                        os.kill(process.pid, signal.SIGKILL)

    shown = Killer(ledger, live=False)
    sweep_running._run_on_ray(ledger, shown, lambda trial: None, time.monotonic())
    assert killed
    assert [t.state for t in ledger.done()] == ["finished"] * 8
    assert groups(ledger) == groups(here)


@pytest.mark.slow
def test_a_trial_that_always_dies_is_recorded_and_the_others_go_on(tmp_path):
    sweep = {"parameters": {"network.args": [{"deadly": True}, {"deadly": False}]}, "max_retries": 1}
    ledger = ledger_of(tmp_path / "storage", sweep, network={"name": "helpers:deadly_network", "args": {}})
    run_trials(ledger)
    assert [t.state for t in ledger.done()] == ["failed", "finished"]
    assert "die" in ledger.done()[0].reason


@pytest.mark.slow
def test_asha_stops_the_hopeless_and_remembers_after_a_restart(tmp_path):
    sweep = {
        "search": "random",
        "num_trials": 8,
        "max_concurrent": 1,
        "scheduler": "asha",
        "metric": "generated/mean_train_loss",
        "parameters": {"generator.autoencoder.lr": {"loguniform": [1.0e-7, 1.0e-1]}},
    }
    more = {"zoo": {"optimizer": {"lr": 0.3}}}
    whole = ledger_of(tmp_path / "whole", sweep, **more)
    run_trials(whole)
    states = [t.state for t in whole.done()]
    assert set(states) == {"finished", "stopped"}
    for trial in whole.done():
        assert [rung for rung, _ in trial.curve] == list(range(1, len(trial.curve) + 1))
        assert (trial.state == "finished") == (len(trial.curve) == 7)
    halves = ledger_of(tmp_path / "halves", {**sweep, "num_trials": 4}, **more)
    run_trials(halves)
    halves = ledger_of(tmp_path / "halves", sweep, **more)
    run_trials(halves)
    assert [(t.state, t.curve) for t in halves.done()] == [(t.state, t.curve) for t in whole.done()]


@pytest.mark.slow
def test_infinity_at_a_rung_fails_a_trial_and_the_others_go_on(tmp_path):
    """The second trial's learning rate makes networks whose loss is not a number."""
    sweep = {
        "search": "optuna",
        "num_trials": 3,
        "max_concurrent": 1,
        "confirm": 0,
        "scheduler": "asha",
        "metric": "generated/mean_train_loss",
        "parameters": {"generator.autoencoder.lr": [1.0e-3, 1.0e9]},
    }
    ledger = ledger_of(tmp_path / "storage", sweep)
    run_trials(ledger)
    hopeless = [t for t in ledger.done() if t.assignment["generator.autoencoder.lr"] == 1e9]
    assert 0 < len(hopeless) < 3
    for trial in ledger.done():
        assert trial.state == ("failed" if trial in hopeless else "finished")
        assert not trial.crashed
        assert all(math.isfinite(value) for _, value in trial.curve)
    assert "at rung" in hopeless[0].reason


@pytest.mark.slow
def test_a_time_budget_ends_a_sweep_that_can_go_on(here, tmp_path):
    sweep = {**GRID, "max_concurrent": 1, "time_budget": 2}
    ledger = ledger_of(tmp_path / "storage", sweep)
    started = time.monotonic()
    run_trials(ledger)
    assert time.monotonic() - started < 120
    assert len(ledger.done()) < 8
    assert all(t.state == "finished" for t in ledger.done())
    rest = ledger_of(tmp_path / "storage", {**sweep, "time_budget": None})
    run_trials(rest)
    assert groups(rest) == groups(here)


@pytest.mark.slow
def test_a_search_over_zoos_builds_each_once_in_its_trials(tmp_path):
    sweep = {"search": "random", "num_trials": 6, "max_concurrent": 3, "parameters": {"zoo.batch_size": [16, 32]}}
    ledger = ledger_of(tmp_path / "storage", sweep)
    assert not needs(ledger).jobs
    run_trials(ledger)
    assert [t.state for t in ledger.done()] == ["finished"] * 6
    assert (len(made(ledger, "base")), len(made(ledger, "zoo"))) == (1, 2)
    zoos = ledger.storage.local.glob("zoo/*/networks/*.parquet")
    assert sum(1 for _ in zoos) == sum(
        len(json.loads(p.read_text())["files"]) - 1 for p in ledger.storage.local.glob("zoo/*/manifest.json")
    ), "two trials made the same members"


def rungs_of(done=(), factor=2):
    """What an ASHA that knows the curves of earlier launches, says of the reports of a trial."""
    from pdiff_ray.distributed import tune

    sweep = SimpleNamespace(maximize=True, reduction_factor=factor)
    asha = tune._ASHA(SimpleNamespace(sweep=sweep, done=lambda: list(done)))

    def told(name, curve, **more):
        trial = SimpleNamespace(trial_id=name)
        asha.on_trial_add(None, trial)
        return [
            asha.on_trial_result(None, trial, {"rung": rung, "objective": value, **more})
            for rung, value in curve.items()
        ]

    return told


def test_trials_that_begin_above_a_rung_are_not_compared_below_it():
    """A subspace is fitted at once, so that its trials report from the fourth rung on."""
    told = rungs_of()
    told("autoencoder", {1: 0.3, 2: 0.5, 3: 0.6, 4: 0.7, 5: 0.75, 6: 0.8, 7: 0.85})
    for name in ("subspace", "other"):
        told(name, {4: 0.7, 5: 0.8, 6: 0.85, 7: 0.88})
    assert set(told("better", {1: 0.35, 2: 0.55, 3: 0.65, 4: 0.75, 5: 0.8})) == {"CONTINUE"}
    assert told("worse", {1: 0.2}) == ["STOP"]


def test_rungs_that_were_passed_are_not_judged_again():
    earlier = [SimpleNamespace(number=n, curve=((1, 0.5 + n / 100), (2, 0.6))) for n in range(4)]
    told = rungs_of(earlier)
    assert told("taken up", {1: 0.4, 2: 0.7}, passed=True) == ["CONTINUE"] * 2
    assert told("new", {1: 0.4}) == ["STOP"]


def test_decisions_fall_at_powers_of_the_factor_alone():
    told = rungs_of(factor=3)
    for name in ("one", "other"):
        told(name, {1: 0.3, 2: 0.5, 3: 0.9})  # decoded members, which are better than what is drawn
    assert set(told("subspace", {4: 0.7, 5: 0.8, 6: 0.85, 7: 0.88})) == {"CONTINUE"}
    assert told("worse", {1: 0.3, 2: 0.1, 3: 0.2}) == ["CONTINUE", "CONTINUE", "STOP"]


def test_places_are_asked_for_ahead_while_a_grid_runs_alone(monkeypatch):
    from pdiff_ray.distributed import tune

    monkeypatch.delenv(tune.PENDING, raising=False)
    with tune._asking_ahead():
        assert os.environ[tune.PENDING] == "200"
    assert tune.PENDING not in os.environ
    monkeypatch.setenv(tune.PENDING, "7")
    with tune._asking_ahead():
        assert os.environ[tune.PENDING] == "7"
    assert os.environ[tune.PENDING] == "7"
