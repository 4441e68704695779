"""The ledger of a sweep: what is run again and what is not, whatever has happened to a trial or its results."""

import math
import shutil
import time
from dataclasses import replace

import pytest
import torch
import yaml
from helpers import TINY, context, tiny

from pdiff_ray.cli import experiments as commands
from pdiff_ray.common.errors import PdiffError, StorageError, UnavailableError
from pdiff_ray.config import loading
from pdiff_ray.config import sweep as space
from pdiff_ray.distributed.train import Job, place_among
from pdiff_ray.distributed.tune import _Claims
from pdiff_ray.running import progress
from pdiff_ray.running import sweep as sweep_running
from pdiff_ray.running.progress import SweepDisplay
from pdiff_ray.running.sweep import run_trials
from pdiff_ray.storage.parameters import ParameterStore
from pdiff_ray.sweeps import table as sweep_table
from pdiff_ray.sweeps import trial
from pdiff_ray.sweeps.ledger import Ledger, needs
from pdiff_ray.sweeps.trial import Trial, best_setting

SEARCH = {
    "search": "optuna",
    "num_trials": 2,
    "confirm": 0,
    "metric": "generated/mean_train_loss",
    "parameters": {"generator.diffusion.num_timesteps": [5, 20], "sampling.steps": [4, 10]},
}
IMPOSSIBLE = {"generator.diffusion.num_timesteps": 5, "sampling.steps": 10}
GRID = {"parameters": {"sampling.sampler": ["ddpm", "ddim"]}}


def ledger_of(storage, sweep, **more):
    path = storage.parent / f"{storage.name}.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "base": str(TINY), "sweep": sweep, **more}, sort_keys=False))
    return Ledger(space.load(path, [f"storage={storage}"]))


def run(ledger):
    """The numbers of the trials that are run."""
    ran = []
    run_trials(ledger, in_process=True, on_result=lambda trial: ran.append(trial.number))
    return ran


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    storage = tmp_path_factory.mktemp("grid") / "storage"
    run(ledger_of(storage, GRID))
    return storage


@pytest.fixture
def copy(grid, tmp_path):
    """A storage of its own with a finished grid."""
    shutil.copytree(grid, tmp_path / "storage")
    return tmp_path / "storage"


def test_a_loss_that_is_no_number_fails_its_trial(tmp_path):
    """Weights so large that the logits are no numbers, nor the mean loss of the group."""
    parameters = {"generator.sigma": [1e38, 0.1]}
    search = {**SEARCH, "search": "grid", "parameters": parameters}
    del search["num_trials"], search["confirm"]
    ledger = ledger_of(tmp_path / "storage", search, generator={"name": "noise"})
    assert run(ledger) == [0, 1]
    assert [t.state for t in ledger.done()] == ["failed", "finished"]
    assert "mean_train_loss is nan" in ledger.done()[0].reason
    assert ledger.best().number == 1


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_rung_that_is_no_number_fails_its_trial(copy, value):
    """Once infinity was told to schedulers, which then stopped nobody: their cutoffs were not a number."""
    ledger, rungs = ledger_of(copy, GRID), []
    (experiment,) = ledger.experiments(ledger.done()[0])
    artifacts = ledger.artifacts(experiment)
    preview = trial._preview(experiment, artifacts, context(), ledger.sweep.metric, lambda *told: rungs.append(told))
    size = ParameterStore(artifacts["zoo"]).subset().size
    preview(1, torch.zeros(2, size))
    assert [rung for rung, _ in rungs] == [1]
    loss = "generated/mean_validation_loss"
    preview = trial._preview(experiment, artifacts, context(), loss, lambda *told: pytest.fail("it was told"))
    with pytest.raises(PdiffError, match=rf"{loss} is (inf|nan) at rung 2"):
        preview(2, torch.full((2, size), value))


def test_rungs_of_an_earlier_version_that_are_no_numbers_are_left_out(tmp_path):
    ledger = ledger_of(tmp_path / "storage", SEARCH)
    ledger.record(Trial(0, IMPOSSIBLE, (0,), "stopped", 2.0, curve=((1, 2.0), (2, math.inf))))
    assert ledger_of(tmp_path / "storage", SEARCH).done()[0].curve == ((1, 2.0),)


def test_a_trial_whose_storage_is_away_is_tried_again_and_not_blamed(tmp_path, monkeypatch):
    ledger, attempts = ledger_of(tmp_path / "storage", GRID | {"max_retries": 2}), []

    def away(experiments, *_):
        attempts.append(experiments)
        if len(attempts) < 3 or len(attempts) > 3 + 1:
            raise UnavailableError("no such bucket")
        if len(attempts) > 3:
            raise PdiffError("the loss is inf")
        return 0.5

    monkeypatch.setattr(sweep_running, "run_trial", away)
    assert run(ledger) == [0, 1]
    first, second = ledger.done()
    assert (first.state, first.objective, len(attempts)) == ("finished", 0.5, 4)
    assert (second.state, second.reason, second.crashed) == ("failed", "the loss is inf", False)
    again = ledger_of(tmp_path / "storage", GRID | {"max_retries": 2})
    again.trials.pop(0)
    assert run(again) == [0, 1]
    assert len(attempts) == 4 + 2 * 3
    assert all(t.crashed and t.reason == "no such bucket" for t in again.done())


def test_damage_is_told_at_once_and_is_not_the_values_fault(tmp_path, monkeypatch):
    attempts = []

    def damaged(*_):
        attempts.append(1)
        raise StorageError("zoo/x: damaged; delete it")

    monkeypatch.setattr(sweep_running, "run_trial", damaged)
    ledger = ledger_of(tmp_path / "storage", SEARCH | {"max_retries": 2, "num_trials": 1, "confirm": 0})
    run(ledger)
    assert (ledger.done()[0].reason, len(attempts)) == ("zoo/x: damaged; delete it", 1)
    assert [trial.number for trial in ledger.open_trials()] == [0], "the next launch tries it again"


def test_a_search_has_learned_from_failures_but_not_from_crashes(tmp_path):
    ledger = ledger_of(tmp_path / "storage", SEARCH)
    ledger.record(Trial(0, IMPOSSIBLE, (0,), "failed", reason="they do not fit together"))
    ledger.record(Trial(1, IMPOSSIBLE, (0,), "failed", reason="its process died", crashed=True))
    assert [t.number for t in ledger.open_trials()] == [1]
    assert ledger_of(tmp_path / "storage", SEARCH).ask().number == 1


def test_a_search_goes_on_after_a_kill_in_a_trial_that_cannot_be(tmp_path):
    ledger = ledger_of(tmp_path / "storage", {**SEARCH, "num_trials": 1})
    ledger.record(Trial(0, IMPOSSIBLE, (0,)))
    again = ledger_of(tmp_path / "storage", {**SEARCH, "num_trials": 1})
    assert needs(again).counts["zoo"] == (1, 0)
    assert run(again) == [0]
    assert again.done()[0].state == "failed"


def test_experiments_of_a_trial_are_parsed_once(copy, monkeypatch):
    parsed, parse = [], loading.parse_experiment
    monkeypatch.setattr(loading, "parse_experiment", lambda *given: parsed.append(given) or parse(*given))
    ledger = ledger_of(copy, GRID)
    assert not needs(ledger).jobs
    assert len(sweep_table.table(ledger)) == 2
    assert len(parsed) == 3, "the file's own experiment and two trials"
    (plain,) = ledger.experiments(ledger.done()[1])
    (raised,) = ledger.experiments(Trial(9, ledger.done()[1].assignment, (1,)))
    assert raised.seed == plain.seed + 1
    assert len(parsed) == 4


@pytest.mark.parametrize("stage", ["evaluation", "report"])
def test_deleted_results_are_made_again(copy, stage):
    ledger = ledger_of(copy, GRID)
    assert not ledger.open_trials()
    experiment = ledger.experiments(ledger.done()[1])[0]
    shutil.rmtree(copy / ledger.artifacts(experiment)[stage].folder)
    again = ledger_of(copy, GRID)
    assert run(again) == [1]
    assert again.artifacts(experiment)[stage].exists()
    assert not needs(again).jobs, "what is deleted is made again, not what it was made from"


def test_progress_counts_bases_as_bases_and_zoos_as_zoos(tmp_path):
    """Three bases of six zoos are 1/3 to 3/3, not 1/6, 3/6 and 5/6."""
    ledger = ledger_of(tmp_path / "storage", {"parameters": {"zoo.batch_size": [16, 32]}, "repeats": 3})
    jobs = [Job(experiment, ledger.artifacts(experiment), stages) for experiment, stages in needs(ledger).jobs]
    assert len(jobs) == 6
    assert [place_among(jobs, "zoo", job) for job in jobs] == [f" {n}/6" for n in range(1, 7)]
    assert {place_among(jobs, "base", job) for job in jobs} == {" 1/3", " 2/3", " 3/3"}
    assert place_among(jobs[:1], "base", jobs[0]) == ""


def done(number, members, seed, objective, state="finished"):
    return Trial(number, {"members": members}, (seed,), state, objective)


@pytest.mark.parametrize(
    ("trials", "best"),
    [
        # The best single seed is that of another setting.
        ([done(0, 4, 0, 0.8), done(1, 12, 0, 0.7), done(2, 4, 1, 0.5), done(3, 12, 1, 0.7)], ("members 12", 0.7)),
        # A seed that not all settings have, because it is an easy one or not there yet, compares nothing.
        ([done(0, 4, 0, 0.6), done(1, 12, 0, 0.7), done(2, 4, 1, 0.99)], ("trial 1", 0.7)),
        ([done(0, 4, 0, 0.6), done(1, 12, 0, 0.7), done(2, 12, 1, None, "running")], ("trial 1", 0.7)),
        # A setting that failed once is not the best.
        ([done(0, 4, 0, 0.6), done(1, 12, 0, 0.7), done(2, 12, 1, None, "failed")], ("trial 0", 0.6)),
        # Nothing is the best of nothing, or of settings that have no seed in common.
        ([done(0, 4, 0, None, "failed")], None),
        ([done(0, 4, 0, 0.6), done(3, 12, 1, 0.7)], None),
    ],
)
def test_the_best_setting_is_that_of_the_best_mean_over_the_seeds_of_all(trials, best):
    found = best_setting(trials, maximize=True)
    assert (found and (found.text.partition(",")[0], pytest.approx(found.objective))) == best
    least = best_setting(trials, maximize=False)
    assert (least is None) == (found is None)


def test_what_is_told_of_the_best_is_its_mean_over_seeds(capsys, tmp_path):
    ledger = ledger_of(tmp_path / "storage", {"parameters": {"generator.members": [4, 12]}, "repeats": 2})
    shown = SweepDisplay(ledger, live=False)
    for number, objective in enumerate((0.8, 0.7, 0.5, 0.7)):
        shown.change(done(number, (4, 12)[number % 2], number // 2, objective))
    told = capsys.readouterr().out.splitlines()
    assert "finished 80.00 %; 1 of 4 trials, best generated/mean_validation_accuracy 80.00 % (trial 0)" in told[0]
    assert told[-1].endswith("best generated/mean_validation_accuracy 70.00 % (members 12, mean of 2 seeds)")


def test_lines_say_each_minute_what_trials_are_doing(capsys, monkeypatch, tmp_path):
    """Where output is no terminal, and a trial may take hours."""
    shown = SweepDisplay(ledger_of(tmp_path / "storage", {"parameters": {"generator.members": [4, 12]}}), live=False)
    for number in range(10):
        shown(f"trial {number}|zoo", number, 200)
    assert not capsys.readouterr().out
    monkeypatch.setattr(progress, "STAGES_EVERY_S", 0)
    shown("trial 9|zoo", 10, 200)
    line = capsys.readouterr().out
    assert line.startswith("  trial 0: zoo 0/200; trial 1: zoo 1/200; ")
    assert line.endswith("trial 7: zoo 7/200; 2 more\n")


def test_a_deleted_base_is_trained_by_the_group_of_workers(copy):
    ledger = ledger_of(copy, GRID)
    experiment = ledger.experiments(ledger.done()[0])[0]
    artifacts = ledger.artifacts(experiment)
    for stage in ("base", "evaluation"):
        shutil.rmtree(copy / artifacts[stage].folder)
    ((_, stages),) = needs(ledger_of(copy, GRID)).jobs
    assert stages == ["base"]


def test_a_damaged_result_costs_its_own_row(copy, capsys):
    ledger = ledger_of(copy, GRID)
    artifact = ledger.artifacts(ledger.experiments(ledger.done()[0])[0])["evaluation"]
    for part in (copy / artifact.folder).rglob("*.parquet"):
        part.write_bytes(part.read_bytes()[:100])
    rows = sweep_table.table(ledger)
    assert [row.evaluated for row in rows] == [0, 1]
    assert artifact.key in capsys.readouterr().out


def test_one_process_is_one_worker(tmp_path):
    """The name of a base says how many workers trained it."""
    two, one = (tiny(tmp_path, f"resources.workers={count}")[1]["base"] for count in (2, 1))
    arguments = ["base", str(TINY), "--storage", str(tmp_path), "--set", "resources.workers=2", "--in-process"]
    commands.run.main(arguments, standalone_mode=False)
    assert not two.exists()
    assert one.exists()


def test_a_lease_that_ran_out_is_not_released_by_its_old_holder():
    claims = _Claims()
    assert claims.claim("zoo", "one")
    claims.leases["zoo"] = ("one", 0.0)
    assert claims.claim("zoo", "two")
    claims.release("zoo", "one")
    assert not claims.claim("zoo", "three")


def test_a_damaged_trial_is_named(tmp_path):
    ledger = ledger_of(tmp_path / "storage", SEARCH)
    ledger.storage.write(f"{ledger.folder}/trials/00000.json", b"{")
    with pytest.raises(PdiffError, match=r"trials/00000\.json: damaged"):
        ledger_of(tmp_path / "storage", SEARCH)


def test_a_time_budget_holds_for_the_confirmation_as_well(tmp_path):
    ledger = ledger_of(tmp_path / "storage", GRID | {"time_budget": 60})
    run_trials(ledger, in_process=True, started=time.monotonic() - 61)
    assert not ledger.done()


def test_failures_that_a_search_has_learned_from_count_as_ended(capsys, tmp_path):
    sweep = {"search": "random", "num_trials": 3, "parameters": {"generator.members": [4, 12]}}
    ledger = ledger_of(tmp_path / "storage", sweep)
    for state in ("finished", "failed"):
        trial = ledger.ask()
        ended = {"objective": 0.5} if state == "finished" else {"reason": "the loss is inf"}
        ledger.record(replace(trial, state=state, seconds=1.0, **ended))
    shown = SweepDisplay(ledger, live=False)
    assert [trial.state for trial in shown.trials.values() if trial.state == "failed"] == ["failed"]
