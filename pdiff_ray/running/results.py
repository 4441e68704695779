"""The results of an experiment: its table, verdict, networks and files, read from storage."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from pdiff_ray.common.errors import PdiffError, StorageError
from pdiff_ray.config.schema import Experiment
from pdiff_ray.reports import tables
from pdiff_ray.reports.answers import Answer, answers, conclusion
from pdiff_ray.running.experiment import make_plan
from pdiff_ray.stages import report
from pdiff_ray.stages.stored import Networks, lineage
from pdiff_ray.storage.artifacts import Artifact, find, opened
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.parameters import ParameterStore, without_vector


@dataclass(frozen=True)
class Result:
    """The results of a finished experiment.

    Attributes:
        name: the name of the experiment.
        artifacts: the artifact of each stage, by the name of the stage.
    """

    name: str
    artifacts: Mapping[str, Artifact]

    @classmethod
    def find(cls, storage: Storage, prefix: str) -> Result:
        """Opens the result whose report's key starts with `prefix`.

        Raises:
            StorageError: there is no such report, or an artifact that it was made from is gone.
        """
        found = find(storage, prefix)
        if found.stage != "report":
            raise StorageError(f"{found.folder}: is no result; `pdiff artifacts list` shows the keys of stage report")
        chain = lineage(storage, found.folder)
        if gone := [name for name, manifest in chain if manifest is None]:
            raise StorageError(f"{found.folder}: {gone[0]}, which it was made from, is not in {storage.place} any more")
        artifacts = {m.stage: opened(storage, m) for _, m in reversed(chain) if m is not None}
        return cls(str(found.config.get("name")), artifacts)

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        """The numbers of each group of networks (`groups`) and the verdict (`verdict`), as JSON values."""
        return report.load_summary(self.artifacts)

    @property
    def verdict(self) -> str:
        """The verdict, in words and numbers, on whether the samples are replicas, interpolations or new."""
        return str(self.summary["verdict"]["text"])

    @property
    def answers(self) -> tuple[Answer, ...]:
        """Whether it worked, is new, and is better than the simplest thing that works; empty if evaluated earlier."""
        return answers(self.summary)

    def groups(self) -> pa.Table:
        """Returns the result table, with a row for each group of networks; accuracies are fractions."""
        return pa.Table.from_pylist(self.summary["groups"])

    def networks(self) -> pa.Table:
        """Returns a table with a row for every network that was judged: originals, baselines and samples.

        `id` is a network's in `zoo` or `samples`, as `groups()["best_id"]` is; baselines are not kept, and have none.
        """
        records = ParameterStore(self.artifacts["evaluation"]).records()
        return pa.Table.from_pylist([{**without_vector(record), "id": record.number} for record in records])

    @property
    def zoo(self) -> Networks:
        """All networks of the zoo: those of `experiment.split.learned`, held-out ones, and those of a second run."""
        return Networks(self.artifacts["zoo"])

    @property
    def samples(self) -> Networks:
        """The generated networks."""
        return Networks(self.artifacts["samples"])

    @property
    def report(self) -> str:
        """The location of the HTML page."""
        return report.report_location(self.artifacts)

    @property
    def sharing(self) -> str:
        """A description of what was gained by sharing the computation of frozen parts."""
        return report.achieved_sharing(self.artifacts)

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds that each stage took, by its name."""
        return report.stage_seconds(self.artifacts)

    def to_dict(self) -> dict[str, Any]:
        """Returns the results as JSON values."""
        return {
            "name": self.name,
            **self.summary,
            "answers": [asdict(answer) for answer in self.answers],
            "seconds": self.seconds,
            "report": self.report,
            "artifacts": {stage: artifact.location for stage, artifact in self.artifacts.items()},
        }

    def __str__(self) -> str:
        rows = tables.table_rows(self.summary)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([f"{self.name}: {tables.headline(self.summary)}", *lines, *conclusion(self.summary)])


def open_result(experiment: Experiment) -> Result:
    """Opens the result of an experiment that has been run.

    Raises:
        PdiffError: it has not been run, or not to its end.
    """
    plan = make_plan(experiment)
    if plan.missing:
        several = "base" in plan.missing and experiment.resources.workers > 1
        alone = ", or ask with --set resources.workers=1 for what ran with --in-process" if several else ""
        raise PdiffError(
            f"{experiment.name}: {', '.join(plan.missing)} missing in {plan.storage.place}; run it first{alone}"
        )
    return Result(experiment.name, plan.artifacts)
