"""Benchmarks of the core, with torch alone: no Ray, no MLflow."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Result, compare
from pdiff_ray.artifacts import Artifact, Storage
from pdiff_ray.config import Diffusion as DiffusionSettings
from pdiff_ray.config import Sampling
from pdiff_ray.generators.diffusion import Diffusion
from pdiff_ray.store import ParameterStore, Record
from pdiff_ray.subset import Entry, Subset

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LATENT_DIM, NUM_SAMPLES = 32, 100


def sampling() -> Iterator[Result]:
    """100 latents through 1000 steps: in one batch, against one at a time."""
    for denoiser, width, singles in (("mlp", 256, 5), ("cnn", 64, 1)):
        model = Diffusion(DiffusionSettings(denoiser=denoiser, width=width), LATENT_DIM).to(DEVICE).eval()
        one = Sampling(samples=1, seed=0)

        def in_turn(model: Diffusion = model, one: Sampling = one, singles: int = singles) -> None:
            for _ in range(singles):
                model.sample(1, one, DEVICE)

        yield compare(
            "sampling",
            f"{NUM_SAMPLES} samples, 1000 steps, {denoiser} denoiser, in one batch",
            lambda model=model: model.sample(NUM_SAMPLES, Sampling(seed=0), DEVICE),
            "one at a time",
            in_turn,
            other_scale=singles / NUM_SAMPLES,
            note=f"the other way measured on {singles} of {NUM_SAMPLES} samples and scaled",
        )


def few_step() -> Iterator[Result]:
    """100 latents with few-step samplers, against 1000 steps."""
    model = Diffusion(DiffusionSettings(), LATENT_DIM).to(DEVICE).eval()
    for sampler, steps in (("ddim", 50), ("dpmsolver++", 20)):
        few = Sampling(sampler=sampler, steps=steps, seed=0)
        yield compare(
            "few_step",
            f"{NUM_SAMPLES} samples, {sampler} with {steps} steps",
            lambda few=few: model.sample(NUM_SAMPLES, few, DEVICE),
            "ddpm with 1000 steps",
            lambda: model.sample(NUM_SAMPLES, Sampling(seed=0), DEVICE),
        )


def store() -> Iterator[Result]:
    """Reading members of a store of 10,000 with 2,048 values each, against a `.pth` file per member."""
    dimension, count, k = 2048, 10_000, 200
    subset = Subset((Entry("weight", (dimension,), 0, "parameter"),))
    vectors = np.random.default_rng(0).standard_normal((count, dimension), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(f"{folder}/storage")
        artifact = Artifact(storage, "zoo", {"benchmark": "store"}, {})
        growing = ParameterStore(artifact)
        for start in range(0, count, 100):
            growing.append([Record(i, "original", vector=vectors[i]) for i in range(start, start + 100)], subset)
        artifact.commit({}, {}, 0.0, growing.manifest_entries(range(count)))
        for i in range(count):
            torch.save({"weight": torch.from_numpy(vectors[i])}, f"{folder}/{i}.pth")
        opened = ParameterStore(artifact)

        def from_files(ids: range) -> np.ndarray:
            loaded = [torch.load(Path(folder) / f"{i}.pth", weights_only=True)["weight"] for i in ids]
            return torch.stack(loaded).numpy()

        for ids, what in ((range(5000, 5001), "one member"), (range(k), f"{k} of {count:,} members")):
            np.testing.assert_array_equal(opened.vectors(ids), from_files(ids))
            yield compare(
                "store",
                f"read {what} of {dimension:,} values from Parquet",
                lambda ids=ids: opened.vectors(ids),
                ".pth files",
                lambda ids=ids: from_files(ids),
                n=9,
            )


BENCHMARKS: dict[str, Callable[[], Iterator[Result]]] = {"sampling": sampling, "few_step": few_step, "store": store}
