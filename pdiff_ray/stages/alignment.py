"""Stage `alignment`: the zoo's members, permuted so that their units stand where a reference has them.

A permuted member is the same function, and keeps what is known of it. Members that the generator does not learn are
permuted as well, but no reference depends on them. State is saved with each block of members.

Shapes: K members of D values.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.common.seeds import derive_seed
from pdiff_ray.config.schema import Experiment
from pdiff_ray.data.sources import describe
from pdiff_ray.evaluation.recalibration import START
from pdiff_ray.networks.alignment import match
from pdiff_ray.networks.build import blank_images
from pdiff_ray.networks.subset import Subset
from pdiff_ray.networks.symmetries import Symmetries, find_symmetries
from pdiff_ray.stages.base import load_state, untrained_network
from pdiff_ray.stages.context import Context
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.parameters import ParameterStore
from pdiff_ray.storage.trees import save_tree

STATE_FILE = "orders.safetensors"
BLOCK_VALUES = 2**26  # of vectors and products of their units, which are in memory at a time
MAX_ROUNDS = 20  # of the evolving mean


def members_of(artifacts: Mapping[str, Artifact]) -> ParameterStore:
    """Returns the members as generators and baselines see them: aligned, if the experiment has them aligned."""
    return ParameterStore(artifacts.get("alignment", artifacts["zoo"]))


def symmetries_of(experiment: Experiment, network: nn.Module, subset: Subset) -> Symmetries:
    """Returns the permutation symmetries of an experiment's members.

    Args:
        network: of the experiment, in eval mode.

    Raises:
        ConfigError: it has none, with the reason.
    """
    blank = blank_images(describe(experiment.data))
    images = torch.randn(blank.shape, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last
    )
    recalibrated = experiment.zoo.batchnorm == "recalibrated"
    try:
        return find_symmetries(
            network,
            subset,
            images,
            lambda name: recalibrated and name.rpartition(".")[2] in START,
            scales=experiment.alignment.scales == "balanced",
        )
    except ConfigError as error:
        raise ConfigError(
            f"alignment.method: {experiment.network.name} cannot be aligned, as {error}; set it to none, or generate "
            "whole networks (zoo.subset: all, and zoo.batchnorm included or recalibrated)"
        ) from None


def build(experiment: Experiment, artifacts: Mapping[str, Artifact], context: Context) -> None:
    """Matches all members to the reference, and stores them permuted."""
    artifact, started = artifacts["alignment"], time.monotonic()
    work = _Alignment(experiment, artifacts, context)
    work.match()
    work.store()
    info = {
        "members": len(work.ids),
        "groups": len(work.symmetries.groups),
        "units": sum(group.size for group in work.symmetries.groups),
        "scaled": len(work.symmetries.scalings),
        "not_permuted": list(work.symmetries.obstacles),
        "rounds": work.round,
        "spread_before": work.spread(work.identity),
        "spread": work.spread(work.orders),
    }
    parts = ParameterStore(artifact).manifest_entries(work.ids)
    artifact.commit({"subset.json": work.subset.to_json().encode()}, info, time.monotonic() - started, parts)


class _Alignment:
    """Members of a zoo, and the orders of their units by now.

    Attributes:
        orders: (K, size) of each group, for all members in the order of `ids`.
        before: as the reference of this round has them.
        round, done: rounds that are over, and members that have been matched in the next one.
    """

    def __init__(self, experiment: Experiment, artifacts: Mapping[str, Artifact], context: Context) -> None:
        self.experiment, self.artifact, self.context = experiment, artifacts["alignment"], context
        self.zoo = ParameterStore(artifacts["zoo"])
        self.subset, self.ids = self.zoo.subset(), self.zoo.ids
        network = untrained_network(experiment).eval()
        self.symmetries = symmetries_of(experiment, network, self.subset)
        products = sum(place.size**2 for group in self.symmetries.groups for place in group.places)
        self.block = max(1, BLOCK_VALUES // (2 * self.subset.size + products))
        state = load_state(self.artifact, STATE_FILE)
        self.identity = self.symmetries.identity(len(self.ids))
        self.round, self.done, self.finished = 0, 0, False
        self.before, self.orders = self.identity, [order.clone() for order in self.identity]
        if state:
            self.round, self.done, self.finished = state["round"], state["done"], state["finished"]
            self.before, self.orders = self._cut(state["before"]), self._cut(state["orders"])

    def match(self) -> None:
        """Matches all members, round by round."""
        rounds = MAX_ROUNDS if self.experiment.alignment.reference == "mean" else 1
        while not self.finished:
            reference = self._reference()
            seed = derive_seed(self.experiment.zoo.seed or 0, "alignment", self.round)
            while self.done < len(self.ids):
                rows = slice(self.done, self.done + self.block)
                start = [order[rows] for order in self.orders]
                found = match(self.symmetries, reference, self._vectors(rows), seed, start)
                for order, new in zip(self.orders, found, strict=True):
                    order[rows] = new
                self.done = min(rows.stop, len(self.ids))
                self._save()
                note = f"round {self.round + 1}" if rounds > 1 else "matching"
                self.context.progress("alignment", self.done, len(self.ids), note)
            changed = any(not torch.equal(*pair) for pair in zip(self.before, self.orders, strict=True))
            self.round, self.done = self.round + 1, 0
            self.finished = self.round == rounds or (self.round > 1 and not changed)
            self.before = [order.clone() for order in self.orders]
            self._save()

    def store(self) -> None:
        """Stores the members permuted, with their rows, as far as they are not there."""
        store = ParameterStore(self.artifact)
        for rows in self._blocks(range(len(self.ids))):
            due = [row for row in rows if self.ids[row] not in store.ids]
            if due:
                records = self.zoo.records([self.ids[row] for row in due])
                vectors = self._permuted(due, self.orders).numpy()
                permuted = [
                    replace(record, vector=vector, statistics=None)  # which have the units of the zoo's vectors
                    for record, vector in zip(records, vectors, strict=True)
                ]
                store.append(permuted, self.subset)
            self.context.progress("alignment", rows[-1] + 1, len(self.ids), "writing")

    def spread(self, orders: Sequence[Tensor]) -> float:
        """Returns the root mean square distance of the learned members to their mean, their units in these orders."""
        squares = 0.0
        for rows in self._blocks(self._learned):
            squares += float(self._vectors(rows).double().square().sum())
        total = squares / len(self._learned) - float(self._mean(orders).square().sum())
        return math.sqrt(max(0.0, total))

    @functools.cached_property
    def _learned(self) -> list[int]:
        """The places among all members of those that are learned."""
        places = {id_: place for place, id_ in enumerate(self.ids)}
        return [places[id_] for id_ in self.experiment.split.learned]

    def _reference(self) -> Tensor:
        """Returns what members are matched to in this round (D,): the first that is learned, later their mean."""
        if self.round:
            return self._mean(self.before).float()
        return self._vectors(self._learned[:1])[0]

    def _mean(self, orders: Sequence[Tensor]) -> Tensor:
        total = torch.zeros(self.subset.size, dtype=torch.double)
        for rows in self._blocks(self._learned):
            total += self._permuted(rows, orders).sum(0, dtype=torch.double)
        return total / len(self._learned)

    def _permuted(self, rows: Sequence[int], orders: Sequence[Tensor]) -> Tensor:
        return self.symmetries.permuted(self._vectors(rows), [order[list(rows)] for order in orders])

    def _vectors(self, rows: slice | Sequence[int]) -> Tensor:
        ids = self.ids[rows] if isinstance(rows, slice) else [self.ids[row] for row in rows]
        vectors = torch.from_numpy(self.zoo.vectors(ids))
        return self.symmetries.balanced(vectors) if self.symmetries.scalings else vectors

    def _blocks(self, rows: Sequence[int]) -> Iterator[Sequence[int]]:
        for start in range(0, len(rows), self.block):
            yield rows[start : start + self.block]

    def _cut(self, orders: Tensor) -> list[Tensor]:
        return [order.contiguous() for order in orders.split([group.size for group in self.symmetries.groups], 1)]

    def _save(self) -> None:
        state = {
            "round": self.round,
            "done": self.done,
            "finished": self.finished,
            "before": torch.cat(self.before, 1),
            "orders": torch.cat(self.orders, 1),
        }
        self.artifact.save_work(STATE_FILE, save_tree(state))
