"""The trials of a sweep on Ray Tune, which places, retries and stops them, and keeps the time budget.

The ledger says what to try and receives the results. A sweep that is continued is a new Tune experiment with the trials
that are left, so nothing depends on Tune's own snapshots.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from pdiff_ray.common.errors import PdiffError, StorageError, UnavailableError
from pdiff_ray.common.secrets import without_secrets
from pdiff_ray.config.schema import Tracking
from pdiff_ray.data.kept import default_cache
from pdiff_ray.distributed import ray_address
from pdiff_ray.distributed.nodes import check_software, expected_software
from pdiff_ray.distributed.session import (
    beside_driver,
    failures,
    gpu_share,
    leaving,
    own_files,
    report_failure,
    report_progress,
    take_place,
)
from pdiff_ray.stages.context import Context
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.files import Storage
from pdiff_ray.sweeps.ledger import Ledger
from pdiff_ray.sweeps.trial import FINAL_RUNG, OnChange, Trial, run_trial

LEASE_S = 30.0  # after which a claim lapses if it is not renewed
POLL_S = 0.5
PENDING = "TUNE_MAX_PENDING_TRIALS_PG"
MAX_PENDING = 200  # trials of a grid that ask a cluster for a place at a time, as of searches of Tune's own


def run(ledger: Ledger, events: str, unbuildable: dict[str, str], on_change: OnChange, spent_s: float = 0.0) -> None:
    """Runs the trials that are left, until there are none or the time budget is used up.

    Args:
        events: the name of the actor through which workers report.
        unbuildable: why bases and zoos could not be built, by their keys; trials that need them fail.
        on_change: called with every trial when it begins and when it ends.
        spent_s: seconds of the time budget that are used already.
    """
    sweep, resources = ledger.sweep, ledger.file.experiment.resources
    left_s = None if sweep.time_budget is None else sweep.time_budget - spent_s
    if left_s is not None and left_s <= 0:  # bases and zoos have taken it
        return
    claims = f"pdiff-claims-{uuid.uuid4().hex[:8]}"
    # This handle is kept because a named actor lives only as long as its handle does.
    keeper: Any = ray.remote(_Claims).options(name=claims, **beside_driver()).remote()
    gpus = gpu_share(resources.gpus_per_trial, sweep.max_concurrent or 1)
    shared = {
        "metric": sweep.metric,
        "events": events,
        "claims": claims,
        "threads": resources.cpus_per_trial,
        "gpus": gpus,
        "rungs": sweep.scheduler == "asha",
        "software": expected_software(resources),
    }
    scheduler = _ASHA(ledger) if sweep.scheduler == "asha" else None
    searcher = _LedgerSearcher(ledger, unbuildable, shared, on_change)
    (filesystem, place), name = own_files(ledger.storage), f"ray-tune-{uuid.uuid4().hex[:8]}"
    tuner = tune.Tuner(
        tune.with_resources(
            # Not in the trials' configuration, which Tune writes to files, and which is to hold no secrets.
            tune.with_parameters(_trial, storage=ledger.storage.uri),
            {"cpu": resources.cpus_per_trial, "gpu": gpus},
        ),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1,  # until the ledger has no more
            max_concurrent_trials=sweep.max_concurrent,
            time_budget_s=left_s,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_filesystem=filesystem,
            storage_path=place,
            failure_config=tune.FailureConfig(max_failures=sweep.max_retries),
            callbacks=[_Recorder(ledger, searcher, scheduler, on_change)],
            verbose=0,
        ),
    )
    try:
        with _asking_ahead() if sweep.search == "grid" and ray_address(resources) else contextlib.nullcontext():
            tuner.fit()
    finally:
        ray.kill(keeper)
        with contextlib.suppress(OSError):  # it has Tune's snapshots only; the ledger has everything
            filesystem.delete_dir(f"{place}/{name}")


@contextlib.contextmanager
def _asking_ahead() -> Iterator[None]:
    """Has Tune ask for places of many trials at a time, so that a cluster grows by as many nodes, not one by one."""
    before = os.environ.get(PENDING)
    os.environ.setdefault(PENDING, str(MAX_PENDING))
    try:
        yield
    finally:
        if before is None:
            del os.environ[PENDING]


def _trial(config: dict[str, Any], storage: str) -> None:
    """Runs one trial in an actor, which later runs others."""
    number, progress = config["number"], report_progress(config["events"])
    context = Context(
        take_place(config["threads"], config["gpus"]),
        default_cache(),
        progress=lambda task, *rest: progress(f"trial {number}|{task}", *rest),
        leaving=leaving(),
    )

    def report_rung(rung: int, objective: float) -> None:
        tune.report({"rung": rung, "objective": objective})

    # A generator that was interrupted resumes beyond these rungs, and does not report them again.
    for rung, value in config["curve"]:
        tune.report({"rung": rung, "objective": value, "passed": True})
    try:
        check_software(config["software"])
        objective = run_trial(
            config["experiments"],
            Storage(storage, answered=True),
            context,
            config["metric"],
            lambda artifact: _claimed(artifact, config["claims"]),
            report_rung if config["rungs"] else None,
        )
    except UnavailableError as error:  # at the next attempt, or on another node, it may be there
        report_failure(config["events"], f"trial {number}", str(error))
        raise
    except PdiffError as error:  # another attempt would find the same
        outcome = {
            "failed": str(error),
            "crashed": isinstance(error, StorageError),
        }  # by what is no fault of the values
        tune.report({"rung": FINAL_RUNG, "objective": None, **outcome})  # ASHA takes no report without
    except Exception as error:
        report_failure(config["events"], f"trial {number}", f"{type(error).__name__}: {error}")
        raise
    else:
        tune.report({"rung": FINAL_RUNG, "objective": objective, "finished": True})


class _NotInSnapshots:
    """A part of Tune whose pickle is empty: Tune pickles its parts to resume from, but here the ledger is for that."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _LedgerSearcher(_NotInSnapshots, Searcher):
    """The searcher that gives Tune the ledger's trials, one at a time."""

    def __init__(
        self, ledger: Ledger, unbuildable: dict[str, str], shared: dict[str, Any], on_change: OnChange
    ) -> None:
        super().__init__()
        self.ledger, self.unbuildable, self.shared, self.on_change = ledger, unbuildable, shared, on_change
        self.trials: dict[str, Trial] = {}

    def suggest(self, trial_id: str) -> Any:
        while trial := self.ledger.ask():
            try:
                experiments = self.ledger.experiments(trial)
                for experiment in experiments:
                    for artifact in self.ledger.artifacts(experiment).values():
                        if reason := self.unbuildable.get(artifact.key):
                            raise PdiffError(reason)
            except PdiffError as error:
                failed = replace(trial, state="failed", reason=str(error), seconds=0.0)
                self.ledger.record(failed)
                self.on_change(failed)
                continue
            self.trials[trial_id] = trial
            anywhere = [e.model_copy(update={"storage": None, "tracking": Tracking()}) for e in experiments]
            return {**self.shared, "number": trial.number, "curve": trial.curve, "experiments": anywhere}
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass  # `_Recorder` handles it

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


class _ASHA(ASHAScheduler):
    """The ASHA scheduler over the rungs of a generator's fitting, which knows the results of earlier launches."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(
            time_attr="rung",
            metric="objective",
            mode="max" if ledger.sweep.maximize else "min",
            max_t=FINAL_RUNG,
            reduction_factor=ledger.sweep.reduction_factor,
            # Else a result between two rungs counts for the lower one, if the trial began above that.
            stop_last_trials=False,
        )
        # A result at a later rung, of a trial that has none at these, is no result at these.
        factor = ledger.sweep.reduction_factor
        self.decisive = {math.ceil(factor**k) for k in range(FINAL_RUNG) if factor**k <= FINAL_RUNG}
        self.stopped: set[str] = set()
        for trial in ledger.done():
            known: Any = SimpleNamespace(trial_id=f"earlier-{trial.number}")
            nobody: Any = None  # in place of the controller, which ASHA does not use
            self.on_trial_add(nobody, known)
            for rung, objective in trial.curve:
                self._compared(nobody, known, {"rung": rung, "objective": objective})

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "failed" in result:  # there is nothing to compare
            return TrialScheduler.CONTINUE
        decision = self._compared(tune_controller, trial, result)
        if "passed" in result:  # when it was reached first; others have done better meanwhile
            return TrialScheduler.CONTINUE
        if decision == TrialScheduler.STOP and result["rung"] < FINAL_RUNG:
            self.stopped.add(trial.trial_id)
        return decision

    def _compared(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result["rung"] not in self.decisive:
            return TrialScheduler.CONTINUE
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if "failed" not in result and result["rung"] in self.decisive:
            super().on_trial_complete(tune_controller, trial, result)


class _Recorder(_NotInSnapshots, tune.Callback):
    """The callback that records the trials' results in the ledger."""

    def __init__(self, ledger: Ledger, searcher: _LedgerSearcher, scheduler: _ASHA | None, on_change: OnChange) -> None:
        self.ledger, self.searcher, self.scheduler, self.on_change = ledger, searcher, scheduler, on_change
        self.started: dict[str, float] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.started.setdefault(trial.trial_id, time.monotonic())
        self.on_change(self.searcher.trials[trial.trial_id])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if result["rung"] < FINAL_RUNG:
            known = self.searcher.trials[trial.trial_id]
            curve = {**dict(known.curve), result["rung"]: result["objective"]}
            self.searcher.trials[trial.trial_id] = replace(known, curve=tuple(sorted(curve.items())))
            self.ledger.record(self.searcher.trials[trial.trial_id])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result
        if reason := result.get("failed"):
            self._end(trial, state="failed", reason=reason, crashed=result["crashed"])
        elif result.get("finished"):
            self._end(trial, state="finished", objective=result["objective"])
        elif self.scheduler and trial.trial_id in self.scheduler.stopped:
            self._end(trial, state="stopped", objective=result["objective"])
        # Otherwise the time budget has ended the trial, which stays open for the next launch.

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        known = failures(self.searcher.shared["events"])
        told = known.get(f"trial {self.searcher.trials[trial.trial_id].number}")
        last = (trial.get_error() or "its process died").strip().splitlines()[-1]
        self._end(trial, state="failed", reason=without_secrets(told or last), crashed=True)

    def _end(self, trial: Any, **outcome: Any) -> None:
        seconds = round(time.monotonic() - self.started.get(trial.trial_id, time.monotonic()), 3)
        ended = replace(self.searcher.trials[trial.trial_id], seconds=seconds, **outcome)
        self.ledger.record(ended)
        self.on_change(ended)


class _Claims:
    """The actor that knows which trial builds which artifact, by leases that run out when their holder has died."""

    def __init__(self) -> None:
        self.leases: dict[str, tuple[str, float]] = {}

    def claim(self, key: str, holder: str) -> bool:
        """Gives or renews the lease of an artifact, and tells whether `holder` has it now."""
        other, until = self.leases.get(key, (holder, 0.0))
        if other != holder and time.monotonic() < until:
            return False
        self.leases[key] = (holder, time.monotonic() + LEASE_S)
        return True

    def release(self, key: str, holder: str) -> None:
        if self.leases.get(key, ("", 0.0))[0] == holder:  # otherwise it has run out, and another trial may have it
            del self.leases[key]


@contextlib.contextmanager
def _claimed(artifact: Artifact, claims: str) -> Iterator[bool]:
    """Waits while another trial builds the artifact, then yields whether to build it here."""
    actor: Any = ray.get_actor(claims)
    holder = uuid.uuid4().hex
    held = False
    while not artifact.exists() and not (held := ray.get(actor.claim.remote(artifact.key, holder))):
        time.sleep(POLL_S)
    if not held:
        yield False
        return
    done = threading.Event()

    def renew() -> None:
        while not done.wait(LEASE_S / 3):
            actor.claim.remote(artifact.key, holder)

    threading.Thread(target=renew, daemon=True).start()
    try:
        yield not artifact.exists()  # it may have been built since it was last looked for
    finally:
        done.set()
        ray.get(actor.release.remote(artifact.key, holder))
