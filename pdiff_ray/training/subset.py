"""Training of a subset on from the base, of one network or of several as one program.

Steps read what the networks share of an image, where that is kept; else each is a full pass.

Shapes: B images of a batch, M classes, D values in the subset, n networks that are trained as one program.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pdiff_ray.common.devices import autocast, differentiable_in_vmap, enough_memory
from pdiff_ray.common.seeds import seed_global
from pdiff_ray.config.schema import Experiment
from pdiff_ray.data.dataset import Dataset
from pdiff_ray.evaluation.judge import Judge
from pdiff_ray.networks.build import load_tensors
from pdiff_ray.networks.frontier import Frontier, Kept
from pdiff_ray.networks.partition import call_with
from pdiff_ray.networks.subset import Subset
from pdiff_ray.training.trainer import Trainer


def training_frontier(experiment: Experiment, subset: Subset, judge: Judge, steps: int) -> Kept:
    """Returns what training of the subset reads instead of images, or why each of its steps is a full pass.

    Args:
        judge: of the networks to train.
        steps: of all runs that would read it.
    """
    if reason := full_steps(experiment, subset):
        return Kept(reason=reason)
    return judge.at(experiment.zoo.precision).frontier("train", reads=steps * experiment.zoo.batch_size)


def full_steps(experiment: Experiment, subset: Subset) -> str | None:
    """Returns why training steps of the zoo cannot read what its networks share of an image; None if they can."""
    policy = experiment.zoo.batchnorm
    if policy == "recalibrated" or any(entry.kind == "buffer" for entry in subset.entries):
        return f"layers train with the statistics of their batches: zoo.batchnorm {policy}"
    if experiment.data.augment != "none" or experiment.data.train_noise:
        # A prefix per batch would save nothing: full passes record no gradients before the subset either.
        return "images vary: data.augment or data.train_noise"
    return None


class SubsetTraining:
    """Training of networks in a subset, with everything else frozen.

    BatchNorm layers whose statistics stay the base's are in eval mode, so that what is trained is what will be judged.
    Those whose statistics belong to the vector, or all if they will be measured anew, are in train mode.

    Args:
        network: has the values to start from, and what is frozen; where BatchNorm is in train mode its statistics
            change.
        frontier: of the training images, to be read instead of them (`training_frontier`).
        count: n, networks that are trained as one program; more than one only with a frontier.
    """

    def __init__(
        self,
        experiment: Experiment,
        network: nn.Module,
        subset: Subset,
        num_steps: int,
        device: torch.device,
        frontier: Frontier | None = None,
        count: int = 1,
    ) -> None:
        config = experiment.zoo
        self.config, self.network, self.subset, self.device = config, network, subset, device
        self.frontier, self.count = frontier, count
        if count > 1 and frontier is None:
            raise ValueError(f"{count} networks cannot be trained as one program without a frontier")
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
        """Takes the steps `start` to `stop` - 1, on the batches that each network's seed gives."""
        loss = torch.zeros(())
        if self.frontier is None:
            batches = self._full(dataset, start, stop, *seeds)
        else:
            batches = self._kept(self.frontier, dataset, start, stop, seeds)
        with enough_memory("training of the subset", "zoo.runs_per_program or zoo.batch_size"):
            for step, (logits, labels) in enumerate(batches, start):
                # The mean over a network's images, and their sum, as no network's gradient depends on another one's.
                loss = functional.cross_entropy(logits.float(), labels) * self.count
                self.trainer.step(loss, step)
        self.trainer.check_loss(loss.item(), stop, "zoo.optimizer.lr")

    def _full(self, dataset: Dataset, start: int, stop: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields logits (B, M) and labels (B,) of each batch, from the images."""
        batches = dataset.training_batches(self.config.batch_size, start, stop, self.device, seed)
        for step, (images, labels) in enumerate(batches, start):
            seed_global(seed, "step", step)
            own = {name: tensor.squeeze(0) for name, tensor in self.tensors.items()}
            with autocast(self.device, self.config.precision):
                logits = call_with(self.network, own, images)
            yield logits, labels

    def _kept(
        self, kept: Frontier, dataset: Dataset, start: int, stop: int, seeds: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields logits (n B, M) and labels (n B,) of each step's batches, from the frontier."""
        suffix = kept.network.suffix
        positions = [dataset.training_positions(self.config.batch_size, start, stop, seed) for seed in seeds]
        chosen = (np.concatenate(batches) for batches in zip(*positions, strict=True))
        for frontier, labels in kept.batches(chosen):
            with autocast(self.device, self.config.precision):
                if self.count == 1:
                    logits = suffix(frontier, {name: tensor.squeeze(0) for name, tensor in self.tensors.items()})
                else:
                    apart = tuple(tensor.unflatten(0, (self.count, -1)) for tensor in frontier)
                    with differentiable_in_vmap(self.device):
                        logits = torch.vmap(suffix)(apart, self.tensors).flatten(0, 1)
            yield logits, labels

    def vectors(self) -> Tensor:
        """Returns the subsets as they are now (n, D)."""
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
        load_tensors(self.network, statistics, strict=False)

    def states(self, kept: int) -> list[dict[str, Any]]:
        """Returns what `restore` needs to go on after `kept` members, of each network."""
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
        load_tensors(self.network, statistics, strict=False)
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
    """Returns a tensor so many times; once, it keeps its layout in memory, which layers compute by."""
    return tensor.clone()[None] if count == 1 else tensor.expand(count, *tensor.shape).contiguous()
