"""What all generators share: they learn the distribution of a zoo's vectors and draw new ones.

Shapes: K vectors of the zoo, D values each; Z values of a latent.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from pdiff_ray.config import schema
from pdiff_ray.networks.subset import Subset
from pdiff_ray.storage.matrix import Vectors

State = dict[str, Any]

NUM_RUNGS = 7  # at which an unfinished generator may be judged: while its encoder is trained, and its process
CHECKPOINT_S = 10.0
ENCODER_RUNGS, PROCESS_RUNGS = range(1, 4), range(4, NUM_RUNGS + 1)


@dataclass(frozen=True)
class Fitting:
    """What a generator is given beside the vectors when it is fitted.

    Attributes:
        judge: validation accuracies (n,) of the networks with given vectors (n, D); for gates, on held-out data.
        load, save: unfinished work by name, for resuming; `load` gives None where there is none.
        due: tells whether work that was saved at a time (of `time.monotonic`) is to be saved now.
        progress: task, steps done, steps in all, note.
        preview: is given a rung (1 to NUM_RUNGS) and vectors (n, D), float32, that the generator gives so far: decoded
            members while an autoencoder is trained, then samples. May raise to end the fitting.
        graphs: whether steps on a GPU may be CUDA graphs.
        known: gives, by name, what is known of each vector (K,): a field of its row such as "validation_accuracy".
    """

    device: torch.device
    seed: int
    judge: Callable[[Tensor], Tensor] | None = None
    load: Callable[[str], State | None] = lambda name: None
    save: Callable[[str, State], None] = lambda name, state: None
    progress: Callable[[str, int, int, str], None] = lambda task, done, total, note: None
    preview: Callable[[int, Tensor], None] | None = None
    due: Callable[[float], bool] = lambda saved: time.monotonic() - saved >= CHECKPOINT_S
    graphs: bool = True
    known: Callable[[str], Tensor] | None = None
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
    def fit(self, vectors: Vectors | Tensor, fitting: Fitting) -> None:
        """Learns from vectors (K, D), float32, which need not be in memory; `Vectors.of` takes both kinds."""

    @abstractmethod
    def sample(self, count: int, sampling: schema.Sampling, device: torch.device) -> Tensor:
        """Draws vectors (count, D), float32, determined by `sampling.seed`."""

    def draw(self, count: int, sampling: schema.Sampling, device: torch.device) -> Iterator[Tensor]:
        """Yields what `sample` returns, some rows at a time, if the generator need not hold all of them."""
        yield self.sample(count, sampling, device)

    def asked(self, count: int, sampling: schema.Sampling) -> Tensor | None:
        """Returns what so many samples are asked for (count,), if the generator has learned a condition."""
        return None

    @abstractmethod
    def state(self) -> State:
        """Returns what `sample` and `encode` need beside the members, as nested dicts of tensors, for
        `trees.save_tree`."""

    @abstractmethod
    def load_state(self, state: State, members: Vectors | Tensor) -> None:
        """Takes up the `state` of a generator that was fitted to these members (K, D)."""

    @abstractmethod
    def encode(self, vectors: Vectors | Tensor) -> Tensor:
        """Returns a low-dimensional view of vectors (n, D): (n, latent)."""

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the vectors (n, D) of latents (n, `num_latents`), of which standard normal ones are usual."""
        raise NotImplementedError

    def decoded(self, latents: Tensor) -> Vectors:
        """Returns what `decode` does, made some columns at a time if that is possible."""
        return Vectors.of(self.decode(latents))


class Encoder(ABC):
    """A way from vectors to latents and back; see `ENCODERS`.

    Attributes:
        Settings: the class of the section `generator.encoder` where it is chosen.
        num_latents: Z; of an encoder that finds it from the vectors, 0 until then.
        keeps_places: whether latents are vectors, each value in its place.
    """

    Settings: ClassVar[type[schema.Encoder]] = schema.Encoder

    num_latents: int = 0
    keeps_places: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, settings: Any, subset: Subset) -> None:
        """Makes an encoder of vectors of a subset, from its `Settings`."""

    @abstractmethod
    def fit(self, vectors: Vectors, fitting: Fitting) -> Tensor:
        """Learns from vectors (K, D) and returns their latents (K, Z). Where vectors do not come back whole,
        `fitting.notes` gets an `unexplained_variance`. `fitting.preview` may be shown decoded vectors."""

    @abstractmethod
    def encode(self, vectors: Vectors) -> Tensor:
        """Returns the latents (n, Z) of vectors (n, D), on their device."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Returns the vectors (n, D) of latents (n, Z), on their device."""

    def decoded(self, latents: Tensor) -> Vectors:
        """Returns what `decode` does, made some columns at a time if that is possible."""
        return Vectors.of(self.decode(latents))

    @abstractmethod
    def state(self) -> State:
        """Returns what `encode` and `decode` need beside the members, as nested dicts of tensors."""

    @abstractmethod
    def load_state(self, state: State, members: Vectors) -> None:
        """Takes up the `state` of an encoder that was fitted to these members (K, D)."""


class Process(ABC):
    """A distribution of latents; see `PROCESSES`.

    Attributes:
        Settings: the class of the section `generator.process` where it is chosen.
    """

    Settings: ClassVar[type[schema.Process]] = schema.Process

    @abstractmethod
    def __init__(self, settings: Any, num_latents: int) -> None:
        """Makes a process of latents of so many values, from its `Settings`."""

    def arrange(self, subset: Subset) -> None:  # noqa: B027  # most need not know
        """Is told, before anything else, that latents are vectors of a subset, each value in its place."""

    @abstractmethod
    def fit(self, latents: Tensor, fitting: Fitting) -> None:
        """Learns from latents (K, Z). `fitting.preview` may be shown latents (n, Z) that it gives so far."""

    @abstractmethod
    def sample(self, count: int, sampling: schema.Sampling, device: torch.device) -> Tensor:
        """Draws latents (count, Z), determined by `sampling.seed`, by `sampling.sampler` and in `sampling.steps`."""

    def asked(self, count: int, sampling: schema.Sampling) -> Tensor | None:
        """Returns what so many latents are asked for (count,), if the process has learned a condition."""
        return None

    @abstractmethod
    def state(self) -> State:
        """Returns what `sample` needs, as nested dicts of tensors."""

    @abstractmethod
    def load_state(self, state: State) -> None:
        """Takes up the `state` of a fitted process."""
