"""Sweeps on MLflow: a run for the sweep, and one below it for each trial.

A thread writes while the sweep goes on. It starts from what the ledger knows and from what is on MLflow already, and
writes what is missing, so a launch after a crash, a server that was away, and a sweep that ended long ago are all the
same to it.

A trial of a search with several repeats is one run with means over them: what the search compares is the setting, and
the compare page then has a line for each. The repeats of a grid are trials, and runs, of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np

from pdiff_ray.common.errors import ConfigError, PdiffError, StorageError
from pdiff_ray.common.progress import console
from pdiff_ray.config.schema import Experiment
from pdiff_ray.config.sweep import format_label
from pdiff_ray.sweeps.ledger import Ledger
from pdiff_ray.sweeps.trial import Trial
from pdiff_ray.tracking import pages
from pdiff_ray.tracking.runs import (
    MAX_NOTE,
    NOTE,
    PARENT,
    Curve,
    Run,
    ensure,
    flat,
    now,
    tracked,
    trial_run,
    write,
    write_files,
    zoo_run,
)
from pdiff_ray.tracking.server import Connection, Mark, connect, experiment_name, tracking_uri, translated, warn

PAUSE_S = 60.0  # until a server that failed is tried again
FAREWELL_S = 10.0  # for the last words of a sweep that was interrupted
MAX_NAME = 50  # characters of a run's name
STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED", "incomplete": "KILLED"}  # by state
SUMMARY_TABLE = "summary.md"
SEEDED = ("training", "zoo", "generator", "sampling")  # sections that follow the experiment's seed

Message = Trial | Literal["begin", "end", "interrupted"]


@contextlib.contextmanager
def follow(ledger: Ledger) -> Iterator[Callable[[Trial], None]]:
    """Has a thread tell MLflow of a sweep; gives the function that takes every trial that has ended.

    An MLflow that cannot be reached costs one warning, and neither stops nor delays the sweep.
    """
    writer = _Writer(ledger)
    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
    if not writer.mark().is_there():
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
    """Writes until the sweep has ended. A failure is told once; later attempts catch up with what it left out."""
    failed, paused_until, changed = False, 0.0, False
    while True:
        message = inbox.get()
        last = message in ("end", "interrupted")
        if isinstance(message, Trial):
            writer.trials[message.number] = message
        changed = changed or not last
        if message == "interrupted" and writer.at is None:
            return
        if changed and (last or time.monotonic() >= paused_until):
            try:
                writer.catch_up()
                if last:
                    writer.finish()
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
    """Writes what MLflow lacks of a sweep's trials that have ended; gives the number of runs written.

    Raises:
        TrackingError
    """
    writer = _Writer(ledger)
    written = writer.catch_up()
    writer.finish()
    return written


class _Writer:
    """Writes a sweep's runs; used by one thread at a time."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        experiment = ledger.file.experiment
        self.uri = tracking_uri(experiment, ledger.storage)
        self.experiment = experiment_name(experiment)
        self.name = f"{experiment.name}-{ledger.key[:6]}"
        self.trials = {trial.number: trial for trial in ledger.done()}
        self.hurry = threading.Event()  # set where trials are to be left out, for now
        self.untold = _unstated_seeds(ledger)
        self.disconnect()

    def disconnect(self) -> None:
        """Forgets what is on MLflow."""
        self.at: Connection | None = None
        self.parent = ""
        self.children: dict[int, tuple[str, str]] = {}  # run id and fingerprint by trial
        self.zoos: set[str] = set()

    def mark(self) -> Mark:
        """A note that all of the trials have been written."""
        content = "".join(_fingerprint(trial) for _, trial in sorted(self.trials.items())) + self._table()
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        return Mark(self.ledger.storage, self.uri, self.experiment, f"{self.ledger.key}-{digest}")

    def catch_up(self) -> int:
        """Writes every trial that is not there as it is known now; gives their number."""
        with translated(self.uri):
            at = self.at or self._open()
            written = 0
            for number, trial in sorted(self.trials.items()):
                fingerprint = _fingerprint(trial)
                old, there = self.children.get(number, ("", ""))
                if fingerprint == there or self.hurry.is_set():
                    continue
                if old:  # a failed trial has been tried again
                    at.client.delete_run(old)
                run = self._trial(at, trial, fingerprint)
                self.children[number] = (write(at, run), fingerprint)
                written += 1
            if written:
                self._tell(at, finished=False)
            return written

    def finish(self) -> None:
        """Ends the sweep's run, with all that the sweep's folder holds; notes that nothing is left to be written."""
        with translated(self.uri):
            at = self.at or self._open()
            self._tell(at, finished=True)
            if not self.hurry.is_set():
                write_files(at, self.parent, self._files())
            at.client.set_terminated(self.parent, STATUS[self._state()])
        if not self.hurry.is_set():
            self.mark().leave()

    def _state(self) -> str:
        if any(trial.state == "failed" for trial in self.trials.values()):
            return "failed"
        return "finished" if len(self.trials) == self.ledger.total else "incomplete"

    def _open(self) -> Connection:
        """Connects, and finds what is there of the sweep."""
        at = connect(self.uri, self.experiment, self.ledger.storage)
        for key, value in (pages.general_views() | pages.sweep_views(self.ledger)).items():
            at.client.set_experiment_tag(at.experiment_id, key, value)
        found = at.search(f"tags.kind = 'sweep' and tags.`pdiff.key` = '{self.ledger.key}'")
        if found:
            self.parent = found[0].info.run_id
            at.client.update_run(self.parent, status="RUNNING")
        else:
            self.parent = self._create(at)
        self.children = {}
        for run in at.search(f"tags.`{PARENT}` = '{self.parent}'"):
            number = int(run.data.tags["pdiff.trial"])
            if run.info.status == "RUNNING" or number in self.children:  # left by a crash
                at.client.delete_run(run.info.run_id)
            else:
                self.children[number] = (run.info.run_id, run.data.tags["pdiff.record"])
        self.at = at
        self._tell(at, finished=False)
        return at

    def _create(self, at: Connection) -> str:
        from mlflow.entities import Param

        tags = {
            "kind": "sweep",
            "pdiff.key": self.ledger.key,
            "pdiff.location": self.ledger.storage.location(self.ledger.folder),
        }
        run_id: str = at.client.create_run(at.experiment_id, run_name=self.name, tags=tags).info.run_id
        params = [Param(key, value[:500]) for key, value in pages.settings(self.ledger.sweep).items()]
        at.client.log_batch(run_id, params=params)
        return run_id

    def _tell(self, at: Connection, *, finished: bool) -> None:
        """Tells on the sweep's run, and on the experiment, how far the sweep is."""
        from mlflow.entities import Metric, RunTag

        ledger = self.ledger
        counts: dict[str, int] = Counter(trial.state for trial in self.trials.values())
        results = [t for t in self.trials.values() if t.state == "finished" and t.objective is not None]
        results.sort(key=lambda t: t.objective or 0.0, reverse=ledger.sweep.maximize)
        best = ""
        metrics: dict[str, float] = {
            f"trials/{state}": counts.get(state, 0) for state in ("finished", "stopped", "failed")
        }
        if results:
            metrics["best_objective"] = results[0].objective or 0.0
            best = f"Best {ledger.sweep.metric} {results[0].objective:.4f}: {_name(results[0])}."
        ranked = [self.children[t.number][0] for t in results if t.number in self.children]
        addresses = pages.sweep_addresses(at.experiment_id, ledger.key, self.parent, ranked)
        table = self._table() if finished else ""
        note = pages.describe_sweep(ledger, counts, best, addresses, table)
        tags = {
            NOTE: note,
            "state": self._state() if finished else "running",
            "best_trial": _name(results[0]) if results else "-",
            # They may change from one launch to the next, which parameters of a run must not.
            **{f"sweep.{name}": str(getattr(ledger.sweep, name)) for name in sorted(ledger.sweep.unkeyed)},
        }
        step = len(self.trials)
        points = [Metric(name, float(value), now(), step) for name, value in metrics.items()]
        at.client.log_batch(self.parent, metrics=points, tags=[RunTag(key, value) for key, value in tags.items()])
        at.client.set_experiment_tag(at.experiment_id, NOTE, note)

    def _table(self) -> str:
        name = f"{self.ledger.folder}/{SUMMARY_TABLE}"
        return self.ledger.storage.read(name).decode() if self.ledger.storage.exists(name) else ""

    def _files(self) -> dict[str, bytes]:
        """Tables, figures and report of the sweep."""
        storage, folder = self.ledger.storage, f"{self.ledger.folder}/"
        names = [name.removeprefix(folder) for name in storage.list(self.ledger.folder, recursive=True)]
        return {name: storage.read(f"{folder}{name}") for name in names if not name.startswith("trials/")}

    def _trial(self, at: Connection, trial: Trial, fingerprint: str) -> Run:
        """A trial's run: of what its experiments made or, where there is nothing, of what the ledger knows."""
        ledger, note = self.ledger, ""
        try:
            experiments = ledger.experiments(trial)
        except ConfigError as error:  # a search has combined values that do not fit together
            experiments, note = [ledger.file.experiment], str(error)
        results: list[Run] = []
        if trial.state == "finished":
            try:
                results = self._results(at, experiments)
            except StorageError as error:  # artifacts that were deleted or damaged
                note = str(error)
        experiment = experiments[0]
        ended = max((run.ended for run in results), default=now())
        seconds = trial.seconds or 0.0
        # The first is the one that a compare page shows.
        metrics = {"objective": trial.objective} if trial.objective is not None else {}
        metrics |= _means([run.metrics for run in results]) | {"seconds/trial": seconds}
        curves = _mean_curves([run.curves for run in results])
        if trial.curve:
            curves["rung/objective"] = trial.curve
        files = {
            (f"repeat-{repeat}/{name}" if len(results) > 1 else name): content
            for repeat, run in zip(trial.repeats, results, strict=False)
            for name, content in run.files.items()
        }
        tags = {
            PARENT: self.parent,
            "sweep": self.name,
            "state": trial.state,
            "seed": str(experiment.seed),
            "pdiff.sweep": ledger.key,
            "pdiff.trial": str(trial.number),
            "pdiff.record": fingerprint,
        }
        for name in ("pdiff.version", "pdiff.location"):
            if results:
                tags[name] = results[0].tags[name]
        if trial.reason:
            tags["reason"] = trial.reason[:MAX_NOTE]
            note = f"**failed:** {trial.reason}"
        return Run(
            kind="trial",
            key=_key(results) or f"{ledger.key}-{trial.number}",
            name=_name(trial),
            started=min((run.started for run in results), default=ended - int(1000 * seconds)),
            ended=ended,
            tags=tags,
            params=self._params(trial, experiment),
            metrics=metrics,
            curves=curves,
            files=files,
            note=note or "\n\n".join(run.note for run in results),
            status=STATUS[trial.state],
        )

    def _results(self, at: Connection, experiments: Sequence[Experiment]) -> list[Run]:
        """What the repeats of a finished trial made; writes runs of their zoos."""
        results = []
        for experiment in experiments:
            artifacts = self.ledger.artifacts(experiment)
            results.append(trial_run(experiment, artifacts))
            if (zoo := artifacts["zoo"].key) not in self.zoos:
                ensure(at, zoo_run(experiment, artifacts))
                self.zoos.add(zoo)
        return results

    def _params(self, trial: Trial, experiment: Experiment) -> dict[str, str]:
        """The same parameters for all trials: first what varies, then the seeds, then the configuration."""
        sweep = self.ledger.sweep
        configuration = dict(flat(tracked(experiment)))
        chosen = {
            name: format_label(trial.assignment[name]) if name in trial.assignment else _text(configuration.get(name))
            for name in sweep.parameters
        }
        seeds = {path: str(configuration[path]) for path in ("seed", *sweep.seeds)}
        touched = [
            path
            for name, parameter in sweep.parameters.items()
            for path in (
                {p for fields in parameter.variants.values() for p in fields} if parameter.variants else [name]
            )
        ]
        rest = {
            # What no trial sets is left out; what only some set must not be.
            path: _text(value)
            for path, value in configuration.items()
            if path not in self.untold and (value is not None or any(f"{path}.".startswith(f"{t}.") for t in touched))
        }
        return chosen | seeds | {path: value for path, value in rest.items() if path not in chosen}


def _unstated_seeds(ledger: Ledger) -> set[str]:
    """Seeds of sections that follow the experiment's: where they vary, it does, and one of them is enough to see."""
    varied = {*ledger.sweep.seeds, *ledger.sweep.parameters}
    raw: Mapping[str, Any] = ledger.file.raw
    return {f"{s}.seed" for s in SEEDED if f"{s}.seed" not in varied and "seed" not in (raw.get(s) or {})}


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _name(trial: Trial) -> str:
    """Number and values of a trial, short enough for a legend."""
    text = f"{trial.number:02d} {trial.text}"
    return text if len(text) <= MAX_NAME else f"{text[: MAX_NAME - 1]}…"


def _fingerprint(trial: Trial) -> str:
    """A hash of all that is known of a trial."""
    return hashlib.sha256(json.dumps(asdict(trial), sort_keys=True).encode()).hexdigest()[:16]


def _key(results: Sequence[Run]) -> str:
    """The key of a trial's report; of those of several repeats, a hash."""
    if len(results) <= 1:
        return "".join(run.key for run in results)
    return hashlib.sha256("".join(run.key for run in results).encode()).hexdigest()[:16]


def _means(of: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The means of the metrics that all have."""
    shared = [name for name in of[0] if all(name in other for other in of)] if of else []
    return {name: float(np.mean([metrics[name] for metrics in of])) for name in shared}


def _mean_curves(of: Sequence[Mapping[str, Curve]]) -> dict[str, Curve]:
    """The means of the curves that all have, as far as the shortest goes."""
    shared = [name for name in of[0] if all(name in other for other in of)] if of else []
    curves: dict[str, Curve] = {}
    for name in shared:
        points = zip(*(curves_of[name] for curves_of in of), strict=False)
        curves[name] = [(same[0][0], float(np.mean([value for _, value in same]))) for same in points]
    return curves
