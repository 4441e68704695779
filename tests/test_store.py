"""Records and artifacts in a folder and in an object store: whole, found again, and checked."""

import json
import os
import re
import resource
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import pdiff_ray.store
from pdiff_ray import artifacts
from pdiff_ray.artifacts import Artifact, Storage, artifact_key, load_tree, save_tree
from pdiff_ray.config import SubsetRule
from pdiff_ray.errors import StorageError
from pdiff_ray.store import METADATA_KEY, ParameterStore, Record, without_vector
from pdiff_ray.subset import Subset, resolve

SUBSET = resolve(SubsetRule(all=True), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "included")


def make_records(ids, **fields):
    vectors = np.random.default_rng(0).standard_normal((100, SUBSET.size), dtype=np.float32)
    return [Record(id_, "original", vector=vectors[id_], **fields) for id_ in ids]


def assert_same(records, expected):
    for record, wanted in zip(records, expected, strict=True):
        assert without_vector(record) == without_vector(wanted)
        np.testing.assert_array_equal(record.vector, wanted.vector)


@pytest.fixture
def artifact(tmp_path):
    return Artifact(Storage(str(tmp_path / "storage")), "zoo", {"members": 5}, {"base": "abc"})


@pytest.fixture
def store(artifact):
    return ParameterStore(artifact)


def parts_of(artifact):
    return sorted(Path(artifact.location, "networks").iterdir())


def finish(store):
    store.artifact.commit({"subset.json": SUBSET.to_json().encode()}, {}, 1.0, store.manifest_entries(store.ids))


# --- the parameter store ----------------------------------------------------------------------------------------------


def test_round_trip(store, artifact):
    full = Record(
        id=4,
        group="generated",
        vector=make_records([4])[0].vector,
        parent=1,
        sigma=0.1,
        seed=2**62,
        step=7,
        train_accuracy=0.5,
        train_loss=1 / 3,
        validation_accuracy=0.25,
        validation_loss=2.5,
        test_accuracy=0.125,
        test_loss=3.5,
        wrong=b"\x00\xff",
        nearest_distance=0.75,
        created_at=datetime(2026, 1, 2, 3, 4, 5, 6, UTC),
        worker="node:1",
    )
    assert all(value is not None for value in vars(full).values())
    expected = [*make_records([0, 1]), full]
    store.append(expected[:2], SUBSET)
    store.append(expected[2:], SUBSET)
    for opened in (store, ParameterStore(artifact)):
        assert opened.ids == [0, 1, 4]
        assert_same(opened.records(vectors=True), expected)
        assert opened.records() == [replace(record, vector=None) for record in expected]
        np.testing.assert_array_equal(opened.vectors(), np.stack([record.vector for record in expected]))
    finish(store)
    assert_same(ParameterStore(artifact).records(vectors=True), expected)


def test_chosen_ids_in_the_given_order(store):
    records = make_records(range(7))
    for start in (4, 0, 2):
        store.append(records[start : start + 3], SUBSET)
    assert [record.id for record in store.records([6, 0, 4, 3])] == [6, 0, 4, 3]
    np.testing.assert_array_equal(store.vectors([5, 1, 5]), np.stack([records[i].vector for i in (5, 1, 5)]))


def test_one_network_is_read_without_the_rest(store, artifact):
    """Every row has a row group of its own, and every column its pages."""
    store.append(make_records(range(4)), SUBSET)
    (part,) = parts_of(artifact)
    file = pq.ParquetFile(part)
    assert file.metadata.num_row_groups == 4
    content = bytearray(part.read_bytes())
    vector = next(
        c for i in range(30) if (c := file.metadata.row_group(2).column(i)).path_in_schema.startswith("vector")
    )
    content[vector.data_page_offset + vector.total_compressed_size - 5] ^= 1
    part.write_bytes(content)
    assert [record.id for record in store.records()] == [0, 1, 2, 3]
    assert len(store.vectors([0, 1, 3])) == 3
    with pytest.raises(StorageError):
        store.vectors([2])


@pytest.mark.parametrize(
    "written",
    [
        {},
        {"write_statistics": False, "data_page_size": 2**30},  # as the store writes, with row groups of one row
        {"data_page_size": 16, "write_batch_size": 4},  # a vector in several pages
        {"compression": "snappy"},
        {"use_dictionary": True},
        {"data_page_version": "2.0"},
        {"write_page_checksum": False},
    ],
)
def test_vectors_however_their_pages_were_written(store, artifact, written):
    records = make_records(range(4))
    store.append(records, SUBSET)
    (part,) = parts_of(artifact)
    plain = {"row_group_size": 1, "use_dictionary": False, "compression": "none", "write_page_checksum": True}
    pq.write_table(pq.read_table(part), part, **{**plain, **written})
    vectors = np.stack([record.vector for record in records])
    opened = ParameterStore(artifact)
    np.testing.assert_array_equal(opened.vectors([2, 0, 2]), vectors[[2, 0, 2]])
    assert_same(opened.records([3, 1], vectors=True), [records[3], records[1]])


def test_more_parts_than_files_are_kept_open(store, artifact, monkeypatch):
    monkeypatch.setattr(pdiff_ray.store, "MAX_OPEN_FILES", 2)
    records = make_records(range(6))
    for record in records:
        store.append([record], SUBSET)
    opened = ParameterStore(artifact)
    for ids in (range(6), [5, 0, 3], range(6)):
        np.testing.assert_array_equal(opened.vectors(ids), np.stack([records[i].vector for i in ids]))
        assert len(opened._opened) == 2
    assert_same(opened.records(vectors=True), records)


def test_unknown_id(store, artifact):
    with pytest.raises(StorageError, match=f"{artifact.key}: holds no networks"):
        store.vectors()
    store.append(make_records([2, 3]), SUBSET)
    with pytest.raises(StorageError, match=f"{artifact.key}: holds no network 9; its ids are 2 to 3"):
        store.records([2, 9])


def test_append_is_idempotent(store, artifact):
    store.append(make_records([0, 1]), SUBSET)
    before = parts_of(artifact)
    store.append(make_records([1, 0]), SUBSET)
    ParameterStore(artifact).append(make_records([0]), SUBSET)
    assert parts_of(artifact) == before
    store.append(make_records([1, 2]), SUBSET)
    assert pq.read_table(next(p for p in parts_of(artifact) if p not in before))["id"].to_pylist() == [2]


def test_two_stores_append_the_same_ids_at_once(artifact):
    records, together = make_records(range(20)), threading.Barrier(2)

    def append(worker):
        store = ParameterStore(artifact)
        together.wait()
        for start in range(0, 20, 5):
            store.append([replace(r, worker=worker) for r in records[start : start + 5]], SUBSET)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(append, ["first", "second"]))
    assert len(parts_of(artifact)) == 8
    store = ParameterStore(artifact)
    assert store.ids == list(range(20))
    np.testing.assert_array_equal(store.vectors(), np.stack([record.vector for record in records]))
    finish(store)
    entries = artifact.manifest()["files"]
    assert len(entries) == 1 + 4
    assert sorted(i for entry in entries.values() for i in entry.get("ids", [])) == list(range(20))


def test_the_same_rows_are_the_same_file(artifact):
    ParameterStore(artifact).append(make_records([0]), SUBSET)
    other = ParameterStore(replace(artifact, storage=Storage(f"{artifact.storage.root}-2")))
    other.append(make_records([0]), SUBSET)
    assert [p.name for p in parts_of(artifact)] == [p.name for p in parts_of(other.artifact)]


def test_a_lone_file_is_turned_back_into_state_dicts(store, artifact):
    store.append(make_records([0, 1]), SUBSET)
    (part,) = parts_of(artifact)
    table = pq.read_table(part)
    about = json.loads(table.schema.metadata[METADATA_KEY])
    assert (about["stage"], about["key"]) == ("zoo", artifact.key)
    subset = Subset.from_json(json.dumps(about["subset"]))
    assert subset == SUBSET == store.subset()
    tensors = subset.unflatten(torch.tensor(table["vector"][1].as_py()))
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert network.load_state_dict(tensors, strict=False).unexpected_keys == []
    np.testing.assert_array_equal(network[0].bias.detach(), make_records([1])[0].vector[12:16])


def test_flipped_byte_is_noticed_and_named(store, artifact):
    store.append(make_records(range(3)), SUBSET)
    finish(store)
    assert artifacts.verify(artifact.storage, artifact.folder) == []
    (part,) = parts_of(artifact)
    content = bytearray(part.read_bytes())
    at = content.index(make_records([1])[0].vector.tobytes())
    content[at + 8] ^= 1
    part.write_bytes(content)
    with pytest.raises(StorageError, match=re.escape(str(part))):
        ParameterStore(artifact).vectors([1])
    (problem,) = artifacts.verify(artifact.storage, artifact.folder)
    assert problem.startswith(f"{part}: damaged")
    assert problem.endswith(f"delete {artifact.location} and run again to build it anew")


def test_missing_part_is_named(store, artifact):
    store.append(make_records(range(3)), SUBSET)
    finish(store)
    (part,) = parts_of(artifact)
    part.unlink()
    with pytest.raises(StorageError, match=re.escape(f"{part}: no such file")):
        ParameterStore(artifact).vectors()
    assert artifacts.verify(artifact.storage, artifact.folder) == [f"{part}: no such file in storage"]


@pytest.mark.parametrize("keep", [0, 3, 100, -8, -1])
def test_truncated_part_is_named(store, artifact, keep):
    store.append(make_records(range(3)), SUBSET)
    (part,) = parts_of(artifact)
    part.write_bytes(part.read_bytes()[:keep])
    with pytest.raises(StorageError) as caught:
        ParameterStore(artifact)
    assert str(caught.value).startswith(f"{part}: damaged Parquet file")
    assert f"delete {artifact.location} and run again" in str(caught.value)


def test_half_written_files_are_no_parts(store, artifact):
    """What a killed writer leaves lies outside of the artifact, and goes when it is old."""
    store.append(make_records([0]), SUBSET)
    storage = Path(artifact.storage.root)
    stale, fresh = storage / "tmp" / "stale", storage / "tmp" / "fresh"
    for file in (stale, fresh):
        file.write_bytes(parts_of(artifact)[0].read_bytes()[:50])
    os.utime(stale, (0, 0))
    assert ParameterStore(artifact).ids == [0]
    artifact.storage.check_writable()
    assert list((storage / "tmp").iterdir()) == [fresh]


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
    who = artifact.manifest()["info"]["who"]
    assert artifact.read("a.json") == artifact.read("b.json") == b"%d" % who
    assert artifacts.verify(artifact.storage, artifact.folder) == []


def test_manifest_says_what_led_to_the_artifact(artifact):
    artifact.commit({"a.json": b"x"}, {"accuracy": 0.5}, 1.23456)
    manifest = artifact.manifest()
    assert (manifest["stage"], manifest["key"]) == ("zoo", artifact.key)
    assert manifest["config"] == artifact.config
    assert manifest["inputs"] == artifact.inputs
    assert manifest["seconds"] == 1.235
    assert torch.__version__.startswith(manifest["versions"]["torch"])


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

    def finished_meanwhile(storage, name):
        storage.delete(name)
        return read(storage, name)

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
    assert artifacts.find(artifact.storage, artifact.key[:8])[0] == artifact.folder
    assert artifacts.find(artifact.storage, f"samples/{other.key[:4]}")[0] == other.folder
    with pytest.raises(StorageError, match=r"zzz: no finished artifact in .*`pdiff artifacts list`"):
        artifacts.find(artifact.storage, "zzz")
    with pytest.raises(StorageError, match="2 artifacts"):
        artifacts.find(artifact.storage, "")


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
            assert one.keys() == other.keys()
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
    assert_same(found.records([3, 0], vectors=True), [records[3], records[0]])
    assert artifact.read("subset.json") == SUBSET.to_json().encode()
    assert artifacts.verify(remote, artifact.folder) == []
    assert artifact.load_work("run.safetensors") is None
    artifact.commit({"other": b""}, {}, 2.0)
    assert "other" not in artifact.manifest()["files"]


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
