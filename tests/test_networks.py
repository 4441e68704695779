"""Networks by name, and the subsets that rules choose from them."""

import pytest
import torch
from torch import nn

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config.schema import Network, SubsetRule
from pdiff_ray.data.sources import DATASETS, DataInfo
from pdiff_ray.networks.build import build_network
from pdiff_ray.networks.subset import RULES, Subset, main_path_norm_layers, norm_layers, resolve

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
    [("s1", MNIST, 25_450), ("s2", MNIST, 55_050), ("s3", MNIST, 152_970), ("convnet3", CIFAR, 94_762)],
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


def test_norm_layers_without_weights_do_not_count():
    network = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.GroupNorm(1, 4), nn.RMSNorm(4))
    assert norm_layers(network) == ["0", "2", "3"]
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
