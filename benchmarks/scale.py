"""Many networks, trials and zoos in one storage and MLflow experiment: how long it takes to list, plan, go on, report.

All is written by the code that writes it in earnest, but nothing is trained a thousand times: zoos are imported from
checkpoint files, one trial is run, and the others are given its results under keys of their own.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from benchmarks.harness import Result, Work, result, seconds
from pdiff_ray import tracking
from pdiff_ray.cli.main import cli
from pdiff_ray.common.devices import limit_threads
from pdiff_ray.config import sweep as space
from pdiff_ray.config.schema import Experiment
from pdiff_ray.data.kept import default_cache
from pdiff_ray.running import sweep as sweeps
from pdiff_ray.stages.base import untrained_network
from pdiff_ray.stages.checkpoints import import_zoo
from pdiff_ray.stages.context import Context
from pdiff_ray.storage import files
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.sweeps.ledger import Ledger
from pdiff_ray.sweeps.trial import run_trial

SIZES = ((100, 10), (1_000, 100), (10_000, 1_000))  # members and trials
ZOO = {"subset": {"last_norm_layers": 1}, "held_out": 0, "second_run": 0}
EXPERIMENT = {
    "name": "scale",
    "network": {"name": "convnet", "args": {"widths": [2, 4]}},
    "training": {"epochs": 1},
    "generator": {"name": "gaussian"},
    "sampling": {"samples": 4},
    "evaluation": {"noise_sigmas": [], "baseline_networks": 1, "fine_tuned_networks": 0},
}
GENERATORS = 10  # per zoo; all other trials differ in their samples alone


class Place:
    """A storage with zoos and a finished sweep over them.

    Args:
        folder: empty.
        members: of all zoos together.
        trials: of the sweep.
    """

    def __init__(self, folder: Path, members: int, trials: int, zoos: int) -> None:
        self.folder, self.file, self.storage = folder, folder / "scale.yaml", str(folder / "storage")
        generators = min(GENERATORS, trials // zoos)
        parameters = {
            "zoo.imported": [f"zoo-{number}" for number in range(zoos)],
            "generator.seed": list(range(1, generators + 1)),
            "sampling.seed": list(range(1, trials // zoos // generators + 1)),
        }
        experiment = {**EXPERIMENT, "zoo": {**ZOO, "members": members // zoos}}
        self.file.write_text(yaml.safe_dump({**experiment, "sweep": {"parameters": parameters}}))
        self._fill(self.ledger())

    def ledger(self) -> Ledger:
        """Opens the sweep as a new process does."""
        return Ledger(space.load(self.file, [f"storage={self.storage}"]))

    def _fill(self, ledger: Ledger) -> None:
        context = Context(torch.device("cpu"), default_cache())
        first: dict[str, Artifact] = {}
        while trial := ledger.ask():
            (experiment,) = ledger.experiments(trial)
            artifacts = ledger.artifacts(experiment)
            if not artifacts["zoo"].exists():
                with tempfile.TemporaryDirectory() as saved:
                    _checkpoints(Path(saved), experiment)
                    import_zoo(Path(saved), experiment, artifacts)
            if not first:
                run_trial([experiment], ledger.storage, context, ledger.sweep.metric)
                first = artifacts
            for stage, artifact in artifacts.items():
                if not artifact.exists():
                    _copy(first[stage], artifact)
            objective = 0.5 + trial.number / 10**5
            ledger.record(replace(trial, state="finished", objective=objective, seconds=1.0))

    def works(self) -> dict[str, Work]:
        """Returns what is done with it again and again, each as a new process does it."""
        plan = ("sweep", self.file, "--dry-run", "--storage")
        return {
            "artifacts list": lambda: _command("artifacts", "list", "--storage", self.storage),
            "plan of the finished sweep": lambda: _command(*plan, self.storage),
            "plan of the sweep in another storage": lambda: _command(*plan, self.folder / "new"),
            "the sweep started again, with its report": self._again,
            "show": lambda: _command("show", self.file, "--storage", self.storage),
        }

    def _again(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            sweeps.run(self.ledger(), in_process=True, track=False)


def _checkpoints(folder: Path, experiment: Experiment) -> None:
    """Writes checkpoint files of a zoo, random in what differs."""
    network, generator = untrained_network(experiment), torch.Generator().manual_seed(0)
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    names = [name for name, _ in network.named_parameters() if ".bn." in name][-2:]
    for number in range(experiment.zoo.members):
        own = {name: torch.rand(tensors[name].shape, generator=generator) for name in names}
        save_file({**tensors, **own}, folder / f"epoch_{number}.safetensors")


def _copy(source: Artifact, target: Artifact) -> None:
    """Commits the content of an artifact as another one's."""
    manifest = source.manifest()
    contents = {name: source.read(name) for name, entry in manifest.files.items() if entry.ids is None}
    parts = {name: entry.model_dump() for name, entry in manifest.files.items() if entry.ids is not None}
    for entry in parts.values():
        content = source.storage.read(f"{source.folder}/{entry['path']}")
        target.storage.write(f"{target.folder}/{entry['path']}", content)
    target.commit(contents, manifest.info, manifest.seconds, parts)


def _command(*arguments: object) -> None:
    """Runs a command of pdiff in this process; what it prints is not shown."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        cli([str(argument) for argument in arguments], standalone_mode=False)


def scale(sizes: Sequence[tuple[int, int]] = SIZES, zoos: int = 10, tracked: int = 100) -> Iterator[Result]:
    """What so many members and trials in a storage take of a processor, against a minute of it.

    Args:
        sizes: members and trials.
        tracked: the most trials of a sweep that is written to MLflow as well.
    """
    limit_threads(1)
    before: dict[str, float] = {}
    for members, trials in sizes:
        with tempfile.TemporaryDirectory() as folder:
            place = Place(Path(folder), members, trials, zoos)
            works = place.works()
            if trials <= tracked:
                for what in ("all runs written to MLflow", "all runs looked up on MLflow"):
                    works[what] = lambda place=place: tracking.log(place.ledger())
            for what, work in works.items():
                started = time.process_time()
                work()
                taken = time.process_time() - started
                note = f"{taken / before[what]:.1f} times as long as with the size before" if what in before else ""
                before[what] = taken
                whole = f"{what}: {trials:,} trials, {members:,} members in {zoos} zoos"
                yield result("scale", whole, "a minute of the processor", [(taken, 60.0)], target=1.0, note=note)


def requests(members: int = 100, trials: int = 100, zoos: int = 10, latency_s: float = 0.02) -> Iterator[Result]:
    """The same in object storage that takes its time for each request: several at a time, against one after another."""
    from moto import server as moto
    from pyarrow import fs

    counted: Counter[str] = Counter()
    answer, at_a_time = moto.DomainDispatcherApplication.__call__, files.AT_A_TIME

    def slowly(application: Any, environ: dict[str, Any], start: Any) -> Any:
        counted["LIST" if "list-type" in environ["QUERY_STRING"] else environ["REQUEST_METHOD"]] += 1
        time.sleep(latency_s)
        return answer(application, environ, start)

    limit_threads(1)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        port = server.get_host_and_port()[1]
        options = f"scheme=http&region=us-east-1&allow_bucket_creation=true&endpoint_override=127.0.0.1%3A{port}"
        with tempfile.TemporaryDirectory() as folder:
            place = Place(Path(folder), members, trials, zoos)
            there, place.storage = place.storage, f"s3://user:secret@scale/pdiff?{options}"
            s3, local = fs.FileSystem.from_uri(place.storage)[0], fs.LocalFileSystem()
            s3.create_dir("scale")
            fs.copy_files(there, "scale/pdiff", source_filesystem=local, destination_filesystem=s3)
            moto.DomainDispatcherApplication.__call__ = slowly
            works = place.works()
            del works["plan of the sweep in another storage"]
            for what, work in works.items():
                taken = []
                for files.AT_A_TIME in (1, at_a_time):
                    counted.clear()
                    taken.append(seconds(work))
                note = f"{', '.join(f'{n:,} {kind}' for kind, n in counted.most_common())}; {latency_s:g} s for each"
                whole = f"{what}: {trials:,} trials in S3, up to {at_a_time} requests at a time"
                yield result("requests", whole, "one after another", [(taken[1], taken[0])], note=note)
    finally:
        files.AT_A_TIME = at_a_time
        moto.DomainDispatcherApplication.__call__ = answer
        server.stop()
