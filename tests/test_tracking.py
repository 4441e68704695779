"""What MLflow is told, on real databases and servers."""

import mlflow
import pytest
from helpers import build, tiny

from pdiff_ray import report, tracking


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    experiment, artifacts = tiny(tmp_path_factory.mktemp("storage"))
    build(experiment, artifacts)
    report.build(experiment, artifacts)
    assert tracking.record(experiment, artifacts)
    uri = tracking.tracking_uri(experiment, artifacts["zoo"].storage)
    return experiment, artifacts, mlflow.MlflowClient(tracking_uri=uri)


def runs(client):
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    return {run.data.tags["kind"]: run for run in client.search_runs([experiment.experiment_id])}


def test_a_run_per_zoo_and_per_trial(recorded):
    _experiment, artifacts, client = recorded
    found = runs(client)
    assert set(found) == {"zoo", "trial"}
    assert all(run.info.status == "FINISHED" for run in found.values())
    trial = found["trial"].data
    summary = {g["group"]: g for g in report.load_summary(artifacts)["groups"]}
    assert trial.metrics["generated/best_test_accuracy"] == summary["generated"]["best"]
    assert trial.metrics["noise-added_0.5/mean_test_accuracy"] == summary["noise-added 0.5"]["mean"]
    assert trial.params["zoo.members"] == "12"
    assert trial.params["generator.autoencoder.latent_dim"] == "4"
    assert trial.tags["pdiff.key"] == artifacts["report"].key
    curve = client.get_metric_history(found["trial"].info.run_id, "diffusion/loss")
    assert [m.step for m in sorted(curve, key=lambda m: m.step)] == list(range(40))
    names = {a.path for a in client.list_artifacts(found["trial"].info.run_id)}
    assert {"report.html", "table.csv", "accuracy.png", "networks"} <= names


def test_nothing_is_recorded_twice(recorded):
    experiment, artifacts, client = recorded
    assert not tracking.record(experiment, artifacts)
    storage = artifacts["zoo"].storage
    for name in storage.list("tracking"):  # as if the process had died before noting it down
        storage.delete(name)
    before = {run.info.run_id for run in runs(client).values()}
    assert not tracking.record(experiment, artifacts)
    assert {run.info.run_id for run in runs(client).values()} == before


def test_an_unfinished_run_is_replaced(recorded):
    experiment, artifacts, client = recorded
    storage = artifacts["zoo"].storage
    old = runs(client)["trial"].info.run_id
    client.update_run(old, status="RUNNING")
    for name in storage.list("tracking"):
        storage.delete(name)
    tracking.record(experiment, artifacts)
    new = runs(client)["trial"].info
    assert new.run_id != old
    assert new.status == "FINISHED"


def test_a_dead_server_is_one_error_without_secrets(recorded):
    experiment, artifacts, _ = recorded
    away = experiment.model_copy(
        update={"tracking": experiment.tracking.model_copy(update={"uri": "http://me:secret@127.0.0.1:1"})}
    )
    with pytest.raises(tracking.TrackingError) as caught:
        tracking.record(away, artifacts)
    assert "secret" not in str(caught.value)
    assert "127.0.0.1:1" in str(caught.value)
