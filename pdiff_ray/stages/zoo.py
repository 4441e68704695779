"""Stage `zoo`: trains the K networks whose subsets the generator learns from.

The zoo is made by runs, each of which keeps members one after another: one run (trajectory), several from the base
(branches), or one per member from fresh initialisations (independent). Workers share the runs; every run saves its
state with each part of members it writes, so that only members in flight are ever made again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
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

    # Shared out before looking at what is there: workers look at different times.
    own = runs_of(config)[(context.rank - shift) % context.world :: context.world]
    missing = [run for run in own if not present.issuperset(run.member_ids)]
    if config.regime == "independent":
        for run in missing:
            store.append([_independent(experiment, dataset, subset, run, context)], subset)
    elif missing:
        judge = make_judge(experiment, load_network(experiment, artifacts), subset, dataset, context)
        for records, states in _from_base(experiment, artifacts, dataset, subset, missing, present, judge, context):
            store.append(records, subset)
            for run, state in states.items():
                artifact.save_work(_state_file(run), save_tree(state))
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


def _independent(experiment: Experiment, dataset: Dataset, subset: Subset, run: Run, context: Context) -> Record:
    """One member, trained from its own initialisation by the recipe of the base."""
    (id_,) = run.member_ids
    seed = derive_seed(experiment.zoo.seed or 0, "independent", id_)
    alone = Context(context.device, context.cache)  # a worker's networks are its own: no data-parallel training
    network, _ = train_network(experiment, dataset, alone, ("member", seed), f"member {id_}")
    vector = subset.flatten(network.state_dict())
    judgement = make_judge(experiment, network, subset, dataset, context).judge(vector[None])[0]
    record = Record(id_, "original", vector=vector.cpu().numpy(), seed=seed, **stamp())
    context.progress("zoo", id_ + 1, experiment.zoo.members, f"test {judgement.test_accuracy:.1%}")
    return judged(record, judgement)


def _from_base(
    experiment: Experiment,
    artifacts: Mapping[str, Artifact],
    dataset: Dataset,
    subset: Subset,
    runs: Sequence[Run],
    present: set[int],
    judge: Judge,
    context: Context,
) -> Iterator[tuple[list[Record], dict[Run, dict[str, Any]]]]:
    """Members of runs that train the subset on from the base; some at a time, each time with the runs' states."""
    config = experiment.zoo
    every = config.steps_per_member
    if every == "epoch":
        every = steps_per_epoch(len(dataset.train), config.batch_size)
    num_runs = len(runs_of(config))
    num_steps = {run: config.warmup_steps + every * len(run.member_ids) for run in runs}
    frontier = training_frontier(experiment, subset, judge, num_runs * max(num_steps.values()))
    why_full = None if isinstance(frontier, Frontier) else frontier
    sharing = {**describe_sharing(judge), "full_steps": why_full}
    artifacts["zoo"].save_work(SHARING_FILE, json.dumps(sharing).encode())
    most = 1
    if len(runs) > 1 and not why_full:
        most = judge.at(config.precision).trained_together(config.batch_size, config.stack)
    note = f"runs whole: {judge.split.reason}" if judge.split.reason else f"{judge.split.shared:.0%} shared"
    note += f"; full steps: {why_full}" if why_full else ""
    note += f"; up to {min(most, len(runs))} runs as one program" if most > 1 else ""
    context.progress("zoo", 0, config.members, note)
    kept = {run: state["kept"] if (state := _load_state(artifacts["zoo"], run)) else 0 for run in runs}
    for together in _in_step(kept, most):
        seeds = [derive_seed(config.seed or 0, "zoo", run.index) for run in together]
        network, steps = load_network(experiment, artifacts).to(context.device), num_steps[together[0]]
        training = SubsetTraining(experiment, network, subset, steps, context.device, frontier, len(together))
        if kept[together[0]]:
            training.restore([state for run in together if (state := _load_state(artifacts["zoo"], run))])
        pending: list[Record] = []
        last = len(together[0].member_ids) - 1
        for position in range(kept[together[0]], last + 1):
            first = config.warmup_steps + every * position if position else 0
            stop = config.warmup_steps + every * (position + 1)
            training.run(dataset, first, stop, seeds)
            ids = [run.member_ids[position] for run in together]
            for id_, vector, seed in zip(ids, training.vectors().cpu().numpy(), seeds, strict=True):
                if id_ not in present:
                    pending.append(Record(id_, "original", vector=vector, seed=seed, step=stop, **stamp()))
            if len(pending) >= experiment.evaluation.stack or position == last:
                saved = training.states(position + 1)
                yield _judged(pending, judge), dict(zip(together, saved, strict=True))
                pending = []
            names = ", ".join(str(run.index) for run in together)
            context.progress("zoo", (position + 1) * num_runs, config.members, f"run {names}, step {stop}")
        del training, network  # before the next ones are made


def _in_step(kept: Mapping[Run, int], most: int) -> Iterator[list[Run]]:
    """Runs that are equally long and have kept equally many members, at most so many at a time."""

    def phase(run: Run) -> tuple[int, int]:
        return len(run.member_ids), kept[run]

    for _, group in itertools.groupby(sorted(kept, key=phase), phase):
        same = list(group)
        yield from (same[start : start + most] for start in range(0, len(same), most))


def _state_file(run: Run) -> str:
    return f"run-{run.index}.safetensors"


def _load_state(zoo: Artifact, run: Run) -> dict[str, Any] | None:
    saved = zoo.load_work(_state_file(run))
    return None if saved is None else load_tree(saved, f"zoo run {run.index}")


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
    """Training of networks in a subset, with everything else frozen.

    BatchNorm layers whose statistics stay the base's are in eval mode, so that what is trained is what will be judged.
    Those whose statistics belong to the vector, or all if they will be measured anew, are in train mode.

    Args:
        network: has the values to start from, and what is frozen; where BatchNorm is in train mode its statistics
            change.
        frontier: of the training images, to be read instead of them; or why not (`training_frontier`).
        count: n, networks that are trained as one program; more than one only with a frontier.
    """

    def __init__(
        self,
        experiment: Experiment,
        network: nn.Module,
        subset: Subset,
        num_steps: int,
        device: torch.device,
        frontier: Frontier | str,
        count: int = 1,
    ) -> None:
        config = experiment.zoo
        self.config, self.network, self.subset, self.device, self.count = config, network, subset, device, count
        self.frontier = frontier if isinstance(frontier, Frontier) else None
        if count > 1 and self.frontier is None:
            raise ValueError(f"{count} networks cannot be trained as one program with full steps: {frontier}")
        network.requires_grad_(False).train(config.batchnorm == "recalibrated")
        for entry in subset.entries:
            if entry.kind == "buffer":
                network.get_submodule(entry.name.rpartition(".")[0]).train()
        self.tensors = {
            entry.name: nn.Parameter(_copies(network.get_parameter(entry.name).detach(), count))
            for entry in subset.entries
            if entry.kind == "parameter"
        }
        optimizer = config.optimizer
        if config.regime == "independent":  # whole networks are trained, and trained further, by the base's recipe
            base = experiment.training.optimizer
            optimizer = base.model_copy(update={"lr": base.lr / 10, "schedule": "constant"})
        self.trainer = Trainer(list(self.tensors.values()), optimizer, num_steps, "training of the zoo")

    def run(self, dataset: Dataset, start: int, stop: int, seeds: Sequence[int]) -> None:
        """Steps `start` to `stop` - 1, of the batches that each network's seed gives."""
        loss = torch.zeros(())
        batches = self._kept(dataset, start, stop, seeds) if self.frontier else self._full(dataset, start, stop, *seeds)
        for step, (logits, labels) in enumerate(batches, start):
            # The mean over a network's images, and their sum, as no network's gradient depends on another one's.
            loss = functional.cross_entropy(logits.float(), labels) * self.count
            self.trainer.step(loss, step)
        self.trainer.check(loss.item(), stop, "zoo.optimizer.lr")

    def _full(self, dataset: Dataset, start: int, stop: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (B, M) and labels (B,) of each batch, from the images."""
        batches = dataset.training_batches(self.config.batch_size, start, stop, self.device, seed)
        for step, (images, labels) in enumerate(batches, start):
            seed_global(seed, "step", step)
            own = {name: tensor.squeeze(0) for name, tensor in self.tensors.items()}
            with autocast(self.device, self.config.precision):
                logits = functional_call(self.network, own, (images,))
            yield logits, labels

    def _kept(self, dataset: Dataset, start: int, stop: int, seeds: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (n B, M) and labels (n B,) of each step's batches, from the frontier."""
        assert self.frontier is not None
        suffix = self.frontier.network.suffix
        positions = [dataset.training_positions(self.config.batch_size, start, stop, seed) for seed in seeds]
        chosen = (np.concatenate(batches) for batches in zip(*positions, strict=True))
        for frontier, labels in self.frontier.batches(chosen):
            with autocast(self.device, self.config.precision):
                if self.count == 1:
                    logits = suffix(frontier, {name: tensor.squeeze(0) for name, tensor in self.tensors.items()})
                else:
                    apart = tuple(tensor.unflatten(0, (self.count, -1)) for tensor in frontier)
                    logits = torch.vmap(suffix)(apart, self.tensors).flatten(0, 1)
            yield logits, labels

    def vectors(self) -> Tensor:
        """The subsets as they are now (n, D)."""
        fixed = self.network.state_dict()
        own = [{name: tensor[i] for name, tensor in self.tensors.items()} for i in range(self.count)]
        return torch.stack([self.subset.flatten({**fixed, **tensors}) for tensors in own])

    @torch.no_grad()
    def load(self, vectors: Tensor) -> None:
        """Goes on from vectors (n, D)."""
        values = self.subset.unflatten(vectors)
        for name, tensor in self.tensors.items():
            tensor.copy_(values[name])
        statistics = {name: value[0] for name, value in values.items() if name not in self.tensors}
        self.network.load_state_dict(statistics, strict=False)

    def states(self, kept: int) -> list[dict[str, Any]]:
        """What `restore` needs to go on after `kept` members, of each network."""
        # Statistics outside of the subset move as well where BatchNorm is in train mode.
        moving = {} if self.config.batchnorm == "frozen" else dict(self.network.named_buffers())
        optimizer = self.trainer.state()
        return [
            {
                "kept": kept,
                "tensors": {**moving, **{name: tensor[i] for name, tensor in self.tensors.items()}},
                "optimizer": {
                    index: {key: value if key == "step" else value[i] for key, value in state.items()}
                    for index, state in optimizer.items()
                },
            }
            for i in range(self.count)
        ]

    @torch.no_grad()
    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        """Goes on from states (n)."""
        for name, tensor in self.tensors.items():
            tensor.copy_(torch.stack([state["tensors"][name] for state in states]))
        statistics = {name: value for name, value in states[0]["tensors"].items() if name not in self.tensors}
        self.network.load_state_dict(statistics, strict=False)
        first = states[0]["optimizer"]
        self.trainer.load_state(
            {
                index: {
                    key: value if key == "step" else torch.stack([state["optimizer"][index][key] for state in states])
                    for key, value in own.items()
                }
                for index, own in first.items()
            }
        )


def _copies(tensor: Tensor, count: int) -> Tensor:
    """A tensor so many times; once, it keeps its layout in memory, which layers compute by."""
    return tensor.clone()[None] if count == 1 else tensor.expand(count, *tensor.shape).contiguous()
