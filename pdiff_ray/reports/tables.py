"""Results as text: the table of groups, the paper's row, and what sharing achieved."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from pdiff_ray.evaluation.metrics import Metric, Table, described, tidy
from pdiff_ray.reports.answers import points

DIFFERENCE = "generated - group: difference of means in points, with its 95 % interval."


def legend(metrics: Mapping[str, Metric], table: Table = "experiment") -> str:
    """Returns the sentences that explain the columns of a table."""
    shown = (metric.legend for metric in metrics.values() if metric.legend and table in metric.tables)
    return " ".join(["Test accuracy in percent;", *shown])


def table_rows(summary: Mapping[str, Any], differences: bool = False) -> list[list[str]]:
    """Returns the result table as text, one row per group, headings first.

    Args:
        differences: adds how far the samples are from each group, if the summary knows.
    """
    columns = [metric for metric in described(summary).values() if metric.heading and "experiment" in metric.tables]
    rows = [["group", *(metric.heading for metric in columns)]]
    for group in summary["groups"]:
        # An earlier version's summary lacks what has come since.
        shown = (group.get(metric.field) if group["networks"] >= metric.least else None for metric in columns)
        rows.append([group["group"], *(metric.text(value) for metric, value in zip(columns, shown, strict=True))])
    if differences and (known := summary.get("comparison", {}).get("differences")):
        rows[0] += ["generated - group", ""]
        for row in rows[1:]:
            row += [points(known[row[0]]), known[row[0]]["word"]] if row[0] in known else ["-", ""]
    return rows


def headline(summary: Mapping[str, Any]) -> str:
    """Returns the means of original / ensemble / generated with the last one's interval, and the best simple baseline.

    Of an old summary, the means alone.
    """
    groups = {group["group"]: group for group in summary["groups"]}
    means = " / ".join(f"{100 * groups[name]['mean']:.2f}" for name in ("original", "ensemble", "generated"))
    text = f"original / ensemble / generated {means}"
    if not (comparison := summary.get("comparison")):
        return text
    ends = (f"{100 * comparison['means']['generated'][end]:.1f}" for end in ("lower", "upper"))
    text += f" [{', '.join(ends)}]"
    if best := comparison["best"]:
        difference = comparison["differences"][best]
        text += f"; best baseline {best}: {points(difference)}, {difference['word']}"
    return text


def sharing_text(zoo: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """Returns what sharing the computation of frozen parts has achieved, by two manifests' `info`; empty if unknown."""
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
    """Returns a table in Markdown; the first row is its head."""
    escaped = ([cell.replace("|", r"\|") for cell in row] for row in rows)
    head, *body = ["| " + " | ".join(row) + " |" for row in escaped]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body]) + "\n"


def comma_separated(summary: Mapping[str, Any]) -> str:
    """Returns every number of a summary as CSV, one row per group."""
    sink = io.StringIO()
    writer = csv.DictWriter(sink, fieldnames=list(summary["groups"][0]))
    writer.writeheader()
    writer.writerows({name: tidy(value) for name, value in group.items()} for group in summary["groups"])
    return sink.getvalue()
