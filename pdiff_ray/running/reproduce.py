"""Cells of the paper's tables: what was published, the trials that stand beside it, and whether the two agree.

`published.csv` has the tables. A cell's network and data set are those of a trial in one of the sweeps in `FILES`. Its
latest results are remembered in storage, whatever was overridden to get them.
"""

from __future__ import annotations

import csv
import fnmatch
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import ConfigDict
from rich.text import Text

from pdiff_ray.common.errors import ConfigError, StorageError, did_you_mean
from pdiff_ray.common.progress import console
from pdiff_ray.config import sweep
from pdiff_ray.config.schema import Experiment
from pdiff_ray.config.section import flat
from pdiff_ray.config.sweep import Parameter, SweepFile
from pdiff_ray.evaluation.comparison import student
from pdiff_ray.reports.pages import render
from pdiff_ray.reports.tables import markdown
from pdiff_ray.running import sweep as sweeps
from pdiff_ray.running.results import Result
from pdiff_ray.storage.checks import Findings
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.sealed import read_listed, read_sealed, seal, write_listed
from pdiff_ray.sweeps.ledger import Ledger
from pdiff_ray.sweeps.trial import Trial, has_results

FILES = ("paper_small.yaml", "paper_mini.yaml", "paper_table1.yaml")
SOURCES = {"v1": "arXiv 2402.13144v1, Table 1", "final": "arXiv 2402.13144v3"}
COLUMNS = {"original": "original", "ensemble": "ensemble", "generated": "p-diff"}  # of the tables, by group
GAUSSIAN = "full Gaussian"  # the line of that baseline
ROUNDING = 0.0005  # of a published accuracy, as a fraction
FOLDER, REPORT_FILE, TABLE_FILE = "reproduced", "report.html", "table.md"
AGAIN = "run the cell again"
LEGEND = (
    "Test accuracy in percent, of ours the mean over networks with a 95 % interval; n: seeds. relation: agrees unless "
    "our interval of p-diff minus original, or minus ensemble, excludes the side on which the published one is (at or "
    "above, or below). "
    "digits: agree if the published numbers lie in our intervals, but for their rounding; else it names those that do "
    "not."
)


@dataclass(frozen=True)
class Cell:
    """A cell of the paper's tables; accuracies are fractions, by group."""

    table: str
    network: str
    data: str
    published: Mapping[str, float]

    @property
    def name(self) -> str:
        """What it is called, for example v1/mnist/s-2."""
        return f"{self.table}/{self.data.replace('-', '')}/{self.network}".lower()

    @property
    def trial(self) -> str:
        """The values of its trial."""
        return f"{self.network} {self.data}"

    @property
    def file(self) -> str:
        """The name in storage of what is remembered of its trial, which both tables may have."""
        return f"{FOLDER}/{self.name.partition('/')[2].replace('/', '_')}.json"

    @property
    def text(self) -> str:
        return " / ".join(f"{100 * self.published[group]:.1f}" for group in COLUMNS)


@functools.cache
def published() -> tuple[Cell, ...]:
    """Returns all cells of the paper's tables, in their order."""
    with Path(__file__).with_name("published.csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            Cell(row["table"], row["network"], row["data"], {group: float(row[group]) / 100 for group in COLUMNS})
            for row in csv.DictReader(file)
        )


def choose(names: Sequence[str]) -> list[Cell]:
    """Returns the cells with these names, which may be patterns such as v1/mnist/*.

    Raises:
        ConfigError: there is none of a name.
    """
    known = {cell.name: cell for cell in published()}
    chosen: dict[str, Cell] = {}
    for name in names:
        found = fnmatch.filter(known, name.lower())
        if not found:
            near = did_you_mean(name.lower(), known) or "; `pdiff reproduce --list` shows them"
            raise ConfigError(f"the paper's tables have no cell {name!r}{near}")
        chosen |= {one: known[one] for one in found}
    return list(chosen.values())


def load(folder: Path, cells: Sequence[Cell], overrides: Sequence[str]) -> list[SweepFile]:
    """Returns the sweeps of some cells: those of the files in `folder`, with the cells' trials alone.

    Raises:
        ConfigError: an override is wrong, or the folder has not all of the files.
    """
    wanted, found = {cell.trial for cell in cells}, []
    for name in FILES:
        file = sweep.load(folder / name, overrides) if wanted else None
        if not isinstance(file, SweepFile):
            continue
        fields = {" ".join(map(str, assignment.values())): file.fields(assignment) for assignment in file.sweep.grid()}
        if chosen := {trial: fields[trial] for trial in fields if trial in wanted}:
            wanted -= chosen.keys()
            found.append(
                replace(file, sweep=file.sweep.model_copy(update={"parameters": {"cell": Parameter(variants=chosen)}}))
            )
    if wanted:
        raise ConfigError(f"{folder}: {', '.join(FILES)} have no trial {', '.join(sorted(wanted))}")
    return found


@dataclass(frozen=True)
class Remembered:
    """What storage remembers of a cell's trial.

    Attributes:
        settings: those of its experiments that are not the file's.
        reports: the keys of its results, one for each seed.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    settings: tuple[str, ...]
    reports: tuple[str, ...]


def run(file: SweepFile, plain: SweepFile, *, in_process: bool = False) -> list[Trial]:
    """Runs the trials of some cells that are left, as any sweep's, and remembers the results.

    Args:
        plain: the same without overrides.

    Returns:
        The trials that failed.
    """
    ledger, failed = Ledger(file), list[Trial]()
    trials = [Trial(-1, assignment, tuple(range(ledger.sweep.repeats))) for assignment in ledger.sweep.grid()]
    found = [(trial, ledger.experiments(trial)) for trial in trials]
    if not all(has_results(ledger.artifacts(experiment)) for _, same in found for experiment in same):
        failed = sweeps.run(ledger, in_process=in_process).failed
    files = {cell.trial: cell.file for cell in published()}
    for trial, same in found:
        artifacts = [ledger.artifacts(experiment) for experiment in same]
        if reports := tuple(one["report"].key for one in artifacts if has_results(one)):
            settings = tuple(_changes(same[0], plain.vary(trial.assignment)))
            kept = Remembered(settings, reports)
            ledger.storage.write(files[str(trial.assignment["cell"])], seal(asdict(kept)))
    return failed


def _changes(experiment: Experiment, plain: Experiment) -> Iterator[str]:
    """Yields the settings that results depend on and that are not the plain experiment's."""
    own, others = dict(flat(experiment.keyed())), dict(flat(plain.keyed()))
    kept = ("data.", "network.", "training.", "zoo.", "generator.", "sampling.", "evaluation.")
    for path, value in own.items():
        if path.startswith(kept) and others.get(path) != value:
            yield f"{path}={value}"


@dataclass(frozen=True)
class OverSeeds:
    """The mean over seeds of an accuracy or a difference, as a fraction, and half the width of its 95 % interval."""

    estimate: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float], within: Sequence[float]) -> OverSeeds | None:
        """Returns the interval of a mean over seeds: the wider one of Student's, and of the mean of those within runs.

        Args:
            within: half the widths of each run's interval, if known: over its networks and test images.
        """
        if not values:
            return None
        between, freedom = 0.0, len(values) - 1
        if freedom:
            between = student(freedom) * float(np.std(values, ddof=1)) / len(values) ** 0.5
        return cls(float(np.mean(values)), max(between, float(np.mean(within)) if within else 0.0))

    def holds(self, value: float) -> bool:
        return abs(value - self.estimate) <= self.half + ROUNDING + 1e-9

    @property
    def text(self) -> str:
        return f"{100 * self.estimate:.2f}±{100 * self.half:.2f}"


@dataclass(frozen=True)
class Line:
    """A cell and what came out of it here; without results it has not been run.

    Attributes:
        results: one for each seed.
        settings: that are not the file's.
    """

    cell: Cell
    results: Sequence[Result] = ()
    settings: Sequence[str] = ()

    def mean(self, group: str) -> OverSeeds | None:
        """Returns the mean test accuracy of a line of the results' tables; None if they have none."""
        groups = [{line["group"]: line for line in result.summary["groups"]} for result in self.results]
        values = [found[group]["mean"] for found in groups if group in found]
        return OverSeeds.of(values, self._within("means", group))

    def difference(self, group: str) -> OverSeeds | None:
        """Returns the mean accuracy of the generated networks minus a group's; None if results have none."""
        groups = [{line["group"]: line["mean"] for line in result.summary["groups"]} for result in self.results]
        values = [found["generated"] - found[group] for found in groups if group in found]
        return OverSeeds.of(values, self._within("differences", group))

    def _within(self, kind: str, group: str) -> list[float]:
        found = [result.summary.get("comparison", {}).get(kind, {}).get(group) for result in self.results]
        return [(one["upper"] - one["lower"]) / 2 for one in found if one]

    @property
    def relation(self) -> str:
        """Whether p-diff is on the same side of the originals, and of the ensemble, as in the paper."""
        if not self.results:
            return "not run"
        other = [COLUMNS[group] for group in ("original", "ensemble") if not self._same_side(group)]
        return f"differs: {', '.join(other)}" if other else "agrees"

    def _same_side(self, group: str) -> bool:
        side = 1 if self.cell.published["generated"] >= self.cell.published[group] else -1
        found = self.difference(group)
        return found is None or side * found.estimate + found.half >= 0

    @property
    def digits(self) -> str:
        """Whether the published numbers are in our intervals, or which are not."""
        found = {group: self.mean(group) for group in COLUMNS}
        out = [COLUMNS[g] for g, mean in found.items() if mean and not mean.holds(self.cell.published[g])]
        return "-" if not self.results else f"differ: {', '.join(out)}" if out else "agree"

    @property
    def verdict(self) -> str:
        """Of each seed, or of all: the verdict's word, and that for the accuracy beside the best simple baseline."""
        found = [result.summary["verdict"] for result in self.results]
        words = [[known["word"], known.get("accuracy")] for known in found]
        return "; ".join(dict.fromkeys(", ".join(filter(None, pair)) for pair in words))

    @property
    def cells(self) -> list[str]:
        """The line of the table, as text."""
        means = [self.mean(group) for group in ("original", "ensemble", GAUSSIAN, "generated")]
        texts = [mean.text if mean else "-" for mean in means]
        return [
            self.cell.name,
            self.cell.text,
            str(len(self.results)),
            *texts,
            self.verdict,
            self.relation,
            self.digits,
        ]


HEAD = ["cell", "published", "n", "original", "ensemble", "Gaussian", "p-diff", "verdict", "relation", "digits"]


def lines(storage: Storage, cells: Sequence[Cell]) -> list[Line]:
    """Returns a line for each cell, with the results that storage remembers."""
    return [_line(storage, cell) for cell in cells]


def _line(storage: Storage, cell: Cell) -> Line:
    if not storage.exists(cell.file):
        return Line(cell)
    try:
        kept = read_sealed(storage, cell.file, Remembered, AGAIN)
        return Line(cell, [Result.find(storage, key) for key in kept.reports], kept.settings)
    except StorageError as error:  # one that is damaged or deleted does not cost the others' table
        console.print("[bold yellow]warning[/]:", Text(str(error)))
        return Line(cell)


def table(found: Sequence[Line]) -> list[list[str]]:
    """Returns the table as text, headings first."""
    return [HEAD, *(line.cells for line in found)]


def write_page(storage: Storage) -> str:
    """Writes the page with all cells of the tables, and the table of those that have been run; returns its location."""
    every = lines(storage, published())
    done = [line for line in every if line.results]
    grids = {}
    for name, source in SOURCES.items():
        of = {(line.cell.network, line.cell.data): line for line in every if line.cell.table == name}
        networks, data = (list(dict.fromkeys(pair[i] for pair in of)) for i in (0, 1))
        grids[f"{name}: {source}"] = (data, [(one, [of.get((one, other)) for other in data]) for one in networks])
    page = render(
        "reproduce.html.jinja",
        name="The paper's tables",
        grids=grids,
        rows=table(done),
        legend=LEGEND,
        reports=[(line, [_address(result) for result in line.results]) for line in done],
    )
    write_listed(storage, FOLDER, {REPORT_FILE: page.encode(), TABLE_FILE: markdown(table(done)).encode()})
    return storage.location(f"{FOLDER}/{REPORT_FILE}")


def _address(result: Result) -> str:
    """Returns a report's address relative to the page."""
    return "../" + result.report.removeprefix(result.artifacts["report"].storage.location(""))


def verify(storage: Storage, folder: str) -> Findings:
    """Reads all that is in the folder."""
    found = Findings()
    for name in {cell.file: None for cell in published() if storage.exists(cell.file)}:
        found.check(read_sealed, storage, name, Remembered, AGAIN)
    found.check(read_listed, storage, folder)
    return found
