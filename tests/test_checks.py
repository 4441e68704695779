"""Networks whose numbers would not hold are refused before training; exported files are what was judged."""

import pytest
import torch
from helpers import tiny
from torch import nn
from torch.nn import functional

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config.schema import SubsetRule
from pdiff_ray.networks.subset import Subset, resolve
from pdiff_ray.stages.checks import checked_subset


class Small(nn.Module):
    """A network of two linear layers around a layer of its own."""

    def __init__(self, image_size, num_classes, middle, width=16, **_):
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(image_size**2, width), middle, nn.Linear(width, num_classes)

    def forward(self, images):
        return self.head(self.middle(self.first(images.flatten(1))).relu())


class Layer(nn.Module):
    """A layer that is a function of its input and itself."""

    def __init__(self, function, **tensors):
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    def forward(self, x):
        return self.function(self, x)


class AlwaysTraining(nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(True)


def masked(persistent):
    layer = Layer(lambda self, x: x * self.mask)
    layer.register_buffer("mask", (torch.rand(16) < 0.5).float(), persistent=persistent)
    return layer


def sharing_memory():
    layer = Layer(lambda self, x: x * self.a + self.b, a=nn.Parameter(torch.ones(16)), b=nn.Parameter(torch.ones(16)))
    layer.b.data = layer.a.data
    return layer


def shared():
    twice = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.BatchNorm1d(16))
    return nn.Sequential(twice, nn.ReLU(), twice)


def tied():
    layer = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    layer[2].weight = layer[0].weight
    return layer


def parameter(dtype):
    return Layer(lambda self, x: x * self.scale.to(torch.float32), scale=nn.Parameter(torch.rand(16).to(dtype) + 1))


def rotation(dtype=torch.complex64):
    def rotate(self, x):
        return torch.view_as_real(torch.complex(x[:, ::2], x[:, 1::2]).to(dtype) * self.turn).flatten(1).float()

    return Layer(rotate, turn=nn.Parameter(torch.randn(8, dtype=dtype)))


def permuted():
    order = nn.Parameter(torch.randperm(16), requires_grad=False)
    return Layer(lambda self, x: x[:, self.order], order=order)


MIDDLES = {
    "batch statistics": lambda: nn.BatchNorm1d(16, track_running_stats=False),
    "training mode": lambda: AlwaysTraining(16),
    "centred": lambda: Layer(lambda self, x: x - x.mean(0)),
    "faintly centred": lambda: Layer(lambda self, x: x - 1e-3 * x.mean(0)),
    "attending": lambda: Layer(lambda self, x: (x @ x.T).softmax(1) @ x),
    "summed": lambda: Layer(lambda self, x: x.cumsum(0)),
    "squeezed": lambda: Layer(lambda self, x: x.squeeze()),
    "dropout": lambda: Layer(lambda self, x: functional.dropout(x, 0.1)),
    "noise": lambda: Layer(lambda self, x: x + torch.randn_like(x)),
    "mask": lambda: masked(persistent=False),
    "attribute": lambda: Layer(lambda self, x: x * self.mask, mask=torch.rand(16)),
    "number": lambda: Layer(lambda self, x: x * self.scale, scale=torch.rand(()).item()),
    "sharing memory": sharing_memory,
    "complex128": lambda: rotation(torch.complex128),
    "plain": nn.Identity,
    "norms": lambda: nn.Sequential(nn.BatchNorm1d(16), nn.Dropout(), nn.LayerNorm(16)),
    "persistent": lambda: masked(persistent=True),
    "constant": lambda: Layer(lambda self, x: x * self.mask, mask=torch.arange(16.0)),
    "shared": shared,
    "tied": tied,
    "complex": rotation,
    "float64": lambda: parameter(torch.float64),
    "float16": lambda: parameter(torch.float16),
    "bfloat16": lambda: parameter(torch.bfloat16),
    "integers": permuted,
}


def small(middle, **info):
    return Small(middle=MIDDLES[middle](), **info)


def experiment(storage, middle, *overrides):
    network = ("network.name=test_checks:small", f"network.args={{middle: {middle}}}")
    subset = ("zoo.subset=all", "zoo.members=4", "generator={name: gaussian}")
    return tiny(storage, *network, *subset, *overrides)


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        ("batch statistics", "cannot take one image alone"),
        ("training mode", r"\(middle\)"),
        ("centred", "among other images"),
        ("faintly centred", "among other images"),
        ("attending", "among other images"),
        ("summed", "among other images"),
        ("squeezed", "among other images"),
        ("dropout", "second pass"),
        ("noise", "second pass"),
        ("mask", r"built anew.*\(middle.mask\)"),
        ("attribute", r"built anew.*\(middle.mask\)"),
        ("number", "built anew"),
        ("sharing memory", "one Parameter"),
        ("complex128", "complex128"),
    ],
)
def test_refused_before_training(tmp_path, middle, message):
    with pytest.raises(ConfigError, match=message):
        checked_subset(experiment(tmp_path, middle)[0])


@pytest.mark.parametrize(
    "middle",
    [
        "plain",
        "norms",
        "persistent",
        "constant",
        "shared",
        "tied",
        "complex",
        "float64",
        "float16",
        "bfloat16",
        "integers",
    ],
)
def test_accepted(tmp_path, middle):
    assert checked_subset(experiment(tmp_path, middle)[0]).size


def test_networks_that_share_no_initialisation_share_no_random_tensors(tmp_path):
    independent = ("zoo.regime=independent", "zoo.batchnorm=included")
    with pytest.raises(ConfigError, match=r"seed decides \(middle.mask\)"):
        checked_subset(experiment(tmp_path, "persistent", *independent)[0])
    assert checked_subset(experiment(tmp_path, "norms", *independent)[0]).size


@pytest.mark.parametrize("middle", ["shared", "tied"])
def test_a_tied_tensor_is_in_the_vector_once_under_any_of_its_names(middle):
    network = small(middle, image_size=8, num_classes=10)
    first, second = {
        "shared": ("middle.0.0.weight", "middle.2.0.weight"),
        "tied": ("middle.0.weight", "middle.2.weight"),
    }[middle]
    for names in ([first], [second], [first, second]):
        (entry,) = resolve(SubsetRule(names=tuple(names)), network).entries
        assert (entry.name, entry.also) == (first, (second,))
    subset = resolve(SubsetRule(all=True), network)
    assert subset.size == sum(p.numel() for p in network.parameters())
    assert Subset.from_json(subset.to_json()) == subset
    state = network.state_dict()
    del state[first]  # as files have it that keep one name of each tensor
    vector = subset.flatten(state)
    assert torch.equal(vector, subset.flatten(network.state_dict()))
    assert set(subset.under_all_names(subset.unflatten(vector))) == {
        name for name, _ in network.named_parameters(remove_duplicate=False)
    }


@pytest.mark.parametrize(
    ("middle", "dtype"), [("complex", torch.complex64), ("float64", torch.float64), ("bfloat16", torch.bfloat16)]
)
def test_types_come_back(middle, dtype):
    network = small(middle, image_size=8, num_classes=10)
    subset = Subset.from_json(resolve(SubsetRule(all=True), network).to_json())
    vectors = torch.stack([subset.flatten(network.state_dict())] * 2)
    assert vectors.dtype == torch.float32
    assert vectors.shape[1] == subset.size
    for name, parameter in network.named_parameters():
        found = subset.unflatten(vectors)[name]
        assert found.dtype == parameter.dtype
        assert torch.allclose(found, parameter.expand_as(found), atol=1e-7)


def test_integers_are_left_out_or_refused():
    network = small("integers", image_size=8, num_classes=10)
    assert "middle.order" not in resolve(SubsetRule(all=True), network).names
    with pytest.raises(ConfigError, match=r"'middle.order' holds torch.int64"):
        resolve(SubsetRule(names=("middle.*",)), network)
