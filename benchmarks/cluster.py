"""Benchmarks of what Ray does: evaluation by actors, and whole experiments in processes of their own."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.harness import Result, compare, result, seconds
from pdiff_ray import config, distributed
from pdiff_ray.artifacts import Artifact, Storage
from pdiff_ray.data import default_cache
from pdiff_ray.stages import Context, artifacts_of, base, evaluate, generate, silent, zoo
from pdiff_ray.store import ParameterStore

QUICKSTART = Path(__file__).parent.parent / "sweeps" / "quickstart.yaml"
# Evaluation takes as long whatever the networks have learned.
BRIEF = (
    "training.epochs=2",
    "generator.autoencoder.steps=20",
    "generator.diffusion.steps=20",
    "sampling.sampler=ddim",
    "sampling.steps=10",
)


class Evaluation:
    """The quickstart's evaluation of 431 networks, again and again.

    Args:
        overrides: of the quickstart's fields.
    """

    def __init__(self, storage: str, overrides: tuple[str, ...] = BRIEF) -> None:
        self.experiment = config.load(QUICKSTART, [f"storage={storage}", *overrides])
        self.artifacts = artifacts_of(self.experiment, Storage(storage))
        self.context = Context(torch.device("cpu"), default_cache())
        for build in (base.build, zoo.build, generate.build_generator, generate.build_samples):
            build(self.experiment, self.artifacts, self.context)
        self.counter = itertools.count()

    def run(self, map_stacks: evaluate.MapStacks) -> Artifact:
        """One evaluation, from stacks to a committed artifact, which is a new one each time."""
        artifact = self.artifacts["evaluation"]
        artifact = replace(artifact, config={**artifact.config, "benchmark": next(self.counter)})
        evaluate.build(self.experiment, {**self.artifacts, "evaluation": artifact}, self.context, map_stacks)
        return artifact

    @contextlib.contextmanager
    def pool(self, actors: int, events: str) -> Iterator[evaluate.MapStacks]:
        """What maps stacks on a pool of actors, started and warm."""
        from pdiff_ray.distributed.pool import Pool

        resources = self.experiment.resources.model_copy(update={"actors": actors, "cpus_per_actor": 1})
        pool = Pool(self.experiment.model_copy(update={"resources": resources}), self.artifacts, events)
        try:
            self.run(pool.map_stacks)
            yield pool.map_stacks
        finally:
            pool.close()

    def here(self) -> evaluate.MapStacks:
        """What maps stacks in this process, started and warm."""
        evaluator = evaluate.Evaluator(self.experiment, self.artifacts, self.context)
        self.run(lambda stacks: map(evaluator.evaluate, stacks))
        return lambda stacks: map(evaluator.evaluate, stacks)


def _same(one: Artifact, other: Artifact) -> bool:
    results = [[(r.id, r.wrong, r.nearest_distance) for r in ParameterStore(a).records()] for a in (one, other)]
    return results[0] == results[1]


@contextlib.contextmanager
def _evaluation(overrides: tuple[str, ...]) -> Iterator[tuple[Evaluation, str]]:
    """An evaluation, and a Ray for its actors."""
    resources = config.Resources()
    distributed.prepare(resources)
    from pdiff_ray.distributed import session

    with tempfile.TemporaryDirectory() as storage, session.connect(resources, silent) as events:
        yield Evaluation(storage, overrides), events


def actors(overrides: tuple[str, ...] = BRIEF, n: int = 5) -> Iterator[Result]:
    """Evaluation on several actors of one core each, against one actor."""
    with _evaluation(overrides) as (evaluation, events), evaluation.pool(1, events) as one:
        for count in (2, 4, 8, 16):
            if count > (os.cpu_count() or 1):
                break
            with evaluation.pool(count, events) as several:
                assert _same(evaluation.run(one), evaluation.run(several))
                yield compare(
                    "actors",
                    f"evaluation of the quickstart's networks on {count} actors of one core each",
                    lambda several=several: evaluation.run(several),
                    "on one",
                    lambda: evaluation.run(one),
                    n=n,
                    target=0.85 * count,
                )


def ray_overhead(overrides: tuple[str, ...] = BRIEF, n: int = 5) -> Iterator[Result]:
    """Evaluation through Ray on an actor, against the same function in this process."""
    with _evaluation(overrides) as (evaluation, events), evaluation.pool(1, events) as pooled:
        here = evaluation.here()
        assert _same(evaluation.run(pooled), evaluation.run(here))
        yield compare(
            "ray_overhead",
            "evaluation of the quickstart's networks on an actor",
            lambda: evaluation.run(pooled),
            "in this process",
            lambda: evaluation.run(here),
            n=n,
            target=1 / 1.1,
            note="start-up apart, on both sides",
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


def _timed(work: Callable[[], str]) -> tuple[str, float]:
    found: list[str] = []
    taken = seconds(lambda: found.append(work()))
    return found[0], taken


def _quickstart(storage: str, overrides: tuple[str, ...]) -> str:
    """Runs it in a process of its own; returns the result table that it prints."""
    command = [sys.executable, "-m", "pdiff_ray.sweep", str(QUICKSTART), "--storage", storage]
    settings = [argument for override in overrides for argument in ("--set", override)]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, check=True)
    table = re.search(r"^group .*?(?=^verdict)", done.stdout, re.MULTILINE | re.DOTALL)
    assert table, f"no table in what the quickstart prints:\n{done.stdout}"
    return table[0]
