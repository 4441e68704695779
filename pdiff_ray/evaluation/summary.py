"""What the evaluation's rows say: a line per group, and what the generated networks are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pdiff_ray.common.errors import StorageError
from pdiff_ray.config.split import MEMBER_GROUPS
from pdiff_ray.evaluation.comparison import Comparison, compare
from pdiff_ray.evaluation.diagnostics import Diagnosis
from pdiff_ray.evaluation.groups import GROUPS, Group
from pdiff_ray.evaluation.metrics import METRICS, JudgedGroup, Metric, failed
from pdiff_ray.evaluation.novelty import Novelty
from pdiff_ray.storage.parameters import Record

MOSTLY = 0.5  # failed samples from which on the verdict is that they failed


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
    novelty: Novelty,
    diagnosis: Diagnosis,
    groups: Mapping[str, Group] = GROUPS,
    metrics: Mapping[str, Metric] = METRICS,
    seed: int = 0,
    num_validation: float = math.inf,
) -> dict[str, Any]:
    """Returns the metrics of each group, in the order of groups, and the verdict, as JSON values.

    Args:
        novelty, diagnosis: of the samples, and of the zoo.
        seed: of the intervals.
        num_validation: validation images.
    """
    originals = [record for record in records if record.group == "original"]
    titles = by_title(records, groups)
    baselines = [name for name, members in titles.items() if members[0].group not in (*MEMBER_GROUPS, "generated")]
    comparison = compare(
        {name: [record.wrong or b"" for record in members] for name, members in titles.items()},
        num_test,
        {name: [record.validation_accuracy or 0.0 for record in members] for name, members in titles.items()},
        baselines,
        seed=seed,
        num_validation=num_validation,
    )
    leads = dict(comparison.differences)
    if comparison.best:
        leads["generated"] = leads[comparison.best]
    judged = {
        name: JudgedGroup(members, originals, num_test, num_classes, comparison.means[name], leads.get(name))
        for name, members in titles.items()
    }
    lines = [
        {"group": name, **{field: metric.function(networks) for field, metric in metrics.items()}}
        for name, networks in judged.items()
    ]
    own = [metric.about for field, metric in metrics.items() if field not in METRICS]
    return {
        "groups": lines,
        "verdict": _verdict(novelty, comparison, failed(judged["generated"])),
        "novelty": novelty.to_dict(),
        "comparison": comparison.to_dict(),
        "zoo": diagnosis.to_list(),
        **({"metrics": own} if own else {}),
    }


def _verdict(novelty: Novelty, comparison: Comparison, failed: float) -> dict[str, Any]:
    """Puts into words whether samples work, are new, and are better than the best simple baseline."""
    word = "failed" if failed > MOSTLY else "collapsed" if novelty.collapsed else novelty.word
    parts = []
    if failed > 0:
        parts.append(f"{failed:.0%} of the samples failed: their accuracy is nearer to chance than to the members'.")
    if novelty.collapsed:
        parts.append("They are collapsed: all alike, compared with members.")
    parts += [novelty.headline, comparison.text]
    text = " ".join(parts)
    return {
        "word": word,
        "text": text if text.startswith(word) else f"{word}: {text}",
        "shares": novelty.shares,
        "collapsed": novelty.collapsed,
        "failed": failed,
        "accuracy": comparison.word,
        "baseline": comparison.best,
    }
