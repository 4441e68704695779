"""Tables of what a name in the configuration stands for.

The package's own things have plain names. A name with a colon, "module:attribute", is the user's own: it is imported,
and the source of its module becomes part of the keys of what is made with it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pdiff_ray.common.errors import ConfigError, did_you_mean, first_line

T = TypeVar("T")


class Registry(dict[str, T]):
    """Things of one kind by name; to look up "module:attribute" imports it.

    Args:
        kind: what the things are, for messages, such as "optimizer".
        entries: the package's own.
        also: further names, which stand for no single thing, such as "auto".
    """

    def __init__(self, kind: str, entries: Mapping[str, T], also: Sequence[str] = ()) -> None:
        super().__init__(entries)
        self.kind, self.also = kind, also

    @property
    def names(self) -> list[str]:
        """All names without a colon."""
        return [*self.also, *self]

    def check_name(self, name: str) -> None:
        """Raises ConfigError unless there is such a name, or it can be imported."""
        if name not in self.also:
            self[name]

    def __missing__(self, name: str) -> T:
        if ":" in name:
            return imported(name)
        known, near = ", ".join([*self.names, "module:attribute"]), did_you_mean(name, self.names)
        raise ConfigError(f"there is no {self.kind} {name!r} (known: {known}){near}")


def imported(name: str, field: str = "") -> Any:
    """Returns what "module:attribute" names.

    Args:
        field: of the configuration that the name stands in, for the message.

    Raises:
        ConfigError: it cannot be imported.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the module's own code
        where = f"{field}: " if field else ""
        raise ConfigError(f"{where}{name!r} (module:attribute) cannot be imported: {first_line(error)}") from None


def source_of(name: str) -> Path | None:
    """Returns the source file of "module:attribute", None if there is none."""
    try:
        spec = importlib.util.find_spec(name.partition(":")[0])
    except (ImportError, ValueError):
        return None
    found = Path(spec.origin).resolve() if spec and spec.origin else None
    return found if found and found.is_file() else None


def fingerprint(name: str) -> str:
    """Returns a hash of the source file of "module:attribute", or "missing": what it makes changes with its source."""
    source = source_of(name)
    return hashlib.sha256(source.read_bytes()).hexdigest()[:16] if source else "missing"  # importing it says so
