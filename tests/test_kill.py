"""SIGKILL in the middle of zoo, generator and evaluation; the same command again ends with the undisturbed table."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import TINY, tiny

from pdiff_ray.reports.tables import table_rows
from pdiff_ray.stages.report import load_summary

# Long enough to be caught in the middle of each stage.
LONGER = (
    "zoo.members=80",
    "zoo.steps_per_member=4",
    "generator.autoencoder.steps=400",
    "generator.diffusion.steps=1500",
    "sampling.samples=60",
    "evaluation.networks_per_task=2",
)


def command(storage):
    settings = [text for override in LONGER for text in ("--set", override)]
    code = "from pdiff_ray.cli.main import main; main()"
    return [
        sys.executable,
        "-c",
        code,
        "run",
        "report",
        str(TINY),
        "--storage",
        str(storage),
        "--in-process",
        *settings,
    ]


def run_until(storage, seen):
    """Runs the command and kills it as soon as `seen` finds a file; returns the files that were there, with times."""
    process = subprocess.Popen(command(storage), stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not seen():
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return {
        file: file.stat().st_mtime_ns
        for file in storage.glob("*/*/**/*")
        if file.is_file() and not {"work", "tmp"} & set(file.relative_to(storage).parts)
    }


@pytest.mark.slow
def test_killed_at_every_stage(tmp_path):
    undisturbed, storage = tmp_path / "undisturbed", tmp_path / "killed"
    subprocess.run(command(undisturbed), check=True, stdout=subprocess.DEVNULL)
    _experiment, artifacts = tiny(storage, *LONGER)
    folder = {stage: storage / artifact.folder for stage, artifact in artifacts.items()}
    moments = [
        ("zoo", lambda: any(folder["zoo"].glob("networks/*.parquet"))),
        ("generator", lambda: (folder["generator"] / "work" / "autoencoder.safetensors").exists()),
        ("evaluation", lambda: len(list(folder["evaluation"].glob("networks/*.parquet"))) > 3),
    ]
    for stage, seen in moments:
        done = run_until(storage, seen)
        assert not artifacts[stage].exists(), f"{stage} was over before it could be killed"
        for earlier in list(artifacts)[: list(artifacts).index(stage)]:
            assert artifacts[earlier].exists()
        # A file cut short by the kill is in nobody's way.
        (storage / "tmp").mkdir(exist_ok=True)
        (storage / "tmp" / "abandoned").write_bytes(b"half")
        finished = done
    subprocess.run(command(storage), check=True, stdout=subprocess.DEVNULL)
    assert len(finished) > 10
    # What was there at the last kill was not written again, and belongs to the results.
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    listed = {
        storage / artifact.folder / entry.path
        for artifact in artifacts.values()
        for entry in artifact.manifest().files.values()
    }
    assert {file for file in finished if file.name != "manifest.json"} <= listed
    _, its = tiny(undisturbed, *LONGER)
    assert table_rows(load_summary(artifacts)) == table_rows(load_summary(its))


@pytest.mark.long
def test_the_whole_of_a_ray_run_killed(tmp_path):
    """SIGKILL of the driver, the local Ray and its workers during the zoo."""
    storage = tmp_path / "ray"
    on_ray = [text for text in command(storage) if text != "--in-process"]
    process = subprocess.Popen(on_ray, stdout=subprocess.DEVNULL, start_new_session=True)
    _experiment, artifacts = tiny(storage, *LONGER)
    parts = storage / artifacts["zoo"].folder / "networks"
    deadline = time.monotonic() + 180
    while not any(parts.glob("*.parquet")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not artifacts["zoo"].exists()
    kept = set(parts.iterdir())
    subprocess.run(on_ray, check=True, stdout=subprocess.DEVNULL, timeout=300)
    assert kept <= set(parts.iterdir())
    undisturbed = tmp_path / "undisturbed"
    subprocess.run(command(undisturbed), check=True, stdout=subprocess.DEVNULL)
    _, its = tiny(undisturbed, *LONGER)
    assert table_rows(load_summary(artifacts)) == table_rows(load_summary(its))
