"""Results as text: the table of groups, the paper's row, and what sharing achieved."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = {
    "group": "group",
    "networks": "n",
    "best": "best*",
    "mean": "mean",
    "median": "median",
    "std": "std",
    "similarity": "IoU",
    "similarity_to_originals": "IoU orig.",
    "max_similarity": "IoU max",
    "nearest_distance": "distance",
}
LEGEND = (
    "Test accuracy in percent; *chosen on training images, reported on test images. IoU: overlap of wrong test "
    "predictions within the group, with the originals, and with the most similar original. distance: to the nearest "
    "member in weight space, relative to the mean distance among members."
)


def table_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """The result table as text, one row per group, headings first."""
    rows = [list(COLUMNS.values())]
    for group in summary["groups"]:
        row = []
        for column in COLUMNS:
            value = group[column]
            if value is None or (column == "std" and group["networks"] == 1):
                row.append("-")
            elif column in ("best", "mean", "median", "std"):
                row.append(f"{100 * value:.2f}")
            else:
                row.append(f"{value:.3f}" if isinstance(value, float) else str(value))
        rows.append(row)
    return rows


def paper_row(summary: Mapping[str, Any]) -> str:
    """original / ensemble / p-diff, each the best as selected on training images: Table 1 of the paper."""
    groups = {g["group"]: g for g in summary["groups"]}
    return " / ".join(f"{100 * groups[name]['best']:.1f}" for name in ("original", "ensemble", "generated"))


def sharing_text(zoo: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """What sharing the computation of frozen parts achieved, from the `info` of two manifests; empty if unknown."""
    sentences = []
    if reason := evaluation.get("runs_whole"):
        sentences.append(f"Every network was judged with full passes ({reason}).")
    elif "shared" in evaluation:
        took = evaluation["prefix_seconds"] + evaluation["suffix_seconds"]
        sentences.append(
            f"The networks share {evaluation['shared']:.1%} of a pass's FLOPs; judging them took {took:.1f} s of "
            f"computing, {evaluation['unshared_seconds']:.1f} s with full passes (from the measured parts)."
        )
    if "shared" in zoo and not zoo["runs_whole"]:
        if reason := zoo["full_steps"]:
            sentences.append(f"Zoo steps were full passes: {reason}.")
        else:
            saving = zoo.get("steps_saving")
            fast = f" and were {saving:.1f} times as fast as full passes (from the measured parts)" if saving else ""
            sentences.append(f"Zoo steps read what is shared{fast}.")
    if compared := evaluation.get("compared_predictions"):
        changed = evaluation["changed_predictions"]
        sentences.append(f"Reduced precision changed {changed:,} of {compared:,} test predictions compared.")
    return " ".join(sentences)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body]) + "\n"


def comma_separated(summary: Mapping[str, Any]) -> str:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, fieldnames=list(summary["groups"][0]))
    writer.writeheader()
    writer.writerows(summary["groups"])
    return sink.getvalue()
