"""SIGTERM and SIGHUP end commands as Ctrl-C does: one message, the exit code of the signal, no run left RUNNING."""

import os
import signal
import subprocess
import sys

import mlflow
import pytest
import yaml
from helpers import TINY, marked

from pdiff_ray.common import signals

CODE = "from pdiff_ray.cli.main import main; main()"


def test_signals_interrupt_and_mean_what_they_did_before_afterwards():
    before = [signal.getsignal(number) for number in signals.ENDING]
    for number in signals.ENDING:
        with pytest.raises(KeyboardInterrupt), signals.ending():
            os.kill(os.getpid(), number)
        assert signals.exit_code() == 128 + number
    assert [signal.getsignal(number) for number in signals.ENDING] == before
    signals._received.clear()
    signals._received.append(signal.SIGINT)
    assert signals.exit_code() == 130


def test_what_nohup_ignores_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.ending():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_a_library_makes_of_signals_is_undone():
    before = signal.getsignal(signal.SIGTERM)
    with signals.kept():
        signal.signal(signal.SIGTERM, lambda *_: None)
    assert signal.getsignal(signal.SIGTERM) is before


def ended(act, file, storage, seen, *options):
    """The exit code and the output of a sweep whose process is acted on once its output has some text."""
    command = [sys.executable, "-c", CODE, "sweep", str(file), "--storage", str(storage), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = ""
    for line in process.stdout:
        said += line
        if seen in line:
            act(process)
            seen = "\0"
    return process.wait(), said


def sent(number):
    return lambda process: process.send_signal(number)


def sweep(folder, **sections):
    file = folder / "sweep.yaml"
    varied = {"parameters": {"generator.members": [4, 12]}, "repeats": 4}
    file.write_text(yaml.safe_dump({"base": str(TINY), "name": "tiny", "sweep": varied, **sections}))
    return file


def test_a_sweep_that_is_terminated_ends_its_run(tmp_path):
    code, said = ended(sent(signal.SIGTERM), sweep(tmp_path), tmp_path, "1 of 8", "--in-process")
    assert code == 128 + signal.SIGTERM, said
    assert said.endswith("interrupted; the same command goes on from here\n")
    assert "Traceback" not in said
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert {run.info.status for run in runs} <= {"KILLED", "FINISHED"}
    assert [run.info.status for run in runs if run.data.tags["kind"] == "sweep"] == ["KILLED"]


LONG = {"zoo": {"members": 400}, "generator": {"diffusion": {"steps": 20000}}}


@pytest.mark.parametrize("number", [*marked("slow", signal.SIGINT, signal.SIGTERM), *marked("long", signal.SIGHUP)])
@pytest.mark.parametrize(
    ("seen", "sections"),
    [("Ray: 0/1", {}), (" 0/400", LONG), (" 12/12", {"generator": LONG["generator"]})],
    ids=["start", "train", "tune"],
)
def test_on_ray_nothing_but_the_message_is_printed(tmp_path, number, seen, sections):
    code, said = ended(sent(number), sweep(tmp_path, **sections), tmp_path, seen)
    assert code == 128 + number, said
    assert said.endswith("interrupted; the same command goes on from here\n")
    assert "***" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize("number", [*marked("long", signal.SIGINT), *marked("slow", signal.SIGTERM)])
def test_after_training_on_ray_too(tmp_path, number):
    code, said = ended(sent(number), TINY, tmp_path, "zoo: done", "--set", "generator.diffusion.steps=20000")
    assert code == 128 + number, said
    assert said.endswith("interrupted; the same command goes on from here\n")
    assert "***" not in said
