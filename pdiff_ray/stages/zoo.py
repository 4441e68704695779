"""Stage `zoo`: trains the K networks whose subsets the generator learns from.

The zoo is made by runs, each of which keeps members one after another: one run and a second one to compare with
(trajectory), several from the base (branches), or one per member from fresh initialisations (independent). Workers
share the runs; every run saves its state with each part of members it writes, after some members or seconds, so that
only members in flight are ever made again.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pdiff_ray.common.seeds import derive_seed
from pdiff_ray.config.schema import Experiment, Zoo
from pdiff_ray.data.dataset import steps_per_epoch
from pdiff_ray.data.sources import describe
from pdiff_ray.evaluation.diagnostics import diagnose_members
from pdiff_ray.evaluation.judge import Judge, judged
from pdiff_ray.networks.build import blank_images
from pdiff_ray.networks.frontier import Kept
from pdiff_ray.networks.subset import Subset, resolve
from pdiff_ray.stages.base import load_network, load_state, train_network, untrained_network
from pdiff_ray.stages.context import Context
from pdiff_ray.stages.judging import base_judge, describe_sharing
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.matrix import StoredVectors, rows_at_a_time
from pdiff_ray.storage.parameters import ParameterStore, Record, stamp
from pdiff_ray.storage.sealed import unseal
from pdiff_ray.storage.trees import save_tree
from pdiff_ray.training.subset import SubsetTraining, training_frontier

SHARING_FILE = "sharing.json"


@dataclass(frozen=True)
class TrainingRun:
    """A training run and the members it keeps, in order; interleaved, so that the first K of a zoo are of all runs.

    Attributes:
        places: of the members, among all that the run passes with `zoo.steps_per_member` steps between them.
    """

    index: int
    member_ids: range
    places: tuple[int, ...]


def runs_of(config: Zoo) -> list[TrainingRun]:
    """Returns the runs that a zoo is made by."""
    count = {"trajectory": 1, "branches": config.branches, "independent": config.members}[config.regime]
    shares = [range(index, config.members, count) for index in range(count)]
    runs = [TrainingRun(index, ids, tuple(range(len(ids)))) for index, ids in enumerate(shares)]
    if second := config.second_run_ids:  # as long as the first one: members lie elsewhere at another stage of training
        places = tuple((place + 1) * config.members // len(second) - 1 for place in range(len(second)))
        runs.append(TrainingRun(1, second, places))
    return runs


def group_of(id_: int, config: Zoo) -> str:
    """Returns the group of a member in the zoo's rows."""
    return "second_run" if id_ in config.second_run_ids else "original"


def zoo_subset(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> Subset:
    """Returns the generated subset of the experiment's network: that of stored members, else the one by its rule.

    Raises:
        ConfigError: the network cannot be built or the rule does not fit it.
    """
    store = ParameterStore(artifacts["zoo"])  # rules may have chosen other layers in an earlier version
    return store.subset() if store.ids else subset_of(experiment, untrained_network(experiment))


def subset_of(experiment: Experiment, network: nn.Module) -> Subset:
    """Returns the generated subset of a network of the experiment."""
    images = blank_images(describe(experiment.data))
    return resolve(experiment.zoo.subset, network, experiment.zoo.batchnorm, images)


def build(experiment: Experiment, artifacts: Mapping[str, Artifact], context: Context, shift: int = 0) -> None:
    """Trains this worker's share of the missing members and stores each with its judgement.

    A worker that is alone commits the zoo. Of several, one does by `finish` when all have ended: two that saw it
    complete at the same moment would both.

    Args:
        shift: the worker that the first run falls to, so that workers share several zoos.
    """
    artifact, config = artifacts["zoo"], experiment.zoo
    started = time.monotonic()
    subset = zoo_subset(experiment, artifacts)
    store = ParameterStore(artifact)
    present = set(store.ids)
    # Shared out before looking at what is there: workers look at different times.
    own = runs_of(config)[(context.rank - shift) % context.world :: context.world]
    missing = [run for run in own if not present.issuperset(run.member_ids)]
    if missing and config.regime == "independent":
        judge = base_judge(experiment, artifacts, subset, context)
        for run in missing:
            for id_ in run.member_ids:
                store.append([_independent(experiment, judge, id_, context)], subset)
    elif missing:
        _FromBase(experiment, artifacts, subset, store, context).train(missing)
    if context.world == 1:
        finish(experiment, artifacts, time.monotonic() - started)


def finish(experiment: Experiment, artifacts: Mapping[str, Artifact], seconds: float) -> None:
    """Commits the zoo if all its members are there."""
    store, config = ParameterStore(artifacts["zoo"]), experiment.zoo
    if set(store.ids).issuperset(range(config.size)):
        commit(artifacts["zoo"], store.subset(), config, seconds)


def commit(
    artifact: Artifact, subset: Subset, config: Zoo, seconds: float, about: Mapping[str, Any] | None = None
) -> None:
    """Commits the zoo from its part files.

    Args:
        about: what else the manifest says of it.
    """
    store, ids = ParameterStore(artifact), range(config.size)
    records = store.records(ids)
    accuracies = np.array([r.test_accuracy for r in records if r.judged])
    info: dict[str, Any] = {"members": config.members, "parameters": subset.size, "tensors": subset.names}
    if saved := artifact.load_work(SHARING_FILE):
        info |= unseal(saved, dict[str, Any], artifact.storage.location(artifact.work(SHARING_FILE)), "delete it")
    info |= about or {}
    if len(accuracies):
        info |= {"mean_test_accuracy": float(accuracies.mean()), "std_test_accuracy": float(accuracies.std())}
    vectors = StoredVectors.open(store, range(config.members))
    info["diagnosis"] = diagnose_members(vectors, records[: config.members]).to_list()
    artifact.commit({"subset.json": subset.to_json().encode()}, info, seconds, store.manifest_entries(ids))


def _independent(experiment: Experiment, judge: Judge, id_: int, context: Context) -> Record:
    """Returns one member, trained from its own initialisation by the recipe of the base.

    Args:
        judge: of networks that differ from the base in the subset, which is all that is kept of a member.
    """
    seed = derive_seed(experiment.zoo.seed or 0, "independent", id_)
    alone = Context(context.device, context.cache)  # a worker's networks are its own: no data-parallel training
    network, _ = train_network(experiment, judge.dataset, alone, ("member", seed), f"member {id_}")
    vector = judge.subset.flatten(network.state_dict())
    judgement = judge.judge(vector[None])[0]
    record = Record(id_, "original", vector=vector.cpu().numpy(), seed=seed, **stamp())
    context.progress("zoo", id_ + 1, experiment.zoo.members, f"test {judgement.test_accuracy:.1%}")
    return judged(record, judgement)


class _FromBase:
    """The training of runs on from the base in the subset, as many at a time as one program may hold."""

    def __init__(
        self,
        experiment: Experiment,
        artifacts: Mapping[str, Artifact],
        subset: Subset,
        store: ParameterStore,
        context: Context,
    ) -> None:
        self.experiment, self.artifacts, self.subset, self.context = experiment, artifacts, subset, context
        self.zoo, self.store, self.present = artifacts["zoo"], store, set(store.ids)
        self.judge = base_judge(experiment, artifacts, subset, context)
        self.dataset = self.judge.dataset
        config = experiment.zoo
        every = config.steps_per_member
        self.every = steps_per_epoch(len(self.dataset.train), config.batch_size) if every == "epoch" else every
        self.done, self.share = 0, 1.0  # members of complete runs; this worker's part of all, as others are as far
        self.seconds, self.unshared = 0.0, 0.0  # of steps, and what full passes would have taken

    def train(self, runs: Sequence[TrainingRun]) -> None:
        """Trains and stores the members of `runs` that were not present; some at a time, with their runs' states."""
        config, judge = self.experiment.zoo, self.judge
        reads = sum(run.places[-1] + 1 for run in runs_of(config)) * self.every  # about, by all workers together
        kept = training_frontier(self.experiment, self.subset, judge, reads)
        most = 1
        if len(runs) > 1 and kept.frontier is not None:
            capacity = judge.at(config.precision).capacity
            most = capacity.trained_together(config.batch_size, config.runs_per_program)
        whole = judge.partitioned.reason
        note = f"runs whole: {whole}" if whole else f"{judge.partitioned.shared:.0%} shared"
        note += f"; full steps: {kept.reason}" if kept.reason else ""
        note += f"; up to {min(most, len(runs))} runs as one program" if most > 1 else ""
        self.share = config.size / sum(len(run.member_ids) for run in runs)
        self.context.progress("zoo", 0, config.size, note)
        made = {run: self._made(run) for run in runs}

        def phase(run: TrainingRun) -> tuple[tuple[int, ...], int]:
            return run.places, made[run]

        for _, group in itertools.groupby(sorted(runs, key=phase), phase):  # in step, as those of one program must be
            same = list(group)
            for start in range(0, len(same), most):
                self._train_as_one(same[start : start + most], made[same[0]], kept)

    def _train_as_one(self, runs: Sequence[TrainingRun], made: int, kept: Kept) -> None:
        """Trains and stores the members of runs of the same places, of which each has made so many."""
        config, frontier = self.experiment.zoo, kept.frontier
        seeds = [derive_seed(config.seed or 0, "zoo", run.index) for run in runs]
        names = ", ".join(str(run.index) for run in runs)
        network = load_network(self.experiment, self.artifacts).to(self.context.device)
        training = SubsetTraining(
            self.experiment, network, self.subset, self._steps(runs[0]), self.context.device, frontier, len(runs)
        )
        states = [state for run in runs if (state := self._state(run)) and state["kept"] == made] if made else []
        if len(states) < len(runs):  # another builder has gone on from them meanwhile, or has finished
            made = 0
        else:
            training.restore(states)
        pending: list[Record] = []
        saved = time.monotonic()
        last = len(runs[0].member_ids) - 1
        most = min(self.experiment.evaluation.networks_per_task, rows_at_a_time(self.subset.size))
        for position in range(made, last + 1):
            stop = self._step_of(runs[0], position)
            first = self._step_of(runs[0], position - 1) if position else 0
            started = time.monotonic()
            training.run(self.dataset, first, stop, seeds)
            self.seconds += time.monotonic() - started
            if frontier is not None:  # whose images full passes would have computed
                images = len(runs) * (stop - first) * config.batch_size
                self.unshared += images * frontier.seconds / len(frontier)
            ids = [run.member_ids[position] for run in runs]
            for id_, vector, seed in zip(ids, training.vectors().cpu().numpy(), seeds, strict=True):
                if id_ not in self.present:
                    pending.append(Record(id_, group_of(id_, config), vector=vector, seed=seed, step=stop, **stamp()))
            if len(pending) >= most or position == last or self.context.due(saved):
                self._store(pending)
                pending = []
                for run, state in zip(runs, training.states(position + 1), strict=True):
                    self.zoo.save_work(_state_file(run), save_tree(state))
                self._save_sharing(kept.reason)
                saved = time.monotonic()
            done = round((self.done + (position + 1) * len(runs)) * self.share)
            self.context.progress("zoo", done, config.size, f"run {names}, step {stop}")
        self.done += (last + 1) * len(runs)

    def _store(self, members: Sequence[Record]) -> None:
        """Stores members with their judgements."""
        if members:
            vectors = torch.from_numpy(np.stack([np.asarray(member.vector) for member in members]))
            self.store.append(list(map(judged, members, self.judge.judge(vectors))), self.subset)

    def _save_sharing(self, full_steps: str | None) -> None:
        """Saves, for the manifest, what sharing has achieved in this worker since it was started."""
        saving = 1 + self.unshared / self.seconds if self.unshared else None
        sharing = {**describe_sharing(self.judge), "full_steps": full_steps, "steps_saving": saving}
        self.zoo.save_work(SHARING_FILE, json.dumps(sharing).encode())

    def _made(self, run: TrainingRun) -> int:
        """Returns how many members of a run are there, with its state behind the last; 0 if one has gone since."""
        kept: int = state["kept"] if (state := self._state(run)) else 0
        return kept if self.present.issuperset(run.member_ids[:kept]) else 0

    def _state(self, run: TrainingRun) -> dict[str, Any] | None:
        return load_state(self.zoo, _state_file(run))

    def _step_of(self, run: TrainingRun, position: int) -> int:
        """Returns after how many steps a run keeps its member at a position."""
        return self.experiment.zoo.warmup_steps + self.every * (run.places[position] + 1)

    def _steps(self, run: TrainingRun) -> int:
        return self._step_of(run, -1)


def _state_file(run: TrainingRun) -> str:
    return f"run-{run.index}.safetensors"
