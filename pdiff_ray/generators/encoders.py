"""Encoders: how vectors become latents, and come back.

Shapes: K vectors of D values, n others, Z latent dimensions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pdiff_ray.common.operations import Operations
from pdiff_ray.common.registry import Registry
from pdiff_ray.config import schema
from pdiff_ray.generators.autoencoder import Autoencoder, AutoencoderSettings
from pdiff_ray.generators.interface import ENCODER_RUNGS, Encoder, Fitting, State
from pdiff_ray.generators.normalizer import Normalizer
from pdiff_ray.generators.subspace import Subspace
from pdiff_ray.generators.training import fit_model
from pdiff_ray.networks.subset import Subset
from pdiff_ray.storage.matrix import CHUNK_BYTES, Vectors

GATE_MEMBERS = 10
CHUNK = 50  # vectors that pass the autoencoder together, outside of training


class NormalizingSettings(schema.Encoder):
    """The section `generator.encoder` where vectors are normalized."""

    normalize: Literal["dimension", "tensor", "centered_tensor"] = Field(
        "dimension", description="statistics per number; per tensor; or mean per number and scale per tensor"
    )


class AutoencoderEncoderSettings(NormalizingSettings, AutoencoderSettings):
    """The section `generator.encoder` where its name is autoencoder."""

    section: ClassVar[str] = "generator.encoder"

    name: schema.EncoderName = "autoencoder"

    def most_latents(self, values: int, members: int) -> int:
        return self.latent_dim

    def check_dimension(self, dimension: int) -> None:
        with torch.device("meta"):
            Autoencoder(self, dimension)

    def cost(self, values: int, members: int, samples: int) -> tuple[float, float, float]:
        coded, kept, parameters = _counts(self.model_copy(update={"steps": 1}), values)
        rows = min(self.batch_size, members)
        # The backward pass takes twice the forward one. Values, gradients, and an optimizer's two moments are kept, and
        # what the backward pass of a batch reads.
        learned = 3.0 * self.steps * rows * coded + members * coded
        return learned, (samples + members / 2) * coded, float(16 * parameters + rows * kept)


class SubspaceSettings(schema.Encoder):
    """The section `generator.encoder` where its name is subspace."""

    in_memory: ClassVar[bool] = False

    name: schema.EncoderName = "subspace"
    rank: int | None = Field(None, ge=1, description="principal components that are kept at most; default: K - 1, all")
    variance: float = Field(1.0, gt=0, le=1, description="share of the variance that the components kept have at least")

    @property
    def lossy(self) -> bool:
        return self.rank is not None or self.variance < 1

    def most_latents(self, values: int, members: int) -> int:
        return min(max(1, members - 1), self.rank or members)

    def cost(self, values: int, members: int, samples: int) -> tuple[float, float, float]:
        encoded = 2.0 * members * values * (members + samples)
        return 2.0 * members**2 * values, encoded + 2.0 * samples * members * values, 4.0 * CHUNK_BYTES


class NoneSettings(NormalizingSettings):
    """The section `generator.encoder` where its name is none."""

    name: schema.EncoderName = "none"

    @property
    def lossy(self) -> bool:
        return False


class AutoencoderEncoder(nn.Module, Encoder):
    """The paper's encoder: an autoencoder of the normalized vectors."""

    Settings = AutoencoderEncoderSettings

    def __init__(self, settings: AutoencoderEncoderSettings, subset: Subset) -> None:
        super().__init__()
        self.settings, self.subset, self.num_latents = settings, subset, settings.latent_dim
        self.autoencoder = Autoencoder(settings, subset.size)
        self.normalizer = Normalizer(torch.zeros(subset.size), torch.ones(subset.size))

    def fit(self, vectors: Vectors, fitting: Fitting) -> Tensor:
        self.to(fitting.device)
        held = vectors.all().to(fitting.device)
        self.normalizer = Normalizer.fit(held, self.settings.normalize, self.subset)
        normalized = self.normalizer.normalize(held)
        fit_model(
            "autoencoder",
            self.autoencoder,
            normalized,
            self.settings,
            fitting,
            rungs=ENCODER_RUNGS,
            preview=lambda: self.normalizer.unnormalize(
                self.autoencoder.decode(self.autoencoder.encode(normalized[spread_out(len(held))]))
            ),
        )
        with torch.inference_mode():
            latents = _in_chunks(self.autoencoder.encode, normalized.split(CHUNK))
            decoded = _in_chunks(self.autoencoder.decode, latents.split(CHUNK))
        variance = float((normalized - normalized.mean(0)).square().mean())
        error = float((decoded - normalized).square().mean())
        fitting.notes["unexplained_variance"] = error / variance if variance > 0 else None  # a lone member has none
        return latents.clone()  # out of inference mode: a process is trained on them

    def encode(self, vectors: Vectors) -> Tensor:
        self.to(vectors.device)
        batches = (range(start, min(start + CHUNK, len(vectors))) for start in range(0, len(vectors), CHUNK))
        rows = (self.normalizer.normalize(vectors.rows(batch)) for batch in batches)
        return _in_chunks(self.autoencoder.encode, rows)

    def decode(self, latents: Tensor) -> Tensor:
        self.to(latents.device)
        return self.normalizer.unnormalize(_in_chunks(self.autoencoder.decode, latents.split(CHUNK)))

    def state(self) -> State:
        return {name: part.state_dict() for name, part in self.named_children()}

    def load_state(self, state: State, members: Vectors) -> None:
        for name, part in self.named_children():
            part.load_state_dict(state[name])
        self.eval()


class SubspaceEncoder(Encoder):
    """Coordinates along the members' principal components, to one scale: their mean variance is one.

    What the members span comes back to rounding, whatever their number of values.
    """

    Settings = SubspaceSettings

    def __init__(self, settings: SubspaceSettings, subset: Subset) -> None:
        self.settings = settings
        self.subspace: Subspace | None = None

    def fit(self, vectors: Vectors, fitting: Fitting) -> Tensor:
        subspace, share = Subspace.fit(vectors, self.settings.rank, self.settings.variance)
        self._take(subspace)
        fitting.notes["unexplained_variance"] = max(0.0, 1 - share)
        return (subspace.coordinates_of_members() / self.scale).float().to(fitting.device)

    def _take(self, subspace: Subspace) -> None:
        self.subspace, self.num_latents = subspace, len(subspace.variances)
        self.scale = float(subspace.variances.mean().sqrt()) or 1.0  # of a lone member, which has no spread

    def encode(self, vectors: Vectors) -> Tensor:
        assert self.subspace is not None
        return (self.subspace.coordinates(vectors) / self.scale).float()

    def decode(self, latents: Tensor) -> Tensor:
        return self._points(latents).all()

    def decoded(self, latents: Tensor) -> Vectors:
        return self._points(latents)

    def _points(self, latents: Tensor) -> Vectors:
        assert self.subspace is not None
        return self.subspace.points(latents * self.scale)

    def state(self) -> State:
        assert self.subspace is not None
        return {"directions": self.subspace.directions, "variances": self.subspace.variances}

    def load_state(self, state: State, members: Vectors) -> None:
        self._take(Subspace(members, state["directions"], state["variances"]))


class NoEncoder(Encoder):
    """The normalized vectors themselves."""

    Settings = NoneSettings
    keeps_places = True

    def __init__(self, settings: NoneSettings, subset: Subset) -> None:
        self.settings, self.subset, self.num_latents = settings, subset, subset.size
        self.normalizer = Normalizer(torch.zeros(subset.size), torch.ones(subset.size))

    def fit(self, vectors: Vectors, fitting: Fitting) -> Tensor:
        held = vectors.all().to(fitting.device)
        self.normalizer = Normalizer.fit(held, self.settings.normalize, self.subset)
        return self.normalizer.normalize(held)

    def encode(self, vectors: Vectors) -> Tensor:
        return self.normalizer.to(vectors.device).normalize(vectors.all())

    def decode(self, latents: Tensor) -> Tensor:
        return self.normalizer.to(latents.device).unnormalize(latents)

    def state(self) -> State:
        return {"normalizer": self.normalizer.state_dict()}

    def load_state(self, state: State, members: Vectors) -> None:
        self.normalizer.load_state_dict(state["normalizer"])


ENCODERS: Registry[type[Encoder]] = Registry(
    "encoder", {"autoencoder": AutoencoderEncoder, "subspace": SubspaceEncoder, "none": NoEncoder}
)


def spread_out(count: int) -> list[int]:
    """Returns the places of a few of so many members, from the first to the last."""
    return torch.linspace(0, count - 1, min(GATE_MEMBERS, count)).round().long().tolist()


@functools.cache
def _counts(settings: AutoencoderEncoderSettings, values: int) -> tuple[int, int, int]:
    """Returns FLOPs and bytes of a vector's way to its latent and back, and the autoencoder's parameters."""
    with torch.device("meta"):
        model = Autoencoder(settings, values)
        with Operations() as coding:
            model.decode(model.encode(torch.zeros(1, values)))
    return coding.flops.total(), coding.bytes, sum(p.numel() for p in model.parameters())


def _in_chunks(function: Callable[[Tensor], Tensor], chunks: Iterable[Tensor]) -> Tensor:
    return torch.cat([function(chunk) for chunk in chunks])
