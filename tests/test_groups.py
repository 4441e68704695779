"""Groups and metrics: the package's own, and those that a user adds."""

import json

import numpy as np
import pytest
import yaml
from helpers import TINY, build, build_missing, context, tiny

from pdiff_ray.common.errors import ConfigError, PdiffError
from pdiff_ray.config import loading
from pdiff_ray.config import sweep as space
from pdiff_ray.config.sweep import OBJECTIVES
from pdiff_ray.evaluation.metrics import METRICS, named_metrics
from pdiff_ray.networks.subset import Entry, Subset
from pdiff_ray.reports.tables import legend, table_rows
from pdiff_ray.running.experiment import check_plan, make_plan
from pdiff_ray.running.sweep import check_sweep
from pdiff_ray.stages import evaluation
from pdiff_ray.stages.evaluation import made_networks, make_tasks
from pdiff_ray.stages.report import described, load_summary
from pdiff_ray.storage.parameters import ParameterStore, Record
from pdiff_ray.sweeps import table as sweep_table
from pdiff_ray.sweeps.ledger import Ledger
from pdiff_ray.sweeps.table import Result, Row
from pdiff_ray.sweeps.trial import Trial

OWN = """
import numpy as np
from pdiff_ray.evaluation.groups import Group, Recipe
from pdiff_ray.evaluation.metrics import Metric

class Halves(Group):
    name = "halves"

    def recipes(self, experiment):
        return [Recipe(parent) for parent in range(3)]

    def vector(self, record, material):
        return material.members[record.parent] / 2

class Short(Halves):
    def vector(self, record, material):
        return np.zeros(3)

class Ensemble(Halves):
    name = "ensemble"

class HeldOut(Halves):
    name = "held-out"

class Nameless(Group):
    pass

def spread(networks):
    \"\"\"Range of test accuracies.\"\"\"
    values = networks.values("test_accuracy")
    return float(values.max() - values.min()) if len(values) > 1 else None

def similarity(networks):
    return 1.0

listed = [1, 2]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_groups.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "own_groups.py"


def test_what_a_search_optimizes_is_a_metric_that_looks_at_no_test_labels():
    names = {metric.name for metric in METRICS.values()}
    assert {objective.partition("/")[2] for objective in OBJECTIVES} <= names
    assert not any("test" in objective for objective in OBJECTIVES)


def test_a_baseline_of_ones_own_changes_no_other_network(own, tmp_path):
    plain, before = tiny(tmp_path)
    with_own, after = tiny(tmp_path, "evaluation.baselines=['own_groups:Halves']")
    made = made_networks(with_own)
    assert made[:-3] == made_networks(plain)
    assert [(r.id, r.group, r.parent) for r in made[-3:]] == [(12 + len(made) - 3 + i, "halves", i) for i in range(3)]
    assert len({r.seed for r in made}) == len(made)
    tasks = make_tasks(with_own, made)
    assert sorted(r.id for task in tasks for r in task) == [r.id for r in made]
    keys = {stage: artifact.key for stage, artifact in before.items()}
    assert [stage for stage in after if after[stage].key != keys[stage]] == ["evaluation", "report"]
    own.write_text(OWN + "# changed\n")
    assert tiny(tmp_path, "evaluation.baselines=['own_groups:Halves']")[1]["evaluation"].key != after["evaluation"].key
    assert "code" not in before["evaluation"].config


def test_baselines_and_metrics_of_ones_own_are_in_the_results(own, tmp_path, monkeypatch):
    overrides = ("evaluation.baselines=['own_groups:Halves']", "evaluation.metrics=['own_groups:spread']")
    experiment, artifacts = tiny(tmp_path, *overrides)
    build(experiment, artifacts)
    build_missing("report", experiment, artifacts, context())
    members, store = ParameterStore(artifacts["zoo"]).vectors(), ParameterStore(artifacts["evaluation"])
    halves = [record for record in store.records() if record.group == "halves"]
    assert len(halves) == 3
    assert all(record.judged for record in halves)
    evaluator = evaluation.Evaluator(experiment, artifacts, context())
    np.testing.assert_array_equal(evaluator._vector(halves[1]), members[1] / 2)

    summary = load_summary(artifacts)
    line = {group["group"]: group for group in summary["groups"]}["halves"]
    accuracies = [record.test_accuracy for record in halves]
    assert line["spread"] == pytest.approx(max(accuracies) - min(accuracies))
    assert named_metrics(summary)["halves/spread"] == line["spread"]
    assert "ensemble/spread" not in named_metrics(summary)  # of one network
    head, *rows = table_rows(summary)
    assert (head[-1], rows[-1][0], rows[-1][-1]) == ("spread", "halves", f"{line['spread']:.3f}")
    assert legend(described(summary)).endswith("spread: Range of test accuracies.")
    text = artifacts["report"].read("table.md").decode()
    assert "| halves |" in text
    assert "| spread |" in text

    # Its sweeps have a column for it.
    file = tmp_path / "question.yaml"
    own_settings = {"baselines": list(experiment.evaluation.baselines), "metrics": list(experiment.evaluation.metrics)}
    sweep = {"parameters": {"generator.members": [2, 12]}}
    file.write_text(yaml.safe_dump({"base": str(TINY), "name": "q", "evaluation": own_settings, "sweep": sweep}))
    ledger = Ledger(space.load(file, [f"storage={tmp_path}"]))
    trial = Trial(0, {"generator.members": 12}, (0,), "finished")
    row = Row("", trial.assignment, 1, (trial,), [Result(trial, 0, artifacts, named_metrics(summary))])
    head, cells = sweep_table.cells(ledger, [row])
    generated = named_metrics(summary)["generated/spread"]
    assert cells[head.index("spread")] == f"{generated:.3f}"
    assert "spread: Range of test accuracies." in sweep_table.legend(ledger)

    # What is stored explains itself, where the module is not there any more.
    monkeypatch.setitem(__import__("sys").modules, "own_groups", None)
    assert table_rows(json.loads(json.dumps(summary)))[0][-1] == "spread"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("baselines=['own_groups:Nothing']", r"evaluation\.baselines: 'own_groups:Nothing' .* cannot be imported"),
        ("baselines=['own_groups:Nameless']", r"own_groups:Nameless is no class of a baseline"),
        ("baselines=['own_groups:spread']", r"own_groups:spread is no class of a baseline"),
        ("baselines=['own_groups:Ensemble']", r"'ensemble' of another group"),
        ("baselines=['own_groups:HeldOut']", r"'held-out' of another group"),
        ("baselines=['own_groups:Halves', 'own_groups:Short']", r"'halves' of another group"),
        ("metrics=['own_groups:nothing']", r"evaluation\.metrics: 'own_groups:nothing' .* cannot be imported"),
        ("metrics=['own_groups:listed']", r"own_groups:listed is neither a function nor a Metric"),
        ("metrics=['own_groups:similarity']", r"'similarity' of another metric"),
    ],
)
def test_what_is_no_baseline_or_metric_is_refused_before_work(own, tmp_path, setting, message):
    experiment, _ = tiny(tmp_path, f"evaluation.{setting}")
    with pytest.raises(ConfigError, match=message):
        check_plan(make_plan(experiment))


def test_a_name_without_a_module_is_refused_when_it_is_read(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluation\.baselines.*'ensemble' is not accepted"):
        loading.load(TINY, ["evaluation.baselines=[ensemble]"])


def test_a_vector_of_another_size_is_refused(own, tmp_path):
    experiment, artifacts = tiny(tmp_path, "evaluation.baselines=['own_groups:Short']")
    build(experiment, artifacts, "base", "zoo", "generator", "samples")
    with pytest.raises(PdiffError, match=r"evaluation\.baselines: halves gives an array of shape \(3,\)"):
        build(experiment, artifacts, "evaluation")


def test_seconds_are_those_in_which_anything_was_judged(artifact):
    """Actors judge at the same time; rows of an earlier version have seconds alone."""
    subset, store = Subset((Entry("a", (1,), 0, "parameter"),)), ParameterStore(artifact)
    abouts = [{"span": (10.0, 14.0)}, {"span": (12.0, 17.0)}, {"span": (20.0, 21.0)}, {"counts": {"seconds": 2.0}}]
    for id_, about in enumerate(abouts):
        store.append([Record(id_, "ensemble")], subset, about)
    *_, seconds = evaluation._taken(store, store.manifest_entries(range(4)))
    assert seconds == pytest.approx(7 + 1 + 2)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("field", ["baselines", "metrics"])
def test_every_value_of_a_sweep_is_looked_at_before_it_starts(tmp_path, field, order):
    values = [[], ["no_such_module:thing"]][::order]
    path = tmp_path / "s.yaml"
    path.write_text(
        json.dumps({"name": "s", "base": str(TINY), "sweep": {"parameters": {f"evaluation.{field}": values}}})
    )
    with pytest.raises(ConfigError, match=f"evaluation.{field}: 'no_such_module:thing'.* cannot be imported"):
        check_sweep(Ledger(space.load(path, [f"storage={tmp_path}"])))
