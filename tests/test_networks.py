"""Networks by name: the paper's, the libraries' and the user's own."""

from pathlib import Path

import pytest
import torch
from torch import nn

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config.schema import Network
from pdiff_ray.data.sources import DATASETS, DataInfo
from pdiff_ray.networks.build import _new_head, build_network, check_network, load_tensors

ROOT = Path(__file__).parents[1]
MNIST, CIFAR, DIGITS = DATASETS["mnist"], DATASETS["cifar10"], DATASETS["digits"]


def build(name, info=CIFAR, seed=0, **settings):
    return build_network(Network(name=name, **settings), info, seed)


def logits(network, info=CIFAR):
    images = torch.randn(2, info.channels, info.image_size, info.image_size)
    return network.eval()(images.contiguous(memory_format=torch.channels_last))


def num_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


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
        ("resnet20", CIFAR, 272_474),
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
            r"^network\.name: .*fails_without_a_word \(custom\) cannot be built: IndexError",
        ),
        (f"{__name__}:fails_on_a_file", r"^network\.name: .*fails_on_a_file \(custom\) cannot be built: no such file"),
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
        ({"name": "s4:s5:s6"}, "cannot be imported"),
        ({"name": ".s4:build"}, "cannot be imported"),
        (
            {"name": "resnet18", "source": "timm", "args": {"checkpoint_path": "net.pth"}},
            r"network\.args\.checkpoint_path: net\.pth is a file, whose content is no part of the keys",
        ),
        (
            {"name": "resnet18", "source": "timm", "args": {"pretrained_cfg": {"file": "net.pth"}}},
            r"network\.args\.pretrained_cfg\.file: net\.pth is a file",
        ),
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
