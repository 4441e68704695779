"""The stages of an experiment, each in one place: what determines its artifact, how it is built, and where."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from pdiff_ray.common.registry import fingerprint
from pdiff_ray.config.schema import Experiment
from pdiff_ray.data import sources
from pdiff_ray.networks.build import is_own
from pdiff_ray.stages import alignment, base, evaluation, generator, report, samples, zoo
from pdiff_ray.stages.context import Context
from pdiff_ray.storage.artifacts import KINDS, Artifact
from pdiff_ray.storage.files import Storage

# Of a zoo that was imported: the other fields are of its training, and serve the fine-tuned baseline alone.
IMPORTED_FIELDS = ("members", "subset", "batchnorm", "imported")

Build = Callable[[Experiment, Mapping[str, Artifact], Context], None]
Claim = Callable[[Artifact], AbstractContextManager[bool]]


@dataclass(frozen=True)
class Stage:
    """One step on the way from the configuration to the report.

    Attributes:
        config: gives what of an experiment determines the artifact, beside its input, as JSON values.
        build: makes the artifact, given those of all stages.
        place: where Ray runs it: the group of workers that trains, an actor, all actors together, or the driver.
        about: tells in a few words what an experiment asks of it.
        wanted: tells whether an experiment has it.
    """

    config: Callable[[Experiment], dict[str, Any]]
    build: Build
    place: Literal["workers", "actor", "actors", "driver"]
    about: Callable[[Experiment], str]
    wanted: Callable[[Experiment], bool] = lambda experiment: True


def _base_config(experiment: Experiment) -> dict[str, Any]:
    data, network = sources.keyed(experiment.data), experiment.network.keyed()
    code = {"code": fingerprint(experiment.network.name)} if is_own(experiment.network.name) else {}
    if experiment.zoo.imported:  # base and zoo came together, from files
        return {"data": data, "network": network, "imported": experiment.zoo.imported, **code}
    training = experiment.training
    config = {"data": data, "network": network, "training": training.keyed(), "seed": training.seed, **code}
    if experiment.resources.workers > 1:  # their BatchNorm layers see shares of the batches
        config["workers"] = experiment.resources.workers
    return config


def _zoo_config(experiment: Experiment) -> dict[str, Any]:
    zoo = experiment.zoo.keyed()
    return {name: zoo[name] for name in IMPORTED_FIELDS} if experiment.zoo.imported else zoo


def _learned(experiment: Experiment) -> dict[str, Any]:
    """Returns what tells which members are learned."""
    held_out = {"held_out": experiment.zoo.held_out} if experiment.split.held_out else {}
    return {"members": experiment.num_members, **held_out}


def _alignment_config(experiment: Experiment) -> dict[str, Any]:
    config = experiment.alignment
    learned = {"first": {"member": experiment.split.learned[0]}, "mean": _learned(experiment)}
    return config.keyed() | learned[config.reference]


def _generator_config(experiment: Experiment) -> dict[str, Any]:
    return experiment.generator.keyed() | _learned(experiment)


def _evaluation_config(experiment: Experiment) -> dict[str, Any]:
    config = experiment.evaluation.keyed()
    if own := [*experiment.evaluation.baselines, *experiment.evaluation.metrics]:
        config["code"] = {name: fingerprint(name) for name in own}
    if experiment.zoo.imported:
        zoo = experiment.zoo.keyed()
        config["fine_tuning"] = {name: zoo[name] for name in zoo if name not in IMPORTED_FIELDS}
    return config


def _about_zoo(experiment: Experiment) -> str:
    zoo, split = experiment.zoo, experiment.split
    kept_back = {"held out": len(split.held_out), "of a second run": len(split.second_run)}
    more = "".join(f", {count} {what}" for what, count in kept_back.items() if count)
    return f"{zoo.members} members, {zoo.regime}, {zoo.subset}{more}"


# In order: the artifact of each is made from that of the stage before it that the experiment has.
STAGES = {
    "base": Stage(
        _base_config, base.build, "workers", lambda e: f"{e.network.name} on {e.data.name}, {e.training.epochs} epochs"
    ),
    "zoo": Stage(_zoo_config, zoo.build, "workers", _about_zoo),
    "alignment": Stage(
        _alignment_config,
        alignment.build,
        "actor",
        lambda e: f"{e.alignment.method.replace('_', ' ')} to the {e.alignment.reference}",
        lambda e: e.alignment.method != "none",
    ),
    "generator": Stage(
        _generator_config, generator.build, "actor", lambda e: f"{e.generator} of {e.num_members} members"
    ),
    "samples": Stage(
        lambda e: e.sampling.keyed(),
        samples.build,
        "actor",
        lambda e: ", ".join(filter(None, [f"{e.sampling.samples} vectors", e.sampling.sampler])),
    ),
    "evaluation": Stage(
        _evaluation_config,
        evaluation.build,
        "actors",
        lambda e: f"{evaluation.num_networks(e)} networks on {e.resources.actors} actors",
    ),
    "report": Stage(lambda e: {"name": e.name}, report.build, "driver", lambda e: "tables and figures"),
}

assert tuple(STAGES) == KINDS


def artifacts_of(experiment: Experiment, storage: Storage) -> dict[str, Artifact]:
    """Returns the artifacts of the experiment's stages, in order: where results are stored, be they there or not."""
    found: dict[str, Artifact] = {}
    inputs: dict[str, str] = {}
    for name, stage in STAGES.items():
        if not stage.wanted(experiment):
            continue
        found[name] = Artifact(storage, name, stage.config(experiment), inputs)
        inputs = {name: found[name].key}
    return found


@contextlib.contextmanager
def unclaimed(artifact: Artifact) -> Iterator[bool]:
    """Gives whether an artifact is missing, where nothing else could be building it."""
    yield not artifact.exists()


def build_missing(
    stage: str,
    experiment: Experiment,
    artifacts: Mapping[str, Artifact],
    context: Context,
    claim: Claim = unclaimed,
    build: Build | None = None,
) -> None:
    """Builds the artifact of a stage unless it is there.

    Args:
        claim: holds others off meanwhile; gives whether the artifact is to be built.
        build: in place of the stage's own function.
    """
    with claim(artifacts[stage]) as missing:
        if missing:
            (build or STAGES[stage].build)(experiment, artifacts, context)
