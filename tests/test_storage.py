"""Storage in a folder and in an object store: files are whole or absent, and what fails is told or waited for."""

import itertools
import multiprocessing
import pickle
import resource
import signal
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
from faults.store import Store
from helpers import build, context, tiny, until, with_vectors
from pyarrow import fs
from test_store import SUBSET, assert_same, finish, make_records

from pdiff_ray.common.devices import limit_threads
from pdiff_ray.common.errors import StorageError, UnavailableError
from pdiff_ray.stages import zoo
from pdiff_ray.stages.table import artifacts_of
from pdiff_ray.storage import artifacts, files
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.checks import Findings, verify
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.parameters import ParameterStore
from pdiff_ray.storage.trees import load_tree, save_tree

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


@pytest.fixture
def remote():
    store = Store()
    yield Storage(store.uri)
    store.stop()


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
    assert str(caught.value).startswith(f"s3://bucket/pdiff/{artifact.folder}/{part}: damaged Parquet file")
    with pytest.raises(StorageError, match=r"s3://bucket/pdiff/zoo/x: no such file in storage"):
        remote.read("zoo/x")


def test_object_store_is_checked_before_work(remote):
    remote.check_writable()
    assert remote.list("tmp") == []
    nowhere = Storage(remote.uri.replace("bucket/pdiff", "nowhere").replace("creation=true", "creation=false"))
    with pytest.raises(StorageError, match=r"storage s3://nowhere/tmp/probe.* choose another") as caught:
        nowhere.check_writable()
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
    assert sum("networks/part-" in name for name, _ in store.puts) == 1


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
    assert sum(name.endswith(manifest) for name, _ in store.puts) == 2
    found, expected = (ParameterStore(artifacts_of(experiment, s)["zoo"]) for s in (storage, its["zoo"].storage))
    assert found.vectors().tobytes() == expected.vectors().tobytes()
    assert [row.wrong for row in found.records()] == [row.wrong for row in expected.records()]
    seen = verify(storage, its["zoo"].folder)
    assert seen.problems == []
    assert all("no manifest knows it" in note for note in seen.notes)
