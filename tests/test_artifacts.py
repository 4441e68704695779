"""Artifacts and their storage, in a folder and in an object store: whole, found again, and checked."""

import itertools
import multiprocessing
import pickle
import re
import resource
import signal
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faults.store import Store
from helpers import TINY, build, context, tiny, until, with_vectors
from pyarrow import fs
from test_store import SUBSET, assert_same, finish, make_records
from torch import nn

import pdiff_ray
from pdiff_ray.common.devices import limit_threads
from pdiff_ray.common.errors import StorageError, UnavailableError
from pdiff_ray.stages import zoo
from pdiff_ray.stages.table import artifacts_of
from pdiff_ray.storage import artifacts, files
from pdiff_ray.storage.artifacts import Artifact, artifact_key
from pdiff_ray.storage.checks import Findings, verify
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.parameters import ParameterStore
from pdiff_ray.storage.trees import load_tree, save_tree

# --- artifacts --------------------------------------------------------------------------------------------------------


def test_the_first_commit_stands(artifact):
    assert not artifact.exists()
    artifact.commit({"a.json": b"first"}, {"who": 1}, 1.0)
    manifest = artifact.manifest()
    artifact.commit({"a.json": b"second", "b.json": b""}, {"who": 2}, 2.0)
    assert artifact.exists()
    assert artifact.manifest() == manifest
    assert artifact.read("a.json") == b"first"
    with pytest.raises(StorageError, match=r"its manifest lists no file 'b\.json'"):
        artifact.read("b.json")


def test_commits_at_once_leave_one_whole_artifact(artifact):
    together = threading.Barrier(8)

    def commit(index):
        together.wait()
        artifact.commit({"a.json": b"%d" % index, "b.json": b"%d" % index}, {"who": index}, 1.0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(commit, range(8)))
    who = artifact.manifest().info["who"]
    assert artifact.read("a.json") == artifact.read("b.json") == b"%d" % who
    found = verify(artifact.storage, artifact.folder)
    assert (found.problems, len(found.notes)) == ([], 14)  # the others' files


def test_manifest_says_what_led_to_the_artifact(artifact):
    artifact.commit({"a.json": b"x"}, {"accuracy": 0.5}, 1.23456)
    manifest = artifact.manifest()
    assert (manifest.stage, manifest.key) == ("zoo", artifact.key)
    assert manifest.config == artifact.config
    assert manifest.inputs == artifact.inputs
    assert manifest.seconds == 1.235
    assert torch.__version__.startswith(manifest.versions["torch"])


def test_key_depends_on_stage_config_and_inputs():
    key = artifact_key("zoo", {"a": 1, "b": [1, 2]}, {"base": "x"})
    assert artifact_key("zoo", {"b": [1, 2], "a": 1}, {"base": "x"}) == key
    others = {
        artifact_key("base", {"a": 1, "b": [1, 2]}, {"base": "x"}),
        artifact_key("zoo", {"a": 2, "b": [1, 2]}, {"base": "x"}),
        artifact_key("zoo", {"a": 1, "b": [2, 1]}, {"base": "x"}),
        artifact_key("zoo", {"a": 1, "b": [1, 2]}, {"base": "y"}),
    }
    assert len(others | {key}) == 5
    assert re.fullmatch("[0-9a-f]{16}", key)


def test_work_that_goes_while_it_is_looked_for_is_none(artifact, monkeypatch):
    """Another builder has finished the artifact."""
    artifact.save_work("state", b"1")
    read = Storage.read

    def finished_meanwhile(storage, name, *arguments):
        storage.delete(name)
        return read(storage, name, *arguments)

    monkeypatch.setattr(Storage, "read", finished_meanwhile)
    assert artifact.load_work("state") is None


def test_work_in_progress_goes_when_the_artifact_is_there(artifact):
    assert artifact.load_work("run.safetensors") is None
    artifact.save_work("run.safetensors", b"one")
    artifact.save_work("run.safetensors", b"two")
    assert artifact.load_work("run.safetensors") == b"two"
    assert not artifact.exists()
    artifact.commit({}, {}, 1.0)
    assert artifact.load_work("run.safetensors") is None


def test_find_by_the_start_of_a_key(artifact):
    other = replace(artifact, stage="samples", config={"n": 1})
    for each in (artifact, other):
        each.commit({}, {}, 1.0)
    replace(artifact, config={"members": 6}).save_work("x", b"")
    assert artifacts.finished(artifact.storage) == [artifact.folder, other.folder]
    assert artifacts.find(artifact.storage, artifact.key[:8]).folder == artifact.folder
    assert artifacts.find(artifact.storage, f"samples/{other.key[:4]}").folder == other.folder
    with pytest.raises(StorageError, match=r"zzz: no finished artifact in .*`pdiff artifacts list`"):
        artifacts.find(artifact.storage, "zzz")
    with pytest.raises(StorageError, match="2 artifacts"):
        artifacts.find(artifact.storage, "")


@pytest.fixture
def reads(monkeypatch):
    """How often each manifest is read in this process."""
    counts, read = Counter(), Storage.read

    def counted(storage, name, *arguments):
        counts[name] += name.endswith("manifest.json")
        return read(storage, name, *arguments)

    monkeypatch.setattr(Storage, "read", counted)
    return counts


def test_a_manifest_is_looked_for_until_it_is_there_and_read_once(artifact, reads):
    assert not artifact.exists()
    with pytest.raises(StorageError, match="no such file"):
        artifact.manifest()
    replace(artifact, storage=Storage(artifact.storage.uri)).commit(
        {"a": b"1", "b": b"2"}, {}, 1.0
    )  # by another process
    reads.clear()
    assert artifact.exists()
    assert (artifact.read("a"), artifact.read("b")) == (b"1", b"2")
    assert artifacts.find(artifact.storage, artifact.key) == artifact.manifest()
    assert verify(artifact.storage, artifact.folder) == Findings()
    assert reads.total() == 1


def test_another_process_looks_for_itself(artifact):
    artifact.commit({}, {}, 1.0)
    artifact.manifest()
    elsewhere = pickle.loads(pickle.dumps(artifact))
    assert elsewhere == replace(artifact, storage=elsewhere.storage)
    assert elsewhere.exists()
    Path(artifact.location, "manifest.json").unlink()
    assert not pickle.loads(pickle.dumps(artifact)).exists()


@pytest.mark.parametrize("changes", [{}, {"sweep": {"parameters": {"generator.members": [6, 12]}, "repeats": 2}}])
def test_an_experiment_and_a_sweep_read_each_manifest_once(tmp_path, reads, changes):
    load = pdiff_ray.load_sweep if changes else pdiff_ray.load_experiment
    result = pdiff_ray.run(load(TINY, storage=str(tmp_path), **changes), in_process=True)
    assert result.to_dict()
    finished = artifacts.finished(Storage(str(tmp_path)))
    assert {name for name, count in reads.items() if count} == {f"{folder}/manifest.json" for folder in finished}
    assert set(reads.values()) <= {0, 1}


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_damaged_manifest_is_named(artifact, content):
    artifact.commit({}, {}, 1.0)
    path = Path(artifact.location, "manifest.json")
    path.write_bytes(content)
    with pytest.raises(StorageError, match=f"{path}: damaged .*delete its folder to build it again"):
        artifact.manifest()


def test_damaged_file_is_named(artifact):
    artifact.commit({"a.safetensors": b"content"}, {}, 1.0)
    (path,) = Path(artifact.location).glob("a-*.safetensors")
    path.write_bytes(b"Content")
    with pytest.raises(StorageError, match=f"{path}: damaged, .* delete {artifact.location} and run again"):
        artifact.read("a.safetensors")


# --- trees ------------------------------------------------------------------------------------------------------------


def test_tree_round_trip():
    network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    shared = torch.arange(6.0)
    tree = {
        "network": dict(network.state_dict()),
        "optimizer": {"0": {"step": torch.tensor(3.0), "exp_avg": shared[2:]}, "1": {}},
        "shared": shared,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "state": torch.Generator().get_state(),
        "history": {"loss": [0.1, 1 / 3], "name": "x", "none": None},
        "epoch": 3,
        "empty": {},
    }
    found = load_tree(save_tree(tree))

    def compare(one, other):
        assert type(one) is type(other)
        if isinstance(one, dict):
            assert list(one) == sorted(other)  # in each process alike: figures are drawn in this order
            for key in one:
                compare(one[key], other[key])
        elif isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        else:
            assert one == other

    compare(found, tree)


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "no file of this kind", "length"])
def test_damaged_tree(damage):
    content = save_tree({"a": torch.arange(100.0), "b": {"c": 1}})
    damaged = {
        "truncated": content[:-10],
        "header": content[:9] + b"\xff" + content[10:],
        "empty": b"",
        "no file of this kind": b"PK\x03\x04 and so on",
        "length": b"\xff" * 8 + content[8:],
    }[damage]
    with pytest.raises(StorageError, match="zoo run 3: not a whole safetensors file"):
        load_tree(damaged, "zoo run 3")


# --- storage ----------------------------------------------------------------------------------------------------------


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").touch()
    storage = Storage(str(tmp_path / "file" / "below"))
    with pytest.raises(StorageError) as caught:
        storage.check_writable()
    assert str(tmp_path / "file" / "below") in str(caught.value)
    assert "free space or choose another folder with storage: (or --storage)" in str(caught.value)


def write_a_megabyte(storage, name, limit):
    """In this process, under a limit on the size of files: the kernel refuses as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        storage.write(name, b"x" * 2**20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_refused_write_leaves_nothing(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write("zoo/a", b"old")
    with pytest.raises(StorageError, match=r"storage .*zoo/a: File too large; free space or choose another folder"):
        write_a_megabyte(storage, "zoo/a", 2**16)
    assert storage.read("zoo/a") == b"old"
    assert storage.list("", recursive=True) == ["zoo/a"]


def test_full_disk(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        storage = Storage(str(tmp_path))
        with pytest.raises(StorageError, match="No space left on device; free space or choose another folder"):
            storage.write("zoo/a", b"x" * 2**20)
        assert storage.list("", recursive=True) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("uri", ["nowhere://key:secret@x", "s3://key:secret@[x", "s3://key:secret@x?nonsense=1"])
def test_no_uri(uri):
    with pytest.raises(StorageError, match=r"storage: .* is not a folder or a URI that pyarrow\.fs knows") as caught:
        Storage(uri)
    assert "secret" not in str(caught.value)
    with pytest.raises(StorageError, match=r"'s3:/bucket/zoos' is neither a folder nor a URI, which has two slashes"):
        Storage("s3:/bucket/zoos")


def test_exclusive_writes(tmp_path):
    storage = Storage(str(tmp_path))
    assert storage.write("a/b", b"first", exclusive=True)
    assert not storage.write("a/b", b"second", exclusive=True)
    assert storage.read("a/b") == b"first"
    assert storage.write("a/b", b"third")
    assert storage.read("a/b") == b"third"
    with pytest.raises(StorageError, match=r"a/c: no such file in storage"):
        storage.read("a/c")


def test_places_are_shown_without_secrets(tmp_path):
    storage = Storage("s3://key:secret@bucket/a@b?region=us-east-1&endpoint_override=127.0.0.1%3A1")
    assert storage.location("zoo/x") == "s3://bucket/a@b/zoo/x"
    assert Storage(str(tmp_path / "a?b")).location("zoo/x") == f"{tmp_path}/a?b/zoo/x"


def test_uri_without_a_bucket():
    with pytest.raises(StorageError, match="choose another folder with storage:"):
        Storage("s3://?region=us-east-1").check_writable()


# --- object store -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    yield (
        "s3://user:secret@bucket/prefix?scheme=http&region=us-east-1&allow_bucket_creation=true"
        f"&endpoint_override=127.0.0.1%3A{port}"
    )
    server.stop()


@pytest.fixture
def remote(s3):
    storage = Storage(s3)
    storage.fs.create_dir("bucket")
    return storage


def test_networks_in_an_object_store(remote):
    artifact = Artifact(remote, "zoo", {"members": 4}, {})
    store, records = ParameterStore(artifact), make_records(range(4), worker="node:1")
    store.append(records[:2], SUBSET)
    artifact.save_work("run.safetensors", save_tree({"step": 3}))
    assert load_tree(artifact.load_work("run.safetensors")) == {"step": 3}
    assert not artifact.exists()
    store = ParameterStore(artifact)
    assert store.ids == [0, 1]
    store.append(records, SUBSET)
    finish(store)
    assert artifact.exists()
    assert artifacts.finished(remote) == [artifact.folder]
    found = ParameterStore(artifact)
    assert found.subset() == SUBSET
    assert_same(with_vectors(found, [3, 0]), [records[3], records[0]])
    assert artifact.read("subset.json") == SUBSET.to_json().encode()
    assert verify(remote, artifact.folder) == Findings()
    assert artifact.load_work("run.safetensors") is None
    artifact.commit({"other": b""}, {}, 2.0)
    assert "other" not in artifact.manifest().files


def test_damage_in_an_object_store_is_named_without_secrets(remote):
    artifact = Artifact(remote, "zoo", {"members": 3}, {})
    store = ParameterStore(artifact)
    store.append(make_records(range(2)), SUBSET)
    (part,) = store.manifest_entries([0])
    remote.write(f"{artifact.folder}/{part}", remote.read(f"{artifact.folder}/{part}")[:-20])
    with pytest.raises(StorageError) as caught:
        ParameterStore(artifact)
    assert str(caught.value).startswith(f"s3://bucket/prefix/{artifact.folder}/{part}: damaged Parquet file")
    with pytest.raises(StorageError, match=r"s3://bucket/prefix/zoo/x: no such file in storage"):
        remote.read("zoo/x")


def test_object_store_is_checked_before_work(remote, s3):
    remote.check_writable()
    assert remote.list("tmp") == []
    with pytest.raises(StorageError, match=r"storage s3://nowhere/tmp/probe.* choose another") as caught:
        Storage(s3.replace("bucket/prefix", "nowhere").replace("creation=true", "creation=false")).check_writable()
    assert "secret" not in str(caught.value)


@pytest.fixture
def failing():
    """Object storage that can be made to fail, asked once by Arrow itself, which otherwise takes seconds."""
    store = Store()
    storage = Storage(store.uri)
    options = {"scheme": "http", "region": "us-east-1", "endpoint_override": f"127.0.0.1:{store.port}"}
    once = fs.AwsStandardS3RetryStrategy(max_attempts=1)
    storage.fs = fs.S3FileSystem(access_key="user", secret_key="secret", retry_strategy=once, **options)
    yield store, storage
    store.stop()


@pytest.mark.parametrize("odd", [1, 0], ids=["errors", "connections that end"])
def test_object_storage_that_is_away_for_a_while_is_waited_for(failing, odd, monkeypatch):
    store, storage = failing
    monkeypatch.setattr(store, "_calls", itertools.count(odd, 2))
    artifact = Artifact(storage, "zoo", {"members": 2}, {})
    ParameterStore(artifact).append(make_records(range(2)), SUBSET)
    for act in (
        lambda: storage.write("a", b"content"),
        lambda: storage.read("a") == b"content",
        lambda: storage.exists("a"),
        lambda: "a" in storage.list(""),
        lambda: ParameterStore(artifact).records([0, 1]),
        lambda: storage.delete("a") is None and not storage.exists("a"),
    ):
        store.mode, store.every, hit = "fail", 1, store.hit
        back = threading.Timer(0.3, setattr, (store, "mode", ""))
        back.start()
        assert act()
        assert store.hit > hit
    assert sum("networks/part-" in name for name in store.puts) == 1


def test_object_storage_that_stays_away_is_no_damage(failing, monkeypatch):
    store, storage = failing
    artifact = Artifact(storage, "zoo", {"members": 2}, {})
    ParameterStore(artifact).append(make_records(range(2)), SUBSET)
    monkeypatch.setattr(files, "PATIENCE_S", 0.0)
    known = ParameterStore(artifact)
    known.forget()
    store.mode, store.every = "fail", 1
    for act in (lambda: known.records([0]), lambda: artifact.load_work("run"), artifact.exists):
        with pytest.raises(UnavailableError, match="choose another folder") as caught:
            act()
        assert "damaged" not in str(caught.value)
        assert "secret" not in str(caught.value)


def test_object_storage_that_never_answered_is_not_waited_for(failing, monkeypatch):
    store, storage = failing
    monkeypatch.setattr(files.time, "sleep", lambda seconds: pytest.fail("it waits"))
    store.mode, store.every = "fail", 1
    with pytest.raises(UnavailableError):
        storage.exists("a")
    assert pickle.loads(pickle.dumps(storage)).answered, "a worker's is the driver's, which has answered"


def test_an_interrupted_upload_is_whole_or_absent(failing, monkeypatch):
    _, storage = failing
    opened = storage.fs.open_output_stream
    main = threading.main_thread().ident

    def interrupting(path):
        stream = opened(path)
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.2)
        return stream

    storage.fs = SimpleNamespace(open_output_stream=interrupting, get_file_info=storage.fs.get_file_info)
    with pytest.raises(KeyboardInterrupt):
        storage.write("a", b"content")
    # The interrupt may come before the thread is known to its pool, which then does not wait for it; Python does.
    other = Storage(failing[0].uri)
    until(lambda: other.exists("a"), 10)
    assert other.read("a") == b"content"


def test_what_a_crash_left_in_an_object_store_goes_after_a_day(failing, monkeypatch):
    _, storage = failing
    storage.write("tmp/ray-train-1/left", b"")
    storage.check_writable()
    assert storage.exists("tmp/ray-train-1/left")
    monkeypatch.setattr(files, "STALE_TEMPORARY_S", -60)
    storage.check_writable()
    assert not storage.exists("tmp/ray-train-1/left")


def build_zoo(uri, networks_per_task, together):
    """In a process of its own, which commits when all others do."""
    limit_threads(1)
    experiment, _ = tiny("unused", f"evaluation.networks_per_task={networks_per_task}")
    artifacts, upload = artifacts_of(experiment, Storage(uri, answered=True)), Storage._upload

    def at_once(self, name, content):
        if name.endswith("/manifest.json"):
            together.wait(60)
        upload(self, name, content)

    Storage._upload = at_once
    zoo.build(experiment, artifacts, context())


@pytest.mark.slow
def test_two_builders_at_once_in_an_object_store_leave_a_whole_artifact(failing, tmp_path):
    """There each may miss the other's manifest; the last one stays."""
    store, storage = failing
    experiment, its = tiny(tmp_path)
    build(experiment, its, "base", "zoo")
    for name in its["base"].storage.list("base", recursive=True):
        storage.write(name, its["base"].storage.read(name))
    processes = multiprocessing.get_context("spawn")
    together = processes.Barrier(2)
    builders = [processes.Process(target=build_zoo, args=(store.uri, most, together)) for most in (3, 4)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
        assert builder.exitcode == 0
    manifest = f"{its['zoo'].folder}/manifest.json"
    assert sum(name.endswith(manifest) for name in store.puts) == 2
    found, expected = (ParameterStore(artifacts_of(experiment, s)["zoo"]) for s in (storage, its["zoo"].storage))
    assert found.vectors().tobytes() == expected.vectors().tobytes()
    assert [row.wrong for row in found.records()] == [row.wrong for row in expected.records()]
    seen = verify(storage, its["zoo"].folder)
    assert seen.problems == []
    assert all("no manifest knows it" in note for note in seen.notes)
