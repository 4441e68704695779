"""What all generators share: they learn the distribution of a zoo's vectors and draw new ones.

Shapes: K vectors of the zoo, D values each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from pdiff_ray.config import schema
from pdiff_ray.networks.subset import Subset

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


class Generator(ABC):
    """A distribution over vectors, made from its settings alone; `fit` or `load_state` makes it usable.

    Attributes:
        Settings: the class of the section `generator` where this generator is chosen: its fields, what can be found
            wrong with them before work starts, and what fitting and sampling will cost.
        num_latents: values that a vector is encoded into, if latents can be decoded.
    """

    Settings: ClassVar[type[schema.Generator]] = schema.Generator

    num_latents: int | None = None

    @abstractmethod
    def __init__(self, settings: Any, subset: Subset) -> None:
        """Makes a generator of vectors of a subset, from its `Settings`."""

    @abstractmethod
    def fit(self, vectors: Tensor, fitting: Fitting) -> None:
        """Learns from vectors (K, D), float32."""

    @abstractmethod
    def sample(self, count: int, sampling: schema.Sampling, device: torch.device) -> Tensor:
        """Draws vectors (count, D), float32, determined by `sampling.seed`."""

    @abstractmethod
    def state(self) -> State:
        """Returns all that `sample` and `encode` need as nested dicts of tensors, for `trees.save_tree`."""

    @abstractmethod
    def load_state(self, state: State) -> None:
        """Takes up a fitted generator's `state`."""

    @abstractmethod
    def encode(self, vectors: Tensor) -> Tensor:
        """Returns a low-dimensional view of vectors (n, D): (n, latent)."""

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the vectors (n, D) of latents (n, `num_latents`), of which standard normal ones are usual."""
        raise NotImplementedError
