"""The SQLite file of MLflow: made whole by one of several processes, and left alone where it is another's."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import threading

import mlflow
import pytest
from helpers import tiny, until
from test_cli import pdiff

from pdiff_ray import tracking
from pdiff_ray.tracking.database import prepare_database


def outdated(empty, tmp_path, *statements):
    """A database whose tables are not MLflow's newest, which nobody is working on."""
    file = tmp_path / "mlflow.db"
    shutil.copy(empty, file)
    with contextlib.closing(sqlite3.connect(file)) as connection:
        for statement in ("UPDATE alembic_version SET version_num = 'old'", *statements):
            connection.execute(statement)
        connection.commit()
    os.utime(file, (0, 0))
    return file


def test_tables_that_were_left_unfinished_are_made_anew(empty, tmp_path, capsys):
    file = outdated(empty, tmp_path, "DROP TABLE runs")
    before = file.read_bytes()
    assert tracking.reachable(f"sqlite:///{file}", "tiny") == "there"
    assert "its tables were unfinished, without runs; made anew" in capsys.readouterr().out
    assert mlflow.MlflowClient(tracking_uri=f"sqlite:///{file}").create_experiment("tiny")
    (aside,) = tmp_path.glob("mlflow.db.unfinished*")
    assert aside.read_bytes() == before


def test_tables_of_another_version_with_runs_are_left_alone(empty, tmp_path):
    run = "INSERT INTO runs (run_uuid, experiment_id) VALUES ('0123456789abcdef', 0)"
    file = outdated(empty, tmp_path, run)
    before = file.read_bytes()
    with pytest.raises(tracking.TrackingError, match="of another MLflow") as caught:
        tracking.reachable(f"sqlite:///{file}")
    assert f"`mlflow db upgrade sqlite:///{file}`" in str(caught.value)
    assert "pdiff log" in str(caught.value)
    assert file.read_bytes() == before


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 100)
    expected = f"{tmp_path}/mlflow.db: cannot be read as an SQLite database (file is not a database); move it away"
    with pytest.raises(tracking.TrackingError, match="cannot be read as an SQLite database"):
        tracking.reachable(f"sqlite:///{tmp_path}/mlflow.db")
    assert expected in pdiff("ui", "--storage", tmp_path, code=1)


def test_the_database_is_made_while_others_work(tmp_path):
    experiment, artifacts = tiny(tmp_path)
    tracking.get_ready(experiment, artifacts["base"].storage)
    made = (tmp_path / "mlflow.db").stat()
    assert tracking.reachable(f"sqlite:///{tmp_path}/mlflow.db") == "there"
    assert (tmp_path / "mlflow.db").stat().st_ino == made.st_ino


@pytest.mark.parametrize("uri", ["sqlite:///{}/mlflow.db", "http://127.0.0.1:1"])
def test_who_writes_says_what_is_wrong_and_who_prepares_does_not(uri, tmp_path, capsys):
    uri = uri.format(tmp_path)
    (tmp_path / "mlflow.db").write_bytes(b"no database at all")
    experiment, artifacts = tiny(tmp_path, f"tracking.uri={uri}")
    tracking.get_ready(experiment, artifacts["base"].storage)
    assert (tmp_path / "mlflow.db").read_bytes() == b"no database at all"
    assert capsys.readouterr() == ("", "")
    with pytest.raises(tracking.TrackingError):
        tracking.reachable(uri)


def test_processes_that_start_at_once_make_one_database(tmp_path):
    file = tmp_path / "mlflow.db"
    threads = [threading.Thread(target=prepare_database, args=(file,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {path.name for path in tmp_path.iterdir()} <= {"mlflow.db", "mlflow.db.lock"}
    assert tracking.reachable(f"sqlite:///{file}") == "there"


@pytest.mark.slow
def test_a_driver_killed_while_it_makes_the_tables_leaves_none(tmp_path):
    file = tmp_path / "mlflow.db"
    code = f"from pathlib import Path; from pdiff_ray.tracking.database import *; prepare_database(Path({str(file)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code])
    until(lambda: any(part.stat().st_size > 100_000 for part in tmp_path.glob("mlflow.db.*.tmp")))
    process.kill()
    process.wait()
    assert not file.exists()
    prepare_database(file)
    assert {path.name for path in tmp_path.iterdir()} <= {"mlflow.db", "mlflow.db.lock"}
    assert tracking.reachable(f"sqlite:///{file}") == "there"
