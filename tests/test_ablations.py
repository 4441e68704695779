"""The small presets of the paper's ablations, as a user runs them; their results stand in docs/results.md."""

import csv
import io
import subprocess
import sys
from pathlib import Path

import pytest

from pdiff_ray.config import sweep as space
from pdiff_ray.sweeps import report as sweep_report
from pdiff_ray.sweeps.ledger import Ledger

pytestmark = pytest.mark.long

SWEEPS = Path(__file__).parents[1] / "sweeps"
CHANCE = 0.1  # of ten digits


@pytest.mark.parametrize("name", ["ablate_layers", "ablate_members", "ablate_noise"])
def test_small_preset_answers_its_question(name, tmp_path):
    file, code = SWEEPS / f"{name}.yaml", "from pdiff_ray.cli.main import main; main()"
    arguments = ["sweep", str(file), "--preset", "small", "--storage", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    ledger = Ledger(space.load(file, [f"storage={tmp_path}"], "small"))
    assert [trial.state for trial in ledger.done()] == ["finished"] * ledger.total
    text = ledger.storage.read(f"{ledger.folder}/{sweep_report.SUMMARY_FILE}").decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == len(list(ledger.sweep.grid()))
    for row in rows:
        assert row["seeds"] == row["generated/mean_test_accuracy_n"] == "3"
        # What is generated is a network as good as those it was learned from, give or take two points.
        assert float(row["generated/mean_test_accuracy"]) > float(row["original/mean_test_accuracy"]) - 0.02 > CHANCE
    assert {"accuracy.png", "similarity.png"} <= {n.rpartition("/")[2] for n in ledger.storage.list(ledger.folder)}
