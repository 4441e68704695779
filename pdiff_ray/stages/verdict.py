"""What is said of an evaluation: the samples beside vectors of known kinds, the groups, and the zoo."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pdiff_ray.common.seeds import derive_seed, rng
from pdiff_ray.config import schema
from pdiff_ray.config.schema import Experiment
from pdiff_ray.evaluation.conditioning import compare_asked
from pdiff_ray.evaluation.diagnostics import diagnose_members
from pdiff_ray.evaluation.geometry import Geometry
from pdiff_ray.evaluation.groups import GROUPS, Drawn, groups_of
from pdiff_ray.evaluation.kinds import Family, recipes
from pdiff_ray.evaluation.metrics import metrics_of
from pdiff_ray.evaluation.novelty import Known
from pdiff_ray.evaluation.summary import summarize
from pdiff_ray.generators.baselines import Baseline
from pdiff_ray.generators.interface import Fitting, Generator
from pdiff_ray.generators.table import make_generator
from pdiff_ray.networks.subset import Subset
from pdiff_ray.stages.alignment import members_of
from pdiff_ray.stages.generator import load_generator
from pdiff_ray.stages.zoo import runs_of
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.matrix import StoredVectors, Vectors, is_held
from pdiff_ray.storage.parameters import ParameterStore, Record

DRAWS, LONG_DRAWS = 200, 50  # vectors of each kind; and of long ones, which take time and are all alike
COPIED = 0.5  # of the distance to a member's nearest fellow: decoded members that are nearer to theirs are replicas
NO_LOSS = 1e6  # stands for a loss that is no number


def families(
    members: Vectors, geometry: Geometry, subset: Subset, seed: int, fitted: Generator | None = None
) -> dict[str, Family]:
    """Returns the known ways of making vectors from members (K, D), drawn when wanted, long ones by columns.

    Args:
        seed: of the draws.
        fitted: the generator that has drawn the samples, if it decodes latents with a loss: what the decoder makes of
            members and of random latents is known as well.
    """

    draws = DRAWS if is_held(DRAWS, subset.size) else LONG_DRAWS

    def drawn(name: str, settings: Mapping[str, Any]) -> Vectors:
        generator = make_generator(schema.Generator.model_validate(dict(settings)), subset)
        assert isinstance(generator, Baseline)
        generator.fit(members, Fitting(members.device, 0))
        sampling = schema.Sampling(samples=draws, seed=derive_seed(seed, "kinds", name))
        return generator.drawn(draws, sampling, members.device)

    found = {
        name: Family(recipe.word, functools.partial(drawn, name, recipe.generator), recipe.of)
        for name, recipe in recipes(geometry).items()
    }
    if fitted is not None and fitted.num_latents is not None:
        random = rng(members.device, seed, "kinds", "latents")
        latents = torch.randn(draws, fitted.num_latents, generator=random, device=members.device)
        decoded = fitted.decoded(fitted.encode(members))
        # A decoder that smooths gives no copies: what comes back must be within half the way to the nearest fellow.
        back, apart = geometry.place(decoded).distances.diagonal(), geometry.among.nearest
        word = "replica" if float(back.median()) < COPIED * float(apart.median()) else "interpolation"
        found["decoded"] = Family(word, decoded, "decoded members")
        found["autoencoder"] = Family("gaussian-like", lambda: fitted.decoded(latents), "normal latents, decoded")
    return found


def summary_of(
    experiment: Experiment, artifacts: Mapping[str, Artifact], records: Sequence[Record], device: torch.device
) -> dict[str, Any]:
    """Returns what is said of the judged networks, as JSON values: `evaluation.summary.summarize` has its parts."""
    zoo, split, config = members_of(artifacts), experiment.split, experiment.evaluation
    about, seed = artifacts["base"].manifest().info, experiment.sampling.seed or 0
    members = StoredVectors.open(zoo, split.learned, device)
    geometry = Geometry(members)
    kept_back = {"held_out": held_out_by_run(experiment), "second_run": split.second_run}
    yardsticks = {name: StoredVectors.open(zoo, ids, device) for name, ids in kept_back.items() if ids}
    losses = _losses(records, geometry)
    fitted = load_generator(experiment, artifacts, members) if experiment.generator.lossy else None
    known = Known(geometry, families(members, geometry, zoo.subset(), seed, fitted), yardsticks, losses, seed)
    drawn = ParameterStore(artifacts["samples"])
    samples = StoredVectors.open(drawn, drawn.ids, device)
    learned = [record for record in records if record.group == "original"]
    diagnosis = diagnose_members(members, learned, artifacts["generator"].manifest().info)
    summary = summarize(
        records,
        about["test_images"],
        about["num_classes"],
        known.assess(samples, losses.get("generated")),
        diagnosis,
        groups_of(config),
        metrics_of(config),
        seed,
        about["validation_images"],
    )
    if condition := experiment.generator.condition:
        generated = [record for record in records if record.group == "generated"]
        wanted = drawn.records([record.number or 0 for record in generated])
        asked = [record.asked for record in wanted if record.asked is not None]
        summary["condition"] = compare_asked(condition, asked, generated, learned, seed)
    return summary


def held_out_by_run(experiment: Experiment) -> list[int]:
    """Returns the ids of the held-out members, those of one run after those of another: neighbours are compared."""
    held_out = experiment.zoo.held_out_ids
    return [id_ for run in runs_of(experiment.zoo) for id_ in run.member_ids if id_ in held_out]


def _losses(records: Sequence[Record], geometry: Geometry) -> dict[str, Tensor]:
    """Returns losses on validation images of each group, and of the known kinds that a group draws as well."""
    rows: dict[str, list[float]] = {}
    for record in records:
        loss = NO_LOSS if record.validation_loss is None else record.validation_loss
        rows.setdefault(record.group, []).append(loss)
    found = {name: torch.tensor(values).double().nan_to_num(NO_LOSS, NO_LOSS) for name, values in rows.items()}
    drawn = [group for group in GROUPS.values() if isinstance(group, Drawn) and group.name in found]
    for name, recipe in recipes(geometry).items():
        for group in drawn:
            if group.settings == recipe.generator:
                found[name] = found[group.name]
    return found
