"""What the run of a sweep's trial says.

A trial of a search with several repeats is one run with means over them: what the search compares is the setting, and
the compare page then has a line for each. The repeats of a grid are trials, and runs, of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np

from pdiff_ray.config.schema import SEEDED, Experiment
from pdiff_ray.config.section import flat
from pdiff_ray.config.sweep import format_value
from pdiff_ray.storage.sealed import digest
from pdiff_ray.sweeps.ledger import Ledger
from pdiff_ray.sweeps.table import common
from pdiff_ray.sweeps.trial import Trial
from pdiff_ray.tracking.runs import MAX_NOTE, OBJECTIVE, MlflowRun, now, tracked

MAX_NAME = 50  # characters of a run's name
STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED", "incomplete": "KILLED"}  # by state
VERDICT = ("verdict", "accuracy", "baseline")  # tags of results that a run of several repeats has, too

Value = TypeVar("Value")


def name_of(trial: Trial) -> str:
    """Returns number and values of a trial, short enough for a legend."""
    text = f"{trial.number:02d} {trial.text}"
    return text if len(text) <= MAX_NAME else f"{text[: MAX_NAME - 1]}…"


def fingerprint(trial: Trial) -> str:
    """Returns a hash of all that is known of a trial."""
    return short_digest(json.dumps(asdict(trial), sort_keys=True))


def short_digest(text: str) -> str:
    """Returns the first 16 digits of a text's SHA-256."""
    return digest(text.encode())[:16]


def run_of(ledger: Ledger, trial: Trial, results: Sequence[MlflowRun], tags: Mapping[str, str], note: str) -> MlflowRun:
    """Returns the run of a trial that has ended.

    Args:
        results: runs of the experiments of a finished trial; empty if they are gone.
        tags: beside its own.
        note: its description, where neither a failure nor the results have one.
    """
    # A search may have combined values that do not fit together.
    experiment = (ledger.possible(trial) or [ledger.file.experiment])[0]
    keys = "".join(run.key for run in results)
    ended = max((run.ended for run in results), default=now())
    seconds = trial.seconds or 0.0
    # The first metric is the one that a compare page shows.
    metrics = {} if trial.objective is None else {OBJECTIVE: trial.objective}
    metrics |= {name: float(np.mean(values)) for name, values in _shared([run.metrics for run in results]).items()}
    curves = {
        name: [(points[0][0], float(np.mean([value for _, value in points]))) for points in zip(*same, strict=False)]
        for name, same in _shared([run.curves for run in results]).items()
    }
    files = {
        (f"repeat-{repeat}/{name}" if len(results) > 1 else name): content
        for repeat, run in zip(trial.repeats, results, strict=False)
        for name, content in run.files.items()
    }
    own = {
        "state": trial.state,
        "seed": str(experiment.seed),
        "pdiff.sweep": ledger.key,
        "pdiff.trial": str(trial.number),
        "pdiff.record": fingerprint(trial),
    }
    words = _shared([run.tags for run in results])
    own |= {name: word for name in VERDICT if (word := common(words.get(name, ())))}
    own |= {name: results[0].tags[name] for name in ("pdiff.version", "pdiff.location") if results}
    if trial.reason:
        own["reason"] = trial.reason[:MAX_NOTE]
        note = f"**failed:** {trial.reason}"
    return MlflowRun(
        kind="trial",
        key=short_digest(keys) if len(results) > 1 else keys or f"{ledger.key}-{trial.number}",
        name=name_of(trial),
        started=min((run.started for run in results), default=ended - int(1000 * seconds)),
        ended=ended,
        tags={**tags, **own},
        params=_params(ledger, trial, experiment),
        metrics={**metrics, "seconds/trial": seconds},
        curves={**curves, **({"rung/objective": trial.curve} if trial.curve else {})},
        files=files,
        note=note or "\n\n".join(run.note for run in results),
        status=STATUS[trial.state],
        # Of several repeats the best networks and the splits are several; their runs' metrics are means.
        data=results[0].data if results else (),
        models=results[0].models if len(results) == 1 else (),
    )


def _shared(of: Sequence[Mapping[str, Value]]) -> dict[str, list[Value]]:
    """Returns the values of the names that all have."""
    first = of[0] if of else {}
    return {name: [values[name] for values in of] for name in first if all(name in values for values in of)}


def _params(ledger: Ledger, trial: Trial, experiment: Experiment) -> dict[str, str]:
    """Returns parameters, the same for all trials, as comparing asks for: what varies, the seeds, the configuration."""
    sweep = ledger.sweep
    configuration = dict(flat(tracked(experiment)))
    chosen = {
        name: format_value(trial.assignment[name]) if name in trial.assignment else _text(configuration.get(name))
        for name in sweep.parameters
    }
    seeds = {path: str(configuration[path]) for path in ("seed", *sweep.seeds)}
    # Seeds that sections take from the experiment say nothing more than it does.
    raw, varied = ledger.file.raw, {*sweep.seeds, *sweep.parameters}
    taken = {f"{s}.seed" for s in SEEDED if f"{s}.seed" not in varied and "seed" not in (raw.get(s) or {})}
    touched = tuple(f"{path}." for path in sweep.paths)
    rest = {
        # What no trial sets is left out; what only some set must not be.
        path: _text(value)
        for path, value in configuration.items()
        if path not in taken and path not in chosen and (value is not None or f"{path}.".startswith(touched))
    }
    return chosen | seeds | rest


def _text(value: Any) -> str:
    return "-" if value is None else str(value)
