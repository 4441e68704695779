"""Writes the tables of fields in the documentation from the schema: `uv run python docs/generate.py`.

With a folder of rows that `tests/test_families.py` has written, also the table of networks.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pdiff_ray.config.schema import Experiment
from pdiff_ray.config.section import Choice, known
from pdiff_ray.config.sweep import Parameter, Sweep

FOLDER = Path(__file__).parent
MARK = "<!-- fields: made by docs/generate.py from the schema -->\n"
NETWORKS, NETWORKS_MARK = "networks.md", "<!-- networks: made by docs/generate.py from the rows that "
TABLES = {
    "configuration.md": [(Experiment, "")],
    "sweeps.md": [(Sweep, "sweep."), (Parameter, "sweep.parameters.PATH.")],
}


def rows(model: type[BaseModel], prefix: str = "", of: str = "", others: Collection[str] = ()) -> list[str]:
    """Returns lines of a Markdown table: path, default, description.

    Args:
        of: opens the descriptions.
        others: fields that are left out.
    """
    lines = []
    for name, field in model.model_fields.items():
        if name in others:
            continue
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel) and "subset" not in name:
            lines += rows(nested, f"{prefix}{name}.", of)
            if issubclass(nested, Choice):
                for choice, entry in known(nested.model_fields["name"]).registry.items():
                    lines += rows(entry.Settings, f"{prefix}{name}.", f"{choice}: ", set(nested.model_fields))
            continue
        text = field.description or ""
        default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
        lines.append(f"| `{prefix}{field.alias or name}` | {default} | {of}{_kind(field)}{text} |")
    return lines


def _default(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        value = list(value)
    return f"`{value}`"


def _kind(field: Any) -> str:
    mark = known(field)
    choices = [*mark.registry.names, "or module:attribute"] if mark else getattr(field.annotation, "__args__", ())
    if choices and all(isinstance(choice, str) for choice in choices):
        return f"{', '.join(choices)}" + ("; " if field.description else "")
    return ""


def page(name: str) -> str:
    """A page with its table renewed."""
    head = (FOLDER / name).read_text(encoding="utf-8").partition(MARK)[0]
    lines = [line for model, prefix in TABLES[name] for line in rows(model, prefix)]
    return "\n".join([head + MARK, "| field | default | |", "|---|---|---|", *lines]) + "\n"


def networks(folder: Path) -> str:
    """The page of networks with the rows in a folder, and how many there are of each kind."""
    lines = [file.read_text(encoding="utf-8").strip() for file in sorted(folder.glob("*.md"))]
    refused, whole, bits = (
        sum(word in line for line in lines) for word in ("| refused: ", "| runs whole: ", "equal bits")
    )
    split = len(lines) - refused - whole
    counts = (
        f"Of {len(lines)} networks, {len(lines) - refused} are accepted: {split} are split, of which {bits} give equal "
        f"bits, and {whole} run whole. {refused} are refused."
    )
    page = (FOLDER / NETWORKS).read_text(encoding="utf-8")
    head, mark, rest = page.partition(NETWORKS_MARK)
    head += mark + rest.partition("\n")[0]
    columns = ["| from | module | network | parameters | pixels | |", "|---|---|---|---|---|---|"]
    return "\n".join([head, "", counts, "", *columns, *lines]) + "\n"


if __name__ == "__main__":
    for rows_of in sys.argv[1:]:
        (FOLDER / NETWORKS).write_text(networks(Path(rows_of)), encoding="utf-8")
    for name in TABLES:
        (FOLDER / name).write_text(page(name), encoding="utf-8")
