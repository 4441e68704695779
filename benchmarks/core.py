"""Benchmarks of generators and of storage, without Ray and MLflow."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Result, compare
from pdiff_ray.config.schema import Evaluation, Sampling
from pdiff_ray.generators import samplers
from pdiff_ray.generators.autoencoder import Autoencoder
from pdiff_ray.generators.diffusion import Diffusion, DiffusionSettings
from pdiff_ray.generators.interface import Fitting
from pdiff_ray.generators.latent import LatentDiffusionSettings
from pdiff_ray.generators.training import fit_model
from pdiff_ray.networks.subset import Entry, Subset
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.parameters import ParameterStore, Record

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LATENT_DIM = 32
Read = Callable[[Sequence[int]], np.ndarray | list[np.ndarray]]  # ids to vectors


def sampling(samples: int = 100, steps: int = 1000) -> Iterator[Result]:
    """Latents through all steps: in one batch, against one at a time."""
    schedule = Sampling(seed=0)
    for denoiser, width, singles in (("mlp", 256, 5), ("cnn", 64, 1)):
        settings = DiffusionSettings(denoiser=denoiser, width=width, num_timesteps=steps)
        model = Diffusion(settings, LATENT_DIM).to(DEVICE).eval()

        def batch(model: Diffusion = model) -> Tensor:
            return samplers.sample(model, samples, schedule, DEVICE)

        def in_turn(model: Diffusion = model, singles: int = singles) -> None:
            for _ in range(singles):
                samplers.sample(model, 1, schedule, DEVICE)

        def plain(model: Diffusion = model, singles: int = singles) -> None:
            for _ in range(singles):
                _with_diffusers(model, torch.randn(1, LATENT_DIM, device=DEVICE))

        _check_sampling(model, singles, schedule)
        what = f"{samples} samples, {steps} steps, {denoiser} denoiser, in one batch"
        note = f"the other way measured on {singles} of {samples} samples and scaled"
        scale, target = singles / samples, 15.0 if denoiser == "mlp" else None
        against = "one at a time"
        yield compare("sampling", what, batch, against, in_turn, other_scale=scale, target=target, note=note)
        if denoiser == "mlp":
            against = "one at a time, step by step with diffusers' scheduler"
            yield compare("sampling", what, batch, against, plain, other_scale=scale, note=note)


@torch.inference_mode()
def _with_diffusers(model: Diffusion, x: Tensor) -> Tensor:
    """DDPM as the library's documentation has it."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    scheduler = DDPMScheduler(
        model.settings.num_timesteps,
        model.settings.beta_start,
        model.settings.beta_end,
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[model.prediction],
        timestep_spacing="trailing",
        clip_sample=False,
    )
    scheduler.set_timesteps(model.settings.num_timesteps)
    for t in scheduler.timesteps:
        prediction = model.denoiser(x, model.denoiser.embedding(t.expand(len(x)).to(x.device)))
        x = scheduler.step(prediction, t, x).prev_sample
    return x


def _check_sampling(model: Diffusion, singles: int, schedule: Sampling) -> None:
    """The first samples of a batch are those that the same noise gives one at a time."""
    x, *noise = torch.randn(model.settings.num_timesteps + 1, 32, LATENT_DIM, device=DEVICE).unbind()
    together = iter(noise)
    batch = samplers.denoise(model, x, schedule, lambda: next(together))
    for row in range(singles):
        drawn = iter(noise)
        one = samplers.denoise(
            model, x[row : row + 1], schedule, lambda drawn=drawn, row=row: next(drawn)[row : row + 1]
        )
        torch.testing.assert_close(one[0], batch[row], rtol=1e-2, atol=1e-2 * float(batch.std()))


def few_step(samples: int = 100, train_steps: int = 600) -> Iterator[Result]:
    """Latents with few-step samplers, against all 1000 steps; of a trained denoiser, so that they can be compared."""
    torch.manual_seed(0)
    settings = DiffusionSettings(steps=train_steps)
    model = Diffusion(settings, LATENT_DIM).to(DEVICE)
    latents = torch.randn(200, 8) @ torch.randn(8, LATENT_DIM)
    latents = ((latents - latents.mean(0)) / latents.std(0)).to(DEVICE)
    fit_model("diffusion", model, latents, settings, Fitting(DEVICE, 0), ema_decay=settings.ema_decay)
    whole = Sampling(seed=0)
    expected = samplers.sample(model, 500, whole, DEVICE)
    for sampler, steps in (("ddim", 50), ("dpmsolver++", 20)):
        few = Sampling(sampler=sampler, steps=steps, seed=0)
        found = samplers.sample(model, 500, few, DEVICE)
        assert (found.mean(0) - expected.mean(0)).abs().max() < 0.4, "the few-step samples lie elsewhere"
        spreads = [float(x.std(0).mean()) for x in (found, expected, latents)]
        assert 0.8 < spreads[0] / spreads[1] < 1.25, "the few-step samples vary more or less"
        distances = [float(torch.cdist(x, latents).min(1).values.mean()) for x in (found, expected)]
        yield compare(
            "few_step",
            f"{samples} samples, {sampler} with {steps} steps",
            lambda few=few: samplers.sample(model, samples, few, DEVICE),
            "ddpm with 1000 steps",
            lambda: samplers.sample(model, samples, whole, DEVICE),
            target=10.0,
            note=f"spread {spreads[0]:.2f} against {spreads[1]:.2f} (of the learned latents {spreads[2]:.2f}), "
            f"distance to the nearest of these {distances[0]:.2f} against {distances[1]:.2f}",
        )


def training(members: int = 200, dimension: int = 2048, steps: int = 300) -> Iterator[Result]:
    """Steps of both models, which are graphs on a GPU, against single kernels; on a CPU both are the same."""
    settings = LatentDiffusionSettings(seed=0)
    vectors = torch.randn(members, dimension, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    rows = {"autoencoder": vectors, "diffusion": torch.randn(members, settings.autoencoder.latent_dim, device=DEVICE)}

    def fit(name: str, graphs: bool) -> Tensor:
        torch.manual_seed(0)
        latent_dim = settings.autoencoder.latent_dim
        models = Autoencoder(settings.autoencoder, dimension), Diffusion(settings.diffusion, latent_dim)
        model = models[name == "diffusion"]
        fitting = Fitting(DEVICE, 0, graphs=graphs)
        own = model.settings.model_copy(update={"steps": steps})
        fit_model(name, model.to(DEVICE), rows[name], own, fitting)
        return torch.tensor(fitting.history[name])

    for name, data in rows.items():
        torch.testing.assert_close(fit(name, True)[:50], fit(name, False)[:50], rtol=0.05, atol=0.01)
        yield compare(
            "training",
            f"{steps} steps of the {name}, {len(data)} rows of {data.shape[1]:,} values",
            lambda name=name: fit(name, True),
            "single kernels",
            lambda name=name: fit(name, False),
        )


def store(count: int = 10_000, k: int = 200, dimension: int = 2048) -> Iterator[Result]:
    """Reading members from Parquet parts as the zoo writes them, against a `.pth` file per member.

    All files are in the page cache. The open store has read all members once, through pyarrow, which compared their
    checksums (`.pth` files have none), and reads them again from where it found them. A store not yet open reads them
    through pyarrow alone. The members are others each time.
    """
    subset = Subset((Entry("weight", (dimension,), 0, "parameter"),))
    vectors = np.random.default_rng(0).standard_normal((count, dimension), dtype=np.float32)
    part = Evaluation().networks_per_task
    with tempfile.TemporaryDirectory() as folder:
        artifact = Artifact(Storage(f"{folder}/storage"), "zoo", {"benchmark": "store"}, {})
        growing = ParameterStore(artifact)
        for start in range(0, count, part):
            ids = range(start, min(start + part, count))
            growing.append([Record(i, "original", vector=vectors[i]) for i in ids], subset)
        artifact.commit({}, {}, 0.0, growing.manifest_entries(range(count)))
        for i in range(count):
            torch.save({"weight": torch.from_numpy(vectors[i])}, f"{folder}/{i}.pth")
        opened = ParameterStore(artifact)

        def from_files(ids: Sequence[int]) -> np.ndarray:
            loaded = [torch.load(Path(folder) / f"{i}.pth", weights_only=True)["weight"] for i in ids]
            return torch.stack(loaded).numpy()

        chosen = random.Random(0)

        def in_a_row() -> range:
            start = chosen.randrange(count - k + 1)
            return range(start, start + k)

        def at_random() -> list[int]:
            return chosen.sample(range(count), k)

        def singly(read: Read) -> Read:
            return lambda ids: [read([id_]) for id_ in ids]

        def anew(ids: Sequence[int]) -> np.ndarray:
            return ParameterStore(artifact).vectors(ids)

        np.testing.assert_array_equal(opened.vectors(), from_files(range(count)))  # and every part has been opened
        some = f"{k} of {count:,} members"
        cases: list[tuple[str, Callable[[], Sequence[int]], Read, Read, float | None]] = [
            (f"one member, {k} times", at_random, singly(opened.vectors), singly(from_files), 20.0),
            (f"{some}, in a row", in_a_row, opened.vectors, from_files, 20.0),
            (f"{some}, at random", at_random, opened.vectors, from_files, 20.0),
            (f"{some}, in a row, from a store not yet open", in_a_row, anew, from_files, None),
            (f"{some}, at random, from a store not yet open", at_random, anew, from_files, None),
        ]
        for what, choose, ours, other, target in cases:
            ids = choose()
            np.testing.assert_array_equal(np.asarray(ours(ids)), np.asarray(other(ids)))
            yield compare(
                "store",
                f"read {what}, {dimension:,} values each",
                lambda ours=ours, choose=choose: ours(choose()),
                ".pth files",
                lambda other=other, choose=choose: other(choose()),
                n=21,
                target=target,
            )
