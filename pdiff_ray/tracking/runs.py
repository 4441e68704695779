"""MLflow: one experiment per configuration name, a run per zoo and one per trial, written from finished artifacts.

Storage is the source: what MLflow holds can be written again from it, so a server that is down costs nothing but a
warning. A run carries the key of the artifact it describes and is never written twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pdiff_ray.artifacts import STAGES, Artifact, Storage, load_tree
from pdiff_ray.config import Experiment
from pdiff_ray.errors import PdiffError
from pdiff_ray.stages.base import HISTORY_FILE
from pdiff_ray.stages.evaluate import SUMMARY_FILE

# A dead server must not hold up the work: MLflow's defaults retry for minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
MAX_METRICS, MAX_PARAMS = 1000, 100  # per call, MLflow's limits
MAX_POINTS = 500  # of a curve

# Fields of a group's summary, and their names as metrics after `<group>/`.
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


class TrackingError(PdiffError):
    """MLflow cannot be reached or refuses; results are in storage nevertheless."""


def tracking_uri(experiment: Experiment, storage: Storage) -> str:
    """The configured MLflow, or a SQLite file in the storage folder (beside it, in the current folder, if remote)."""
    uri = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return uri or f"sqlite:///{_folder(storage) / 'mlflow.db'}"


def _folder(storage: Storage) -> Path:
    return storage.local or Path("pdiff-storage").resolve()


def record(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> bool:
    """Writes the runs of a finished experiment that are not there yet.

    Returns:
        False if everything had been written before.

    Raises:
        TrackingError
    """
    storage = artifacts["report"].storage
    uri, name = tracking_uri(experiment, storage), experiment.tracking.experiment or experiment.name
    mark = hashlib.sha256(f"{uri}|{name}|{artifacts['report'].key}".encode()).hexdigest()[:16]
    deleted = uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists()
    if storage.exists(f"tracking/{mark}.json") and not deleted:
        return False
    try:
        # MLflow imports half a second of packages, so only where there is something to write.
        client, experiment_id = _open(uri, name, storage)
        for content in (_zoo_run(experiment, artifacts), _trial_run(experiment, artifacts)):
            _write(client, experiment_id, experiment, artifacts, content)
    except PdiffError:
        raise
    except Exception as error:  # MLflow raises its own, sqlalchemy's and requests' errors
        raise TrackingError(without_secret(f"MLflow at {uri}: {str(error).splitlines()[0]}")) from None
    written = {"uri": without_secret(uri), "experiment": name, "report": artifacts["report"].key}
    storage.write(f"tracking/{mark}.json", json.dumps(written).encode())
    return True


def reachable(uri: str) -> str:
    """A few words on the MLflow at `uri`.

    Raises:
        TrackingError
    """
    if uri.startswith("sqlite:///"):
        return "there" if Path(uri.removeprefix("sqlite:///")).exists() else "created by the first run"
    import mlflow

    try:
        mlflow.MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except Exception as error:
        reason = f"MLflow at {uri}: {str(error).splitlines()[0]}; start the server or correct tracking.uri"
        raise TrackingError(without_secret(reason)) from None
    return "answers"


def serve(uri: str, port: int) -> None:
    """Runs MLflow's own server on `uri` until interrupted, on the loopback interface."""
    # One worker without a job queue takes a quarter of the memory of MLflow's defaults.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port",
               str(port), "--workers", "1"]  # fmt: skip
    subprocess.run(command, env=environment, check=False)


def pages(uri: str, server: str) -> list[tuple[str, str]]:
    """Names of experiments and links to their runs, with the columns that matter, on a server at `server`."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri)
    order = "orderByKey=metrics.%60generated%2Fbest_test_accuracy%60&orderByAsc=false"
    return [
        (e.name, f"{server}/#/experiments/{e.experiment_id}/runs?workflowType=machine_learning&{order}")
        for e in client.search_experiments()
        if e.name != "Default"
    ]


def without_secret(text: str) -> str:
    """The text, its URIs without user names and passwords."""
    return re.sub(r"//[^/@\s]+@", "//", text)


def _open(uri: str, name: str, storage: Storage) -> tuple[Any, str]:
    import mlflow
    from mlflow.exceptions import MlflowException

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)

    # Left behind by a surrounding MLflow job, it would make every run here a child of that one.
    os.environ.pop("MLFLOW_RUN_ID", None)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    client = mlflow.MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(name)
    if found is not None:
        return client, found.experiment_id
    location = (_folder(storage) / "mlflow-artifacts").as_uri() if uri.startswith("sqlite:") else None
    try:
        return client, client.create_experiment(name, artifact_location=location)
    except MlflowException:  # another process made it in between
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return client, found.experiment_id


@dataclass(frozen=True)
class _Run:
    """What a run says; `artifact` is what it describes, `stages` are those that it took."""

    kind: str  # zoo or trial
    name: str
    artifact: Artifact
    stages: Sequence[str]
    sections: Sequence[str]  # of the configuration
    metrics: Mapping[str, float]
    curves: Mapping[str, Sequence[float]]
    files: Mapping[str, bytes]


def _zoo_run(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> _Run:
    zoo, base = artifacts["zoo"], artifacts["base"]
    trained = base.manifest()
    metrics = {k: v for k, v in zoo.manifest()["info"].items() if k.endswith("_test_accuracy")}
    metrics |= {f"base/{k}": v for k, v in trained["info"].items() if k.endswith("_accuracy")}
    # An imported base has no history.
    history = load_tree(base.read(HISTORY_FILE), base.location) if HISTORY_FILE in trained["files"] else {}
    return _Run(
        kind="zoo",
        name=f"zoo-{zoo.key[:6]}",
        artifact=zoo,
        stages=("base", "zoo"),
        sections=("data", "network", "training", "zoo"),
        metrics=metrics,
        curves={f"base/{name}": values.tolist() for name, values in history.items()},
        files={},
    )


def _trial_run(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> _Run:
    report, generator, evaluation = (artifacts[stage] for stage in ("report", "generator", "evaluation"))
    metrics: dict[str, float] = {}
    for group in json.loads(evaluation.read(SUMMARY_FILE))["groups"]:
        name = group["group"].replace(" ", "_")
        metrics |= {f"{name}/{metric}": group[key] for key, metric in METRICS.items() if group[key] is not None}
    metrics |= {f"seconds/{stage}": artifacts[stage].manifest()["seconds"] for stage in STAGES}
    history = load_tree(generator.read(HISTORY_FILE), generator.location)
    tables = [name for name in evaluation.manifest()["files"] if name.endswith(".parquet")]
    return _Run(
        kind="trial",
        name=f"{experiment.name}-{report.key[:6]}",
        artifact=report,
        stages=("generator", "samples", "evaluation", "report"),
        sections=[s for s in type(experiment).model_fields if s not in ("resources", "tracking", "storage")],
        metrics=metrics,
        curves={f"{name}/loss": losses.tolist() for name, losses in history.items()},
        files={name: report.read(name) for name in report.manifest()["files"]}
        | {name: evaluation.read(name) for name in tables},
    )


def _write(
    client: Any, experiment_id: str, experiment: Experiment, artifacts: Mapping[str, Artifact], content: _Run
) -> None:
    """Writes a run unless it is there; what an interrupted attempt left is deleted."""
    from mlflow.entities import Metric, Param

    key = content.artifact.key
    for run in client.search_runs([experiment_id], f"tags.`pdiff.key` = '{key}' and tags.kind = '{content.kind}'"):
        if run.info.status == "FINISHED":
            return
        client.delete_run(run.info.run_id)
    manifest = content.artifact.manifest()
    made = int(datetime.fromisoformat(manifest["created_at"]).timestamp() * 1000)
    seconds = sum(artifacts[stage].manifest()["seconds"] for stage in content.stages)
    tags = {
        "kind": content.kind,
        "pdiff.key": key,
        "pdiff.location": content.artifact.location,
        "pdiff.version": manifest["versions"]["pdiff_ray"],
        "seed": str(experiment.seed),
    }
    started = made - int(1000 * seconds)
    run_id = client.create_run(experiment_id, run_name=content.name, tags=tags, start_time=started).info.run_id
    configuration = experiment.model_dump(mode="json", include=set(content.sections))
    params = [Param(path, value) for path, value in _flat(configuration)]
    for start in range(0, len(params), MAX_PARAMS):
        client.log_batch(run_id, params=params[start : start + MAX_PARAMS])
    points = [Metric(name, float(value), made, 0) for name, value in content.metrics.items()]
    for name, values in content.curves.items():
        every = max(1, len(values) // MAX_POINTS)
        points += [Metric(name, float(values[step]), made, step) for step in range(0, len(values), every)]
    for start in range(0, len(points), MAX_METRICS):
        client.log_batch(run_id, metrics=points[start : start + MAX_METRICS])
    if content.files:
        with tempfile.TemporaryDirectory() as folder:
            for path, file in content.files.items():
                target = Path(folder) / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file)
            client.log_artifacts(run_id, folder)
    client.set_terminated(run_id, "FINISHED", end_time=made)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted paths and short values of a configuration."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", str(value)[:500]
