"""MLflow's pages made useful: links that lead to the right columns and charts, and descriptions in Markdown.

A view is a state of the runs page that MLflow keeps in a tag of the experiment and shows where a link names it. Only so
can columns and charts be chosen for whoever opens the page.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from pdiff_ray.config.sweep import Sweep
from pdiff_ray.sweeps.ledger import Ledger
from pdiff_ray.tracking.runs import MAX_NOTE, PARENT
from pdiff_ray.tracking.server import Connection, translated, without_secret

VIEW = "mlflow.sharedViewState."
TRAINING = "workflowType=machine_learning"  # MLflow's pages for it, not those for language models
MAX_COMPARED = 100  # runs on a compare page: the best
RESULTS = ("objective", "generated/best_test_accuracy", "generated/mean_test_accuracy", "generated/similarity")


def columns(kind: str, names: Sequence[str]) -> list[str]:
    """Columns of the runs table: of params, metrics or tags."""
    return [f"{kind}.`{name}`" for name in names]


def view(condition: str, order: str, ascending: bool, shown: Sequence[str], **more: Any) -> dict[str, Any]:
    """A state of the runs page."""
    return {
        "searchFilter": condition,
        "orderByKey": order,
        "orderByAsc": ascending,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": shown,
        "columnOrder": shown,
        "columnWidths": {column: max(90, 60 + 6 * len(column.split("`")[1])) for column in shown},  # pixels
        "runsHiddenMode": "SHOW_ALL",
        **more,
    }


def general_views() -> dict[str, str]:
    """Tags of an experiment: views of all its runs, which MLflow lists by name."""
    best = "metrics.`generated/best_test_accuracy`"
    shown = columns("metrics", ("ensemble/best_test_accuracy", "original/best_test_accuracy", *RESULTS[1:]))
    states = {
        "runs": ("pdiff: runs", view("", best, False, shown)),
        "sweeps": (
            "pdiff: trials by sweep",
            view(
                "tags.kind = 'trial'",
                "metrics.`objective`",
                False,
                columns("metrics", RESULTS),
                **_charts((), curves=("diffusion/loss", "rung/objective")),
                **_grouped("tag", ["sweep"]),
            ),
        ),
    }
    made = int(time.time() * 1000)
    return {
        f"{VIEW}pdiff-{key}": json.dumps({"name": name, "createdAt": made, "state": json.dumps(state)})
        for key, (name, state) in states.items()
    }


def sweep_views(ledger: Ledger) -> dict[str, str]:
    """Tags of an experiment: views of one sweep, which links lead to: its table of trials, and its charts."""
    sweep = ledger.sweep
    varied = [*sweep.parameters, *(sweep.seeds if sweep.repeats > 1 and sweep.search == "grid" else ())]
    shown = [
        *columns("params", varied),
        *columns("metrics", (*RESULTS, "seconds/trial")),
        *columns("tags", ["state"]),
    ]
    condition = f"tags.kind = 'trial' and tags.`pdiff.sweep` = '{ledger.key}'"
    curves = ("diffusion/loss", *(("rung/objective",) if sweep.scheduler == "asha" else ()))
    charts = _charts(varied, curves)
    if sweep.repeats > 1 and sweep.search == "grid":  # means over seeds
        charts |= _grouped("param", list(sweep.parameters))
    common = (condition, "metrics.`objective`", not sweep.maximize, shown)
    states = {"trials": view(*common), "charts": view(*common, **charts)}
    return {f"{VIEW}{ledger.key}-{name}": json.dumps(state) for name, state in states.items()}


def _grouped(mode: str, names: Sequence[str]) -> dict[str, Any]:
    keys = [{"mode": mode, "groupByData": name} for name in names]
    return {"groupBy": {"aggregateFunction": "average", "groupByKeys": keys}}


def _charts(varied: Sequence[str], curves: Sequence[str]) -> dict[str, Any]:
    """Parallel coordinates of what varies, bars of the results, lines of the curves."""
    section = "pdiff"
    cards: list[dict[str, Any]] = [{"type": "BAR", "metricKey": name} for name in RESULTS]
    if varied:
        cards.insert(0, {"type": "PARALLEL", "selectedParams": list(varied), "selectedMetrics": [RESULTS[0]],
                         "showAllRuns": True})  # fmt: skip
    cards += [{"type": "LINE", "metricKey": name, "selectedMetricKeys": [name], "xAxisKey": "step",
               "xAxisScaleType": "linear", "scaleType": "linear", "lineSmoothness": 0,
               "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True} for name in curves]  # fmt: skip
    common = {"metricSectionId": section, "deleted": False, "isGenerated": False, "runsCountToCompare": 100}
    return {
        "compareRunCharts": [{"uuid": f"{section}-{n}", **common, **card} for n, card in enumerate(cards)],
        "compareRunSections": [
            {"uuid": section, "name": "Sweep", "display": True, "isReordered": False, "deleted": False,
             "isGenerated": False}
        ],
        "isAccordionReordered": True,  # else the section comes after MLflow's own
    }  # fmt: skip


# Addresses, from the `#` on: they hold on any server.


def view_address(experiment_id: str, name: str, *, charts: bool = False) -> str:
    mode = "&compareRunsMode=CHART" if charts else ""
    return f"#/experiments/{experiment_id}/runs?{TRAINING}&viewStateShareKey={name}{mode}"


def sweep_addresses(experiment_id: str, key: str, parent: str, children: Sequence[str]) -> dict[str, str]:
    """Pages of a sweep.

    Args:
        key: the ledger's.
        parent: its run.
        children: runs of trials with a result, the best first.
    """
    found = {
        "sweep": f"#/experiments/{experiment_id}/runs/{parent}?{TRAINING}",
        "trials": view_address(experiment_id, f"{key}-trials"),
        "charts": view_address(experiment_id, f"{key}-charts", charts=True),
    }
    if len(children) > 1:
        runs = quote(json.dumps(list(children[:MAX_COMPARED]), separators=(",", ":")), safe="")
        found["compare"] = (
            f"#/compare-runs?runs={runs}&experiments={quote(json.dumps([experiment_id]), safe='')}&{TRAINING}"
        )
    return found


@dataclass(frozen=True)
class Links:
    """Pages of an experiment.

    Attributes:
        pages: addresses by what they show; those of a sweep are of the latest.
    """

    experiment: str
    pages: dict[str, str]


def links(uri: str, server: str) -> Iterator[Links]:
    """The pages of all experiments of an MLflow, on a server at `server`.

    Raises:
        TrackingError
    """
    import mlflow

    with translated(uri):
        client = mlflow.MlflowClient(tracking_uri=uri)
        for experiment in client.search_experiments():
            if f"{VIEW}pdiff-runs" not in experiment.tags:
                continue  # of something else
            at = Connection(client, experiment.experiment_id)
            pages = {"runs": view_address(at.experiment_id, "pdiff-runs")}
            if sweeps := at.search("tags.kind = 'sweep'", order_by=["start_time DESC"], max_results=1):
                (parent,) = sweeps
                ascending = parent.data.params["sweep.metric"].endswith("loss")
                children = [run.info.run_id for run in children_of(at, parent.info.run_id, ascending)]
                key = parent.data.tags["pdiff.key"]
                pages |= sweep_addresses(at.experiment_id, key, parent.info.run_id, children)
                pages["sweeps"] = view_address(at.experiment_id, "pdiff-sweeps", charts=True)
            base = without_secret(server)
            yield Links(experiment.name, {name: f"{base}/{address}" for name, address in pages.items()})


def children_of(at: Connection, parent: str, ascending: bool) -> list[Any]:
    """The trials of a sweep that have a result, the best first."""
    order = f"metrics.objective {'ASC' if ascending else 'DESC'}"
    condition = f"tags.`{PARENT}` = '{parent}' and tags.state = 'finished'"
    return at.search(condition, order_by=[order], max_results=MAX_COMPARED)


def describe_sweep(ledger: Ledger, counts: dict[str, int], best: str, addresses: dict[str, str], table: str) -> str:
    """A sweep's description: its question, how far it is, links, and the summary's table.

    Args:
        counts: of trials by state.
        best: a few words on the best trial.
    """
    states = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
    parts = [
        f"**{ledger.file.question}**" if ledger.file.question else "",
        f"{ledger.total} trials: {states or 'none has ended yet'}.{' ' if best else ''}{best}",
        " · ".join(f"[{name}]({address})" for name, address in addresses.items()),
        table,
    ]
    lines = "\n\n".join(part for part in parts if part).splitlines(keepends=True)
    kept, size = [], 0
    for line in lines:  # whole lines, as half a row would break the table
        size += len(line)
        if size > MAX_NOTE:
            break
        kept.append(line)
    return "".join(kept)


def settings(sweep: Sweep) -> dict[str, str]:
    """What a sweep varies and how, as parameters of its run: all that makes it another sweep if it changes."""
    described = {
        f"sweep.{name}": str(getattr(sweep, name))
        for name in ("search", "metric", "repeats", "scheduler", "reduction_factor", "seed")
    }
    described["sweep.seeds"] = ", ".join(sweep.seeds)
    for name, parameter in sweep.parameters.items():
        if parameter.range:
            low, high = parameter.range
            scale = ", logarithmic" if parameter.loguniform else ""
            described[f"sweep.parameters.{name}"] = f"{low} to {high}{scale}"
        else:
            described[f"sweep.parameters.{name}"] = ", ".join(map(str, parameter.labels))
    return described
