"""The generators' maths against simpler or independent versions, and exact resuming."""

import itertools
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pdiff_ray.common.errors import ConfigError, PdiffError
from pdiff_ray.config.schema import Generator, Optimizer, Sampling
from pdiff_ray.config.section import merge
from pdiff_ray.generators.autoencoder import Autoencoder, AutoencoderSettings
from pdiff_ray.generators.baselines import GaussianSettings
from pdiff_ray.generators.diffusion import Diffusion
from pdiff_ray.generators.interface import NUM_RUNGS, Fitting
from pdiff_ray.generators.latent import LatentDiffusionSettings
from pdiff_ray.generators.normalizer import Normalizer
from pdiff_ray.generators.table import GENERATORS, make_generator
from pdiff_ray.generators.training import EMA, fit_model
from pdiff_ray.networks.subset import Entry, Subset
from pdiff_ray.storage.trees import load_tree, save_tree
from pdiff_ray.training.trainer import OPTIMIZERS, SCHEDULES, Trainer

CPU = torch.device("cpu")
SUBSET = Subset((Entry("a.weight", (8,), 0, "parameter"), Entry("a.bias", (2, 3), 8, "parameter")))  # D = 14
SMALL = {
    "autoencoder": {"channels": (4, 8), "latent_dim": 4, "steps": 30, "batch_size": 16},
    "diffusion": {"width": 16, "depth": 1, "num_timesteps": 20, "steps": 30, "batch_size": 16},
}


# The released code's kind, at the tests' size.
RELEASED = {
    "recipe": "released",
    "autoencoder": {**SMALL["autoencoder"], "latent_dim": 6},
    "diffusion": {"width": 8, "depth": 3, "num_timesteps": 20, "steps": 30, "batch_size": 16},
}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small(**changes):
    layers = merge({"generator": SMALL}, {"generator": {"seed": 0, **changes}})
    return Generator.model_validate(layers["generator"])


def fitted(settings, vectors, **fitting):
    generator = make_generator(settings, SUBSET)
    generator.fit(vectors, fitting := Fitting(CPU, 0, **fitting))
    return generator, fitting


# --- normalization ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dimension", "tensor", "centered_tensor"])
@pytest.mark.parametrize("count", [1, 2, 50])
def test_normalizer_round_trip(mode, count):
    vectors = draw(count, 14) * torch.logspace(-4, 2, 14) + 3
    normalizer = Normalizer.fit(vectors, mode, SUBSET)
    normalized = normalizer.normalize(vectors)
    assert normalized.isfinite().all()
    torch.testing.assert_close(normalizer.unnormalize(normalized), vectors, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        normalizer.normalize(normalizer.unnormalize(normalized)), normalized, rtol=1e-3, atol=0.1
    )


def test_normalizer_statistics():
    vectors = draw(50, 14) * torch.linspace(1, 5, 14) + torch.arange(14.0)
    weight, bias = vectors[:, :8], vectors[:, 8:]
    by_dimension = Normalizer.fit(vectors, "dimension", SUBSET)
    torch.testing.assert_close(by_dimension.mean, vectors.mean(0))
    torch.testing.assert_close(by_dimension.std, vectors.std(0, correction=0))
    by_tensor = Normalizer.fit(vectors, "tensor", SUBSET)
    torch.testing.assert_close(by_tensor.mean, torch.cat([weight.mean().expand(8), bias.mean().expand(6)]))
    stds = [torch.stack([row.std(correction=0) for row in rows]).mean() for rows in (weight, bias)]
    torch.testing.assert_close(by_tensor.std, torch.cat([stds[0].expand(8), stds[1].expand(6)]))
    centered = Normalizer.fit(vectors, "centered_tensor", SUBSET)
    torch.testing.assert_close(centered.mean, vectors.mean(0))
    for piece in (slice(0, 8), slice(8, 14)):
        assert centered.normalize(vectors)[:, piece].square().mean().item() == pytest.approx(1, rel=1e-4)
        assert len(centered.std[piece].unique()) == 1


def test_a_tensor_of_one_value_has_the_spread_of_the_zoo():
    subset = Subset((Entry("weight", (2, 4), 0, "parameter"), Entry("scale", (1,), 8, "parameter")))
    vectors = draw(50, 9) + 3
    normalizer = Normalizer.fit(vectors, "tensor", subset)
    assert normalizer.std[8].item() == pytest.approx(vectors[:, 8].std(correction=0).item())
    assert normalizer.normalize(vectors)[:, 8].abs().max() < 6


@pytest.mark.parametrize("mode", ["dimension", "centered_tensor"])
def test_what_does_not_move_is_zero_and_comes_back(mode):
    """Rounding errors of values that are the same in all members must not be blown up to a signal."""
    fixed = draw(8)
    vectors = torch.cat([fixed.expand(200, -1), 1e-3 * draw(200, 6)], 1)
    normalizer = Normalizer.fit(vectors, mode, SUBSET)
    normalized = normalizer.normalize(vectors)
    assert normalized[:, :8].eq(0).all()
    torch.testing.assert_close(normalizer.unnormalize(normalized + 1)[:, :8], fixed.expand(200, -1), rtol=0, atol=1e-6)


# --- autoencoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [1, 7, 64, 65])
@pytest.mark.parametrize(("stride", "kernel_size"), [(1, 3), (2, 5), (3, 3), (4, 9)])
@pytest.mark.parametrize("changes", [{}, {"batchnorm": True, "kl_weight": 0.1}])
def test_autoencoder_takes_any_dimension(dimension, stride, kernel_size, changes):
    settings = AutoencoderSettings(channels=(4, 8), stride=stride, kernel_size=kernel_size, latent_dim=3, **changes)
    autoencoder = Autoencoder(settings, dimension)
    for count in (2, 1):  # in training, too, a channel may have one value alone
        latents = autoencoder.encode(draw(count, dimension))
        assert latents.shape == (count, 3)
        assert autoencoder.decode(latents).shape == (count, dimension)
        assert autoencoder.loss(draw(count, dimension), torch.Generator()).isfinite()


def test_autoencoder_loss_without_noise_is_the_reconstruction_error():
    autoencoder = Autoencoder(AutoencoderSettings(channels=(4,), parameter_noise=0, latent_noise=0), 14)
    vectors = draw(5, 14)
    expected = (autoencoder.decode(autoencoder.encode(vectors)) - vectors).square().mean()
    torch.testing.assert_close(autoencoder.loss(vectors, torch.Generator()), expected)
    noisy = Autoencoder(AutoencoderSettings(channels=(4,), latent_noise=5.0), 14)
    assert noisy.loss(vectors, torch.Generator()) != noisy.loss(vectors, torch.Generator().manual_seed(1))


def test_released_autoencoder_has_the_released_layers():
    """Weights of the released code's for 2,048 values: 5 layers of kernel 7, their BatchNorms, and 3 linear ones."""
    autoencoder = Autoencoder(LatentDiffusionSettings(recipe="released").autoencoder, 2048)
    pairs = list(pairwise((1, 64, 128, 256, 256, 32)))
    encoder = sum(7 * a * b + 3 * b for a, b in pairs) + (2048 + 1) * 128 + 2 * (128 + 1) * 128
    decoder = (128 + 1) * 2048 + sum(7 * a * b + 3 * a for a, b in [(64, 64), *pairs[1:]]) + 7 * 64 + 1
    assert sum(p.numel() for p in autoencoder.parameters()) == encoder + decoder


def test_what_is_reconstructed_and_what_the_divergence_adds():
    quiet = {"channels": (4,), "latent_noise": 0.0, "parameter_noise": 0.5, "latent_dim": 3}
    vectors, noise = draw(5, 14), draw(5, 14, seed=1)
    noised = vectors + 0.5 * noise

    def loss(**changes):
        torch.manual_seed(0)
        autoencoder = Autoencoder(AutoencoderSettings(**{**quiet, **changes}), 14)
        error = (autoencoder.decode(autoencoder.encode(noised)) - noised).square().mean()
        return autoencoder, autoencoder.loss(vectors, torch.Generator().manual_seed(1)), error

    autoencoder, found, error = loss(target="noised")
    torch.testing.assert_close(found, error)
    assert loss()[1] != error
    autoencoder, found, error = loss(target="noised", kl_weight=2.0)
    mean, log_variance = autoencoder._moments(noised)
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    divergence = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(found, error + 2 * divergence)
    drawn = loss(target="noised", kl_weight=0.0, latent_noise=None)[1]  # noise of the encoder's own sigma
    assert drawn != loss(target="noised", kl_weight=0.0)[1]
    with pytest.raises(
        ValueError, match="latent_noise is null, but the encoder is not variational; set it, or kl_weight"
    ):
        AutoencoderSettings(latent_noise=None)


def test_autoencoder_that_is_too_large():
    with torch.device("meta"), pytest.raises(ConfigError, match=r"100,000,000 values at stride 2 .* raise generator\."):
        Autoencoder(AutoencoderSettings(), 100_000_000)


# --- training ---------------------------------------------------------------------------------------------------------


def test_average_of_weights_is_that_of_a_loop():
    model = torch.nn.Linear(2, 1)
    ema, expected = EMA(model, 0.5), model.weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            model.weight += 1
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.average["weight"], expected)


def test_model_ends_with_the_average_of_its_weights():
    settings, saved = small(diffusion={"steps": 20, "batch_size": 8}).diffusion, {}
    model = Diffusion(settings, 4)
    fitting = Fitting(CPU, 0, save=lambda name, state: saved.update({name: load_tree(save_tree(state))}))
    fit_model("diffusion", model, draw(8, 4), settings, fitting, ema_decay=0.9)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved["diffusion"]["ema"][name])
        assert not torch.equal(parameter, saved["diffusion"]["model"][name])


class Killed(Exception):
    pass


@pytest.mark.parametrize("batch_size", [16, 1000])
@pytest.mark.parametrize("kind", ["cnn", "unet", "autoencoder"])
def test_resumed_training_ends_in_the_same_weights(batch_size, kind):
    """Stopped after a checkpoint, and gone on in a new process, as storage would hand the state over."""
    changes = {"steps": 120, "batch_size": batch_size, "lr": 1e-2, "weight_decay": 0.1}
    latents = draw(40, 4)
    settings = small(diffusion={**changes, "denoiser": kind}).diffusion if kind != "autoencoder" else None
    settings = settings or small(**merge(RELEASED, {"autoencoder": changes})).autoencoder

    def fit(fitting):
        torch.manual_seed(0)
        model = Diffusion(settings, 4) if kind != "autoencoder" else Autoencoder(settings, 4)
        fit_model("diffusion", model, latents, settings, fitting, ema_decay=0.9)
        return model.state_dict(), fitting.history["diffusion"]

    saved, steps = {}, itertools.count(1)

    def save_and_die(name, state):
        saved[name] = save_tree(state)
        raise Killed

    whole, losses = fit(Fitting(CPU, 0))
    with pytest.raises(Killed):
        fit(Fitting(CPU, 0, save=save_and_die, due=lambda saved: next(steps) == 50))
    assert load_tree(saved["diffusion"])["step"] == 50
    resumed, losses_again = fit(Fitting(CPU, 0, load=lambda name: load_tree(saved[name])))
    assert losses_again == losses
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_finished_model_is_not_trained_again():
    """The autoencoder was done when the diffusion model's training was interrupted."""
    vectors, saved, steps = draw(40, 14), {}, []

    def save(name, state):
        if name == "diffusion":
            raise Killed
        saved[name] = save_tree(state)

    with pytest.raises(Killed):
        fitted(small(), vectors, save=save)
    resumed, _ = fitted(
        small(),
        vectors,
        load=lambda name: load_tree(saved[name]) if name in saved else None,
        progress=lambda task, done, total, note: steps.append(task),
    )
    whole, _ = fitted(small(), vectors)
    assert set(steps) == {"diffusion"}
    assert torch.equal(resumed.sample(3, Sampling(seed=0), CPU), whole.sample(3, Sampling(seed=0), CPU))


def test_diverging_training_names_the_learning_rate():
    settings = small(autoencoder={"lr": 1e30})
    with pytest.raises(
        PdiffError, match=r"training of the autoencoder: the loss is .* lower generator\.autoencoder\.lr"
    ):
        fitted(settings, draw(20, 14))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_trainer_state_round_trip(name, momentum):
    def train(weight, first, stop, state=None):
        trainer = Trainer([weight], Optimizer(name=name, momentum=momentum, lr=0.01, schedule="onecycle"), 10, "test")
        if state is not None:
            trainer.load_state(state)
        for step in range(first, stop):
            trainer.step((weight**4).sum(), step)
        assert weight.isfinite().all()
        return trainer.state()

    whole = torch.nn.Parameter(draw(3))
    train(whole, 0, 10)
    halted = torch.nn.Parameter(draw(3))
    tree = load_tree(save_tree({"optimizer": train(halted, 0, 4)}))
    train(halted, 4, 10, tree["optimizer"])
    assert torch.equal(halted, whole)


def test_schedules():
    factors = {name: [factor(step, 1000) for step in range(1000)] for name, factor in SCHEDULES.items()}
    assert set(factors["constant"]) == {1.0}
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), 1000)
    for factor in factors["cosine"]:
        assert factor == pytest.approx(reference.get_last_lr()[0])
        reference.optimizer.step()
        reference.step()
    onecycle = factors["onecycle"]
    assert onecycle[0] == pytest.approx(1 / 25)
    assert max(onecycle) == onecycle[300] == pytest.approx(1)
    assert onecycle[:301] == sorted(onecycle[:301])
    assert onecycle[300:] == sorted(onecycle[300:], reverse=True)
    assert onecycle[-1] == pytest.approx(0, abs=1e-4)


# --- whole generators -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [*({"name": name} for name in GENERATORS if name != "imported"), RELEASED], ids=str)
@pytest.mark.parametrize("count", [1, 40])
def test_state_round_trip(changes, count):
    vectors = 3 + draw(count, 14) * torch.logspace(-3, 0, 14)
    generator, _ = fitted(small(**changes), vectors)
    copy = make_generator(small(**changes, seed=5), SUBSET)
    copy.load_state(load_tree(save_tree(generator.state())), vectors)
    for sampling in (Sampling(seed=3), Sampling(seed=4)):
        drawn = generator.sample(6, sampling, CPU)
        assert drawn.shape == (6, 14)
        assert drawn.dtype == torch.float32
        assert drawn.isfinite().all()
        assert torch.equal(copy.sample(6, sampling, CPU), drawn)
    assert not torch.equal(drawn, generator.sample(6, Sampling(seed=3), CPU)) or count == 1
    torch.testing.assert_close(copy.encode(vectors), generator.encode(vectors))
    assert generator.encode(vectors).shape[0] == count


def test_same_seed_same_generator():
    vectors = draw(40, 14)
    first, again, other = (fitted(small(seed=seed), vectors)[0].sample(3, Sampling(seed=0), CPU) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("lost", "passed"), [(0.015, True), (0.03, False)])
def test_gate_compares_decoded_members_with_their_originals(lost, passed):
    vectors, judged = draw(40, 14), []

    def judge(chosen):
        judged.append(chosen)
        return torch.full((len(chosen),), 0.9 - lost * (len(judged) - 1))

    _, fitting = fitted(small(gate_points=2.0), vectors, judge=judge)
    assert fitting.notes["gate"] == {
        "members": 10,
        "validation_accuracy": pytest.approx(0.9),
        "decoded_validation_accuracy": pytest.approx(0.9 - lost),
        "passed": passed,
    }
    assert torch.equal(judged[0][[0, -1]], vectors[[0, -1]])
    assert not torch.equal(judged[1], judged[0])
    assert judged[1].shape == judged[0].shape


def test_gaussian_has_the_moments_of_the_zoo():
    vectors = torch.linspace(-1, 1, 14) + draw(60, 5) @ draw(5, 14, seed=1)
    generator, _ = fitted(GaussianSettings(), vectors)
    drawn = generator.sample(20_000, Sampling(seed=0), CPU)
    torch.testing.assert_close(drawn.mean(0), vectors.mean(0), rtol=0, atol=0.08)
    torch.testing.assert_close(torch.cov(drawn.T), torch.cov(vectors.T), rtol=0.1, atol=0.25)
    assert torch.linalg.matrix_rank(drawn - vectors.mean(0), rtol=1e-4) == 5


def test_gaussian_of_one_member_repeats_it():
    vectors = draw(1, 14)
    generator, _ = fitted(GaussianSettings(), vectors)
    assert torch.equal(generator.sample(3, Sampling(seed=0), CPU), vectors.expand(3, -1))


def test_gaussian_view_keeps_distances():
    vectors = draw(20, 14)
    generator, _ = fitted(GaussianSettings(), vectors)
    torch.testing.assert_close(torch.cdist(*[generator.encode(vectors)] * 2), torch.cdist(vectors, vectors))


def drawn_by(name, vectors, samples=500, **settings):
    generator, _ = fitted(Generator.model_validate({"name": name, **settings}), vectors)
    return generator.sample(samples, Sampling(seed=1), CPU)


def weights_of(samples, members):
    """The weights (n, K) by which samples are combinations of members, which are independent."""
    return torch.linalg.lstsq(members.T.double(), samples.T.double()).solution.T


def test_averages_are_of_so_many_members():
    members = draw(12, 14) + 3
    for count in (1, 2, 5, 12, 50):
        weights = weights_of(drawn_by("average", members, count=count), members)
        there = weights > 1e-4
        assert (there.sum(1) == min(count, 12)).all()
        torch.testing.assert_close(
            weights[there], torch.full_like(weights[there], 1 / min(count, 12)), rtol=0, atol=1e-5
        )
        if count < 12:
            assert len({tuple(row) for row in there.tolist()}) > 5


def test_points_between_lie_between_two_members():
    members = draw(12, 14) + 3
    weights = weights_of(drawn_by("interpolation", members), members)
    assert ((weights > 1e-4).sum(1) <= 2).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(500).double(), rtol=0, atol=1e-4)
    share = weights.max(1).values
    assert 0.5 <= share.min() < 0.52 < 0.98 < share.max() <= 1 + 1e-5


def test_noise_is_in_standard_deviations_of_each_tensor():
    subset = Subset((Entry("a", (40_000,), 0, "parameter"), Entry("b", (40_000,), 40_000, "parameter")))
    member = torch.cat([5 + draw(40_000), 10 * draw(40_000, seed=1) - 3])[None]
    generator = make_generator(Generator.model_validate({"name": "noise", "sigma": 0.5}), subset)
    generator.fit(member, Fitting(CPU, 0))
    noise = generator.sample(1, Sampling(seed=7), CPU)[0] - member[0]
    assert noise[:40_000].std() == pytest.approx(0.5, rel=0.02)
    assert noise[40_000:].std() == pytest.approx(5, rel=0.02)


def test_the_diagonal_gaussian_has_each_values_moments_and_no_more():
    members = torch.linspace(-1, 1, 14) + draw(60, 5) @ draw(5, 14, seed=1)
    drawn = drawn_by("gaussian_diagonal", members, samples=20_000)
    torch.testing.assert_close(drawn.std(0), members.std(0), rtol=0.05, atol=0)
    off_diagonal = torch.corrcoef(drawn.T) - torch.eye(14)
    assert off_diagonal.abs().max() < 0.05
    assert (torch.corrcoef(members.T) - torch.eye(14)).abs().max() > 0.5


def test_the_principal_gaussian_has_the_leading_components():
    components = torch.linalg.qr(draw(14, 14)).Q[:4]
    members = 2 + draw(60, 4) * torch.tensor([10.0, 5.0, 0.1, 0.01]) @ components
    assert torch.linalg.matrix_rank(drawn_by("gaussian_pca", members, rank=3) - members.mean(0), rtol=1e-5) == 3
    chosen = drawn_by("gaussian_pca", members, samples=20_000)  # its rank is theirs: two components have all
    assert torch.linalg.matrix_rank(chosen - members.mean(0), rtol=1e-5) == 2
    torch.testing.assert_close(torch.cov(chosen.T), torch.cov(members.T), rtol=0.1, atol=1)


def test_kernels_stand_about_members_and_vary_as_these_do():
    members = 4 * torch.eye(14)[:12] + draw(12, 14)
    drawn = drawn_by("gaussian_kernel", members, samples=20_000, bandwidth=0.1)
    distances = torch.cdist(drawn, members)
    moved = drawn - members[distances.argmin(1)]
    torch.testing.assert_close(torch.cov(moved.T), 0.01 * torch.cov(members.T), rtol=0, atol=2e-3)
    assert distances.argmin(1).bincount().min() > 20_000 / 12 * 0.8


@pytest.mark.parametrize(
    "name", ["average", "interpolation", "noise", "gaussian_diagonal", "gaussian_pca", "gaussian_kernel"]
)
def test_baselines_of_few_members_and_their_state(name):
    for count in (1, 3):
        vectors = draw(count, 14)
        generator, _ = fitted(Generator.model_validate({"name": name}), vectors)
        samples = generator.sample(5, Sampling(seed=3), CPU)
        assert samples.isfinite().all()
        if count == 1 and name != "noise":
            torch.testing.assert_close(samples, vectors.expand(5, -1))
        again = make_generator(Generator.model_validate({"name": name}), generator.subset)
        again.load_state(load_tree(save_tree(generator.state()), "there"), vectors)
        assert torch.equal(again.sample(5, Sampling(seed=3), CPU), samples)
        assert not torch.equal(again.sample(5, Sampling(seed=4), CPU), samples) or (count == 1 and name != "noise")


def test_a_kill_while_a_rung_is_shown_does_not_lose_the_rung():
    saved, seen = {}, []

    def preview(rung, vectors):
        seen.append(rung)
        if seen.count(rung) == 1 and rung == 5:
            raise KeyboardInterrupt

    settings = small(autoencoder={"steps": 200}, diffusion={"steps": 200})
    work = {"load": saved.get, "save": saved.__setitem__, "preview": preview, "due": lambda saved: True}
    with pytest.raises(KeyboardInterrupt):
        fitted(settings, draw(16, 14), **work)
    fitted(settings, draw(16, 14), **work)
    assert sorted(set(seen)) == list(range(1, NUM_RUNGS + 1))


def test_what_cannot_be_learned_is_refused_before_work_starts():
    small().check_dimension(14)
    GaussianSettings().check_dimension(100_000_000)
    with pytest.raises(ConfigError, match=r"100,000,000 values at stride 2 .* raise generator\.autoencoder\.stride"):
        LatentDiffusionSettings().check_dimension(100_000_000)
    with pytest.raises(
        ConfigError, match=r"a unet of width 64 and depth 1000 has more .* lower generator\.diffusion\.depth"
    ):
        LatentDiffusionSettings(recipe="released", diffusion={"depth": 1000}).check_dimension(14)
    with pytest.raises(ValueError, match=r"sampling\.steps is 21, but generator\.diffusion\.num_timesteps is 20"):
        small().check_sampling(Sampling(steps=21))
    GaussianSettings().check_sampling(Sampling(steps=21))


@pytest.mark.parametrize("changes", [{}, RELEASED], ids=["default", "released"])
def test_operations_are_those_that_pytorch_counts_while_they_run(changes):
    sampling, vectors, settings = Sampling(samples=5, seed=0), draw(16, 14), small(**changes)
    fit, sample, memory = settings.cost(14, 16, sampling)
    with FlopCounterMode(display=False) as fitting:
        generator, _ = fitted(settings, vectors)
    with FlopCounterMode(display=False) as drawing:
        generator.encode(vectors)
        generator.encode(generator.sample(5, sampling, CPU))
    assert fitting.get_total_flops() == pytest.approx(fit, rel=0.15)
    assert drawing.get_total_flops() == pytest.approx(sample, rel=0.15)
    parameters = sum(parameter.numel() for parameter in generator.encoder.autoencoder.parameters())
    assert memory > 16 * parameters
    assert GaussianSettings().cost(14, 16, sampling)[1] == 2 * 5 * 16 * 14
