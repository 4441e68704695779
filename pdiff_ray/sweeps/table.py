"""The table of a sweep: a row for each combination of values, with means over repeats, or each trial of a search."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.text import Text

from pdiff_ray.common.errors import StorageError
from pdiff_ray.common.progress import console
from pdiff_ray.config.sweep import Assignment, format_value, parts_of
from pdiff_ray.evaluation.metrics import METRICS, Metric, metrics_of, named_metrics, verdict_words
from pdiff_ray.evaluation.similarity import iou, unpack_wrong
from pdiff_ray.reports import tables
from pdiff_ray.stages import report
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.parameters import ParameterStore
from pdiff_ray.sweeps.ledger import AS_IN_THE_FILE, Ledger
from pdiff_ray.sweeps.trial import Trial

# Columns that a narrow table leaves out, first those in front; the others once numbers have lost their deviations, too.
SECONDARY = ("distance", "IoU", "IoU orig.", "lead", "ensemble", "IoU max")
OTHERS = ("median", "failed", "verdict", "original", "baseline")
LEGEND = (
    "Mean ± standard deviation over n seeds. original: mean of the originals; best*, mean, median: of the generated "
    "networks; failed: their share nearer to chance than to the originals; verdict: what they are; baseline: whether "
    "they are better than the best simple one, equal or worse, by the 95 % interval of each result. "
)
WORDS = {"verdict": "verdict", "accuracy": "baseline"}  # headings of what `Row.word` gives
LOWEST, HIGHEST = "generated/lowest_max_similarity", "generated/highest_max_similarity"


@dataclass(frozen=True)
class Statistic:
    """Of a metric over seeds; the sample's standard deviation, none of one seed."""

    mean: float
    std: float | None
    n: int
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistic | None:
        if not values:
            return None
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(float(np.mean(values)), std, len(values), min(values), max(values))


@dataclass(frozen=True)
class Result:
    """One experiment of a trial.

    Attributes:
        metrics: of its evaluation, by name; empty without one.
        words: of its evaluation's verdict, as `metrics.verdict_words` gives them.
        gate: what became of members that were coded and decoded; empty if that is not known.
    """

    trial: Trial
    repeat: int
    artifacts: Mapping[str, Artifact]
    metrics: Mapping[str, float]
    gate: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A combination of values, or a trial of a search, over its seeds.

    Attributes:
        name: of a search's row; a combination has none.
        seeds: how many it has in all.
        trials: those that were begun.
        results: of their experiments, evaluated or not.
    """

    name: str
    assignment: Assignment
    seeds: int
    trials: Sequence[Trial]
    results: Sequence[Result]

    @property
    def evaluated(self) -> int:
        return sum(bool(result.metrics) for result in self.results)

    def statistic(self, metric: str) -> Statistic | None:
        """Returns the statistic of a metric over the seeds that have it."""
        return Statistic.of([result.metrics[metric] for result in self.results if metric in result.metrics])

    def objective(self, metric: str) -> Statistic | None:
        """Returns the statistic of the objective; without an evaluation, that of what the trials had reached."""
        known = [trial.objective for trial in self.trials if trial.objective is not None]
        return self.statistic(metric) or Statistic.of(known)

    def word(self, name: str) -> str | None:
        """Returns a word of the verdicts, and of how many seeds it is if others have another one."""
        return common([result.words[name] for result in self.results if name in result.words])

    @property
    def state(self) -> str:
        """What keeps it from being whole."""
        texts = [_state(trial) for trial in self.trials if trial.state != "finished"]
        alone = self.name or self.seeds == 1
        return ", ".join(text if alone else f"{count} {text}" for text, count in Counter(texts).items())


def common(words: Sequence[str]) -> str | None:
    """Returns the most frequent of some words, with its share if it is not the only one; None of none."""
    if not words:
        return None
    (word, count), *others = Counter(words).most_common()
    return f"{word} {count}/{len(words)}" if others else word


def _state(trial: Trial) -> str:
    if trial.state == "running":
        return "not finished"
    return f"stopped at rung {trial.curve[-1][0]}" if trial.state == "stopped" and trial.curve else trial.state


def table(ledger: Ledger) -> list[Row]:
    """Returns a row for each combination of a grid, or for each trial of a search, the best first.

    The file's own setting stands above a search's trials, if it has been evaluated.
    """
    repeats, numbers = ledger.sweep.repeats, [n for n in sorted(ledger.trials) if n < ledger.total]
    found = ledger.storage.map(lambda number: _results(ledger, ledger.trials[number]), numbers)
    results = dict(zip(numbers, found, strict=True))
    if ledger.sweep.search == "grid":
        grid = ledger.sweep.grid()  # all of it with the first seeds, then with the next
        rows = []
        for first, assignment in enumerate(grid):
            same = [number for number in range(first, ledger.total, len(grid)) if number in results]
            of = [result for number in same for result in results[number]]
            rows.append(Row("", assignment, repeats, [ledger.trials[number] for number in same], of))
        return rows
    order = ("finished", "stopped", "failed", "running")
    sign = -1 if ledger.sweep.maximize else 1
    trials = sorted(
        (ledger.trials[number] for number in numbers),
        key=lambda trial: (order.index(trial.state), sign * (trial.objective or 0.0)),
    )
    plain = _results(ledger, Trial(-1, {}, tuple(range(repeats)), "finished"))
    rows = [Row(AS_IN_THE_FILE, {}, repeats, (), plain)] if any(result.metrics for result in plain) else []
    return rows + [Row(str(t.number), t.assignment, repeats, (t,), results[t.number]) for t in trials]


def _results(ledger: Ledger, trial: Trial) -> list[Result]:
    if not (experiments := ledger.possible(trial)):
        return [Result(trial, repeat, {}, {}) for repeat in trial.repeats]
    results = []
    for repeat, experiment in zip(trial.repeats, experiments, strict=True):
        artifacts = ledger.artifacts(experiment)
        known: Mapping[str, float] = {}
        gate: Mapping[str, Any] = {}
        words: Mapping[str, str] = {}
        if trial.state == "finished" and artifacts["evaluation"].exists():
            try:
                known, words = _metrics(artifacts), verdict_words(report.load_summary(artifacts))
                gate = artifacts["generator"].manifest().info.get("gate", {})
            except StorageError as error:  # one damaged result does not cost the others' table
                console.print("[bold yellow]warning[/]:", Text(str(error)))
        results.append(Result(trial, repeat, artifacts, known, gate, words))
    return results


def _metrics(artifacts: Mapping[str, Artifact]) -> dict[str, float]:
    """Returns those of the summary, and the range behind `generated/max_similarity`."""
    evaluation = artifacts["evaluation"]
    num_test = evaluation.manifest().info["test_images"]
    wrong: dict[str, list[bytes]] = {"original": [], "generated": []}
    for record in ParameterStore(evaluation).records(columns=["wrong"]):
        if record.group in wrong:
            wrong[record.group].append(record.wrong or b"")
    generated, original = (unpack_wrong(wrong[group], num_test) for group in ("generated", "original"))
    largest = iou(generated, original).max(1)
    known = named_metrics(report.load_summary(artifacts))
    return known | {LOWEST: float(largest.min()), HIGHEST: float(largest.max())}


def metrics(ledger: Ledger) -> Mapping[str, Metric]:
    """Returns the metrics of a sweep's evaluations, by field."""
    return metrics_of(ledger.file.experiment.evaluation)


def cells(ledger: Ledger, rows: Sequence[Row], width: float = math.inf) -> list[list[str]]:
    """Returns the table as text, headings first, with as much detail as fits into so many characters."""
    columns = {**WORDS, "original/mean_test_accuracy": "original", "ensemble/mean_test_accuracy": "ensemble"}
    columns |= {f"generated/{m.name}": m.heading for m in metrics(ledger).values() if m.heading and "sweep" in m.tables}
    columns[ledger.sweep.metric] = "objective"
    for shown, spread in _levels(columns):
        found = _cells(ledger, rows, shown, spread)
        if _width(found) <= width:
            break
    return found


def _levels(columns: Mapping[str, str]) -> Iterator[tuple[Mapping[str, str], set[str]]]:
    """Yields columns, and those with a standard deviation, each time with less of them."""
    yield columns, set(columns)
    left, spread = columns, {metric for metric in columns if is_percent(metric)}
    for heads in (SECONDARY, OTHERS):
        yield left, spread
        for head in heads:
            left = {metric: other for metric, other in left.items() if other != head}
            yield left, spread
        spread = set()


def _width(found: Sequence[Sequence[str]]) -> int:
    head, *body = found
    parts = [broken(text).split("\n") for text in head]
    return sum(max(map(len, [*part, *column])) + 1 for part, *column in zip(parts, *body, strict=True))


def broken(head: str) -> str:
    """Breaks a heading into lines wherever its words allow, as columns are narrow."""
    return re.sub(r"(?<=[._ ])(?=\w)", "\n", head)


def _cells(ledger: Ledger, rows: Sequence[Row], columns: Mapping[str, str], spread: set[str]) -> list[list[str]]:
    """Returns the table with some columns.

    Args:
        columns: headings by metric.
        spread: metrics that are shown with their standard deviations.
    """
    searched, unfinished = ledger.sweep.search != "grid", any(row.state for row in rows)
    short = short_names(list(ledger.sweep.parameters))
    found = [[*(["trial"] * searched), *short.values(), "n", *(["state"] * unfinished), *columns.values()]]
    for row in rows:
        values = [format_value(row.assignment[name]) if name in row.assignment else "" for name in short]
        n = str(row.evaluated) if row.evaluated == row.seeds else f"{row.evaluated}/{row.seeds}"
        numbers = []
        for metric, head in columns.items():
            if metric in WORDS:
                numbers.append(row.word(metric) or "-")
                continue
            statistic = row.objective(metric) if head == "objective" else row.statistic(metric)
            numbers.append(number(metric, statistic, metric in spread, metrics(ledger)))
        found.append([*([row.name] * searched), *values, n, *([row.state] * unfinished), *numbers])
    return found


def named(metric: str, metrics: Mapping[str, Metric] = METRICS) -> Metric:
    """Returns what a name like `generated/mean_test_accuracy` stands for; a plain number if nothing has the name."""
    name = metric.partition("/")[2]
    return next((known for known in metrics.values() if known.name == name), Metric(name))


def is_percent(metric: str) -> bool:
    """Returns whether a metric is shown in percent."""
    return named(metric).unit == "percent"


def number(
    metric: str, statistic: Statistic | None, spread: bool = True, metrics: Mapping[str, Metric] = METRICS
) -> str:
    """Returns a metric over seeds as text: its mean, with the standard deviation if `spread`."""
    if statistic is None:
        return "-"
    return named(metric, metrics).text(statistic.mean, statistic.std if spread else None)


def amount(metric: str, value: float) -> str:
    """Returns a metric as sentences have it, with its unit."""
    return f"{named(metric).text(value)}{' %' if is_percent(metric) else ''}"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Shortens dotted paths to as many of their last parts as tell them from each other."""

    def tails(name: str) -> Iterator[str]:
        parts = parts_of(name)
        return (".".join(parts[-count:]) for count in range(1, len(parts) + 1))

    def alone(tail: str) -> bool:
        return sum(f".{name}".endswith(f".{tail}") for name in names) == 1

    return {name: next((tail for tail in tails(name) if alone(tail)), name) for name in names}


def assignment_text(ledger: Ledger, assignment: Assignment) -> str:
    short = short_names(list(ledger.sweep.parameters))
    return ", ".join(f"{short[name]} {format_value(value)}" for name, value in assignment.items())


def legend(ledger: Ledger) -> str:
    unit = " in percent" if is_percent(ledger.sweep.metric) else ""
    return f"{LEGEND}{tables.legend(metrics(ledger), 'sweep')} objective: {ledger.sweep.metric}{unit}."
