"""A pool of actors that fit generators, draw samples and judge networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayTaskError

from pdiff_ray.common.errors import PdiffError, UnavailableError
from pdiff_ray.config.schema import Experiment, Resources
from pdiff_ray.data.kept import default_cache
from pdiff_ray.distributed import ray_address
from pdiff_ray.distributed.nodes import check_software, expected_software
from pdiff_ray.distributed.session import (
    gpu_share,
    leaving,
    reason_of,
    report_progress,
    take_place,
)
from pdiff_ray.stages.context import Context
from pdiff_ray.stages.evaluation import Evaluator, Task
from pdiff_ray.stages.table import build_missing
from pdiff_ray.storage.artifacts import Artifact


class _Worker:
    """What an actor does; it reads and writes storage itself, so that only names travel."""

    def __init__(
        self,
        experiment: Experiment,
        artifacts: Mapping[str, Artifact],
        events: str,
        gpus: float,
        driver: Mapping[str, str],
    ) -> None:
        device = take_place(experiment.resources.cpus_per_actor, gpus)
        self.experiment, self.artifacts, self.driver = experiment, artifacts, driver
        self.context = Context(device, default_cache(), progress=report_progress(events), leaving=leaving())
        self.evaluator: Evaluator | None = None

    @ray.method(max_task_retries=-1)  # a call while it is restarted waits, instead of counting as another death
    def ready(self) -> None:
        """Returns when the actor has found a place, which may be a node that has just come, and has started."""
        check_software(self.driver)

    def build(self, stage: str, failures: int) -> None:
        self.evaluator = None  # its vectors make room
        # It may be there, by an actor that died since.
        build_missing(stage, self.experiment, self.artifacts, self.context)

    def evaluate(self, task: Task, failures: int) -> int:
        if self.evaluator is None or failures:  # an actor that died may have stored the rows, which a new one sees
            self.evaluator = Evaluator(self.experiment, self.artifacts, self.context)
        return self.evaluator.evaluate(task)


class Pool:
    """The actors of one experiment. Work of an actor that dies is given to the others while it is restarted.

    Args:
        beside: workers of Ray Train that are to come. Actors for which a local Ray has room beside them start at once,
            so that they are there when the workers end; the others, and all of a cluster, start with work for them.
    """

    def __init__(
        self, experiment: Experiment, artifacts: Mapping[str, Artifact], events: str, *, beside: int = 0
    ) -> None:
        resources = experiment.resources
        self.size, self.max_failures = resources.actors, resources.max_failures
        gpus = gpu_share(resources.gpus_per_actor, self.size)
        self.actor = ray.remote(_Worker).options(
            num_cpus=resources.cpus_per_actor, num_gpus=gpus, max_restarts=self.max_failures
        )
        self.given = experiment, artifacts, events, gpus, expected_software(resources)
        self.actors: list[Any] = []
        self.deaths: dict[Any, int] = {}
        self._start(min(self.size, _room(resources, gpus, beside)))

    def _start(self, count: int) -> None:
        """Has so many actors."""
        while len(self.actors) < count:
            self.actors.append(self.actor.remote(*self.given))
            self.deaths[self.actors[-1]] = 0

    def build(self, stage: str) -> None:
        """Builds a stage ("generator", "samples" or what is left of "evaluation") on one actor."""
        list(self._run("build", [stage]))

    def evaluate(self, tasks: Sequence[Task]) -> Iterator[int]:
        """Judges and stores the networks of tasks; yields how many each has had, in the order in which they end."""
        return self._run("evaluate", tasks)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def _run(self, method: str, items: Sequence[Any]) -> Iterator[Any]:
        self._start(min(self.size, len(items)))
        waiting = [(item, 0) for item in reversed(items)]
        idle: list[Any] = []
        # Work goes to actors that have started: in a full cluster some may wait for a place.
        running: dict[Any, tuple[Any, Any, int]] = {actor.ready.remote(): (actor, None, 0) for actor in self.actors}
        while waiting or any(item is not None for _, item, _ in running.values()):
            (done,), _ = ray.wait(list(running))
            actor, item, failures = running.pop(done)
            results = []
            try:
                result = ray.get(done)
            except (RayActorError, ActorUnavailableError, OutOfMemoryError) as error:
                foretold = getattr(error, "preempted", False)  # by its node, which says nothing of the work
                self.deaths[actor] += not foretold
                if self.deaths[actor] <= self.max_failures:  # it is restarted, which takes a while
                    running[actor.ready.remote()] = (actor, None, 0)
                if item is not None:
                    waiting.append((item, failures + 1))
                ended = item is not None and failures >= self.max_failures and not foretold
                if ended or not (idle or running):
                    raise PdiffError(
                        f"an actor died {self.deaths[actor]} times ({reason_of(error)}); what is finished is kept, and "
                        "the same command goes on from there. If memory ran out, lower evaluation.networks_per_task, "
                        "evaluation.batch_size or resources.actors"
                    ) from None
            except RayTaskError as error:
                if isinstance(error.cause, UnavailableError) and item is not None and failures < self.max_failures:
                    # What its node lacks, such as room in the cache, another may have: one takes its place.
                    waiting.append((item, failures + 1))
                    self.actors.remove(actor)
                    ray.kill(actor)
                    self._start(len(self.actors) + 1)
                    running[self.actors[-1].ready.remote()] = (self.actors[-1], None, 0)
                elif isinstance(error.cause, PdiffError):
                    raise error.cause from None
                else:
                    raise
            else:
                idle.append(actor)
                results = [result] if item is not None else []
            while waiting and idle:
                actor, (item, failures) = idle.pop(0), waiting.pop()
                running[getattr(actor, method).remote(item, failures)] = (actor, item, failures)
            yield from results  # when every actor has work: the caller may take its time


def _room(resources: Resources, gpus: float, workers: int) -> int:
    """Returns for how many actors a local Ray has room now beside workers; others may be waiting for a cluster's."""
    if ray_address(resources):
        return 0
    needs = {
        "CPU": (resources.cpus_per_actor, resources.cpus_per_worker),
        "GPU": (gpus, gpu_share(resources.gpus_per_worker, workers)),
    }
    there = ray.available_resources()
    return min(int((there.get(kind, 0) - workers * other) // own) for kind, (own, other) in needs.items() if own)
