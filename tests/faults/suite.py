"""Disturbs a sweep with faults at random moments, follows what messages say, and compares what comes out."""

import contextlib
import csv
import io
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from mlflow import MlflowClient

from pdiff_ray.config import sweep as space
from pdiff_ray.storage.artifacts import MANIFEST, finished, opened, read_manifest
from pdiff_ray.storage.checks import folders, verify
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.parameters import ParameterStore, Record
from pdiff_ray.sweeps import report
from pdiff_ray.sweeps.ledger import Ledger

from .cluster import Cluster, MLflow
from .store import Store

CODE = "from pdiff_ray.cli.main import main; main()"
MOST_NODES, FEWEST_NODES = 3, 2
DELETED = "deleted"  # the line in the trace where all runs may begin anew
NOTICE_S = 4.0  # between a drain notice and the end of the node
ENDED_S = 600.0  # in which an undisturbed command must end
TRIES = 8  # of the command, when nothing disturbs it any more
ALIKE = [field.name for field in fields(Record) if field.name not in ("created_at", "worker", "vector")]


class Suite:
    """A cluster, its storage and MLflow, and a sweep that runs on it.

    Attributes:
        injected: faults by kind.
        left: kinds for which the last disturbed run has ended too early.
        restarts: times that the command was typed again.
    """

    def __init__(self, folder: Path, content: dict, chosen: random.Random) -> None:
        self.folder, self.random = folder, chosen
        self.home = folder / "driver"
        self.home.mkdir()
        self.file = self.home / "faults.yaml"
        self.file.write_text(yaml.safe_dump(content, sort_keys=False))
        self.store, self.server = Store(), MLflow(folder / "mlflow")
        self.cluster = Cluster(folder, self.home, cache_mib=64)
        self.every = content["zoo"]["steps_per_member"]
        self.injected: Counter[str] = Counter()
        self.restarts = 0
        self.began = time.monotonic()

    def __enter__(self) -> "Suite":
        self.server.wait()
        return self

    def start(self) -> None:
        """Starts the cluster."""
        self.cluster.start()
        for _ in range(FEWEST_NODES):
            self.cluster.add()

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(AttributeError):
            self.process.kill()
        self.cluster.stop()
        self.server.stop()
        self.store.stop()

    # --- the command --------------------------------------------------------------------------------------------------

    def begin(self, name: str) -> None:
        """Goes over to a storage and an experiment on MLflow of their own."""
        self.name, self.log = name, self.folder / f"{name}.log"
        self.uri = self.store.uri.replace("/pdiff?", f"/{name}?")
        self.storage = Storage(self.uri)
        self.deleted: set[str] = set()
        self.first = len(self.store.puts)
        self._mark()

    def launch(self, in_process: bool = False) -> None:
        """Types the command; `in_process`, it needs no cluster."""
        command = [sys.executable, "-c", CODE, "sweep", str(self.file), "--storage", self.uri]
        command += ["--tracking-uri", self.server.uri, "--set", f"tracking.experiment={self.name}"]
        command += ["--in-process"] if in_process else ["--address", self.cluster.address]
        environment = {**os.environ, **self.cluster.environment, "PDIFF_CACHE": str(self.home / "cache")}
        environment["COLUMNS"] = "1000"  # a message is a line
        self.seen = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                command, cwd=self.home, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    def said(self) -> str:
        """Returns what the command has said since it was typed last."""
        return self.log.read_text()[self.seen :]

    def run(self) -> None:
        """Types the command until it has nothing left to do, and does what it says."""
        for _ in range(TRIES):
            if self.process.poll() is None:
                try:
                    self.process.wait(ENDED_S)
                except subprocess.TimeoutExpired:
                    raise AssertionError(f"the sweep hangs:\n{self.said()}") from None
            code = self.process.returncode
            self.mend()
            if code == 0 and "warning: MLflow" not in self.said() and not self.damaged():
                return
            self.restarts += 1
            self.launch()
        raise AssertionError(f"the sweep does not end:\n{self.said()}")

    def mend(self) -> None:
        """Follows the remedies in what the command has said, which must be messages."""
        said = self.said()
        assert "Traceback" not in said, said
        assert "secret" not in said, said
        with self.store.spared():
            self.follow(said)

    def damaged(self) -> bool:
        """Tells whether something in storage is; follows what is said of it."""
        found = [problem for folder in folders(self.storage) for problem in verify(self.storage, folder).problems]
        self.follow("\n".join(found))
        return bool(found)

    def follow(self, said: str) -> None:
        """Deletes what is to be deleted."""
        place = re.escape(self.storage.place)
        for line in said.splitlines():
            if "damaged" not in line or not (names := re.findall(rf"{place}/([\w./-]*\w)", line)):
                continue
            folder = re.search(rf"delete {place}/([\w/-]*\w)", line)
            name = folder[1] if folder else names[0]
            if "delete its folder" in line:
                name = name.rpartition("/")[0]
            if there := self.storage.list(name, recursive=True) or [name] * self.storage.exists(name):
                for file in there:
                    self.storage.delete(file)
                self.deleted.update(there)
                self._mark()
                self.say(f"as it says, {name} is deleted")

    def _mark(self) -> None:
        with self.cluster.trace.open("a", encoding="utf-8") as file:
            file.write(f"{DELETED}\n")

    # --- faults -------------------------------------------------------------------------------------------------------

    def disturb(self, kinds: Sequence[str], gap_s: float) -> None:
        """Injects faults, one after another, for as long as the command has work to do."""
        self.undo: list[tuple[float, Callable[[], None]]] = []
        self.left = list(kinds)
        self.launch()
        due = time.monotonic() + self.random.uniform(0, 2 * gap_s)
        while self.left and self.process.poll() != 0:
            time.sleep(0.05)
            self._undo()
            if self.process.poll() is not None and self.process.returncode:
                self.mend()
                self.restarts += 1
                self.launch()
            if time.monotonic() < due or self.process.poll() is not None:
                continue
            for kind in self.left:  # the first for which there is something to hit
                if told := getattr(self, kind)():
                    self.left.remove(kind)
                    self.injected[kind] += 1
                    self.say(f"{kind}: {told}")
                    due = time.monotonic() + self.random.uniform(0, 2 * gap_s)
                    break
        while self.undo:
            self._undo()
            time.sleep(0.05)
        self.run()

    def say(self, what: str) -> None:
        print(f"[{time.monotonic() - self.began:4.0f} s] {what}", flush=True)

    def _later(self, undo: Callable[[], None], shortest: float, longest: float) -> None:
        self.undo.append((time.monotonic() + self.random.uniform(shortest, longest), undo))

    def _undo(self) -> None:
        for when, undo in [each for each in self.undo if each[0] <= time.monotonic()]:
            self.undo.remove((when, undo))
            undo()

    def worker(self) -> str:
        """Kills a process that works."""
        if not (found := self.cluster.workers()):
            return ""
        chosen = self.random.choice(found)
        name = chosen.cmdline()[0].partition(".")[0]
        chosen.kill()
        return f"{name} killed"

    def node(self) -> str:
        """Kills a node; another one comes if too few are left."""
        if len(self.cluster.nodes) < FEWEST_NODES:
            return ""
        chosen = self.random.choice(self.cluster.nodes)
        self.cluster.kill(chosen)
        self._replace()
        return f"{chosen.name} killed"

    def drain(self) -> str:
        """Gives a node notice, and then kills it."""
        if len(self.cluster.nodes) < FEWEST_NODES or any(undo == self._end_drained for _, undo in self.undo):
            return ""
        self.drained = self.random.choice(self.cluster.nodes)
        self.cluster.drain(self.drained, NOTICE_S)
        self._later(self._end_drained, NOTICE_S, NOTICE_S)
        return f"{self.drained.name} has {NOTICE_S:.0f} s left"

    def _end_drained(self) -> None:
        if self.drained in self.cluster.nodes:
            self.cluster.kill(self.drained)
            self._replace()

    def _replace(self) -> None:
        if len(self.cluster.nodes) < FEWEST_NODES:
            self._later(self._add, 0, 5)

    def _add(self) -> None:
        if len(self.cluster.nodes) < MOST_NODES:
            self.cluster.add()

    def add(self) -> str:
        """Has a node come."""
        return f"{self.cluster.add().name} joined" if len(self.cluster.nodes) < MOST_NODES else ""

    def driver(self) -> str:
        """Kills the driver; the same command is typed again."""
        self.process.kill()
        self.process.wait()
        return "killed"

    def all(self) -> str:
        """Kills driver and cluster; both start again."""
        self.process.kill()
        self.process.wait()
        self.cluster.kill_all()
        self.start()
        return "driver and cluster killed"

    def disk(self) -> str:
        """Fills the disk of a node's cache for a while, as if its images had never been there."""
        chosen = self.random.choice(self.cluster.nodes)
        full = chosen.cache / "full"
        if not chosen.cache.exists() or full.exists():
            return ""
        for folder in chosen.cache.glob("*-*"):
            with contextlib.suppress(OSError):
                folder.rename(chosen.cache / f"{folder.name}.gone")
        with full.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(2**20))
                file.flush()

        def empty() -> None:
            with contextlib.suppress(OSError):
                full.unlink()

        self._later(empty, 5, 15)
        return f"that of {chosen.name} is full"

    def fail(self) -> str:
        return self._storage("fail", 10, "every tenth call fails")

    def hang(self) -> str:
        return self._storage("hang", 10, "every tenth call hangs")

    def away(self) -> str:
        return self._storage("fail", 1, "all calls fail")

    def _storage(self, mode: str, every: int, told: str) -> str:
        if self.store.mode:
            return ""
        self.store.mode, self.store.every = mode, every
        self._later(lambda: setattr(self.store, "mode", ""), 5, 15)
        return told

    def damage(self) -> str:
        """Changes a bit of a stored object."""
        found = [n for n in self.storage.list("", recursive=True) if n.count("/") > 2] if not self.store.mode else []
        names = [n for n in found if re.match(r"(base|zoo|generator|samples|evaluation)/", n)]
        if not names:
            return ""
        name = self.random.choice(names)
        content = bytearray(self.storage.read(name))
        if not content:
            return ""
        content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        puts = len(self.store.puts)
        self.storage.write(name, bytes(content))
        self.store.puts[puts:] = [put for put in self.store.puts[puts:] if not put[0].endswith(name)]
        return f"{name}, one bit"

    def mlflow(self) -> str:
        """Stops MLflow, or ends it, for a while."""
        if any(undo in (self._continue, self._start_mlflow) for _, undo in self.undo):
            return ""
        if self.random.random() < 0.5:
            self.server.signal(signal.SIGSTOP)
            self._later(self._continue, 5, 20)
            return "stopped"
        self.server.stop()
        self._later(self._start_mlflow, 5, 20)
        return "killed"

    def _continue(self) -> None:
        self.server.signal(signal.SIGCONT)

    def _start_mlflow(self) -> None:
        self.server.start()
        self.server.wait()

    # --- what comes out -----------------------------------------------------------------------------------------------

    def results(self) -> dict[str, object]:
        """Returns all that must be the same, by name."""
        ledger = Ledger(space.load(self.file, [f"storage={self.uri}"]))
        found: dict[str, object] = {
            "trials": [(t.number, t.assignment, t.state, t.objective, t.curve) for t in ledger.done()]
        }
        assert len(ledger.done()) == ledger.total
        text = ledger.storage.read(f"{ledger.folder}/{report.TRIALS_FILE}").decode()
        lines = csv.DictReader(io.StringIO(text))
        found["table"] = [{k: v for k, v in line.items() if "seconds" not in k} for line in lines]
        for folder in finished(self.storage):
            manifest = read_manifest(self.storage, folder)
            if manifest.stage == "report":
                continue
            for name, entry in manifest.files.items():
                if entry.ids is None and manifest.stage != "evaluation":
                    found[f"{folder}/{name}"] = entry.sha256
            store = ParameterStore(opened(self.storage, manifest))
            if store.ids:
                rows = [[getattr(row, name) for name in ALIKE] for row in store.records()]
                vectors = b"" if manifest.stage == "evaluation" else store.vectors().tobytes()
                found[folder] = (rows, hash(vectors))
        return found

    def stored(self) -> Iterator[str]:
        """Yields lines on what is in object storage, and how many processes have made it."""
        names = self.storage.list("", recursive=True)
        for stage, count in sorted(Counter(name.partition("/")[0] for name in names).items()):
            yield f"{stage:12} {count:4} objects"
        workers: dict[str, set[str | None]] = {}
        for folder in finished(self.storage):
            manifest = read_manifest(self.storage, folder)
            store = ParameterStore(opened(self.storage, manifest))
            if store.ids:
                workers.setdefault(manifest.stage, set()).update(row.worker for row in store.records())
        for stage, found in workers.items():
            yield f"{stage}: networks made by {len(found)} processes, on nodes without a shared file system"

    def check_driver(self) -> None:
        """Nothing is where the command was typed but its file and its cache."""
        assert sorted(path.name for path in self.home.iterdir() if path.name != "cache") == ["faults.yaml"]

    def twice(self) -> list[str]:
        """Returns networks and manifests that were stored twice, though the first was never deleted."""
        own = {put for put in self.store.puts[self.first :] if put[0].startswith(f"{self.name}/")}
        names = Counter(name.removeprefix(f"{self.name}/") for name, _ in own)
        found = [n for n, count in names.items() if count > 1 and n.endswith(MANIFEST) and n not in self.deleted]
        rows: Counter[str] = Counter()
        for name in names:
            if "/networks/part-" in name and name not in self.deleted:
                part = pq.read_table(pa.BufferReader(self.storage.read(name)), columns=["id"])
                rows.update(f"{name.partition('/networks')[0]} {id_}" for id_ in part["id"].to_pylist())
        return found + [row for row, count in rows.items() if count > 1]

    def redone(self) -> list[int]:
        """Returns how many members a run has trained again after a loss, each time; not after one has been deleted."""
        counts, last = [], dict[str, int]()
        lines = self.cluster.trace.read_text().splitlines()
        assert set(lines) > {DELETED}, "no member was trained"
        for line in lines:
            if line == DELETED:
                last.clear()
                continue
            run, _, step = line.rpartition(" ")
            if int(step) <= last.get(run, -1):
                counts.append(1 + (last[run] - int(step)) // self.every)
            last[run] = int(step)
        return counts

    def check_mlflow(self) -> None:
        """One run for each trial, one for the sweep, and none that runs."""
        ledger = Ledger(space.load(self.file, [f"storage={self.uri}"]))
        client = MlflowClient(tracking_uri=self.server.uri)
        runs = client.search_runs([client.get_experiment_by_name(self.name).experiment_id], max_results=1000)
        trials = [run.data.tags["pdiff.trial"] for run in runs if run.data.tags["kind"] == "trial"]
        assert sorted(map(int, trials)) == list(range(ledger.total))
        assert [run.data.tags["kind"] for run in runs].count("sweep") == 1
        assert "RUNNING" not in {run.info.status for run in runs}
