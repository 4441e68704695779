"""The trials of a sweep: which are to be run, what is known of them, and how one is run.

A sweep keeps a small file per trial in `sweeps/<key>/trials/` of its storage: what was chosen and what came out. The
results themselves are ordinary artifacts. These files are all that a search and a scheduler remember, so that a sweep
that was killed goes on as if it had not been.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from dataclasses import asdict, dataclass, replace

from pdiff_ray.common.errors import ConfigError, StorageError
from pdiff_ray.config import loading
from pdiff_ray.config.schema import Experiment
from pdiff_ray.config.sweep import Parameter, Sweep, SweepFile, describe
from pdiff_ray.stages.table import STAGES, artifacts_of
from pdiff_ray.storage.artifacts import Artifact, finished
from pdiff_ray.storage.checks import Findings
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.sealed import read_listed, read_sealed, seal
from pdiff_ray.sweeps import search
from pdiff_ray.sweeps.trial import RESULTS, Trial, best_setting, has_results

AGAIN = "delete it to run its trial again"
SETTING, AS_IN_THE_FILE = "setting", "as in the file"  # what a search's confirmation varies


class Ledger:
    """All trials of a sweep, in storage.

    Args:
        storage: the experiment's, where it is open already.
    """

    def __init__(self, file: SweepFile, storage: Storage | None = None) -> None:
        self.file, self.sweep = file, file.sweep
        self.storage = storage or Storage(file.experiment.storage_uri)
        self._confirmations: dict[int, Ledger] = {}  # by the trial that is compared
        plain = artifacts_of(file.experiment, self.storage)["report"].key
        text = json.dumps([plain, file.sweep.keyed()], sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.trials: dict[int, Trial] = {}
        # All combinations of a grid with the first seeds, then all with the next.
        grid = self.sweep.grid() if self.sweep.search == "grid" else []
        self._combinations = [(assignment, (repeat,)) for repeat in range(self.sweep.repeats) for assignment in grid]
        names = records(self.storage, self.folder)
        for name, trial in zip(
            names, self.storage.map(lambda name: read_trial(self.storage, name), names), strict=True
        ):
            if not self._belongs(trial):
                values = describe(trial.assignment)
                raise StorageError(
                    f"{self.storage.location(name)}: damaged: {values} is not what the sweep tries; {AGAIN}"
                )
            self.trials[trial.number] = trial
        self._again = self.open_trials()

    def _belongs(self, trial: Trial) -> bool:
        """Returns whether a trial has values that the sweep offers."""
        if self._combinations:
            known = self._combinations[trial.number : trial.number + 1]
            return not known or known[0] == (trial.assignment, trial.repeats)
        offered = self.sweep.parameters
        return all(
            name in offered
            and (value in offered[name].values or (isinstance(value, float | int) and offered[name].range))
            for name, value in trial.assignment.items()
        )

    @property
    def folder(self) -> str:
        return f"sweeps/{self.key}"

    @property
    def total(self) -> int:
        """Trials in all, done and to come."""
        return len(self._combinations) or self.sweep.num_trials or 0

    def open_trials(self) -> list[Trial]:
        """Trials to run again: interrupted, crashed or without their results, and those of a grid that failed.

        What the values of a search's trial caused is a result, from which it has learned.
        """
        if self.trials:
            finished(self.storage)  # all are looked for together
        return [t for _, t in sorted(self.trials.items()) if t.number < self.total and self._is_open(t)]

    def _is_open(self, trial: Trial) -> bool:
        if trial.state == "failed":
            return trial.crashed or self.sweep.search == "grid"
        if trial.state == "finished":
            return not all(has_results(self.artifacts(experiment)) for experiment in self.possible(trial))
        return trial.state == "running"

    def planned(self) -> list[Trial]:
        """Returns the trials that are known to be run, in order; of a search these are the ones that were begun."""
        new = [Trial(n, *c) for n, c in enumerate(self._combinations) if n not in self.trials]
        return sorted([*self.open_trials(), *new], key=lambda trial: trial.number)

    def done(self) -> list[Trial]:
        """Trials with a result, in order."""
        return [t for _, t in sorted(self.trials.items()) if t.state != "running" and t.number < self.total]

    def ask(self) -> Trial | None:
        """Chooses the next trial to run and records that it is running; returns None if none is left."""
        if self._again:
            trial = replace(self._again.pop(0), state="running", reason=None, crashed=False)
        else:
            number = next(n for n in itertools.count() if n not in self.trials)
            if number >= self.total:
                return None
            if self._combinations:
                trial = Trial(number, *self._combinations[number])
            else:
                assignment = search.suggest(self.sweep, number, self.done())
                trial = Trial(number, assignment, tuple(range(self.sweep.repeats)))
        self.record(trial)
        return trial

    def record(self, trial: Trial) -> None:
        """Remembers what is known of a trial."""
        self.trials[trial.number] = trial
        self.storage.write(f"{self.folder}/trials/{trial.number:05d}.json", seal(asdict(trial)))

    def experiments(self, trial: Trial) -> list[Experiment]:
        """Returns the experiments of a trial, one per repeat.

        Raises:
            ConfigError: a search has combined values that do not fit together.
        """
        found = [self.file.vary(trial.assignment, repeat) for repeat in trial.repeats]
        if self.varies_zoos and self.sweep.search != "grid":
            # A trial trains its zoo alone, and a base's key says how many workers trained it.
            alone = {"resources": self.file.experiment.resources.model_copy(update={"workers": 1})}
            found = [experiment.model_copy(update=alone) for experiment in found]
        return found

    def possible(self, trial: Trial) -> list[Experiment]:
        """Returns the experiments of a trial; none if a search has combined values that do not fit together."""
        try:
            return self.experiments(trial)
        except ConfigError:
            return []

    @property
    def varies_zoos(self) -> bool:
        """Whether trials may need different zoos, repeats apart."""
        return any(path.split(".")[0] in ("seed", "data", "network", "training", "zoo") for path in self.sweep.paths)

    def artifacts(self, experiment: Experiment) -> dict[str, Artifact]:
        return artifacts_of(experiment, self.storage)

    def confirmation(self) -> Ledger | None:
        """Returns the sweep that compares a search's best setting with the file's own, with seeds that it has not seen.

        None while the search goes on, and for a grid.
        """
        best, sweep = self.best(), self.sweep
        if sweep.search == "grid" or not sweep.confirm or best is None or len(self.done()) < self.total:
            return None
        if best.number not in self._confirmations:
            self._confirmations[best.number] = self._confirm(best)
        return self._confirmations[best.number]

    def _confirm(self, best: Trial) -> Ledger:
        sweep = self.sweep
        raw = self.file.with_seeds(self.file.raw, self.file.experiment, sweep.repeats)
        settings = {AS_IN_THE_FILE: {}, f"trial {best.number}": self.file.fields(best.assignment)}
        shared = {
            name: getattr(sweep, name) for name in ("seeds", "metric", "max_concurrent", "max_retries", "time_budget")
        }
        compared = Sweep(parameters={SETTING: Parameter(variants=settings)}, repeats=sweep.confirm, **shared)
        experiment = loading.parse_experiment(raw, self.file.path)
        return Ledger(SweepFile(experiment, compared, raw, self.file.path), self.storage)

    def best(self) -> Trial | None:
        """Returns the first trial of the best setting, of a search the only one, or None."""
        best = best_setting(self.done(), self.sweep.maximize)
        return best.trials[0] if best else None


def records(storage: Storage, folder: str) -> list[str]:
    """Returns the names of the files of a sweep's trials."""
    return [name for name in storage.list(f"{folder}/trials") if re.search(r"/\d+\.json$", name)]


def read_trial(storage: Storage, name: str) -> Trial:
    """Returns the trial that a file records.

    Raises:
        StorageError: it is damaged, or another trial's.
    """
    trial = read_sealed(storage, name, Trial, AGAIN)
    if not trial.repeats or not name.endswith(f"/{trial.number:05d}.json"):
        raise StorageError(f"{storage.location(name)}: damaged: it is of trial {trial.number}; {AGAIN}")
    # An earlier version told schedulers of infinity, too.
    return replace(trial, curve=tuple((rung, value) for rung, value in trial.curve if math.isfinite(value)))


def verify_sweep(storage: Storage, folder: str) -> Findings:
    """Reads all that is in a sweep's folder."""
    found = Findings()
    for name in records(storage, folder):
        found.check(read_trial, storage, name)
    found.check(read_listed, storage, folder)
    return found


@dataclass(frozen=True)
class Needs:
    """The distinct artifacts that trials need, as far as they are known beforehand.

    Attributes:
        jobs: an experiment for each distinct zoo that is missing, with its missing stages of base and zoo. A search
            over zoos has none: its trials build what they need.
        counts: by stage: how many distinct ones, and how many of them are there.
    """

    jobs: list[tuple[Experiment, list[str]]]
    counts: dict[str, tuple[int, int]]


def needs(ledger: Ledger) -> Needs:
    """Finds the distinct artifacts that the trials which are to be run need."""
    trials = ledger.planned()
    if ledger.sweep.search != "grid" and not ledger.varies_zoos and len(ledger.done()) < ledger.total:
        trials.append(Trial(-1, {}, tuple(range(ledger.sweep.repeats))))  # all have the zoos of this one
    there, jobs = set(finished(ledger.storage)), dict[str, tuple[Experiment, list[str]]]()
    seen: dict[str, dict[str, bool]] = {stage: {} for stage in STAGES}
    for experiment in itertools.chain.from_iterable(ledger.possible(trial) for trial in trials):
        artifacts = ledger.artifacts(experiment)
        for stage, artifact in artifacts.items():
            if artifact.key not in seen[stage]:
                seen[stage][artifact.key] = artifact.folder in there
        stages = [stage for stage in ("base", "zoo") if not seen[stage][artifacts[stage].key]]
        whole = all(seen[stage][artifacts[stage].key] for stage in RESULTS)
        if stages and not whole and (ledger.sweep.search == "grid" or not ledger.varies_zoos):
            jobs.setdefault(artifacts["zoo"].key, (experiment, stages))
    known = {stage: keys for stage, keys in seen.items() if keys or STAGES[stage].wanted(ledger.file.experiment)}
    return Needs(list(jobs.values()), {stage: (len(keys), sum(keys.values())) for stage, keys in known.items()})
