"""Generators of latents: an encoder makes latents of vectors, and a process draws new ones.

Shapes: K vectors of D values, Z latent dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny, model_validator
from torch import Tensor

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.common.seeds import derive_seed
from pdiff_ray.config import schema
from pdiff_ray.config.section import merge
from pdiff_ray.generators.autoencoder import AutoencoderSettings
from pdiff_ray.generators.diffusion import DiffusionSettings
from pdiff_ray.generators.encoders import ENCODERS, AutoencoderEncoderSettings, spread_out
from pdiff_ray.generators.interface import Fitting, Generator, Process, State
from pdiff_ray.generators.normalizer import Normalizer
from pdiff_ray.generators.processes import PROCESSES, DiffusionProcessSettings
from pdiff_ray.networks.subset import Subset
from pdiff_ray.storage.matrix import Vectors, is_held, rows_at_a_time

Standardization = Literal["dimension", "together", "none"]

# Defaults that `generator.recipe` lays under the fields.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    # The first version of the paper (arXiv 2402.13144v1): 30,000 epochs over K vectors in one batch for both models.
    "paper": {
        "normalize": "dimension",
        "autoencoder": {"steps": 30_000, "batch_size": 200, "lr": 1e-3, "latent_noise": 0.1},
        "diffusion": {
            "denoiser": "cnn",
            "width": 64,
            "prediction": "epsilon",
            "standardize_latents": False,
            "steps": 30_000,
            "batch_size": 200,
            "lr": 1e-3,
        },
    },
    # The code released with the final version (arXiv 2402.13144v3): its setting for a ResNet-18 on CIFAR-100. What is
    # called a VAE there weighs the divergence with 0 and fixes the noise on the latent.
    "released": {
        "normalize": "tensor",
        "autoencoder": {
            "channels": (64, 128, 256, 256, 32),
            "kernel_size": 7,
            "latent_dim": 128,
            "parameter_noise": 0.001,
            "latent_noise": 0.1,
            "batchnorm": True,
            "target": "noised",
            "kl_weight": 0.0,
            "steps": 500,
            "batch_size": 50,
            "lr": 2e-5,
        },
        "diffusion": {
            "denoiser": "unet",
            "width": 64,
            "depth": 4,
            "prediction": "epsilon",
            "standardize_latents": False,
            "ema_decay": 0.0,
            "steps": 1000,
            "batch_size": 50,
            "lr": 1e-4,
        },
    },
}


class LatentBase(schema.Generator):
    """The section `generator` where there are an encoder and a process."""

    gate_points: float = Field(2.0, ge=0, description="warn if decoded members lose more validation accuracy (points)")

    @property
    def parts(self) -> tuple[schema.Encoder, schema.Process, Standardization]:
        """The sections of encoder and process, and what happens to latents between them."""
        raise NotImplementedError

    @property
    def sampler(self) -> str | None:
        return next(iter(self.parts[1].samplers), None)

    @property
    def condition(self) -> schema.Condition | None:
        return getattr(self.parts[1], "condition", None)

    @property
    def lossy(self) -> bool:
        return self.parts[0].lossy

    @property
    def in_memory(self) -> bool:
        return self.parts[0].in_memory

    def __str__(self) -> str:
        encoder, process, _ = self.parts
        return f"{encoder.name} and {process.name}"

    def check_sampling(self, sampling: schema.Sampling) -> None:
        super().check_sampling(sampling)
        self.parts[1].check_sampling(sampling)

    def check_dimension(self, dimension: int) -> None:
        encoder, process, _ = self.parts
        encoder.check_dimension(dimension)
        process.check_latents(encoder.most_latents(dimension, self.members or 1))

    def cost(self, values: int, members: int, sampling: schema.Sampling) -> tuple[float, float, float]:
        encoder, process, _ = self.parts
        encoded, decoded, held = encoder.cost(values, members, sampling.samples)
        learned, drawn = process.cost(encoder.most_latents(values, members), members, sampling)
        return encoded + learned, decoded + drawn, held


class LatentSettings(LatentBase):
    """The section `generator` where its name is latent."""

    memory_fields = "generator.members, or choose another generator.encoder.name"

    name: schema.GeneratorName = "latent"
    encoder: SerializeAsAny[schema.Encoder] = Field(default_factory=lambda: schema.Encoder.model_validate({}))
    process: SerializeAsAny[schema.Process] = Field(default_factory=lambda: schema.Process.model_validate({}))
    standardize: Standardization = Field(
        "dimension", description="latents: zero mean and unit variance per dimension, or of all together"
    )

    @property
    def parts(self) -> tuple[schema.Encoder, schema.Process, Standardization]:
        return self.encoder, self.process, self.standardize


class PaperDiffusionSettings(DiffusionSettings):
    """The section `generator.diffusion`."""

    standardize_latents: bool = Field(True, description="zero mean and unit variance per latent dimension")


class _PaperEncoder(AutoencoderEncoderSettings):
    section: ClassVar[str] = AutoencoderSettings.section


class _PaperProcess(DiffusionProcessSettings):
    section: ClassVar[str] = DiffusionSettings.section


class LatentDiffusionSettings(LatentBase):
    """The section `generator` where its name is latent_diffusion: the paper's encoder and process, in sections of their
    own."""

    unkeyed = frozenset({"recipe"})  # whose values are filled in
    memory_fields = "generator.autoencoder.batch_size or generator.autoencoder.channels"

    name: schema.GeneratorName = "latent_diffusion"
    recipe: Literal["default", "paper", "released"] = Field(
        "default",
        description="defaults of the fields below: what measures best here, the paper's first setting, or its code's",
    )
    normalize: Literal["dimension", "tensor", "centered_tensor"] = Field(
        "dimension", description="statistics per number; per tensor; or mean per number and scale per tensor"
    )
    autoencoder: AutoencoderSettings = AutoencoderSettings()
    diffusion: PaperDiffusionSettings = PaperDiffusionSettings()

    @model_validator(mode="before")
    @classmethod
    def _recipe(cls, value: Any) -> Any:
        recipe = RECIPES.get(str(value.get("recipe"))) if isinstance(value, dict) else None
        return merge(recipe, value) if recipe else value

    @property
    def parts(self) -> tuple[schema.Encoder, schema.Process, Standardization]:
        diffusion = dict(self.diffusion)
        standardize: Standardization = "dimension" if diffusion.pop("standardize_latents") else "none"
        encoder = _PaperEncoder.model_construct(**dict(self.autoencoder), normalize=self.normalize)
        return encoder, _PaperProcess.model_construct(**diffusion), standardize

    def __str__(self) -> str:
        return self.name


class Latent(Generator):
    """An encoder of vectors and a process of its latents."""

    Settings: ClassVar[type[LatentBase]] = LatentSettings

    def __init__(self, settings: LatentBase, subset: Subset) -> None:
        self.settings, self.subset = settings, subset
        self._encoder, self._process, self._standardize = settings.parts
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(settings.seed or 0, "generator"))
            self.encoder = ENCODERS[self._encoder.name](self._encoder, subset)
            self._random_state = torch.get_rng_state()  # of the process's weights
        self.num_latents = self.encoder.num_latents
        self.process: Process | None = None  # made when the number of latents is known
        self.latents = Normalizer(torch.zeros(self.num_latents), torch.ones(self.num_latents))

    def fit(self, vectors: Vectors | Tensor, fitting: Fitting) -> None:
        vectors = Vectors.of(vectors)
        latents = self.encoder.fit(vectors, fitting)
        self._gate(vectors, latents, fitting)
        mean, std = torch.zeros_like(latents[0]), torch.ones_like(latents[0])
        if self._standardize != "none":
            mean, std = latents.mean(0), latents.std(0, correction=0)
        if self._standardize == "together":
            std = std.square().mean().sqrt().expand_as(std).clone()
        self.latents = Normalizer(mean, std.clamp(min=1e-6))
        preview = fitting.preview
        shown = replace(fitting, preview=lambda rung, drawn: preview(rung, self.decode(drawn))) if preview else fitting
        self._make_process(latents.shape[1]).fit(self.latents.normalize(latents), shown)

    def _make_process(self, num_latents: int) -> Process:
        self.num_latents = num_latents
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random_state)
            self.process = PROCESSES[self._process.name](self._process, num_latents)
        if self.encoder.keeps_places:
            self.process.arrange(self.subset)
        return self.process

    def _gate(self, vectors: Vectors, latents: Tensor, fitting: Fitting) -> None:
        """Notes whether decoded members keep their validation accuracy: no process can be better than the decoder."""
        if fitting.judge is None or not self._encoder.lossy:
            return
        chosen, accuracies = spread_out(len(vectors)), list[tuple[Tensor, ...]]()
        for some in torch.tensor(chosen).split(rows_at_a_time(self.subset.size)):
            with torch.inference_mode():
                decoded = self.encoder.decode(latents[some])
            accuracies.append(tuple(fitting.judge(v) for v in (vectors.rows(some.tolist()), decoded)))
        before, after = (float(torch.cat(parts).mean()) for parts in zip(*accuracies, strict=True))
        fitting.notes["gate"] = {
            "members": len(chosen),
            "validation_accuracy": before,
            "decoded_validation_accuracy": after,
            "passed": 100 * (before - after) <= self.settings.gate_points,
        }

    def sample(self, count: int, sampling: schema.Sampling, device: torch.device) -> Tensor:
        return torch.cat(list(self.draw(count, sampling, device)))

    @torch.inference_mode()
    def draw(self, count: int, sampling: schema.Sampling, device: torch.device) -> Iterator[Tensor]:
        assert self.process is not None
        try:
            self.settings.check_sampling(sampling)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        latents = self.process.sample(count, sampling, device)
        for chosen in latents.split(rows_at_a_time(self.subset.size)):
            yield self.decode(chosen)

    def asked(self, count: int, sampling: schema.Sampling) -> Tensor | None:
        assert self.process is not None
        return self.process.asked(count, sampling)

    @torch.inference_mode()
    def encode(self, vectors: Vectors | Tensor) -> Tensor:
        vectors = Vectors.of(vectors)
        return self.latents.to(vectors.device).normalize(self.encoder.encode(vectors))

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        return self.encoder.decode(self.latents.to(latents.device).unnormalize(latents))

    @torch.inference_mode()
    def decoded(self, latents: Tensor) -> Vectors:
        if is_held(len(latents), self.subset.size):
            return Vectors.of(self.decode(latents))
        return self.encoder.decoded(self.latents.to(latents.device).unnormalize(latents))

    def state(self) -> State:
        assert self.process is not None
        parts = {"encoder": self.encoder.state(), "process": self.process.state()}
        return {**parts, "latents": self.latents.state_dict()}

    def load_state(self, state: State, members: Vectors | Tensor) -> None:
        # An earlier version kept the parts' states together.
        self.encoder.load_state(state.get("encoder", state), Vectors.of(members))
        mean, std = state["latents"]["mean"], state["latents"]["std"]
        self.latents = Normalizer(mean, std)
        self._make_process(len(mean)).load_state(state.get("process", state))


class LatentDiffusion(Latent):
    """The paper's generator: diffusion of the latents of an autoencoder."""

    Settings: ClassVar[type[LatentBase]] = LatentDiffusionSettings
