"""Stage `zoo`: trains the K networks whose subsets the generator learns from.

The zoo is made by runs, each of which keeps members one after another: one run (trajectory), several from the base
(branches), or one per member from fresh initialisations (independent). Workers share the runs; every run saves its
state with each part of members it writes, so that only members in flight are ever made again.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pdiff_ray.artifacts import Artifact, load_tree, save_tree
from pdiff_ray.config import Experiment, Zoo
from pdiff_ray.data import Dataset, steps_per_epoch
from pdiff_ray.errors import StorageError
from pdiff_ray.frontier import Frontier
from pdiff_ray.judge import Judge, judged
from pdiff_ray.networks import build_network
from pdiff_ray.optimization import Trainer, autocast
from pdiff_ray.seeds import derive_seed, seed_global
from pdiff_ray.sources import describe
from pdiff_ray.stages import Context
from pdiff_ray.stages.base import load_network, open_dataset, train_network
from pdiff_ray.store import ParameterStore, Record, stamp
from pdiff_ray.subset import Subset, resolve

SHARING_FILE = "sharing.json"


@dataclass(frozen=True)
class Run:
    """A training run and the members it keeps, in order; interleaved, so that the first K of a zoo are of all runs."""

    index: int
    member_ids: range


def runs_of(config: Zoo) -> list[Run]:
    count = {"trajectory": 1, "branches": config.branches, "independent": config.members}[config.regime]
    return [Run(index, range(index, config.members, count)) for index in range(count)]


def zoo_subset(experiment: Experiment) -> Subset:
    """The generated subset of the experiment's network.

    Raises:
        ConfigError: the network cannot be built or the rule does not fit it.
    """
    plain = experiment.network.model_copy(update={"pretrained": False})
    return subset_of(experiment, build_network(plain, describe(experiment.data)))


def subset_of(experiment: Experiment, network: nn.Module) -> Subset:
    """The generated subset of a network of the experiment."""
    return resolve(experiment.zoo.subset, network, experiment.zoo.batchnorm)


def build(experiment: Experiment, artifacts: Mapping[str, Artifact], context: Context, shift: int = 0) -> None:
    """Trains this worker's share of the missing members and stores each with its judgement.

    The worker that sees the zoo complete commits it.

    Args:
        shift: the worker that the first run falls to, so that workers share several zoos.
    """
    artifact, config = artifacts["zoo"], experiment.zoo
    started = time.monotonic()
    dataset = open_dataset(experiment, context)
    subset = zoo_subset(experiment)
    store = ParameterStore(artifact)
    present = set(store.ids)

    @functools.cache
    def judge() -> Judge:
        return make_judge(experiment, load_network(experiment, artifacts), subset, dataset, context)

    # Shared out before looking at what is there: workers look at different times.
    for run in runs_of(config)[(context.rank - shift) % context.world :: context.world]:
        if present.issuperset(run.member_ids):
            continue
        members = (
            _independent(experiment, dataset, subset, run, context)
            if config.regime == "independent"
            else _from_base(experiment, artifacts, dataset, subset, run, present, judge(), context)
        )
        for records, state in members:
            store.append(records, subset)
            if state is not None:
                artifact.save_work(f"run-{run.index}.safetensors", save_tree(state))
    if set(ParameterStore(artifact).ids).issuperset(range(config.members)):
        finish(artifact, subset, config.members, time.monotonic() - started)


def finish(artifact: Artifact, subset: Subset, members: int, seconds: float) -> None:
    """Commits the zoo from its part files."""
    store, ids = ParameterStore(artifact), range(members)
    records = store.records(ids)
    accuracies = np.array([r.test_accuracy for r in records if r.judged])
    info: dict[str, Any] = {"members": members, "parameters": subset.size, "tensors": subset.names}
    with contextlib.suppress(StorageError):  # another worker that saw the zoo complete has committed it
        info |= json.loads(artifact.load_work(SHARING_FILE) or "{}")
    if len(accuracies):
        info |= {"mean_test_accuracy": float(accuracies.mean()), "std_test_accuracy": float(accuracies.std())}
    artifact.commit({"subset.json": subset.to_json().encode()}, info, seconds, store.manifest_entries(ids))


def _independent(
    experiment: Experiment, dataset: Dataset, subset: Subset, run: Run, context: Context
) -> Iterator[tuple[list[Record], None]]:
    """One member, trained from its own initialisation by the recipe of the base."""
    (id_,) = run.member_ids
    seed = derive_seed(experiment.zoo.seed or 0, "independent", id_)
    alone = Context(context.device, context.cache)  # a worker's networks are its own: no data-parallel training
    network, _ = train_network(experiment, dataset, alone, ("member", seed), f"member {id_}")
    vector = subset.flatten(network.state_dict())
    judgement = make_judge(experiment, network, subset, dataset, context).judge(vector[None])[0]
    record = Record(id_, "original", vector=vector.cpu().numpy(), seed=seed, **stamp())
    context.progress("zoo", id_ + 1, experiment.zoo.members, f"test {judgement.test_accuracy:.1%}")
    yield [judged(record, judgement)], None


def _from_base(
    experiment: Experiment,
    artifacts: Mapping[str, Artifact],
    dataset: Dataset,
    subset: Subset,
    run: Run,
    present: set[int],
    judge: Judge,
    context: Context,
) -> Iterator[tuple[list[Record], dict[str, Any]]]:
    """Members of a run that trains the subset on from the base; in stacks, each with the state after its last one."""
    config = experiment.zoo
    every = config.steps_per_member
    if every == "epoch":
        every = steps_per_epoch(len(dataset.train), config.batch_size)
    num_steps = config.warmup_steps + every * len(run.member_ids)
    seed = derive_seed(config.seed or 0, "zoo", run.index)
    frontier = training_frontier(experiment, subset, judge, len(runs_of(config)) * num_steps)
    why_full = None if isinstance(frontier, Frontier) else frontier
    sharing = {**describe_sharing(judge), "full_steps": why_full}
    artifacts["zoo"].save_work(SHARING_FILE, json.dumps(sharing).encode())
    note = f"runs whole: {judge.split.reason}" if judge.split.reason else f"{judge.split.shared:.0%} shared"
    context.progress("zoo", 0, config.members, f"{note}; full steps: {why_full}" if why_full else note)
    network = load_network(experiment, artifacts).to(context.device)
    training = SubsetTraining(experiment, network, subset, num_steps, context.device, frontier)
    saved = artifacts["zoo"].load_work(f"run-{run.index}.safetensors")
    kept = training.restore(load_tree(saved, f"zoo run {run.index}")) if saved is not None else 0
    pending: list[Record] = []
    for position in range(kept, len(run.member_ids)):
        id_ = run.member_ids[position]
        first = config.warmup_steps + every * position if position else 0
        stop = config.warmup_steps + every * (position + 1)
        training.run(dataset, first, stop, seed)
        record = Record(id_, "original", vector=training.vector().cpu().numpy(), seed=seed, step=stop, **stamp())
        if id_ not in present:
            pending.append(record)
        if len(pending) == experiment.evaluation.stack or id_ == run.member_ids[-1]:
            yield _judged(pending, judge), training.state(position + 1)
            pending = []
        context.progress("zoo", (position + 1) * len(runs_of(config)), config.members, f"run {run.index}, step {stop}")


def _judged(records: list[Record], judge: Judge) -> list[Record]:
    if not records:
        return []
    vectors = np.stack([np.asarray(record.vector) for record in records])
    return [judged(r, j) for r, j in zip(records, judge.judge(torch.from_numpy(vectors)), strict=True)]


def make_judge(experiment: Experiment, network: nn.Module, subset: Subset, dataset: Dataset, context: Context) -> Judge:
    """The judge of networks that differ from `network` in `subset`, by the experiment's policies."""
    policy, batch_size = experiment.zoo.batchnorm, experiment.evaluation.batch_size
    return Judge(network, subset, dataset, context.device, policy, batch_size, cache=context.cache)


def training_frontier(experiment: Experiment, subset: Subset, judge: Judge, steps: int) -> Frontier | str:
    """What training of the subset reads instead of images; or why each of its steps is a full pass.

    Args:
        judge: of the networks to train.
        steps: of all runs that would read it.
    """
    if reason := full_steps(experiment, subset):
        return reason
    config = experiment.zoo
    return judge.at(config.precision).frontier("train", reads=steps * config.batch_size)


def full_steps(experiment: Experiment, subset: Subset) -> str | None:
    """Why training steps of the zoo cannot read what its networks share of an image; None if they can."""
    policy = experiment.zoo.batchnorm
    if policy == "recalibrated" or any(entry.kind == "buffer" for entry in subset.entries):
        return f"layers train with the statistics of their batches: zoo.batchnorm {policy}"
    if experiment.data.augment != "none" or experiment.data.train_noise:
        # A prefix per batch would save nothing: full passes record no gradients before the subset either.
        return "images vary: data.augment or data.train_noise"
    return None


def describe_sharing(judge: Judge) -> dict[str, Any]:
    """What a manifest says of the computation that networks share: its part of a pass's FLOPs, or why there is none."""
    return {"shared": judge.split.shared, "runs_whole": judge.split.reason}


class SubsetTraining:
    """Training of a subset with everything else frozen.

    BatchNorm layers whose statistics stay the base's are in eval mode, so that what is trained is what will be judged.
    Those whose statistics belong to the vector, or all if they will be measured anew, are in train mode.

    Args:
        network: has the values to start from, and receives those trained.
        frontier: of the training images, to be read instead of them; or why not (`training_frontier`).
    """

    def __init__(
        self,
        experiment: Experiment,
        network: nn.Module,
        subset: Subset,
        num_steps: int,
        device: torch.device,
        frontier: Frontier | str,
    ) -> None:
        config = experiment.zoo
        self.config, self.network, self.subset, self.device = config, network, subset, device
        self.frontier = frontier if isinstance(frontier, Frontier) else None
        network.train(config.batchnorm == "recalibrated")
        for entry in subset.entries:
            if entry.kind == "buffer":
                network.get_submodule(entry.name.rpartition(".")[0]).train()
        chosen = {entry.name for entry in subset.entries if entry.kind == "parameter"}
        parameters = []
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in chosen)
            if name in chosen:
                parameters.append(parameter)
        optimizer = config.optimizer
        if config.regime == "independent":  # whole networks are trained, and trained further, by the base's recipe
            base = experiment.training.optimizer
            optimizer = base.model_copy(update={"lr": base.lr / 10, "schedule": "constant"})
        self.trainer = Trainer(parameters, optimizer, num_steps, "training of the zoo")

    def run(self, dataset: Dataset, start: int, stop: int, seed: int) -> None:
        """Steps `start` to `stop` - 1, of the batches that `seed` gives."""
        loss = torch.zeros(())
        for step, (forward, labels) in enumerate(self._batches(dataset, start, stop, seed), start):
            seed_global(seed, "step", step)
            with autocast(self.device, self.config.precision):
                logits = forward()
            loss = functional.cross_entropy(logits.float(), labels)
            self.trainer.step(loss, step)
        self.trainer.check(loss.item(), stop, "zoo.optimizer.lr")

    def _batches(
        self, dataset: Dataset, start: int, stop: int, seed: int
    ) -> Iterator[tuple[Callable[[], Tensor], Tensor]]:
        """What computes the logits (B, M) of a batch, and its labels (B,)."""
        if self.frontier is None:
            batches = dataset.training_batches(self.config.batch_size, start, stop, self.device, seed)
            for images, labels in batches:
                yield functools.partial(self.network, images), labels
            return
        suffix = self.frontier.network.suffix
        tensors = {name: self.network.get_parameter(name) for name in self.subset.names}
        for frontier, labels in self.frontier.batches(
            dataset.training_positions(self.config.batch_size, start, stop, seed)
        ):
            yield functools.partial(suffix, frontier, tensors), labels

    def vector(self) -> Tensor:
        """The subset as it is now (D,)."""
        return self.subset.flatten(self.network.state_dict())

    def load(self, vector: Tensor) -> None:
        """Puts a vector (D,) into the network."""
        self.network.load_state_dict(self.subset.unflatten(vector), strict=False)

    def state(self, kept: int) -> dict[str, Any]:
        """What `restore` needs to go on after `kept` members."""
        # Statistics outside of the subset move as well where BatchNorm is in train mode.
        moving = {} if self.config.batchnorm == "frozen" else dict(self.network.named_buffers())
        trained = {n: p for n, p in self.network.named_parameters() if p.requires_grad}
        return {"kept": kept, "tensors": {**trained, **moving}, "optimizer": self.trainer.state()}

    def restore(self, state: dict[str, Any]) -> int:
        self.network.load_state_dict(state["tensors"], strict=False)
        self.trainer.load_state(state["optimizer"])
        return state["kept"]
