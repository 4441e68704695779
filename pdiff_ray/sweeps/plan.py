"""What a sweep will take: trials, distinct artifacts, time and memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from pdiff_ray.config.schema import Experiment
from pdiff_ray.estimates.estimate import Cost, Estimator
from pdiff_ray.storage.artifacts import finished
from pdiff_ray.sweeps.ledger import Ledger, needs
from pdiff_ray.sweeps.trial import Trial


@dataclass(frozen=True)
class SweepPlan:
    """The plan of a sweep.

    Attributes:
        trials: those that are known, in order.
        counts: by stage: distinct artifacts that the trials to run need, and how many of them are there.
        concurrent: how many trials this machine runs at a time.
        networks: an experiment for each network and subset.
        costs: of the artifacts to build; trials that a search has yet to choose are in them once.
        first_s: seconds of devices for the bases and zoos that are built before the trials.
        trials_s: seconds of devices in trials.
        wall_s: seconds on this machine.
    """

    trials: list[Trial]
    counts: dict[str, tuple[int, int]]
    concurrent: int
    networks: dict[str, Experiment]
    costs: list[Cost]
    first_s: float
    trials_s: float
    wall_s: float

    @property
    def memory(self) -> float:
        """Bytes of the largest process."""
        return max((cost.memory for cost in self.costs), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON values; seconds leave out what is unknown."""
        return {
            "trials": [{"number": trial.number, "values": trial.text} for trial in self.trials],
            "artifacts": {stage: {"needed": needed, "there": there} for stage, (needed, there) in self.counts.items()},
            "device_seconds": self.first_s + self.trials_s,
            "wall_seconds": self.wall_s,
            "memory_bytes": self.memory,
        }


def make_plan(ledger: Ledger, estimator: Estimator) -> SweepPlan:
    """Plans what is left. What a search will try is unknown: it is counted as the file has it."""
    sweep, workers, todo = ledger.sweep, ledger.file.experiment.resources.workers, ledger.planned()
    new = 0 if sweep.search == "grid" else ledger.total - sum(number < ledger.total for number in ledger.trials)
    known = {trial.number: trial for trial in todo} | ledger.trials
    trials = [known[number] for number in sorted(known)]
    counts, concurrent = needs(ledger).counts, _concurrent(ledger, len(todo) + new)
    first = ("base", "zoo") if sweep.search == "grid" or not ledger.varies_zoos else ()
    experiments = [ledger.possible(trial) for trial in todo]
    if new:
        experiments.append(ledger.experiments(Trial(-1, {}, tuple(range(sweep.repeats)))))
        counted = sweep.repeats if first else 0  # `needs` knows of one trial, where all have the same zoos
        for stage in counts.keys() - set(first):
            needed, there = counts[stage]
            counts[stage] = (needed + new * sweep.repeats - counted, there)
    built = set(finished(ledger.storage))
    networks, seen, durations = dict[str, Experiment](), set[str](), list[float]()
    costs, before = list[Cost](), {stage: list[Cost]() for stage in ("base", "zoo")}  # of all; before the trials
    for repeats in experiments:
        durations.append(0.0)
        for e in repeats:
            networks.setdefault(f"{e.network.name}, {e.zoo.subset}", e)
            artifacts = ledger.artifacts(e)
            missing = [stage for stage, a in artifacts.items() if a.key not in seen and a.folder not in built]
            seen.update(artifact.key for artifact in artifacts.values())
            alone = {"actors": 1, "cpus_per_actor": e.resources.cpus_per_trial}  # a trial runs in one process
            as_trial = e.model_copy(update={"resources": e.resources.model_copy(update=alone)})
            for stage, cost in estimator.costs(as_trial, artifacts, missing).items():
                costs.append(cost)
                if stage in first:
                    before[stage].append(cost)
                else:
                    durations[-1] += cost.device_s or 0.0  # what is unknown is told apart
    durations += durations[-1:] * (new - 1)
    bases_s, zoos_s = (sum(cost.device_s or 0.0 for cost in found) for found in before.values())
    trials_s, processes = sum(durations), min(workers, sum(cost.processes for cost in before["zoo"]))
    wall_s = sum(cost.seconds or 0.0 for cost in before["base"]) + max([trials_s / concurrent, *durations])
    wall_s += zoos_s / max(1, processes)  # all workers share the runs of all zoos
    return SweepPlan(trials, counts, concurrent, networks, costs, bases_s + zoos_s, trials_s, wall_s)


def _concurrent(ledger: Ledger, trials: int) -> int:
    """Returns how many trials run at a time on this machine."""
    resources, most = ledger.file.experiment.resources, ledger.sweep.max_concurrent
    places = (os.cpu_count() or 1) // resources.cpus_per_trial
    if gpus := torch.cuda.device_count():
        each = resources.gpus_per_trial
        if each == "auto":  # one each, or shares for as many as are asked for
            places = min(places, max(gpus, most or 1))
        elif each:
            places = min(places, int(gpus / each))
    return max(1, min(places, trials, most or trials))
