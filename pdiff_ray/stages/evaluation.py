"""Stage `evaluation`: judges the generated networks beside the originals and the baselines any claim must beat.

The groups of networks are those of `evaluation.groups`. They are cut into tasks; each is done by an `Evaluator`, in
this process or by an actor of a pool, which writes the judged rows itself.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from pdiff_ray.common.errors import PdiffError, StorageError
from pdiff_ray.common.seeds import derive_seed
from pdiff_ray.config import schema
from pdiff_ray.config.schema import Experiment
from pdiff_ray.evaluation.groups import GROUPS, Material, groups_of
from pdiff_ray.evaluation.judge import Judge, judged
from pdiff_ray.evaluation.similarity import distances
from pdiff_ray.generators.interface import Fitting, Generator
from pdiff_ray.generators.table import make_generator
from pdiff_ray.networks.frontier import Frontier
from pdiff_ray.stages.alignment import members_of
from pdiff_ray.stages.base import load_network
from pdiff_ray.stages.context import Context
from pdiff_ray.stages.generator import load_generator
from pdiff_ray.stages.judging import base_judge, describe_sharing
from pdiff_ray.stages.verdict import summary_of
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.matrix import StoredVectors
from pdiff_ray.storage.parameters import ParameterStore, Record, stamp
from pdiff_ray.training.subset import SubsetTraining, training_frontier

SUMMARY_FILE = "summary.json"
TASK_BYTES = 2**29  # of vectors that are judged together

Task = list[Record]  # networks that are judged together, without vectors


def build(experiment: Experiment, artifacts: Mapping[str, Artifact], context: Context) -> None:
    """Judges what is not judged yet, in any order, and commits all rows with their summary."""
    judge_missing(experiment, artifacts, context)
    commit(experiment, artifacts, context)


def judge_missing(
    experiment: Experiment,
    artifacts: Mapping[str, Artifact],
    context: Context,
    judge_all: Callable[[Sequence[Task]], Iterable[int]] | None = None,
    actors: int = 1,
) -> None:
    """Judges what is not judged yet, in any order.

    Args:
        judge_all: does tasks elsewhere, and gives how many networks each has judged; default: one after another here.
        actors: how many share the tasks.
    """
    wanted = networks_to_judge(experiment, ParameterStore(artifacts["zoo"]))
    present = set(ParameterStore(artifacts["evaluation"]).ids)
    tasks = make_tasks(experiment, [record for record in wanted if record.id not in present], actors)
    found = judge_all(tasks) if judge_all else map(Evaluator(experiment, artifacts, context).evaluate, tasks)
    done = len(present)
    for count in found:
        done += count
        context.progress("evaluation", done, len(wanted), "networks")


def commit(experiment: Experiment, artifacts: Mapping[str, Artifact], context: Context) -> None:
    """Commits the rows of all networks, which have been judged, with their summary."""
    started, artifact = time.monotonic(), artifacts["evaluation"]
    ids = [record.id for record in networks_to_judge(experiment, ParameterStore(artifacts["zoo"]))]
    store, num_test = ParameterStore(artifact), artifacts["base"].manifest().info["test_images"]
    context.progress("evaluation", len(ids), len(ids), "verdict")
    summary = summary_of(experiment, artifacts, store.records(ids), context.device)
    parts = store.manifest_entries(ids)
    sharing, counts, seconds = _taken(store, parts)
    info = {"networks": len(ids), "test_images": num_test, **sharing, **counts}
    files = {SUMMARY_FILE: json.dumps(summary, indent=1).encode()}
    artifact.commit(files, info, seconds + time.monotonic() - started, parts)


def _taken(store: ParameterStore, parts: Iterable[str]) -> tuple[dict[str, Any], Counter[str], float]:
    """Returns what the networks of part files shared, what judging them took, and for how long any was being judged."""
    sharing: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    spans: list[list[float]] = []  # start and end
    for part in parts:
        about = store.about(part)
        sharing |= about.get("sharing", {})  # nothing, in a part of an earlier version
        counts.update(about.get("counts", {}))
        spans += [about["span"]] if "span" in about else []
    seconds, reached = counts.pop("seconds", 0.0), -math.inf  # an earlier version's parts have seconds
    for start, end in sorted(spans):  # which overlap where several actors judge at once
        seconds += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return sharing, counts, seconds


def networks_to_judge(experiment: Experiment, zoo: ParameterStore) -> list[Record]:
    """Returns all networks of the evaluation, without vectors: members first, numbered on from there."""
    members: list[Record] = []
    for group, ids in experiment.split.groups.items():
        members += [replace(record, group=group) for record in zoo.records(ids)] if ids else []
    if experiment.evaluation.precision != "float32":  # in which members were judged when they were made
        members = [replace(record, wrong=None) for record in members]
    return [*members, *made_networks(experiment)]


def num_networks(experiment: Experiment) -> int:
    """Returns the number of all networks of the evaluation."""
    return sum(map(len, experiment.split.groups.values())) + len(made_networks(experiment))


def made_networks(experiment: Experiment) -> list[Record]:
    """Returns all networks of the evaluation but the zoo's members, from which they are numbered on."""
    made: list[Record] = []
    for name, group in groups_of(experiment.evaluation).items():
        for recipe in group.recipes(experiment):
            id_ = experiment.zoo.size + len(made)
            seed = derive_seed(experiment.sampling.seed or 0, name, str(recipe.sigma), id_)
            made.append(Record(id_, name, parent=recipe.parent, sigma=recipe.sigma, seed=seed))
    return made


def make_tasks(experiment: Experiment, records: Sequence[Record], actors: int = 1) -> list[Task]:
    """Returns tasks of up to `evaluation.networks_per_task` networks of one group, in the order in which to do them.

    What takes longest comes first: networks that are trained, one each. When several actors share the others, tasks
    become smaller toward the end, so that all end together (guided self-scheduling, Polychronopoulos and Kuck 1987),
    but no smaller than a quarter of that size: each takes a file, and a prefix where none is kept. Networks that are
    judged already are only compared, which takes no time, and come last.
    """
    size, groups = experiment.evaluation.networks_per_task, groups_of(experiment.evaluation)
    tasks = [[record] for record in records if groups[record.group].trained]
    left = sum(not (record.judged or groups[record.group].trained) for record in records)
    for judged_already in (False, True):
        for name in reversed(list(groups)):
            same = [r for r in records if (r.judged, r.group) == (judged_already, name) and not groups[name].trained]
            while same:
                count = size if judged_already else min(size, max(math.ceil(size / 4), math.ceil(left / actors)))
                tasks.append(same[:count])
                same, left = same[count:], left - len(tasks[-1])
    return tasks


class Evaluator:
    """The maker and judge of the networks of tasks; it holds what they share on its device."""

    def __init__(self, experiment: Experiment, artifacts: Mapping[str, Artifact], context: Context) -> None:
        self.experiment, self.artifacts, self.context = experiment, artifacts, context
        self.groups = groups_of(experiment.evaluation)
        self._simple: tuple[Mapping[str, Any], Generator] | None = None

    def evaluate(self, task: Sequence[Record]) -> int:
        """Judges and stores the networks of a task, but those that are there; returns how many the task has."""
        present = set(self.store.ids)
        records = [record for record in task if record.id not in present]
        at_once = max(1, TASK_BYTES // (4 * self.material.subset.size)) if records else 1
        for start in range(0, len(records), at_once):
            rows, about = self.judged(records[start : start + at_once])
            self.store.append(rows, self.material.subset, about)
        return len(task)

    def judged(self, records: Sequence[Record]) -> tuple[list[Record], dict[str, Any]]:
        """Judges networks, and measures their distances to the nearest member.

        Returns:
            Their rows, without vectors, and what is to be kept beside them: what the networks shared; numbers to be
            added up over all tasks, which are seconds and what the precision changed; and when it began and ended.
        """
        started = time.time()
        vectors = np.stack([self._vector(record) for record in records])
        rows, about = list(records), dict[str, Any]()
        pending = [i for i, record in enumerate(records) if not record.judged]
        counts: dict[str, float] = {}
        if pending:
            precision = self.experiment.evaluation.precision
            judge, chosen = self.judge.at(precision), torch.from_numpy(vectors[pending])
            judgements, seconds = judge.timed(chosen)
            for index, judgement in zip(pending, judgements, strict=True):
                rows[index] = judged(rows[index], judgement)
            about = {"sharing": describe_sharing(judge)}
            counts = {f"{part}_seconds": taken for part, taken in asdict(seconds).items()}
            compared = [row for row, index in enumerate(pending) if self._compared(records[index])]
            if compared:
                changed = judge.predictions(chosen[compared]) != self.judge.predictions(chosen[compared])
                counts |= {"compared_predictions": changed.numel(), "changed_predictions": int(changed.sum())}
        nearest = distances(vectors, self.material.vectors)
        for row, record in zip(nearest, records, strict=True):
            if record.group == "original":
                row[self._places[record.id]] = np.inf  # itself
        scale = self.member_distance or 1.0
        rows = [
            # A lone member has no other: its distance stays unknown. Statistics are kept of what can be exported.
            replace(
                row,
                nearest_distance=float(d) / scale if np.isfinite(d) else None,
                statistics=row.statistics if i in pending and row.number is not None else None,
                **stamp(),
            )
            for i, (row, d) in enumerate(zip(rows, nearest.min(1), strict=True))
        ]
        return rows, {**about, "counts": counts, "span": (started, time.time())}

    @functools.cached_property
    def store(self) -> ParameterStore:
        """The rows, with those that others have written until it was opened."""
        return ParameterStore(self.artifacts["evaluation"])

    @functools.cached_property
    def material(self) -> Material:
        """What vectors are made from."""
        zoo, samples = members_of(self.artifacts), ParameterStore(self.artifacts["samples"])
        if samples.subset().names != zoo.subset().names:
            raise StorageError(
                f"{samples.artifact.location}: holds other tensors than the zoo, which was made anew by a version "
                "whose rules choose others; delete it, with the generator's folder, and run again"
            )
        members, places = StoredVectors.open(zoo, self.experiment.split.learned), self._places

        def member(id_: int) -> np.ndarray:
            return members.rows([places[id_]])[0].numpy() if id_ in places else zoo.vectors([id_])[0]

        return Material(
            self.experiment,
            zoo.subset(),
            members,
            member,
            lambda number: samples.vectors([number])[0],
            self._drawn,
            lambda vector: self._generator.encode(self._on_device(vector))[0].cpu().numpy(),
            lambda latents: self._generator.decode(self._on_device(latents))[0].cpu().numpy(),
            lambda: self._generator.num_latents or 0,
            self._trained,
        )

    @functools.cached_property
    def _places(self) -> dict[int, int]:
        """Where learned members are in `material.vectors`, by id."""
        return {id_: place for place, id_ in enumerate(self.experiment.split.learned)}

    @functools.cached_property
    def judge(self) -> Judge:
        """The judge in full precision."""
        return base_judge(self.experiment, self.artifacts, self.material.subset, self.context)

    @functools.cached_property
    def member_distance(self) -> float:
        """The mean L2 distance among members; 0 of one."""
        vectors = self.material.vectors
        if len(vectors) < 2:
            return 0.0
        return float(distances(vectors, vectors).sum() / (len(vectors) * (len(vectors) - 1)))

    def _vector(self, record: Record) -> np.ndarray:
        vector, size = self.groups[record.group].vector(record, self.material), self.material.subset.size
        if record.group not in GROUPS and (np.shape(vector) != (size,) or not np.isfinite(vector).all()):
            raise PdiffError(
                f"evaluation.baselines: {record.group} gives an array of shape {np.shape(vector)}, or with numbers "
                f"that are not finite; a vector has {size} finite numbers"
            )
        return np.asarray(vector, dtype=np.float32)

    def _compared(self, record: Record) -> bool:
        """Returns whether its predictions are compared with float32's: some samples' are, as it takes long."""
        config = self.experiment.evaluation
        chosen = record.group == "generated" and (record.parent or 0) % config.networks_per_task == 0
        return chosen and config.precision != "float32"

    @functools.cached_property
    def _frontier(self) -> Frontier | None:
        """What training reads; a zoo that was made on this node may have left it."""
        config = self.experiment.evaluation
        steps = config.fine_tuned_networks * config.fine_tuned_steps
        return training_frontier(self.experiment, self.material.subset, self.judge, steps).frontier

    def _drawn(self, settings: Mapping[str, Any], seed: int) -> np.ndarray:
        sampling = schema.Sampling(samples=1, seed=seed)
        if self._simple is None or self._simple[0] != settings:  # the last one is kept: a task is of one group
            generator = make_generator(schema.Generator.model_validate(dict(settings)), self.material.subset)
            members, device = self.material.vectors, self.context.device
            generator.fit(members.all().to(device) if members.in_memory else members, Fitting(device, 0))
            self._simple = settings, generator
        return self._simple[1].sample(1, sampling, self.context.device)[0].cpu().numpy()

    @functools.cached_property
    def _generator(self) -> Generator:
        return load_generator(self.experiment, self.artifacts, self.material.vectors)

    def _on_device(self, values: np.ndarray) -> torch.Tensor:
        """Returns a row as a batch of one."""
        return torch.from_numpy(values)[None].to(self.context.device)

    def _trained(self, vector: np.ndarray, steps: int, seed: int) -> np.ndarray:
        device, subset = self.context.device, self.material.subset
        network = load_network(self.experiment, self.artifacts).to(device)
        training = SubsetTraining(self.experiment, network, subset, steps, device, self._frontier)
        training.load(torch.from_numpy(vector)[None])
        training.run(self.judge.dataset, 0, steps, [seed])
        return training.vectors()[0].cpu().numpy()
