"""Output of the commands: the plan of an experiment or a sweep, its results, and where they are."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pdiff_ray import distributed
from pdiff_ray.cli.options import DEFAULT_STORAGE, print_json
from pdiff_ray.common.errors import PdiffError
from pdiff_ray.common.progress import console
from pdiff_ray.config.schema import Data, Experiment
from pdiff_ray.config.sweep import Parameter, as_value, format_value
from pdiff_ray.data import sources
from pdiff_ray.evaluation.metrics import described
from pdiff_ray.reports import tables
from pdiff_ray.reports.answers import conclusion
from pdiff_ray.running import reproduce
from pdiff_ray.running.experiment import Plan
from pdiff_ray.running.reproduce import Line
from pdiff_ray.running.results import Result
from pdiff_ray.running.sweep import SweepResult
from pdiff_ray.stages.table import STAGES
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.parameters import ParameterStore
from pdiff_ray.sweeps import report as sweep_report
from pdiff_ray.sweeps import table as sweep_table
from pdiff_ray.training.subset import full_steps

if TYPE_CHECKING:
    from pdiff_ray.estimates.estimate import Cost, Estimator
    from pdiff_ray.sweeps.ledger import Ledger
    from pdiff_ray.sweeps.trial import Trial

MAX_TRIALS = 15  # how many trials of a search are printed
FIRST_SHOWN, LAST_SHOWN = 30, 5  # trials of a plan that are printed if it has more than both together
NETWORKS_SHOWN = 12
NAMES_SHOWN = 6  # of files that are not used
STATES = {"running": "begun", "finished": "done", "stopped": "stopped early", "failed": "failed"}


def print_start(plan: Plan) -> None:
    """Prints what is about to be built, and where."""
    e = plan.experiment
    todo = ", ".join(plan.missing) or "nothing, all of it is there"
    console.print(f"[bold]{e.name}[/]: {escape(e.network.name)} on {escape(e.data.name)}; to build: {todo}")
    console.print(f"  storage {plan.storage.place}", markup=False)


def print_plan(plan: Plan, as_json: bool = False) -> None:
    """Prints the stages of an experiment, whether they are done, and the time and memory that the others will take."""
    if as_json:
        print_json({**plan.to_dict(), **_data_dict(plan.experiment.data)})
        return
    from pdiff_ray.estimates.estimate import Estimator

    e, estimator = plan.experiment, Estimator(plan.storage, trace=True)
    costs = estimator.costs(e, plan.artifacts, plan.missing)
    what = {name: STAGES[name].about(e) for name in plan.artifacts}
    what["zoo"] += f": {_generated(plan, estimator)[0]:,} values"
    rows = []
    for stage, artifact in plan.artifacts.items():
        cost = costs.get(stage)
        rest = ("to build", what[stage], _duration(cost.seconds), _gib(cost.memory)) if cost else ("there", what[stage])
        rows.append((stage, artifact.key, *rest))
    _print_table(f"plan of {e.name}", ("stage", "key", "state", "what", "time", "memory"), rows)
    if layers := _generated(plan, estimator)[1]:
        console.print(f"layers: {', '.join(layers)}")
    _print_data(e.data)
    if costs:
        console.print(
            f"shared: {'; zoo steps are '.join(filter(None, _sharing(estimator, e)))}\n"
            f"time: {_duration(_sum(cost.device_s for cost in costs.values()))} of devices, "
            f"{_duration(_sum(cost.seconds for cost in costs.values()))} with the processes below, one stage after "
            f"another\n{_basis(estimator, costs.values())}"
        )
    r = e.resources
    console.print(
        f"storage {escape(plan.storage.place)}\n"
        f"Ray {distributed.ray_address(r) or 'local'}: {r.workers} workers x {r.cpus_per_worker} cores and "
        f"{r.gpus_per_worker} GPUs, {r.actors} actors x {r.cpus_per_actor} cores and {r.gpus_per_actor} GPUs"
    )
    # What would stop the plan on this machine is only printed: a dry run may be for another one.
    if plan.needs_ray and e.data.name != "digits":  # importing scikit-learn, which has them, takes longer than the rest
        try:
            sources.check_data(e.data)
        except PdiffError as error:
            console.print(f"[bold yellow]missing:[/] {error}")


def _data_dict(data: Data) -> dict[str, Any]:
    """Returns what is found of a data set as JSON values; nothing if it is not on this machine."""
    try:
        return {"data": asdict(sources.inventory(data))}
    except PdiffError:
        return {}


def _print_data(data: Data) -> None:
    """Prints images and classes of every split, what is not used, and what may be wrong."""
    try:
        found = sources.inventory(data)
    except PdiffError:  # it is not on this machine
        return
    info, splits = found.info, []
    for split, count in found.images.items():
        classes = found.classes[split]
        splits.append(f"{split} {count:,} images" + ("" if classes is None else f" of {classes:,} classes"))
    where = f" ({found.where})" if found.where else ""
    shape = f"{info.channels} x {info.image_size} x {info.image_size} pixels, {info.num_classes:,} classes"
    lines = [f"data {data.name}{where}: {', '.join(splits)}; {shape}"]
    if found.unused:
        more = f" and {len(found.unused) - NAMES_SHOWN} more" if len(found.unused) > NAMES_SHOWN else ""
        lines.append(
            f"not used, as they have no split's or image's name: {', '.join(found.unused[:NAMES_SHOWN])}{more}"
        )
    for line in lines:
        console.print(line, markup=False)
    for warning in found.warnings:
        console.print(f"[bold yellow]warning:[/] {escape(warning)}")


def print_sweep_plan(ledger: Ledger, as_json: bool = False) -> None:
    """Prints the trials of a sweep, what they share, what is done, and the time and memory that the rest will take."""
    from pdiff_ray.estimates.estimate import Estimator
    from pdiff_ray.sweeps.plan import make_plan

    estimator = Estimator(ledger.storage)
    plan, sweep, e = make_plan(ledger, estimator), ledger.sweep, ledger.file.experiment
    if as_json:
        print_json({"name": e.name, "storage": ledger.storage.place, **plan.to_dict(), **_data_dict(e.data)})
        return
    _print_question(ledger)
    if plan.trials:
        rows = [(str(trial.number), trial.text, _state(ledger, trial)) for trial in plan.trials]
        if len(rows) > FIRST_SHOWN + LAST_SHOWN:
            left_out = len(rows) - FIRST_SHOWN - LAST_SHOWN
            rows = [*rows[:FIRST_SHOWN], ("...", f"{left_out} more", ""), *rows[-LAST_SHOWN:]]
        _print_table("trials", ("trial", "values", "state"), rows)
    counts = [(stage, needed, there, needed - there) for stage, (needed, there) in plan.counts.items()]
    _print_table("distinct artifacts", ("stage", "needed", "there", "to build"), counts)
    if plan.networks:
        sharing = [(name, *_sharing(estimator, of)) for name, of in list(plan.networks.items())[:NETWORKS_SHOWN]]
        if len(plan.networks) > NETWORKS_SHOWN:
            sharing.append((f"... {len(plan.networks) - NETWORKS_SHOWN} more", "", ""))
        _print_table("what networks share", ("network", "shared", "zoo steps"), sharing)
    swept = [experiment.data for trial in plan.trials for experiment in ledger.experiments(trial)] or [e.data]
    distinct = {(d.name, d.source, d.root, d.channels, d.image_size): d for d in swept}
    for data in distinct.values():
        _print_data(data)
    r = e.resources
    console.print(
        f"time: {_duration(plan.first_s + plan.trials_s)} of devices (bases and zoos that are built first "
        f"{_duration(plan.first_s)}, trials {_duration(plan.trials_s)}); {_duration(plan.wall_s)} on this machine with "
        f"{r.workers} workers, then {plan.concurrent} trials at a time of {r.cpus_per_trial} cores and "
        f"{r.gpus_per_trial} GPUs\n"
        f"memory: {_gib(plan.memory)} for the largest process\n"
        f"storage {escape(ledger.storage.place)}\n{_basis(estimator, plan.costs)}"
    )
    if sweep.search != "grid":
        stops = ", and ASHA will stop some of them early" if sweep.scheduler == "asha" else ""
        console.print(f"[dim]What the search will try is unknown: its trials are taken as the file has them{stops}.[/]")
        if sweep.confirm:
            console.print(
                f"[dim]Then the best setting and the file's own are run with {sweep.confirm} new seeds each.[/]"
            )
    if sweep.time_budget:
        console.print(f"time budget: {_duration(sweep.time_budget)} for a launch; the same command goes on from there")
    if any(cost.seconds is None for cost in plan.costs):
        console.print(
            f"[bold yellow]missing:[/] the number of images of {e.data.name} data: its stages are in no sum of times"
        )


def _print_question(ledger: Ledger) -> None:
    """Prints what varies, and how trials are chosen."""
    sweep, name = ledger.sweep, ledger.file.experiment.name
    if sweep.search == "grid":
        seeds = f", {sweep.repeats} seeds each ({', '.join(sweep.seeds)})" if sweep.repeats > 1 else ""
        console.print(f"[bold]{name}[/]: {ledger.total} trials of a grid{seeds}")
        return
    aim = f"to {'raise' if sweep.maximize else 'lower'} {sweep.metric}"
    repeats = f" over {sweep.repeats} seeds" if sweep.repeats > 1 else ""
    console.print(
        f"[bold]{name}[/]: {ledger.total} trials, {aim}{repeats}; search {sweep.search}, scheduler {sweep.scheduler}"
    )
    rows = []
    for field, parameter in sweep.parameters.items():
        condition = ", ".join(f"{other} is {as_value(values)}" for other, values in parameter.when.items())
        rows.append((field, _values(parameter), condition))
    _print_table("space", ("parameter", "values", "if"), rows)


def _values(parameter: Parameter) -> str:
    if parameter.range is None:
        return ", ".join(format_value(value) for value in parameter.values)
    kind = "in the logarithm" if parameter.loguniform else "whole numbers" if parameter.integers else ""
    low, high = parameter.range
    return f"{low:g} to {high:g} {kind}".rstrip()


def _state(ledger: Ledger, trial: Trial) -> str:
    if trial.number not in ledger.trials:
        return "to run"
    state = STATES[ledger.trials[trial.number].state]
    return f"{state}, to run again" if trial.state == "failed" else state


def _generated(plan: Plan, estimator: Estimator) -> tuple[int, list[str]]:
    """Returns how many values are generated, and which layers a rule has counted, with those that run beside them."""
    zoo = plan.artifacts["zoo"]
    if zoo.exists():  # which may be of a version whose rules chose others
        subset = ParameterStore(zoo).subset()
        return subset.size, subset.layers if plan.experiment.zoo.subset.counts_layers else []
    counts = estimator.counts(plan.experiment)
    return counts.subset.size, [
        f"{name} (parallel to {', '.join(beside)})" if beside else name for name, beside in counts.layers.items()
    ]


def _sharing(estimator: Estimator, e: Experiment) -> tuple[str, str]:
    """Returns the part of a forward pass that networks share, and why the zoo's steps are full passes, if they are."""
    counts = estimator.counts(e)
    if counts.whole:
        return "nothing", f"full passes: the network runs whole: {counts.whole}"
    if not counts.shared:
        return "nothing", "full passes: generated parameters reach the first layer"
    reason = full_steps(e, counts.subset)
    return f"up to {counts.shared:.0%} of a pass", f"full passes: {reason}" if reason else ""


def _basis(estimator: Estimator, costs: Collection[Cost]) -> str:
    """Returns a line that tells how the estimates were made."""
    if not costs:
        return "[dim]Nothing is left to be done.[/]"
    known = sum(cost.known for cost in costs)
    ways = [f"{known} stages as long as in earlier runs, with other seeds or the like"] if known else []
    if known < len(costs):
        ways.append(f"{len(costs) - known} stages by {estimator.basis}, perhaps three times too long or short")
    return f"[dim]Estimates: {'; '.join(ways)}; without the start of Ray. Memory is of one process, at most.[/]"


def _print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column in ("time", "memory") else "left")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console.print(table)


def _sum(seconds: Iterable[float | None]) -> float | None:
    """Returns the sum, or None if one of the numbers is unknown."""
    values = list(seconds)
    return None if None in values else sum(filter(None, values))


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _duration(seconds: float | None) -> str:
    """Returns a time in the unit that suits it, with two significant digits."""
    if seconds is None:
        return "?"
    units = (("d", 86400), ("h", 3600), ("min", 60))
    unit, length = next((found for found in units if seconds >= 1.5 * found[1]), ("s", 1))
    value = seconds / length
    digits = f"{value:.1f}" if value < 9.95 else f"{round(value, 1 - math.floor(math.log10(value))):.0f}"
    return f"{digits} {unit}"


def print_result(result: Result, as_json: bool = False) -> None:
    """Prints the table and the verdict of a finished experiment, and where its results are."""
    if as_json:
        print_json(result.to_dict())
        return
    head, *rows = tables.table_rows(result.summary)
    console.print(f"\n[bold]{result.name}[/]: {escape(tables.headline(result.summary))}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in head:
        table.add_column(column, justify="left" if column == "group" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    console.print(tables.legend(described(result.summary)), style="dim", markup=False)
    for line in conclusion(result.summary):
        console.print(line, markup=False)
    if sharing := result.sharing:
        console.print(f"shared: {sharing}", markup=False)
    console.print("seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in result.seconds.items()))
    console.print(f"\nreport     {result.report}", markup=False)
    samples = result.artifacts["samples"]
    console.print(f"networks   {samples.location}  (uv run pdiff export {samples.key} FOLDER)", markup=False)
    _print_ui(samples.storage)


def print_sweep(result: SweepResult, as_json: bool = False) -> None:
    """Prints the table and the verdict of a sweep, where its results are, and which trials failed."""
    if as_json:
        print_json(result.to_dict())
        return
    ledger = result.ledger
    shown = result.rows if ledger.sweep.search == "grid" else result.rows[:MAX_TRIALS]
    head, *body = sweep_table.cells(ledger, shown, console.width)
    console.print(f"\n[bold]{ledger.file.experiment.name}[/]: {escape(sweep_report.headline(ledger))}\n")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for index, column in enumerate(head):
        table.add_column(Text(sweep_table.broken(column)), justify="right" if index else "left", overflow="fold")
    for row in body:
        table.add_row(*map(Text, row))
    console.print(table)
    if len(shown) < len(result.rows):
        console.print(f"{len(result.rows) - len(shown)} more trials in the report")
    console.print(f"\n{sweep_table.legend(ledger)}", style="dim", markup=False)
    if result.verdict:
        console.print(f"verdict: {result.verdict}", markup=False)
    if warning := sweep_report.warning(result.rows):
        console.print("[bold red]WARNING[/]:", Text(warning))
    place = ledger.storage.location(ledger.folder)
    console.print(f"\nreport     {result.report}", markup=False)
    console.print(f"tables     {place}/{sweep_report.SUMMARY_FILE}, {sweep_report.TRIALS_FILE}", markup=False)
    _print_ui(ledger.storage)
    for trial in result.failed:
        console.print("[bold red]failed[/]:", Text(f"trial {trial.number} ({trial.text}): {trial.reason}"))


def print_cells(found: Sequence[Line], page: str | None = None) -> None:
    """Prints cells of the paper's tables beside ours, and where the page is that has all of them."""
    head, *body = reproduce.table(found)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in head:
        left = column in ("cell", "verdict", "digits")
        table.add_column(column, justify="left" if left else "right", no_wrap=column == "cell")
    for line, row in zip(found, body, strict=True):
        table.add_row(*map(Text, row), style=None if line.results else "dim")
    console.print(table)
    console.print(f"\n{reproduce.LEGEND}", style="dim")
    for line in found:
        if line.settings:
            console.print(f"{line.cell.name}: with {', '.join(line.settings)}", markup=False)
    if page:
        console.print(f"\nreport     {page}", markup=False)


def _print_ui(storage: Storage) -> None:
    option = "" if storage.place == Storage(DEFAULT_STORAGE).place else f" --storage {storage.place}"
    console.print(f"MLflow     uv run pdiff ui{option}", markup=False)
