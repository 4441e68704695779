"""Writes the table of fields in docs/configuration.md from the schema: `uv run python docs/generate.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pdiff_ray.config import Experiment

PAGE = Path(__file__).parent / "configuration.md"
MARK = "<!-- fields: made by docs/generate.py from pdiff_ray/config.py -->\n"


def rows(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Lines of a Markdown table: path, default, description."""
    lines = []
    for name, field in model.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel) and "subset" not in name:
            lines += rows(nested, f"{prefix}{name}.")
            continue
        text = field.description or ""
        lines.append(f"| `{prefix}{name}` | {_default(field.default)} | {_kind(field)}{text} |")
    return lines


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return ""
    if isinstance(value, tuple):
        value = list(value)
    return "`{}`" if isinstance(value, dict) else f"`{value}`"


def _kind(field: Any) -> str:
    choices = getattr(field.annotation, "__args__", ())
    if choices and all(isinstance(choice, str) for choice in choices):
        return f"{', '.join(choices)}" + ("; " if field.description else "")
    return ""


def page() -> str:
    """The page with its table renewed."""
    head = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    return "\n".join([head + MARK, "| field | default | |", "|---|---|---|", *rows(Experiment)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
