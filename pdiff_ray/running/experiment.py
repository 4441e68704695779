"""Plans an experiment's stages and runs the missing ones."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.markup import escape

from pdiff_ray import distributed, tracking
from pdiff_ray.common.devices import exact_float32, limit_threads
from pdiff_ray.common.errors import ConfigError, PdiffError
from pdiff_ray.common.progress import Display, Progress, console, display
from pdiff_ray.config.schema import Experiment
from pdiff_ray.data import sources
from pdiff_ray.data.kept import default_cache
from pdiff_ray.evaluation.diagnostics import diagnose
from pdiff_ray.evaluation.groups import groups_of
from pdiff_ray.evaluation.metrics import metrics_of
from pdiff_ray.reports import figures
from pdiff_ray.reports.answers import warnings
from pdiff_ray.stages import evaluation
from pdiff_ray.stages.checks import checked_subset
from pdiff_ray.stages.context import Context
from pdiff_ray.stages.table import STAGES, artifacts_of, build_missing
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.files import Storage


@dataclass(frozen=True)
class Plan:
    """What an experiment needs, and what of it is there."""

    experiment: Experiment
    storage: Storage
    artifacts: dict[str, Artifact]
    missing: tuple[str, ...]  # stages to build, in order

    @property
    def needs_ray(self) -> bool:
        return len(self.missing_on("driver")) < len(self.missing)

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON values."""
        stages = [
            {
                "stage": name,
                "key": self.artifacts[name].key,
                "state": "to build" if name in self.missing else "there",
                "about": STAGES[name].about(self.experiment),
            }
            for name in self.artifacts
        ]
        return {"name": self.experiment.name, "storage": self.storage.place, "stages": stages}

    def __str__(self) -> str:
        rows = [f"  {s['stage']:10} {s['key']}  {s['state']:8}  {s['about']}" for s in self.to_dict()["stages"]]
        return "\n".join([f"{self.experiment.name} in {self.storage.place}", *rows])

    def missing_on(self, *places: str) -> list[str]:
        """Returns the missing stages that are built at these places (`Stage.place`), in order."""
        return [stage for stage in self.missing if STAGES[stage].place in places]


def make_plan(experiment: Experiment, target: str = "report", storage: Storage | None = None) -> Plan:
    """Returns the plan to have the artifact of stage `target`.

    Args:
        storage: the experiment's, where it is open already.

    Raises:
        ConfigError: something the configuration names does not exist or does not fit together.
    """
    storage = storage or Storage(experiment.storage_uri)
    artifacts = artifacts_of(experiment, storage)
    missing: list[str] = []
    # The result table is read from samples and evaluation as well.
    wanted = {target, "evaluation", "samples"} if target == "report" else {target}
    if target not in artifacts:
        raise ConfigError(f"{target}.method: is none, so that the experiment has no stage {target}; choose another one")
    names = list(artifacts)
    for name in reversed(names[: names.index(target) + 1]):
        if name in wanted and not artifacts[name].exists():
            missing.insert(0, name)
            wanted.update(names)  # evaluation and report look back at everything before them
    return Plan(experiment, storage, artifacts, tuple(missing))


def check_plan(plan: Plan) -> int:
    """Finds what is wrong before work starts: with network, subset, generator, baselines, metrics, data and storage.

    Returns:
        D, the number of values that are generated.

    Raises:
        PdiffError
    """
    subset = checked_subset(plan.experiment)
    plan.experiment.generator.check_dimension(subset.size)
    groups_of(plan.experiment.evaluation)
    metrics_of(plan.experiment.evaluation)
    if "zoo" in plan.missing and plan.experiment.zoo.imported:
        raise ConfigError(
            f"zoo.imported: no zoo {plan.experiment.zoo.imported!r} in {plan.storage.location('zoo')}; bring it in "
            "with `pdiff import FOLDER FILE`"
        )
    if "generator" in plan.missing:
        plan.experiment.generator.check_fitting()
    if plan.needs_ray:
        sources.check_data(plan.experiment.data)
        for warning in sources.inventory(plan.experiment.data).warnings:
            _warn(warning)
    plan.storage.check_writable()
    return subset.size


@functools.cache  # trials of a sweep share their data
def _warn(text: str) -> None:
    console.print(f"[bold yellow]warning:[/] {escape(text)}")


def run(plan: Plan, *, in_process: bool = False, track: bool = False) -> None:
    """Builds what is missing. Interrupted, it goes on where it was.

    Args:
        in_process: builds in this process, for debugging, instead of on Ray.
        track: records the finished experiment in MLflow; a server that cannot be reached costs a warning.

    Raises:
        PdiffError: something that the user can mend.
    """
    if plan.missing:
        check_plan(plan)
    usage = tracking.Usage(distributed.driver_name(plan.experiment.resources))
    with usage if track and plan.missing else contextlib.nullcontext(), display() as progress:
        if plan.needs_ray:
            started = time.monotonic()
            if in_process:
                _run_here(plan, progress)
            else:
                _run_on_ray(plan, progress, track)
            console.print(f"  built in {time.monotonic() - started:.0f} s")
        for stage in plan.missing_on("driver"):
            build_missing(stage, plan.experiment, plan.artifacts, here(progress))
    if track:
        try:
            tracking.record(plan.experiment, plan.artifacts, usage)
        except tracking.TrackingError as error:
            tracking.warn(error)


def here(progress: Progress) -> Context:
    """Returns this process as the place where stages run; float32 is exact in it from here on."""
    exact_float32()
    return Context(torch.device("cuda" if torch.cuda.is_available() else "cpu"), default_cache(), progress=progress)


def _run_here(plan: Plan, progress: Display) -> None:
    limit_threads(plan.experiment.resources.cpus_per_worker)
    context = here(progress)
    for stage in plan.missing_on("workers", "actor", "actors"):
        build_missing(stage, plan.experiment, plan.artifacts, context)
        _announce(plan, stage)


def _run_on_ray(plan: Plan, progress: Display, track: bool = False) -> None:
    experiment, artifacts = plan.experiment, plan.artifacts
    progress("Ray", 0, 1, "starting")
    distributed.prepare(experiment.resources)
    from pdiff_ray.distributed import pool, session, train

    with session.connect(experiment.resources, progress) as events:
        progress("Ray", 1, 1, "running")
        ready = threading.Thread(target=_get_ready, args=(plan, track), daemon=True)
        ready.start()
        trained, made = plan.missing_on("workers"), plan.missing_on("actor", "actors")
        jobs = [train.Job(experiment, artifacts, trained)] if trained else []
        with contextlib.ExitStack() as stack:
            if made:
                workers = train.useful_workers(jobs) if jobs else 0
                actors = stack.enter_context(pool.Pool(experiment, artifacts, events, beside=workers))
            if jobs:
                if problems := train.train(jobs, events):
                    raise PdiffError(next(iter(problems.values())))
                _announce(plan, *trained)
            for stage in made:
                if stage == "evaluation":
                    context = Context(torch.device("cpu"), default_cache(), progress=progress)
                    evaluation.judge_missing(experiment, artifacts, context, actors.evaluate, actors.size)
                actors.build(stage)  # vectors do not pass through this process
                _announce(plan, stage)
        ready.join()


def _get_ready(plan: Plan, track: bool) -> None:
    """Does what takes time at the end and needs no result: for a thread, while others work."""
    if "report" in plan.missing:
        figures.get_ready()
    if track:
        tracking.get_ready(plan.experiment, plan.storage)


def _announce(plan: Plan, *stages: str) -> None:
    for stage in stages:
        manifest = plan.artifacts[stage].manifest()
        console.print(f"  {stage}: done in {manifest.seconds:.1f} s, {plan.artifacts[stage].location}", markup=False)
        found = manifest.info.get("diagnosis", [])  # of a zoo
        if stage == "generator":
            found = diagnose(None, (), notes=manifest.info).to_list()
        for text in warnings({"zoo": found}):
            console.print(f"  [bold yellow]warning:[/] {escape(text)}")
