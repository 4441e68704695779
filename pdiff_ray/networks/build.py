"""Networks by name: timm's, torchvision's, the paper's small ones, and the user's own.

Shapes: B images of a batch, C channels, S the edge in pixels.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pdiff_ray.common.errors import ConfigError, did_you_mean, first_line
from pdiff_ray.common.registry import Registry
from pdiff_ray.common.seeds import derive_seed
from pdiff_ray.config.schema import Network
from pdiff_ray.data.sources import DataInfo
from pdiff_ray.networks.paper import NETWORKS

HUB, FOLDER = ("hf-hub:", "hf_hub:"), "local-dir:"  # what timm's names of networks elsewhere begin with
# What tells torchvision's networks of one image size which it is, by what their names begin with.
SIZES: dict[str, Callable[[int], dict[str, Any]]] = {
    "vit_": lambda size: {"image_size": size},
    "maxvit_": lambda size: {"input_size": (size, size)},
}
# Arguments of torchvision's networks without which they return more than logits in training.
NO_AUXILIARY = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}


def is_own(name: str) -> bool:
    """Returns whether a name is "module:attribute" of the user's own code."""
    return ":" in name and not name.startswith((*HUB, FOLDER))


def build_network(config: Network, info: DataInfo, *seed: int | str) -> nn.Module:
    """Builds a new network on the CPU, initialised from `seed`, mapping (B, C, S, S) to logits (B, num_classes).

    Raises:
        ConfigError: unknown name, arguments that its constructor refuses, or data that it cannot take.
    """
    source = _source(config)
    unbuilt = f"network.name: {config.name} ({source}) cannot be built"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("network", *seed))
        try:
            network = SOURCES[source](config, info)
        except ConfigError:
            raise
        except OSError as error:  # what hubs raise without a network
            hub = config.name.startswith(HUB)
            if not config.pretrained and not hub:
                raise ConfigError(f"{unbuilt}: {first_line(error)}; network.args has its arguments") from None
            field, what = ("network.name", "configuration") if hub else ("network.pretrained", "weights")
            raise ConfigError(
                f"{field}: the {what} of {config.name} could not be fetched ({first_line(error)}); fill the hub's "
                f"cache on a machine with internet access, or {'choose another network' if hub else 'set it to false'}"
            ) from None
        except Exception as error:  # constructors raise anything
            raise ConfigError(f"{unbuilt}: {first_line(error)}; network.args has its arguments") from None
        if config.cifar_stem:
            _cifar_stem(network, config.name)
    # Images are of four dimensions, and so are the tensors that lie in memory as they do.
    return network._apply(lambda t: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t)


def load_tensors(network: nn.Module, tensors: Mapping[str, Tensor], strict: bool = True) -> None:
    """Loads a state dict that has been stored: it gets back the versions of modules that files do not keep.

    Raises:
        RuntimeError: it does not fit the network.
    """
    state = OrderedDict(tensors)
    state._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
    network.load_state_dict(state, strict=strict)


def blank_images(info: DataInfo) -> Tensor:
    """Returns images (2, C, S, S) of zeros, as networks get them: BatchNorm trains on no fewer."""
    images = torch.zeros(2, info.channels, info.image_size, info.image_size)
    return images.contiguous(memory_format=torch.channels_last)


def check_network(config: Network, info: DataInfo) -> nn.Module:
    """Builds a network that has taken two blank images in training mode, as its first step will.

    Raises:
        ConfigError: it cannot be built, or cannot take the data.
    """
    network = build_network(config.model_copy(update={"pretrained": False}), info)
    try:
        logits = network.train()(blank_images(info))
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if found != (2, info.num_classes):
            raise ValueError(f"it returns {found}, not logits of shape (2, {info.num_classes})")
    except Exception as error:  # the network's own code
        size, reason = info.image_size, first_line(error)
        if any(parameter.ndim == 5 for parameter in network.parameters()):
            reason = f"it has convolutions of three dimensions, as networks of videos do: {reason}"
        raise ConfigError(
            f"network.name: {config.name} cannot take images of {info.channels} x {size} x {size} ({reason}); set "
            "data.image_size, network.args or another network"
        ) from None
    return network


def _source(config: Network) -> str:
    if config.source != "auto":
        return config.source
    if is_own(config.name):
        return "custom"
    if ":" in config.name:
        return "timm"
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

    if config.name.startswith(FOLDER):
        raise ConfigError(
            f"network.name: {config.name} is a folder, whose content is no part of the keys of results; give the name "
            "of its architecture, or module:function of a function that builds and loads it"
        )
    given = {"checkpoint_path": config.args.get("checkpoint_path")}
    for name in ("pretrained_cfg", "pretrained_cfg_overlay"):
        if isinstance(described := config.args.get(name), dict):
            given[f"{name}.file"] = described.get("file")
    if file := next((name for name, value in given.items() if value), None):
        raise ConfigError(
            f"network.args.{file}: {given[file]} is a file, whose content is no part of the keys of results; set "
            "network.pretrained for timm's weights, or give module:function of a function that builds and loads it"
        )
    hub = config.name.startswith(HUB)
    if not hub and not timm.is_model(config.name):
        raise ConfigError(f"network.name: timm has no {config.name!r}{did_you_mean(config.name, timm.list_models())}")

    def create(pretrained: bool, **size: Any) -> nn.Module:
        given = {"num_classes": info.num_classes, "in_chans": info.channels, **size, **config.args}
        return timm.create_model(config.name, pretrained=pretrained, **given)

    cfg = None if hub else timm.get_pretrained_cfg(config.name)
    one_size = hub or (cfg is not None and cfg.fixed_input_size)
    return _sized(create, config, info, {"img_size": info.image_size} if one_size else {})


def _torchvision(config: Network, info: DataInfo) -> nn.Module:
    from torchvision import models

    if config.name not in (known := models.list_models()):
        raise ConfigError(f"network.name: torchvision has no {config.name!r}{did_you_mean(config.name, known)}")
    if info.channels != 3:
        raise ConfigError(f"network.name: torchvision's {config.name} takes 3 channels; set data.channels: 3")
    args = NO_AUXILIARY.get(config.name.removeprefix("quantized_"), {}) | config.args
    if "weights_backbone" in inspect.signature(models.get_model_builder(config.name)).parameters:
        args = {"weights_backbone": None} | args  # which would be fetched otherwise

    def create(pretrained: bool, **size: Any) -> nn.Module:
        if not pretrained:
            return models.get_model(config.name, num_classes=info.num_classes, **{**size, **args})
        network = models.get_model(config.name, weights="DEFAULT", **{**size, **args})
        _new_head(network, info.num_classes)
        return network

    size = next((argument(info.image_size) for name, argument in SIZES.items() if config.name.startswith(name)), {})
    return _sized(create, config, info, size)


def _sized(create: Callable[..., nn.Module], config: Network, info: DataInfo, size: dict[str, Any]) -> nn.Module:
    """Creates a network as it is by default if it takes the images so, else with the argument for their size.

    Args:
        create: takes `pretrained` and, as a keyword, the argument.
        size: the argument; empty, if the constructor has none.
    """
    if size.keys() & config.args.keys():
        size = {}
    key = (config.model_dump_json(), info)
    if size and key not in _AS_IT_IS:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():  # without values, in no time
            try:
                create(False).eval()(torch.zeros(2, info.channels, info.image_size, info.image_size))
                _AS_IT_IS[key] = True
            except Exception:  # the network's own code
                _AS_IT_IS[key] = False
    return create(config.pretrained, **({} if _AS_IT_IS.get(key) else size))


_AS_IT_IS: dict[tuple[str, DataInfo], bool] = {}  # whether networks take images without being told their size


def _new_head(network: nn.Module, num_classes: int) -> None:
    """Replaces the last layer of a network by a new one of so many outputs, unless it has so many."""
    layers = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    name, head = layers[-1]
    if isinstance(head, nn.Linear) and head.out_features != num_classes:
        network.set_submodule(name, nn.Linear(head.in_features, num_classes))
    if isinstance(head, nn.Conv2d) and head.out_channels != num_classes:  # of one pixel
        network.set_submodule(name, nn.Conv2d(head.in_channels, num_classes, 1))


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
