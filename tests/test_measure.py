"""What estimates know of networks: their anatomy, against the parts that they are really split into."""

from dataclasses import replace

import pytest
import torch
from test_split import CONVNET, CONVNEXT, LAST_NORMS, RESNET, SMALL_VIT
from torch import nn

from pdiff_ray.config.schema import Network, SubsetRule, Zoo
from pdiff_ray.data.sources import DataInfo
from pdiff_ray.estimates import anatomy, measure
from pdiff_ray.networks.build import build_network
from pdiff_ray.networks.split import split_network
from pdiff_ray.networks.subset import resolve

CPU = torch.device("cpu")


def info_of(size):
    return DataInfo(3, size, 10, (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize(("network", "size"), [(RESNET, 8), (CONVNEXT, 32), (CONVNET, 8), (SMALL_VIT, 8)])
def test_anatomy_is_that_of_the_split_network(network, size):
    found = measure.Meter(CPU).anatomy(network, info_of(size), Zoo(subset=LAST_NORMS))
    built = build_network(network, info_of(size), 0).eval()
    names = resolve(LAST_NORMS, built).names
    split = split_network(built, names, torch.randn(2, 3, size, size))
    assert split.reason is None
    assert found.subset.names == names
    assert found.prefix_flops == split.prefix_flops
    assert found.shared == pytest.approx(split.shared)
    row_bytes = sum(tensor[0].nbytes for tensor in split.prefix(torch.randn(2, 3, size, size)))
    assert found.frontier_bytes == row_bytes


@pytest.mark.parametrize("rule", [SubsetRule(all=True), LAST_NORMS])
@pytest.mark.parametrize(("network", "size"), [(RESNET, 8), (CONVNET, 8), (SMALL_VIT, 8)])
def test_a_dissected_network_tells_of_any_number_of_classes(monkeypatch, network, size, rule):
    dissections = []
    monkeypatch.setattr(measure, "dissect", lambda *of: dissections.append(of) or anatomy.dissect(*of))
    meter, zoo = measure.Meter(CPU), Zoo(subset=rule)
    for classes in (2, 10, 1000):
        info = replace(info_of(size), num_classes=classes)
        built = build_network(network, info, 0)
        assert meter.anatomy(network, info, zoo) == anatomy.dissect(built, info, zoo).anatomy(classes)
    assert len(dissections) == 1


def test_a_layer_may_have_as_many_channels_as_the_number_that_stands_for_classes():
    network, info = Network(args={"widths": [4, anatomy.CLASSES]}), info_of(8)
    found = measure.Meter(CPU).anatomy(network, info, Zoo())
    assert found.parameters == sum(p.numel() for p in build_network(network, info, 0).parameters())


def untrained(num_classes, in_channels, image_size, **_):
    """A network whose logits are all zero before it is trained."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, 32), nn.Linear(32, num_classes))
    nn.init.zeros_(network[-1].weight)
    nn.init.zeros_(network[-1].bias)
    return network


def test_a_head_of_zeros_hides_nothing_of_ones_own_network():
    found = measure.Meter(CPU).anatomy(
        Network(name="test_measure:untrained"), info_of(8), Zoo(subset=SubsetRule(names=("2.*",)))
    )
    assert found.runs_whole is None
    assert found.shared > 0.9


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_tiny"])
def test_large_images_are_counted_without_computing(monkeypatch, name):
    for module in (anatomy, measure):
        monkeypatch.setattr(module, "check_network", lambda *_: pytest.fail("a pass over values"))
    network = Network(name=name, source="timm")
    found = measure.Meter(CPU).anatomy(network, info_of(224), Zoo())
    assert found.flops > 1e9
    assert found.shared > 0.5
