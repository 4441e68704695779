"""The paper's generator: an autoencoder of the flattened parameters and a diffusion model of its latents.

Shapes: K vectors of D values, Z latent dimensions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pdiff_ray.common.operations import Operations
from pdiff_ray.common.seeds import derive_seed
from pdiff_ray.config import schema
from pdiff_ray.config.section import merge
from pdiff_ray.generators import samplers
from pdiff_ray.generators.autoencoder import Autoencoder, AutoencoderSettings
from pdiff_ray.generators.diffusion import Diffusion, DiffusionSettings
from pdiff_ray.generators.interface import NUM_RUNGS, Fitting, Generator, State
from pdiff_ray.generators.normalizer import Normalizer
from pdiff_ray.generators.training import fit_model
from pdiff_ray.networks.subset import Subset

GATE_MEMBERS = 10
AUTOENCODER_RUNGS = range(1, 4)
DIFFUSION_RUNGS = range(4, NUM_RUNGS + 1)
PREVIEW_SAMPLES, PREVIEW_STEPS = 10, 20
CHUNK = 50  # vectors that pass the autoencoder together, outside of training


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


class LatentDiffusionSettings(schema.Generator):
    """The section `generator` where its name is latent_diffusion."""

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
    diffusion: DiffusionSettings = DiffusionSettings()
    gate_points: float = Field(2.0, ge=0, description="warn if decoded members lose more validation accuracy (points)")

    @model_validator(mode="before")
    @classmethod
    def _recipe(cls, value: Any) -> Any:
        recipe = RECIPES.get(str(value.get("recipe"))) if isinstance(value, dict) else None
        return merge(recipe, value) if recipe else value

    def check_sampling(self, sampling: schema.Sampling) -> None:
        steps, timesteps = sampling.steps, self.diffusion.num_timesteps
        if steps and steps > timesteps:
            raise ValueError(
                f"sampling.steps is {steps}, but generator.diffusion.num_timesteps is {timesteps}; lower the first or "
                "raise the second"
            )

    @property
    def num_latents(self) -> int:
        return self.autoencoder.latent_dim

    def check_dimension(self, dimension: int) -> None:
        with torch.device("meta"):
            Autoencoder(self.autoencoder, dimension)
            Diffusion(self.diffusion, self.autoencoder.latent_dim)

    def cost(self, values: int, members: int, sampling: schema.Sampling) -> tuple[float, float, float]:
        ae, diffusion = self.autoencoder, self.diffusion
        shapes = [section.model_copy(update={"steps": 1}) for section in (ae, diffusion)]
        coded, kept, parameters, denoised, embedded = _counts(*shapes, values)
        rows, steps = min(ae.batch_size, members), sampling.steps or diffusion.num_timesteps
        trained = ae.steps * rows * coded
        trained += diffusion.steps * min(diffusion.batch_size, members) * (denoised + embedded)
        drawn = steps * (embedded + sampling.samples * denoised) + (sampling.samples + members / 2) * coded
        # The backward pass takes twice the forward one. Values, gradients, and an optimizer's two moments are kept, and
        # what the backward pass of a batch reads.
        return 3 * trained + members * coded, drawn, 16 * parameters + rows * kept


class LatentDiffusion(nn.Module, Generator):
    """The paper's generator: diffusion of the latents of an autoencoder."""

    Settings = LatentDiffusionSettings

    def __init__(self, settings: LatentDiffusionSettings, subset: Subset) -> None:
        super().__init__()
        self.settings, self.subset = settings, subset
        latent_dim = self.num_latents = settings.autoencoder.latent_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(settings.seed or 0, "generator"))
            self.autoencoder = Autoencoder(settings.autoencoder, subset.size)
            self.diffusion = Diffusion(settings.diffusion, latent_dim)
        self.normalizer = Normalizer(torch.zeros(subset.size), torch.ones(subset.size))
        self.latents = Normalizer(torch.zeros(latent_dim), torch.ones(latent_dim))

    def fit(self, vectors: Tensor, fitting: Fitting) -> None:
        self.to(fitting.device)
        self.normalizer = Normalizer.fit(vectors, self.settings.normalize, self.subset)
        normalized = self.normalizer.normalize(vectors)
        diffusion = self.settings.diffusion
        fit_model(
            "autoencoder",
            self.autoencoder,
            normalized,
            self.settings.autoencoder,
            fitting,
            rungs=AUTOENCODER_RUNGS,
            preview=lambda: self.normalizer.unnormalize(
                self.autoencoder.decode(self.autoencoder.encode(normalized[_spread(len(vectors))]))
            ),
        )
        with torch.inference_mode():
            latents = _in_chunks(self.autoencoder.encode, normalized)
            decoded = _in_chunks(self.autoencoder.decode, latents)
        variance = float((normalized - normalized.mean(0)).square().mean())
        error = float((decoded - normalized).square().mean())
        fitting.notes["unexplained_variance"] = error / variance if variance > 0 else None  # a lone member has none
        self._gate(vectors, self.normalizer.unnormalize(decoded), fitting)
        latents = latents.clone()  # out of inference mode: the diffusion model is trained on them
        if diffusion.standardize_latents:
            std = latents.std(0, correction=0)
            self.latents = Normalizer(latents.mean(0), std.clamp(min=1e-6))
        steps = min(PREVIEW_STEPS, diffusion.num_timesteps)
        few_steps = schema.Sampling(sampler="dpmsolver++", steps=steps, seed=fitting.seed % 2**31)
        fit_model(
            "diffusion",
            self.diffusion,
            self.latents.normalize(latents),
            diffusion,
            fitting,
            ema_decay=diffusion.ema_decay,
            rungs=DIFFUSION_RUNGS,
            preview=lambda: self.sample(PREVIEW_SAMPLES, few_steps, fitting.device),
        )

    def _gate(self, vectors: Tensor, decoded: Tensor, fitting: Fitting) -> None:
        """Notes whether decoded members keep their validation accuracy: diffusion cannot be better than the decoder."""
        if fitting.judge is None:
            return
        chosen = _spread(len(vectors)).to(vectors.device)
        before, after = (float(fitting.judge(v[chosen]).mean()) for v in (vectors, decoded))
        fitting.notes["gate"] = {
            "members": len(chosen),
            "validation_accuracy": before,
            "decoded_validation_accuracy": after,
            "passed": 100 * (before - after) <= self.settings.gate_points,
        }

    def sample(self, count: int, sampling: schema.Sampling, device: torch.device) -> Tensor:
        self.to(device)
        return self.decode(samplers.sample(self.diffusion, count, sampling, device))

    @torch.inference_mode()
    def encode(self, vectors: Tensor) -> Tensor:
        self.to(vectors.device)
        return self.latents.normalize(_in_chunks(self.autoencoder.encode, self.normalizer.normalize(vectors)))

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        self.to(latents.device)
        return self.normalizer.unnormalize(_in_chunks(self.autoencoder.decode, self.latents.unnormalize(latents)))

    def state(self) -> State:
        return {name: part.state_dict() for name, part in self.named_children()}

    def load_state(self, state: State) -> None:
        for name, part in self.named_children():
            part.load_state_dict(state[name])
        self.eval()


def _spread(count: int) -> Tensor:
    """Indices of a few members, from the first to the last."""
    return torch.linspace(0, count - 1, min(GATE_MEMBERS, count)).round().long()


@functools.cache
def _counts(ae: AutoencoderSettings, diffusion: DiffusionSettings, values: int) -> tuple[int, int, int, int, int]:
    """Returns FLOPs and bytes of a vector's way to its latent and back, the autoencoder's parameters, and FLOPs of
    denoising a latent and of embedding a timestep."""
    with torch.device("meta"):
        model, denoiser = Autoencoder(ae, values), Diffusion(diffusion, ae.latent_dim).denoiser
        with Operations() as coding:
            model.decode(model.encode(torch.zeros(1, values)))
        with Operations() as embedding:
            time = denoiser.embedding(torch.zeros(1))
        with Operations() as denoising:
            denoiser(torch.zeros(1, ae.latent_dim), time)
    parameters = sum(p.numel() for p in model.parameters())
    return coding.flops.total(), coding.bytes, parameters, denoising.flops.total(), embedding.flops.total()


def _in_chunks(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    return torch.cat([function(chunk) for chunk in rows.split(CHUNK)])
