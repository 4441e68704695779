"""What the headers of all images in files tell, read once: the cache remembers it until a file changes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pdiff_ray.common.errors import ConfigError, PdiffError
from pdiff_ray.data.files import FileImages, Found
from pdiff_ray.data.images import GREY, Looks, is_plain
from pdiff_ray.data.kept import build_once, default_cache, digest

LOOKED_AT = 100_000_000  # pixels of a split that are decoded to see whether its images differ: two seconds
MANY = 100_000  # images of which to read the headers takes a while


@dataclass(frozen=True)
class Survey:
    """What the headers of a split's images tell.

    Attributes:
        grey: whether all images are.
        edge: the median of their shorter edges, in pixels.
        plain: whether earlier versions of this package read all of them as this one does.
        first_edge: the shorter edge of the first image, which those versions took for all.
        warnings: images that have one value everywhere or are equal, among as many as were decoded.
    """

    grey: bool
    edge: int
    plain: bool
    first_edge: int
    warnings: list[str]


def survey(found: Found, split: str) -> Survey:
    """Looks at all images of a split, unless the cache knows of it.

    Raises:
        ConfigError: an image cannot be read.
    """
    return _remembered(digest(["survey 1", found.states(split)]), lambda: _survey(found.open(split), split))


_SURVEYS: dict[str, Survey] = {}


def _remembered(key: str, make: Callable[[], Survey]) -> Survey:
    if key not in _SURVEYS:
        folder = default_cache() / f"survey-{key}"
        try:
            build_once(folder, lambda made: _write(made / "survey.json", make()))
            _SURVEYS[key] = Survey(**json.loads((folder / "survey.json").read_text(encoding="utf-8")))
        except ConfigError:
            raise
        except (PdiffError, OSError):  # a cache that cannot be written; decoding says so
            _SURVEYS[key] = make()
    return _SURVEYS[key]


def _write(file: Path, survey: Survey) -> None:
    file.write_text(json.dumps(asdict(survey)), encoding="utf-8")


def _survey(samples: FileImages, split: str) -> Survey:
    if len(samples) >= MANY:
        print(f"reading the headers of {len(samples):,} images of the {split} data, once", file=sys.stderr)
    edges, grey, plain, pixels, looks = [], True, True, 0, Looks(split, len(samples))
    for index, image in enumerate(samples.opened()):
        edges.append(min(image.size))
        grey = grey and image.mode in GREY
        plain = plain and is_plain(image)
        if pixels + image.width * image.height <= LOOKED_AT * (index + 1) / len(samples):  # evenly spread
            pixels += image.width * image.height
            looks.add(samples.name(index), image)
    return Survey(grey, int(np.sort(edges)[(len(edges) - 1) // 2]), plain, edges[0], looks.warnings())
