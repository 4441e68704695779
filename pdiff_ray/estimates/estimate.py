"""What a plan will take: seconds and memory of every stage, and what its networks share.

Finished artifacts that differ in nothing but seeds say how long a stage takes; for the others, measured pieces are
multiplied by how often they are needed. Neither needs the data, but the number of its images.

Memory of a process is that of its libraries, the decoded images (mapped: the system can take them back), and of what
the stage holds at its peak: weights, gradients and the optimizer's state of what is trained; outputs of all operations
that training keeps for a batch; K vectors and their normalized and decoded copies; the live tensors of a judged chunk.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pdiff_ray.common.errors import StorageError
from pdiff_ray.config.schema import Experiment, Resources, Training, Zoo
from pdiff_ray.data import sources
from pdiff_ray.data.dataset import steps_per_epoch
from pdiff_ray.estimates.anatomy import Anatomy
from pdiff_ray.estimates.measure import MIN_CHUNK, Meter, Passes
from pdiff_ray.generators.latent_diffusion import CHUNK, GATE_MEMBERS
from pdiff_ray.networks.frontier import worth_keeping
from pdiff_ray.stages.evaluation import made_networks, make_stacks
from pdiff_ray.stages.table import STAGES
from pdiff_ray.stages.zoo import runs_of
from pdiff_ray.storage.artifacts import Artifact, finished, read_manifest
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.parameters import Record
from pdiff_ray.training.subset import full_steps

LIBRARIES_BYTES = 2**30  # of a process that has imported torch and what a stage needs
REPORT_S = 2.0
# Of what a new process imports for a stage: scikit-learn, torch.export, diffusers.
FIRST_USE_S = {"base": 1.0, "zoo": 2.0, "generator": 1.0, "samples": 1.5, "evaluation": 1.0}
EVALUATION_BATCH = 500
RECALIBRATION_IMAGES = 2048
LIVE_TENSORS = 4  # of the largest size, in a forward pass: input, output, shortcut and workspace of a layer
HISTORY_S = 1.0  # that reading manifests may take


@dataclass(frozen=True)
class Place:
    """Where stages run: processes and the threads of each."""

    workers: int  # of base and zoo
    worker_threads: int
    actors: int  # of the evaluation
    actor_threads: int
    new: bool  # processes, that have to import libraries

    @staticmethod
    def of_plan(r: Resources) -> Place:
        return Place(r.workers, r.cpus_per_worker, r.actors, r.cpus_per_actor, new=True)

    @staticmethod
    def of_trial(r: Resources) -> Place:
        """Trials run in processes that are there."""
        return Place(r.workers, r.cpus_per_worker, 1, r.cpus_per_trial, new=False)


@dataclass(frozen=True)
class Cost:
    """Of a stage.

    Attributes:
        seconds: that it takes; None if unknown.
        processes: that it keeps busy.
        memory: bytes of each.
        source: of the seconds.
    """

    seconds: float | None
    processes: int
    memory: float
    source: Literal["there", "earlier runs", "estimate"]

    @property
    def device_s(self) -> float | None:
        """Seconds of devices in all."""
        return None if self.seconds is None else self.seconds * self.processes


@dataclass(frozen=True)
class Sharing:
    """What networks that differ in the subset alone share, by FLOPs.

    Attributes:
        shared: part of a forward pass, 0 to 1.
        evaluation: how many times fewer FLOPs judging takes than whole passes would.
        zoo: the same of training steps.
        reason: why nothing, or why not training steps.
    """

    shared: float
    evaluation: float
    zoo: float
    reason: str | None

    @property
    def columns(self) -> tuple[str, str, str, str]:
        """In words: part of a pass, factors, reason."""
        return (f"{self.shared:.0%}", f"{self.evaluation:.1f} x", f"{self.zoo:.1f} x", self.reason or "")

    def __str__(self) -> str:
        part, evaluation, zoo, reason = self.columns
        why = f" ({reason})" if reason else ""
        return f"{part} of a forward pass; fewer FLOPs than whole networks: evaluation {evaluation}, zoo {zoo}{why}"


@dataclass(frozen=True)
class _Images:
    """Numbers of images, by use."""

    train: int
    validation: int
    judged: int  # of all splits that a network is judged on
    bytes: float  # decoded, in the cache


class Estimator:
    """Estimates stages of experiments, measuring each distinct piece once."""

    def __init__(self, storage: Storage, device: torch.device | None = None) -> None:
        self.meter = Meter(device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.storage = storage
        self._history: dict[str, float] | None = None

    @property
    def about(self) -> str:
        """How the numbers were found, in words."""
        device = "a CPU core" if self.meter.device.type == "cpu" else torch.cuda.get_device_name()
        counted = "; large networks by their FLOPs" if self.meter.counted else ""
        return f"an estimate from measuring {self.meter.spent_s:.1f} s on {device} of this machine{counted}"

    def anatomy(self, e: Experiment) -> Anatomy:
        """The anatomy of the experiment's network.

        Raises:
            ConfigError
        """
        return self.meter.anatomy(e.network, sources.describe(e.data), e.zoo)

    def sharing(self, e: Experiment, place: Place) -> Sharing:
        """What the experiment's networks share."""
        anatomy = self.anatomy(e)
        reason = full_steps(e, anatomy.subset)
        if not anatomy.shared:
            return Sharing(0.0, 1.0, 1.0, anatomy.runs_whole or "generated parameters reach the first layer")
        prefix, suffix = anatomy.prefix_flops, anatomy.suffix_flops
        networks, stacks = _judged_later(e, place.actors)
        images = _count(e)
        kept = images is None or _kept(anatomy, images.judged)
        once = 1 if kept else stacks
        evaluation = networks * anatomy.flops / max(1.0, once * prefix + networks * suffix)
        if reason is None and images is not None and not _kept(anatomy, images.train):
            reason = "computing takes no longer than reading"
        return Sharing(anatomy.shared, evaluation, 1.0 if reason else (prefix + 3 * suffix) / (3 * suffix), reason)

    def costs(
        self, e: Experiment, artifacts: Mapping[str, Artifact], missing: Collection[str], place: Place
    ) -> dict[str, Cost]:
        """The cost of every stage: nothing, where it is not among `missing`."""
        known = self._known(artifacts) if missing else {}
        estimates = _Stages(self.meter, e, place).costs() if missing else {}
        found = {}
        for stage in STAGES:
            if stage not in missing:
                found[stage] = Cost(0.0, 1, 0.0, "there")
            elif stage in known:
                found[stage] = Cost(known[stage], estimates[stage].processes, estimates[stage].memory, "earlier runs")
            else:
                found[stage] = estimates[stage]
        return found

    def _known(self, artifacts: Mapping[str, Artifact]) -> dict[str, float]:
        """Seconds of finished artifacts like these."""
        if self._history is None:
            self._history = _history(self.storage)
        known: dict[str, float] = {}
        signatures: dict[str, str] = {}
        for stage, artifact in artifacts.items():
            inputs = [signatures[name] for name in artifact.inputs]
            signatures[stage] = _signature(stage, artifact.config, inputs)
            if (seconds := self._history.get(signatures[stage])) is not None:
                known[stage] = seconds
        return known


class _Stages:
    """The stages of one experiment: how often they need which piece."""

    def __init__(self, meter: Meter, e: Experiment, place: Place) -> None:
        self.meter, self.e, self.place = meter, e, place
        self.info = sources.describe(e.data)
        self.anatomy = meter.anatomy(e.network, self.info, e.zoo)
        self.images = _count(e)

    def costs(self) -> dict[str, Cost]:
        place = self.place
        runs = len(runs_of(self.e.zoo))
        processes = {"base": place.workers, "zoo": min(place.workers, runs), "evaluation": place.actors}
        memory = self._memory()
        found = {}
        for stage in STAGES:
            device_s = None if self.images is None else getattr(self, f"_{stage}")(self.images)
            count = processes.get(stage, 1)
            seconds = None if device_s is None else device_s / count + place.new * FIRST_USE_S.get(stage, 0.0)
            found[stage] = Cost(seconds, count, LIBRARIES_BYTES + memory[stage], "estimate")
        return found

    # Seconds of devices.

    def _base(self, images: _Images) -> float:
        return self._training(images, self.place.workers) if not self.e.zoo.imported else 0.0

    def _training(self, images: _Images, workers: int = 1) -> float:
        """Of a whole network, with validation after every epoch, and judged in the end."""
        config = self.e.training
        epoch_s = workers * _steps(images.train, config.batch_size) * self._step(config, config.batch_size // workers)
        whole = self._passes().whole
        return config.epochs * (epoch_s + images.validation * whole) + images.judged * whole

    def _zoo(self, images: _Images) -> float:
        config = self.e.zoo
        if config.imported:
            return 0.0
        if config.regime == "independent":
            return config.members * (self._training(images) + self._judging(images, 1, 1))
        runs = len(runs_of(config))
        stacks = runs * math.ceil(config.members / runs / self.e.evaluation.stack)
        steps = self._zoo_steps(images)
        return steps * self._zoo_step(images) + self._judging(images, config.members, stacks)

    def _generator(self, images: _Images) -> float:
        gates = 2 * GATE_MEMBERS * images.validation * self._passes().suffix
        return self._cost_of_generator().fit + gates

    def _samples(self, images: _Images) -> float:
        return self._cost_of_generator().sample

    def _evaluation(self, images: _Images) -> float:
        networks, stacks = _judged_later(self.e, self.place.actors)
        config = self.e.evaluation
        steps = min(config.fine_tuned_networks, self.e.num_members) * config.fine_tuned_steps
        return self._judging(images, networks, stacks) + steps * self._zoo_step(images)

    def _report(self, images: _Images) -> float:
        return REPORT_S

    def _judging(self, images: _Images, networks: int, stacks: int) -> float:
        """Of networks that are judged in stacks."""
        passes = self._passes()
        once = 1 if self.anatomy.shared and _kept(self.anatomy, images.judged) else stacks
        seconds = images.judged * (once * passes.prefix + networks * passes.suffix)
        if self.e.zoo.batchnorm == "recalibrated":
            seconds += networks * min(RECALIBRATION_IMAGES, images.train) * passes.whole
        return seconds

    def _zoo_steps(self, images: _Images) -> int:
        config = self.e.zoo
        every = config.steps_per_member
        if every == "epoch":
            every = _steps(images.train, config.batch_size)
        return config.warmup_steps * len(runs_of(config)) + every * config.members

    # Seconds of pieces.

    def _passes(self) -> Passes:
        batch_size = self.e.evaluation.batch_size or EVALUATION_BATCH
        return self.meter.passes(self.e.network, self.info, self.e.zoo, batch_size, self.place.actor_threads)

    def _step(self, training: Training | Zoo, batch_size: int) -> float:
        e, threads = self.e, self.place.worker_threads
        return self.meter.step(e.network, self.info, e.data, e.zoo, training, batch_size, threads)

    def _zoo_step(self, images: _Images) -> float:
        config, anatomy = self.e.zoo, self.anatomy
        step = self._step(config, config.batch_size)
        if not anatomy.shared or full_steps(self.e, anatomy.subset) or not _kept(anatomy, images.train):
            return step
        least = step * 3 * anatomy.suffix_flops / (anatomy.prefix_flops + 3 * anatomy.suffix_flops)
        return max(step - config.batch_size * self._passes().prefix, least)

    def _cost_of_generator(self) -> Any:
        e, threads = self.e, self.place.actor_threads
        return self.meter.generator(e.generator, self.anatomy.subset.size, e.num_members, e.sampling, threads)

    # Bytes.

    def _memory(self) -> dict[str, float]:
        """The peak of a process of each stage, apart from its libraries."""
        e, anatomy = self.e, self.anatomy
        vector, weights = 4 * anatomy.subset.size, 4 * anatomy.parameters
        state = {"sgd": 1}.get(e.training.optimizer.name, 2)
        zoo_state = {"sgd": 1}.get(e.zoo.optimizer.name, 2)
        images = self.images.bytes if self.images else 0.0
        training = weights * (2 + state) + anatomy.operation_bytes * e.training.batch_size / self.place.workers
        judging = images + weights + e.evaluation.stack * vector + self._chunk_bytes()
        steps = weights + vector * (1 + zoo_state) + anatomy.suffix_bytes * e.zoo.batch_size
        independent = e.zoo.regime == "independent"
        generator = self._cost_of_generator()
        rows = min(max(e.generator.autoencoder.batch_size, CHUNK), e.num_members)
        fitting = 4 * 4 * generator.parameters + rows * generator.row_bytes
        return {
            "base": images + training,
            "zoo": judging + (training if independent else steps),
            "generator": judging + 4 * e.num_members * vector + fitting,
            "samples": 2 * (e.num_members + e.sampling.samples) * vector + 4 * generator.parameters
            + min(CHUNK, e.sampling.samples) * generator.row_bytes,
            "evaluation": judging + steps + e.num_members * vector,
            "report": 0.0,
        }  # fmt: skip

    def _chunk_bytes(self) -> float:
        """Of the tensors that live while a chunk of images is judged."""
        batch_size = self.e.evaluation.batch_size or EVALUATION_BATCH
        return max(MIN_CHUNK, min(batch_size, EVALUATION_BATCH)) * LIVE_TENSORS * self.anatomy.largest_bytes


def _kept(anatomy: Anatomy, images: int) -> bool:
    """Whether what is shared of so many images is kept, instead of computed again for every stack."""
    return worth_keeping(anatomy.frontier_bytes, anatomy.prefix_flops, images)


def _judged_later(e: Experiment, actors: int) -> tuple[int, int]:
    """Networks that the evaluation judges, and their stacks; members were judged when they were made."""
    networks = made_networks(e)
    if e.zoo.imported or e.evaluation.precision != "float32":
        networks += [Record(id_, "original") for id_ in range(e.num_members)]
    return len(networks), len(make_stacks(networks, e.evaluation.stack, actors))


def _count(e: Experiment) -> _Images | None:
    """The experiment's images; None if their number is unknown."""
    counts = sources.count_images(e.data)
    if counts is None:
        return None
    total, test = counts
    validation = max(1, round(total * e.data.validation_fraction))
    train = total - validation
    info = sources.describe(e.data)
    size = (total + test) * info.channels * info.image_size**2 * (4 if e.data.pixel_noise else 1)
    mapped = size if size <= e.data.max_cache_gib * 2**30 else 0
    return _Images(train, validation, min(e.data.selection_images, train) + validation + test, mapped)


def _steps(images: int, batch_size: int) -> int:
    return steps_per_epoch(max(images, batch_size), batch_size)


def _history(storage: Storage) -> dict[str, float]:
    """Seconds of finished artifacts by signature; of several, the longest: a resumed stage counts its last part."""
    started, manifests = time.monotonic(), {}
    for folder in finished(storage):
        if time.monotonic() - started > HISTORY_S:  # a distant or a very full storage
            break
        try:
            manifests[folder] = read_manifest(storage, folder)
        except StorageError:
            continue

    def signature(folder: str) -> str | None:
        manifest = manifests.get(folder)
        if manifest is None:
            return None
        inputs = [signature(f"{stage}/{key}") for stage, key in manifest["inputs"].items()]
        return None if None in inputs else _signature(manifest["stage"], manifest["config"], inputs)

    found: dict[str, float] = {}
    for folder, manifest in manifests.items():
        if (name := signature(folder)) is not None:
            found[name] = max(found.get(name, 0.0), manifest["seconds"])
    return found


def _signature(stage: str, config: Any, inputs: Collection[str | None]) -> str:
    """Equal for artifacts whose configurations, and those of all before them, differ in seeds alone."""
    named = {} if stage == "report" else _seedless(config)  # a report's is the experiment's name
    text = json.dumps([stage, named, sorted(map(str, inputs))], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _seedless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _seedless(content) for key, content in value.items() if key != "seed"}
    return [_seedless(item) for item in value] if isinstance(value, list | tuple) else value


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def duration(seconds: float | None) -> str:
    """Seconds in the unit that suits them, to two digits."""
    if seconds is None:
        return "?"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{_two_digits(seconds / length)} {unit}"
    return f"{_two_digits(seconds)} s"


def _two_digits(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{round(value, 1 - math.floor(math.log10(value))):.0f}"
