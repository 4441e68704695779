"""What an experiment will take: seconds and memory of every stage.

Stages take as long as those of finished artifacts that differ in nothing that takes time. For the others, FLOPs are
counted and divided by the rate of matrix products on this machine. Only the number of images is needed, not the data.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.benchmark import Timer

from pdiff_ray.common.devices import exact_float32
from pdiff_ray.common.errors import StorageError
from pdiff_ray.config.schema import Experiment, Training, Zoo
from pdiff_ray.data import sources
from pdiff_ray.data.dataset import steps_per_epoch
from pdiff_ray.estimates.flops import Counts, count
from pdiff_ray.evaluation import recalibration
from pdiff_ray.generators.encoders import GATE_MEMBERS
from pdiff_ray.stages.alignment import BLOCK_VALUES
from pdiff_ray.stages.evaluation import TASK_BYTES, made_networks
from pdiff_ray.stages.zoo import runs_of
from pdiff_ray.storage.artifacts import Artifact, Manifest, finished, read_manifest
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.matrix import CHUNK_BYTES, HELD_BYTES, ROWS_BYTES
from pdiff_ray.training.subset import full_steps

EFFICIENCY = 0.25  # of the rate of matrix products: 0.1 in small networks and autoencoders, 0.7 in large networks
STEP_S = 2e-3  # of a training step beside its FLOPs: batches are made, and operations launched
REPORT_S = 4.0
TURNS, MEAN_ROUNDS = 6, 3  # of a group, until its network is matched; of a mean that evolves
LIBRARIES_BYTES = 2**30  # of a process that has imported torch and what a stage needs
HISTORY_S = 1.0  # that reading manifests may take
UNTIMED = {"seed", "lr", "weight_decay", "momentum", "schedule", "label_smoothing", "parameter_noise", "latent_noise"}


class Cost(NamedTuple):
    """What a stage takes: seconds (None if unknown) of so many processes at a time, and bytes of each of them."""

    seconds: float | None
    processes: int
    memory: float
    known: bool  # whether the seconds are those of an earlier run

    @property
    def device_s(self) -> float | None:
        """Seconds of all processes together."""
        return None if self.seconds is None else self.seconds * self.processes


class Images(NamedTuple):
    """How many images are in splits, and in all that a network is judged on; bytes of those mapped into memory."""

    train: int
    validation: int
    judged: int
    bytes: float


class Estimator:
    """Estimates stages of experiments; each distinct network is counted once.

    Args:
        trace: finds out whether networks can be cut, which takes seconds for each; else it is taken for granted.
    """

    def __init__(self, storage: Storage, trace: bool = False) -> None:
        exact_float32()  # as in the work that is estimated
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.storage, self.trace = storage, trace
        self._counts: dict[str, Counts] = {}
        self._rates: dict[str, float] = {}

    @property
    def basis(self) -> str:
        """How seconds are found that no earlier run tells, in words."""
        device = "a CPU core" if self.device.type == "cpu" else torch.cuda.get_device_name()
        rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {precision}" for precision, rate in self._rates.items())
        return f"FLOPs at {EFFICIENCY:.0%} of the rate of matrix products on {device} of this machine ({rates})"

    def counts(self, e: Experiment) -> Counts:
        """Returns the counts of the experiment's network.

        Networks that differ in their number of classes alone are counted once, unless heads are generated: it takes
        tenths of a second, and heads are small.

        Raises:
            ConfigError: the network cannot be built, or has no such subset.
        """
        info = sources.describe(e.data)
        key = repr((e.network, info.channels, info.image_size, e.zoo.subset, e.zoo.batchnorm))
        exact = f"{key} {info.num_classes}"
        found = self._counts.get(key) or self._counts.get(exact)
        if found is None:
            found = count(e.network, info, e.zoo, self.trace)
            generated = any(info.num_classes in entry.shape for entry in found.subset.entries)
            self._counts[exact if generated else key] = found
        return found

    def costs(self, e: Experiment, artifacts: Mapping[str, Artifact], missing: Sequence[str]) -> dict[str, Cost]:
        """Returns the costs of the stages that are `missing`."""
        if not missing:
            return {}
        images = count_images(e)
        stages = self._stages(e, self.counts(e), images or Images(0, 0, 0, 0.0))
        manifests = {artifact.folder: artifact for artifact in artifacts.values()}
        costs = {}
        for stage in missing:
            core_s, memory, processes, threads = stages[stage]
            counted = core_s / processes / (threads if self.device.type == "cpu" else 1) if images else None
            earlier = self._history.get(_signature(artifacts[stage].folder, manifests))
            seconds, known = (counted, False) if earlier is None else (earlier, True)
            costs[stage] = Cost(seconds, processes, LIBRARIES_BYTES + memory, known)
        return costs

    def _stages(self, e: Experiment, counts: Counts, images: Images) -> dict[str, tuple[float, float, int, int]]:
        """Returns what stages take: seconds of a core or GPU, and a process's bytes; its processes and their cores."""
        training, zoo, evaluation, members, r = e.training, e.zoo, e.evaluation, e.num_members, e.resources
        whole, prefix, suffix = counts.flops, counts.flops - counts.suffix_flops, counts.suffix_flops
        fit, sample, fitting = e.generator.cost(counts.subset.size, members, e.sampling)

        def seconds(flops: float, precision: str = "float32") -> float:
            return flops / EFFICIENCY / self._rate(precision)

        def step_s(config: Training | Zoo, flops: float) -> float:
            return STEP_S + seconds(config.batch_size * flops, config.precision)

        def epoch_steps(config: Training | Zoo) -> int:
            return steps_per_epoch(max(images.train, config.batch_size), config.batch_size)

        def judging_s(networks: int, precision: str = "float32") -> float:
            flops = images.judged * (prefix + networks * suffix)
            if zoo.batchnorm == "recalibrated":
                flops += networks * min(recalibration.IMAGES, images.train) * whole
            return seconds(flops, precision)

        epoch_s = epoch_steps(training) * step_s(training, 3 * whole) + seconds(images.validation * whole)
        base_s = training.epochs * epoch_s + seconds(images.judged * whole)
        zoo_step_s = step_s(zoo, 3 * suffix + (prefix if full_steps(e, counts.subset) else 0))
        every = epoch_steps(zoo) if zoo.steps_per_member == "epoch" else zoo.steps_per_member
        steps = sum(zoo.warmup_steps + every * (run.places[-1] + 1) for run in runs_of(zoo))
        zoo_s = zoo.members * base_s if zoo.regime == "independent" else steps * zoo_step_s
        zoo_s += judging_s(zoo.size)
        if zoo.imported:
            base_s = zoo_s = 0.0
        made = made_networks(e)
        judged_before = not zoo.imported and evaluation.precision == "float32"
        evaluation_s = judging_s(len(made) + (0 if judged_before else zoo.size), evaluation.precision)
        evaluation_s += sum(recipe.group == "fine_tuned" for recipe in made) * evaluation.fine_tuned_steps * zoo_step_s
        gates = 2 * GATE_MEMBERS * images.validation * suffix

        entries = counts.subset.entries  # every axis as if its units were matched
        products = sum(2.0 * math.prod(entry.shape) * sum(entry.shape) for entry in entries)
        aligned = zoo.size * TURNS * (MEAN_ROUNDS if e.alignment.reference == "mean" else 1) * products

        weights, vector = 4 * counts.parameters, 4 * counts.subset.size
        # Values, gradients and an optimizer's two moments; and what the backward pass of a batch reads.
        trained = 4 * weights + training.batch_size / r.workers * counts.bytes
        tuned = trained if zoo.regime == "independent" else 4 * vector + zoo.batch_size * counts.bytes
        judging = images.bytes + weights + min(evaluation.networks_per_task * vector, TASK_BYTES)
        # Vectors as they are, normalized, and decoded; else the columns and samples that are read or drawn at a time.
        vectors, drawn, actor = 4 * members * vector, 2 * (members + e.sampling.samples) * vector, r.cpus_per_actor
        if not e.generator.in_memory:
            vectors, drawn = min(vectors, 8 * CHUNK_BYTES), min(drawn, 2 * ROWS_BYTES)
        return {
            "base": (base_s, images.bytes + trained, r.workers, r.cpus_per_worker),
            "zoo": (zoo_s, judging + tuned, min(r.workers, len(runs_of(zoo))), r.cpus_per_worker),
            "alignment": (seconds(aligned), 3 * 4.0 * min(BLOCK_VALUES, zoo.size * counts.subset.size), 1, actor),
            "generator": (seconds(fit + gates), judging + vectors + fitting, 1, actor),
            "samples": (seconds(sample), drawn + fitting, 1, actor),
            "evaluation": (evaluation_s, judging + tuned + min(members * vector, HELD_BYTES), r.actors, actor),
            "report": (REPORT_S, 0.0, 1, actor),
        }

    def _rate(self, precision: str) -> float:
        """Returns FLOP/s of matrix products in a precision; of one core, if the device is a CPU."""
        if precision not in self._rates:
            edge = 512 if self.device.type == "cpu" else 4096
            matrix = torch.randn(edge, edge, device=self.device).to(getattr(torch, precision))
            timer = Timer("(matrix @ matrix)[0, 0].item()", globals={"matrix": matrix})  # on one thread
            fastest = min(timer.timeit(1).mean for _ in range(6))  # what else runs here slows the others
            self._rates[precision] = 2 * edge**3 / fastest
        return self._rates[precision]

    @functools.cached_property
    def _history(self) -> dict[str, float]:
        """Seconds of finished artifacts by signature, the most of several: a resumed stage counts its last part."""
        started, manifests = time.monotonic(), dict[str, Manifest]()
        for folder in finished(self.storage):
            if time.monotonic() - started > HISTORY_S:  # a distant or a very full storage
                break
            with contextlib.suppress(StorageError):  # it is damaged
                manifests[folder] = read_manifest(self.storage, folder)
        found: dict[str, float] = {}
        for folder, manifest in manifests.items():
            signature = _signature(folder, manifests)
            found[signature] = max(found.get(signature, 0.0), manifest.seconds)
        return found


def count_images(e: Experiment) -> Images | None:
    """Returns how many images the experiment uses; None if that is unknown."""
    counts, info = sources.count_images(e.data), sources.describe(e.data)
    if counts is None:
        return None
    total, test = counts
    validation = max(1, round(total * e.data.validation_fraction))
    train = total - validation
    size = (total + test) * info.channels * info.image_size**2 * (4 if e.data.pixel_noise else 1)
    mapped = size if size <= e.data.max_cache_gib * 2**30 else 0  # larger ones are streamed
    return Images(train, validation, min(e.data.selection_images, train) + validation + test, mapped)


def _signature(folder: str, manifests: Mapping[str, Manifest | Artifact]) -> str:
    """Returns what is equal for artifacts that differ, as do all before them, in nothing that takes time.

    Args:
        manifests: by folder; of each, only the configuration and the inputs are read.
    """

    def tree(folder: str) -> Any:
        if (manifest := manifests.get(folder)) is None:
            return [folder.split("/")[0], folder, []]
        return [manifest.stage, manifest.config, [tree("/".join(item)) for item in manifest.inputs.items()]]

    timed = json.loads(json.dumps(tree(folder)), object_hook=lambda o: {key: o[key] for key in o.keys() - UNTIMED})
    return json.dumps(timed, sort_keys=True)
