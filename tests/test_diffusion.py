"""Diffusion of latents against simpler or independent versions: the process, samplers, and CUDA graphs."""

import contextlib

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from test_generators import CPU, SUBSET, draw, fitted, small
from torch import nn

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config import loading
from pdiff_ray.config.schema import Generator, Sampling, SubsetRule
from pdiff_ray.generators import graphs, samplers
from pdiff_ray.generators.autoencoder import BatchNorm
from pdiff_ray.generators.diffusion import DENOISERS, Diffusion, DiffusionSettings
from pdiff_ray.generators.flow import Flow
from pdiff_ray.generators.graphs import graphed
from pdiff_ray.generators.interface import Fitting
from pdiff_ray.generators.latent import LatentDiffusionSettings
from pdiff_ray.generators.samplers import DIFFUSION_SAMPLERS, SAMPLERS, GraphStep, spaced_timesteps
from pdiff_ray.generators.table import make_generator
from pdiff_ray.networks.subset import Entry, Subset, resolve


def make_scheduler(settings, sampling):
    """The scheduler of diffusers that computes what a sampler does; latents have no bounds, so nothing is clipped."""
    common = {
        "num_train_timesteps": settings.num_timesteps,
        "beta_start": settings.beta_start,
        "beta_end": settings.beta_end,
        "prediction_type": {"epsilon": "epsilon", "v": "v_prediction"}[settings.prediction],
        "timestep_spacing": "trailing",
    }
    if sampling.sampler == "dpmsolver++":
        return DPMSolverMultistepScheduler(**common)
    return {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[sampling.sampler](**common, clip_sample=False)


@torch.inference_mode()
def with_diffusers(diffusion, x, sampling, **random):
    """Samples step by step with diffusers' scheduler."""
    scheduler = make_scheduler(diffusion.settings, sampling)
    scheduler.set_timesteps(sampling.steps or diffusion.settings.num_timesteps)
    times = diffusion.denoiser.embedding(scheduler.timesteps).split(1)
    for t, time in zip(scheduler.timesteps, times, strict=True):
        x = scheduler.step(diffusion.denoiser(x, time), t, x, **random).prev_sample
    return x


def no_noise():
    raise AssertionError("a deterministic sampler drew noise")


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_forward_process_is_that_of_diffusers(prediction):
    settings = DiffusionSettings(prediction=prediction, width=8, depth=1)
    diffusion, scheduler = Diffusion(settings, 4), make_scheduler(settings, Sampling(sampler="ddpm"))
    x_start, eps, t = draw(9, 4), draw(9, 4, seed=1), torch.tensor([0, 1, 2, 10, 100, 500, 900, 998, 999])
    torch.testing.assert_close(diffusion.q_sample(x_start, t, eps), scheduler.add_noise(x_start, eps, t))
    target = eps if prediction == "epsilon" else scheduler.get_velocity(x_start, eps, t)
    torch.testing.assert_close(diffusion.target(x_start, t, eps), target)
    assert diffusion.alphas_cumprod[-1] < 1e-4  # ends as noise


class Exact(torch.nn.Module):
    """The best possible denoiser of N(mean, std^2 I), in closed form."""

    def __init__(self, diffusion, mean, std):
        super().__init__()
        self.diffusion, self.mean, self.std = diffusion, mean, std

    def embedding(self, t):
        return t

    def forward(self, x, t):
        a = self.diffusion.alphas_cumprod[t][:, None]
        eps = (1 - a).sqrt() * (x - a.sqrt() * self.mean) / (a * self.std**2 + 1 - a)
        x_start = (x - (1 - a).sqrt() * eps) / a.sqrt()
        return self.diffusion.target(x_start, t, eps)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize(
    ("sampler", "steps"),
    [
        ("ddpm", None),
        ("ddpm", 250),
        ("ddim", 100),
        ("ddim", 501),
        ("ddim", 600),
        ("dpmsolver++", 25),
        ("dpmsolver++", None),
    ],
)
def test_samplers_with_the_exact_denoiser(sampler, steps, prediction):
    diffusion = Diffusion(DiffusionSettings(prediction=prediction, width=8, depth=1), 2)
    mean, std = torch.tensor([1.5, -0.5]), 0.5
    object.__setattr__(diffusion, "denoiser", Exact(diffusion, mean, std))
    diffusion._modules.pop("denoiser")
    drawn = samplers.sample(diffusion, 4000, Sampling(sampler=sampler, steps=steps, seed=1), CPU)
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.04)
    torch.testing.assert_close(drawn.std(0), torch.full((2,), std), rtol=0.08, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("denoiser", ["mlp", "cnn"])
@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", None), ("ddpm", 30), ("ddim", None), ("ddim", 50)])
def test_sampling_is_what_diffusers_does_step_by_step(sampler, steps, denoiser, prediction):
    settings = DiffusionSettings(denoiser=denoiser, prediction=prediction, width=16, num_timesteps=200)
    diffusion, sampling, x = Diffusion(settings, 4), Sampling(sampler=sampler, steps=steps), draw(20, 4)
    random, again = (torch.Generator().manual_seed(1) for _ in range(2))
    found = samplers.denoise(diffusion, x, sampling, lambda: torch.randn(x.shape, generator=random))
    expected = with_diffusers(diffusion, x, sampling, generator=again)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 200])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_dpmsolver_is_that_of_diffusers_to_the_bit(prediction, steps):
    settings = DiffusionSettings(prediction=prediction, width=16, num_timesteps=200)
    diffusion, sampling = Diffusion(settings, 4), Sampling(sampler="dpmsolver++", steps=steps)
    found = samplers.denoise(diffusion, draw(20, 4), sampling, no_noise)
    assert torch.equal(found, with_diffusers(diffusion, draw(20, 4), sampling))


@pytest.mark.parametrize(("num_timesteps", "steps"), [(1000, 1000), (1000, 61), (20, 7), (15, 13), (5, 1)])
def test_timesteps_are_spread_evenly_and_start_at_the_last(num_timesteps, steps):
    found = spaced_timesteps(num_timesteps, steps).tolist()
    assert len(found) == steps
    assert found[0] == num_timesteps - 1
    expected = [num_timesteps * (steps - i) / steps - 1 for i in range(steps)]
    assert found == pytest.approx(expected, abs=0.5 + 1e-9)
    assert sorted(set(found), reverse=True) == found
    assert found[-1] >= 0


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("t", [0, 50, 199])
def test_prediction_undoes_the_forward_process(prediction, t):
    """For samplers that work with x_0 and eps: both together are x_t again, and the target is what was predicted."""
    diffusion, x = Diffusion(DiffusionSettings(prediction=prediction, width=16, num_timesteps=200), 4), draw(5, 4)
    with torch.no_grad():
        x_start, eps = diffusion.predict(x, t)
        steps = torch.tensor([t])
        torch.testing.assert_close(diffusion.q_sample(x_start, steps, eps), x)
        predicted = diffusion.denoiser(x, diffusion.denoiser.embedding(steps))
    torch.testing.assert_close(diffusion.target(x_start, steps, eps), predicted)


@pytest.mark.parametrize("denoiser", DENOISERS)
def test_step_on_fixed_memory_is_the_same(monkeypatch, denoiser):
    """What a CUDA graph captures, run here without one."""
    diffusion, x = Diffusion(DiffusionSettings(denoiser=denoiser, width=16, num_timesteps=30), 4), draw(20, 4)
    diffusion.eval()
    noise, factors = draw(30, 20, 4, seed=1), draw(30, 3, seed=2).double() / 2
    drawn = iter(noise)
    with torch.inference_mode():
        timesteps = spaced_timesteps(30, 30)
        expected = samplers._follow(diffusion, timesteps, x, factors, lambda: next(drawn))
        step = GraphStep(diffusion.denoiser, x, diffusion.denoiser.embedding(timesteps), factors)
        step()
        step.restart(x)
        for row in noise:
            step.noise.copy_(row)
            step()
    torch.testing.assert_close(step.x, expected)


def test_released_denoiser_has_the_released_layers():
    """1 to 64, 128, 256 and 512 channels and back, by kernels of 7; what is 64, 128 and 256 wide is passed across."""
    denoiser = Diffusion(LatentDiffusionSettings(recipe="released").diffusion, 128).denoiser.eval()
    pairs = [(1, 64), (64, 128), (128, 256), (256, 512)]
    down, up = sum(7 * a * b + 3 * b for a, b in pairs), sum(7 * a * b + 3 * a for a, b in pairs) - 2
    assert sum(p.numel() for p in denoiser.parameters()) == down + up + (256 + 1) * 128 + (128 + 1) * 128
    seen = []
    for layer in denoiser.up:
        layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    wide = []
    for layer in [*denoiser.down, *denoiser.up]:
        layer.register_forward_hook(lambda layer, inputs, output: wide.append(output))
    time = denoiser.embedding(torch.tensor([3]))
    assert denoiser(draw(2, 128), time).shape == (2, 128)
    down, up = wide[:4], wide[4:]
    assert torch.equal(seen[0], down[3] + time)
    for before, across, found in zip(up, down[2::-1], seen[1:], strict=False):
        assert torch.equal(found, before + across + time)


class Replayed:
    """Does what a CUDA graph of a step would: writes the results of the next run to where the first one's were."""

    def __init__(self, step, parameters, wrong=False):
        self.step, self.parameters, self.wrong = step, parameters, wrong
        step()
        self.loss = step()
        self.gradients = [parameter.grad for parameter in parameters]

    def replay(self):
        self.loss.copy_(self.step() + self.wrong)
        for gradient, parameter in zip(self.gradients, self.parameters, strict=True):
            gradient.copy_(parameter.grad)


@pytest.mark.parametrize("way", ["captured", "wrong", "refused"])
def test_replays_train_as_single_steps_do(monkeypatch, way):
    """And what cannot be captured, or computes something else, goes on as it was."""

    def losses(train):
        torch.manual_seed(0)
        model, random = torch.nn.Sequential(torch.nn.Linear(3, 1), BatchNorm(1)), torch.Generator().manual_seed(0)
        parameters = list(model.parameters())

        def capture(step):
            step()
            if way == "refused":
                raise RuntimeError("a test")
            graph = Replayed(step, parameters, wrong=way == "wrong")
            return graph, graph.loss

        def backward():
            model.zero_grad()
            loss = model(torch.randn(5, 3, generator=random)).square().mean()
            loss.backward()
            return loss.detach()

        monkeypatch.setattr(graphs, "capture", capture)
        step = train(backward, model, random)
        found = []
        for _ in range(5):
            found.append(step().item())
            with torch.no_grad():
                for parameter in parameters:
                    parameter -= 0.1 * parameter.grad
        statistics = [tensor.tolist() for tensor in model.state_dict().values()]
        return [*found, *statistics], step is backward

    plain, _ = losses(lambda backward, *_: backward)
    with contextlib.nullcontext() if way == "captured" else pytest.warns(UserWarning, match="without a CUDA graph"):
        found, same = losses(graphed)
    assert found == plain
    assert same == (way != "captured")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("denoiser", ["mlp", "unet"])
def test_graphs_compute_what_single_kernels_do(monkeypatch, denoiser):
    device = torch.device("cuda")
    diffusion = Diffusion(DiffusionSettings(width=64, num_timesteps=50), 4).to(device)

    def results():
        fitting = Fitting(device, 0)
        settings = small(autoencoder={"batchnorm": denoiser == "unet"}, diffusion={"denoiser": denoiser})
        make_generator(settings, SUBSET).fit(draw(60, 14).to(device), fitting)
        return samplers.sample(diffusion, 20, Sampling(seed=0), device), fitting.history

    def refused(*_):
        raise RuntimeError("a test")

    samples, losses = results()
    monkeypatch.setattr(graphs, "capture", refused)
    monkeypatch.setattr(samplers, "capture", refused)
    with pytest.warns(UserWarning, match="a test"):
        plain, expected = results()
    torch.testing.assert_close(samples, plain, rtol=1e-3, atol=1e-3)
    for name, values in expected.items():
        torch.testing.assert_close(torch.tensor(losses[name]), torch.tensor(values), rtol=1e-2, atol=1e-3)


def test_samples_of_a_batch_are_those_drawn_one_at_a_time():
    diffusion = Diffusion(DiffusionSettings(width=64, num_timesteps=50), 4)
    x, noise = draw(32, 4), draw(50, 32, 4, seed=1)

    def samples(rows):
        drawn = iter(noise[:, rows])
        return samplers.denoise(diffusion, x[rows], Sampling(), lambda: next(drawn))

    one_at_a_time = torch.cat([samples(slice(row, row + 1)) for row in range(32)])
    torch.testing.assert_close(samples(slice(None)), one_at_a_time, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [None, 1, 7])
def test_sampling_is_determined_by_the_seed(sampler, steps):
    settings = small().diffusion
    model = Diffusion(settings, 4) if sampler in DIFFUSION_SAMPLERS else Flow(settings, 4)
    first, again, other = (
        samplers.sample(model, 5, Sampling(sampler=sampler, steps=steps, seed=seed), CPU) for seed in (0, 0, 1)
    )
    assert first.shape == (5, 4)
    assert first.isfinite().all()
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("denoiser", DENOISERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("standardize", [True, False])
def test_every_kind_learns(denoiser, prediction, standardize):
    """Members on a line: both losses fall well below that of predicting the mean, which is about 1."""
    vectors = 2 + draw(64, 1) * torch.ones(14) + 0.01 * draw(64, 14, seed=1)
    changes = {"denoiser": denoiser, "prediction": prediction, "standardize_latents": standardize}
    settings = small(
        autoencoder={"steps": 150, "lr": 1e-2},
        diffusion={**changes, "steps": 200, "lr": 5e-3, "batch_size": 64, "num_timesteps": 100, "width": 32},
    )
    generator, fitting = fitted(settings, vectors)
    for name, steps in (("autoencoder", 150), ("diffusion", 200)):
        losses = torch.tensor(fitting.history[name])
        assert len(losses) == steps
        assert losses[-20:].mean() < 0.6 * losses[:5].mean()
    assert fitting.notes["unexplained_variance"] < 0.1
    assert generator.sample(3, Sampling(seed=0), CPU).isfinite().all()


def test_default_recipe_recovers_a_gaussian():
    """200 members that vary in 10 directions, by scales from 0.01 to 1."""
    subset = Subset((Entry("a", (100,), 0, "parameter"),))
    vectors = torch.linspace(-1, 1, 100) + draw(200, 10) @ draw(10, 100, seed=1) * torch.logspace(-2, 0, 100)
    generator, fitting = make_generator(LatentDiffusionSettings(seed=0), subset), Fitting(CPU, 0)
    generator.fit(vectors, fitting)
    drawn = generator.sample(200, Sampling(seed=0, steps=250), CPU)
    std, relative_std = vectors.std(0), drawn.std(0) / vectors.std(0)
    assert fitting.notes["unexplained_variance"] < 0.03
    assert ((drawn.mean(0) - vectors.mean(0)) / std).abs().max() < 0.4
    assert relative_std.min() > 0.75
    assert relative_std.max() < 1.3
    assert (torch.corrcoef(drawn.T) - torch.corrcoef(vectors.T)).abs().mean() < 0.1
    assert torch.cdist(drawn, vectors).min() > 0.1 * std.norm()  # and copies no member


def test_tokens_are_chunks_of_tensors():
    """A value reaches its own token alone where no layer mixes them, and comes back in its place."""
    module = nn.Sequential(nn.Linear(30, 3), nn.BatchNorm1d(3))
    subset = resolve(SubsetRule(all=True), module, "included")
    denoiser = DENOISERS["tokens"](subset.size, 8, 0).eval()
    denoiser.arrange(subset)
    x, time = draw(2, subset.size), denoiser.embedding(torch.tensor([3]))
    tensors, tokens = subset.unflatten(x[0]), -(-90 // 32)
    assert len(denoiser.places) == tokens + 5  # of the weight; a bias, and BatchNorm's four
    assert len(denoiser.places.unique(dim=0)) == tokens + 5
    padded = torch.cat([x[0], torch.zeros(1)])[denoiser.index].view(-1, 32)
    torch.testing.assert_close(padded[:tokens].flatten()[:90], tensors["0.weight"].flatten())
    torch.testing.assert_close(padded[tokens, :3], tensors["0.bias"])
    assert not padded[tokens, 3:].any()
    gradient = torch.autograd.functional.jacobian(lambda v: denoiser(v[None], time)[0], x[0])
    reached = gradient.abs() > 1e-9
    owner = (denoiser.slots // 32)[:, None]
    assert torch.equal(reached, owner == owner.T)


def test_a_transformer_over_tokens_learns_what_the_vectors_are():
    """Members on a circle in 70 dimensions, of three tensors: nothing of it is in one token."""
    entries = (Entry("a.weight", (6, 10), 0, "parameter"), Entry("a.bias", (6,), 60, "parameter"))
    subset = Subset((*entries, Entry("b.bias", (4,), 66, "parameter")))
    angles = 2 * torch.pi * torch.rand(200, generator=torch.Generator().manual_seed(0))
    plane = torch.linalg.qr(draw(70, 2)).Q.T * 70**0.5
    vectors = torch.stack([angles.cos(), angles.sin()], 1) @ plane
    process = {"name": "flow", "denoiser": "tokens", "width": 16, "depth": 2, "steps": 250, "lr": 3e-3}
    settings = {"name": "latent", "seed": 0, "encoder": {"name": "none"}, "process": process}
    generator = make_generator(Generator.model_validate(settings), subset)
    generator.fit(vectors, Fitting(CPU, 0))
    drawn = generator.sample(200, Sampling(seed=0, steps=20), CPU)
    radius = (drawn @ plane.T / 70).norm(dim=1)
    assert 0.85 < float(radius.median()) < 1.1
    assert float(radius.std()) < 0.25  # a Gaussian's is 0.46
    again = make_generator(Generator.model_validate(settings), subset)
    again.load_state(generator.state(), vectors)
    torch.testing.assert_close(
        again.sample(9, Sampling(seed=0, steps=5), CPU), generator.sample(9, Sampling(seed=0, steps=5), CPU)
    )


@pytest.mark.parametrize("changes", [{"num_timesteps": 9000}, {"beta_end": 0.2}])
def test_schedules_that_leave_nothing_are_refused(changes):
    with pytest.raises(ConfigError, match=r"generator\.process: num_timesteps \d+ with betas .*; lower the betas"):
        loading.parse(Generator, {"name": "latent", "process": {"name": "diffusion", **changes}}, "it", "generator")
    DiffusionSettings(num_timesteps=10_000, beta_start=1e-5, beta_end=2e-3)
