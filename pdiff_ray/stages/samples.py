"""Stage `samples`: draws new vectors from the fitted generator."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from pdiff_ray.common.devices import enough_memory
from pdiff_ray.common.errors import PdiffError
from pdiff_ray.config.schema import Experiment
from pdiff_ray.stages.context import Context
from pdiff_ray.stages.generator import load_generator
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.parameters import ParameterStore, Record, stamp
from pdiff_ray.storage.trees import save_tree

LATENTS_FILE = "latents.safetensors"


def build(experiment: Experiment, artifacts: Mapping[str, Artifact], context: Context) -> None:
    """Draws new vectors, and keeps the latents of members and samples for plots."""
    artifact, sampling = artifacts["samples"], experiment.sampling
    started = time.monotonic()
    zoo = ParameterStore(artifacts["zoo"])
    generator = load_generator(experiment, artifacts)
    context.progress("samples", 0, sampling.samples, sampling.sampler)
    with enough_memory("sampling", "sampling.samples"):
        vectors = generator.sample(sampling.samples, sampling, context.device)
    if count := int((~vectors.isfinite()).any(1).sum()):
        raise PdiffError(
            f"sampling: {count} of {len(vectors)} generated vectors are not finite; train the generator longer or with "
            "a lower learning rate, or choose another sampling.sampler"
        )
    sampled_s = time.monotonic() - started
    context.progress("samples", sampling.samples, sampling.samples, "")
    members = torch.from_numpy(zoo.vectors(experiment.split.learned)).to(context.device)
    latents = {"original": generator.encode(members), "generated": generator.encode(vectors)}
    subset, store = zoo.subset(), ParameterStore(artifact)
    rows = enumerate(vectors.cpu().numpy())
    records = [Record(id_, "generated", vector=vector, seed=sampling.seed, **stamp()) for id_, vector in rows]
    size = experiment.evaluation.networks_per_task
    for start in range(0, len(records), size):
        store.append(records[start : start + size], subset)
    # Below 1, the samples vary less than the members: training long shrinks them toward the mean.
    drawn, learned = (float(latents[group].std(0, correction=0).mean()) for group in ("generated", "original"))
    spread = drawn / learned if learned > 0 else None  # a lone member does not vary
    info = {"samples": len(records), "relative_latent_std": spread, "sampling_s": round(sampled_s, 3)}
    parts = store.manifest_entries(range(len(records)))
    artifact.commit({LATENTS_FILE: save_tree(latents)}, info, time.monotonic() - started, parts)
