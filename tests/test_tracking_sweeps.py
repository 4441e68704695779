"""What MLflow is told of sweeps, on real databases and servers: runs, links, crashes, servers that die."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from urllib.parse import parse_qs

import mlflow
import pytest
from helpers import TINY, marked, until
from mlflow.utils import validation
from test_tracking import conditions, found_by

from pdiff_ray import tracking
from pdiff_ray.config import sweep as space
from pdiff_ray.running.sweep import run_trials
from pdiff_ray.stages import report
from pdiff_ray.sweeps.ledger import Ledger
from pdiff_ray.sweeps.trial import Trial, best_setting
from pdiff_ray.tracking import sweeps
from pdiff_ray.tracking.runs import MlflowRun, accepted, write
from pdiff_ray.tracking.server import connect

GRID = """# How many members does it take?
#
# Not of the question.
base: {base}
name: tiny
sweep: {{parameters: {{generator.members: [4, 12]}}, repeats: 2, seeds: [generator.seed, sampling.seed]}}
"""
SEARCH = """base: {base}
name: tiny
sweep:
  search: random
  num_trials: 4
  repeats: 2
  seeds: [generator.seed, sampling.seed]
  parameters: {{generator.members: [4, 12], sampling.steps: {{int: [5, 9], when: {{generator.members: 12}}}}}}
"""


def load(folder, text, storage, *overrides):
    path = folder / "sweep.yaml"
    path.write_text(text.format(base=TINY))
    return Ledger(space.load(path, [f"storage={storage}", *overrides]))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep as the command runs it, and its runs."""
    folder = tmp_path_factory.mktemp("sweep")
    ledger = load(folder, GRID, folder / "storage")
    with tracking.follow(ledger) as tell:
        run_trials(ledger, in_process=True, on_result=tell)
        ledger.storage.write(f"{ledger.folder}/summary.md", b"| members | accuracy |\n|---|---|\n| 4 | 12.3 |\n")
    return folder, ledger


@pytest.fixture
def again(swept, empty, tmp_path):
    """The same sweep, its trials finished, on an MLflow that knows nothing of it."""
    shutil.copy(empty, tmp_path)

    def load_again(text=GRID, uri=f"sqlite:///{tmp_path}/mlflow.db"):
        return load(tmp_path, text, swept[0] / "storage", f"tracking.uri={uri}")

    return load_again


def client_of(ledger):
    return mlflow.MlflowClient(tracking_uri=tracking.tracking_uri(ledger.file.experiment, ledger.storage))


def by_kind(client, name="tiny"):
    found = {"sweep": [], "trial": [], "zoo": []}
    for run in client.search_runs([client.get_experiment_by_name(name).experiment_id]):
        found[run.data.tags["kind"]].append(run)
    found["trial"].sort(key=lambda run: int(run.data.tags.get("pdiff.trial", -1)))
    return found


def check_complete(ledger, client, name="tiny"):
    """Each trial once, below one parent, and nothing that runs."""
    found = by_kind(client, name)
    (parent,) = found["sweep"]
    assert parent.info.status == "FINISHED"
    assert [run.data.tags["pdiff.trial"] for run in found["trial"]] == [str(n) for n in range(ledger.total)]
    for run in found["trial"]:
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert len(found["zoo"]) == 1
    return found


def test_a_sweep_is_a_parent_and_its_trials(swept):
    _folder, ledger = swept
    client = client_of(ledger)
    found = check_complete(ledger, client)
    (parent,) = found["sweep"]
    assert parent.data.tags["pdiff.key"] == ledger.key
    assert parent.data.params["sweep.parameters.generator.members"] == "4, 12"
    assert parent.data.metrics["best_objective"] == best_setting(ledger.done(), maximize=True).objective
    assert re.fullmatch(r"members (4|12), mean of 2 seeds", parent.data.tags["best_trial"])
    assert parent.data.metrics["trials/finished"] == 4
    note = parent.data.tags["mlflow.note.content"]
    assert "**How many members does it take?**" in note
    assert "| 4 | 12.3 |" in note
    assert "](#/compare-runs?" in note
    assert [a.path for a in client.list_artifacts(parent.info.run_id) if "summary" in a.path] == ["summary.md"]
    names = [run.info.run_name for run in found["trial"]]
    assert names == ["00 members 4", "01 members 12", "02 members 4, seed +1", "03 members 12, seed +1"]
    keys = [set(run.data.params) for run in found["trial"]]
    assert all(k == keys[0] for k in keys), "the compare page needs the same parameters everywhere"
    differ = {k for k in keys[0] if len({run.data.params[k] for run in found["trial"]}) > 1}
    assert differ == {"generator.members", "generator.seed", "sampling.seed"}


def test_links_of_a_sweep_lead_to_its_trials(swept):
    """Whatever an earlier version has left in the experiment's tags."""
    _folder, ledger = swept
    client = client_of(ledger)
    experiment = client.get_experiment_by_name("tiny")
    client.set_experiment_tag(experiment.experiment_id, "mlflow.sharedViewState.pdiff-runs", "{}")
    alone = client.create_run(experiment.experiment_id, tags={"kind": "trial", "pdiff.key": "x"}).info.run_id
    links = tracking.links(tracking.tracking_uri(ledger.file.experiment, ledger.storage), "")["tiny"]
    found = by_kind(client)
    objective = {r.info.run_id: r.data.metrics["objective"] for r in found["trial"] if r.info.run_id != alone}
    trials = set(objective)
    assert links["sweep"].startswith(f"/#/experiments/{experiment.experiment_id}/runs/{found['sweep'][0].info.run_id}?")
    shown = {name: found_by(client, "tiny", condition) for name, (condition, *_) in conditions(links).items()}
    assert shown == {"trials": trials, "charts": trials, "all": trials | {alone}}
    assert conditions(links)["trials"][1:] == ("metrics.`objective`", "false")
    query = parse_qs(links["compare"].partition("?")[2])
    compared = json.loads(query["runs"][0])
    assert set(compared) == trials
    assert [objective[run] for run in compared] == sorted(objective.values(), reverse=True)
    assert json.loads(query["experiments"][0]) == [experiment.experiment_id]
    client.delete_run(alone)


def test_a_trial_says_what_its_artifacts_do(swept):
    _folder, ledger = swept
    client = client_of(ledger)
    for run, trial in zip(by_kind(client)["trial"], ledger.done(), strict=True):
        (experiment,) = ledger.experiments(trial)
        artifacts = ledger.artifacts(experiment)
        summary = {g["group"]: g for g in report.load_summary(artifacts)["groups"]}
        assert run.data.metrics["objective"] == trial.objective
        assert run.data.metrics["generated/best_test_accuracy"] == summary["generated"]["best"]
        assert run.data.metrics["accuracy/generated"] == pytest.approx(100 * summary["generated"]["mean"])
        assert run.data.tags["pdiff.key"] == artifacts["report"].key
        assert run.data.tags["pdiff.sweep"] == ledger.key
        assert run.data.params["generator.members"] == str(trial.assignment["generator.members"])
        assert len(client.get_metric_history(run.info.run_id, "diffusion/loss")) == 40
        assert {"report.html", "networks", "accuracy.png"} <= {a.path for a in client.list_artifacts(run.info.run_id)}


def test_a_finished_sweep_is_not_written_again(swept, monkeypatch):
    _folder, ledger = swept
    client = client_of(ledger)
    before = {run.info.run_id for runs in by_kind(client).values() for run in runs}
    assert tracking.log(ledger) == 0
    assert {run.info.run_id for runs in by_kind(client).values() for run in runs} == before
    monkeypatch.setattr(sweeps, "connect", lambda *_: pytest.fail("MLflow was asked"))
    with tracking.follow(ledger) as tell:
        run_trials(ledger, in_process=True, on_result=tell)


def test_failed_and_stopped_trials_and_repeats(again):
    ledger = again(SEARCH)
    both = Trial(0, {"generator.members": 4}, (0, 1), "finished", 0.5, seconds=1.0)
    failed = Trial(1, {"generator.members": 12, "sampling.steps": 7}, (0, 1), "failed", reason="no room", seconds=1.0)
    stopped = Trial(2, {"generator.members": 4}, (0,), "stopped", 0.1, ((1, 0.05), (2, 0.1)), seconds=2.0)
    impossible = Trial(3, {"generator.members": 12, "sampling.steps": 99}, (0,), "failed", reason="99 steps")
    for trial in (both, failed, stopped, impossible):
        ledger.trials[trial.number] = trial
    assert tracking.log(ledger) == 4
    client = client_of(ledger)
    found = by_kind(client)
    assert [run.info.status for run in found["trial"]] == ["FINISHED", "FAILED", "KILLED", "FAILED"]
    assert [run.data.tags["state"] for run in found["trial"]] == ["finished", "failed", "stopped", "failed"]
    assert found["sweep"][0].info.status == "FAILED"
    whole, broken, cut, _ = found["trial"]
    values = []
    for experiment in ledger.experiments(both):
        groups = report.load_summary(ledger.artifacts(experiment))["groups"]
        values.append(next(g for g in groups if g["group"] == "generated")["mean"])
    assert whole.data.metrics["generated/mean_test_accuracy"] == pytest.approx(sum(values) / 2)
    assert {"repeat-0", "repeat-1"} <= {a.path for a in client.list_artifacts(whole.info.run_id)}
    assert "no room" in broken.data.tags["mlflow.note.content"]
    assert broken.data.tags["reason"] == "no room"
    assert broken.data.params["sampling.steps"] == "7"
    curve = client.get_metric_history(cut.info.run_id, "rung/objective")
    assert sorted((m.step, m.value) for m in curve) == [(1, 0.05), (2, 0.1)]
    assert len({frozenset(run.data.params) for run in found["trial"]}) == 1
    assert cut.data.params["sampling.steps"] == "-", "a parameter that does not apply"


@pytest.mark.parametrize(
    "name",
    ["plain/name: 1.5", "a, b (c) [d=1] @k %", "größe", "../up", "/top", "a//b", "..", ".", "", "x" * 251, "a\nb"],
)
def test_names_are_changed_only_as_far_as_mlflow_refuses_them(name):
    """Its own check agrees, and names that differ go on to do so."""
    for check in (validation._validate_param_name, validation._validate_metric_name):
        check(accepted(name))
        try:
            check(name)
        except mlflow.MlflowException:
            assert accepted(name) not in (name, accepted(f"{name}="))
        else:
            assert (accepted(name) == name) == (len(name) <= 250)


ODD = """base: {base}
name: tiny
sweep: {{parameters: {{"MAP@k, [delta=1.3]": {{variants: {{"a, b": {{}}, "%s @": {{sampling.samples: 5}}}}}}}}}}
"""


def test_odd_names_and_numbers_that_are_none_are_recorded(again):
    ledger = again(ODD)
    for number, assignment in enumerate(ledger.sweep.grid()):
        trial = Trial(number, assignment, (0,), "finished", 0.5 + number, seconds=1.0)
        ledger.trials[number] = trial
    assert tracking.log(ledger) == 2
    client = client_of(ledger)
    found = by_kind(client)
    assert [run.info.status for runs in found.values() for run in runs] == ["FINISHED"] * 4
    (name,) = (name for name in found["trial"][0].data.params if name.startswith("MAP"))
    assert name.startswith("MAP_k_ _delta_1.3")
    assert [run.data.params[name] for run in found["trial"]] == ["a, b", "%s @"]
    assert found["sweep"][0].data.params[accepted(f"sweep.parameters.{next(iter(assignment))}")]
    metrics = {"a": math.inf, "b": math.nan, "c (d)": 0.1 + 0.2}
    odd = MlflowRun("trial", "k", "odd", 0, 1, {}, {}, metrics, {"loss": [(0, 1.0), (1, math.inf)]})
    uri = tracking.tracking_uri(ledger.file.experiment, ledger.storage)
    run = client.get_run(write(connect(uri, "tiny", ledger.storage), odd))
    assert run.data.metrics == {accepted("c (d)"): 0.3, "loss": 1.0}


def test_a_retried_trial_takes_the_place_of_the_failed_one(again):
    ledger = again()
    good = ledger.trials[1]
    ledger.trials[1] = replace(good, state="failed", objective=None, reason="lost")
    tracking.log(ledger)
    assert by_kind(client_of(ledger))["sweep"][0].info.status == "FAILED"
    with tracking.follow(ledger) as tell:
        tell(good)
    check_complete(ledger, client_of(ledger))


def test_what_a_crash_left_is_put_right(again):
    ledger = again()
    tracking.log(ledger)
    client = client_of(ledger)
    found = by_kind(client)
    parent, half = found["sweep"][0].info.run_id, found["trial"][2].info
    client.update_run(parent, status="RUNNING")
    client.update_run(half.run_id, status="RUNNING")
    client.delete_run(found["trial"][3].info.run_id)
    assert tracking.log(ledger) == 2
    found = check_complete(ledger, client)
    assert found["sweep"][0].info.run_id == parent
    assert found["trial"][2].info.run_id != half.run_id


def test_a_sweep_without_artifacts_says_what_the_ledger_knows(again, swept, tmp_path):
    shutil.copytree(swept[0] / "storage" / "sweeps", tmp_path / "storage" / "sweeps")
    ledger = load(tmp_path, GRID, tmp_path / "storage")
    assert tracking.log(ledger) == 4
    run = by_kind(client_of(ledger))["trial"][0]
    assert run.data.metrics["objective"] == ledger.trials[0].objective
    assert "no such file" in run.data.tags["mlflow.note.content"]


def test_an_interrupted_sweep_does_not_stay_running(again):
    ledger = again()
    trials = ledger.done()
    ledger.trials = {}

    def interrupted():
        with tracking.follow(ledger) as tell:
            tell(trials[0])
            until(lambda: client_of(ledger).get_experiment_by_name("tiny"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    found = by_kind(client_of(ledger))
    assert found["sweep"][0].info.status == "KILLED"
    with tracking.follow(ledger) as tell:
        for trial in trials:
            tell(trial)
    check_complete(ledger, client_of(ledger))


# What somebody deletes.


def deleted(ledger):
    """Deletes the experiment; gives the function that restores it as a message has said."""
    client = client_of(ledger)
    found = client.get_experiment_by_name("tiny")
    client.delete_experiment(found.experiment_id)

    def restore(message):
        uri = tracking.tracking_uri(ledger.file.experiment, ledger.storage)
        command = f"MLFLOW_TRACKING_URI={uri} mlflow experiments restore --experiment-id {found.experiment_id}"
        assert command in message.replace("\n", ""), message
        client.restore_experiment(found.experiment_id)

    return restore


def test_a_deleted_experiment_is_told_at_the_start_and_logged_once_it_is_restored(again, capsys):
    ledger = again()
    tracking.log(ledger)
    restore = deleted(ledger)
    trials = ledger.done()
    del ledger.trials[3]
    with tracking.follow(ledger) as tell:
        while "warning" not in (said := capsys.readouterr().out):  # before any trial has ended
            time.sleep(0.05)
        tell(trials[3])
    assert "its experiment 'tiny' was deleted" in said
    assert "tracking.experiment" in said
    assert "warning" not in capsys.readouterr().out
    whole = again()
    with pytest.raises(tracking.TrackingError, match="was deleted; restore it"):
        tracking.log(whole)
    with pytest.raises(tracking.TrackingError, match="was deleted; restore it"):
        tracking.reachable(tracking.tracking_uri(whole.file.experiment, whole.storage), "tiny")
    restore(said)
    assert tracking.log(whole) == 0, "they were all written before"
    check_complete(whole, client_of(whole))


@pytest.mark.parametrize("what", ["experiment", "sweep", *marked("slow", "experiment, for good", "trial", "renamed")])
def test_what_is_deleted_while_a_sweep_goes_on_is_written_again(again, capsys, what):
    ledger = again()
    client = client_of(ledger)
    trials = ledger.done()
    ledger.trials = {}
    restore = None
    with tracking.follow(ledger) as tell:
        tell(trials[0])
        tell(trials[1])
        until(lambda: client.get_experiment_by_name("tiny"))
        until(lambda: [run.info.status for run in by_kind(client)["trial"]] == ["FINISHED"] * 2)
        found = by_kind(client)
        if what == "experiment":
            restore = deleted(ledger)
        elif what == "experiment, for good":
            deleted(ledger)
            # As `mlflow gc` does after the trash was emptied.
            client._tracking_client.store._hard_delete_experiment(client.get_experiment_by_name("tiny").experiment_id)
        elif what == "sweep":
            client.delete_run(found["sweep"][0].info.run_id)
        elif what == "trial":
            client.delete_run(found["trial"][0].info.run_id)
        else:
            client.rename_experiment(found["sweep"][0].info.experiment_id, "another name")
        tell(trials[2])
        tell(trials[3])
    said = capsys.readouterr().out
    assert said.count("warning") == bool(restore), said
    if restore:
        restore(said)
    name = "another name" if what == "renamed" else "tiny"
    if what in ("experiment", "trial"):
        assert tracking.log(again()) >= 1
    check_complete(again(), client, name)


def test_where_nothing_listens_a_sweep_goes_on_with_one_warning(again, capsys):
    ledger = again(uri="http://me:secret@127.0.0.1:1")
    trials = ledger.done()
    ledger.trials = {}
    with tracking.follow(ledger) as tell:
        began = time.monotonic()
        for trial in trials:
            tell(trial)
        assert time.monotonic() - began < 0.1
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("warning") == 1
    assert "127.0.0.1:1" in shown.out
    assert "pdiff log" in shown.out
    assert "secret" not in shown.out + shown.err


@contextlib.contextmanager
def serving(folder, port):
    """A real server over HTTP; gives its process."""
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{folder}/served.db", "--artifacts-destination", str(folder / "files")]
    with (folder / "server.log").open("ab") as output:
        process = subprocess.Popen(
            [*command, *stores], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        for _ in range(240):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            assert process.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.5)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_a_server_that_dies_or_hangs_is_caught_up_with(again, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    port = free_port()
    ledger = again(uri=f"http://127.0.0.1:{port}")
    trials = ledger.done()
    ledger.trials = {}
    with serving(tmp_path, port) as process, tracking.follow(ledger) as tell:
        tell(trials[0])
        client = client_of(ledger)
        while not client.get_experiment_by_name("tiny") or not by_kind(client)["trial"]:
            time.sleep(0.5)
        assert by_kind(client)["sweep"][0].info.status == "RUNNING"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for trial in trials[1:]:
            tell(trial)
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("warning") == 1, shown
    assert "Retrying" not in shown.err
    assert all(ledger.storage.list(f"{ledger.folder}/trials")), "results are in storage"
    with serving(tmp_path, port) as process:
        complete = again(uri=f"http://127.0.0.1:{port}")
        client = client_of(complete)
        assert by_kind(client)["sweep"][0].info.status == "RUNNING", "it died too early to know better"
        os.killpg(process.pid, signal.SIGSTOP)
        began = time.monotonic()
        with tracking.follow(complete) as tell:
            tell(complete.trials[3])
            assert time.monotonic() - began < 0.1
        assert time.monotonic() - began < 40
        os.killpg(process.pid, signal.SIGCONT)
        tracking.log(complete)
        check_complete(complete, client)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_its_runs(tmp_path):
    load(tmp_path, GRID, tmp_path / "storage")
    command = [sys.executable, "-m", "pdiff_ray.sweep", str(tmp_path / "sweep.yaml"), "--in-process"]
    options = ["--storage", str(tmp_path / "storage")]
    process = subprocess.Popen([*command, *options], start_new_session=True)
    ledger = load(tmp_path, GRID, tmp_path / "storage")
    while len(ledger.done()) < 2:
        assert process.poll() is None
        time.sleep(0.2)
        ledger = load(tmp_path, GRID, tmp_path / "storage")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run([*command, *options], check=True)
    check_complete(ledger, client_of(ledger))
