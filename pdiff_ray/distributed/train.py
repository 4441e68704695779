"""Base and zoo on Ray Train: a group of workers that builds the missing of the two stages, one after the other."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError

from pdiff_ray.artifacts import Artifact
from pdiff_ray.config import Experiment
from pdiff_ray.data import default_cache
from pdiff_ray.distributed.session import failure, gpu_share, report_failure, report_progress
from pdiff_ray.errors import PdiffError
from pdiff_ray.stages import Context, base, zoo

BUILDERS = {"base": base.build, "zoo": zoo.build}
# Workers wait for each other at the end of a stage, however unequal their shares.
COLLECTIVE_TIMEOUT_S = 7 * 24 * 3600


def train(experiment: Experiment, artifacts: Mapping[str, Artifact], stages: Sequence[str], events: str) -> None:
    """Builds `stages` (of "base" and "zoo") with `experiment.resources.workers` workers.

    A lost worker or node restarts the group, which goes on from what is in storage.

    Raises:
        PdiffError: what a worker found wrong.
    """
    resources, storage = experiment.resources, artifacts["base"].storage
    workers = useful_workers(experiment, stages)
    gpus = gpu_share(resources.gpus_per_worker, workers)
    per_worker = {"CPU": resources.cpus_per_worker, **({"GPU": gpus} if gpus else {})}
    name = f"ray-train-{uuid.uuid4().hex[:8]}"
    trainer = TorchTrainer(
        _work,
        train_loop_config={"experiment": experiment, "artifacts": dict(artifacts), "stages": stages, "events": events},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus > 0, resources_per_worker=per_worker),
        # NCCL takes one process per GPU.
        torch_config=TorchConfig("nccl" if gpus >= 1 else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        run_config=RunConfig(
            name=name,
            storage_filesystem=storage.fs,
            storage_path=storage.path("tmp"),
            failure_config=FailureConfig(max_failures=resources.max_failures),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError:
        if not failure(events):
            raise
    finally:
        with contextlib.suppress(OSError):  # Ray's marker files; the results are artifacts
            storage.fs.delete_dir(storage.path(f"tmp/{name}"))
    if message := failure(events):
        raise PdiffError(message)


def useful_workers(experiment: Experiment, stages: Sequence[str]) -> int:
    """No more workers than the zoo has runs, unless there is a base to train data-parallel."""
    runs = len(zoo.runs_of(experiment.zoo)) if "zoo" in stages else 1
    return experiment.resources.workers if "base" in stages else min(experiment.resources.workers, runs)


def _work(config: dict[str, Any]) -> None:
    experiment, artifacts, events = config["experiment"], config["artifacts"], config["events"]
    if failure(events):  # a restart cannot help
        return
    torch.set_num_threads(experiment.resources.cpus_per_worker)
    worker = ray.train.get_context()
    context = Context(
        get_device(), default_cache(), worker.get_world_rank(), worker.get_world_size(), report_progress(events)
    )
    try:
        for stage in config["stages"]:
            if not _finished(artifacts[stage], context):  # by the group that was there before a restart
                BUILDERS[stage](experiment, artifacts, context)
    except PdiffError as error:
        report_failure(events, str(error))
        if context.world > 1:  # the others may wait for this worker: only a restart ends them
            raise


def _finished(artifact: Artifact, context: Context) -> bool:
    """Whether rank 0 sees the artifact: all ranks have to go the same way."""
    seen = [artifact.exists()]
    if context.world > 1:
        dist.broadcast_object_list(seen)
    return seen[0]
