"""How sections of the configuration behave: defaults and layers, keys, names of registries, fields chosen by a name."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    ModelWrapValidatorHandler,
    model_validator,
)
from pydantic.fields import FieldInfo

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.common.registry import Registry, fingerprint, imported

# Sections, by the key that they stand under, that are of another kind when a later layer changes their name. The schema
# fills it in.
CHOICES: dict[str, type[Choice]] = {}


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Lays `changes` over `base`, mapping by mapping."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        # A subset is one rule, arguments are of one network, swept parameters of one question: the later replace the
        # earlier.
        if isinstance(old, dict) and isinstance(value, dict) and key not in ("subset", "args", "parameters"):
            merged[key] = merge(CHOICES[key].kept(old, value) if key in CHOICES else old, value)
        else:
            merged[key] = value
    return merged


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted paths and values of a configuration."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@dataclass(frozen=True)
class Known:
    """Marks a text field as the name of an entry of a registry, or of the user's own thing ("module:attribute").

    Attributes:
        table: where the registry is, as "module:attribute"; it is imported when a name is checked, as the tables stand
            above the configuration.
    """

    table: str

    @property
    def registry(self) -> Registry[Any]:
        return imported(self.table)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return AfterValidator(self._checked).__get_pydantic_core_schema__(source, handler)

    def _checked(self, name: str) -> str:
        self.registry.check_name(name)
        return name


class Section(BaseModel):
    """A part of the configuration.

    Attributes:
        unkeyed: fields that change no result.
        added: fields that came later than the keys of existing results; at their defaults they are no part of the key.
        renamed: old names of fields that are still read, each with the new one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    unkeyed: ClassVar[frozenset[str]] = frozenset()
    added: ClassVar[frozenset[str]] = frozenset()
    renamed: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        """Lays mappings over the defaults that their fields have here: a new learning rate changes no schedule."""
        if not isinstance(value, dict):
            return value
        for old, new in cls.renamed.items():
            if old in value:
                if new in value:
                    raise ValueError(f"{new} is given twice, once by its old name {old}; remove {old}")
                value = {new if name == old else name: content for name, content in value.items()}
                _note(f"{cls.__name__.lower()}.{old} is called {cls.__name__.lower()}.{new} now")
        defaults = {name: field.default for name, field in cls.model_fields.items() if name in value}
        sections = {name: d.model_dump(exclude_unset=True) for name, d in defaults.items() if isinstance(d, Section)}
        return merge(sections, value)

    def keyed(self) -> dict[str, Any]:
        """Returns what determines a result, as JSON values: fields with defaults filled in, and the user's own code."""
        fields = type(self).model_fields
        kept = {name for name in fields if name not in self.unkeyed}
        kept -= {name for name in self.added if getattr(self, name) == fields[name].default}
        content = self.model_dump(mode="json", include=kept)
        content |= {name: value.keyed() for name, value in self if name in kept and isinstance(value, Section)}
        own = {name: getattr(self, name) for name in fields if known(fields[name])}
        code = {name: fingerprint(value) for name, value in own.items() if ":" in (value or "")}
        return {**content, "code": code} if code else content


@functools.cache
def _note(text: str) -> None:
    """Prints a note once, beside what a command prints."""
    print(f"note: {text}", file=sys.stderr)


def known(field: FieldInfo) -> Known | None:
    """Returns the mark of a field that names an entry of a registry, also of one that may be missing."""
    alternatives = (mark for kind in get_args(field.annotation) for mark in getattr(kind, "__metadata__", ()))
    return next((mark for mark in (*field.metadata, *alternatives) if isinstance(mark, Known)), None)


class Choice(Section):
    """A section whose `name` decides what other fields there are: those of the `Settings` of what the name stands for.

    `name` is a field marked as `Known`.
    """

    name: str

    @model_validator(mode="wrap")
    @classmethod
    def _chosen(cls, value: Any, handler: ModelWrapValidatorHandler[Choice]) -> Choice:
        """Validates a mapping as the class that its name chooses; an unknown name is the only thing wrong with it."""
        chosen = cls.type_of(value) if isinstance(value, dict) else cls
        if chosen is None:
            handler({"name": value["name"]})
            raise ValueError(f"name is {value['name']!r}, which has no class Settings for the fields of this section")
        return handler(value) if chosen is cls else chosen.model_validate(value)

    @classmethod
    def type_of(cls, value: Any) -> type[Choice] | None:
        """Returns the class that a mapping's name chooses; None if there is no such name."""
        field = cls.model_fields["name"]
        mark, name = known(field), value.get("name", field.default) if isinstance(value, dict) else field.default
        assert mark is not None
        try:
            return mark.registry[name].Settings
        except (ConfigError, TypeError, AttributeError):  # it is not in the table, no text, or of another kind
            return None

    @classmethod
    def kept(cls, old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        """Returns what an earlier mapping still says where a later one may choose another name: what both have."""
        before, after = cls.type_of(old), cls.type_of({**old, **new})
        if before is after or before is None or after is None:
            return old
        return {key: value for key, value in old.items() if key in after.model_fields or key not in before.model_fields}
