"""What the evaluation's rows say: a line per group, and whether the samples are replicas, interpolations or new.

Shapes: n networks of a group, T test images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pdiff_ray.evaluation.similarity import iou, mean_within, unpack_wrong
from pdiff_ray.storage.parameters import Record

REPLICA_DISTANCE = 0.5  # of the distance that members keep from their nearest fellow
NEW_SPREAD = 0.8  # of the distance, and of the disagreement, among members

# Fields of a group's line, and their names as metrics after `<group>/`.
METRICS = {
    "best": "best_test_accuracy",
    "mean": "mean_test_accuracy",
    "median": "median_test_accuracy",
    "std": "std_test_accuracy",
    "train_mean": "mean_train_accuracy",
    "validation_mean": "mean_validation_accuracy",
    "train_loss_mean": "mean_train_loss",
    "validation_loss_mean": "mean_validation_loss",
    "failed": "failed",
    "similarity": "similarity",
    "similarity_to_originals": "similarity_to_originals",
    "max_similarity": "max_similarity",
    "nearest_distance": "nearest_distance",
}


def named_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a summary that are known, by name, such as `generated/best_test_accuracy`."""
    return {
        f"{group['group'].replace(' ', '_')}/{name}": group[field]
        for group in summary["groups"]
        for field, name in METRICS.items()
        if group[field] is not None
    }


def label(record: Record) -> str:
    """The group's name as shown, noise by its sigma."""
    if record.group == "noise_added":
        return f"noise-added {record.sigma:g}"
    return record.group.replace("_", "-")


def summarize(
    records: Sequence[Record], num_test: int, num_classes: int, member_spread: float, sample_spread: float
) -> dict[str, Any]:
    """Statistics of each group, in order of appearance, and the verdict.

    Accuracies are fractions on the test set. `best` is chosen by accuracy on the selection split (ties: by loss), never
    on test labels. `similarity` is the mean IoU of wrong test predictions within the group, `similarity_to_originals`
    with all originals (others than itself), `max_similarity` the mean over the group of the largest with an original.
    A network has `failed` if its validation accuracy is nearer to chance than to the originals'.

    Args:
        member_spread, sample_spread: mean L2 distance among members, and among generated vectors.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(label(record), []).append(record)
    original_wrong = unpack_wrong([r.wrong or b"" for r in groups["original"]], num_test)
    halfway = (float(np.mean([r.validation_accuracy for r in groups["original"]])) + 1 / num_classes) / 2
    lines: list[dict[str, Any]] = []
    for name, members in groups.items():
        accuracies = np.array([r.test_accuracy for r in members])
        best = max(members, key=lambda r: (r.train_accuracy or 0, -(r.train_loss or 0)))
        wrong = unpack_wrong([r.wrong or b"" for r in members], num_test)
        others = iou(wrong, original_wrong)
        if name == "original":
            np.fill_diagonal(others, np.nan)
        known = others.shape[1] > 1 or name != "original"
        near = [r.nearest_distance for r in members if r.nearest_distance is not None]
        lines.append(
            {
                "group": name,
                "networks": len(members),
                "best": best.test_accuracy,
                "best_id": best.id,
                "mean": float(accuracies.mean()),
                "median": float(np.median(accuracies)),
                "std": float(accuracies.std()),
                "failed": float(np.mean([(r.validation_accuracy or 0) < halfway for r in members])),
                "mean_loss": float(np.mean([r.test_loss for r in members])),
                "train_loss_mean": float(np.mean([r.train_loss for r in members])),
                "validation_loss_mean": float(np.mean([r.validation_loss for r in members])),
                "train_mean": float(np.mean([r.train_accuracy for r in members])),
                "validation_mean": float(np.mean([r.validation_accuracy for r in members])),
                "similarity": mean_within(wrong),
                "similarity_to_originals": float(np.nanmean(others)) if known else None,
                "max_similarity": float(np.nanmean(np.nanmax(others, axis=1))) if known else None,
                "nearest_distance": float(np.mean(near)) if near else None,
            }
        )
    return {"groups": lines, "verdict": _verdict({g["group"]: g for g in lines}, member_spread, sample_spread)}


def _verdict(groups: dict[str, dict[str, Any]], member_spread: float, sample_spread: float) -> dict[str, Any]:
    """Replica, interpolation or new; compare arXiv 2506.07998."""
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
        word, reason = "interpolation", "the samples vary less than the members, as averages of them do"
    else:
        word, reason = "new", "the samples are as far from the members, and from each other, as members are"
    text = (
        f"{word}: {reason}. In weight space the nearest member is at {near:.2f} of the mean distance among members "
        f"(members' own nearest: {own:.2f}), and samples are {spread:.2f} times as far from each other as members. "
        f"Their wrong predictions differ {disagreement:.2f} times as much as members', and overlap with the most "
        f"similar original by {generated['max_similarity']:.2f} (originals: {original['max_similarity']:.2f})."
    )
    return {"word": word, "text": text, "relative_spread": spread, "relative_disagreement": disagreement}
