"""What runs say of zoos and trials, and how one is written."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pdiff_ray.config.schema import Experiment
from pdiff_ray.evaluation.metrics import named_metrics
from pdiff_ray.stages.base import HISTORY_FILE
from pdiff_ray.stages.evaluation import SUMMARY_FILE
from pdiff_ray.stages.table import STAGES
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.trees import load_tree
from pdiff_ray.tracking.server import Connection, Mark, connect, experiment_name, tracking_uri, translated

MAX_METRICS, MAX_PARAMS = 1000, 100  # per call, MLflow's limits
MAX_POINTS = 500  # of a curve
MAX_NOTE = 8000  # characters of a description, MLflow's limit
UNTRACKED = ("resources", "tracking", "storage")  # sections that say where things run
PARENT, NOTE = "mlflow.parentRunId", "mlflow.note.content"  # MLflow's tags

Curve = Sequence[tuple[int, float]]  # step, value


@dataclass(frozen=True)
class Run:
    """What a run says. Times are in milliseconds since 1970, as MLflow has them."""

    kind: str  # zoo, trial or sweep
    key: str
    name: str
    started: int
    ended: int
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    note: str = ""  # its description, in Markdown
    status: str = "FINISHED"


def record(experiment: Experiment, artifacts: Mapping[str, Artifact], *, anew: bool = False) -> bool:
    """Writes the runs of a finished experiment that are not there yet.

    Args:
        anew: look at MLflow even if they were written once.

    Returns:
        Whether there was anything to write.

    Raises:
        TrackingError
    """
    storage = artifacts["report"].storage
    uri, name = tracking_uri(experiment, storage), experiment_name(experiment)
    mark = Mark(storage, uri, name, artifacts["report"].key)
    if mark.is_there() and not anew:
        return False
    with translated(uri):
        # MLflow imports seconds of packages, so only where there is something to write.
        at = connect(uri, name, storage)
        written = [ensure(at, make(experiment, artifacts)) for make in (zoo_run, trial_run)]
    mark.leave()
    return any(written)


def ensure(at: Connection, run: Run) -> bool:
    """Writes a run of its own, no sweep's, unless it is there; gives whether it was written."""
    for old in at.search(f"tags.`pdiff.key` = '{run.key}' and tags.kind = '{run.kind}'"):
        if old.info.status == "FINISHED":
            return False
        if PARENT not in old.data.tags:  # left by an interrupted attempt
            at.client.delete_run(old.info.run_id)
    write(at, run)
    return True


def write(at: Connection, run: Run) -> str:
    """Writes a run and gives its id. It is RUNNING until all of it is there, so that what a crash leaves is known."""
    from mlflow.entities import Metric, Param

    tags = {"kind": run.kind, "pdiff.key": run.key, **run.tags}
    if run.note:
        tags[NOTE] = run.note[:MAX_NOTE]
    created = at.client.create_run(at.experiment_id, run_name=run.name, tags=tags, start_time=run.started)
    run_id: str = created.info.run_id
    params = [Param(path, value[:500]) for path, value in run.params.items()]
    for start in range(0, len(params), MAX_PARAMS):
        at.client.log_batch(run_id, params=params[start : start + MAX_PARAMS])
    points = [Metric(name, float(value), run.ended, 0) for name, value in run.metrics.items()]
    for name, curve in run.curves.items():
        every = max(1, len(curve) // MAX_POINTS)
        points += [Metric(name, float(value), run.ended, step) for step, value in curve[::every]]
    for start in range(0, len(points), MAX_METRICS):
        at.client.log_batch(run_id, metrics=points[start : start + MAX_METRICS])
    write_files(at, run_id, run.files)
    at.client.set_terminated(run_id, run.status, end_time=run.ended)
    return run_id


def write_files(at: Connection, run_id: str, files: Mapping[str, bytes]) -> None:
    """Writes a run's artifacts."""
    if not files:
        return
    with tempfile.TemporaryDirectory() as folder:
        for path, content in files.items():
            target = Path(folder) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        at.client.log_artifacts(run_id, folder)


def zoo_run(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> Run:
    """A zoo and the base that it was trained from."""
    zoo, base = artifacts["zoo"], artifacts["base"]
    trained = base.manifest()
    metrics = {k: v for k, v in zoo.manifest()["info"].items() if k.endswith("_test_accuracy")}
    metrics |= {f"base/{k}": v for k, v in trained["info"].items() if k.endswith("_accuracy")}
    # An imported base has no history.
    history = load_tree(base.read(HISTORY_FILE), base.location) if HISTORY_FILE in trained["files"] else {}
    configuration = experiment.model_dump(mode="json", include={"data", "network", "training", "zoo"})
    return Run(
        kind="zoo",
        key=zoo.key,
        name=f"zoo-{zoo.key[:6]}",
        **_made(experiment, artifacts, ("base", "zoo")),
        params={path: str(value) for path, value in flat(configuration) if value is not None},
        metrics=metrics,
        curves={f"base/{name}": list(enumerate(values.tolist())) for name, values in history.items()},
    )


def trial_run(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> Run:
    """A finished experiment, from its generator to its report."""
    report, generator, evaluation = (artifacts[stage] for stage in ("report", "generator", "evaluation"))
    summary = json.loads(evaluation.read(SUMMARY_FILE))
    seconds = {f"seconds/{stage}": artifacts[stage].manifest()["seconds"] for stage in STAGES}
    history = load_tree(generator.read(HISTORY_FILE), generator.location)
    pages = report.manifest()["files"]
    tables = [name for name in evaluation.manifest()["files"] if name.endswith(".parquet")]
    table = report.read("table.md").decode() if "table.md" in pages else ""
    return Run(
        kind="trial",
        key=report.key,
        name=f"{experiment.name}-{report.key[:6]}",
        **_made(experiment, artifacts, ("generator", "samples", "evaluation", "report")),
        params={path: str(value) for path, value in flat(tracked(experiment)) if value is not None},
        metrics=named_metrics(summary) | seconds,
        curves={f"{name}/loss": list(enumerate(losses.tolist())) for name, losses in history.items()},
        files={name: report.read(name) for name in pages} | {name: evaluation.read(name) for name in tables},
        note=f"{table}\n{summary['verdict']['text']}",
    )


def _made(experiment: Experiment, artifacts: Mapping[str, Artifact], stages: Sequence[str]) -> dict[str, Any]:
    """When the last of some stages was made, how long they took, and where it is."""
    artifact = artifacts[stages[-1]]
    manifest = artifact.manifest()
    ended = int(datetime.fromisoformat(manifest["created_at"]).timestamp() * 1000)
    seconds = sum(artifacts[stage].manifest()["seconds"] for stage in stages)
    tags = {
        "pdiff.location": artifact.location,
        "pdiff.version": manifest["versions"]["pdiff_ray"],
        "seed": str(experiment.seed),
    }
    return {"started": ended - int(1000 * seconds), "ended": ended, "tags": tags}


def tracked(experiment: Experiment) -> dict[str, Any]:
    """The configuration without where things run."""
    return experiment.model_dump(mode="json", exclude=set(UNTRACKED))


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths and values of a configuration."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def now() -> int:
    return int(time.time() * 1000)
