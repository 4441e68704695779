"""Exported files, tried against what was judged: each is loaded into a network that is built anew.

Shapes: B images of a batch, M classes, D values in the subset.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdiff_ray.common.errors import ConfigError, PdiffError
from pdiff_ray.common.registry import source_of
from pdiff_ray.config.loading import parse
from pdiff_ray.config.schema import Network
from pdiff_ray.data.sources import DATASETS, DataInfo
from pdiff_ray.networks.build import build_network, is_own, load_tensors
from pdiff_ray.networks.partition import call_with
from pdiff_ray.networks.subset import Subset
from pdiff_ray.stages.base import IMAGES_FILE, NETWORK_FILE
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.trees import load_tree

MAX_SIZE = 2048  # in pixels, of images that are made to try networks on
# Of the largest logit: batches of other sizes, other devices and precisions round otherwise.
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Reported:
    """What was reported of a network.

    Attributes:
        wrong: which test images it gets wrong, as in `Record`.
        precision: in which that was found.
        statistics: by name, that were measured anew for it.
    """

    wrong: bytes
    precision: str
    statistics: Mapping[str, Tensor]


class Trial:
    """Networks on the CPU that compute what was judged, and what exported files hold, on a few images.

    Args:
        base: the artifact of the base network.
        subset: in which networks differ from it.

    Attributes:
        images: (B, C, S, S): test images, or random ones of a base that has kept none.
        labels: (B,) of test images; None of random ones.

    Raises:
        ConfigError: the network cannot be built from what is stored of it.
    """

    def __init__(self, base: Artifact, subset: Subset) -> None:
        self.subset, self.tensors = subset, load_tree(base.read(NETWORK_FILE), base.location)
        try:
            self._build(base)
        except PdiffError:
            raise
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ConfigError(f"{base.location}: its manifest does not say what the network is ({error!r})") from None

    def _build(self, base: Artifact) -> None:
        about = base.manifest()
        network = {**about.config["network"], "pretrained": False}
        for name in (network["name"], network["source"]):  # before any of it is imported
            if is_own(name) and _is_installed(name):
                raise ConfigError(
                    f"{name} is not found, or not code of your own, and a storage must not choose what else is run"
                )
        config = parse(Network, network, "network")
        self.labels: Tensor | None = None
        if IMAGES_FILE in about.files:
            kept = load_tree(base.read(IMAGES_FILE), base.location)
            images, self.labels = kept["images"], kept["labels"]
        else:
            images = _random_images(about.config["data"])
        self.images: Tensor = images.contiguous(memory_format=torch.channels_last)
        channels, size = images.shape[1:3]
        info = DataInfo(channels, size, about.info["num_classes"], (0.0,) * channels, (1.0,) * channels)
        self._judged, self._fresh = (build_network(config, info, seed).eval() for seed in ("judged", "anew"))

    @torch.no_grad()
    def check(self, file: Path, vector: Tensor, reported: Reported | None = None) -> None:
        """Compares a file with the network of a vector (D,), and with what was reported of it.

        Args:
            file: of a whole network, or of the subset alone.
            reported: None if nothing is known.

        Raises:
            PdiffError: they differ.
        """
        try:
            load_tensors(self._judged, self.tensors)
            load_tensors(self._fresh, {**self.tensors, **load_tree(file.read_bytes(), str(file))})
        except RuntimeError as error:
            raise PdiffError(f"its network does not load it: {text_of(error)}") from None
        logits = self._fresh(self.images)
        own = {**self.subset.unflatten(vector), **(reported.statistics if reported else {})}
        if not same_logits(logits, call_with(self._judged, own, self.images)):
            raise PdiffError(
                "loaded into a network that is built anew, it gives other logits than the network that was judged: "
                "something in the network is random, or tied, that its state dict does not tell (zoos that earlier "
                "versions made of networks with tied parameters have to be made again)"
            )
        if reported and self.labels is not None:
            tolerance = TOLERANCE.get(reported.precision, TOLERANCE["float32"]) * logits.abs().max()
            wrong = torch.from_numpy(np.unpackbits(np.frombuffer(reported.wrong, np.uint8))[: len(logits)]).bool()
            right = logits.gather(1, self.labels[:, None])[:, 0]
            others = logits.scatter(1, self.labels[:, None], -torch.inf).amax(1)
            odd = torch.where(wrong, right - others, others - right) > tolerance
            if odd.any():
                raise PdiffError(
                    f"it is right or wrong about {int(odd.sum())} of {len(odd)} test images where the opposite was "
                    "reported of it: the network's code, or a library, has changed since"
                )


def same_logits(logits: Tensor, expected: Tensor) -> bool:
    """Returns whether logits (B, M) are equal but for rounding, not-a-number to itself."""
    if logits.shape != expected.shape:
        return False
    tolerance = TOLERANCE["float32"] * float(expected.abs().nan_to_num(0, 0, 0).max())
    return torch.allclose(logits, expected, rtol=0, atol=tolerance, equal_nan=True)


def text_of(error: Exception) -> str:
    """Returns an error's message, which may be one of another library, as part of a line."""
    return " ".join(str(error).split())[:500] or type(error).__name__


def _random_images(data: Mapping[str, Any]) -> Tensor:
    """Returns images (B, C, S, S) for a base that has kept none, by the data's configuration in its manifest."""
    known = DATASETS.get(str(data["name"]))
    size = data["image_size"] or (known and known.image_size)
    if not isinstance(size, int) or not 0 < size <= MAX_SIZE:
        raise ConfigError("an earlier version has not stored how large the images are")
    shape = (4, len(data["mean"]), size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _is_installed(name: str) -> bool:
    """Returns whether "module:attribute" is part of Python or of an installed package, or is nowhere."""
    source, paths = source_of(name), sysconfig.get_paths()
    return source is None or any(
        source.is_relative_to(Path(paths[kind]).resolve()) for kind in ("stdlib", "platlib", "purelib")
    )
