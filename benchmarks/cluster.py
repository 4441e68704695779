"""Benchmarks of what Ray does: evaluation by actors, and whole experiments in processes of their own."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml

from benchmarks.harness import Result, compare, result, seconds
from pdiff_ray import distributed
from pdiff_ray.common.progress import silent
from pdiff_ray.config import loading
from pdiff_ray.config import schema as config
from pdiff_ray.config import sweep as space
from pdiff_ray.data.kept import default_cache
from pdiff_ray.stages import base, evaluation, generator, samples, zoo
from pdiff_ray.stages.context import Context
from pdiff_ray.stages.table import artifacts_of
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.parameters import ParameterStore
from pdiff_ray.sweeps.ledger import Ledger

if TYPE_CHECKING:
    from pdiff_ray.distributed.pool import Pool

QUICKSTART = Path(__file__).parent.parent / "sweeps" / "quickstart.yaml"
RESNET = Path(__file__).with_name("resnet18.yaml")
# Evaluation takes as long whatever the networks have learned.
BRIEF = (
    "training.epochs=2",
    "generator.autoencoder.steps=20",
    "generator.diffusion.steps=20",
    "sampling.sampler=ddim",
    "sampling.steps=10",
)


class Evaluation:
    """An experiment's evaluation, again and again.

    Args:
        storage: where its artifacts are built.
        file: the experiment's.
        overrides: of its fields.
    """

    def __init__(self, storage: str, file: Path = QUICKSTART, overrides: tuple[str, ...] = BRIEF) -> None:
        self.experiment = loading.load(file, [f"storage={storage}", *overrides])
        self.artifacts = artifacts_of(self.experiment, Storage(storage))
        self.context = Context(torch.device("cpu"), default_cache())
        for build in (base.build, zoo.build, generator.build, samples.build):
            build(self.experiment, self.artifacts, self.context)
        self.counter = itertools.count()
        self.evaluator = evaluation.Evaluator(self.experiment, self.artifacts, self.context)

    def run(self, pool: Pool) -> Artifact:
        """Runs one evaluation on a pool's actors, from tasks to a committed artifact, which is a new one each time."""
        import ray

        artifacts = self._new()
        ray.get([actor.__ray_call__.remote(_store_in, artifacts) for actor in pool.actors])
        return self._run(artifacts, pool.evaluate, len(pool.actors))

    def run_here(self) -> Artifact:
        """Runs one evaluation in this process, on an evaluator that is kept."""
        artifacts = self._new()
        _store_in(self, artifacts)
        return self._run(artifacts, lambda tasks: map(self.evaluator.evaluate, tasks), 1)

    def _new(self) -> dict[str, Artifact]:
        artifact = self.artifacts["evaluation"]
        return {
            **self.artifacts,
            "evaluation": replace(artifact, config={**artifact.config, "benchmark": next(self.counter)}),
        }

    def _run(
        self,
        artifacts: dict[str, Artifact],
        judge_all: Callable[[Sequence[evaluation.Task]], Iterable[int]],
        actors: int,
    ) -> Artifact:
        evaluation.judge_missing(self.experiment, artifacts, self.context, judge_all, actors)
        evaluation.commit(self.experiment, artifacts, self.context)
        return artifacts["evaluation"]

    @property
    def num_networks(self) -> int:
        """Of the networks that are judged here: all but the originals."""
        return len(evaluation.made_networks(self.experiment))

    @contextlib.contextmanager
    def pool(self, actors: int, events: str) -> Iterator[Pool]:
        """Actors of one core each, started and warm."""
        from pdiff_ray.distributed.pool import Pool

        resources = self.experiment.resources.model_copy(
            update={"actors": actors, "cpus_per_actor": 1, "gpus_per_actor": 0}
        )
        with Pool(self.experiment.model_copy(update={"resources": resources}), self.artifacts, events) as pool:
            for _ in range(2):  # so that each gets some work
                self.run(pool)
            yield pool


def _store_in(worker: Any, artifacts: dict[str, Artifact]) -> None:
    """Lets an evaluation be stored as another one than before by a worker, which stays warm."""
    worker.artifacts = artifacts
    if worker.evaluator is not None:
        worker.evaluator.artifacts = artifacts
        worker.evaluator.__dict__.pop("store", None)


def _same(one: Artifact, other: Artifact) -> bool:
    ours, theirs = (ParameterStore(artifact).records() for artifact in (one, other))
    distances = ([r.nearest_distance or 0 for r in records] for records in (ours, theirs))
    return [(r.id, r.wrong) for r in ours] == [(r.id, r.wrong) for r in theirs] and np.allclose(*distances)


@contextlib.contextmanager
def _evaluation(file: Path = QUICKSTART, overrides: tuple[str, ...] = BRIEF) -> Iterator[tuple[Evaluation, str]]:
    """An experiment's evaluation, and a Ray for its actors."""
    resources = config.Resources()
    distributed.prepare(resources)
    from pdiff_ray.distributed import session

    with tempfile.TemporaryDirectory() as storage, session.connect(resources, silent) as events:
        yield Evaluation(storage, file, overrides), events


def actors(
    experiments: Sequence[tuple[Path, tuple[str, ...], int]] = ((RESNET, (), 5), (QUICKSTART, BRIEF, 15)),
) -> Iterator[Result]:
    """Evaluation on several actors of one core each, against one actor.

    Args:
        experiments: files, overrides of their fields, and paired runs.
    """
    for file, overrides, n in experiments:
        with _evaluation(file, overrides) as (evaluation, events):
            for count in (2, 4, 8, 16):
                if count > (os.cpu_count() or 1):
                    break
                with evaluation.pool(count, events) as several:
                    one = copy.copy(several)
                    one.actors, one.size = several.actors[:1], 1
                    ours = functools.partial(evaluation.run, several)
                    other = functools.partial(evaluation.run, one)
                    assert _same(other(), ours())
                    what = f"evaluation of {evaluation.num_networks} {evaluation.experiment.network.name}s"
                    yield compare(
                        "actors",
                        f"{what} on {count} actors of one core each",
                        ours,
                        "on one",
                        other,
                        n=n,
                        target=0.85 * count,
                    )


def ray_overhead(overrides: tuple[str, ...] = BRIEF, n: int = 5) -> Iterator[Result]:
    """Evaluation through Ray on an actor, against the same function in this process."""
    with _evaluation(overrides=overrides) as (evaluation, events), evaluation.pool(1, events) as pooled:
        assert _same(evaluation.run(pooled), evaluation.run_here())
        yield compare(
            "ray_overhead",
            f"evaluation of {evaluation.num_networks} {evaluation.experiment.network.name}s on an actor",
            lambda: evaluation.run(pooled),
            "in this process",
            evaluation.run_here,
            n=n,
            target=1 / 1.1,
            note="start-up apart, on both sides",
        )


def nodes(
    counts: Sequence[int] = (1, 2, 4), workers: int = 4, members: Sequence[int] = (200, 2_000), n: int = 3
) -> Iterator[Result]:
    """Members and samples of so many workers and actors spread over several nodes, against one process without Ray.

    The nodes are simulated: each has a part of Ray's cores, and all run on this machine. A member is one step here, so
    that little is measured beside what it takes to have it made, named, stored and reported.

    Args:
        counts: of nodes, on which all workers and actors have a core.
        members: of a small and of a large zoo, whose difference in time is that of its members alone.
        n: repetitions.
    """
    branches = (
        "zoo.regime=branches",
        f"zoo.branches={workers}",
        "zoo.steps_per_member=1",
        f"resources.workers={workers}",
    )
    with tempfile.TemporaryDirectory() as storage:
        here = Evaluation(f"{storage}/here")
        alone = functools.partial(_member_s, here, f"{storage}/here", branches, members)
        member = [alone(lambda job: zoo.build(job.experiment, job.artifacts, here.context), run) for run in range(n)]
        sample = [seconds(here.run_here) / here.num_networks for _ in range(n)]
    for count in counts:
        with _nodes(count, workers) as events, tempfile.TemporaryDirectory() as storage:
            from pdiff_ray.distributed import train

            there = Evaluation(storage)
            spread = functools.partial(_member_s, there, storage, branches, members)
            found = [spread(lambda job, events=events: train.train([job], events), run) for run in range(n)]
            where = f"{workers} of them on {count} nodes" if count > 1 else f"{workers} of them on one node"
            yield _per(f"a member by workers, {where}", found, member)
            with there.pool(workers, events) as pool:
                work = functools.partial(there.run, pool)
                found = [seconds(work) / there.num_networks for _ in range(n)]
            yield _per(f"a sample by actors, {where}", found, sample)


def _per(what: str, ours: Sequence[float], other: Sequence[float]) -> Result:
    cores = os.cpu_count() or 1
    more = 1e3 * (cores * np.median(ours) - np.median(other))
    note = f"{more:+.2f} ms of a core for each, start-up apart, with all {cores} cores of this machine taken for busy"
    return result("nodes", what, "in this process, on a core", list(zip(ours, other, strict=True)), note=note)


def _member_s(
    evaluation: Evaluation,
    storage: str,
    overrides: tuple[str, ...],
    members: Sequence[int],
    build: Callable[[Any], object],
    run: int,
) -> float:
    """Builds a small and a large zoo over an evaluation's base; returns the seconds that each member more takes."""
    from pdiff_ray.distributed.train import Job

    taken = []
    for count in members:
        more = (f"zoo.members={count}", f"zoo.seed={run + 1}")
        experiment = loading.load(QUICKSTART, [f"storage={storage}", *BRIEF, *overrides, *more])
        artifacts = {**artifacts_of(experiment, Storage(storage)), "base": evaluation.artifacts["base"]}
        taken.append(seconds(lambda e=experiment, a=artifacts: build(Job(e, a, ["zoo"]))))
        assert artifacts["zoo"].exists()
    return (taken[1] - taken[0]) / (members[1] - members[0])


@contextlib.contextmanager
def _nodes(count: int, cores: int) -> Iterator[str]:
    """A cluster of so many nodes on this machine, and a connection to it."""
    distributed.prepare(config.Resources())
    from ray.cluster_utils import Cluster

    from pdiff_ray.distributed import session

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(count):
            cluster.add_node(num_cpus=cores // count)
        cluster.wait_for_nodes()
        with session.connect(config.Resources(address=cluster.address), silent) as events:
            yield events
    finally:
        cluster.shutdown()


def trial_overhead(trials: int = 10, trial_s: float = 60.0, overrides: tuple[str, ...] = BRIEF) -> Iterator[Result]:
    """Trials of a sweep on Ray Tune, one after another, against the same trials in this process.

    What Ray adds to a trial of a few seconds, from one trial's end to the next, is added to one of `trial_s`.
    """
    from pdiff_ray.running.sweep import run_trials

    with tempfile.TemporaryDirectory() as folder, _evaluation(overrides=overrides) as (evaluation, _):
        ends: dict[str, list[float]] = {}
        objectives = []
        for place in ("ray", "here"):
            storage = f"{folder}/{place}"
            shutil.copytree(evaluation.artifacts["base"].storage.local, storage)
            file = Path(folder) / f"{place}.yaml"
            sweep = {"parameters": {"sampling.seed": list(range(1, trials + 1))}, "max_concurrent": 1}
            file.write_text(yaml.safe_dump({"base": str(QUICKSTART), "name": "overhead", "sweep": sweep}))
            ledger = Ledger(space.load(file, [f"storage={storage}", *overrides]))
            times = ends[place] = [time.perf_counter()]
            with contextlib.redirect_stdout(io.StringIO()):
                run_trials(
                    ledger,
                    in_process=place == "here",
                    on_result=lambda _, times=times: times.append(time.perf_counter()),
                )
            objectives.append([trial.objective for trial in ledger.done()])
        assert objectives[0] == objectives[1]
        ray_s, here_s = (np.diff(times) for times in (ends["ray"], ends["here"]))
        # The first also waits for the actor: its process, its imports.
        added = ray_s[1:] - here_s[1:]
        start_s = ray_s[0] - here_s[0]
        yield result(
            "trial_overhead",
            f"a trial of {trial_s:g} s on Ray Tune",
            "in this process",
            [(trial_s + float(more), trial_s) for more in added],
            target=0.95,
            note=f"measured on {trials} trials of {np.median(here_s):.1f} s, which Ray makes {np.median(added):+.2f} s "
            f"longer; the first takes {start_s:.1f} s more, once for each actor",
        )


def rerun(overrides: tuple[str, ...] = (), n: int = 1) -> Iterator[Result]:
    """The whole quickstart from the command line: the second run, against the first."""
    pairs = []
    for _ in range(n):
        with tempfile.TemporaryDirectory() as storage:
            first, first_s = _timed(lambda storage=storage: _quickstart(storage, overrides))
            again, again_s = _timed(lambda storage=storage: _quickstart(storage, overrides))
        assert first == again, f"two runs of the quickstart differ:\n{first}\n{again}"
        pairs.append((again_s, first_s))
    what = f"quickstart{' with ' * bool(overrides)}{', '.join(overrides)}"
    yield result("rerun", f"{what}, second run", "the first", pairs, target=10.0)


def baselines(overrides: tuple[str, ...] = (), n: int = 2) -> Iterator[Result]:
    """The whole quickstart from the command line with all baselines, against the ensemble alone."""
    bare = ("evaluation.baseline_networks=0", "evaluation.fine_tuned_networks=0", "evaluation.noise_sigmas=[]")
    pairs = []
    for _ in range(n):
        times = []
        for settings in ((), bare):
            with tempfile.TemporaryDirectory() as storage:
                times.append(seconds(lambda settings=settings, to=storage: _quickstart(to, (*overrides, *settings))))
        pairs.append((times[0], times[1]))
    yield result("baselines", "the quickstart", "without the baselines that are drawn or trained", pairs, target=0.8)


def start(overrides: tuple[str, ...] = (), n: int = 2) -> Iterator[Result]:
    """The whole quickstart from the command line on a local Ray, against one process, which starts no other."""
    pairs = []
    for _ in range(n):
        found = []
        for flags in ((), ("--in-process",)):
            with tempfile.TemporaryDirectory() as storage:
                found.append(_timed(lambda flags=flags, to=storage: _quickstart(to, overrides, *flags)))
        (table, on_ray), (other, in_process) = found
        assert table == other, f"two runs of the quickstart differ:\n{table}\n{other}"
        pairs.append((on_ray, in_process))
    yield result("start", "the quickstart on a local Ray", "in one process", pairs, target=1.0)


def _timed(work: Callable[[], str]) -> tuple[str, float]:
    found: list[str] = []
    taken = seconds(lambda: found.append(work()))
    return found[0], taken


def _quickstart(storage: str, overrides: tuple[str, ...], *flags: str) -> str:
    """Runs it in a process of its own; returns the result table that it prints."""
    command = [sys.executable, "-m", "pdiff_ray.sweep", str(QUICKSTART), "--storage", storage, *flags]
    settings = [argument for override in overrides for argument in ("--set", override)]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, check=True)
    table = re.search(r"^ *group .*?(?=^Did it work)", done.stdout, re.MULTILINE | re.DOTALL)
    assert table, f"no table in what the quickstart prints:\n{done.stdout}"
    return table[0]
