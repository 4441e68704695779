"""Networks by name, and the subsets that rules choose from them."""

from pathlib import Path

import pytest
import torch
from timm import layers
from timm.layers.grn import GlobalResponseNorm
from torch import nn

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config import sweep
from pdiff_ray.config.schema import Network, SubsetRule
from pdiff_ray.data.sources import DATASETS, DataInfo, describe
from pdiff_ray.networks.build import _new_head, build_network, check_network, load_tensors
from pdiff_ray.networks.subset import RULES, Subset, main_path_norm_layers, norm_layers, resolve

ROOT = Path(__file__).parents[1]
MNIST, CIFAR, DIGITS = DATASETS["mnist"], DATASETS["cifar10"], DATASETS["digits"]


def build(name, info=CIFAR, seed=0, **settings):
    return build_network(Network(name=name, **settings), info, seed)


def logits(network, info=CIFAR):
    images = torch.randn(2, info.channels, info.image_size, info.image_size)
    return network.eval()(images.contiguous(memory_format=torch.channels_last))


def num_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.fixture(scope="module")
def resnet18():
    return build("resnet18", source="torchvision")


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "info", "count"),
    [
        ("s1", MNIST, 25_450),
        ("s2", MNIST, 55_050),
        ("s3", MNIST, 152_970),
        ("convnet3", CIFAR, 94_762),
        ("convnet_mini", CIFAR, 24_262),  # from here on as published
        ("mlp_mini", CIFAR, 66_970),
        ("resnet_mini", CIFAR, 25_138),
        ("vit_mini", CIFAR, 80_714),
        ("convnext_mini", CIFAR, 74_970),
    ],
)
def test_paper_networks(name, info, count):
    network = build(name, info)
    assert num_parameters(network) == count
    assert logits(network, info).shape == (2, 10)


def test_mlp_reads_pixels_in_one_order_whatever_the_memory_format():
    network = build("s1")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(network(images), network(images.contiguous(memory_format=torch.channels_last)))


def test_convnet_takes_its_arguments_and_small_images():
    network = build("convnet", DIGITS, args={"widths": [4, 8, 16, 16]})
    assert [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)] == [4, 8, 16, 16]
    assert logits(network, DIGITS).shape == (2, 10)


def test_timm_takes_channels_classes_and_size():
    small = DataInfo(1, 28, 7, (0.5,), (0.5,))
    assert logits(build("resnet10t", small), small).shape == (2, 7)
    vit = build("vit_tiny_patch16_224", DIGITS, args={"patch_size": 4, "depth": 1})
    assert vit.patch_embed.grid_size == (2, 2)
    assert logits(vit, DIGITS).shape == (2, 10)


def test_torchvision_takes_classes_and_asks_for_channels():
    network = build("squeezenet1_1", DataInfo(3, 32, 7, (0.5,) * 3, (0.5,) * 3), source="torchvision")
    assert logits(network).shape == (2, 7)
    with pytest.raises(ConfigError, match=r"squeezenet1_1 takes 3 channels; set data\.channels: 3"):
        build("squeezenet1_1", MNIST, source="torchvision")


def custom(in_channels, image_size, num_classes, width=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, width), nn.Linear(width, num_classes))


def no_network(**kwargs):
    return "a network"


def test_custom_function():
    network = build(f"{__name__}:custom", DIGITS, args={"width": 5})
    assert num_parameters(network) == 64 * 5 + 5 + 5 * 10 + 10


@pytest.mark.parametrize(
    ("name", "size", "settings"),
    [
        ("levit_128s", 64, {}),  # is told the size
        ("tnt_s_legacy_patch16_224", 32, {"args": {"depth": 1}}),
        ("crossvit_tiny_240", 64, {"args": {"depth": [[1, 1, 0]] * 3}}),  # takes it, and fails if told
        ("vit_b_32", 64, {"source": "torchvision"}),
        ("lambda_resnet26t", 64, {}),  # has parameters of five dimensions
        ("googlenet", 32, {"source": "torchvision", "args": {"init_weights": False}}),  # has further logits by default
    ],
)
def test_networks_take_images_of_the_datas_size(name, size, settings):
    info = DataInfo(3, size, 7, (0.5,) * 3, (0.5,) * 3)
    network = check_network(Network(name=name, **settings), info)
    assert logits(network, info).shape == (2, 7)


class Video(nn.Module):
    def __init__(self, num_classes, **_):
        super().__init__()
        self.conv, self.fc = nn.Conv3d(3, 4, 3, padding=1), nn.Linear(4, num_classes)

    def forward(self, clips):
        return self.fc(self.conv(clips).mean((2, 3, 4)))


class Frames(Video):
    """Takes images as videos of one frame."""

    def forward(self, images):
        return super().forward(images.unsqueeze(2))


def fails_without_a_word(**_):
    raise IndexError


def fails_on_a_file(**_):
    raise FileNotFoundError("no such file: weights.pth")


def asserts(**info):
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 1))
    network.register_forward_pre_hook(lambda module, images: 1 / 0 if info["num_classes"] == 7 else exec("assert 0"))
    return network


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{__name__}:Video", r"Video cannot take images of 3 x 32 x 32 \(it has convolutions of three dim.*videos"),
        (f"{__name__}:asserts", r"3 x 32 x 32 \(AssertionError\); set data\.image_size"),
        (
            f"{__name__}:fails_without_a_word",
            r"^network: .*fails_without_a_word \(custom\) cannot be built: IndexError",
        ),
        (f"{__name__}:fails_on_a_file", r"^network: .*fails_on_a_file \(custom\) cannot be built: no such file"),
        ("r3d_18", "videos"),
        ("fcn_resnet50", "OrderedDict, not logits"),
        ("fasterrcnn_mobilenet_v3_large_fpn", "targets should not be none"),
        ("halonet_h1", r"\(AssertionError\)"),
        ("hf-hub:timm/resnet18.a1_in1k", r"^network\.name: the configuration of hf-hub:timm/.* could not be fetched"),
        ("hf_hub:timm/resnet18.a1_in1k", r"fill the hub's cache .* or choose another network"),
        ("local-dir:weights", r"network\.name: local-dir:weights is a folder, whose content is no part of the keys"),
    ],
)
def test_networks_that_take_no_images_are_refused(monkeypatch, name, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=message):
        check_network(Network(name=name), CIFAR)


def test_five_dimensions_are_no_reason_to_refuse():
    network = check_network(Network(name=f"{__name__}:Frames"), CIFAR)
    assert logits(network).shape == (2, 10)


def test_only_weights_that_are_asked_for_are_missed(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match=r"^network\.pretrained: the weights of resnet10t could not .*set it to false"
    ):
        build("resnet10t", pretrained=True)


def test_a_name_of_timm_and_torchvision_is_suggested_once():
    with pytest.raises(ConfigError) as error:
        build("resnet118")
    assert str(error.value).count("'resnet18'") == 1


def test_what_is_stored_loads_into_networks_that_know_versions():
    network = build("mnasnet0_5", source="torchvision")
    stored = dict(network.state_dict())  # as files have it, without versions
    with pytest.raises(ValueError, match="version"):
        build("mnasnet0_5", source="torchvision", seed=1).load_state_dict(stored)
    fresh = build("mnasnet0_5", source="torchvision", seed=1)
    load_tensors(fresh, stored)
    assert all(torch.equal(value, stored[name]) for name, value in fresh.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        load_tensors(fresh, {"layers.0.weight": stored["layers.0.weight"]})


@pytest.mark.parametrize(("name", "head"), [("squeezenet1_1", "classifier.1"), ("resnet18", "fc")])
def test_pretrained_networks_get_a_head_for_the_data(name, head):
    network = build(name, source="torchvision")
    _new_head(network, 7)
    assert logits(network).shape == (2, 7)
    kept = network.get_submodule(head)
    _new_head(network, 7)
    assert network.get_submodule(head) is kept


@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_cifar_stem(resnet18, source):
    network = build("resnet18", source=source, cifar_stem=True)
    assert network.conv1.stride == (1, 1)
    assert isinstance(network.maxpool, nn.Identity)
    assert num_parameters(network) == num_parameters(resnet18) - 64 * 3 * (49 - 9)
    network.layer4.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))
    sizes = []
    assert logits(network).shape == (2, 10)
    assert sizes == [4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "resnet81"}, r"network\.name: .* have a network 'resnet81'; did you mean 'resnet18'"),
        ({"name": "resnet81", "source": "torchvision"}, "torchvision has no 'resnet81'; did you mean"),
        ({"name": "vit_tiny_patch61", "source": "timm"}, "timm has no 'vit_tiny_patch61'; did you mean"),
        (
            {"name": "s4", "source": "paper"},
            r"no network of the paper 's4' \(known: s1, s2, .*; did you mean 's",
        ),
        ({"name": "nowhere_to_be_found:build"}, "cannot be imported: No module named 'nowhere_to_be_found'"),
        ({"name": f"{__name__}:missing"}, "cannot be imported: .* 'missing'"),
        ({"name": f"{__name__}:no_network"}, r"returned str, not a torch\.nn\.Module"),
        ({"name": "convnet", "args": {"width": 4}}, r"convnet \(paper\) cannot be built: .*'width'"),
        ({"name": f"{__name__}:custom", "args": {"widht": 4}}, "cannot be built: .*'widht'"),
        ({"name": "s1", "cifar_stem": True}, r"network\.cifar_stem: s1 is no ResNet .*; set it to false"),
    ],
    ids=lambda value: value["name"].rpartition(":")[2] if isinstance(value, dict) else "",
)
def test_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_network(Network(**settings), DIGITS, 0)


def test_seed_determines_the_weights_and_nothing_else_is_seeded():
    torch.manual_seed(1)
    first = build("convnet3").state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)  # the global generator is left as it was
    again, other = build("convnet3").state_dict(), build("convnet3", seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


# --- which layers -----------------------------------------------------------------------------------------------------


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
