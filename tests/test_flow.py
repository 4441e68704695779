"""Flow matching against what is known in closed form, its samplers against their orders and diffusers' scheduler."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from pdiff_ray.config.schema import Generator, Sampling
from pdiff_ray.generators import samplers
from pdiff_ray.generators.diffusion import DenoiserSettings
from pdiff_ray.generators.flow import TIME_SCALE, Flow
from pdiff_ray.generators.interface import Fitting
from pdiff_ray.generators.table import make_generator
from pdiff_ray.networks.subset import Entry, Subset

CPU = torch.device("cpu")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Exact(torch.nn.Module):
    """The best possible velocity of N(mean, std^2 I), in closed form; it leads from x_0 to mean + std x_0."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std

    def embedding(self, t):
        return t / TIME_SCALE

    def forward(self, x, t):
        t = t[:, None]
        variance = (1 - t) ** 2 + (t * self.std) ** 2
        return self.mean + (t * self.std**2 - (1 - t)) / variance * (x - t * self.mean)


@pytest.fixture
def exact():
    flow = Flow(DenoiserSettings(width=8, depth=1), 4)
    flow.denoiser = Exact(torch.tensor([1.0, -2.0, 0.0, 3.0]), 0.2)
    return flow.double()


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_samplers_have_their_order(exact, sampler, order):
    x_0 = draw(50, 4).double()
    expected = exact.denoiser.mean + 0.2 * x_0
    errors = []
    for steps in (32, 64):
        times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        errors.append(float((samplers.SAMPLERS[sampler](exact, times, x_0, None) - expected).abs().max()))
    assert errors[0] / errors[1] > 0.95 * 2**order  # the midpoint rule gains an order on so even a path
    drawn = samplers.denoise(exact, x_0, Sampling(sampler=sampler), lambda: None)
    torch.testing.assert_close(drawn, expected, rtol=0, atol={"euler": 0.05, "midpoint": 2e-5, "rk4": 2e-6}[sampler])


def test_euler_is_that_of_diffusers(exact):
    x = draw(5, 4).double()
    found = samplers.denoise(exact, x, Sampling(sampler="euler", steps=10), lambda: None)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - i / 10 for i in range(10)])
    for t in scheduler.timesteps:  # which fall, from noise
        against = -exact.velocity(x, 1 - t.double().expand(1) / 1000)
        x = scheduler.step(against, t, x, return_dict=False)[0].double()
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_no_velocity_is_better_than_the_known_one(exact):
    """The loss of the best velocity is the variance that x_t leaves; every other one has more."""
    exact, mean = exact.float(), exact.denoiser.mean
    latents = mean + 0.2 * draw(20_000, 4)
    best = exact.loss(latents, torch.Generator().manual_seed(1))
    for moved, std in ((0.3, 0.2), (0.0, 0.4)):
        exact.denoiser.mean, exact.denoiser.std = mean + moved, std
        assert exact.loss(latents, torch.Generator().manual_seed(1)) > best + 0.01


def test_a_flow_in_the_subspace_recovers_a_gaussian():
    """200 members that vary in 10 directions, by scales from 0.01 to 1."""
    vectors = torch.linspace(-1, 1, 100) + draw(200, 10) @ draw(10, 100, seed=1) * torch.logspace(-2, 0, 100)
    settings = Generator.model_validate({"name": "latent", "seed": 0})
    generator = make_generator(settings, Subset((Entry("a", (100,), 0, "parameter"),)))
    generator.fit(vectors, fitting := Fitting(CPU, 0))
    assert generator.num_latents == 10  # rounding adds no components
    drawn = generator.sample(1000, Sampling(seed=0), CPU)
    std, relative_std = vectors.std(0), drawn.std(0) / vectors.std(0)
    assert len(fitting.history["flow"]) == 600
    assert ((drawn.mean(0) - vectors.mean(0)) / std).abs().max() < 0.3
    assert relative_std.min() > 0.8
    assert relative_std.max() < 1.25
    assert (torch.corrcoef(drawn.T) - torch.corrcoef(vectors.T)).abs().mean() < 0.1
    assert torch.cdist(drawn, vectors).min() > 0.1 * std.norm()  # and copies no member
