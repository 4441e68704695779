"""Judges of an experiment's networks, and what they say of the computation that these share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pdiff_ray.config.schema import Experiment
from pdiff_ray.evaluation.judge import Judge
from pdiff_ray.networks.subset import Subset
from pdiff_ray.stages.base import load_network, open_dataset
from pdiff_ray.stages.context import Context
from pdiff_ray.storage.artifacts import Artifact


def base_judge(experiment: Experiment, artifacts: Mapping[str, Artifact], subset: Subset, context: Context) -> Judge:
    """Returns the judge of networks that differ from the base in `subset`, by the experiment's policies.

    The context keeps the last one for the stages to come, which mostly judge the same networks: to split a network
    takes seconds, and an accelerator holds what they share.
    """
    config = experiment.evaluation
    policies = (experiment.zoo.batchnorm, config.batch_size, "float32", context.cache, config.networks_per_program)
    key = (artifacts["base"].location, experiment.data, subset, *policies)
    if key not in context.judges:
        context.judges.clear()  # its memory is free before the next one is made
        network, dataset = load_network(experiment, artifacts), open_dataset(experiment, context)
        context.judges[key] = Judge(network, subset, dataset, context.device, *policies)
    return context.judges[key]


def describe_sharing(judge: Judge) -> dict[str, Any]:
    """Returns what a manifest says of judging: the part of a pass's FLOPs that networks share, or why there is none,
    and how many images and networks were judged at a time.
    """
    return {
        "shared": judge.partitioned.shared,
        "runs_whole": judge.partitioned.reason,
        "images_at_a_time": judge.capacity.images,
        "networks_at_a_time": judge.capacity.networks,
    }
