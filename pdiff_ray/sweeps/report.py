"""The results of a sweep: its verdict, tables, figures and HTML page, made from its ledger and artifacts alone."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from pdiff_ray.config.sweep import Assignment, Value, as_value
from pdiff_ray.evaluation.comparison import student
from pdiff_ray.evaluation.metrics import tidy
from pdiff_ray.stages import report
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.sealed import write_listed
from pdiff_ray.sweeps import figures as sweep_figures
from pdiff_ray.sweeps import search
from pdiff_ray.sweeps.figures import Panel, Search, Slice, are_numbers
from pdiff_ray.sweeps.ledger import AS_IN_THE_FILE, Ledger
from pdiff_ray.sweeps.table import (
    HIGHEST,
    LOWEST,
    WORDS,
    Result,
    Row,
    Statistic,
    amount,
    assignment_text,
    broken,
    cells,
    is_percent,
    legend,
    number,
    short_names,
    table,
)
from pdiff_ray.sweeps.trial import Trial

REPORT_FILE, SUMMARY_FILE, TRIALS_FILE, TABLE_FILE = "report.html", "summary.csv", "trials.csv", "summary.md"
CAPTIONS = {
    "accuracy": "Test accuracy of the generated networks: best (chosen without test images), average and median. Error "
    "bars: standard deviation over seeds.",
    "similarity": "Largest similarity (IoU of wrong test predictions) of a generated network with an original: range "
    "over all seeds and networks, average, and its standard deviation over seeds.",
    "history": "Objective of every trial, and the best so far.",
    "importances": "Importance of the parameters by fANOVA, of the finished trials; those that apply only under a "
    "condition are left out.",
    "slices": "Objective against each parameter.",
}


def headline(ledger: Ledger) -> str:
    """Returns in words how many trials of a sweep have finished, were stopped or failed, and are still to come."""
    counts = Counter(trial.state for trial in ledger.done())
    parts = [f"{counts['finished']} of {ledger.total} trials finished"]
    parts += [f"{counts[state]} {state}" for state in ("stopped", "failed") if counts[state]]
    to_come = ledger.total - counts.total()
    return ", ".join(parts) + (f", {to_come} still to come" if to_come else "")


def warning(rows: Sequence[Row]) -> str:
    """Returns a text about the results whose encoder loses accuracy, empty if there are none."""
    gated = [result for row in rows for result in row.results if result.gate]
    failed = [result for result in gated if not result.gate["passed"]]
    if not failed:
        return ""
    names = dict.fromkeys(str(r.trial.number) if r.trial.number >= 0 else AS_IN_THE_FILE for r in failed)
    return (
        f"The encoder loses accuracy in {len(failed)} of {len(gated)} results (trials {', '.join(names)}): no "
        "sample can be better than the decoded members, see the trials' reports. Raise generator.autoencoder.steps or "
        "latent_dim; of a subspace, generator.encoder.rank or variance."
    )


def verdict(ledger: Ledger) -> str | None:
    """Returns in words whether a search has found a better setting than the file's own.

    None for a grid, or if no trial has finished.
    """
    best, confirmation = ledger.best(), ledger.confirmation()
    if ledger.sweep.search == "grid" or best is None:
        return None
    return _verdict(ledger, best, table(confirmation) if confirmation else [])


def _verdict(ledger: Ledger, best: Trial, compared: Sequence[Row]) -> str:
    """Returns the verdict of a search.

    Args:
        best: the trial with the best objective.
        compared: the rows of the confirmation: the file's own setting, then that of the best trial, with seeds that the
            search has not seen. Empty if there is no confirmation yet.
    """
    metric = ledger.sweep.metric
    named = f"trial {best.number} ({assignment_text(ledger, best.assignment)})"
    results = [{r.repeat: r.metrics for r in row.results if r.metrics} for row in compared]
    own, winner = results or ({}, {})
    seeds = sorted(own.keys() & winner.keys())
    if not seeds:
        reached = amount(metric, best.objective or 0.0)
        return (
            f"The best so far is {named}, with {metric} {reached}. Whether that beats the file's own setting with "
            "other seeds has not been measured."
        )
    sign = 1 if ledger.sweep.maximize else -1
    gains = [sign * (winner[seed][metric] - own[seed][metric]) for seed in seeds]

    def both(name: str) -> str:
        mine, other = (number(name, Statistic.of([of[seed][name] for seed in seeds])) for of in (winner, own))
        return f"{mine} against {other}"

    better = f"better in {sum(gain > 0 for gain in gains)} of {len(gains)} seeds that the search has not seen"
    numbers = f"{metric} {both(metric)}, {better}"
    test = f"mean test accuracy {both('generated/mean_test_accuracy')} %, which chose nothing"
    gain = float(np.mean(gains))
    # Seeds are paired, and few: Student's interval, which one seed does not have.
    reach = (
        student(len(gains) - 1) * float(np.std(gains, ddof=1)) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
    )
    if gain > reach:
        word = "beats the file's own setting"
    elif gain > 0:
        word = "is ahead of the file's own setting by no more than chance may be"
    else:
        return f"The search has not beaten the file's own setting: its best, {named}, has {numbers}; {test}."
    finished = sum(trial.state == "finished" for trial in ledger.done())
    return f"The best of {finished} finished trials, {named}, {word}: {numbers}; {test}."


def write(ledger: Ledger) -> list[Row]:
    """Writes the tables, figures and page into the sweep's folder, replacing earlier ones; returns the table's rows."""
    rows = table(ledger)
    pngs = figures(ledger, rows)
    files = {f"{name}.png": png for name, png in pngs.items()}
    files[SUMMARY_FILE] = _csv(summary_lines(ledger, rows))
    files[TRIALS_FILE] = _csv([_trial_line(ledger, row, result) for row in rows for result in row.results])
    parts = (headline(ledger), report.markdown(cells(ledger, rows)), verdict(ledger), warning(rows), legend(ledger))
    files[TABLE_FILE] = "\n\n".join(part for part in parts if part).encode()
    files[REPORT_FILE] = _page(ledger, rows, pngs).encode()
    write_listed(ledger.storage, ledger.folder, files)
    return rows


def figures(ledger: Ledger, rows: Sequence[Row]) -> dict[str, bytes]:
    """Returns the figures of a sweep as PNG bytes, by name; those without anything to show are left out."""
    if ledger.sweep.search != "grid":
        return _search_figures(ledger, rows)
    if not any(row.evaluated for row in rows):
        return {}
    accuracy = {
        "best": "generated/best_test_accuracy",
        "average": "generated/mean_test_accuracy",
        "median": "generated/median_test_accuracy",
        "originals": "original/mean_test_accuracy",
    }
    similarity = {
        "smallest": LOWEST,
        "average": "generated/max_similarity",
        "largest": HIGHEST,
        "originals": "original/max_similarity",
    }
    return {
        "accuracy": sweep_figures.accuracy_over(_panels(ledger, rows, accuracy)),
        "similarity": sweep_figures.similarity_over(_panels(ledger, rows, similarity)),
    }


def _panels(ledger: Ledger, rows: Sequence[Row], curves: Mapping[str, str]) -> list[Panel]:
    """Returns panels, each of the rows that differ in one parameter only, which is the panel's x axis.

    This parameter is one whose values are numbers if there is one, and else the one with the most values.

    Args:
        curves: the metric that each curve shows, by the name of the curve.
    """
    parameters = ledger.sweep.parameters
    short = short_names(list(parameters))
    first = sorted(parameters, key=lambda n: (not are_numbers(parameters[n].values), -len(parameters[n].values)))
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        x = next(name for name in first if name in row.assignment)
        title = assignment_text(ledger, {name: value for name, value in row.assignment.items() if name != x})
        groups.setdefault((x, title), []).append(row)
    panels = []
    for (x, title), members in groups.items():
        if are_numbers(parameters[x].values):
            members.sort(key=lambda row: float(row.assignment[x] or 0))
        points = {
            # None becomes NaN.
            curve: np.array([_point(row.statistic(metric)) for row in members], float)
            for curve, metric in curves.items()
        }
        panels.append(Panel(title, short[x], [row.assignment[x] for row in members], points))
    return panels


def _point(known: Statistic | None) -> tuple[float | None, ...]:
    """Returns mean, standard deviation, minimum and maximum, None where they are not known."""
    return (known.mean, known.std, known.lowest, known.highest) if known else (None,) * 4


def _search_figures(ledger: Ledger, rows: Sequence[Row]) -> dict[str, bytes]:
    sweep, done = ledger.sweep, ledger.done()
    scale = 100 if is_percent(sweep.metric) else 1

    def objectives(state: str) -> dict[int, float]:
        return {t.number: scale * t.objective for t in done if t.state == state and t.objective is not None}

    finished = objectives("finished")
    if not finished:
        return {}
    own = rows[0].statistic(sweep.metric) if rows[0].name == AS_IN_THE_FILE else None
    group, _, quantity = sweep.metric.partition("/")
    seen = Search(
        objective=f"{group}: {quantity.replace('_', ' ')}{' (%)' if scale == 100 else ''}",
        maximize=sweep.maximize,
        finished=finished,
        stopped=objectives("stopped"),
        failed=[t.number for t in done if t.state == "failed"],
        reference=None if own is None else scale * own.mean,
    )
    pngs = {"history": sweep_figures.history(seen)}
    short = short_names(list(sweep.parameters))
    if shares := _importances(ledger):
        pngs["importances"] = sweep_figures.importances({short[name]: share for name, share in shares.items()})
    slices = []
    for name, parameter in sweep.parameters.items():
        values = {t.number: t.assignment[name] for t in done if name in t.assignment}
        choices = None if parameter.range else parameter.values
        if not values.keys() & (seen.finished.keys() | seen.stopped.keys()):
            continue
        slices.append(Slice(short[name], values, choices, log=parameter.loguniform is not None))
    pngs["slices"] = sweep_figures.slices(seen, slices)
    return pngs


def _importances(ledger: Ledger) -> dict[str, float]:
    """Returns the share in the objective's variance of parameters that all trials have: fANOVA, Hutter et al. 2014."""
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    if len({trial.objective for trial in ledger.done() if trial.state == "finished"}) < 2:
        return {}
    study = search.study_of(ledger.sweep, ledger.done())
    return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))


def summary_lines(ledger: Ledger, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns the rows of the table with all metrics, as JSON values; all have the same keys."""
    lines = [_summary_line(ledger, row) for row in rows]
    names = dict.fromkeys(name for line in lines for name in line)
    return [{name: line.get(name) for name in names} for line in lines]


def _summary_line(ledger: Ledger, row: Row) -> dict[str, Any]:
    line: dict[str, Any] = {"trial": row.name} if row.name else {}
    line |= _settings(ledger, row.assignment) | {"seeds": row.seeds, "evaluated": row.evaluated, "state": row.state}
    line |= {name: row.word(name) for name in WORDS}
    statistics = {"objective": row.objective(ledger.sweep.metric)}
    statistics |= {name: row.statistic(name) for name in dict.fromkeys(n for r in row.results for n in r.metrics)}
    for name, found in statistics.items():
        if found is not None:
            line |= {name: found.mean, f"{name}_std": found.std, f"{name}_n": found.n}
    return line


def _trial_line(ledger: Ledger, row: Row, result: Result) -> dict[str, Any]:
    trial = result.trial
    return {
        "trial": trial.number if row.trials else row.name,
        "repeat": result.repeat,
        **_settings(ledger, row.assignment),
        "state": trial.state,
        "reason": trial.reason,
        "seconds": trial.seconds,
        "objective": result.metrics.get(ledger.sweep.metric, trial.objective),
        **{stage: artifact.key for stage, artifact in result.artifacts.items()},
        **{name: result.words.get(name) for name in WORDS},
        **result.metrics,
    }


def _settings(ledger: Ledger, assignment: Assignment) -> dict[str, Value]:
    """Returns the value of every field that the sweep varies, by dotted path; None where the assignment sets none."""
    settings: dict[str, Value] = dict.fromkeys([*ledger.sweep.parameters, *ledger.sweep.paths])
    settings |= {path: as_value(value) for path, value in ledger.file.fields(assignment).items()}
    return settings | assignment


def _csv(lines: Sequence[Mapping[str, Any]]) -> bytes:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, fieldnames=list(dict.fromkeys(name for line in lines for name in line)))
    writer.writeheader()
    writer.writerows({name: tidy(value) for name, value in line.items()} for line in lines)
    return sink.getvalue().encode()


def _page(ledger: Ledger, rows: Sequence[Row], pngs: Mapping[str, bytes]) -> str:
    experiment, sweep = ledger.file.experiment, ledger.sweep
    results = [result for row in rows for result in row.results]
    head, *body = cells(ledger, rows)
    configuration = experiment.model_dump(mode="json", exclude={"storage", "tracking"})
    configuration["sweep"] = sweep.model_dump(mode="json", by_alias=True, exclude_none=True)
    return report.render(
        "sweep.html.jinja",
        name=experiment.name,
        question=ledger.file.question,
        headline=headline(ledger),
        verdict=verdict(ledger),
        warning=warning(rows),
        rows=[[broken(text) for text in head], *body],
        legend=legend(ledger),
        figures=[(CAPTIONS[name], base64.b64encode(png).decode()) for name, png in pngs.items()],
        failed=[t for t in ledger.done() if t.state == "failed"],
        reports=[(result, _link(result.artifacts["report"])) for result in results if result.metrics],
        files=[SUMMARY_FILE, TRIALS_FILE, TABLE_FILE, *(f"{name}.png" for name in pngs)],
        configuration=yaml.safe_dump(configuration, sort_keys=False),
    )


def _link(artifact: Artifact) -> str | None:
    """Returns the address of a report relative to the sweep's folder, or None if there is no report."""
    if not artifact.exists():
        return None
    return f"../../{artifact.folder}/{artifact.manifest().files[report.REPORT_FILE].path}"
