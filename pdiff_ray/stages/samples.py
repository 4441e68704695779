"""Stage `samples`: draws new vectors from the fitted generator."""

from __future__ import annotations

import time
from collections.abc import Mapping

from pdiff_ray.common.devices import enough_memory
from pdiff_ray.common.errors import PdiffError
from pdiff_ray.config.schema import Experiment
from pdiff_ray.stages.alignment import members_of
from pdiff_ray.stages.context import Context
from pdiff_ray.stages.generator import load_generator
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.matrix import StoredVectors
from pdiff_ray.storage.parameters import ParameterStore, Record, stamp
from pdiff_ray.storage.trees import save_tree

LATENTS_FILE = "latents.safetensors"


def build(experiment: Experiment, artifacts: Mapping[str, Artifact], context: Context) -> None:
    """Draws new vectors, and keeps the latents of members and samples for plots."""
    artifact, sampling = artifacts["samples"], experiment.sampling
    started = time.monotonic()
    zoo = members_of(artifacts)
    generator = load_generator(experiment, artifacts)
    context.progress("samples", 0, sampling.samples, sampling.sampler or "")
    subset, store, drawn = zoo.subset(), ParameterStore(artifact), 0
    asked = generator.asked(sampling.samples, sampling)
    wanted = [None] * sampling.samples if asked is None else asked.tolist()
    with enough_memory("sampling", "sampling.samples"):
        for vectors in generator.draw(sampling.samples, sampling, context.device):
            if count := int((~vectors.isfinite()).any(1).sum()):
                raise PdiffError(
                    f"sampling: {count} of {len(vectors)} generated vectors are not finite; train the generator longer "
                    "or with a lower learning rate, or choose another sampling.sampler"
                )
            rows = enumerate(vectors.cpu().numpy(), drawn)
            records = [
                Record(id_, "generated", vector=row, seed=sampling.seed, asked=wanted[id_], **stamp())
                for id_, row in rows
            ]
            size = experiment.evaluation.networks_per_task
            for start in range(0, len(records), size):
                store.append(records[start : start + size], subset)
            drawn += len(vectors)
            context.progress("samples", drawn, sampling.samples, "")
            del vectors, rows, records  # before the next ones are drawn
    sampled_s = time.monotonic() - started
    members = StoredVectors(zoo, experiment.split.learned, context.device)
    samples = StoredVectors(store, range(drawn), context.device)
    latents = {"original": generator.encode(members), "generated": generator.encode(samples)}
    # Below 1, the samples vary less than the members: training long shrinks them toward the mean.
    varied, learned = (float(latents[group].std(0, correction=0).mean()) for group in ("generated", "original"))
    spread = varied / learned if learned > 0 else None  # a lone member does not vary
    info = {"samples": drawn, "relative_latent_std": spread, "sampling_s": round(sampled_s, 3)}
    parts = store.manifest_entries(range(drawn))
    artifact.commit({LATENTS_FILE: save_tree(latents)}, info, time.monotonic() - started, parts)
