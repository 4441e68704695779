"""Base and zoo on Ray Train: a group of workers that builds the missing of the two stages, one after the other."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray.train
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError

from pdiff_ray.common.errors import PdiffError
from pdiff_ray.config.schema import Experiment
from pdiff_ray.data.cache import default_cache
from pdiff_ray.distributed.session import failures, gpu_share, report_failure, report_progress, take_place
from pdiff_ray.stages import base, zoo
from pdiff_ray.stages.context import Context
from pdiff_ray.storage.artifacts import Artifact

# Workers wait for each other at the end of a stage, however unequal their shares.
COLLECTIVE_TIMEOUT_S = 7 * 24 * 3600


@dataclass(frozen=True)
class Job:
    """An experiment of which some of the stages "base" and "zoo" are missing."""

    experiment: Experiment
    artifacts: Mapping[str, Artifact]
    stages: Sequence[str]


def train(jobs: Sequence[Job], events: str) -> dict[str, str]:
    """Builds what the jobs lack with one group of `resources.workers` workers.

    All workers train a base together, data-parallel, and share the runs of all zoos. A lost worker or node restarts the
    group, which goes on from what is in storage.

    Returns:
        What a user can mend, by the key of the artifact that could not be built.
    """
    resources, storage = jobs[0].experiment.resources, jobs[0].artifacts["base"].storage
    workers = useful_workers(jobs)
    gpus = gpu_share(resources.gpus_per_worker, workers)
    per_worker = {"CPU": resources.cpus_per_worker, **({"GPU": gpus} if gpus else {})}
    name = f"ray-train-{uuid.uuid4().hex[:8]}"
    trainer = TorchTrainer(
        _work,
        train_loop_config={"jobs": list(jobs), "events": events, "gpus": gpus},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus > 0, resources_per_worker=per_worker),
        # NCCL takes one process per GPU.
        torch_config=TorchConfig("nccl" if gpus >= 1 else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        run_config=RunConfig(
            name=name,
            storage_filesystem=storage.fs,
            storage_path=storage.path("tmp"),
            # A base that cannot be trained may cost a restart as well.
            failure_config=FailureConfig(max_failures=resources.max_failures + len(jobs) - 1),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError:
        if not failures(events):
            raise
        reason = next(iter(failures(events).values()))
        for job in jobs:
            for artifact in (job.artifacts[stage] for stage in job.stages):
                if not artifact.exists():  # trials must not build what a group of workers is to build
                    report_failure(events, artifact.key, f"the group of workers has ended: {reason}")
    finally:
        with contextlib.suppress(OSError):  # Ray's marker files; the results are artifacts
            storage.fs.delete_dir(storage.path(f"tmp/{name}"))
    return failures(events)


def useful_workers(jobs: Sequence[Job]) -> int:
    """No more workers than the zoos have runs, unless there is a base to train data-parallel."""
    workers = jobs[0].experiment.resources.workers
    if any("base" in job.stages for job in jobs):
        return workers
    return min(workers, sum(len(zoo.runs_of(job.experiment.zoo)) for job in jobs))


def _work(config: dict[str, Any]) -> None:
    jobs, events = config["jobs"], config["events"]
    device = take_place(jobs[0].experiment.resources.cpus_per_worker, config["gpus"], get_device())
    worker, progress = ray.train.get_context(), report_progress(events)
    rank, world = worker.get_world_rank(), worker.get_world_size()
    failed = failures(events)  # a restart cannot help them

    def context(number: int) -> Context:
        suffix = f" {number + 1}/{len(jobs)}" if len(jobs) > 1 else ""
        return Context(device, default_cache(), rank, world, lambda task, *rest: progress(f"{task}{suffix}", *rest))

    for number, job in enumerate(jobs):
        artifact = job.artifacts["base"]
        # It may be there by the group before a restart, or for a job before this one.
        if "base" not in job.stages or artifact.key in failed or _finished(artifact, world):
            continue
        try:
            base.build(job.experiment, job.artifacts, context(number))
        except PdiffError as error:
            report_failure(events, artifact.key, str(error))
            failed[artifact.key] = str(error)
            if world > 1:  # the others may wait for this worker: only a restart ends them
                raise
    shift = 0
    for number, job in enumerate(jobs):
        artifact = job.artifacts["zoo"]
        if "zoo" not in job.stages or not failed.keys().isdisjoint((artifact.key, job.artifacts["base"].key)):
            continue
        try:
            if not artifact.exists():
                zoo.build(job.experiment, job.artifacts, context(number), shift)
        except PdiffError as error:
            report_failure(events, artifact.key, str(error))
        shift += len(zoo.runs_of(job.experiment.zoo))
    if world > 1:
        dist.barrier()  # the group ends when its first worker does


def _finished(artifact: Artifact, world: int) -> bool:
    """Whether rank 0 sees the artifact: all ranks have to go the same way."""
    seen = [artifact.exists()]
    if world > 1:
        dist.broadcast_object_list(seen)
    return seen[0]
