"""Nested dicts of tensors and JSON values as safetensors: data without code."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from pdiff_ray.common.errors import StorageError, first_line


def save_tree(tree: dict[str, Any]) -> bytes:
    """Returns a nested dict of tensors and JSON values as the content of a safetensors file.

    Keys must not contain `|`. Lists, scalars and empty dicts travel as JSON in the file's metadata. The order of keys
    is not kept.
    """
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}

    def visit(node: dict[Any, Any], prefix: str) -> None:
        for key, value in node.items():
            path = f"{prefix}{key}"
            if isinstance(value, torch.Tensor):
                # Copies: safetensors refuses tensors that share memory.
                tensors[path] = value.detach().cpu().contiguous().clone()
            elif isinstance(value, dict) and value:
                visit(value, f"{path}|")
            else:
                scalars[path] = value

    visit(tree, "")
    return save(tensors, metadata={"scalars": json.dumps(scalars)})


def load_tree(content: bytes, where: str = "state") -> dict[str, Any]:
    """Returns the nested dict that `save_tree` was given; keys are text, in alphabetical order.

    Args:
        where: what the content is, for messages.

    Raises:
        StorageError: it is no whole safetensors file.
    """
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        scalars = json.loads(header.get("__metadata__", {}).get("scalars", "{}"))
        tree: dict[str, Any] = {}
        for path, value in sorted({**scalars, **tensors}.items()):  # safetensors gives another order in each process
            *parents, leaf = path.split("|")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
                if not isinstance(node, dict):
                    raise ValueError(f"{path!r} is below a value")
            node[leaf] = value
        return tree
    except (SafetensorError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(
            f"{where}: not a whole safetensors file: {first_line(error)}; delete it to make it again"
        ) from None
