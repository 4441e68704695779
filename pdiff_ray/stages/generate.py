"""Stages `generator` and `samples`: learn the distribution of the zoo's vectors, and draw new ones from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pdiff_ray.artifacts import Artifact, load_tree, save_tree
from pdiff_ray.config import Experiment
from pdiff_ray.devices import enough_memory
from pdiff_ray.errors import PdiffError
from pdiff_ray.generators import Fitting, Generator, make_generator
from pdiff_ray.seeds import derive_seed
from pdiff_ray.stages import Context
from pdiff_ray.stages.base import HISTORY_FILE
from pdiff_ray.stages.judging import base_judge
from pdiff_ray.store import ParameterStore, Record, stamp

GENERATOR_FILE = "generator.safetensors"
LATENTS_FILE = "latents.safetensors"


def build_generator(
    experiment: Experiment,
    artifacts: Mapping[str, Artifact],
    context: Context,
    preview: Callable[[int, Tensor], None] | None = None,
) -> None:
    """Fits the generator to the first K members of the zoo.

    Args:
        preview: see `generators.Fitting`.
    """
    artifact, settings = artifacts["generator"], experiment.generator
    started = time.monotonic()
    zoo = ParameterStore(artifacts["zoo"])
    subset = zoo.subset()
    judge = base_judge(experiment, artifacts, subset, context)

    def validation_accuracy(vectors: Tensor) -> Tensor:
        judgements = judge.judge(vectors, ["validation"])
        return torch.tensor([j.validation_accuracy for j in judgements])

    def load(name: str) -> dict[str, Any] | None:
        content = artifact.load_work(f"{name}.safetensors")
        return None if content is None else load_tree(content, f"{name} checkpoint")

    fitting = Fitting(
        device=context.device,
        seed=derive_seed(settings.seed or 0, "fit"),
        judge=validation_accuracy,
        load=load,
        save=lambda name, state: artifact.save_work(f"{name}.safetensors", save_tree(state)),
        progress=context.progress,
        preview=preview,
        checkpoint_s=context.checkpoint_s,
    )
    generator = make_generator(settings, subset)
    with enough_memory(
        "training of the generator", "generator.autoencoder.batch_size or generator.autoencoder.channels"
    ):
        generator.fit(torch.from_numpy(zoo.vectors(range(experiment.num_members))).to(context.device), fitting)
    files = {
        GENERATOR_FILE: save_tree(generator.state()),
        HISTORY_FILE: save_tree({name: torch.tensor(losses) for name, losses in fitting.history.items()}),
        "subset.json": subset.to_json().encode(),
    }
    info = {**fitting.notes, "final_loss": {name: losses[-1] for name, losses in fitting.history.items()}}
    artifact.commit(files, info, time.monotonic() - started)


def load_generator(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> Generator:
    """The fitted generator, on the CPU."""
    generator = make_generator(experiment.generator, ParameterStore(artifacts["zoo"]).subset())
    generator.load_state(load_tree(artifacts["generator"].read(GENERATOR_FILE), artifacts["generator"].location))
    return generator


def build_samples(experiment: Experiment, artifacts: Mapping[str, Artifact], context: Context) -> None:
    """Draws new vectors, and keeps the latents of members and samples for plots."""
    artifact, sampling = artifacts["samples"], experiment.sampling
    started = time.monotonic()
    zoo = ParameterStore(artifacts["zoo"])
    generator = load_generator(experiment, artifacts)
    context.progress("samples", 0, sampling.samples, f"{sampling.sampler}")
    with enough_memory("sampling", "sampling.samples"):
        vectors = generator.sample(sampling.samples, sampling, context.device)
    if not vectors.isfinite().all():
        count = int((~vectors.isfinite()).any(1).sum())
        raise PdiffError(
            f"sampling: {count} of {len(vectors)} generated vectors are not finite; train the generator longer or with "
            "a lower generator.diffusion.lr, or choose another sampling.sampler"
        )
    sampled_s = time.monotonic() - started
    context.progress("samples", sampling.samples, sampling.samples, "")
    members = torch.from_numpy(zoo.vectors(range(experiment.num_members))).to(context.device)
    latents = {"original": generator.encode(members), "generated": generator.encode(vectors)}
    subset, store = zoo.subset(), ParameterStore(artifact)
    records = [
        Record(id_, "generated", vector=vector, seed=sampling.seed, **stamp())
        for id_, vector in enumerate(vectors.cpu().numpy())
    ]
    for start in range(0, len(records), experiment.evaluation.stack):
        store.append(records[start : start + experiment.evaluation.stack], subset)
    # Below 1, the samples vary less than the members: training long shrinks them toward the mean.
    drawn, learned = (float(latents[group].std(0, correction=0).mean()) for group in ("generated", "original"))
    spread = drawn / learned if learned > 0 else None  # a lone member does not vary
    info = {"samples": len(records), "relative_latent_std": spread, "sampling_s": round(sampled_s, 3)}
    artifact.commit(
        {LATENTS_FILE: save_tree(latents)},
        info,
        time.monotonic() - started,
        store.manifest_entries(range(len(records))),
    )
