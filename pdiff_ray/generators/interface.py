"""Generators: what learns the distribution of a zoo's vectors and draws new ones.

All share one interface (`Generator`); a new one is a module with a class and a line in `GENERATORS`.
Shapes: K vectors of the zoo, D values each.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pdiff_ray.config import schema
from pdiff_ray.networks.subset import Subset

GENERATORS = {
    "latent_diffusion": "pdiff_ray.generators.latent_diffusion:LatentDiffusion",
    "gaussian": "pdiff_ray.generators.gaussian:Gaussian",
}

State = dict[str, Any]

NUM_RUNGS = 7  # at which an unfinished generator may be judged


@dataclass(frozen=True)
class Fitting:
    """What a generator is given beside the vectors when it is fitted.

    Attributes:
        judge: validation accuracies (n,) of the networks with given vectors (n, D); for gates, on held-out data.
        load, save: unfinished work by name, for resuming; `load` gives None where there is none.
        progress: task, steps done, steps in all, note.
        preview: is given a rung (1 to NUM_RUNGS) and vectors (n, D), float32, that the generator gives so far: decoded
            members while an autoencoder is trained, then samples. May raise to end the fitting.
        graphs: whether steps on a GPU may be CUDA graphs.
    """

    device: torch.device
    seed: int
    judge: Callable[[Tensor], Tensor] | None = None
    load: Callable[[str], State | None] = lambda name: None
    save: Callable[[str, State], None] = lambda name, state: None
    progress: Callable[[str, int, int, str], None] = lambda task, done, total, note: None
    preview: Callable[[int, Tensor], None] | None = None
    checkpoint_s: float = 10.0
    graphs: bool = True
    history: dict[str, list[float]] = field(default_factory=dict)  # losses per step, by model; filled in
    notes: dict[str, Any] = field(default_factory=dict)  # findings for the record, such as the gate's; filled in


class Generator(Protocol):
    """A distribution over vectors. Constructed from its configuration alone; `fit` or `load_state` makes it usable."""

    def __init__(self, settings: schema.Generator, subset: Subset) -> None: ...

    def fit(self, vectors: Tensor, fitting: Fitting) -> None:
        """Learns from vectors (K, D), float32."""
        ...

    def sample(self, count: int, sampling: schema.Sampling, device: torch.device) -> Tensor:
        """Draws vectors (count, D), float32, determined by `sampling.seed`."""
        ...

    def state(self) -> State:
        """Everything that `sample` needs, normalization included; for `artifacts.save_tree`."""
        ...

    def load_state(self, state: State) -> None: ...

    def encode(self, vectors: Tensor) -> Tensor:
        """A low-dimensional view of vectors (n, D) for plots: (n, latent)."""
        ...


def make_generator(settings: schema.Generator, subset: Subset) -> Generator:
    """An unfitted generator of vectors of `subset`."""
    module, _, name = GENERATORS[settings.name].partition(":")
    return getattr(importlib.import_module(module), name)(settings, subset)
