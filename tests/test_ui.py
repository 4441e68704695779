"""`pdiff ui`: MLflow's server starts, answers before links are printed, and ends with the command."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from helpers import TINY
from test_cli import pdiff

from pdiff_ray import tracking
from pdiff_ray.common.errors import ConfigError
from pdiff_ray.tracking import server


@pytest.fixture
def port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def answers(port):
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
        return True
    return False


def test_links_are_printed_when_the_server_answers(tmp_path, port):
    pdiff("sweep", TINY, "--storage", tmp_path, "--in-process")
    code = "from pdiff_ray.cli.main import main; main()"
    arguments = ["ui", "--storage", str(tmp_path), "--port", str(port)]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline().startswith(f"starting MLflow at http://127.0.0.1:{port}")
        assert process.stdout.readline() == "tiny\n"
        assert answers(port)
        links = [process.stdout.readline().split() for _ in range(3)]
        assert [name for name, _ in links] == ["latest", "trials", "charts"]
        assert all(address.startswith(f"http://127.0.0.1:{port}/#/experiments/") for _, address in links)
        assert process.stdout.readline() == "serving until Ctrl-C\n"
    finally:
        process.terminate()
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert not answers(port)


def stand_in(port, folder):
    """A server that answers as MLflow's does, with a worker whose process id is in a file."""
    (folder / "health").touch()
    serve = f"exec {sys.executable} -m http.server {port} --bind 127.0.0.1 --directory {folder}"
    return ["sh", "-c", f"sleep 600 & echo $! > {folder}/worker; {serve}"]


def runs(pid):
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_the_server_and_its_workers_end_with_the_command(tmp_path, port, number):
    code = f"""
import sys

from pdiff_ray.common import signals
from pdiff_ray.tracking.server import Server

server = Server("sqlite://", {port})
server.command = {stand_in(port, tmp_path)!r}
try:
    with server:
        server.wait_until_ready()
        print("ready", flush=True)
        server.wait()
except KeyboardInterrupt:
    sys.exit(signals.exit_code())
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"ready\n"
    worker = int((tmp_path / "worker").read_text())
    assert runs(worker)
    process.send_signal(number)
    assert process.wait(timeout=30) == 128 + number
    assert not answers(port)
    assert not runs(worker)


def test_signals_mean_what_they_did_before_once_the_server_has_ended(tmp_path, port):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    serving = tracking.Server("sqlite://", port)
    serving.command = stand_in(port, tmp_path)
    with serving:
        serving.wait_until_ready()
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] != before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


def test_a_port_that_is_taken_is_named_with_the_remedy(tmp_path):
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        printed = pdiff("ui", "--storage", tmp_path, "--port", port, code=ConfigError.exit_code)
    assert f"port {port} of 127.0.0.1: Address already in use; name another one with --port" in printed
    assert "starting" not in printed
    assert "--port" in pdiff("ui", "--storage", tmp_path, "--port", 70000, code=ConfigError.exit_code)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("echo no such schema; exit 3", "has ended: no such schema"),
        ("sleep 60", "does not answer after 1 s: no output"),
    ],
)
def test_a_server_that_does_not_come_up_is_one_message(port, monkeypatch, command, reason):
    monkeypatch.setattr(server, "START_S", 1.0)
    serving = tracking.Server("sqlite://", port)
    serving.command = ["sh", "-c", command]
    with pytest.raises(tracking.TrackingError, match=f"MLflow's server at http://127.0.0.1:{port} {reason}"), serving:
        serving.wait_until_ready()


def test_a_server_that_dies_while_it_serves_ends_the_command(tmp_path, port):
    serving = tracking.Server("sqlite://", port)
    serving.command = stand_in(port, tmp_path)
    with serving:
        serving.wait_until_ready()
        os.kill(serving._process.pid, signal.SIGKILL)
        with pytest.raises(tracking.TrackingError, match="has ended"):
            serving.wait()


def test_the_address_of_the_database_is_no_argument(port):
    serving = tracking.Server("postgresql://me:secret@127.0.0.1:1/db", port)
    assert not any("secret" in argument for argument in serving.command)
    assert serving.environment["MLFLOW_BACKEND_STORE_URI"].endswith("@127.0.0.1:1/db")
