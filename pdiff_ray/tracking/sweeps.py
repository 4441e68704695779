"""Sweeps on MLflow: a run for the sweep, and one below it for each trial.

A thread writes while the sweep goes on. It starts from what the ledger knows and from what is on MLflow already, and
writes what is missing, so that a launch after a crash, a server that was away, and a sweep that ended long ago are all
the same to it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal

from pdiff_ray.common.errors import PdiffError, StorageError
from pdiff_ray.common.progress import console
from pdiff_ray.storage.sealed import read_listed
from pdiff_ray.sweeps.ledger import Ledger
from pdiff_ray.sweeps.table import amount
from pdiff_ray.sweeps.trial import Trial, best_setting
from pdiff_ray.tracking import pages
from pdiff_ray.tracking.database import TrackingError
from pdiff_ray.tracking.inputs import delete_run
from pdiff_ray.tracking.runs import (
    MAX_NOTE,
    NOTE,
    OBJECTIVE,
    PARENT,
    MlflowRun,
    ensure,
    now,
    params_of,
    trial_run,
    usage_points,
    write,
    write_files,
    zoo_run,
)
from pdiff_ray.tracking.server import Connection, Mark, connect, experiment_name, tracking_uri, translated, warn
from pdiff_ray.tracking.trials import STATUS, fingerprint, name_of, run_of, short_digest
from pdiff_ray.tracking.usage import Usage

PAUSE_S = 60.0  # until a server that failed is tried again
FAREWELL_S = 10.0  # for the last words of a sweep that was interrupted
SUMMARY_TABLE = "summary.md"

Message = Trial | Literal["begin", "end", "interrupted"]


@contextlib.contextmanager
def follow(ledger: Ledger, usage: Usage | None = None) -> Iterator[Callable[[Trial], None]]:
    """Has a thread tell MLflow of a sweep; yields the function that is to be given every trial that has ended.

    An MLflow that cannot be reached costs one warning. It neither stops nor delays the sweep.

    Args:
        usage: of this machine meanwhile.
    """
    writer = _Writer(ledger, usage)
    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
    if len(ledger.done()) < ledger.total or not writer.mark().is_there():
        inbox.put("begin")
    # A daemon: an interrupted sweep does not wait for a server that hangs.
    thread = threading.Thread(target=_follow, args=(writer, inbox), daemon=True, name="mlflow")
    thread.start()
    try:
        yield inbox.put
    except BaseException:
        writer.hurry.set()
        inbox.put("interrupted")
        thread.join(FAREWELL_S)
        raise
    inbox.put("end")
    thread.join()


def _follow(writer: _Writer, inbox: queue.SimpleQueue[Message]) -> None:
    """Writes until the sweep has ended. A failure is told once, and later attempts catch up with what it left out."""
    failed, paused_until, changed = False, 0.0, False
    while True:
        message = inbox.get()
        last = message in ("end", "interrupted")
        if isinstance(message, Trial):
            writer.tell(message)
        changed = changed or not last
        if message == "interrupted" and not writer.begun:
            return
        if changed and (last or time.monotonic() >= paused_until):
            try:
                writer.catch_up(finish=last)
            except PdiffError as error:
                writer.disconnect()
                paused_until = time.monotonic() + PAUSE_S
                if not failed:
                    warn(error)
                failed = True
            else:
                if failed and last:
                    console.print("MLflow is back: all of the sweep is recorded")
        if last:
            return


def log(ledger: Ledger) -> int:
    """Writes what MLflow lacks of a sweep's trials that have ended; returns how many runs that were.

    Raises:
        TrackingError
    """
    return _Writer(ledger).catch_up(finish=True)


class _Writer:
    """Writes a sweep's runs; used by one thread at a time."""

    def __init__(self, ledger: Ledger, usage: Usage | None = None) -> None:
        self.ledger, self.usage, self.started = ledger, usage, 0
        experiment = ledger.file.experiment
        self.uri = tracking_uri(experiment, ledger.storage)
        self.experiment = experiment_name(experiment)
        self.name = f"{experiment.name}-{ledger.key[:6]}"
        self.trials, self.fingerprints = dict[int, Trial](), dict[int, str]()
        for trial in ledger.done():
            self.tell(trial)
        self.hurry = threading.Event()  # set where trials are to be left out, for now
        self.begun = False  # whether there may be a run of the sweep that is RUNNING
        self.disconnect()

    def tell(self, trial: Trial) -> None:
        """Takes note of what is known of a trial."""
        self.trials[trial.number], self.fingerprints[trial.number] = trial, fingerprint(trial)

    def disconnect(self) -> None:
        """Forgets what is on MLflow."""
        self.at: Connection | None = None
        self.parent = ""
        self.children: dict[int, tuple[str, str]] = {}  # run id and fingerprint by trial
        self.zoos: set[str] = set()

    def mark(self) -> Mark:
        """Returns the note that all of the trials, as they are known now, have been written."""
        content = "".join(known for _, known in sorted(self.fingerprints.items()))
        with contextlib.suppress(StorageError):  # it is written again at the end
            content += self._table()
        return Mark(self.ledger.storage, self.uri, self.experiment, f"{self.ledger.key}-{short_digest(content)}")

    def catch_up(self, *, finish: bool) -> int:
        """Writes every trial that is not there as it is known now; returns how many these were.

        Args:
            finish: ends the sweep's run too, with all that the sweep's folder holds, and notes that all is written.
        """
        if self.at:
            try:
                return self._write(self.at, finish)
            except TrackingError:  # somebody may have deleted runs, or the experiment: look again
                self.disconnect()
        with translated(self.uri):
            at = self._open()
        return self._write(at, finish)

    def _write(self, at: Connection, finish: bool) -> int:
        with translated(self.uri):
            written = 0
            for number, trial in sorted(self.trials.items()):
                old, there = self.children.get(number, ("", ""))
                if self.fingerprints[number] == there or self.hurry.is_set():
                    continue
                if old:  # a failed trial has been tried again
                    delete_run(at, old)
                results, note = self._results(at, trial)
                run = run_of(self.ledger, trial, results, {PARENT: self.parent, "sweep": self.name}, note)
                self.children[number] = write(at, run, self.usage), self.fingerprints[number]
                written += 1
            if written or finish:
                self._tell(at, finished=finish)
            if finish:
                if not self.hurry.is_set():
                    write_files(at, self.parent, self._files())
                    if self.usage:
                        at.client.log_batch(self.parent, usage_points(self.usage, self.started, now()))
                at.client.set_terminated(self.parent, STATUS[self._state()])
        if finish and not self.hurry.is_set():
            self.mark().leave()
        return written

    def _results(self, at: Connection, trial: Trial) -> tuple[list[MlflowRun], str]:
        """Returns what the experiments of a trial made, or why that is gone; writes the runs of their zoos."""
        results = []
        try:
            for experiment in self.ledger.possible(trial) if trial.state == "finished" else []:
                artifacts = self.ledger.artifacts(experiment)
                results.append(trial_run(experiment, artifacts))
                if (zoo := artifacts["zoo"].key) not in self.zoos:
                    ensure(at, zoo_run(experiment, artifacts), self.usage)
                    self.zoos.add(zoo)
        except StorageError as error:  # artifacts that were deleted or damaged
            return [], str(error)
        return results, ""

    def _state(self) -> str:
        if any(trial.state == "failed" for trial in self.trials.values()):
            return "failed"
        return "finished" if len(self.trials) == self.ledger.total else "incomplete"

    def _open(self) -> Connection:
        """Connects, and finds what is there of the sweep."""
        ledger, at = self.ledger, connect(self.uri, self.experiment, self.ledger.storage)
        found, self.begun = at.search(f"tags.kind = 'sweep' and tags.`pdiff.key` = '{ledger.key}'"), True
        if found:
            self.parent, self.started = found[0].info.run_id, found[0].info.start_time
            at.client.update_run(self.parent, status="RUNNING")
        else:
            location = ledger.storage.location(ledger.folder)
            tags = {"kind": "sweep", "pdiff.key": ledger.key, "pdiff.location": location}
            made = at.client.create_run(at.experiment_id, run_name=self.name, tags=tags).info
            self.parent, self.started = made.run_id, made.start_time
            at.client.log_batch(self.parent, params=params_of(pages.settings(ledger.sweep)))
        for run in at.search(f"tags.kind = 'trial' and tags.`pdiff.sweep` = '{ledger.key}'"):
            number = int(run.data.tags["pdiff.trial"])
            if run.info.status == "RUNNING" or number in self.children:  # left by a crash
                delete_run(at, run.info.run_id)
                continue
            if run.data.tags.get(PARENT) != self.parent:  # somebody has deleted the sweep's run
                at.client.set_tag(run.info.run_id, PARENT, self.parent)
            self.children[number] = (run.info.run_id, run.data.tags["pdiff.record"])
        self.at = at
        self._tell(at, finished=False)
        return at

    def _tell(self, at: Connection, *, finished: bool) -> None:
        """Tells on the sweep's run, and on the experiment, how far the sweep is."""
        from mlflow.entities import Metric, RunTag

        ledger, ascending = self.ledger, not self.ledger.sweep.maximize
        counts: dict[str, int] = Counter(trial.state for trial in self.trials.values())
        metrics = {f"trials/{state}": float(counts[state]) for state in ("finished", "stopped", "failed")}
        known = {n: t.objective for n, t in self.trials.items() if t.state == "finished" and t.objective is not None}
        ranked = sorted(known, key=lambda number: known[number], reverse=not ascending)
        name, words = "-", ""
        if best := best_setting(self.trials.values(), ledger.sweep.maximize):
            metrics[f"best_{OBJECTIVE}"] = best.objective
            name = name_of(best.trials[0]) if len(best.trials) == 1 else best.text
            words = f"Best {ledger.sweep.metric} {amount(ledger.sweep.metric, best.objective)}: {name}."
        children = [self.children[number][0] for number in ranked if number in self.children]
        links = pages.sweep_addresses(at.experiment_id, ledger.key, self.parent, ascending, children)
        note = pages.describe_sweep(ledger, counts, words, links, self._table() if finished else "")
        tags = {
            NOTE: note,
            "state": self._state() if finished else "running",
            "best_trial": name[:MAX_NOTE],
            # They may change from one launch to the next, which parameters of a run must not.
            **{f"sweep.{name}": str(getattr(ledger.sweep, name)) for name in sorted(ledger.sweep.unkeyed)},
        }
        points = [Metric(name, value, now(), len(self.trials)) for name, value in metrics.items()]
        at.client.log_batch(self.parent, metrics=points, tags=[RunTag(key, value) for key, value in tags.items()])
        at.client.set_experiment_tag(at.experiment_id, NOTE, note)

    def _table(self) -> str:
        return self._files().get(SUMMARY_TABLE, b"").decode()

    def _files(self) -> dict[str, bytes]:
        """Returns tables, figures and report of the sweep."""
        storage, folder = self.ledger.storage, self.ledger.folder
        if files := read_listed(storage, folder):
            return files
        # Those of an earlier version are not listed.
        names = [name.removeprefix(f"{folder}/") for name in storage.list(folder, recursive=True)]
        return {name: storage.read(f"{folder}/{name}") for name in names if not name.startswith("trials/")}
