"""A network's weights in what other code saved: under which key, and behind which prefix, they are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pdiff_ray.common.errors import ConfigError, did_you_mean, some_of
from pdiff_ray.storage.weights import ALONE, Foreign, Weight

# Parts of names that torch.compile, FSDP and activation checkpointing put between those of modules.
INSERTED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
MAX_NAMES = 100_000  # that are looked at in a file, and
MAX_NAME = 200  # characters that they have; no module's are longer
MAX_DEPTH = 4  # of mappings in mappings


@dataclass(frozen=True)
class Match:
    """Where in a file a network's weights are.

    Attributes:
        paths: keys that lead to the mapping of tensors, joined by dots, one for each way; empty at the top.
        prefix: what stands before the network's names.
        tensors: all of the mapping, by their names without what was inserted.
        inserted: parts that were taken out of the names.
    """

    paths: list[str]
    prefix: str
    tensors: dict[str, Weight]
    inserted: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return self.paths[0]

    def __str__(self) -> str:
        found = [f"under {self.path!r}"] if self.path else []
        found += [f"without {part!r} in the names" for part in self.inserted]
        found += [f"without the prefix {self.prefix!r}"] if self.prefix else []
        return ", ".join(found) or "named as the network's"

    def named(self) -> dict[str, Weight]:
        """Returns the tensors behind the prefix, without it."""
        return {n.removeprefix(self.prefix): w for n, w in self.tensors.items() if n.startswith(self.prefix)}


def match(
    content: Any,
    parameters: Collection[str],
    part: Collection[str] = (),
    key: str | None = None,
    prefix: str | None = None,
) -> Match:
    """Finds the place in a file's content where all parameters of a network are, or else a part of them.

    Args:
        content: as `weights.read` returns it.
        parameters: names of the network's parameters.
        part: names of some tensors of the network.
        key: takes the mapping under this key alone.
        prefix: takes tensors behind this prefix alone.

    Raises:
        ConfigError: they are nowhere, or in several places. The message begins with what the file does.
    """
    places = list(_places(content, "", 0, {}))
    if sum(len(place.tensors) for place in places) > MAX_NAMES:
        raise ConfigError(f"names more than {MAX_NAMES:,} tensors. {ALONE}")
    if key is not None:
        keys = [place.path for place in places if place.path]
        exact = [replace(p, paths=[key]) for p in places if key in p.paths]
        ends = [replace(p, paths=[path]) for p in places for path in p.paths if path.split(".")[-1] == key]
        places = exact or ends
        if not places:
            raise ConfigError(f"holds no tensors under {key!r} (--weights); it does under {some_of(keys) or 'no key'}")
    if prefix is not None:
        prefix = prefix and f"{prefix.rstrip('.')}."
    whole = _behind(places, parameters, prefix)
    if found := [match for match, count in whole if count == len(set(parameters))]:
        return _only(found)
    some = [match for match, count in _behind(places, part, prefix) if count == len(set(part))]
    # Elsewhere in a network, a part may be named like another one.
    if found := [m for m in some if not m.prefix] or [m for m in some if len(m.named()) == len(m.tensors)]:
        return _only(found)
    if not whole:
        raise ConfigError(_nothing(content, places, parameters, prefix))
    near, count = max(whole, key=lambda pair: pair[1])
    absent = next(name for name in parameters if name not in near.named())
    raise ConfigError(
        f"lacks {absent}{did_you_mean(absent, near.named())} ({count} of the network's {len(set(parameters))} "
        f"parameters are there, {near}); a file holds the whole network, or all of the subset (a zoo's: with --base)"
    )


def _only(found: list[Match]) -> Match:
    if len(found) == 1:
        return found[0]
    if len({m.path for m in found}) > 1:
        option, names = "--weights", [m.path or "the top" for m in found]
    else:
        option, names = "--prefix", [m.prefix for m in found]
    raise ConfigError(f"holds the network's weights {len(found)} times: {some_of(names)}; choose with {option}")


def _nothing(content: Any, places: list[Match], parameters: Collection[str], prefix: str | None) -> str:
    """Returns what is there in place of a network's weights."""
    if places:
        behind = "" if prefix is None else f" behind the prefix {prefix!r} (--prefix)"
        return (
            f"holds none of the network's parameters{behind}, which are {some_of(parameters)}; it has "
            f"{some_of(max(places, key=lambda place: len(place.tensors)).tensors)}. Is it of another network?"
        )
    foreign = {"": content} if isinstance(content, Foreign) else content if isinstance(content, dict) else {}
    for key, value in foreign.items():
        if isinstance(value, Foreign):
            at = f" under {key!r}" if key else ""
            return f"holds no tensors by name, but an object of {value.name}{at}; to load it could run code. {ALONE}"
    return f"holds no tensors by name, but {type(content).__name__}; a state dict is wanted. {ALONE}"


def _places(content: Any, path: str, depth: int, seen: dict[int, list[str]]) -> Iterator[Match]:
    """Yields the mappings of tensors in a file's content, from the top down; `seen` has their paths by identity."""
    if id(content) in seen:
        seen[id(content)].append(path)
    if not isinstance(content, dict) or id(content) in seen or depth > MAX_DEPTH:
        return
    paths = seen[id(content)] = [path]
    tensors = {n: w for n, w in content.items() if isinstance(w, Weight) and isinstance(n, str) and len(n) <= MAX_NAME}
    if tensors:
        inserted = sorted(INSERTED & {part for name in tensors for part in name.split(".")})
        short = {_shortened(name): weight for name, weight in tensors.items()}
        if len(short) == len(tensors):  # else the same network is there with and without
            yield Match(paths, "", short, tuple(inserted))
        else:
            yield Match(paths, "", tensors)
    for key, value in content.items():
        if len(str(key)) <= MAX_NAME:
            yield from _places(value, f"{path}.{key}" if path else str(key), depth + 1, seen)


def _shortened(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in INSERTED)


def _behind(places: list[Match], names: Collection[str], prefix: str | None) -> list[tuple[Match, int]]:
    """Returns, for each prefix behind which there are some of the names, how many of them."""
    wanted, found = set(names), []
    for place in places:
        counts: Counter[str] = Counter()
        for name in place.tensors:
            starts = [0, *(i + 1 for i, character in enumerate(name) if character == ".")]
            counts.update(name[:start] for start in starts if name[start:] in wanted)
        found += [
            (replace(place, prefix=before), count)
            for before, count in counts.items()
            if prefix is None or before in (prefix, _shortened(prefix))
        ]
    return found
