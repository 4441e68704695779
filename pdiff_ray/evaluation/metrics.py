"""The metrics of a group of networks, each in one place: its value, its names, and how it is shown.

A new metric is a function and its line in `METRICS`; the user's own are named in `evaluation.metrics`.
Shapes: n networks of a group, K originals, T test images.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.common.registry import imported
from pdiff_ray.config.schema import Evaluation
from pdiff_ray.evaluation.comparison import Difference, Interval
from pdiff_ray.evaluation.similarity import iou, mean_within, unpack_wrong
from pdiff_ray.storage.parameters import Record, class_type


@dataclass(frozen=True)
class JudgedGroup:
    """The judged networks of a group, and what they are compared with.

    Attributes:
        records: the group's rows (n).
        originals: the rows of the originals (K), in the order of their ids.
        num_test, num_classes: of the data set.
        accuracy: the mean test accuracy with its interval.
        lead: of the generated networks over the group; of themselves, over the best baseline.
    """

    records: Sequence[Record]
    originals: Sequence[Record]
    num_test: int
    num_classes: int
    accuracy: Interval | None = None
    lead: Difference | None = None

    def values(self, field: str) -> np.ndarray:
        """Returns a field of each network (n,), such as "test_accuracy"; networks without it are left out."""
        return np.array([value for r in self.records if (value := getattr(r, field)) is not None])

    @functools.cached_property
    def best(self) -> Record:
        """The network with the highest of `scores`, in which no test label is."""
        return self.records[max(range(len(self.records)), key=self.scores.__getitem__)]

    @functools.cached_property
    def chosen_on(self) -> Literal["training", "validation"]:
        """The images that tell which network is best: held-out ones where half of the group fit the training images as
        well as any does.
        """
        accuracies = [r.train_accuracy or 0.0 for r in self.records]
        return "validation" if np.median(accuracies) >= max(accuracies) - SATURATED else "training"

    @functools.cached_property
    def scores(self) -> list[tuple[float, float, float]]:
        """What the best network is chosen by, of each (n): accuracy on the selection split (ties: lowest loss).

        If it is chosen on validation images, these decide among those that fit the training images equally well.
        """
        if self.chosen_on == "training":
            return [(r.train_accuracy or 0.0, -(r.train_loss or 0.0), 0.0) for r in self.records]
        equal = max(r.train_accuracy or 0.0 for r in self.records) - SATURATED
        return [
            (min(r.train_accuracy or 0.0, equal), r.validation_accuracy or 0.0, -(r.validation_loss or 0.0))
            for r in self.records
        ]

    @functools.cached_property
    def wrong(self) -> np.ndarray:
        """Which test images each network gets wrong (n, T), bool."""
        return unpack_wrong([r.wrong or b"" for r in self.records], self.num_test)

    @functools.cached_property
    def classes(self) -> np.ndarray | None:
        """The class that each network takes an image for that it gets wrong (n, T), -1 for others; None if unknown."""
        return _wrong_classes(self.records, self.wrong, self.num_classes)

    @functools.cached_property
    def similarities(self) -> np.ndarray:
        """IoU of wrong predictions with those of each original (n, K); not-a-number for an original with itself."""
        found = iou(self.wrong, unpack_wrong([r.wrong or b"" for r in self.originals], self.num_test))
        if self.records[0].group == "original":
            np.fill_diagonal(found, np.nan)
        return found


def _wrong_classes(records: Sequence[Record], wrong: np.ndarray, num_classes: int) -> np.ndarray | None:
    found = np.full(wrong.shape, -1, np.int32)
    for row, misses, record in zip(found, wrong, records, strict=True):
        if record.wrong_classes is None:  # judged by an earlier version
            return None
        row[misses] = np.frombuffer(record.wrong_classes, class_type(num_classes))
    return found


def _of(field: str, statistic: Callable[[np.ndarray], Any] = np.mean) -> Callable[[JudgedGroup], float | None]:
    """Returns the metric that is a statistic of a field; None if no network has it, or it is no finite number."""

    def metric(networks: JudgedGroup) -> float | None:
        values = networks.values(field)
        found = float(statistic(values)) if len(values) else math.nan
        return found if math.isfinite(found) else None

    return metric


def _bound(interval: str, bound: str) -> Callable[[JudgedGroup], Any]:
    """Returns the metric that is the estimate, or a bound, of the group's accuracy or lead; None if it is unknown."""
    return lambda networks: getattr(getattr(networks, interval), bound, None)


def failed(networks: JudgedGroup) -> float:
    """Returns the share of networks whose validation accuracy is nearer to chance than to the originals'."""
    usual = float(np.mean([r.validation_accuracy for r in networks.originals]))
    halfway = (usual + 1 / networks.num_classes) / 2
    return float(np.mean([(r.validation_accuracy or 0) < halfway for r in networks.records]))


def selection_correlation(networks: JudgedGroup) -> float | None:
    """Returns Spearman's rank correlation of the score that chooses the best with test accuracy; None if one is flat.

    Where it is near 0, the best network is one of many: choosing has found nothing. Nothing is chosen by it.
    """
    return rank_correlation(np.array(networks.scores), networks.values("test_accuracy"))


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Returns Spearman's correlation of values (n,) and (n,); None if either is flat, or they are not as many."""
    ranks = _ranks(first), _ranks(second)
    if len(first) != len(second) or not all(values.std() for values in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Returns the rank of each value, or row of values, by the first that differs; equals share their mean rank."""
    _, places, counts = np.unique(values, axis=0, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[places.ravel()]


def similarity_to_originals(networks: JudgedGroup) -> float | None:
    """Returns the mean IoU of wrong predictions with all originals but itself; None for a lone original."""
    known = networks.similarities
    return None if np.isnan(known).all() else float(np.nanmean(known))


def max_similarity(networks: JudgedGroup) -> float | None:
    """Returns the mean over networks of the largest IoU of wrong predictions with an original but itself."""
    known = networks.similarities
    return None if np.isnan(known).all() else float(np.nanmean(np.nanmax(known, axis=1)))


def same_mistakes(networks: JudgedGroup) -> float | None:
    """Returns how often a network and the original most similar to it name the same class, of images both get wrong."""
    originals = unpack_wrong([r.wrong or b"" for r in networks.originals], networks.num_test)
    theirs = _wrong_classes(networks.originals, originals, networks.num_classes)
    if networks.classes is None or theirs is None or np.isnan(networks.similarities).all():
        return None
    nearest = np.nanargmax(networks.similarities, axis=1)
    both = networks.wrong & originals[nearest]
    same = (both & (networks.classes == theirs[nearest])).sum(1)
    known = both.any(1)
    return float(np.mean(same[known] / both.sum(1)[known])) if known.any() else None


Table = Literal["experiment", "sweep"]


def _unknown(networks: JudgedGroup) -> None:
    """Returns nothing: a metric that is read from a summary has been computed."""


@dataclass(frozen=True)
class Metric:
    """A number that is said of a group.

    Attributes:
        field: its name in summaries and in `table.csv`.
        function: gives it; None if it is unknown.
        name: that it is tracked under, after `<group>/`; None if it is not.
        heading: of its column in tables; empty if it has none.
        unit: "percent" shows a fraction in percent, "points" likewise with its sign, "share" without decimals, "signed"
            shows a number with its sign, "plain" as it is.
        legend: says below tables what it is.
        tables: those that have the column.
        least: networks of a group without which tables do not show it.
    """

    field: str
    function: Callable[[JudgedGroup], float | str | None] = _unknown
    name: str | None = None
    heading: str = ""
    unit: Literal["percent", "points", "share", "signed", "plain"] = "plain"
    legend: str = ""
    tables: tuple[Table, ...] = ("experiment", "sweep")
    least: int = 1

    @property
    def about(self) -> dict[str, Any]:
        """All but the function, as JSON values."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "function"}

    def text(self, value: Any, std: float | None = None) -> str:
        """Returns a value, with its standard deviation if there is one, as tables show it."""
        if value is None:
            return "-"
        if self.unit == "share":
            return f"{100 * value:.0f}%"
        if isinstance(value, int):
            return str(value)
        scale = 100 if self.unit in ("percent", "points") else 1
        digits, sign = 3 if self.unit == "plain" else 2, "+" if self.unit in ("points", "signed") else ""
        return f"{scale * value:{sign}.{digits}f}" + ("" if std is None else f"±{scale * std:.{digits}f}")


def tidy(value: Any) -> Any:
    """Returns a number without the digits that only rounding errors make, 0.559 for 0.5589999999999999."""
    if not isinstance(value, float):
        return value
    rounded = float(f"{value:.14g}")
    return rounded if len(repr(rounded)) < len(repr(value)) - 5 else value


SATURATED = 0.001  # training accuracies that differ by less tell nothing
BEST = (
    "*chosen on training images, or on validation images where half of the group fit the training images equally well; "
    "reported on test images."
)
CORRELATION = "rank: correlation of ranks, over the group, of what the best is chosen by with test accuracy."
LEAD = "lead: points of their mean above that of the best simple baseline."
IOU = "IoU: overlap of wrong test predictions within the group, with the originals, and with the most similar original."
SAME = "same: images that a network and its most similar original get wrong in the same way, of those both get wrong."
DISTANCE = "distance: to the nearest member in weight space, relative to the mean distance among members."

_METRICS = (  # in the order of columns
    Metric("networks", lambda group: len(group.records), None, "n", tables=("experiment",)),
    Metric("best", lambda group: group.best.test_accuracy, "best_test_accuracy", "best*", "percent", BEST),
    Metric("best_id", lambda group: group.best.number),
    Metric("chosen_on", lambda group: group.chosen_on),
    Metric(
        "selection_correlation",
        selection_correlation,
        "selection_correlation",
        "rank",
        "signed",
        CORRELATION,
        ("experiment",),
        3,
    ),
    Metric("mean", _of("test_accuracy"), "mean_test_accuracy", "mean", "percent"),
    Metric("mean_lower", _bound("accuracy", "lower"), "mean_test_accuracy_lower", unit="percent"),
    Metric("mean_upper", _bound("accuracy", "upper"), "mean_test_accuracy_upper", unit="percent"),
    Metric("lead", _bound("lead", "estimate"), "samples_lead", "lead", "points", LEAD, ("sweep",)),
    Metric("lead_lower", _bound("lead", "lower"), "samples_lead_lower", unit="points"),
    Metric("lead_upper", _bound("lead", "upper"), "samples_lead_upper", unit="points"),
    Metric("median", _of("test_accuracy", np.median), "median_test_accuracy", "median", "percent"),
    Metric("std", _of("test_accuracy", np.std), "std_test_accuracy", "std", "percent", tables=("experiment",), least=2),
    Metric("failed", failed, "failed", "failed", "share", tables=("sweep",)),
    Metric("mean_loss", _of("test_loss")),
    Metric("train_loss_mean", _of("train_loss"), "mean_train_loss"),
    Metric("validation_loss_mean", _of("validation_loss"), "mean_validation_loss"),
    Metric("train_mean", _of("train_accuracy"), "mean_train_accuracy", unit="percent"),
    Metric("validation_mean", _of("validation_accuracy"), "mean_validation_accuracy", unit="percent"),
    Metric("similarity", lambda group: mean_within(group.wrong), "similarity", "IoU"),
    Metric("similarity_to_originals", similarity_to_originals, "similarity_to_originals", "IoU orig."),
    Metric("max_similarity", max_similarity, "max_similarity", "IoU max", legend=IOU),
    Metric("same_mistakes", same_mistakes, "same_mistakes", "same", "share", SAME, ("experiment",)),
    Metric("nearest_distance", _of("nearest_distance"), "nearest_distance", "distance", legend=DISTANCE),
)
METRICS = {metric.field: metric for metric in _METRICS}


def metrics_of(config: Evaluation) -> Mapping[str, Metric]:
    """Returns all metrics of an evaluation by field, the user's own last.

    A function is shown under its name and explained by the first line of its docstring; a `Metric` says all itself.

    Raises:
        ConfigError: a metric cannot be imported, is neither a function nor a `Metric`, or has the name of another one.
    """
    found = dict(METRICS)
    for path in config.metrics:
        own = imported(path, "evaluation.metrics")
        if not isinstance(own, Metric):
            if not callable(own) or not hasattr(own, "__name__"):
                raise ConfigError(f"evaluation.metrics: {path} is neither a function nor a Metric")
            name, about = own.__name__, (own.__doc__ or "").strip().partition("\n")[0]
            heading = name.replace("_", " ")
            own = Metric(name, own, name, heading, legend=f"{heading}: {about}" if about else "")
        if own.field in found or own.name in {metric.name for metric in found.values()} - {None}:
            raise ConfigError(f"evaluation.metrics: {path} has the name {own.field!r} of another metric; change it")
        found[own.field] = own
    return found


def described(summary: Mapping[str, Any]) -> dict[str, Metric]:
    """Returns the metrics of a summary by field: those of the user's own are described in it."""
    return METRICS | {about["field"]: Metric(**about) for about in summary.get("metrics", ())}


def named_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a summary that are known, by name, such as `generated/best_test_accuracy`."""
    metrics = described(summary)
    numbers = {
        f"{group['group'].replace(' ', '_')}/{metric.name}": group[field]
        for group in summary["groups"]
        for field, metric in metrics.items()
        if metric.name and group.get(field) is not None
    }
    shares = summary["verdict"].get("shares", {})
    numbers |= {f"generated/share_{word.replace('-', '_')}": share for word, share in shares.items()}
    novelty = summary.get("novelty", {})
    facts = {field: novelty.get(field) for field in ("spread", "effective_rank", "members_rank")}
    for yardstick, copying in novelty.get("copying", {}).items():
        facts |= {f"c_t_{yardstick}": copying["c_t"], f"z_{yardstick}": copying["z"]}
    numbers |= {f"novelty/{field}": value for field, value in facts.items() if value is not None}
    for field, found in summary.get("condition", {}).get("correlations", {}).items():
        ends = {"": found["estimate"], "_lower": found["lower"], "_upper": found["upper"]}
        numbers |= {f"generated/asked_{field}{end}": value for end, value in ends.items() if value is not None}
    return numbers


def verdict_words(summary: Mapping[str, Any]) -> dict[str, str]:
    """Returns what a summary says in single words: the verdict, and how accurate samples are beside which baseline."""
    known = {"verdict": "word", "accuracy": "accuracy", "baseline": "baseline"}  # an earlier version has the first
    return {name: word for name, field in known.items() if (word := summary["verdict"].get(field))}
