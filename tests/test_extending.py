"""The examples of `docs/extending.md`, each run as a user would: from a module of one's own to the report."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from helpers import TINY

from pdiff_ray.common.registry import imported
from pdiff_ray.config import loading, sweep
from pdiff_ray.running.experiment import make_plan, run
from pdiff_ray.running.sweep import run as run_sweep
from pdiff_ray.stages.table import artifacts_of
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.parameters import ParameterStore
from pdiff_ray.sweeps.ledger import Ledger

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
EXAMPLES = {}  # heading: modules and settings
for section in PAGE.split("\n## ")[1:]:
    heading, blocks = section.partition("\n")[0], dict(re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL))
    if "python" in blocks:
        EXAMPLES[heading] = re.match(r"# (\w+\.py)\n", blocks["python"])[1], blocks["python"], blocks["yaml"]
    else:
        ABLATION = blocks["yaml"]


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """One for all examples, which share what they do not change."""
    return tmp_path_factory.mktemp("storage")


@pytest.mark.parametrize("heading", EXAMPLES)
def test_example_runs(tmp_path, storage, monkeypatch, heading):
    name, source, settings = EXAMPLES[heading]
    (tmp_path / name).write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    module = name.removesuffix(".py")
    monkeypatch.setitem(sys.modules, module, None)  # so that what is imported is forgotten afterwards
    del sys.modules[module]
    assert f"{name.removesuffix('.py')}:" in settings
    settings = yaml.safe_load(settings)

    text = yaml.safe_dump({"base": str(TINY), "storage": str(storage), **settings})
    (tmp_path / "experiment.yaml").write_text(text)
    experiment = loading.load(tmp_path / "experiment.yaml")
    run(make_plan(experiment), in_process=True)
    artifacts = artifacts_of(experiment, Storage(experiment.storage_uri))
    assert artifacts["report"].exists()
    assert len(ParameterStore(artifacts["samples"]).ids) == experiment.sampling.samples
    # Its source is part of the key of what is made with it, and of that alone.
    plain = artifacts_of(loading.load(TINY, [f"storage={storage}"]), Storage(experiment.storage_uri))
    changed = [stage for stage in artifacts if artifacts[stage].key != plain[stage].key]
    (tmp_path / name).write_text(f"{source}# changed\n")
    after = artifacts_of(experiment, Storage(experiment.storage_uri))
    assert [stage for stage in artifacts if artifacts[stage].key != after[stage].key] == changed


def test_the_ablation_runs(tmp_path, storage):
    file = tmp_path / "ablation.yaml"
    file.write_text(f"{ABLATION}base: {TINY}\nstorage: {storage}\n")
    ledger = Ledger(sweep.load(file))
    assert ledger.file.question.startswith("Does noise on the latents matter")
    result = run_sweep(ledger, in_process=True, track=False)
    assert [row.evaluated for row in result.rows] == [2, 2, 2]


def test_every_table_is_on_the_page():
    tables = re.findall(r"\| `(\w+)` in `([\w/]+)\.py` \|", PAGE)
    assert len(tables) == PAGE.count("` in `")
    for table, module in tables:
        registry = imported(f"pdiff_ray.{module.replace('/', '.')}:{table}")
        assert list(registry), table
