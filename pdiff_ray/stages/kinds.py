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
from pdiff_ray.evaluation.novelty import Family, Known, Novelty
from pdiff_ray.generators.interface import Fitting, Generator
from pdiff_ray.generators.table import make_generator
from pdiff_ray.networks.subset import Subset
from pdiff_ray.storage.parameters import Record

DRAWS = 200  # vectors of each kind
SIGMAS = (0.02, 0.05, 0.15, 0.3, 0.5, 1.0, 2.0, 3.0)
RANKS = (5, 10, 20)
AVERAGED = (2, 4, 16)
NO_LOSS = 1e6  # stands for a loss that is no number


def families(members: Tensor, subset: Subset, seed: int, fitted: Generator | None = None) -> dict[str, Family]:
    """Returns the known ways of making vectors from members (K, D), each drawn when it is wanted.

    Args:
        seed: of the draws.
        fitted: the generator that has drawn the samples; if it decodes latents, what the decoder makes of members and
            of random latents is known as well.
    """
    count = len(members)
    ranks = sorted({rank for rank in (*RANKS, count // 4, count // 2) if 0 < rank < count - 1})
    mean = dict.fromkeys((k for k in AVERAGED if 2 < k < count), "the mean")
    kinds: dict[str, tuple[str, str, dict[str, Any]]] = {
        "members": ("replica", "", {"name": "average", "count": 1}),
        **{f"noise {s:g}": ("replica", "members plus noise", {"name": "noise", "sigma": s}) for s in SIGMAS},
        "average of 2": ("interpolation", "pairs", {"name": "average", "count": 2}),
        **{f"average of {k}": ("interpolation", of, {"name": "average", "count": k}) for k, of in mean.items()},
        "between two": ("interpolation", "pairs", {"name": "interpolation"}),
        **{f"rank {r}": ("interpolation", "a subspace", {"name": "gaussian_pca", "rank": r}) for r in ranks},
        "gaussian_diagonal": ("gaussian-like", "per parameter", {"name": "gaussian_diagonal"}),
        "gaussian": ("gaussian-like", "full covariance", {"name": "gaussian"}),
    }

    def drawn(name: str, settings: Mapping[str, Any]) -> Tensor:
        generator = make_generator(schema.Generator.model_validate(dict(settings)), subset)
        generator.fit(members, Fitting(members.device, 0))
        sampling = schema.Sampling(samples=DRAWS, seed=derive_seed(seed, "kinds", name))
        return generator.sample(DRAWS, sampling, members.device)

    found = {
        name: Family(word, functools.partial(drawn, name, settings), of) for name, (word, of, settings) in kinds.items()
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
    losses: dict[str, Tensor] = {}
    for name, rows in _by_group(records).items():
        values = torch.tensor([float("nan") if r.validation_loss is None else r.validation_loss for r in rows])
        losses[name] = values.double().nan_to_num(NO_LOSS, NO_LOSS)
    known = Known(Geometry(members), families(members, subset, seed, fitted), yardsticks, losses, seed)
    return known.assess(samples, losses.get("generated"))


def _by_group(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.group, []).append(record)
    return found
