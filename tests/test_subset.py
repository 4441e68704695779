"""The subsets that rules choose from networks, flattened and back."""

import pytest
import torch
from test_networks import MNIST, ROOT, build, num_parameters
from timm import layers
from timm.layers.grn import GlobalResponseNorm
from torch import nn

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config import sweep
from pdiff_ray.config.schema import SubsetRule
from pdiff_ray.data.sources import DataInfo, describe
from pdiff_ray.networks.build import build_network
from pdiff_ray.networks.subset import RULES, Subset, main_path_norm_layers, norm_layers, resolve


def rule(**fields):
    return SubsetRule(**fields)


def layers_of(subset):
    return list(dict.fromkeys(name.rpartition(".")[0] for name in subset.names))


@pytest.mark.parametrize(
    ("start_stop", "layers"),
    [
        ((16, 18), ["layer4.1.bn1", "layer4.1.bn2"]),
        ((14, 16), ["layer4.0.bn1", "layer4.0.bn2"]),
        ((10, 14), ["layer3.0.bn1", "layer3.0.bn2", "layer3.1.bn1", "layer3.1.bn2"]),
    ],
)
def test_layers_of_the_paper(resnet18, start_stop, layers):
    subset = resolve(rule(norm_layers=start_stop), resnet18)
    assert layers_of(subset) == layers
    assert subset.size == {16: 2048, 14: 2048, 10: 2048}[start_stop[0]]


def test_shortcuts_are_off_the_main_path(resnet18):
    assert len(norm_layers(resnet18)) == 20
    assert len(main_path_norm_layers(resnet18)) == 17
    assert layers_of(resolve(rule(last_norm_layers=3), resnet18)) == [
        "layer4.0.downsample.1",
        "layer4.1.bn1",
        "layer4.1.bn2",
    ]


def test_all_parameters(resnet18):
    subset = resolve(rule(all=True), resnet18)
    assert subset.names == [name for name, _ in resnet18.named_parameters()]
    assert subset.size == num_parameters(resnet18)


@pytest.mark.parametrize(
    ("name", "args", "size"),
    [
        ("vit_tiny_patch16_224", {"depth": 2, "img_size": 32}, 768),
        ("convnext_tiny", {"depths": [1, 1, 1, 1]}, 3072),
    ],
)
def test_last_two_norm_layers_of_transformers(name, args, size):
    network = build(name, args=args)
    subset = resolve(rule(last_norm_layers=2), network)
    assert subset.size == size
    assert len(layers_of(subset)) == 2
    assert layers_of(subset)[-1] in ("norm", "head.norm")


LARGE = {  # of the paper's tables, without weights: the published sizes of their subset
    "resnet18": (2048, ["layer4.1.bn1", "layer4.1.bn2"]),
    "resnet50": (5120, ["layer4.2.bn2", "layer4.2.bn3"]),
    "vit_tiny_patch16_224": (768, ["blocks.11.norm2", "norm"]),
    "vit_base_patch16_224": (3072, ["blocks.11.norm2", "norm"]),
    "convnext_tiny": (3072, ["stages.3.blocks.2.norm", "head.norm"]),
    "convnext_base": (4096, ["stages.3.blocks.2.norm", "head.norm"]),
}


def test_last_two_norm_layers_of_the_papers_large_networks():
    file = sweep.load(ROOT / "sweeps/paper_table1.yaml")
    cells, seen = [file.vary(assignment) for assignment in file.sweep.grid()], set()
    assert len(cells) == 48
    assert {cell.network.name for cell in cells} == set(LARGE)
    for cell in cells:
        info, name = describe(cell.data), cell.network.name
        assert (cell.zoo.subset, info.channels, info.image_size) == (rule(last_norm_layers=2), 3, 224)
        if name in seen:  # from here on, data sets differ in the number of classes alone
            continue
        seen.add(name)
        with torch.device("meta"):
            network = build_network(cell.network.model_copy(update={"pretrained": False}), info)
            subset = resolve(cell.zoo.subset, network, images=torch.zeros(1, 3, 224, 224))
        assert (subset.size, layers_of(subset)) == LARGE[name]


class Ordered(nn.Module):
    """Normalization layers that are reached in another order than they are defined, twice, side by side, or never."""

    def __init__(self):
        super().__init__()
        self.last, self.left, self.right, self.first, self.unused = (nn.BatchNorm2d(3) for _ in range(5))
        self.functional, self.head = nn.LayerNorm(3), nn.Linear(3, 10)

    def forward(self, images):
        first = self.first(images)
        parts = torch.zeros_like(images)
        parts[:, :1], parts[:, 1:] = self.right(first)[:, :1], self.left(first)[:, 1:]  # views of what is no layer's
        hidden = self.last(self.last(parts.relu())).mean((2, 3))
        weight, bias = self.functional.weight.double().float(), self.functional.bias
        return self.head(nn.functional.layer_norm(hidden, (3,), weight, bias))


def test_norm_layers_stand_as_the_forward_pass_reaches_them():
    network, images = Ordered(), torch.rand(2, 3, 4, 4)
    network.left.eval()
    modes, state = [m.training for m in network.modules()], {k: v.clone() for k, v in network.state_dict().items()}
    assert norm_layers(network, images) == {
        "first": [], "right": ["left"], "left": ["right"], "last": [], "functional": []
    }  # fmt: skip
    assert list(norm_layers(network)) == ["last", "left", "right", "first", "unused", "functional"]
    assert layers_of(resolve(rule(last_norm_layers=3), network, images=images)) == ["last", "left", "functional"]
    assert layers_of(resolve(rule(norm_layers=(1, 3)), network, images=images)) == ["right", "first"]
    assert modes == [m.training for m in network.modules()]
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_the_order_is_the_same_without_values():
    network = build("fasternet_t0", source="timm")
    layers = norm_layers(network, torch.rand(1, 3, 32, 32))
    with torch.device("meta"):
        assert norm_layers(network.to("meta"), torch.zeros(1, 3, 32, 32)) == layers
    assert list(layers)[-3:] == ["stages.3.downsample.norm", "stages.3.blocks.0.mlp.1", "stages.3.blocks.1.mlp.1"]
    assert list(norm_layers(network))[-1] == "stages.3.downsample.norm"  # which is defined last


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("convnet3", 32),
        ("resnet18", 32),
        ("vit_tiny_patch16_224", 224),
        ("vit_base_patch16_224", 224),
        ("convnext_tiny", 64),
        ("convnext_base", 64),
    ],
)
def test_shipped_experiments_keep_their_layers(name, size):
    with torch.device("meta"):
        network = build(name, DataInfo(3, size, 10, (0.5,) * 3, (0.5,) * 3))
        layers = list(norm_layers(network, torch.zeros(1, 3, size, size)))
    kinds = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    assert layers == [name for name, module in network.named_modules() if isinstance(module, kinds)]


def test_a_pass_that_fails_is_no_traceback(resnet18):
    with pytest.raises(
        ConfigError, match=r"last_norm_layers: the order of layers is unknown, as a forward pass fails: expected 2D"
    ):
        resolve(rule(last_norm_layers=2), nn.Sequential(nn.BatchNorm1d(3)), images=torch.zeros(2, 3, 4, 4))


class OwnNorm(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(shape))


class NormedConv(OwnNorm):
    """A layer of weights, not a normalization."""


@pytest.mark.parametrize(
    ("layer", "parameters"),
    [
        (nn.InstanceNorm2d(4, affine=True), ["weight", "bias"]),
        (nn.InstanceNorm2d(4), []),
        (nn.SyncBatchNorm(4), ["weight", "bias"]),
        (layers.RmsNorm(4), ["weight"]),
        (layers.RmsNorm2d(4), ["weight"]),
        (layers.RmsNormFp32(4), ["weight"]),
        (layers.RmsNormAct2d(4), ["weight"]),
        (layers.SimpleNorm2d(4), ["weight"]),
        (layers.LayerNorm2d(4), ["weight", "bias"]),
        (layers.EvoNorm2dS0a(32), ["weight", "bias", "v"]),
        (layers.EvoNorm2dB0(4), ["weight", "bias", "v"]),
        (layers.FilterResponseNormTlu2d(4), ["weight", "bias", "tau"]),
        (GlobalResponseNorm(4), ["weight", "bias"]),
        (OwnNorm(1, 4, 1, 1), ["gain"]),
        (NormedConv(4, 3, 3, 3), []),
        (layers.ConvNormAct(4, 4).conv, []),
        (layers.NormMlpClassifierHead(4, 10, norm_layer=nn.Identity), []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_every_kind_of_normalization_layer_counts(layer, parameters):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), layer)
    assert list(norm_layers(network)) == ["1"] * bool(parameters)
    if parameters:
        chosen = resolve(rule(last_norm_layers=1), network).names
        assert chosen == [f"1.{name}" for name in parameters]


def test_norm_layers_without_weights_do_not_count():
    network = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.GroupNorm(1, 4), nn.RMSNorm(4))
    assert list(norm_layers(network)) == ["0", "2", "3"]
    assert resolve(rule(last_norm_layers=2), network).names == ["2.weight", "2.bias", "3.weight"]


def test_globs_in_order_of_the_network(resnet18):
    assert resolve(rule(names=("fc.*", "layer1.0.bn?.weight")), resnet18).names == [
        "layer1.0.bn1.weight",
        "layer1.0.bn2.weight",
        "fc.weight",
        "fc.bias",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"names": ("fc.*", "fc.wieght")}, r"'fc.wieght' matches no parameter .*did you mean 'fc\.weight'"),
        ({"names": ("zzz*",)}, r"'zzz\*' matches no parameter of the network; it has conv1\.weight, bn1\.weight, .*fc"),
        (
            {"last_norm_layers": 21},
            r"zoo\.subset\.last_norm_layers: 21 goes beyond the network's 20 norm.*layer4\.1\.bn2",
        ),
        ({"norm_layers": (16, 19)}, r"norm_layers: \[16, 19\] goes beyond the network's 17 .* of the main path: bn1"),
    ],
    ids=["near name", "nothing near", "too many", "too far"],
)
def test_rules_that_match_nothing(resnet18, fields, message):
    with pytest.raises(ConfigError, match=message):
        resolve(rule(**fields), resnet18)


def biases(network):
    return [name for name, _ in network.named_parameters() if name.endswith("bias")]


def test_rule_of_the_users_own(resnet18):
    subset = resolve(rule(function=f"{__name__}:biases"), resnet18)
    assert subset.names == biases(resnet18)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["fc.wieght"], r"zoo\.subset\.function: 'fc.wieght' is no .*did you mean 'fc\.weight'"),
        ([], "chooses no param"),
    ],
)
def test_rule_of_the_users_own_that_chooses_nothing(monkeypatch, resnet18, names, message):
    monkeypatch.setitem(globals(), "chosen", lambda network: names)
    with pytest.raises(ConfigError, match=message):
        resolve(rule(function=f"{__name__}:chosen"), resnet18)


def test_every_rule_of_the_schema_has_its_function():
    assert set(RULES) == set(SubsetRule.model_fields)


def test_network_without_norm_layers():
    with pytest.raises(ConfigError, match="has no normalization layer; choose by names: instead"):
        resolve(rule(last_norm_layers=1), build("s1", MNIST))


def test_statistics_belong_to_the_subset_when_included():
    network = build("convnet", args={"widths": [4, 8]})
    subset = resolve(rule(last_norm_layers=1), network, "included")
    assert [(entry.name, entry.kind) for entry in subset.entries] == [
        ("layers.1.bn.weight", "parameter"),
        ("layers.1.bn.bias", "parameter"),
        ("layers.1.bn.running_mean", "buffer"),
        ("layers.1.bn.running_var", "buffer"),
    ]
    for policy in ("frozen", "recalibrated"):
        assert resolve(rule(last_norm_layers=1), network, policy).names == subset.names[:2]


def test_all_and_included_is_all_that_evaluation_needs():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False))
    subset = resolve(rule(all=True), network, "included")
    assert set(subset.names) == {name for name in network.state_dict() if "num_batches" not in name}


# --- flattening -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subset(resnet18):
    return resolve(rule(names=("bn1.*", "layer1.0.conv1.weight", "fc.*")), resnet18, "included")


def test_flatten_and_unflatten(resnet18, subset):
    state = resnet18.state_dict()
    vector = subset.flatten(state)
    assert vector.shape == (subset.size,)
    assert vector.dtype == torch.float32
    tensors = subset.unflatten(vector)
    assert list(tensors) == subset.names
    assert all(torch.equal(tensors[name], state[name]) for name in subset.names)
    assert [entry.offset for entry in subset.entries] == [
        sum(entry.size for entry in subset.entries[:index]) for index in range(len(subset.entries))
    ]


def test_vectors_are_unflattened_in_batches(subset):
    vectors = torch.randn(2, 3, subset.size).abs()
    tensors = subset.unflatten(vectors)
    assert tensors["fc.weight"].shape == (2, 3, 10, 512)
    assert torch.equal(subset.flatten({name: tensor[1, 2] for name, tensor in tensors.items()}), vectors[1, 2])


def test_negative_variance_is_clamped(subset):
    tensors = subset.unflatten(torch.full((subset.size,), -1.0))
    assert tensors["bn1.running_var"].eq(0).all()
    assert tensors["bn1.running_mean"].eq(-1).all()


def test_json_round_trip(subset):
    assert Subset.from_json(subset.to_json()) == subset


def test_tensors_that_do_not_fit(resnet18, subset):
    state = resnet18.state_dict()
    with pytest.raises(ConfigError, match=r"fc\.weight: has shape \(3, 3\), the subset wants \(10, 512\)"):
        subset.flatten({**state, "fc.weight": torch.zeros(3, 3)})
    state["fc.wieght"] = state.pop("fc.weight")
    with pytest.raises(ConfigError, match=r"fc\.weight: missing from the tensors; did you mean 'fc\.wieght'"):
        subset.flatten(state)
    with pytest.raises(ConfigError, match=f"vectors have 7 values, the subset has {subset.size}"):
        subset.unflatten(torch.zeros(7))
