"""Stage `evaluation`: judges the generated networks beside the originals and the baselines any claim must beat.

- original: the zoo's members, judged when they were made (an imported zoo's are judged here);
- ensemble: the average of the members' parameters;
- noise_added: members with Gaussian noise, in standard deviations of each tensor's values;
- fine_tuned: members trained a little further;
- generated: the samples.

Work is cut into stacks of networks; each is evaluated by `Evaluator`, in this process or by an actor of a pool.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from pdiff_ray.common.seeds import derive_seed
from pdiff_ray.config.schema import Experiment
from pdiff_ray.evaluation.judge import Seconds, judged
from pdiff_ray.evaluation.similarity import distances
from pdiff_ray.evaluation.summary import summarize
from pdiff_ray.networks.frontier import Frontier
from pdiff_ray.stages.base import load_network
from pdiff_ray.stages.context import Context
from pdiff_ray.stages.judging import base_judge, describe_sharing
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.parameters import ParameterStore, Record, stamp
from pdiff_ray.training.subset import SubsetTraining, training_frontier


class Stack(list[Record]):
    """Networks that are evaluated together.

    Attributes:
        sharing: what the evaluated networks shared (`judging.describe_sharing`).
        counts: numbers to be added up over all stacks: seconds of prefix and suffix, and what the precision changed.
    """

    def __init__(
        self,
        records: Iterable[Record],
        sharing: Mapping[str, Any] | None = None,
        counts: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(records)
        self.sharing, self.counts = sharing or {}, counts or {}


MapStacks = Callable[[Sequence[Stack]], Iterable[Stack]]

SUMMARY_FILE = "summary.json"


def build(experiment: Experiment, artifacts: Mapping[str, Artifact], context: Context) -> None:
    """Judges what is not judged yet, in any order, and commits all rows with their summary."""
    judge_missing(experiment, artifacts, context)
    finish(experiment, artifacts)


def judge_missing(
    experiment: Experiment,
    artifacts: Mapping[str, Artifact],
    context: Context,
    map_stacks: MapStacks | None = None,
) -> None:
    """Judges what is not judged yet, in any order.

    Args:
        map_stacks: evaluates stacks elsewhere (a pool of actors), so that no vector is read here; default: here, one
            after another.
    """
    artifact, zoo = artifacts["evaluation"], ParameterStore(artifacts["zoo"])
    store = ParameterStore(artifact)
    subset, present = zoo.subset(), set(store.ids)
    wanted = networks_to_judge(experiment, zoo)
    actors = experiment.resources.actors if map_stacks else 1
    stacks = make_stacks([r for r in wanted if r.id not in present], experiment.evaluation.stack, actors)
    if not stacks:
        return
    done, before = len(present), time.monotonic()
    for stack in map_stacks(stacks) if map_stacks else _here(experiment, artifacts, context, stacks):
        # With its rows, so that an evaluation that is interrupted says what all of it took.
        now = time.monotonic()
        store.append(stack, subset, {"sharing": stack.sharing, "counts": {**stack.counts, "seconds": now - before}})
        done, before = done + len(stack), now
        context.progress("evaluation", done, len(wanted), "networks")


def finish(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> None:
    """Commits the rows of all networks, which have been judged, with their summary."""
    started, artifact, zoo = time.monotonic(), artifacts["evaluation"], ParameterStore(artifacts["zoo"])
    store, members = ParameterStore(artifact), zoo.vectors(range(experiment.num_members))
    samples = ParameterStore(artifacts["samples"]).vectors()
    about = artifacts["base"].manifest()["info"]
    ids = range(len(members) + len(made_networks(experiment)))
    summary = summarize(
        store.records(ids), about["test_images"], about["num_classes"], _spread(members), _spread(samples)
    )
    parts = store.manifest_entries(ids)
    sharing, counts = _taken(store, parts)
    seconds = counts.pop("seconds", 0.0) + time.monotonic() - started
    artifact.commit(
        {SUMMARY_FILE: json.dumps(summary, indent=1).encode()},
        {"networks": len(ids), "test_images": about["test_images"], **sharing, **counts},
        seconds,
        parts,
    )


def _taken(store: ParameterStore, parts: Iterable[str]) -> tuple[dict[str, Any], Counter[str]]:
    """What the networks of part files shared, and what judging them took: twice what two launches did at once."""
    sharing: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    for part in parts:
        about = store.about(part)
        sharing |= about.get("sharing", {})  # nothing, in a part of an earlier version
        counts.update(about.get("counts", {}))
    return sharing, counts


def networks_to_judge(experiment: Experiment, zoo: ParameterStore) -> list[Record]:
    """All networks of the evaluation, without vectors: originals first, numbered on from there."""
    originals = zoo.records(range(experiment.num_members))
    if experiment.evaluation.precision != "float32":  # in which members were judged when they were made
        originals = [replace(record, wrong=None) for record in originals]
    return [*originals, *made_networks(experiment)]


def made_networks(experiment: Experiment) -> list[Record]:
    """All networks of the evaluation but the originals, from which they are numbered on."""
    config, count = experiment.evaluation, experiment.num_members
    made: list[Record] = []

    def add(group: str, parent: int | None = None, sigma: float | None = None) -> None:
        id_ = count + len(made)
        seed = derive_seed(experiment.sampling.seed or 0, group, str(sigma), id_)
        made.append(Record(id_, group, parent=parent, sigma=sigma, seed=seed))

    add("ensemble")
    for sigma in config.noise_sigmas:
        for parent in _spread_over(count, config.noise_networks):
            add("noise_added", parent, sigma)
    for parent in _spread_over(count, min(config.fine_tuned_networks, count)):
        add("fine_tuned", parent)
    for sample in range(experiment.sampling.samples):
        add("generated", parent=sample)
    return made


def _spread_over(count: int, picks: int) -> list[int]:
    return [index * count // picks for index in range(picks)]


def make_stacks(records: Sequence[Record], size: int, actors: int = 1) -> list[Stack]:
    """Stacks of up to `size` networks of one group, in the order in which they are to be evaluated.

    What takes longest comes first: networks that are trained, one each. Where several actors share the others, stacks
    become smaller toward the end, so that all end together (guided self-scheduling, Polychronopoulos and Kuck 1987),
    but no smaller than a quarter of `size`: each takes a file, and a prefix where none is kept. Networks that are
    judged already are only compared, which takes no time, and come last.
    """
    stacks = [Stack([r]) for r in records if r.group == "fine_tuned"]
    left = sum(not r.judged and r.group != "fine_tuned" for r in records)
    for judged_already, group in itertools.product((False, True), ("generated", "noise_added", "ensemble", "original")):
        same = [r for r in records if (r.judged, r.group) == (judged_already, group)]
        while same:
            count = size if judged_already else min(size, max(math.ceil(size / 4), math.ceil(left / actors)))
            stacks.append(Stack(same[:count]))
            same, left = same[count:], left - len(stacks[-1])
    return stacks


def _here(
    experiment: Experiment, artifacts: Mapping[str, Artifact], context: Context, stacks: Sequence[Stack]
) -> Iterator[Stack]:
    evaluator = Evaluator(experiment, artifacts, context)
    for stack in stacks:
        yield evaluator.evaluate(stack)


class Evaluator:
    """Makes and judges the networks of stacks; holds what they share on its device."""

    def __init__(self, experiment: Experiment, artifacts: Mapping[str, Artifact], context: Context) -> None:
        self.experiment, self.artifacts, self.context = experiment, artifacts, context
        zoo = ParameterStore(artifacts["zoo"])
        self.subset = zoo.subset()
        self.members = zoo.vectors(range(experiment.num_members))
        self.samples = ParameterStore(artifacts["samples"])
        self.judge = base_judge(experiment, artifacts, self.subset, context)
        self.member_distance = _spread(self.members)

    def evaluate(self, stack: Sequence[Record]) -> Stack:
        """The records with judgement and distance to the nearest member; without vectors."""
        records = list(stack)
        vectors = np.stack([self._vector(record) for record in records])
        pending = [i for i, record in enumerate(records) if not record.judged]
        counts: dict[str, float] = {}
        sharing: dict[str, Any] | None = None
        if pending:
            precision = self.experiment.evaluation.precision
            judge = self.judge.at(precision)
            judge.seconds = Seconds()
            chosen = torch.from_numpy(vectors[pending])
            for index, judgement in zip(pending, judge.judge(chosen), strict=True):
                records[index] = judged(records[index], judgement)
            sharing = describe_sharing(judge)
            counts = {f"{part}_seconds": seconds for part, seconds in asdict(judge.seconds).items()}
            compared = [row for row, index in enumerate(pending) if self._compared(records[index])]
            if compared:
                changed = judge.predictions(chosen[compared]) != self.judge.predictions(chosen[compared])
                counts |= {"compared_predictions": changed.numel(), "changed_predictions": int(changed.sum())}
        nearest = distances(vectors, self.members)
        for row, record in zip(nearest, records, strict=True):
            if record.group == "original":
                row[record.id] = np.inf  # itself
        scale = self.member_distance or 1.0
        records = [
            # A lone member has no other: its distance stays unknown.
            replace(r, nearest_distance=float(d) / scale if np.isfinite(d) else None, **stamp())
            for r, d in zip(records, nearest.min(1), strict=True)
        ]
        return Stack(records, sharing, counts)

    def _compared(self, record: Record) -> bool:
        """Whether its predictions are compared with float32's: those of some samples are, as it takes long."""
        config = self.experiment.evaluation
        chosen = record.group == "generated" and (record.parent or 0) % config.stack == 0
        return chosen and config.precision != "float32"

    def _vector(self, record: Record) -> np.ndarray:
        """The record's parameters (D,)."""
        if record.group == "original":
            return self.members[record.id]
        if record.group == "ensemble":
            return self.members.mean(0)
        assert record.parent is not None
        if record.group == "generated":
            return self.samples.vectors([record.parent])[0]
        parent = self.members[record.parent]
        assert record.seed is not None
        if record.group == "fine_tuned":
            return self._fine_tuned(parent, record.seed)
        return parent + self._noise(parent, record.sigma or 0.0, record.seed)

    def _noise(self, vector: np.ndarray, sigma: float, seed: int) -> np.ndarray:
        noise = np.random.default_rng(seed).standard_normal(len(vector), dtype=np.float32)
        for entry in self.subset.entries:
            piece = slice(entry.offset, entry.offset + entry.size)
            noise[piece] *= sigma * vector[piece].std()
        return noise

    @functools.cached_property
    def _frontier(self) -> Frontier | str:
        """What fine-tuning reads; a zoo that was made on this node may have left it."""
        config = self.experiment.evaluation
        steps = config.fine_tuned_networks * config.fine_tuned_steps
        return training_frontier(self.experiment, self.subset, self.judge, steps)

    def _fine_tuned(self, vector: np.ndarray, seed: int) -> np.ndarray:
        steps = self.experiment.evaluation.fine_tuned_steps
        network = load_network(self.experiment, self.artifacts).to(self.context.device)
        training = SubsetTraining(self.experiment, network, self.subset, steps, self.context.device, self._frontier)
        training.load(torch.from_numpy(vector)[None])
        training.run(self.judge.dataset, 0, steps, [seed])
        return training.vectors()[0].cpu().numpy()


def _spread(vectors: np.ndarray) -> float:
    """Mean L2 distance among vectors (n, D); 0 for one."""
    if len(vectors) < 2:
        return 0.0
    return float(distances(vectors, vectors).sum() / (len(vectors) * (len(vectors) - 1)))
