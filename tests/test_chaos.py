"""Sweeps whose driver, workers or whole Ray are killed at random moments end as if nothing had happened."""

import contextlib
import csv
import io
import os
import random
import signal
import subprocess
import sys
import time

import mlflow
import psutil
import pytest
import yaml
from helpers import TINY

from pdiff_ray.config import sweep as space
from pdiff_ray.sweeps import report as sweep_report
from pdiff_ray.sweeps.ledger import Ledger
from pdiff_ray.tracking import tracking_uri

pytestmark = pytest.mark.long

KILLS = 10
LONGER = {
    "base": str(TINY),
    "zoo": {"members": 40, "optimizer": {"lr": 0.3}},
    "generator": {"autoencoder": {"steps": 3000}, "diffusion": {"steps": 3000}},
    "resources": {"workers": 2, "max_failures": KILLS},
}
ASHA = {
    "search": "optuna",
    "num_trials": 14,
    "max_concurrent": 1,
    "max_retries": KILLS,
    "scheduler": "asha",
    "confirm": 0,
    "metric": "generated/mean_validation_loss",
    "parameters": {
        "generator.autoencoder.lr": {"loguniform": [1.0e-6, 1.0e-1]},
        "sampling.sampler": ["ddpm", "ddim"],
        "sampling.steps": {"int": [5, 20], "when": {"sampling.sampler": "ddim"}},
    },
}
GRID = {
    "max_concurrent": 2,
    "max_retries": KILLS,
    "parameters": {"zoo.batch_size": [16, 32], "generator.members": [10, 20, 40]},
    "repeats": 2,
}


def start(file, storage):
    code = "from pdiff_ray.cli.main import main; main()"
    storage.mkdir(exist_ok=True)
    with open(storage.with_suffix(".log"), "w") as output:
        return subprocess.Popen(
            [sys.executable, "-c", code, "sweep", str(file), "--storage", str(storage)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def said(storage):
    return storage.with_suffix(".log").read_text()


def kill(process, what, rng):
    """Kills the driver, one of its workers, or both with all of Ray; gives whether there was one."""
    driver = psutil.Process(process.pid)
    below = driver.children(recursive=True)
    if what == "worker":
        found = [p for p in below if "ImplicitFunc" in name(p) or "RayTrainWorker" in name(p)]
        if not found:
            return False
        rng.choice(found).kill()
        return True
    driver.kill()
    for other in below if what == "ray" else []:
        with contextlib.suppress(psutil.NoSuchProcess):
            other.kill()
    process.wait()
    psutil.wait_procs(below, timeout=60)  # Ray's own watchdog ends what a dead driver has left
    return True


def wait(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.01)


def name(process):
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def finish(process, storage):
    try:
        process.wait(timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"the sweep hangs:\n{said(storage)}")
    assert process.returncode == 0, said(storage)


def table(ledger):
    """The sweep's table of trials, apart from how long they took."""
    text = ledger.storage.read(f"{ledger.folder}/{sweep_report.TRIALS_FILE}").decode()
    lines = list(csv.DictReader(io.StringIO(text)))
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in lines]


@pytest.mark.parametrize("sweep", [GRID, ASHA], ids=["grid", "asha"])
def test_ten_kills_change_nothing(tmp_path, sweep):
    file = tmp_path / "chaos.yaml"
    file.write_text(yaml.safe_dump({**LONGER, "name": "chaos", "sweep": sweep}, sort_keys=False))
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    finish(start(file, undisturbed), undisturbed)

    rng, kills, process = random.Random(0), 0, None
    while kills < KILLS:
        # At any moment of a random part of the work, on machines of any speed.
        what, steps = rng.choice(["driver", "worker", "ray"]), rng.randint(0, 4)
        if process is None or process.poll() is not None:
            process = start(file, disturbed)
            if rng.random() < 0.2:
                steps = 0  # Ray itself is killed while it starts
            else:
                wait(process, lambda: "running" in said(disturbed))
        lines = said(disturbed).count("\n") + steps
        wait(process, lambda lines=lines: said(disturbed).count("\n") >= lines)
        moment = time.monotonic() + rng.uniform(0, 6)
        wait(process, lambda moment=moment: time.monotonic() > moment)
        if process.poll() is not None:
            pytest.fail(f"over after {kills} kills, too early to say anything:\n{said(disturbed)}")
        kills += kill(process, what, rng)
    if process.poll() is not None:
        process = start(file, disturbed)
    finish(process, disturbed)

    whole, ledger = (Ledger(space.load(file, [f"storage={s}"])) for s in (undisturbed, disturbed))
    assert [(t.number, t.assignment, t.state, t.objective, t.curve) for t in ledger.done()] == [
        (t.number, t.assignment, t.state, t.objective, t.curve) for t in whole.done()
    ]
    assert len(ledger.done()) == ledger.total
    if sweep is ASHA:
        assert {t.state for t in ledger.done()} == {"finished", "stopped"}
    assert table(ledger) == table(whole)
    # Nothing of Ray's that a later launch will not remove by its age.
    assert all(left.name.startswith("ray-") for left in (disturbed / "tmp").iterdir())

    client = mlflow.MlflowClient(tracking_uri=tracking_uri(ledger.file.experiment, ledger.storage))
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=1000)
    trials = [run.data.tags["pdiff.trial"] for run in runs if run.data.tags["kind"] == "trial"]
    assert sorted(map(int, trials)) == list(range(ledger.total))
    assert [run.data.tags["kind"] for run in runs].count("sweep") == 1
    assert "RUNNING" not in {run.info.status for run in runs}
