"""What dry runs tell: FLOPs against layers and split networks, earlier runs, and sums over stages and trials."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import TINY, tiny
from test_partition import CONVNET, CONVNEXT, LAST_NORMS, RESNET, SMALL_VIT, TIMM_RESNET
from torch import nn

from pdiff_ray.cli import printing
from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config import sweep as space
from pdiff_ray.config.schema import Network, Sampling, SubsetRule, Zoo
from pdiff_ray.data import sources
from pdiff_ray.data.sources import DataInfo
from pdiff_ray.estimates import estimate
from pdiff_ray.estimates.estimate import Estimator
from pdiff_ray.estimates.flops import count
from pdiff_ray.generators.baselines import GaussianSettings
from pdiff_ray.generators.latent import LatentDiffusionSettings
from pdiff_ray.networks.build import build_network
from pdiff_ray.networks.partition import partition_network
from pdiff_ray.networks.subset import resolve
from pdiff_ray.running import experiment as pipeline
from pdiff_ray.storage.files import Storage
from pdiff_ray.sweeps.ledger import Ledger
from pdiff_ray.sweeps.plan import make_plan


def info_of(size, classes=10):
    return DataInfo(3, size, classes, (0.5,) * 3, (0.25,) * 3)


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def layers(num_classes, in_channels, image_size, **_):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, 32), nn.Linear(32, num_classes))


def layers_that_read_values(**info):
    network = layers(**info)
    network.register_forward_hook(lambda module, images, logits: logits * logits.sum().item())
    return network


@pytest.mark.parametrize("name", ["layers", "layers_that_read_values"])
def test_layers_are_two_flops_for_each_weight(name):
    found = count(Network(name=f"test_estimates:{name}"), info_of(8), Zoo(subset=SubsetRule(names=("2.*",))))
    assert (found.parameters, found.subset.size) == (192 * 32 + 32 + 330, 330)
    assert (found.flops, found.suffix_flops) == (2 * (192 * 32 + 320), 2 * 320)


@pytest.mark.parametrize(("network", "size"), [(RESNET, 8), (CONVNEXT, 32), (CONVNET, 8), (SMALL_VIT, 8)])
def test_as_much_is_shared_as_in_the_split_network(network, size):
    found = count(network, info_of(size), Zoo(subset=LAST_NORMS))
    built = build_network(network, info_of(size), 0).eval()
    split = partition_network(built, resolve(LAST_NORMS, built).names, torch.randn(2, 3, size, size))
    assert split.reason is None
    assert found.flops - found.suffix_flops == split.prefix_flops
    assert found.shared == pytest.approx(split.shared)


def test_recalibrated_statistics_reach_from_the_first_batchnorm_on():
    shared = [count(TIMM_RESNET, info_of(32), Zoo(subset=LAST_NORMS, batchnorm=policy)).shared
              for policy in ("frozen", "recalibrated")]  # fmt: skip
    stem = 2 * 3 * 64 * 7**2 * 16**2
    assert shared[1] == pytest.approx(stem / count(TIMM_RESNET, info_of(32), Zoo()).flops)
    assert shared[0] > 0.9


def test_a_wider_generator_takes_more_in_proportion_to_its_steps():
    settings, sampling = LatentDiffusionSettings(), Sampling(samples=10)
    fit, sample, memory = settings.cost(1000, 200, sampling)
    longer = settings.model_copy(update={"diffusion": settings.diffusion.model_copy(update={"steps": 1200})})
    # A denoising MLP's weights, used once per latent and three times in training.
    z, width, depth = settings.autoencoder.latent_dim, settings.diffusion.width, settings.diffusion.depth
    weights, embedding = 2 * z * width + depth * 2 * width**2, 2 * width**2
    assert longer.cost(1000, 200, sampling)[0] - fit == pytest.approx(3 * 600 * 50 * 2 * (weights + embedding), rel=0.1)
    assert sample == pytest.approx(10 * 1000 * 2 * weights, rel=0.1)
    assert settings.cost(2000, 200, sampling)[2] > memory
    assert GaussianSettings().cost(1000, 200, sampling)[0] < fit


# --- experiments ------------------------------------------------------------------------------------------------------


def costs(experiment, artifacts):
    return Estimator(Storage(experiment.storage_uri)).costs(experiment, artifacts, list(artifacts))


@pytest.mark.parametrize(("rule", "times"), [(LAST_NORMS, 1), (SubsetRule(names=("fc.*",)), 3)])
def test_networks_are_counted_once_for_all_numbers_of_classes_unless_heads_are_generated(monkeypatch, rule, times):
    counted = []
    monkeypatch.setattr(estimate, "count", lambda *of: counted.append(of) or count(*of))
    e, _ = tiny("none", "network.args={}")
    estimator, known = Estimator(Storage("none")), sources.DATASETS["digits"]
    for classes in (10, 100, 1000, 100):
        monkeypatch.setitem(sources.DATASETS, "digits", replace(known, num_classes=classes))
        estimator.counts(e.model_copy(update={"zoo": e.zoo.model_copy(update={"subset": rule})}))
    assert len(counted) == times


def test_stages_take_as_long_as_earlier_ones_with_other_seeds_or_rates(tmp_path):
    _, before = tiny(tmp_path)
    for seconds, stage in enumerate(("base", "zoo", "generator"), 100):
        before[stage].commit({}, {}, seconds)
    found = costs(*tiny(tmp_path, "seed=7", "zoo.optimizer.lr=0.5", "generator.diffusion.steps=41"))
    assert {stage: cost.seconds for stage, cost in found.items() if cost.known} == {"base": 100, "zoo": 101}
    found = costs(*tiny(tmp_path, "seed=7", "training.epochs=3"))
    assert not any(cost.known for cost in found.values()), "what they are made from takes part"


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ("training.epochs=40", {"base"}),
        ("zoo.steps_per_member=40", {"zoo"}),
        ("generator.autoencoder.steps=4000", {"generator"}),
        ("sampling.samples=600", {"samples", "evaluation"}),
        ("network.args.widths=[64,128]", {"base", "zoo", "generator", "samples", "evaluation"}),
    ],
)
def test_more_work_takes_longer(tmp_path, monkeypatch, change, stages):
    monkeypatch.setattr(Estimator, "_rate", lambda *_: 1e11)
    few, many = (costs(*tiny(tmp_path, *changes)) for changes in ([], [change]))
    assert {stage for stage in few if many[stage].seconds > few[stage].seconds} == stages
    assert all(many[stage].memory >= few[stage].memory > 2**30 / 2 for stage in few)


def test_processes_share_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(Estimator, "_rate", lambda *_: 1e11)
    one, four = (costs(*tiny(tmp_path, f"resources.actors={n}", f"resources.workers={n}")) for n in (1, 4))
    assert [four[stage].processes for stage in four] == [4, 2, 1, 1, 4, 1], "a zoo of two runs"
    assert {stage: four[stage].device_s for stage in four} == pytest.approx(
        {stage: one[stage].device_s for stage in one}
    )


def test_the_plan_of_an_experiment_tells_what_a_user_needs(tmp_path, capsys):
    e, artifacts = tiny(tmp_path)
    artifacts["base"].commit({}, {}, 7.0)
    printing.print_plan(pipeline.make_plan(e))
    told = " ".join(capsys.readouterr().out.split())
    for artifact in artifacts.values():
        assert f"{artifact.stage} │ {artifact.key} │ {'there' if artifact.stage == 'base' else 'to build'}" in told
    assert "last 1 norm layers: 16 values" in told
    assert "layers: layers.1.bn " in told
    assert "GiB" in told
    assert "of a pass; zoo steps are full passes: images vary" in told
    assert "s of devices" in told
    assert "5 stages by FLOPs at 25% of the rate of matrix products" in told
    assert "1 workers x 1 cores" in told


class Branching(nn.Module):
    def __init__(self, in_channels, num_classes, image_size):
        super().__init__()
        self.first, self.head = nn.Linear(in_channels * image_size**2, 16), nn.Linear(16, num_classes)

    def forward(self, images):
        return self.head(self.first((images if images.sum() >= 0 else -images).flatten(1)))


def test_nothing_is_shared_by_a_network_that_runs_whole(tmp_path, capsys):
    network, zoo = Network(name=f"{__name__}:Branching"), Zoo(subset=SubsetRule(names=("head.*",)))
    found = count(network, info_of(8), zoo, trace=True)
    assert found.shared == 0
    assert "cannot trace the network" in found.whole
    assert count(network, info_of(8), zoo).shared > 0.8  # not looked into
    e, _ = tiny(tmp_path, f"network={{name: '{__name__}:Branching', args: {{}}}}", "zoo.subset={names: [head.*]}")
    printing.print_plan(pipeline.make_plan(e))
    told = " ".join(capsys.readouterr().out.split())
    assert "shared: nothing; zoo steps are full passes: the network runs whole: torch.export cannot trace" in told


def test_the_plan_names_the_layers_that_a_rule_counts(tmp_path, capsys):
    resnet = "network={name: resnet10t, args: {}}"
    e, _ = tiny(tmp_path, resnet, "zoo.subset={last_norm_layers: 2}")
    printing.print_plan(pipeline.make_plan(e))
    beside = "parallel to layer4.0.bn1, layer4.0.bn2"
    assert f"layers: layer4.0.bn2 (parallel to layer4.0.downsample.2), layer4.0.downsample.2 ({beside})" in " ".join(
        capsys.readouterr().out.split()
    )


def test_unknown_numbers_of_images_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "count_images", lambda _: None)
    printing.print_plan(pipeline.make_plan(tiny(tmp_path)[0]))
    assert "time: ? of devices, ? with" in capsys.readouterr().out
    printing.print_sweep_plan(grid(tmp_path))
    assert "the number of images of digits data" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("network.name=s4", "network.name: neither"),
        ("network={name: resnet18, source: torchvision, args: {}}", "takes 3 channels; set data.channels: 3"),
        ("zoo.subset={names: [nothing]}", "zoo.subset.names: 'nothing' matches no parameter"),
        ("zoo.subset={last_norm_layers: 9}", "goes beyond the network's 2 normalization layers"),
        ("network={name: 'test_estimates:nothing', args: {}}", "cannot be imported"),
    ],
)
def test_a_network_that_cannot_be_is_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        costs(*tiny(tmp_path, change))


# --- sweeps -----------------------------------------------------------------------------------------------------------


def grid(tmp_path):
    """Two zoos, and two generators for each of three seeds."""
    file = tmp_path / "grid.yaml"
    file.write_text(
        f"base: {TINY}\nname: grid\n"
        "sweep: {repeats: 3, seeds: [generator.seed], parameters: {zoo.optimizer.lr: [0.01, 0.02], "
        "generator.diffusion.steps: [10, 20]}}\n"
    )
    return Ledger(space.load(file, [f"storage={tmp_path}/storage"]))


def test_the_plan_of_a_sweep_adds_up(tmp_path):
    ledger = grid(tmp_path)
    plan = make_plan(ledger, Estimator(ledger.storage))
    wanted = {"base": 1, "zoo": 2, "generator": 12, "samples": 12, "evaluation": 12, "report": 12}
    assert plan.counts == {stage: (needed, 0) for stage, needed in wanted.items()}
    assert len(plan.costs) == sum(wanted.values()), "each distinct artifact once"
    assert plan.first_s + plan.trials_s == pytest.approx(sum(cost.device_s for cost in plan.costs))
    assert plan.trials_s / plan.concurrent <= plan.wall_s <= plan.first_s + plan.trials_s
    assert len(plan.trials) == 12


def test_the_plan_of_a_sweep_as_json(tmp_path, capsys):
    printing.print_sweep_plan(grid(tmp_path), as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["artifacts"]["zoo"] == {"needed": 2, "there": 0}
    assert [trial["number"] for trial in told["trials"]] == list(range(12))
    assert told["device_seconds"] >= told["wall_seconds"] > 0
    assert told["memory_bytes"] > 2**20


def test_what_is_there_takes_no_time(tmp_path):
    ledger = grid(tmp_path)
    for trial in ledger.planned()[:2]:
        for artifact in ledger.artifacts(*ledger.experiments(trial)).values():
            if not artifact.exists():
                artifact.commit({}, {}, 1000.0)
    plan = make_plan(ledger, Estimator(ledger.storage))
    assert plan.counts["base"] == (1, 1)
    assert sum(needed - there for needed, there in plan.counts.values()) == len(plan.costs)
    known = [cost for cost in plan.costs if cost.known]
    assert len(known) > 0
    assert {cost.seconds for cost in known} == {1000.0}


def test_the_plan_of_a_sweep_tells_what_a_user_needs(tmp_path, capsys):
    printing.print_sweep_plan(grid(tmp_path))
    told = " ".join(capsys.readouterr().out.split())
    for text in (
        "grid: 12 trials of a grid, 3 seeds each (generator.seed)",
        "zoo │ 2 │ 0 │ 2",
        "convnet, last 1 norm layers │ up to",
        "full passes: images vary",
        "of devices (bases and zoos that are built first",
        "GiB for the largest process",
        "stages by FLOPs at 25%",
    ):
        assert text in told
