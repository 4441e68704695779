"""YAML with limits: mappings, lists, text, numbers, truth values and nothing else, whatever the bytes are."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from pdiff_ray.common.errors import ConfigError

MAX_BYTES = 2**17  # of a file; PyYAML reads so many in a second
MAX_DEPTH = 50  # of mappings and lists in one another
MAX_NODES = 20_000  # values, with those that aliases repeat
MAX_INTEGER = 2**63  # what JSON, Parquet and torch can hold

# What JSON has as well; dates are text, and binary data, sets and ordered mappings are in no field.
TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Refuses keys that are given twice, of which YAML would take the last, and what no field takes."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.nodes = 0
        self.sizes: dict[int, int] = {}  # by identity, of nodes that are whole: the values in them

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Composes a node, counting what aliases repeat: a few lines of them are worth millions of values."""
        event, before = self.peek_event(), self.nodes
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ConstructorError(problem=f"nested more than {MAX_DEPTH} deep", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(event, yaml.AliasEvent) and id(node) not in self.sizes:
            raise ConstructorError(problem=f"*{event.anchor} stands within itself", problem_mark=event.start_mark)
        self.nodes += self.sizes[id(node)] if isinstance(event, yaml.AliasEvent) else 1
        if self.nodes > MAX_NODES:
            raise ConstructorError(problem=f"more than {MAX_NODES:,} values", problem_mark=event.start_mark)
        self.sizes.setdefault(id(node), self.nodes - before)
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == MERGE:
                continue
            if key.tag != "tag:yaml.org,2002:str" or not key.value.isprintable():
                what = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a mapping or a list"
                raise ConstructorError(
                    problem=f"the key {what} is not text; if it is meant so, put it in quotes",
                    problem_mark=key.start_mark,
                )
            if key.value in seen:
                raise ConstructorError(
                    problem=f"the key {key.value!r} is given twice; keep one", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Constructs a value; what PyYAML raises of a value that is odd becomes an error of YAML with its line."""
        try:
            value = super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(problem=f"no {kind}: {error}", problem_mark=node.start_mark) from None
        problem = ""
        if isinstance(value, int) and abs(value) >= MAX_INTEGER:
            problem = "a whole number beyond 64 bits"
        elif isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            problem = "text with a character that no file or terminal takes"
        if problem:
            raise ConstructorError(problem=problem, problem_mark=node.start_mark)
        return value


_Loader.yaml_constructors = {
    tag: made for tag, made in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in TAGS
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag in TAGS or tag == MERGE]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, where: str) -> Any:
    """Returns the value that YAML stands for.

    Args:
        where: names its origin in messages.

    Raises:
        ConfigError: it is no YAML, or beyond the limits of this module; names the line.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{where}: has {len(text):,} characters; {MAX_BYTES:,} are the most that is read")
    try:
        return yaml.load(text, _Loader)  # a safe one
    except Exception as error:  # PyYAML raises others as well, of a directive for example
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise ConfigError(f"{where}:{line} not valid YAML: {problem}") from None


def read_yaml(path: Path, asked: str = "") -> Any:
    """Returns the value that a file of YAML stands for.

    Args:
        asked: who asked for it, for messages.

    Raises:
        FileNotFoundError
        ConfigError: as of `parse_yaml`; or the file is none, too long, or cannot be read.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise OSError("it is no regular file")
        if found.st_size > MAX_BYTES:
            raise OSError(f"it has {found.st_size:,} bytes; {MAX_BYTES:,} are the most that an experiment needs")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: it is no UTF-8, or its name is none
        said = getattr(error, "strerror", None) or error  # without the path once more
        raise ConfigError(f"{path}{asked}: cannot be read: {said}") from None
    return parse_yaml(text, f"{path}{asked}")
