"""The SQLite file that runs go to where no server is named: made whole, and looked at before MLflow opens it."""

from __future__ import annotations

import contextlib
import sqlite3
import time
import uuid
from pathlib import Path
from typing import Any

from filelock import FileLock

from pdiff_ray.common.errors import PdiffError
from pdiff_ray.common.progress import console

SQLITE = "sqlite:///"
POLL_S, SETTLED_S = 0.5, 10.0  # without a change, after which nobody is making a file's tables any more


class TrackingError(PdiffError):
    """MLflow cannot be reached or refuses; results are in storage nevertheless."""


def database(uri: str) -> Path | None:
    """Returns the file of an MLflow whose database is one of this machine, else None."""
    path = uri.removeprefix(SQLITE).partition("?")[0]
    return Path(path) if uri.startswith(SQLITE) and path not in ("", ":memory:") else None


def prepare_database(file: Path) -> None:
    """Sees to it that a file has all of MLflow's tables, and appears when it has.

    MLflow cannot go on where it was killed while it made them. Such a file, which has no runs, is moved aside.

    Raises:
        TrackingError: the file has the tables of another version, or is no database.
    """
    if file.exists() and _revision(file) == _newest():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if file.exists():
            wanted = _newest()
            while (found := _revision(file)) != wanted and 0 <= time.time() - file.stat().st_mtime < SETTLED_S:
                time.sleep(POLL_S)  # a server may be making them right now
            if found == wanted:
                return
            if _ask(file, "runs", "SELECT count(*) FROM runs"):
                raise TrackingError(
                    f"{file}: its tables are of another MLflow ({found}, not {wanted}); copy it and run `mlflow db "
                    f"upgrade {SQLITE}{file}`, or move it away, and `pdiff log FILE` writes its runs again"
                )
            aside = file.with_name(f"{file.name}.unfinished-{uuid.uuid4().hex[:8]}")
            file.rename(aside)
            console.print(f"{file}: its tables were unfinished, without runs; made anew, the old file is {aside.name}")
        for remnant in file.parent.glob(f"{file.name}.*.tmp*"):  # of a process that was killed
            remnant.unlink()
        temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.tmp")
        _make(temporary)
        temporary.rename(file)


def _make(file: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(f"{SQLITE}{file}", (file.parent / "mlflow-artifacts").as_uri())
    store.engine.dispose()  # closes the file


def _newest() -> str:
    """Returns the revision of the tables that the installed MLflow works with."""
    from mlflow.store.db.utils import _get_latest_schema_revision

    revision: str = _get_latest_schema_revision()
    return revision


def _revision(file: Path) -> str | None:
    """Returns the revision of a file's tables; None if they have none, unfinished as they are."""
    revision: str | None = _ask(file, "alembic_version", "SELECT version_num FROM alembic_version")
    return revision


def _ask(file: Path, table: str, query: str) -> Any:
    """Returns the first value that a query of a table gives; None if there is none, or no such table."""
    try:
        with contextlib.closing(sqlite3.connect(file)) as connection:
            known = connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", [table]).fetchone()
            row = connection.execute(query).fetchone() if known else None
            return row[0] if row else None
    except sqlite3.Error as error:
        raise TrackingError(
            f"{file}: cannot be read as an SQLite database ({error}); move it away, and `pdiff log FILE` writes its "
            "runs again"
        ) from None
