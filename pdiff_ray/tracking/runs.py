"""What runs say of zoos and experiments, and how a run is written."""

from __future__ import annotations

import contextlib
import math
import posixpath
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pdiff_ray.common.secrets import without_secrets
from pdiff_ray.config.schema import Experiment
from pdiff_ray.config.section import flat
from pdiff_ray.evaluation.metrics import named_metrics, tidy, verdict_words
from pdiff_ray.reports.answers import conclusion
from pdiff_ray.stages.report import load_history, load_summary
from pdiff_ray.storage.artifacts import Artifact, digest
from pdiff_ray.tracking.inputs import CONTEXTS, Model, Split, delete_run, log_data, make_models, splits
from pdiff_ray.tracking.server import Connection, Mark, connect, experiment_name, tracking_uri, translated
from pdiff_ray.tracking.usage import Usage

MAX_POINTS = 500  # of a curve
MAX_NOTE = 8000  # characters of a description, MLflow's limit
MAX_VALUE = 500  # characters of a parameter
MAX_KEY, MAX_READABLE = 250, 100  # characters of a name: that MLflow takes, and of one that is changed
REFUSED = r"[^\w ./:-]"  # characters that MLflow does not take in names
COMPARED = {  # accuracies, by the names of their charts
    "original": "original/mean_test_accuracy",
    "ensemble": "ensemble/mean_test_accuracy",
    "best generated": "generated/best_test_accuracy",
    "generated": "generated/mean_test_accuracy",
}
PARENT, NOTE = "mlflow.parentRunId", "mlflow.note.content"  # MLflow's tags
OBJECTIVE = "objective"  # the metric that a sweep's trials are compared by, whatever it is

Curve = Sequence[tuple[int, float]]  # step, value


@dataclass(frozen=True)
class MlflowRun:
    """What a run says.

    Attributes:
        kind: zoo or trial.
        key: of what it describes.
        started, ended: milliseconds since 1970, as MLflow has them.
        curves: metrics over steps.
        data: that it has used.
        models: that it has made.
        files: contents by name.
        note: its description, in Markdown.
        status: one of MLflow's.
    """

    kind: str
    key: str
    name: str
    started: int
    ended: int
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    note: str = ""
    status: str = "FINISHED"
    data: Sequence[Split] = ()
    models: Sequence[Model] = ()


def record(
    experiment: Experiment, artifacts: Mapping[str, Artifact], usage: Usage | None = None, *, anew: bool = False
) -> bool:
    """Writes the runs of a finished experiment that are not there yet.

    Args:
        usage: of this machine, while they were made.
        anew: looks at MLflow even if they were written once.

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
        written = [ensure(at, make(experiment, artifacts), usage) for make in (zoo_run, trial_run)]
    mark.leave()
    return any(written)


def ensure(at: Connection, run: MlflowRun, usage: Usage | None = None) -> bool:
    """Writes a run that belongs to no sweep unless it is there; returns whether it was written."""
    for old in at.search(f"tags.`pdiff.key` = '{run.key}' and tags.kind = '{run.kind}'"):
        if old.info.status == "FINISHED":
            return False
        if PARENT not in old.data.tags:  # left by an attempt that was killed
            delete_run(at, old.info.run_id)
    write(at, run, usage)
    return True


def write(at: Connection, run: MlflowRun, usage: Usage | None = None) -> str:
    """Writes a run and returns its id. It is RUNNING until all of it is there, so that what a crash leaves is known.

    What ends the writing in any other way leaves nothing.
    """
    from mlflow.entities import Metric

    tags = {"kind": run.kind, "pdiff.key": run.key, **run.tags}
    if run.note:
        tags[NOTE] = run.note[:MAX_NOTE]
    created = at.client.create_run(at.experiment_id, run_name=run.name, tags=tags, start_time=run.started)
    run_id: str = created.info.run_id
    try:
        said = make_models(at, run_id, run.models, run.data)
        points = [(name, value, run.ended, 0, said.get(name, {})) for name, value in run.metrics.items()]
        for name, curve in run.curves.items():
            every = max(1, math.ceil(len(curve) / MAX_POINTS))
            points += [(name, value, run.ended, step, {}) for step, value in curve[::every]]
        metrics = [
            Metric(accepted(name), tidy(float(value)), moment, step, **about)
            for name, value, moment, step, about in points
            if math.isfinite(value)  # MLflow would show infinity as 1.8e308, and take it for the best
        ]
        if usage:
            metrics += usage_points(usage, run.started, run.ended)
        at.client.log_batch(run_id, metrics, params_of(run.params))
        log_data(at, run_id, run.data)
        write_files(at, run_id, run.files, created.info.artifact_uri)
        at.client.set_terminated(run_id, run.status, end_time=run.ended)
    except BaseException:
        with contextlib.suppress(Exception):
            delete_run(at, run_id)
        raise
    return run_id


def usage_points(usage: Usage, started: int, ended: int) -> list[Any]:
    """Returns the samples of a time as metrics; their steps are seconds."""
    from mlflow.entities import Metric

    return [
        Metric(name, value, moment, (moment - started) // 1000)
        for moment, sample in usage.between(started, ended)
        for name, value in sample.items()
    ]


def params_of(values: Mapping[str, str]) -> list[Any]:
    """Returns parameters as MLflow has them, as long as it takes."""
    from mlflow.entities import Param

    return [Param(accepted(path), without_secrets(value)[:MAX_VALUE]) for path, value in values.items()]


def accepted(name: str) -> str:
    """Returns the name of a parameter or metric as MLflow takes it.

    That is the name itself, or, if MLflow refuses it, what of it is taken and a digest of the whole, so that names that
    differ still do.
    """
    apart = name.startswith(("/", "..")) or posixpath.normpath(name) != name or name == "."  # no path of its own
    if len(name) <= MAX_KEY and not apart and not re.search(REFUSED, name):
        return name
    readable = re.sub(rf"{REFUSED}|/|\.\.+", "_", name)[:MAX_READABLE].strip("._ ")
    return f"{readable or 'name'}-{digest(name.encode())[:6]}"


def write_files(at: Connection, run_id: str, files: Mapping[str, bytes], place: str = "") -> None:
    """Writes a run's artifacts; `place` is their URI, if it is known."""
    if not files:
        return
    at.check_place(place or at.client.get_run(run_id).info.artifact_uri)
    with tempfile.TemporaryDirectory() as folder:
        for path, content in files.items():
            target = Path(folder) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        at.client.log_artifacts(run_id, folder)


def zoo_run(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> MlflowRun:
    """Returns the run of a zoo and the base that it was trained from."""
    zoo, base = artifacts["zoo"], artifacts["base"]
    metrics = {k: v for k, v in zoo.manifest().info.items() if k.endswith("_test_accuracy")}
    metrics |= {f"zoo/{found['name']}": found["value"] for found in zoo.manifest().info.get("diagnosis", ())}
    metrics |= {f"base/{k}": v for k, v in base.manifest().info.items() if k.endswith("_accuracy")}
    configuration = experiment.model_dump(mode="json", include={"data", "network", "training", "zoo"})
    data, about = splits(experiment, base), {"network": experiment.network.name, "weights": base.location}
    return MlflowRun(
        kind="zoo",
        key=zoo.key,
        name=f"zoo-{zoo.key[:6]}",
        **_made(experiment, artifacts, ("base", "zoo")),
        params={path: str(value) for path, value in flat(configuration) if value is not None},
        metrics=metrics,
        curves={f"base/{name}": list(enumerate(values)) for name, values in load_history(base).items()},
        data=data,
        models=[Model(f"base-{base.key[:6]}", about, {f"base/{c}_accuracy": c for c in CONTEXTS})],
    )


def trial_run(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> MlflowRun:
    """Returns the run of a finished experiment, from its generator to its report."""
    report, evaluation = artifacts["report"], artifacts["evaluation"]
    summary = load_summary(artifacts)
    metrics = named_metrics(summary)
    seconds = {f"seconds/{stage}": artifact.manifest().seconds for stage, artifact in artifacts.items()}
    files = {name: report.read(name) for name in report.manifest().files}
    files |= {name: evaluation.read(name) for name in evaluation.manifest().files if name.endswith(".parquet")}
    best = next(group for group in summary["groups"] if group["group"] == "generated")
    about = {
        "network": experiment.network.name,
        "weights": artifacts["samples"].location,
        "export": f"pdiff export {artifacts['samples'].key} FOLDER --ids {best['best_id']}",
    }
    made = _made(experiment, artifacts, [stage for stage in artifacts if stage not in ("base", "zoo")])
    return MlflowRun(
        kind="trial",
        key=report.key,
        name=f"{experiment.name}-{report.key[:6]}",
        **{**made, "tags": {**made["tags"], **verdict_words(summary)}},
        params={path: str(value) for path, value in flat(tracked(experiment)) if value is not None},
        metrics=_in_percent(metrics) | metrics | seconds,
        curves={f"{name}/loss": list(enumerate(v)) for name, v in load_history(artifacts["generator"]).items()},
        files=files,
        note="\n\n".join([*conclusion(summary), files.get("table.md", b"").decode()]),
        data=splits(experiment, artifacts["base"]),
        models=[Model(f"generated-{artifacts['samples'].key[:6]}", about, {"generated/best_test_accuracy": "test"})],
    )


def _in_percent(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the accuracies that charts compare once more: with two decimals, as charts have, fractions are alike."""
    return {f"accuracy/{name}": 100 * metrics[of] for name, of in COMPARED.items() if of in metrics}


def _made(experiment: Experiment, artifacts: Mapping[str, Artifact], stages: Sequence[str]) -> dict[str, Any]:
    """Returns when some stages were made, and tags: where the last of them is, its version and seed."""
    artifact = artifacts[stages[-1]]
    manifest = artifact.manifest()
    ended = int(datetime.fromisoformat(manifest.created_at).timestamp() * 1000)
    seconds = sum(artifacts[stage].manifest().seconds for stage in stages)
    tags = {
        "pdiff.location": artifact.location,
        "pdiff.version": manifest.versions.get("pdiff_ray", "?"),
        "seed": str(experiment.seed),
    }
    return {"started": ended - int(1000 * seconds), "ended": ended, "tags": tags}


def tracked(experiment: Experiment) -> dict[str, Any]:
    """Returns the configuration without the sections that say where things run."""
    return experiment.model_dump(mode="json", exclude={"resources", "tracking", "storage"})


def now() -> int:
    """Returns the time in MLflow's milliseconds."""
    return int(time.time() * 1000)
