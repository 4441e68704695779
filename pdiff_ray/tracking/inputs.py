"""Data sets and models of runs, on MLflow's pages for just that. The weights stay in storage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdiff_ray.common.secrets import without_secrets
from pdiff_ray.config.schema import Experiment
from pdiff_ray.storage.artifacts import Artifact, digest
from pdiff_ray.tracking.server import Connection

CONTEXTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """A part of a data set that a run has used.

    Attributes:
        context: for what.
        digest: of all that determines its images.
        images: how many they are; None if that is not known.
    """

    name: str
    context: str
    digest: str
    source: str
    images: int | None


@dataclass(frozen=True)
class Model:
    """A network that a run has made.

    Attributes:
        metrics: the run's metrics that are this network's, each with the context of the split that it was measured on.
    """

    name: str
    params: Mapping[str, str]
    metrics: Mapping[str, str] = field(default_factory=dict)


def splits(experiment: Experiment, base: Artifact) -> list[Split]:
    """Returns the splits of the data that a base was trained and is judged on."""
    manifest, data = base.manifest(), experiment.data
    name = Path(data.root).name if data.name == "custom" else data.name
    source = {"digits": "sklearn.datasets.load_digits"}.get(data.name, without_secrets(data.root))
    return [
        Split(
            name,
            context,
            digest(json.dumps([context, manifest.config["data"]], sort_keys=True).encode())[:8],
            source,
            manifest.info.get(f"{context}_images"),
        )
        for context in CONTEXTS
    ]


def make_models(
    at: Connection, run_id: str, models: Sequence[Model], data: Sequence[Split]
) -> dict[str, dict[str, str]]:
    """Makes entries for networks that a run has made; returns what its metrics are to say of them, by their names."""
    from mlflow.entities import LoggedModelOutput

    outputs, said = [], {}
    by_context = {split.context: split for split in data}
    for model in models:
        tags = {"mlflow.model.isExternal": "true"}  # as MLflow marks those whose weights it does not keep
        made = at.client.create_logged_model(at.experiment_id, model.name, run_id, tags, dict(model.params))
        at.client.finalize_logged_model(made.model_id, "READY")
        outputs.append(LoggedModelOutput(made.model_id, step=0))
        for name, context in model.metrics.items():
            split = by_context[context]
            said[name] = {"model_id": made.model_id, "dataset_name": split.name, "dataset_digest": split.digest}
    if outputs:
        at.client.log_outputs(run_id, outputs)
    return said


def log_data(at: Connection, run_id: str, data: Sequence[Split]) -> None:
    """Writes which data a run has used."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for split in data:
        profile: dict[str, Any] = {"num_rows": split.images} if split.images else {}
        source = json.dumps({"uri": split.source})
        dataset = Dataset(split.name, split.digest, "local", source, profile=json.dumps(profile))
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", split.context)]))
    if inputs:
        at.client.log_inputs(run_id, inputs)


def delete_run(at: Connection, run_id: str) -> None:
    """Deletes a run with the models that it has made."""
    for model in at.client.search_logged_models([at.experiment_id], f"source_run_id = '{run_id}'"):
        at.client.delete_logged_model(model.model_id)
    at.client.delete_run(run_id)
