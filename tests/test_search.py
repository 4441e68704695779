"""Random and Optuna searches: what they suggest is a function of the seed and of what is known."""

from dataclasses import replace

import pytest
import yaml
from helpers import TINY

from pdiff_ray.config import sweep as space
from pdiff_ray.sweeps.ledger import Ledger
from pdiff_ray.sweeps.search import study_of, suggest
from pdiff_ray.sweeps.trial import Trial

PARAMETERS = {
    "generator.autoencoder.lr": {"loguniform": [1e-4, 1e-2]},
    "generator.diffusion.ema_decay": {"uniform": [0.5, 0.99]},
    "generator.diffusion.denoiser": ["mlp", "cnn"],
    "generator.diffusion.depth": {"int": [1, 4], "when": {"generator.diffusion.denoiser": "mlp"}},
}


def search_file(folder, search="optuna", **more):
    path = folder / "search.yaml"
    sweep = {"search": search, "num_trials": 30, "parameters": PARAMETERS, **more}
    path.write_text(yaml.safe_dump({"name": "s", "base": str(TINY), "sweep": sweep}))
    return space.load(path, [f"storage={folder}"])


def score(assignment):
    """Best with a denoiser of depth 3 and a learning rate of 0.001."""
    far = abs(assignment["generator.autoencoder.lr"] / 1e-3 - 1)
    return assignment.get("generator.diffusion.depth", 0) % 4 - far - assignment["generator.diffusion.ema_decay"]


def run(ledger, count):
    for _ in range(count):
        trial = ledger.ask()
        for experiment in ledger.experiments(trial):
            for stage in ("evaluation", "report"):  # what was built is looked for when a sweep goes on
                ledger.artifacts(experiment)[stage].commit({}, {}, seconds=0.0)
        ledger.record(replace(trial, state="finished", objective=score(trial.assignment)))


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_a_search_that_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path, search):
    whole = Ledger(search_file(tmp_path, search))
    run(whole, 30)
    assert whole.ask() is None
    other = tmp_path / "other"
    other.mkdir()
    for finished in (6, 8):  # launches that are killed within a trial
        halted = Ledger(search_file(other, search))
        run(halted, finished)
        halted.ask()
    halted = Ledger(search_file(other, search))
    assert (len(halted.trials), len(halted.done())) == (15, 14)
    run(halted, 16)
    assert [t.assignment for t in halted.done()] == [t.assignment for t in whole.done()]
    assert halted.best() == whole.best()


def test_values_lie_in_their_ranges_and_conditions_hold(tmp_path):
    file = search_file(tmp_path, "random")
    for number in range(40):
        assignment = suggest(file.sweep, number, [])
        assert 1e-4 <= assignment["generator.autoencoder.lr"] <= 1e-2
        assert ("generator.diffusion.depth" in assignment) == (assignment["generator.diffusion.denoiser"] == "mlp")
        assert file.vary(assignment).generator.diffusion.denoiser == assignment["generator.diffusion.denoiser"]


def test_tpe_learns_from_the_trials(tmp_path):
    guided, blind = (Ledger(search_file(tmp_path, search)) for search in ("optuna", "random"))
    for ledger in (guided, blind):
        run(ledger, 30)
    late = [sum(t.objective for t in ledger.done()[15:]) for ledger in (guided, blind)]
    assert late[0] > late[1]


def test_another_seed_is_another_search(tmp_path):
    assert suggest(search_file(tmp_path).sweep, 0, []) != suggest(search_file(tmp_path, seed=1).sweep, 0, [])


def test_the_study_tells_finished_stopped_and_failed_trials_apart(tmp_path):
    sweep = search_file(tmp_path).sweep
    trials = [Trial(n, suggest(sweep, n, []), (0,)) for n in range(3)]
    done = [
        replace(trials[0], state="finished", objective=0.5),
        replace(trials[1], state="stopped", objective=0.1, curve=((1, 0.05), (2, 0.1))),
        replace(trials[2], state="failed", reason="no", curve=((1, 0.9),)),
    ]
    study = study_of(sweep, done)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "PRUNED", "PRUNED"]
    assert study.best_value == 0.5
    assert study.trials[1].intermediate_values == {1: 0.05, 2: 0.1}
    assert not study.trials[2].intermediate_values, "it is worse than what was stopped, however far it came"


def diverging(assignment):
    """The score, or nothing above a learning rate of 0.002."""
    return None if assignment["generator.autoencoder.lr"] > 2e-3 else score(assignment)


@pytest.mark.parametrize("crashed", [False, True])
def test_a_search_keeps_away_from_what_fails(tmp_path, crashed):
    """By its values, or in all of its attempts, as where a network is too large for the machine."""
    late = {}
    for search in ("optuna", "random"):
        trials = []
        sweep = search_file(tmp_path, search, num_trials=40).sweep
        for number in range(40):
            trial = Trial(number, suggest(sweep, number, trials), (0,), "finished")
            if (found := diverging(trial.assignment)) is None:
                trial = replace(trial, state="failed", curve=((1, 9.0),), crashed=crashed)
            trials.append(replace(trial, objective=found))
        late[search] = sum(trial.state == "failed" for trial in trials[20:])
    assert late["optuna"] < late["random"] / 2


def test_more_trials_continue_a_search(tmp_path):
    few = Ledger(search_file(tmp_path, num_trials=5))
    run(few, 5)
    more = Ledger(search_file(tmp_path, num_trials=8))
    assert more.key == few.key
    assert len(more.done()) == 5
    assert more.ask().number == 5
