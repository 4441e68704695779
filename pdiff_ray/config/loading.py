"""How YAML files, presets and overrides become an experiment, and what is said of those that cannot."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pdiff_ray.common.errors import ConfigError, did_you_mean
from pdiff_ray.config.reading import parse_yaml, read_yaml
from pdiff_ray.config.schema import Experiment
from pdiff_ray.config.section import Choice, Section, merge

S = TypeVar("S", bound=Section)

MAX_PROBLEMS = 20  # that are told of at once


def load(path: str | Path, overrides: Sequence[str] = (), preset: str | None = None) -> Experiment:
    """Loads the experiment of a file; of a sweep's, what it varies is as the file has it.

    Raises:
        ConfigError: naming the file, the dotted path of the field, its value and the remedy.
    """
    raw = read(path, overrides, preset)
    raw.pop("sweep", None)
    return parse_experiment(raw, where=str(path))


def read(path: str | Path, overrides: Sequence[str] = (), preset: str | None = None) -> dict[str, Any]:
    """Reads an experiment file and those it inherits from, with a preset of theirs, the site's file, and
    `path=value` overrides laid over it, in this order.

    The site's file (PDIFF_SITE) says what is so on this machine or cluster whatever the experiment: resources, storage,
    tracking.

    Raises:
        ConfigError
    """
    raw = _read(Path(path), seen=())
    presets = raw.pop("presets", None) or {}
    if not isinstance(presets, dict):
        raise ConfigError(
            f"{path}: presets: {_shown(presets)} is not accepted: it takes a mapping of names to sections"
        )
    if preset is not None:
        raw = merge(raw, _preset(presets, preset, path))
    raw = with_site(raw)
    for override in overrides:
        raw = merge(raw, _parse_override(override))
    return raw


def with_site(raw: dict[str, Any]) -> dict[str, Any]:
    """Lays the site's file (PDIFF_SITE), if there is one, over an experiment."""
    site = os.environ.get("PDIFF_SITE")
    return merge(raw, _read(Path(site), seen=())) if site else raw


def presets(path: str | Path) -> list[str]:
    """Returns the names of a file's presets, inherited ones included."""
    found = _read(Path(path), seen=()).get("presets")
    return list(found) if isinstance(found, dict) else []


def _preset(presets: Any, name: str, path: str | Path) -> dict[str, Any]:
    if not isinstance(presets, dict) or not isinstance(presets.get(name), dict):
        known = ", ".join(presets) if isinstance(presets, dict) and presets else "it has none"
        raise ConfigError(f"{path}: presets: no preset {name!r} among the mappings there ({known})")
    return presets[name]


def parse_experiment(raw: dict[str, Any], where: str) -> Experiment:
    """Validates the mapping of an experiment; data.root becomes absolute, as workers have another current folder."""
    experiment = parse(Experiment, raw, where)
    try:
        root = Path(experiment.data.root).expanduser().absolute()
    except RuntimeError as error:  # no user has the home that it names
        raise ConfigError(f"{where}: data.root: {experiment.data.root!r} is no folder: {error}") from None
    data = experiment.data.model_copy(update={"root": str(root)})
    return experiment.model_copy(update={"data": data})


def parse(model: type[S], raw: Any, where: str, at: str = "") -> S:
    """Validates a mapping as a `model`.

    Args:
        where: names its origin in messages.
        at: dotted path of the mapping in the file.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        by_path: dict[tuple[str, ...], list[Any]] = {}
        for problem in error.errors():
            by_path.setdefault(_path(model, raw, problem["loc"]), []).append(problem)
        told = list(by_path.items())[:MAX_PROBLEMS]
        lines = [f"{where}: {_explain(model, raw, path, at, problems)}" for path, problems in told]
        if len(by_path) > len(told):
            lines.append(f"{where}: and {len(by_path) - len(told)} more")
        raise ConfigError("\n".join(lines)) from None


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    asked = f" (base of {seen[-1].name})" if seen else ""
    try:
        content = read_yaml(path, asked)
    except FileNotFoundError:
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*.yaml")))
        raise ConfigError(f"{path}{asked}: no such file{near}") from None
    if path.resolve() in seen:
        raise ConfigError(f"{path}{asked}: base: the files inherit from each other in a circle")
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ConfigError(f"{path}{asked}: an experiment file is a mapping of sections, this one is {kind}")
    parent = content.pop("base", None)
    if parent is None:
        return content
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: base: {parent!r} is not a file name; the training of the base is 'training:'")
    return merge(_read(path.parent / parent, (*seen, path.resolve())), content)


def _parse_override(text: str) -> dict[str, Any]:
    path, equals, value = text.partition("=")
    if not equals or not all(path.strip().split(".")):
        raise ConfigError(f"--set {text}: expected path=value, for example --set zoo.members=50")
    # PyYAML reads 1e-3 as text (YAML 1.1 wants 1.0e-3); pydantic turns it into a number.
    tree = parse_yaml(value, f"--set {text}")
    return nested(path.strip(), tree)


def nested(path: str, value: Any) -> dict[str, Any]:
    """Returns the mapping that holds `value` at a dotted path."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def _path(model: type[BaseModel], raw: Any, location: Sequence[int | str]) -> tuple[str, ...]:
    """Returns the path of a problem's location, without the alternative that pydantic tried, where there are some."""
    kept: list[str] = []
    for part in location:
        if isinstance(part, str) and not _has_keys(_type_at(model, raw, kept)):
            break
        kept.append(str(part))
    return tuple(kept)


def _explain(model: type[BaseModel], raw: Any, path: Sequence[str], at: str, problems: Sequence[Any]) -> str:
    """Returns a line for pydantic's problems with one field: path, value, remedy. Several are of alternatives."""
    problem, named = problems[0], ".".join([at, *path] if at else path)
    if problem["type"] == "extra_forbidden":
        *parent, key = path
        known = _fields_at(model, raw, parent)
        near = did_you_mean(key, known) or f"; known here: {', '.join(known)}"
        return f"{named}: unknown key{near}"
    if problem["type"] == "missing":
        return f"{named}: required but not given"
    if problem["type"] == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return f"{named}: {message}" if named else message
    if problem["type"] in ("model_type", "dict_type") and (known := _fields_at(model, raw, path)):
        return (
            f"{named}: {_shown(problem['input'])} is not accepted: it takes a mapping with some of {', '.join(known)}"
        )
    return f"{named}: {_shown(problem['input'])} is not accepted: {'; or: '.join(p['msg'] for p in problems)}"


def _shown(value: Any) -> str:
    """Returns a value that is not accepted, shortened."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no numbers of thousands of digits
        return "a number of very many digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _fields_at(model: type[BaseModel], raw: Any, location: Sequence[str]) -> list[str]:
    fields = getattr(_type_at(model, raw, location), "model_fields", {})
    return [field.alias or name for name, field in fields.items()]


def _type_at(kind: Any, raw: Any, location: Sequence[str]) -> Any:
    """Returns the type of what is at a path of `raw`, which is of a kind; None where no path can lead."""
    if isinstance(kind, type) and issubclass(kind, Choice):
        kind = kind.type_of(raw) or kind
    if not location:
        return kind
    key, *rest = location
    inner = raw.get(key) if isinstance(raw, dict) else None
    if get_origin(kind) is dict:
        return _type_at(get_args(kind)[1], inner, rest)
    if _has_keys(kind) and key in kind.model_fields:
        return _type_at(kind.model_fields[key].annotation, inner, rest)
    return None


def _has_keys(found: Any) -> bool:
    return get_origin(found) is dict or (isinstance(found, type) and issubclass(found, BaseModel))
