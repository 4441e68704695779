"""The MLflow that runs go to: where it is, whether it answers, and a server for its pages."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from rich.markup import escape

from pdiff_ray.common import signals
from pdiff_ray.common.errors import ConfigError, PdiffError
from pdiff_ray.common.progress import console
from pdiff_ray.common.secrets import without_secrets
from pdiff_ray.config.schema import Experiment
from pdiff_ray.storage.files import Storage
from pdiff_ray.tracking.database import SQLITE, TrackingError, database, prepare_database

# A dead server must not hold up the work: MLflow's defaults retry for minutes. Nor does it report on its users here.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
START_S, STOP_S = 300.0, 10.0  # that a server may take to start, on a busy machine, and to stop


def tracking_uri(experiment: Experiment, storage: Storage) -> str:
    """Returns the configured MLflow, or a SQLite file in the storage folder (in `pdiff-storage` if that is remote)."""
    uri = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return uri or f"{SQLITE}{_place(storage, 'mlflow.db')}"


def experiment_name(experiment: Experiment) -> str:
    """Returns the name of the experiment on MLflow."""
    return experiment.tracking.experiment or experiment.name


def _place(storage: Storage, name: str) -> Path:
    return Path(storage.path(name)) if storage.local else Path("pdiff-storage").resolve() / name


def warn(error: PdiffError) -> None:
    """Prints that runs could not be written, and what to do."""
    console.print(
        f"[bold yellow]warning:[/] {escape(str(error))}\n  results are safe in storage; `pdiff log`, or the same "
        "command again, logs them later"
    )


@contextlib.contextmanager
def translated(uri: str, remedy: str = "") -> Iterator[None]:
    """Turns whatever MLflow, its database or the network raise into a TrackingError of one line."""
    try:
        yield
    except PdiffError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise TrackingError(f"MLflow at {uri}: {reason}{remedy}") from None


@dataclass(frozen=True)
class Connection:
    """An experiment on an MLflow.

    Attributes:
        folder: that files of runs are below, if the database is the storage's own.
    """

    client: Any
    experiment_id: str
    folder: Path | None = None

    def check_place(self, uri: str) -> None:
        """Raises TrackingError if a database that comes from elsewhere has files of a run, at `uri`, go elsewhere."""
        place = Path(unquote(uri.removeprefix("file://"))).resolve()
        if self.folder and not place.is_relative_to(self.folder.resolve()):
            raise TrackingError(
                f"{self.folder.parent / 'mlflow.db'}: this experiment's files go to {uri}, as the storage was moved or "
                "comes from elsewhere; name another experiment in tracking.experiment, or move the database aside"
            )

    def search(self, condition: str, **options: Any) -> list[Any]:
        """Returns all runs that meet a condition; `max_results` and `order_by` are MLflow's."""
        found: list[Any] = []
        token = None
        while True:
            page = self.client.search_runs([self.experiment_id], condition, page_token=token, **options)
            found += page
            token = page.token
            if not token or "max_results" in options:
                return found


def connect(uri: str, name: str, storage: Storage) -> Connection:
    """Opens the experiment `name`, or creates it. To be called within `translated`."""
    import mlflow
    from mlflow.exceptions import MlflowException

    _quieten()
    # Left behind by a surrounding MLflow job, it would make every run here a child of that one.
    os.environ.pop("MLFLOW_RUN_ID", None)
    if file := database(uri):
        prepare_database(file)
    client = mlflow.MlflowClient(tracking_uri=uri)
    folder = _place(storage, "mlflow-artifacts")
    location = folder.as_uri() if file else None
    own = folder if file and file.parent == folder.parent else None
    if found := find_experiment(client, uri, name):
        return Connection(client, found, own)
    tags = {"mlflow.experimentKind": "custom_model_development"}  # else it opens on pages for language models
    try:
        return Connection(client, client.create_experiment(name, artifact_location=location, tags=tags), own)
    except MlflowException:  # another process made it in between
        if found := find_experiment(client, uri, name):
            return Connection(client, found, own)
        raise


def get_ready(experiment: Experiment, storage: Storage) -> None:
    """Has the SQLite file made that runs go to, if they go to one, which takes seconds: for a thread of its own.

    What is wrong, whoever writes runs finds as well.
    """
    with contextlib.suppress(Exception):
        if file := database(tracking_uri(experiment, storage)):
            _quieten()
            prepare_database(file)


def _quieten() -> None:
    for noisy, level in (("mlflow", logging.WARNING), ("alembic", logging.WARNING), ("urllib3", logging.ERROR)):
        logging.getLogger(noisy).setLevel(level)


def find_experiment(client: Any, uri: str, name: str) -> str | None:
    """Returns the id of the experiment `name` on the MLflow at `uri`; None if there is none.

    Raises:
        TrackingError: it was deleted. It keeps its name, and is not restored without being asked for, with all the runs
            that somebody wanted gone.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        return None
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"MLflow at {uri}: its experiment {name!r} was deleted; restore it with `MLFLOW_TRACKING_URI={uri} mlflow "
            f"experiments restore --experiment-id {found.experiment_id}`, or name another one in tracking.experiment"
        )
    return str(found.experiment_id)


@dataclass(frozen=True)
class Mark:
    """A note in storage that something has been written to an MLflow, which saves looking there.

    Attributes:
        content: what was written, by key.
    """

    storage: Storage
    uri: str
    experiment: str
    content: str

    @property
    def _file(self) -> str:
        text = f"{self.uri}|{self.experiment}|{self.content}"
        return f"tracking/{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def is_there(self) -> bool:
        """Returns whether it was left, and MLflow's database has not gone since."""
        file = database(self.uri)
        return self.storage.exists(self._file) and (file is None or file.exists())

    def leave(self) -> None:
        """Writes it."""
        note = {"uri": without_secrets(self.uri), "experiment": self.experiment, "content": self.content}
        self.storage.write(self._file, json.dumps(note).encode())


def reachable(uri: str, name: str | None = None) -> str:
    """Returns a few words on the MLflow at `uri`.

    Args:
        name: of an experiment that is to be written to.

    Raises:
        TrackingError: it does not answer, or cannot be used.
    """
    file = database(uri)
    if file and not file.exists():
        return "created by the first run"
    import mlflow

    with translated(uri, "; start the server or correct tracking.uri"):
        if file:
            prepare_database(file)
        client = mlflow.MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
        if name:
            find_experiment(client, uri, name)
    return "there" if file else "answers"


class Server:
    """MLflow's own server on the loopback interface, for as long as the context is entered.

    It ends with the context, whatever ends that, signals too.

    Args:
        uri: MLflow's database.

    Attributes:
        address: of its pages.

    Raises:
        ConfigError: the port is taken.
    """

    def __init__(self, uri: str, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            try:
                probe.bind(("127.0.0.1", port))
            except (OSError, OverflowError) as error:
                reason = getattr(error, "strerror", None) or error
                raise ConfigError(f"port {port} of 127.0.0.1: {reason}; name another one with --port") from None
        command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        # One worker without a job queue takes a quarter of the memory of MLflow's defaults.
        self.command = [sys.executable, "-m", *command, "--workers", "1"]
        # All users of a machine see arguments of processes, and the database's address may have a password.
        own = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_BACKEND_STORE_URI": uri}
        self.environment = {**os.environ, **own}

    def __enter__(self) -> Server:
        self._log = tempfile.TemporaryFile()
        self._ending = signals.ending()
        self._ending.__enter__()
        self._process = subprocess.Popen(
            self.command, env=self.environment, stdout=self._log, stderr=self._log, start_new_session=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        for number in signals.ENDING:
            signal.signal(number, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGKILL):  # to the server and its workers
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        self._ending.__exit__(None, None, None)
        self._log.close()

    def wait_until_ready(self) -> None:
        """Waits until the server answers.

        Raises:
            TrackingError: it has ended, or does not answer for minutes.
        """
        until = time.monotonic() + START_S
        while time.monotonic() < until and self._process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.address}/health", timeout=5):
                return
            time.sleep(0.2)
        ended = self._process.poll() is not None
        raise self._error("has ended" if ended else f"does not answer after {START_S:.0f} s")

    def wait(self) -> None:
        """Waits for the server to end, which only a signal or an error makes it do.

        Raises:
            TrackingError: it has ended.
        """
        self._process.wait()
        raise self._error("has ended")

    def _error(self, what: str) -> TrackingError:
        """Returns an error with the server's last line of output."""
        self._log.seek(0)
        *_, last = ["no output", *self._log.read().decode(errors="replace").strip().splitlines()]
        return TrackingError(f"MLflow's server at {self.address} {what}: {last}")
