"""What MLflow is told of an experiment, on real databases."""

import json
import shutil
from urllib.parse import parse_qs

import mlflow
import pytest
from helpers import TINY, build, tiny, until
from test_cli import pdiff

from pdiff_ray import tracking
from pdiff_ray.reports.answers import conclusion
from pdiff_ray.stages import report
from pdiff_ray.storage.files import Storage
from pdiff_ray.tracking import usage
from pdiff_ray.tracking.inputs import splits
from pdiff_ray.tracking.runs import MlflowRun, write
from pdiff_ray.tracking.server import connect
from pdiff_ray.tracking.trials import VERDICT


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    experiment, artifacts = tiny(tmp_path_factory.mktemp("storage"))
    build(experiment, artifacts)
    build(experiment, artifacts, "report")
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
    assert all(line in trial.tags["mlflow.note.content"] for line in conclusion(report.load_summary(artifacts)))
    told = {f"zoo/{one['name']}": one["value"] for one in artifacts["zoo"].manifest().info["diagnosis"]}
    assert told == {name: value for name, value in found["zoo"].data.metrics.items() if name.startswith("zoo/")}
    assert trial.params["zoo.members"] == "12"
    assert trial.params["generator.autoencoder.latent_dim"] == "4"
    assert trial.tags["pdiff.key"] == artifacts["report"].key
    verdict = report.load_summary(artifacts)["verdict"]
    assert [trial.tags[name] for name in VERDICT] == [verdict[name] for name in ("word", "accuracy", "baseline")]
    curve = client.get_metric_history(found["trial"].info.run_id, "diffusion/loss")
    assert [m.step for m in sorted(curve, key=lambda m: m.step)] == list(range(40))
    names = {a.path for a in client.list_artifacts(found["trial"].info.run_id)}
    assert {"report.html", "table.csv", "accuracy.png", "networks"} <= names


def test_runs_have_their_data(recorded):
    experiment, artifacts, client = recorded
    info = artifacts["base"].manifest().info
    for run in runs(client).values():
        data = {i.tags[0].value: i.dataset for i in run.inputs.dataset_inputs}
        assert list(data) == ["train", "validation", "test"]
        assert {dataset.name for dataset in data.values()} == {"digits"}
        assert len({dataset.digest for dataset in data.values()}) == 3
        images = [json.loads(dataset.profile)["num_rows"] for dataset in data.values()]
        assert images == [info[f"{split}_images"] for split in data] == [810, 90, 897]
    other = experiment.model_copy(
        update={"data": experiment.data.model_copy(update={"root": "s3://me:secret@b/x?k=v"})}
    )
    assert all("secret" not in split.source and "k=v" not in split.source for split in splits(other, artifacts["base"]))


def test_base_and_best_sample_are_models_measured_on_their_data(recorded):
    _experiment, artifacts, client = recorded
    found = runs(client)
    models = {m.source_run_id: m for m in client.search_logged_models([found["zoo"].info.experiment_id])}
    base, best = (models[found[kind].info.run_id] for kind in ("zoo", "trial"))
    assert len(models) == 2
    assert {m.dataset_digest: m.value for m in base.metrics} == {
        i.dataset.digest: artifacts["base"].manifest().info[f"{i.tags[0].value}_accuracy"]
        for i in found["zoo"].inputs.dataset_inputs
    }
    assert [m.key for m in best.metrics] == ["generated/best_test_accuracy"]
    assert best.params["export"].startswith(f"pdiff export {artifacts['samples'].key} FOLDER --ids ")
    assert [output.model_id for output in found["trial"].outputs.model_outputs] == [best.model_id]


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
    made_by = {model.source_run_id for model in client.search_logged_models([new.experiment_id])}
    assert made_by == {run.info.run_id for run in runs(client).values()}, "the old run's model went with it"


def test_system_metrics_are_those_of_the_time_of_a_run(empty, tmp_path, monkeypatch):
    shutil.copy(empty, tmp_path)
    at = connect(f"sqlite:///{tmp_path}/mlflow.db", "tiny", Storage(str(tmp_path)))
    monkeypatch.setattr(usage, "FIRST_S", 0.01)
    monkeypatch.setattr(usage, "MAX_SAMPLES", 16)
    with tracking.Usage("node") as elsewhere, tracking.Usage() as taken:
        until(lambda: len(taken.samples) > 8 and elsewhere.samples)
        started, ended = taken.samples[2][0], taken.samples[6][0]
        late = [moment for moment, _ in taken.between(started, ended)]
        assert late == [moment for moment, _ in taken.samples[2:7]]
        until(lambda: taken.samples[1][0] - taken.samples[0][0] > 35)  # some have gone, and pauses have doubled
        assert len(taken.samples) <= 16
    run = MlflowRun("trial", "key", "run", late[0] - 5000, ended, {}, {}, {})
    found = at.client.get_run(write(at, run, taken)).data.metrics
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_percentage"} <= set(found)
    assert all(name.startswith("system/node/") for name in elsewhere.samples[0][1])


def test_a_dead_server_is_one_error_without_secrets(recorded):
    experiment, artifacts, _ = recorded
    away = experiment.model_copy(
        update={"tracking": experiment.tracking.model_copy(update={"uri": "http://me:secret@127.0.0.1:1"})}
    )
    with pytest.raises(tracking.TrackingError) as caught:
        tracking.record(away, artifacts)
    assert "secret" not in str(caught.value)
    assert "127.0.0.1:1" in str(caught.value)


def conditions(links):
    """What the pages of runs show, by the links' names: condition, what they are sorted by, and whether ascending."""
    queries = {name: parse_qs(address.partition("?")[2]) for name, address in links.items()}
    return {
        name: tuple(query[key][0] for key in ("searchFilter", "orderByKey", "orderByAsc"))
        for name, query in queries.items()
        if "searchFilter" in query
    }


def found_by(client, name, condition):
    experiment = client.get_experiment_by_name(name).experiment_id
    return {run.info.run_id for run in client.search_runs([experiment], condition)}


def test_links_of_an_experiment_without_a_sweep(recorded):
    experiment, artifacts, client = recorded
    uri = tracking.tracking_uri(experiment, artifacts["zoo"].storage)
    other = client.create_experiment("of something else")
    client.create_run(other, tags={"kind": "trial"})
    (name,), (links,) = zip(*tracking.links(uri, "http://me:secret@host:1").items(), strict=True)
    assert (name, list(links)) == ("tiny", ["latest", "trials", "charts"])
    trial = runs(client)["trial"].info
    assert links["latest"].startswith(f"http://host:1/#/experiments/{trial.experiment_id}/runs/{trial.run_id}?")
    for condition, order, ascending in conditions(links).values():
        assert found_by(client, "tiny", condition) == {trial.run_id}
        assert (order, ascending) == ("metrics.`generated/best_test_accuracy`", "false")
    assert "compareRunsMode=CHART" in links["charts"]


# Sweeps. One is run; the others find its artifacts, so that they take no time.


def test_files_of_a_run_stay_in_the_storage(recorded, tmp_path):
    """A database in a storage says where files go: to where the storage was, or wherever who made it wants."""
    _experiment, artifacts, _client = recorded
    moved = tmp_path / "moved"
    shutil.copytree(artifacts["zoo"].storage.root, moved)
    kept = set((artifacts["zoo"].storage.local / "mlflow-artifacts").rglob("*"))
    options = ("--storage", moved, "--set", "sampling.seed=9")
    pdiff("run", "report", TINY, *options, "--in-process")
    text = pdiff("log", TINY, *options, code=1)
    assert f"{moved}/mlflow.db: this experiment's files go to file://{artifacts['zoo'].storage.root}" in text
    assert "tracking.experiment" in text
    assert set((artifacts["zoo"].storage.local / "mlflow-artifacts").rglob("*")) == kept
    assert "written" in pdiff("log", TINY, *options, "--set", "tracking.experiment=other")
    assert list((moved / "mlflow-artifacts").rglob("report.html"))
    (moved / "mlflow.db").rename(tmp_path / "mlflow.db")
    (moved / "mlflow.db").symlink_to(tmp_path / "mlflow.db")
    assert "a symbolic link leads out of the storage" in pdiff("log", TINY, *options, code=2)
