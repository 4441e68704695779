"""Split networks against the plain way: `functional_call` on the whole network."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pdiff_ray.common.devices import autocast
from pdiff_ray.config.schema import Network, SubsetRule
from pdiff_ray.data.sources import DataInfo
from pdiff_ray.networks.build import build_network
from pdiff_ray.networks.partition import _verify, _Whole, partition_network
from pdiff_ray.networks.subset import resolve

aten = torch.ops.aten
RESNET = Network(name="resnet18", source="torchvision", cifar_stem=True)
TIMM_RESNET = Network(name="resnet18", source="timm")
CONVNEXT = Network(name="convnext_atto")
VIT = Network(name="vit_tiny_patch16_224", args={"patch_size": 4})
SMALL_VIT = Network(name="vit_tiny_patch16_224", args={"patch_size": 4, "depth": 2})
CONVNET, MLP = Network(name="convnet3"), Network(name="s2")
LAST_NORMS, ALL = SubsetRule(last_norm_layers=2), SubsetRule(all=True)


def build(config, size):
    return build_network(config, DataInfo(3, size, 10, (0.0,) * 3, (1.0,) * 3)).eval()


def batch(count, size, seed=0):
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return images.contiguous(memory_format=torch.channels_last)


def changed(network, names, seed=0):
    """The named tensors with other values; positive ones, like variances, stay positive."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if name in names:
            noise = torch.rand(tensor.shape, generator=generator)
            tensors[name] = torch.where(tensor == 0, noise / 10, tensor.detach() * (0.5 + noise))
    assert len(tensors) == len(names)
    return tensors


@torch.no_grad()
def assert_exact(split, network, size):
    """Equal bits for several batches and tensors, and a frontier that no suffix call changes."""
    for count in (1, 2, 7):
        images = batch(count, size, seed=count)
        frontier = split.prefix(images)
        kept = [tensor.clone() for tensor in frontier]
        assert all(len(tensor) == count for tensor in frontier)
        results = []
        for seed in (0, 1, 0):
            tensors = changed(network, split.names, seed)
            results.append(split.suffix(frontier, tensors))
            assert results[-1].isfinite().all()
            assert torch.equal(results[-1], functional_call(network, tensors, (images,)))
        assert torch.equal(results[0], results[2])
        assert not torch.equal(results[0], results[1])
        assert all(torch.equal(*pair) for pair in zip(frontier, kept, strict=True))


# --- real networks ----------------------------------------------------------------------------------------------------


def case(name, config, size, rule, shared, batchnorm="frozen", slow=False):
    return pytest.param(config, size, rule, shared, batchnorm, id=name, marks=[pytest.mark.slow] if slow else [])


def names(*patterns):
    return SubsetRule(names=list(patterns))


@pytest.mark.parametrize(
    ("config", "size", "rule", "shared", "batchnorm"),
    [
        case("resnet-norms", RESNET, 8, LAST_NORMS, 0.9),
        case("resnet-statistics", RESNET, 8, LAST_NORMS, 0.9, "included"),
        case("resnet-first", RESNET, 8, names("conv1.weight"), 0, slow=True),
        case("resnet-all", RESNET, 8, ALL, 0, "included", slow=True),
        case("timm-resnet-norms", TIMM_RESNET, 32, LAST_NORMS, 0.9, slow=True),
        case("convnext-norms", CONVNEXT, 32, LAST_NORMS, 0.9),
        case("convnext-block", CONVNEXT, 32, names("stages.3.blocks.1.*"), 0.8, slow=True),
        case("vit-norms", SMALL_VIT, 8, LAST_NORMS, 0.4),
        case("vit-qkv", SMALL_VIT, 8, names("blocks.1.attn.qkv.*", "head.*"), 0.4),
        case("vit-first", SMALL_VIT, 8, names("patch_embed.proj.*", "cls_token"), 0),
        case("deep-vit-qkv", VIT, 16, names("blocks.11.attn.qkv.*", "head.*"), 0.9, slow=True),
        case("convnet-norms", CONVNET, 8, LAST_NORMS, 0.5),
        case("convnet-statistics", CONVNET, 8, LAST_NORMS, 0.5, "included"),
        case("convnet-first", CONVNET, 8, names("layers.0.conv.weight"), 0),
        case("convnet-all", CONVNET, 8, ALL, 0, "included"),
        case("mlp-last", MLP, 8, names("5.*"), 0.9),
        case("mlp-all", MLP, 8, ALL, 0),
    ],
)
def test_exact(config, size, rule, shared, batchnorm):
    network = build(config, size)
    split = partition_network(network, resolve(rule, network, batchnorm).names, batch(3, size))
    assert split.reason is None
    assert split.shared == 0 if shared == 0 else shared < split.shared < 1
    assert_exact(split, network, size)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        pytest.param(CONVNET, 8, id="convnet"),
        pytest.param(SMALL_VIT, 8, id="vit"),
        pytest.param(TIMM_RESNET, 32, id="timm-resnet"),
        pytest.param(RESNET, 8, id="resnet", marks=pytest.mark.slow),
        pytest.param(CONVNEXT, 32, id="convnext", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_exact_for_random_subsets(config, size, seed):
    network = build(config, size)
    parameters = [name for name, _ in network.named_parameters()]
    chosen = random.Random(seed).sample(parameters[len(parameters) // 2 :], 4)  # the first half stays shared
    split = partition_network(network, chosen, batch(3, size))
    assert split.reason is None
    assert split.shared > 0.3
    assert_exact(split, network, size)


@pytest.mark.parametrize("config", [CONVNET, SMALL_VIT], ids=["convnet", "vit"])
def test_gradients(config):
    network = build(config, 8)
    chosen = resolve(LAST_NORMS, network).names
    split = partition_network(network, chosen, batch(3, 8))
    images, labels, gradients = batch(7, 8, seed=1), torch.arange(7), []
    for forward in (lambda t: split(images, t), lambda t: functional_call(network, t, (images,))):
        tensors = {name: tensor.requires_grad_() for name, tensor in changed(network, chosen).items()}
        loss = functional.cross_entropy(forward(tensors), labels)
        gradients.append(torch.autograd.grad(loss, list(tensors.values())))
    for ours, plain in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        assert (ours - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert not list(split.parameters())  # so that no gradient is computed for what is shared
    assert split.reason is None


@pytest.mark.parametrize(
    ("config", "rule"), [(CONVNET, LAST_NORMS), (SMALL_VIT, names("blocks.1.attn.qkv.*"))], ids=["convnet", "vit"]
)
@torch.no_grad()
def test_vmap_over_the_suffix(config, rule):
    network = build(config, 8)
    split = partition_network(network, resolve(rule, network).names, batch(3, 8))
    frontier = split.prefix(batch(7, 8))
    members = [changed(network, split.names, seed) for seed in range(3)]
    stacked = {name: torch.stack([member[name] for member in members]) for name in split.names}
    logits = torch.vmap(lambda tensors: split.suffix(frontier, tensors))(stacked)
    torch.testing.assert_close(logits, torch.stack([split.suffix(frontier, member) for member in members]))
    assert split.reason is None


def test_parts_move_whole():
    network = build(CONVNET, 8)
    split = partition_network(network, resolve(LAST_NORMS, network).names, batch(3, 8)).double()
    network.double()
    images, tensors = batch(2, 8).double(), changed(network, split.names)
    assert torch.equal(split(images, tensors), functional_call(network, tensors, (images,)))
    split.to("meta")  # where an operator refuses a tensor that was left behind
    assert split(images.to("meta"), {name: tensor.to("meta") for name, tensor in tensors.items()}).is_meta
    assert split.reason is None


def test_frontier_is_small_and_channels_last():
    network = build(RESNET, 16)
    split = partition_network(network, resolve(LAST_NORMS, network).names, batch(3, 16))
    frontier = split.prefix(batch(2, 16))  # of the last block, the first convolution's output and the shortcut
    assert [tuple(tensor.shape) for tensor in frontier] == [(2, 512, 2, 2)] * 2
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in frontier)


def test_other_tensors_are_refused():
    network = build(MLP, 8)
    split = partition_network(network, ["5.weight"], batch(3, 8))
    with pytest.raises(ValueError, match=r"5\.bias"):
        split(batch(2, 8), changed(network, ["5.weight", "5.bias"]))


# --- networks with a catch --------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Layers for networks of 48 inputs that are wired in a peculiar way."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(48, 16), nn.Linear(16, 16), nn.Linear(16, 10)
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.second.weight
        self.scale = nn.Parameter(torch.rand(4, 4))
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("shift", torch.rand(16), persistent=False)
        self.register_buffer("calls", torch.zeros(()))


class InPlace(Small):
    def forward(self, images):
        hidden = self.first(images.flatten(1))
        scaled = self.second(hidden)
        return self.head(hidden.add_(1).relu_() + scaled)


class Constants(Small):
    """The suffix reads tensors, shared and created, and numbers that do not depend on the images."""

    def forward(self, images):
        hidden = self.second(self.first(images.flatten(1)))
        hidden = hidden * self.scale.reshape(1, 16) + self.shift + torch.arange(16, device=images.device)
        return self.head(hidden + torch.ones(images.shape[0], 16) * torch.tensor([0.5] * 16))


class Folded(Small):
    """The batch is folded with another dimension where the suffix reads it."""

    def forward(self, images):
        hidden = self.first(images.flatten(1)).reshape(images.shape[0] * 4, 4) @ self.scale
        return self.head(self.second((hidden * self.shift[:4]).reshape(images.shape[0], -1)))


class Twice(Small):
    def forward(self, images):
        hidden = self.second(torch.relu(self.first(images.flatten(1))))
        return self.head(self.dropout(self.second(torch.relu(hidden))))


class Tied(Small):
    def forward(self, images):
        return self.head(self.tied(torch.relu(self.second(self.first(images.flatten(1))))))


@pytest.mark.parametrize(
    ("network", "chosen"),
    [
        (InPlace(), ["second.weight"]),
        (InPlace(), ["head.bias"]),
        (Constants(), ["second.bias"]),
        (Constants(), ["shift"]),
        (Constants(), ["scale", "head.weight"]),
        (Folded(), ["shift"]),
        (Folded(), ["second.weight"]),
        (Twice(), ["second.weight"]),
        (Tied(), ["second.weight"]),
        (Tied(), ["tied.bias"]),
        (Twice(), ["head.weight", "calls", "scale"]),  # of which the forward pass reads one
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "-".join(value),
)
def test_exact_for_peculiar_networks(network, chosen):
    split = partition_network(network.eval(), chosen, batch(3, 4))
    assert split.reason is None
    assert split.shared > 0.5  # the first layer's 48 x 16 of at most 48 x 16 + 2 x 16 x 16 + 16 x 10
    assert_exact(split, network, 4)


class TwoNames(nn.Module):
    """Has modules under two names: `second` is `first`, with running statistics, and `conv2` is `conv`."""

    def __init__(self, branches=False):
        super().__init__()
        self.conv, self.first, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 10)
        self.conv2, self.second, self.branches = self.conv, self.first, branches
        nn.init.uniform_(self.first.running_var, 0.5, 2)
        nn.init.normal_(self.first.running_mean)

    def forward(self, images):
        if self.branches and images.mean() > 0:
            return self.fc(self.first(self.conv(images)).mean((2, 3)))
        hidden = self.second(self.conv2(self.first(self.conv(images)).relu()))
        return self.fc(hidden.mean((2, 3)))


@pytest.mark.parametrize(
    "chosen", [["conv.weight"], ["first.weight", "first.running_var"], ["fc.weight"]], ids="-".join
)
@pytest.mark.parametrize("branches", [False, True])
@torch.no_grad()
def test_modules_of_two_names_stay_as_they_are(chosen, branches):
    network, images = TwoNames(branches).eval(), batch(5, 4) - 10
    before, own = network(images), {name: id(tensor) for name, tensor in network.state_dict(keep_vars=True).items()}
    split = partition_network(network, chosen, images)
    assert bool(split.reason) == branches
    assert torch.equal(network(images), before)
    tensors = [changed(network, chosen, seed) for seed in (0, 1)]
    expected = []
    for changes in tensors:
        other = copy.deepcopy(network)
        own_state = other.state_dict(keep_vars=True)
        for name, tensor in changes.items():
            own_state[name].copy_(tensor)
        expected.append(other(images))
        torch.testing.assert_close(split(images, changes), expected[-1])
    stacked = {name: torch.stack([own[name] for own in tensors]) for name in chosen}
    if not branches:  # which vmap cannot
        together = torch.vmap(split.suffix, in_dims=(None, 0))(split.prefix(images), stacked)
        torch.testing.assert_close(together, torch.stack(expected))
    whole, dims = _Whole(TwoNames(), chosen).eval(), (None, *(0 for _ in chosen))
    together = torch.vmap(whole, in_dims=dims)(images, *stacked.values())
    assert together.shape == (2, 5, 10)
    assert own == {name: id(tensor) for name, tensor in network.state_dict(keep_vars=True).items()}


class Branching(Small):
    def forward(self, images):
        return self.head(self.first((images if images.mean() > 0 else -images).flatten(1)))


class Random(Small):
    def forward(self, images):
        return self.head(functional.dropout(self.first(images.flatten(1))))  # which is in training mode by default


class Counting(Small):
    def forward(self, images):
        self.calls += 1
        return self.head(self.first(images.flatten(1))) * self.calls.clamp(max=1)


class Traced(Small):
    """Computes something else while it is traced."""

    def forward(self, images):
        return self.head(self.first(images.flatten(1))) * (2 if torch.compiler.is_exporting() else 1)


class WithoutGradient(Small):
    """Would get other gradients, as tracing forgets where they are switched off."""

    def forward(self, images):
        with torch.no_grad():
            hidden = self.first(images.flatten(1))
        return self.head(hidden)


class OneSize(Small):
    def forward(self, images):
        return torch.stack([self.head(self.first(image.flatten())) for image in images])


@pytest.mark.parametrize(
    ("network", "chosen", "reason"),
    [
        (Branching(), ["head.weight"], "cannot trace the network: Could not guard on data-dependent"),
        (Random(), ["head.weight"], "two forward passes of the network"),
        (Counting(), ["head.weight"], "changes its images or buffers"),
        (Traced(), ["head.weight"], "do not compute what the whole does"),
        (WithoutGradient(), ["head.weight"], "switches gradients"),
        (OneSize(), ["head.weight"], "fixes the batch size"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_falls_back(network, chosen, reason):
    images = batch(3, 4)
    split = partition_network(network.eval(), chosen, images)
    assert reason in split.reason
    assert split.shared == 0
    assert split.prefix(images)[0] is images
    tensors = changed(network, chosen)
    torch.manual_seed(0)
    logits = split(images, tensors)
    torch.manual_seed(0)
    assert torch.equal(logits, functional_call(network, tensors, (images,)))


def test_falls_back_in_training_mode():
    network = build(CONVNET, 8)
    network.layers[2].bn.train()
    assert "training mode" in partition_network(network, ["fc.weight"], batch(3, 8)).reason


def test_falls_back_for_unknown_tensors():
    assert "no tensor fc.wait" in partition_network(build(CONVNET, 8), ["fc.wait"], batch(3, 8)).reason


class OtherKernels(TorchDispatchMode):
    """Products whose sums are added up in another order at each call, as on a GPU, before they are rounded."""

    PRODUCTS = (aten.convolution.default, aten.addmm.default, aten.mm.default, aten.bmm.default)

    def __init__(self):
        super().__init__()
        self.random = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in self.PRODUCTS:
            return func(*args, **(kwargs or {}))
        exact = func(*[a.float() if isinstance(a, torch.Tensor) else a for a in args], **(kwargs or {}))
        noise = torch.randn(exact.shape, generator=self.random)
        return (exact + 3e-7 * exact.square().mean().sqrt() * noise).to(args[0].dtype)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("config", "size"), [(RESNET, 32), (CONVNEXT, 32), (SMALL_VIT, 16), (CONVNET, 32)])
def test_kernels_that_round_otherwise_are_no_reason_to_run_whole(monkeypatch, config, size, precision):
    def verify(*arguments):
        with OtherKernels():
            _verify(*arguments)

    monkeypatch.setattr("pdiff_ray.networks.partition._verify", verify)
    network = build(config, size)
    names = resolve(LAST_NORMS, network).names
    with autocast(torch.device("cpu"), precision):
        assert partition_network(network, names, batch(4, size)).reason is None


def test_logits_that_are_all_zero_show_nothing():
    network = build(CONVNET, 8)
    nn.init.zeros_(network.fc.weight)
    nn.init.zeros_(network.fc.bias)
    assert "all zero" in partition_network(network, resolve(LAST_NORMS, network).names, batch(4, 8)).reason
