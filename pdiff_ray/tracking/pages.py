"""Links to MLflow's pages, by the routes of its UI, and descriptions in Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from urllib.parse import quote, urlencode

from pdiff_ray.common.secrets import without_secrets
from pdiff_ray.config.sweep import Sweep
from pdiff_ray.sweeps.ledger import Ledger
from pdiff_ray.tracking.runs import MAX_NOTE, OBJECTIVE, PARENT
from pdiff_ray.tracking.server import Connection, translated

TRAINING = {"workflowType": "machine_learning"}  # MLflow's pages for it, not those for language models
MAX_COMPARED = 100  # runs on a compare page: the best
TRIALS = "tags.kind = 'trial'"
BEST = "generated/best_test_accuracy"  # what trials of no sweep are sorted by


# Addresses, from the `#` on: they hold on any server.


def _address(path: str, **query: str) -> str:
    return f"#/{path}?{urlencode({**query, **TRAINING}, quote_via=quote, safe='')}"


def addresses(
    experiment_id: str, condition: str, metric: str, ascending: bool, runs: Sequence[str] = ()
) -> dict[str, str]:
    """Returns the pages of the trials that meet a condition, by what they show.

    Args:
        metric: that the tables are sorted by.
        runs: of trials with a result, the best first, for the page that compares them.
    """
    order = {"orderByKey": f"metrics.`{metric}`", "orderByAsc": json.dumps(ascending)}
    table, query = f"experiments/{experiment_id}/runs", {"searchFilter": condition, **order}
    found = {"trials": _address(table, **query), "charts": _address(table, **query, compareRunsMode="CHART")}
    if len(runs) > 1:
        chosen = {"runs": list(runs[:MAX_COMPARED]), "experiments": [experiment_id]}
        lists = {name: json.dumps(ids, separators=(",", ":")) for name, ids in chosen.items()}
        found["compare"] = _address("compare-runs", **lists)
    return found


def run_address(experiment_id: str, run: str) -> str:
    """Returns the page of a run."""
    return _address(f"experiments/{experiment_id}/runs/{run}")


def sweep_addresses(
    experiment_id: str, sweep: str, parent: str, ascending: bool, runs: Sequence[str]
) -> dict[str, str]:
    """Returns the pages of a sweep, by what they show.

    Args:
        sweep: the ledger's key.
        parent: the sweep's run.
        ascending: whether the smallest objective is the best.
        runs: of trials with a result, the best first.
    """
    condition = f"{TRIALS} and tags.`pdiff.sweep` = '{sweep}'"
    return {
        "sweep": run_address(experiment_id, parent),
        **addresses(experiment_id, condition, OBJECTIVE, ascending, runs),
    }


def links(uri: str, server: str) -> dict[str, dict[str, str]]:
    """Returns the pages of all experiments of an MLflow by the experiment's name and by what they show.

    An experiment that has been swept has the pages of its latest sweep, and a table of all trials (`all`); another one
    has those of its trials, and its latest run.

    Args:
        server: whose pages they are.

    Raises:
        TrackingError
    """
    import mlflow

    base, found = without_secrets(server), {}
    with translated(uri):
        client = mlflow.MlflowClient(tracking_uri=uri)
        for experiment in client.search_experiments():
            if pages := _pages(Connection(client, experiment.experiment_id)):
                found[experiment.name] = {name: f"{base}/{address}" for name, address in pages.items()}
    return found


def _pages(at: Connection) -> dict[str, str]:
    """Returns the pages of an experiment; none of one that holds no runs of ours."""
    latest = {"order_by": ["start_time DESC"], "max_results": 1}
    if sweeps := at.search("tags.kind = 'sweep' and tags.`pdiff.key` LIKE '%'", **latest):
        (parent,) = sweeps
        ascending = parent.data.params["sweep.metric"].endswith("loss")
        condition = f"tags.`{PARENT}` = '{parent.info.run_id}' and tags.state = 'finished'"
        key, ranked = parent.data.tags["pdiff.key"], _ranked(at, condition, OBJECTIVE, ascending)
        everything = addresses(at.experiment_id, TRIALS, BEST, False)["trials"]
        return {**sweep_addresses(at.experiment_id, key, parent.info.run_id, ascending, ranked), "all": everything}
    if trials := at.search(f"{TRIALS} and tags.`pdiff.key` LIKE '%'", **latest):
        pages = addresses(at.experiment_id, TRIALS, BEST, False, _ranked(at, TRIALS, BEST, False))
        return {"latest": run_address(at.experiment_id, trials[0].info.run_id), **pages}
    return {}


def _ranked(at: Connection, condition: str, metric: str, ascending: bool) -> list[str]:
    """Returns the runs that meet a condition, the best first."""
    order = [f"metrics.`{metric}` {'ASC' if ascending else 'DESC'}"]
    return [run.info.run_id for run in at.search(condition, order_by=order, max_results=MAX_COMPARED)]


def describe_sweep(ledger: Ledger, counts: dict[str, int], best: str, links: dict[str, str], table: str) -> str:
    """Returns a sweep's description: its question, how far it is, links, and the summary's table.

    Args:
        counts: of trials by state.
        best: a few words on the best trial.
        links: addresses by what they show.
        table: in Markdown; as many of its rows are kept as MLflow takes.
    """
    states = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
    parts = [
        f"**{ledger.file.question}**" if ledger.file.question else "",
        f"{ledger.total} trials: {states or 'none has ended yet'}.{' ' if best else ''}{best}",
        " · ".join(f"[{name}]({address})" for name, address in links.items()),
        table,
    ]
    note = "\n\n".join(part for part in parts if part)
    if len(note) <= MAX_NOTE:
        return note
    return note[: note.rfind("\n", 0, MAX_NOTE) + 1]  # half a row would break the table


def settings(sweep: Sweep) -> dict[str, str]:
    """Returns what a sweep varies and how, as parameters of its run: all that makes it another sweep if it changes."""
    described = {
        f"sweep.{name}": str(getattr(sweep, name))
        for name in ("search", "metric", "repeats", "scheduler", "reduction_factor", "seed")
    }
    described["sweep.seeds"] = ", ".join(sweep.seeds)
    for name, parameter in sweep.parameters.items():
        values = ", ".join(map(str, parameter.values))
        if parameter.range:
            values = "{} to {}".format(*parameter.range) + (", logarithmic" if parameter.loguniform else "")
        described[f"sweep.parameters.{name}"] = values
    return described
