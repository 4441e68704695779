"""Vectors of known kinds, drawn from a zoo's members, and what the samples beside them are."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pdiff_ray.common.seeds import derive_seed, rng
from pdiff_ray.config import schema
from pdiff_ray.evaluation.geometry import Geometry
from pdiff_ray.evaluation.groups import GROUPS, Drawn
from pdiff_ray.evaluation.novelty import Family, Known, Novelty, recipes
from pdiff_ray.generators.interface import Fitting, Generator
from pdiff_ray.generators.table import make_generator
from pdiff_ray.networks.subset import Subset
from pdiff_ray.storage.parameters import Record

DRAWS = 200  # vectors of each kind
NO_LOSS = 1e6  # stands for a loss that is no number


def families(
    members: Tensor, geometry: Geometry, subset: Subset, seed: int, fitted: Generator | None = None
) -> dict[str, Family]:
    """Returns the known ways of making vectors from members (K, D), each drawn when it is wanted.

    Args:
        seed: of the draws.
        fitted: the generator that has drawn the samples; if it decodes latents, what the decoder makes of members and
            of random latents is known as well.
    """

    def drawn(name: str, settings: Mapping[str, Any]) -> Tensor:
        generator = make_generator(schema.Generator.model_validate(dict(settings)), subset)
        generator.fit(members, Fitting(members.device, 0))
        sampling = schema.Sampling(samples=DRAWS, seed=derive_seed(seed, "kinds", name))
        return generator.sample(DRAWS, sampling, members.device)

    found = {
        name: Family(recipe.word, functools.partial(drawn, name, recipe.generator), recipe.of)
        for name, recipe in recipes(geometry).items()
    }
    if fitted is not None and fitted.num_latents is not None:
        random = rng(members.device, seed, "kinds", "latents")
        latents = torch.randn(DRAWS, fitted.num_latents, generator=random, device=members.device)
        found["decoded"] = Family("replica", lambda: fitted.decode(fitted.encode(members)), "decoded members")
        found["autoencoder"] = Family("gaussian-like", lambda: fitted.decode(latents), "normal latents, decoded")
    return found


def assess(
    members: Tensor,
    subset: Subset,
    samples: Tensor,
    yardsticks: Mapping[str, Tensor],
    records: Sequence[Record],
    fitted: Generator,
    seed: int,
) -> Novelty:
    """Says what samples (n, D) of a zoo's members (K, D) are.

    Args:
        yardsticks: vectors (m, D) that no generator has seen, by group.
        fitted: the generator that has drawn the samples.
        records: the judged networks; losses on validation images are those of the groups that are kinds as well.
    """
    geometry, losses = Geometry(members), dict[str, Tensor]()
    for record_group, rows in _by_group(records).items():
        values = torch.tensor([float("nan") if r.validation_loss is None else r.validation_loss for r in rows])
        losses[record_group] = values.double().nan_to_num(NO_LOSS, NO_LOSS)
    for name, recipe in recipes(geometry).items():
        for group in GROUPS.values():
            if isinstance(group, Drawn) and group.settings == recipe.generator and group.name in losses:
                losses[name] = losses[group.name]
    known = Known(geometry, families(members, geometry, subset, seed, fitted), yardsticks, losses, seed)
    return known.assess(samples, losses.get("generated"))


def _by_group(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.group, []).append(record)
    return found
