"""What the evaluation's rows say: a line per group, and whether the samples are replicas, interpolations or new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pdiff_ray.common.errors import StorageError
from pdiff_ray.evaluation.groups import GROUPS, Group
from pdiff_ray.evaluation.metrics import METRICS, JudgedGroup, Metric
from pdiff_ray.storage.parameters import Record

REPLICA_DISTANCE = 0.5  # of the distance that members keep from their nearest fellow
NEW_SPREAD = 0.8  # of the distance, and of the disagreement, among members


def by_title(records: Sequence[Record], groups: Mapping[str, Group] = GROUPS) -> dict[str, list[Record]]:
    """Returns the networks of each line of tables and figures, in the order of groups."""
    found: dict[str, list[Record]] = {}
    places = {name: place for place, name in enumerate(groups)}
    for record in sorted(records, key=lambda record: places.get(record.group, len(places))):
        if record.group not in groups:
            raise StorageError(
                f"network {record.id} is of group {record.group!r}, and the evaluation has {', '.join(groups)}; delete "
                "the evaluation's folder to build it again"
            )
        found.setdefault(groups[record.group].title(record), []).append(record)
    return found


def summarize(
    records: Sequence[Record],
    num_test: int,
    num_classes: int,
    member_spread: float,
    sample_spread: float,
    groups: Mapping[str, Group] = GROUPS,
    metrics: Mapping[str, Metric] = METRICS,
) -> dict[str, Any]:
    """Returns the metrics of each group, in the order of groups, and the verdict.

    Args:
        member_spread, sample_spread: mean L2 distance among members, and among generated vectors.
    """
    originals = [record for record in records if record.group == "original"]
    lines: list[dict[str, Any]] = []
    for name, members in by_title(records, groups).items():
        networks = JudgedGroup(members, originals, num_test, num_classes)
        lines.append({"group": name, **{field: metric.function(networks) for field, metric in metrics.items()}})
    verdict = _verdict({line["group"]: line for line in lines}, member_spread, sample_spread)
    own = [metric.about for field, metric in metrics.items() if field not in METRICS]
    return {"groups": lines, "verdict": verdict, **({"metrics": own} if own else {})}


def _verdict(groups: dict[str, dict[str, Any]], member_spread: float, sample_spread: float) -> dict[str, Any]:
    """Decides whether samples are replicas of members, interpolations or new; compare arXiv 2506.07998."""
    generated, original = groups["generated"], groups["original"]
    spread = sample_spread / member_spread if member_spread else None
    own, near = original["nearest_distance"], generated["nearest_distance"]
    if spread is None or not own or generated["similarity"] is None:
        return {"word": "unknown", "text": "unknown: distances among members and among samples take two of each."}
    # Averages of members may be spread widely enough and still all predict the same.
    disagreement = (1 - generated["similarity"]) / max(1e-9, 1 - original["similarity"])
    if near < REPLICA_DISTANCE * own:
        word, reason = "replica", "the samples lie closer to a member than members lie to each other"
    elif min(spread, disagreement) < NEW_SPREAD:
        ways = {"in weight space": spread, "in what they predict": disagreement}
        less = " and ".join(where for where, relative in ways.items() if relative < NEW_SPREAD)
        word, reason = "interpolation", f"the samples vary less than the members {less}, as averages of them do"
    else:
        word, reason = "new", "the samples are as far from the members, and from each other, as members are"
    text = (
        f"{word}: {reason}. In weight space the nearest member is at {near:.2f} of the mean distance among members "
        f"(members' own nearest: {own:.2f}), and samples are {spread:.2f} times as far from each other as members. "
        f"Their wrong predictions differ {disagreement:.2f} times as much as members', and overlap with the most "
        f"similar original by {generated['max_similarity']:.2f} (originals: {original['max_similarity']:.2f})."
    )
    return {"word": word, "text": text, "relative_spread": spread, "relative_disagreement": disagreement}
