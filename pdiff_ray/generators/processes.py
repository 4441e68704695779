"""Processes: how latents are drawn, each learned from those that an encoder has made.

Shapes: K latents of Z values.
"""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
from torch import Tensor

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.common.operations import Operations
from pdiff_ray.common.registry import Registry
from pdiff_ray.common.seeds import rng
from pdiff_ray.config import schema
from pdiff_ray.generators import samplers
from pdiff_ray.generators.conditioning import ConditionedTraining
from pdiff_ray.generators.diffusion import DenoiserSettings, Diffusion, DiffusionSettings
from pdiff_ray.generators.flow import Flow
from pdiff_ray.generators.interface import PROCESS_RUNGS, Fitting, Process, State
from pdiff_ray.generators.training import fit_model
from pdiff_ray.networks.subset import Subset

PREVIEW_SAMPLES, PREVIEW_STEPS = 10, 20


class DenoisingSettings(schema.Process, DenoiserSettings):
    """The section `generator.process` where a denoiser is trained."""

    section: ClassVar[str] = "generator.process"

    def make(self, num_latents: int) -> Diffusion | Flow:
        """Makes the model that is trained."""
        raise NotImplementedError

    def check_latents(self, num_latents: int) -> None:
        with torch.device("meta"):
            self.make(num_latents)

    @property
    def preview(self) -> schema.Sampling:
        """How latents are drawn while the denoiser is still trained."""
        raise NotImplementedError

    def evaluations(self, sampling: schema.Sampling) -> int:
        """Returns how often a sample passes the denoiser."""
        raise NotImplementedError

    def cost(self, num_latents: int, members: int, sampling: schema.Sampling) -> tuple[float, float]:
        denoised, embedded = _counts(self.model_copy(update={"steps": 1}), num_latents)
        learned = 3.0 * self.steps * min(self.batch_size, members) * (denoised + embedded)  # as the autoencoder's
        passes = 2 if self.condition and sampling.guidance not in (0, 1) else 1  # untold and told
        return learned, float(self.evaluations(sampling) * (embedded + sampling.samples * passes * denoised))


class DiffusionProcessSettings(DenoisingSettings, DiffusionSettings):
    """The section `generator.process` where its name is diffusion."""

    samplers: ClassVar[tuple[str, ...]] = samplers.DIFFUSION_SAMPLERS

    name: schema.ProcessName = "diffusion"

    def make(self, num_latents: int) -> Diffusion:
        return Diffusion(self, num_latents)

    def check_sampling(self, sampling: schema.Sampling) -> None:
        super().check_sampling(sampling)
        if sampling.steps and sampling.steps > self.num_timesteps:
            raise ValueError(
                f"sampling.steps is {sampling.steps}, but {self.section}.num_timesteps is {self.num_timesteps}; lower "
                "the first or raise the second"
            )

    @property
    def preview(self) -> schema.Sampling:
        return schema.Sampling(sampler="dpmsolver++", steps=min(PREVIEW_STEPS, self.num_timesteps))

    def evaluations(self, sampling: schema.Sampling) -> int:
        return sampling.steps or self.num_timesteps


class FlowSettings(DenoisingSettings):
    """The section `generator.process` where its name is flow."""

    samplers: ClassVar[tuple[str, ...]] = samplers.FLOW_SAMPLERS

    name: schema.ProcessName = "flow"

    def make(self, num_latents: int) -> Flow:
        return Flow(self, num_latents)

    @property
    def preview(self) -> schema.Sampling:
        return schema.Sampling(steps=PREVIEW_STEPS)

    def evaluations(self, sampling: schema.Sampling) -> int:
        of_a_step = {"midpoint": 2, "rk4": 4}.get(sampling.sampler or self.samplers[0], 1)
        return of_a_step * (sampling.steps or samplers.FLOW_STEPS)


class GaussianProcessSettings(schema.Process):
    """The section `generator.process` where its name is gaussian."""

    name: schema.ProcessName = "gaussian"

    def cost(self, num_latents: int, members: int, sampling: schema.Sampling) -> tuple[float, float]:
        rank = min(num_latents, members)
        return 2.0 * members * num_latents * rank, 2.0 * sampling.samples * num_latents * rank


class Denoising(Process):
    """A process that is a trained denoiser, and a sampler that follows it.

    Attributes:
        known: what the denoiser is told of each latent that it learns (K,), if it learns a condition.
    """

    Settings: ClassVar[type[DenoisingSettings]] = DenoisingSettings

    def __init__(self, settings: DenoisingSettings, num_latents: int) -> None:
        self.settings, self.model = settings, settings.make(num_latents)
        self.known = torch.zeros(0)

    def arrange(self, subset: Subset) -> None:
        for part in self.model.modules():
            if arrange := getattr(part, "arrange", None):
                arrange(subset)

    def fit(self, latents: Tensor, fitting: Fitting) -> None:
        self.model.to(fitting.device)
        model: Diffusion | Flow | ConditionedTraining = self.model
        if self.settings.condition:
            self.known = self._told(self.settings.condition, fitting)
            condition = self._standardized(self.known).to(latents)
            latents = torch.cat([latents, condition[:, None]], 1)
            model = ConditionedTraining(self.model, self.settings.condition_dropout)
        few = self.settings.preview.model_copy(update={"seed": fitting.seed % 2**31})
        fit_model(
            self.settings.name,
            model,
            latents,
            self.settings,
            fitting,
            ema_decay=self.settings.ema_decay,
            rungs=PROCESS_RUNGS,
            preview=lambda: self.sample(PREVIEW_SAMPLES, few, fitting.device),
        )

    def sample(self, count: int, sampling: schema.Sampling, device: torch.device) -> Tensor:
        model, asked = self.model.to(device), self.asked(count, sampling)
        if asked is None:
            return samplers.sample(model, count, sampling, device)
        condition = self._standardized(asked).float().to(device)
        with torch.inference_mode(), model.denoiser.told(condition, sampling.guidance):
            return samplers.sample(model, count, sampling, device)

    def asked(self, count: int, sampling: schema.Sampling) -> Tensor | None:
        if not self.settings.condition:
            return None
        if sampling.asked:
            return torch.tensor(sampling.asked, dtype=torch.double).repeat(count // len(sampling.asked) + 1)[:count]
        shares = (torch.arange(count, dtype=torch.double) + 0.5) / count
        return torch.quantile(self.known[self.known.isfinite()], shares)

    def _told(self, name: str, fitting: Fitting) -> Tensor:
        """Returns what is known of the members (K,), in float64."""
        field = f"{self.settings.section}.condition"
        if fitting.known is None:
            raise ConfigError(f"{field} is {name}, but nothing is known of the vectors; give it, or leave it out")
        known = fitting.known(name).double().cpu()
        if len(known[known.isfinite()].unique()) < 2:
            raise ConfigError(f"{field} is {name}, in which members do not differ; take another one, or leave it out")
        return known

    def _standardized(self, values: Tensor) -> Tensor:
        """Returns values of the condition as the denoiser is told them."""
        known = self.known[self.known.isfinite()]
        return (values - known.mean()) / known.std(correction=0)

    def state(self) -> State:
        told = {"known": self.known} if self.settings.condition else {}
        return {self.settings.name: self.model.state_dict(), **told}

    def load_state(self, state: State) -> None:
        self.model.load_state_dict(state[self.settings.name])
        self.model.eval()
        self.known = state.get("known", self.known)


class DiffusionProcess(Denoising):
    """Denoising diffusion (DDPM, Ho et al. 2020) of latents."""

    Settings = DiffusionProcessSettings


class FlowProcess(Denoising):
    """Flow matching of latents on straight paths."""

    Settings = FlowSettings


class GaussianProcess(Process):
    """The Gaussian with the latents' mean and covariance."""

    Settings = GaussianProcessSettings

    def __init__(self, settings: GaussianProcessSettings, num_latents: int) -> None:
        self.mean, self.factor = torch.zeros(num_latents), torch.zeros(1, num_latents)

    def fit(self, latents: Tensor, fitting: Fitting) -> None:
        self.mean = latents.mean(0)
        # As many rows as the covariance has ranks at most, of which it is the sum of squares.
        centred = (latents - self.mean).double() / max(1, len(latents) - 1) ** 0.5
        self.factor = torch.linalg.qr(centred, mode="r").R.to(latents.dtype).contiguous()

    def sample(self, count: int, sampling: schema.Sampling, device: torch.device) -> Tensor:
        random = rng(device, sampling.seed or 0, "samples")
        drawn = torch.randn(count, len(self.factor), generator=random, device=device)
        return torch.addmm(self.mean.to(device), drawn, self.factor.to(device))

    def state(self) -> State:
        return {"mean": self.mean, "factor": self.factor}

    def load_state(self, state: State) -> None:
        self.mean, self.factor = state["mean"], state["factor"]


PROCESSES: Registry[type[Process]] = Registry(
    "process", {"diffusion": DiffusionProcess, "flow": FlowProcess, "gaussian": GaussianProcess}
)


@functools.cache
def _counts(settings: DenoisingSettings, num_latents: int) -> tuple[int, int]:
    """Returns FLOPs of denoising a latent and of embedding a timestep."""
    with torch.device("meta"):
        denoiser = settings.make(num_latents).denoiser
        with Operations() as embedding:
            time = denoiser.embedding(torch.zeros(1))
        with Operations() as denoising:
            denoiser(torch.zeros(1, num_latents), time)
    return denoising.flops.total(), embedding.flops.total()
