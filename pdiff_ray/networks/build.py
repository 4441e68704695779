"""Networks by name: timm's, torchvision's, the paper's small ones, and the user's own.

Shapes: B images of a batch, C channels, S the edge in pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from pdiff_ray.common.errors import ConfigError, did_you_mean
from pdiff_ray.common.registry import Registry
from pdiff_ray.common.seeds import derive_seed
from pdiff_ray.config.schema import Network
from pdiff_ray.data.sources import DataInfo


class MLP(nn.Sequential):
    """A fully connected ReLU network of flattened images."""

    def __init__(self, in_channels: int, image_size: int, num_classes: int, hidden: Sequence[int]) -> None:
        widths = [in_channels * image_size**2, *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        super().__init__(*layers, nn.Linear(widths[-1], num_classes))


class ConvNet(nn.Module):
    """3 x 3 convolutions with BatchNorm and ReLU, halved between them where the image allows, then average pooling."""

    def __init__(
        self, in_channels: int, image_size: int, num_classes: int, widths: Sequence[int] = (32, 64, 128)
    ) -> None:
        super().__init__()
        channels, size = in_channels, image_size
        self.layers = nn.ModuleList()
        for index, width in enumerate(widths):
            halved = index < len(widths) - 1 and size >= 4
            layer = {
                "conv": nn.Conv2d(channels, width, 3, padding=1, bias=False),
                "bn": nn.BatchNorm2d(width),
                "relu": nn.ReLU(),
                "pool": nn.MaxPool2d(2) if halved else nn.Identity(),
            }
            self.layers.append(nn.Sequential(OrderedDict(layer)))
            channels, size = width, size // 2 if halved else size
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        for layer in self.layers:
            images = layer(images)
        return self.fc(images.mean((2, 3)))


# The paper calls S-1 to S-3 and ConvNet-3 networks of 25 k to 155 k parameters and leaves their sizes open. With
# MNIST's 784 inputs these have 25,450, 55,050 and 152,970; the ConvNet-3 has 94,762 with three input channels and 10
# classes.
NETWORKS: Registry[Callable[..., nn.Module]] = Registry(
    "network of the paper",
    {
        "s1": partial(MLP, hidden=[32]),
        "s2": partial(MLP, hidden=[64, 64]),
        "s3": partial(MLP, hidden=[160, 160]),
        "convnet3": partial(ConvNet, widths=(32, 64, 128)),
        "convnet": ConvNet,
    },
)


def build_network(config: Network, info: DataInfo, *seed: int | str) -> nn.Module:
    """Builds a new network on the CPU, initialised from `seed`, mapping (B, C, S, S) to logits (B, num_classes).

    Raises:
        ConfigError: unknown name, arguments that its constructor refuses, or data that it cannot take.
    """
    source = _source(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("network", *seed))
        try:
            network = SOURCES[source](config, info)
        except ConfigError:
            raise
        except (TypeError, ValueError, KeyError, RuntimeError, AssertionError) as error:
            raise ConfigError(f"network: {config.name} ({source}) cannot be built: {error}") from None
        except OSError as error:  # what hubs raise without a network
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"network.pretrained: the weights of {config.name} could not be fetched ({reason}); fill the hub's "
                "cache on a machine with internet access, or set it to false"
            ) from None
        if config.cifar_stem:
            _cifar_stem(network, config.name)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def check_network(config: Network, info: DataInfo) -> nn.Module:
    """Builds a network that has taken two blank images in training mode, as its first step will.

    Raises:
        ConfigError: it cannot be built, or cannot take the data.
    """
    network = build_network(config.model_copy(update={"pretrained": False}), info)
    images = torch.zeros(2, info.channels, info.image_size, info.image_size)
    try:
        logits = network.train()(images.contiguous(memory_format=torch.channels_last))
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if found != (2, info.num_classes):
            raise ValueError(f"it returns {found}, not logits of shape (2, {info.num_classes})")
    except Exception as error:  # the network's own code
        size, reason = info.image_size, str(error).partition("\n")[0]
        raise ConfigError(
            f"network.name: {config.name} cannot take images of {info.channels} x {size} x {size} ({reason}); set "
            "data.image_size, network.args or another network"
        ) from None
    return network


def _source(config: Network) -> str:
    if config.source != "auto":
        return config.source
    if ":" in config.name:
        return "custom"
    if config.name in NETWORKS:
        return "paper"
    import timm

    if timm.is_model(config.name):
        return "timm"
    from torchvision.models import list_models

    if config.name in list_models():
        return "torchvision"
    near = did_you_mean(config.name, [*NETWORKS, *timm.list_models(), *list_models()])
    raise ConfigError(f"network.name: neither the paper's, timm nor torchvision have a network {config.name!r}{near}")


def _plain(config: Network, info: DataInfo) -> nn.Module:
    """Builds one of the paper's networks, or one of the user's own."""
    try:
        build = NETWORKS[config.name]
    except ConfigError as error:
        raise ConfigError(f"network.name: {error}") from None
    network = build(in_channels=info.channels, image_size=info.image_size, num_classes=info.num_classes, **config.args)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"network.name: {config.name} returned {type(network).__name__}, not a torch.nn.Module")
    return network


def _timm(config: Network, info: DataInfo) -> nn.Module:
    import timm

    if not timm.is_model(config.name):
        raise ConfigError(f"network.name: timm has no {config.name!r}{did_you_mean(config.name, timm.list_models())}")
    kwargs = dict(config.args)
    # Only networks with position embeddings have, and only their constructors take, an image size.
    if "img_size" not in kwargs and config.name.startswith(("vit_", "deit", "swin", "beit", "mixer", "eva")):
        kwargs["img_size"] = info.image_size
    return timm.create_model(
        config.name, pretrained=config.pretrained, num_classes=info.num_classes, in_chans=info.channels, **kwargs
    )


def _torchvision(config: Network, info: DataInfo) -> nn.Module:
    from torchvision import models

    if config.name not in (known := models.list_models()):
        raise ConfigError(f"network.name: torchvision has no {config.name!r}{did_you_mean(config.name, known)}")
    if info.channels != 3:
        raise ConfigError(f"network.name: torchvision's {config.name} takes 3 channels; set data.channels: 3")
    if not config.pretrained:
        return models.get_model(config.name, num_classes=info.num_classes, **config.args)
    network = models.get_model(config.name, weights="DEFAULT", **config.args)
    name, head = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    if head.out_features != info.num_classes:
        network.set_submodule(name, nn.Linear(head.in_features, info.num_classes))
    return network


SOURCES: Registry[Callable[[Network, DataInfo], nn.Module]] = Registry(
    "source of networks",
    {"paper": _plain, "timm": _timm, "torchvision": _torchvision, "custom": _plain},
    also=["auto"],
)


def _cifar_stem(network: nn.Module, name: str) -> None:
    conv, pool = getattr(network, "conv1", None), getattr(network, "maxpool", None)
    if not isinstance(conv, nn.Conv2d) or pool is None:
        raise ConfigError(f"network.cifar_stem: {name} is no ResNet with conv1 and maxpool; set it to false")
    network.conv1 = nn.Conv2d(conv.in_channels, conv.out_channels, 3, stride=1, padding=1, bias=False)
    network.maxpool = nn.Identity()
