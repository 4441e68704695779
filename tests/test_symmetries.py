"""Permutation symmetries against the function of the network, and weight matching against what was permuted."""

import functools

import pytest
import torch
from torch import nn

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config.schema import Network, SubsetRule
from pdiff_ray.data.sources import DATASETS, DataInfo
from pdiff_ray.networks.alignment import match
from pdiff_ray.networks.build import build_network
from pdiff_ray.networks.partition import call_with
from pdiff_ray.networks.subset import resolve
from pdiff_ray.networks.symmetries import find_symmetries

CIFAR, MNIST = DATASETS["cifar10"], DATASETS["mnist"]
ALL = SubsetRule(all=True)


def images(info, count=3):
    return torch.randn(
        count, info.channels, info.image_size, info.image_size, generator=torch.Generator().manual_seed(0)
    )


def whole(network, info, batchnorm="included"):
    return resolve(ALL, network, batchnorm, images(info))


def logits(network, subset, vector, info):
    with torch.no_grad():
        return call_with(network, subset.unflatten(vector), images(info))


def trained(network, seed=0):
    """A network whose statistics and affine parameters have values of their own, as after training."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.ndim == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=random) + 0.5)
    return network.eval()


@functools.cache
def known(name, info, **args):
    """A network of a name, its subset and its symmetries."""
    network = trained(build_network(Network(name=name, **args), info, 0))
    subset = whole(network, info)
    return network, subset, find_symmetries(network, subset, images(info))


def sizes(found):
    return sorted(group.size for group in found.groups)


@pytest.mark.parametrize(
    ("name", "info", "args", "expected"),
    [
        ("s2", MNIST, {}, [64, 64]),
        ("convnet", CIFAR, {}, [32, 64, 128]),
        ("convnet_mini", CIFAR, {}, [12, 12, 24, 36, 36]),
        ("mlp_mini", CIFAR, {}, [16, 64]),
        # A block's own channels, and the residual stream of each stage.
        ("resnet_mini", CIFAR, {}, [8, 8, 10, 10, 24, 24, 28, 28]),
        ("resnet20", CIFAR, {}, [size for size in (16, 32, 64) for _ in range(4)]),
        # The stream; in each of three blocks heads, what is in a head, and the MLP.
        ("vit_mini", CIFAR, {}, [4, 4, 4, 13, 13, 13, 52, 104, 104, 104]),
        # The streams of four stages, of which the last has two blocks, and the MLP of each block.
        ("convnext_mini", CIFAR, {}, [8, 16, 24, 32, 56, 64, 96, 224, 224]),
        ("resnet18", CIFAR, {"cifar_stem": True}, [size for size in (64, 128, 256, 512) for _ in range(3)]),
        pytest.param(
            "resnet18",
            CIFAR,
            {"cifar_stem": True, "source": "torchvision"},
            [size for size in (64, 128, 256, 512) for _ in range(3)],
            marks=pytest.mark.slow,
        ),
        ("vit_tiny_patch16_224", CIFAR, {"args": {"patch_size": 4, "depth": 1}}, [3, 64, 192, 768]),
        ("convnext_atto", CIFAR, {"args": {"depths": [1] * 4}}, [40, 80, 160, 160, 320, 320, 640, 1280]),
    ],
)
def test_permuted_networks_compute_the_same(name, info, args, expected):
    of = known if "args" not in args else known.__wrapped__  # lists are no keys
    network, subset, found = of(name, info, **args)
    assert sizes(found) == expected
    assert not found.obstacles
    vector = subset.flatten(network.state_dict())
    permuted = found.permuted(vector[None], found.random(1, torch.Generator().manual_seed(1)))[0]
    before, after = (logits(network, subset, row, info) for row in (vector, permuted))
    assert (permuted != vector).float().mean() > 0.5
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))


@pytest.mark.parametrize(
    ("name", "info", "expected"),
    [
        ("s2", MNIST, [64, 64]),
        ("convnet", CIFAR, [32, 64, 128]),
        ("resnet_mini", CIFAR, [8, 8, 10, 10, 24, 24, 28, 28]),
        ("vit_mini", CIFAR, []),  # GELU, normalization over units and softmax
        ("convnext_mini", CIFAR, [16, 24, 56]),  # what a normalization of the stream makes, up to the next layer
    ],
)
def test_balanced_networks_compute_the_same(name, info, expected):
    network, subset, _ = known(name, info)
    found = find_symmetries(network, subset, images(info), scales=True)
    assert sorted(scaling.made[0].size for scaling in found.scalings) == expected
    vector = subset.flatten(network.state_dict())[None]
    before = vector.clone()
    balanced = found.balanced(vector)
    assert torch.equal(vector, before)
    expected_logits = logits(network, subset, vector[0], info)
    tolerance = 1e-5 * float(expected_logits.abs().max())
    torch.testing.assert_close(logits(network, subset, balanced[0], info), expected_logits, rtol=0, atol=tolerance)
    for scaling in found.scalings:
        torch.testing.assert_close(scaling.balance(balanced), torch.ones(1, scaling.made[0].size), rtol=0, atol=1e-3)
    # Networks that differ in scales alone become one.
    other = vector.clone()
    for scaling in found.scalings:
        scaling.scaled(other, torch.rand(1, scaling.made[0].size, generator=torch.Generator().manual_seed(2)) + 0.5)
    assert torch.equal(other, vector) == (not expected)
    torch.testing.assert_close(found.balanced(other), balanced, rtol=1e-3, atol=1e-5)


def test_residual_stages_are_tied():
    """In a ResNet-18 every tensor of a stage's stream is in one group, statistics with it."""
    _, _, found = known("resnet18", CIFAR, cifar_stem=True)
    stream = next(group for group in found.groups if group.size == 128 and "layer3.0.conv1.weight" in group.names)
    assert {(place.name, place.axis) for place in stream.places} == {
        *((f"layer2.{block}.conv2.weight", 0) for block in (0, 1)),
        *((f"layer2.{block}.bn2.{leaf}", 0) for block in (0, 1) for leaf in LEAVES),
        ("layer2.0.downsample.0.weight", 0),
        *((f"layer2.0.downsample.1.{leaf}", 0) for leaf in LEAVES),
        ("layer2.1.conv1.weight", 1),
        ("layer3.0.conv1.weight", 1),
        ("layer3.0.downsample.0.weight", 1),
    }


LEAVES = ("weight", "bias", "running_mean", "running_var")


class Odd(nn.Module):
    """Networks of one operation each, behind a convolution and before a linear layer."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv = kind, nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.grouped, self.norm = nn.Conv2d(8, 12, 3, groups=4), nn.GroupNorm(4, 8)
        self.square, self.fc = nn.Conv2d(8, 8, 1), nn.Linear({"flatten": 8 * 16, "grouped": 12}.get(kind, 8), 5)

    def forward(self, x):
        x = self.conv(x).relu()
        if self.kind == "flatten":
            return self.fc(x.flatten(1))
        if self.kind == "grouped":
            return self.fc(self.grouped(x).mean((2, 3)))
        if self.kind == "norm":
            x = self.norm(x).relu()
        if self.kind == "square":
            x = x + self.square(x)
        if self.kind == "sorted":
            x = x.sort(1).values
        if self.kind == "halves":
            x = torch.cat([x[:, :4], x[:, 4:].relu()], 1)
        return self.fc(x.mean((2, 3)))


SMALL = DataInfo(3, 4, 5, (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    ("kind", "expected"), [("flatten", [8]), ("grouped", [2, 3, 4]), ("norm", [2, 4]), ("square", [8])]
)
def test_what_axes_are_made_of(kind, expected):
    network = trained(Odd(kind))
    subset = resolve(ALL, network)
    found = find_symmetries(network, subset, images(SMALL))
    assert sizes(found) == expected
    if kind == "flatten":
        assert [(place.name, place.outer, place.inner) for place in found.groups[0].places] == [
            ("conv.weight", 1, 27),
            ("fc.weight", 5, 16),
        ]


@pytest.mark.parametrize(("kind", "reason"), [("sorted", "sort"), ("halves", "slice")])
def test_what_cannot_be_permuted_is_refused_with_the_reason(kind, reason):
    network = trained(Odd(kind))
    with pytest.raises(ConfigError, match=f"no permutation of units leaves its function as it is: .*{reason}"):
        find_symmetries(network, resolve(SubsetRule(names=("conv.*", "fc.*")), network), images(SMALL))


def test_groups_have_all_their_tensors_in_the_vector():
    network = build_network(Network(name="convnet"), CIFAR, 0).eval()
    frozen = whole(network, CIFAR, "frozen")
    with pytest.raises(ConfigError, match=r"layers\.0\.bn\.running_mean is not generated"):
        find_symmetries(network, frozen, images(CIFAR))
    measured = find_symmetries(network, frozen, images(CIFAR), lambda name: "running_" in name)
    assert sizes(measured) == [32, 64, 128]
    part = resolve(SubsetRule(names=("layers.1.*", "layers.2.conv.*")), network, "included")
    assert sizes(find_symmetries(network, part, images(CIFAR))) == [64]


@pytest.mark.parametrize("name", ["convnet_mini", "resnet_mini", "mlp_mini"])
def test_permuted_copies_are_matched_back(name):
    network, subset, found = known(name, CIFAR)
    vector = subset.flatten(network.state_dict())
    copies = found.permuted(vector.repeat(4, 1), found.random(4, torch.Generator().manual_seed(2)))
    assert torch.equal(found.permuted(copies, match(found, vector, copies, 0)), vector.repeat(4, 1))


def test_a_group_on_both_axes_of_a_tensor_is_matched():
    network = trained(Odd("square"))
    subset = resolve(ALL, network)
    found = find_symmetries(network, subset, images(SMALL))
    vectors = torch.randn(6, subset.size, generator=torch.Generator().manual_seed(0))
    vectors[5] = found.permuted(vectors[:1], found.random(1, torch.Generator().manual_seed(1)))[0]
    matched = found.permuted(vectors, match(found, vectors[0], vectors, 0))
    before, after = ((rows - vectors[0]).norm(dim=1) for rows in (vectors, matched))
    assert (after <= before).all()
    assert (after < before).sum() >= 3  # one may stand where the group finds nothing better


def test_independent_networks_come_nearer_and_stay_the_same():
    networks = [build_network(Network(name="convnet"), CIFAR, seed).eval() for seed in range(6)]
    _, subset, found = known("convnet", CIFAR)
    vectors = torch.stack([subset.flatten(network.state_dict()) for network in networks])
    orders = match(found, vectors[0], vectors, 3)
    matched = found.permuted(vectors, orders)
    before, after = ((rows - vectors[0]).norm(dim=1) for rows in (vectors, matched))
    assert after[0] == before[0] == 0
    assert (after[1:] < 0.97 * before[1:]).all()
    for network, row in zip(networks, matched, strict=True):
        expected = network(images(CIFAR))
        torch.testing.assert_close(logits(network, subset, row, CIFAR), expected, rtol=0, atol=1e-5)
    alone = [match(found, vectors[0], row[None], 3) for row in vectors]
    for index, order in enumerate(orders):  # whoever else is matched
        assert torch.equal(order, torch.cat([own[index] for own in alone]))
    again = match(found, vectors[0], vectors, 3, orders)
    assert all(torch.equal(*pair) for pair in zip(again, orders, strict=True))
