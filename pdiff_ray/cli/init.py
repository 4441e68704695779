"""`pdiff init`: writes a commented experiment file for the user's data and network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config import schema
from pdiff_ray.config.loading import parse, parse_experiment
from pdiff_ray.config.section import Section
from pdiff_ray.data import sources
from pdiff_ray.networks.build import blank_images, check_network
from pdiff_ray.networks.subset import norm_layers, resolve

SMALL_NETWORK = 100_000  # parameters, up to which all of them are generated
SMALL_IMAGE = 64  # pixels along an edge, up to which a ResNet gets the small stem for CIFAR
HEAD = """\
# Which networks does a generator make of {members} checkpoints of {network} on {data}?
#
#   uv run pdiff sweep {file} --dry-run     what it would take
#   uv run pdiff sweep {file}               from data to report
#
# {images}
# docs/configuration.md has every field.
"""


def write(data: str, network: str, output: Path | None) -> Path:
    """Writes an experiment file.

    Args:
        data: a folder of images, or the name of a data set.
        network: the name of the network, as in the field `network.name`.
        output: the path of the file; default: one named after the network.

    Returns:
        The path of the file.

    Raises:
        ConfigError: the data cannot be read, the network cannot be built or cannot take the images, or the file exists.
    """
    file = output or Path(f"{network.replace(':', '_').replace('/', '_')}.yaml")
    if file.exists():
        raise ConfigError(f"{file}: exists already; name another file with --output")
    raw = _settings(data, network)
    experiment = parse_experiment(raw, str(file))
    counts, info = sources.count_images(experiment.data), sources.describe(experiment.data)
    shape = f"images of {info.channels} x {info.image_size} x {info.image_size} in {info.num_classes} classes"
    images = f"{counts[0]:,} training and {counts[1]:,} test {shape}." if counts else f"{shape.capitalize()}."
    where = experiment.data.root if experiment.data.name == "custom" else experiment.data.name
    head = HEAD.format(members=raw["zoo"]["members"], network=network, data=where, file=file, images=images)
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_text(head + "\n".join(_lines(raw, schema.Experiment)) + "\n", encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror}; name another file with --output") from None
    return file


def _settings(data: str, network: str) -> dict[str, Any]:
    """Returns the experiment as a mapping, with sizes that suit the data and the network."""
    section = _data(data)
    parsed = parse(schema.Data, section, "DATA", at="data")
    sources.check_data(parsed)
    info, counts = sources.describe(parsed), sources.count_images(parsed)
    chosen: dict[str, Any] = {"name": network}
    if network.startswith(("resnet", "resnext", "wide_resnet")) and info.image_size <= SMALL_IMAGE:
        chosen["cifar_stem"] = True
    try:
        built = check_network(parse(schema.Network, chosen, "NETWORK", at="network"), info)
    except ConfigError:
        if not chosen.pop("cifar_stem", False):  # which not all of these names have
            raise
        built = check_network(parse(schema.Network, chosen, "NETWORK", at="network"), info)
    size = sum(parameter.numel() for parameter in built.parameters())
    layers = norm_layers(built, blank_images(info))
    subset: Any = {"last_norm_layers": min(2, len(layers))} if layers else {"names": [_last_layer(built)]}
    if size <= SMALL_NETWORK:
        subset = "all"
    resolve(schema.SubsetRule.model_validate(subset), built)
    train = math.floor((counts[0] if counts else 10_000) * 0.9)
    batch_size = min(128, 2 ** math.floor(math.log2(max(2, train // 2))))
    return {
        "name": "".join(c if c.isalnum() or c in "_.-" else "_" for c in network),
        "data": section | ({"augment": "crop_flip"} if info.image_size >= 32 and info.channels == 3 else {}),
        "network": chosen,
        "training": {"epochs": 30, "batch_size": batch_size},
        "zoo": {
            "members": 200,
            "subset": subset,
            "batch_size": batch_size,
            "steps_per_member": 10,
            "optimizer": {"lr": 3e-3 if subset == "all" else 3e-2},
        },
        "sampling": {"samples": 100},
    }


def _last_layer(network: Any) -> str:
    """Returns the pattern that matches the names of the last layer's parameters."""
    return list(network.named_parameters())[-1][0].rpartition(".")[0] + ".*"


def _data(data: str) -> dict[str, Any]:
    """Returns the section `data` for the name of a data set, or for a folder according to what is in it."""
    if data in sources.DATASETS:
        return {"name": data}
    root = Path(data).expanduser()
    if not root.is_dir():
        raise ConfigError(f"DATA: {data!r} is neither a folder nor one of {', '.join(sources.DATASETS)}")
    if any(root.glob("**/train*.parquet")):
        return {"name": "custom", "source": "parquet", "root": str(root)}
    if (root / "train").is_dir():
        return {"name": "custom", "source": "folder", "root": str(root)}
    raise ConfigError(
        f"DATA: {data!r} holds neither train*.parquet and test*.parquet nor the folders train and test with a folder "
        f"of images per class; for torchvision's files give the data set's name: one of {', '.join(sources.DATASETS)}"
    )


def _lines(tree: dict[str, Any], model: type[BaseModel], indent: str = "") -> list[str]:
    """Returns the lines of the experiment file, each field with its description as a comment."""
    lines: list[str] = []
    for name, value in tree.items():
        field = model.model_fields.get(name)
        nested = field.annotation if field else None
        if isinstance(value, dict) and isinstance(nested, type) and issubclass(nested, Section) and name != "subset":
            lines += [f"{indent}{name}:", *_lines(value, nested, indent + "  ")]
            continue
        content = yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n...\n").strip()
        text = f"{indent}{name}: {content}"
        lines.append(f"{text:38} # {field.description}" if field and field.description else text)
    return lines
