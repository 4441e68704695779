"""The stages base and zoo on Ray Train, where a group of workers builds all that are missing."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.exceptions import RayError, RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.exceptions import TrainingFailedError

from pdiff_ray.common import signals
from pdiff_ray.common.errors import PdiffError, UnavailableError
from pdiff_ray.config.schema import Experiment
from pdiff_ray.data.kept import default_cache
from pdiff_ray.distributed.nodes import check_software, expected_software
from pdiff_ray.distributed.session import (
    failures,
    gpu_share,
    leaving,
    lost,
    own_files,
    report_failure,
    report_progress,
    take_place,
)
from pdiff_ray.stages import base, zoo
from pdiff_ray.stages.context import Context
from pdiff_ray.storage.artifacts import Artifact

# Workers wait for each other at the end of a stage, however unequal their shares of the work are.
COLLECTIVE_TIMEOUT_S = 7 * 24 * 3600
UNAVAILABLE = "unavailable"  # the key of what a restart may mend


@dataclass(frozen=True)
class Job:
    """An experiment whose base, zoo or both are missing.

    Attributes:
        artifacts: those of all its stages, by the name of the stage.
        stages: the missing ones of "base" and "zoo".
    """

    experiment: Experiment
    artifacts: Mapping[str, Artifact]
    stages: Sequence[str]


def train(jobs: Sequence[Job], events: str) -> dict[str, str]:
    """Builds the missing bases and zoos with one group of at most `resources.workers` workers.

    All workers train a base together, data-parallel, and share the training runs of all zoos. If a worker or node is
    lost, or storage or a node's cache fails, the group restarts and goes on from what is in storage.

    Args:
        events: the name of the actor through which workers report.

    Returns:
        Why artifacts could not be built, by their keys; empty if all were.
    """
    resources, storage = jobs[0].experiment.resources, jobs[0].artifacts["base"].storage
    workers = useful_workers(jobs)
    gpus = gpu_share(resources.gpus_per_worker, workers)
    per_worker = {"CPU": resources.cpus_per_worker, **({"GPU": gpus} if gpus else {})}
    (filesystem, place), name = own_files(storage), f"ray-train-{uuid.uuid4().hex[:8]}"
    trainer = _Trainer(
        _work,
        train_loop_config={
            "jobs": list(jobs),
            "events": events,
            "gpus": gpus,
            "software": expected_software(resources),
        },
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus > 0, resources_per_worker=per_worker),
        # NCCL allows only one process per GPU.
        torch_config=_TorchConfig("nccl" if gpus >= 1 else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        run_config=RunConfig(
            name=name,
            storage_filesystem=filesystem,
            storage_path=place,
            # A base that cannot be trained may take a restart as well.
            failure_config=FailureConfig(max_failures=resources.max_failures + len(jobs) - 1),
        ),
    )
    try:
        get_or_create_autoscaling_coordinator()  # which the workers' controller would start after itself
        trainer.fit()
    except TrainingFailedError as error:
        found = failures(events)
        failed = getattr(error, "worker_failures", {}).values()
        causes = [getattr(e, "health_check_failure", e) for e in failed]  # one that was killed is found so
        died = [e for e in causes if isinstance(e, RayError)]
        lone = died and not any(isinstance(e, RayTaskError) for e in died)
        if lone and not found.keys() - {UNAVAILABLE}:
            raise lost(died[0]) from None
        if not found:
            raise
        reason = next(iter(found.values()))
        for job in jobs:
            for artifact in (job.artifacts[stage] for stage in job.stages):
                if not artifact.exists():  # a trial must not build what only a group of workers may
                    report_failure(events, artifact.key, f"the group of workers has ended: {reason}")
    finally:
        for controller in trainer.controllers:  # and the workers with it, if it is there
            ray.kill(controller)
        with contextlib.suppress(OSError):  # it has Ray's marker files only; the results are artifacts
            filesystem.delete_dir(f"{place}/{name}")
    return {key: reason for key, reason in failures(events).items() if key != UNAVAILABLE}


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(name_interface)
        super().on_start(worker_group, backend_config)


class _TorchConfig(TorchConfig):
    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend


def name_interface() -> None:
    """Has Gloo listen where this node's Ray does.

    By itself it asks what the host's name stands for, which often is an address that other nodes do not reach.
    """
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class _Trainer(TorchTrainer):
    """Ray's trainer, which waits for nobody at its end, and leaves Ctrl-C as it was.

    Attributes:
        controllers: the actor that runs the workers, once it has been started.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.controllers: list[Any] = []

    def _register_sigint_handler(self, controller: Any) -> None:
        # Ray's handler would stay when the training is over, and would end the driver with code 0.
        self.controllers.append(controller)

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        # It starts an actor for Ray Data, which nothing here uses.
        callbacks = [each for each in callbacks if not isinstance(each, DatasetsCallback)]
        with signals.kept():
            known = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR)  # what is connected to
        if known.dashboard_url:
            return callbacks
        # It asks the dashboard whether the controller lives. Without one it asks in vain, or a cluster of long ago of
        # which Ray's folder still has the address, and the end of the training waits for it: 1.5 s, or 12 s.
        return [each for each in callbacks if not isinstance(each, PlacementGroupCleanerCallback)]


def useful_workers(jobs: Sequence[Job]) -> int:
    """Returns the number of workers with something to do: if no base is trained, at most one for each run of a zoo."""
    workers = jobs[0].experiment.resources.workers
    if any("base" in job.stages for job in jobs):
        return workers
    return min(workers, sum(len(zoo.runs_of(job.experiment.zoo)) for job in jobs))


def place_among(jobs: Sequence[Job], stage: str, job: Job) -> str:
    """Returns which of the distinct artifacts that are built of a stage a job's is, as ` 2/3`; empty if it is alone."""
    due = list(dict.fromkeys(other.artifacts[stage].key for other in jobs if stage in other.stages))
    return f" {due.index(job.artifacts[stage].key) + 1}/{len(due)}" if len(due) > 1 else ""


def _work(config: dict[str, Any]) -> None:
    jobs, events = config["jobs"], config["events"]
    device = take_place(jobs[0].experiment.resources.cpus_per_worker, config["gpus"], get_device())
    try:
        check_software(config["software"])
        _build(jobs, events, device)
    except UnavailableError as error:
        report_failure(events, UNAVAILABLE, str(error))
        raise


def _build(jobs: Sequence[Job], events: str, device: torch.device) -> None:
    worker, progress, told = ray.train.get_context(), report_progress(events), leaving()
    rank, world = worker.get_world_rank(), worker.get_world_size()
    failed = failures(events)  # those before a restart, which does not help them

    def context(stage: str, job: Job) -> Context:
        suffix = place_among(jobs, stage, job)
        return Context(
            device, default_cache(), rank, world, lambda task, *rest: progress(f"{task}{suffix}", *rest), leaving=told
        )

    for job in jobs:
        artifact = job.artifacts["base"]
        # The artifact may exist by now: from before a restart, or because an earlier job has the same base.
        if "base" not in job.stages or artifact.key in failed or _finished(artifact, world):
            continue
        try:
            base.build(job.experiment, job.artifacts, context("base", job))
        except UnavailableError:
            raise
        except PdiffError as error:
            report_failure(events, artifact.key, str(error))
            failed[artifact.key] = str(error)
            if world > 1:  # the others may be waiting for this worker, and only a restart ends that
                raise
    shift, seconds = 0, dict[str, float]()
    for job in jobs:
        artifact = job.artifacts["zoo"]
        if "zoo" not in job.stages or not failed.keys().isdisjoint((artifact.key, job.artifacts["base"].key)):
            continue
        with _failing_alone(artifact, events):
            if not artifact.exists():
                started = time.monotonic()
                zoo.build(job.experiment, job.artifacts, context("zoo", job), shift)
                seconds[artifact.key] = time.monotonic() - started
        shift += len(zoo.runs_of(job.experiment.zoo))
    if world > 1:
        everyone = [seconds] * world
        dist.all_gather_object(everyone, seconds)  # when all have ended
        if rank == 0:
            _commit_zoos(jobs, everyone, events)
        dist.barrier()  # the group ends as soon as one of its workers does


def _commit_zoos(jobs: Sequence[Job], seconds: Sequence[Mapping[str, float]], events: str) -> None:
    """Commits the zoos that several workers have built, given the seconds that each of them took, by key."""
    for job in jobs:
        artifact = job.artifacts["zoo"]
        taken = [of_worker[artifact.key] for of_worker in seconds if artifact.key in of_worker]
        if not taken or artifact.exists():
            continue
        with _failing_alone(artifact, events):
            zoo.finish(job.experiment, job.artifacts, max(taken))


@contextlib.contextmanager
def _failing_alone(artifact: Artifact, events: str) -> Iterator[None]:
    """Reports what makes an artifact impossible, and lets the others be built."""
    try:
        yield
    except UnavailableError:
        raise
    except PdiffError as error:
        report_failure(events, artifact.key, str(error))


def _finished(artifact: Artifact, world: int) -> bool:
    """Tells whether rank 0 sees the artifact, so that all ranks decide the same."""
    seen = [artifact.exists()]
    if world > 1:
        dist.broadcast_object_list(seen)
    return seen[0]
