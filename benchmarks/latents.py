"""Benchmarks of generators in the members' subspace, against the default generator: time, memory and its growth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Result, peak_mib, result
from pdiff_ray.config import loading
from pdiff_ray.config.schema import Generator, Sampling
from pdiff_ray.config.section import merge
from pdiff_ray.generators.interface import Fitting
from pdiff_ray.generators.table import make_generator
from pdiff_ray.networks.subset import Entry, Subset
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.matrix import StoredVectors
from pdiff_ray.storage.parameters import ParameterStore, Record

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LIMIT_MIB = 1536  # of a process that fits and draws, whatever the number of values
RESNET, WHOLE_GIB = Path(__file__).with_name("whole_resnet18.yaml"), 6  # of one that does all of this experiment
# A zoo of S-2s, 55,050 values each, that needs no download: digits at MNIST's size.
ZOO = {
    "name": "latents",
    "data": {"name": "digits", "image_size": 28, "train_noise": 0.3},
    "network": {"name": "s2"},
    "training": {"epochs": 10},
    "zoo": {"members": 200, "held_out": 0, "second_run": 0, "subset": "all", "optimizer": {"lr": 3e-3}},
    "generator": {"autoencoder": {"stride": 4, "kernel_size": 9}},  # as sweeps/mnist_s2.yaml has it
}
SUBSPACE: dict[str, Any] = {"name": "latent", "seed": 0}
# All of what the members span, and of it what the default generator's samples keep of it.
OURS: dict[str, dict[str, Any]] = {
    "flow in the subspace": SUBSPACE,
    "flow in the leading components": merge(SUBSPACE, {"encoder": {"name": "subspace", "variance": 0.8}}),
}


def fit(samples: int = 100, **changes: Any) -> Iterator[Result]:
    """Fitting a generator to whole networks and drawing samples, each once, with what the networks are worth."""
    # Here, as the processes that `growth_D` starts need none of it.
    from pdiff_ray.data.kept import default_cache
    from pdiff_ray.stages.context import Context
    from pdiff_ray.stages.judging import base_judge
    from pdiff_ray.stages.table import artifacts_of, build_missing

    with tempfile.TemporaryDirectory() as folder:
        experiment = loading.parse_experiment(merge(ZOO, {**changes, "storage": folder}), "benchmark fit")
        artifacts = artifacts_of(experiment, Storage(experiment.storage_uri))
        context = Context(DEVICE, default_cache())
        for stage in ("base", "zoo"):
            build_missing(stage, experiment, artifacts, context)
        zoo = ParameterStore(artifacts["zoo"])
        subset, members = zoo.subset(), StoredVectors(zoo, experiment.split.learned, DEVICE)
        judge = base_judge(experiment, artifacts, subset, context)
        spread = float(members.all().std(0).norm())

        def timed(settings: Generator) -> tuple[float, str]:
            generator, fitting = make_generator(settings, subset), Fitting(DEVICE, 0)
            started = time.perf_counter()
            generator.fit(members, fitting)
            vectors = generator.sample(samples, Sampling(samples=samples, seed=0), DEVICE).cpu()
            seconds = time.perf_counter() - started
            judged = judge.judge(vectors, ["test"])
            accuracy = np.mean([100 * (judgement.test_accuracy or 0.0) for judgement in judged])
            unexplained, varied = fitting.notes["unexplained_variance"], float(vectors.std(0).norm()) / spread
            return seconds, f"accuracy {accuracy:.2f}%, unexplained variance {unexplained:.1%}, spread {varied:.2f}"

        default_s, default = timed(experiment.generator)
        for name, settings in OURS.items():
            ours_s, ours = timed(Generator.model_validate(settings))
            yield result(
                "fit",
                f"{len(members)} networks of {subset.size:,} values, {samples} samples, {name}",
                "the default generator",
                [(ours_s, default_s)],
                target=20.0,
                note=f"{ours}; default: {default}",
            )


def fit_memory(members: int = 200, values: int = 300_288) -> Iterator[Result]:
    """Memory of fitting beyond the vectors themselves, which are held. Two training steps take as much as all do."""
    vectors = torch.randn(members, values, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    subset, brief = Subset((Entry("weight", (values,), 0, "parameter"),)), {"steps": 2}

    def peak(settings: Mapping[str, Any]) -> float | None:
        generator = make_generator(Generator.model_validate({"seed": 0, **settings}), subset)
        return peak_mib(lambda: generator.fit(vectors, Fitting(DEVICE, 0)))

    ours = peak({**SUBSPACE, "process": {"name": "flow", **brief}})
    other = peak({"autoencoder": brief, "diffusion": brief})
    if ours is None or other is None:
        return
    what = f"peak of fitting {members} vectors of {values:,} values, flow in the subspace"
    yield result("fit_memory", what, "the default generator", [(ours, other)], target=10.0, unit="MiB")


def growth_D(
    sizes: Sequence[int] = (10**4, 10**5, 10**6, 10**7), members: int = 50, samples: int = 20, default_to: int = 10**5
) -> Iterator[Result]:
    """Memory of a process that fits to a store and writes samples into another, for ever longer vectors.

    Args:
        default_to: values of the longest vectors that the default generator is fitted to, too.
    """
    for size in sizes:
        what = f"process: {members} stored vectors of {size:,} values fitted, {samples} samples written"
        ours = _process(size, members, samples, SUBSPACE)
        yield result("growth_D", what, f"a limit of {LIMIT_MIB} MiB", [(ours, LIMIT_MIB)], target=1.0, unit="MiB")
        if size <= default_to:
            other = _process(size, members, samples, {"autoencoder": {"steps": 2}, "diffusion": {"steps": 2}})
            yield result("growth_D", what, "the default generator", [(ours, other)], unit="MiB")


def verdict_D(values: int = 10**7, members: int = 50, samples: int = 20) -> Iterator[Result]:
    """Memory of a process that fits, draws and then says what the samples are, by vectors alone."""
    ours = _process(values, members, samples, SUBSPACE, told=True)
    what = f"process: {samples} samples told from copies, noise and Gaussians of {members} vectors of {values:,} values"
    yield result("verdict_D", what, f"a limit of {LIMIT_MIB} MiB", [(ours, LIMIT_MIB)], target=1.0, unit="MiB")


def whole(overrides: Sequence[str] = ()) -> Iterator[Result]:
    """Memory of a process that has a ResNet-18 trained, generated and judged whole, from the base to the report."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pdiff_ray.sweep", str(RESNET), "--storage", folder, "--in-process"]
        command += [argument for override in overrides for argument in ("--set", override)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} has failed")
    what = "an experiment of whole ResNet-18s, of 11,172,810 values"
    peak = usage.ru_maxrss / 2**20
    yield result("whole", what, f"a limit of {WHOLE_GIB} GiB", [(peak, WHOLE_GIB)], target=1.0, unit="GiB")


def _process(values: int, members: int, samples: int, settings: Mapping[str, Any], told: bool = False) -> float:
    """Returns the highest memory (MiB) of a process that does `from_store_to_samples`, and `verdict_of` if told."""
    arguments = json.dumps([values, members, samples, {"seed": 0, **settings}, told])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.latents", folder, arguments]
        fill(folder, values, members)
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def fill(folder: str, values: int, members: int) -> None:
    """Writes a finished zoo of random vectors."""
    artifact, random = Artifact(Storage(folder), "zoo", {}, {}), np.random.default_rng(0)
    store, subset = ParameterStore(artifact), Subset((Entry("weight", (values,), 0, "parameter"),))
    for id_ in range(members):
        vector = random.standard_normal(values, dtype=np.float32)
        store.append([Record(id_, "original", vector=vector)], subset)
    artifact.commit({}, {}, 0.0, store.manifest_entries(range(members)))


def from_store_to_samples(
    folder: str, values: int, members: int, samples: int, settings: Mapping[str, Any], told: bool
) -> None:
    """Does what the stages generator and samples do with vectors, and that of the evaluation if it is told so."""
    storage = Storage(folder)
    zoo, drawn = ParameterStore(Artifact(storage, "zoo", {}, {})), ParameterStore(Artifact(storage, "samples", {}, {}))
    generator = make_generator(Generator.model_validate(dict(settings)), zoo.subset())
    generator.fit(StoredVectors(zoo), Fitting(torch.device("cpu"), 0))
    for vectors in generator.draw(samples, Sampling(samples=samples, seed=0), torch.device("cpu")):
        first = len(drawn.ids)
        records = [Record(id_, "generated", vector=row) for id_, row in enumerate(vectors.numpy(), first)]
        drawn.append(records, zoo.subset())
        del vectors, records  # before the next ones are drawn, as the stage does
    generator.encode(StoredVectors(drawn))
    if told:
        verdict_of(StoredVectors(zoo), StoredVectors(drawn), zoo.subset())


def verdict_of(members: StoredVectors, samples: StoredVectors, subset: Subset) -> None:
    """Does what the evaluation does with vectors, with one kind of each sort: the others take as much."""
    from pdiff_ray.evaluation.diagnostics import diagnose
    from pdiff_ray.evaluation.geometry import Geometry
    from pdiff_ray.evaluation.novelty import assess
    from pdiff_ray.evaluation.similarity import distances
    from pdiff_ray.stages.verdict import families

    diagnose(members, range(len(members)))
    distances(samples, members)
    geometry = Geometry(members)
    known = families(members, geometry, subset, 0)
    assess(geometry, samples, {name: known[name] for name in ("copies", "noise 0.5", "gaussian per value")}, {})


if __name__ == "__main__":
    import resource

    torch.set_num_threads(1)
    from_store_to_samples(sys.argv[1], *json.loads(sys.argv[2]))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
