"""Whether samples are what they were asked to be: does asking for more give more?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pdiff_ray.common.seeds import derive_seed
from pdiff_ray.config.schema import Condition
from pdiff_ray.evaluation.comparison import CHUNK_VALUES, LEVEL, RESAMPLES
from pdiff_ray.evaluation.metrics import rank_correlation
from pdiff_ray.storage.parameters import Record


def what_came(condition: Condition) -> tuple[str, ...]:
    """Returns the fields that a condition is compared with: the first is its own kind, on test images."""
    accuracies = ("test_accuracy", "validation_accuracy")
    return ("test_loss", "validation_loss", *accuracies) if condition.endswith("loss") else accuracies


def compare_asked(
    condition: Condition, asked: Sequence[float], samples: Sequence[Record], members: Sequence[Record], seed: int
) -> dict[str, Any]:
    """Returns Spearman's correlation of what samples were asked for with what they are, as JSON values.

    Intervals are the percentiles of a bootstrap over samples: they hold for this generator and these images. A sample
    that is no finite number in a field is left out of it.

    Args:
        asked: of each sample (n,).
        samples, members: judged.
        seed: of the intervals.

    Returns:
        `condition`, `lowest` and `highest` that was asked for, and `correlations` by field: `estimate`, `lower`,
        `upper`, and what it is among the members; None where there is none, as nothing varies.
    """
    wanted = np.array(asked, dtype=np.float64)
    correlations = {}
    for field in what_came(condition):
        came, own = _values(samples, field), _values(members, field)
        random = np.random.default_rng(derive_seed(seed, "asked", field))
        estimate, lower, upper = _interval(wanted, came, random)
        among = _correlation(_values(members, condition), own)
        correlations[field] = {"estimate": estimate, "lower": lower, "upper": upper, "members": among}
    return {
        "condition": condition,
        "lowest": float(wanted.min()),
        "highest": float(wanted.max()),
        "samples": len(samples),
        "correlations": correlations,
    }


def _values(records: Sequence[Record], field: str) -> np.ndarray:
    """Returns a field of each network (n,), NaN where it is unknown."""
    return np.array([getattr(record, field) for record in records], dtype=np.float64)


def _correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    known = np.isfinite(first) & np.isfinite(second)
    return rank_correlation(first[known], second[known]) if known.any() else None


def _interval(first: np.ndarray, second: np.ndarray, random: np.random.Generator) -> tuple[float | None, ...]:
    """Returns a correlation and its interval."""
    from scipy.stats import rankdata  # half a second, which few need

    estimate = _correlation(first, second)
    if estimate is None:
        return None, None, None
    known = np.isfinite(first) & np.isfinite(second)
    pair, n, found = np.stack([first[known], second[known]]), int(known.sum()), []
    for start in range(0, RESAMPLES, step := max(1, CHUNK_VALUES // n)):
        drawn = pair[:, random.integers(0, n, (min(step, RESAMPLES - start), n))]
        ranks = rankdata(drawn, axis=2)
        ranks -= ranks.mean(2, keepdims=True)
        with np.errstate(invalid="ignore"):  # a resample of equals has no correlation
            found.append((ranks[0] * ranks[1]).sum(1) / np.sqrt(np.prod(np.square(ranks).sum(2), 0)))
    lower, upper = np.nanquantile(np.concatenate(found), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return estimate, float(lower), float(upper)
