"""The parameter store: records whole, found again, and checked."""

import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import with_vectors
from torch import nn

from pdiff_ray.common.errors import StorageError
from pdiff_ray.config.schema import SubsetRule
from pdiff_ray.networks.subset import Subset, resolve
from pdiff_ray.storage import parameters as parameters
from pdiff_ray.storage.checks import Findings, verify
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.parameters import METADATA_KEY, ParameterStore, Record, without_vector
from pdiff_ray.storage.sealed import digest

SUBSET = resolve(SubsetRule(all=True), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "included")


def make_records(ids, **fields):
    vectors = np.random.default_rng(0).standard_normal((100, SUBSET.size), dtype=np.float32)
    return [Record(id_, "original", vector=vectors[id_], **fields) for id_ in ids]


def assert_same(records, expected):
    for record, wanted in zip(records, expected, strict=True):
        assert without_vector(record) == without_vector(wanted)
        np.testing.assert_array_equal(record.vector, wanted.vector)


@pytest.fixture
def store(artifact):
    return ParameterStore(artifact)


def parts_of(artifact):
    return sorted(Path(artifact.location, "networks").iterdir())


def finish(store):
    store.artifact.commit({"subset.json": SUBSET.to_json().encode()}, {}, 1.0, store.manifest_entries(store.ids))


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
        wrong_classes=b"\x03\x01",
        statistics=b"\x01",
        asked=0.5,
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
        assert_same(with_vectors(opened), expected)
        assert opened.records() == [replace(record, vector=None) for record in expected]
        np.testing.assert_array_equal(opened.vectors(), np.stack([record.vector for record in expected]))
    finish(store)
    assert_same(with_vectors(ParameterStore(artifact)), expected)


def test_chosen_ids_in_the_given_order(store):
    records = make_records(range(7))
    for start in (4, 0, 2):
        store.append(records[start : start + 3], SUBSET)
    assert [record.id for record in store.records([6, 0, 4, 3])] == [6, 0, 4, 3]
    np.testing.assert_array_equal(store.vectors([5, 1, 5]), np.stack([records[i].vector for i in (5, 1, 5)]))


def test_rows_of_an_earlier_version_lack_what_is_kept_since(store, artifact, monkeypatch):
    types = {name: kind for name, kind in parameters._TYPES.items() if name != "wrong_classes"}
    with monkeypatch.context() as earlier:
        earlier.setattr(parameters, "_TYPES", types)
        store.append(make_records([0, 1], wrong=b"x"), SUBSET)
    store.append(make_records([2], wrong=b"y", wrong_classes=b"\x07"), SUBSET)
    records = ParameterStore(artifact).records([2, 0, 1])
    assert [(record.wrong, record.wrong_classes) for record in records] == [(b"y", b"\x07"), (b"x", None), (b"x", None)]
    assert ParameterStore(artifact).records([0])[0].wrong_classes is None
    assert len(ParameterStore(artifact).vectors([0, 2])) == 2


def test_of_a_network_that_is_there_twice_the_first_part_counts(store, artifact):
    """As where an actor died after it had stored its rows, and they were judged again."""
    (first,), (second,) = make_records([0], wrong=b"x"), make_records([0], wrong=b"y")
    for record in (first, second):
        ParameterStore(artifact).append([record], SUBSET)
        content = parameters.encode([record], SUBSET, {"stage": artifact.stage, "key": artifact.key})
        artifact.storage.write(f"{artifact.folder}/networks/part-{digest(content)}.parquet", content)
    names = sorted(path.name for path in parts_of(artifact))
    assert len(names) == 2
    found = ParameterStore(artifact)
    kept = found.manifest_entries([0])
    assert list(kept) == [f"networks/{names[0]}"]
    assert len(found.records()) == 1


def test_parts_of_other_networks_are_told_of(store, artifact):
    """Each is whole by itself, and what it says of itself is what it holds."""
    store.append(make_records([0]), SUBSET)
    wider = resolve(SubsetRule(all=True), nn.Linear(3, 9))
    store.append([Record(1, "original", vector=np.zeros(wider.size, np.float32))], wider)
    finish(store)
    with pytest.raises(StorageError, match=f"vectors have {wider.size} values, those of another part {SUBSET.size}"):
        ParameterStore(artifact).vectors()
    assert len(ParameterStore(artifact).records()) == 2


@pytest.mark.parametrize("changes", [{"dtype": "load"}, {"dtype": 3}, {"shape": [-4, -3]}, {"shape": ["a"]}])
def test_descriptions_of_no_tensors_are_refused(changes):
    (first, *_) = json.loads(SUBSET.to_json())
    assert Subset.from_json(json.dumps([first])).names == [first["name"]]
    with pytest.raises((ValueError, TypeError, LookupError)):
        Subset.from_json(json.dumps([first | changes]))


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
    assert [record.id for record in store.records()] == [0, 1, 2, 3]
    content[vector.data_page_offset + vector.total_compressed_size - 5] ^= 1
    part.write_bytes(content)  # after it was compared with its digest
    assert len(store.vectors([0, 1, 3])) == 3
    with pytest.raises(StorageError, match=re.escape(str(part))):
        store.vectors([2])


def test_rows_without_vectors_are_kept_together(store, artifact):
    """Row groups of one row would take twenty times as long to write."""
    records = [replace(record, vector=None) for record in make_records(range(4))]
    store.append(records, SUBSET, {"counts": {"seconds": 1.5}})
    (part,) = parts_of(artifact)
    assert pq.ParquetFile(part).metadata.num_row_groups == 1
    assert store.records([3, 1]) == [records[3], records[1]]
    assert [store.about(name)["counts"] for name in store.manifest_entries([0])] == [{"seconds": 1.5}]


@pytest.mark.parametrize(
    "written",
    [
        {},
        {"write_statistics": False, "data_page_size": 2**30},  # as the store writes, with row groups of one row
        {"row_group_size": 4, "write_statistics": False, "data_page_size": 2**30},  # several vectors in a page
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
    part.rename(part.with_name(f"part-{digest(part.read_bytes())}.parquet"))
    vectors = np.stack([record.vector for record in records])
    opened = ParameterStore(artifact)
    np.testing.assert_array_equal(opened.vectors([2, 0, 2]), vectors[[2, 0, 2]])
    np.testing.assert_array_equal(opened.vectors([0]), vectors[[0]])
    assert_same(with_vectors(opened, [3, 1]), [records[3], records[1]])


def test_vectors_read_before_are_not_decoded_again(store, monkeypatch):
    records = make_records(range(6))
    store.append(records[:4], SUBSET)
    store.append(records[4:], SUBSET)
    store.vectors([1, 2, 3, 5])
    monkeypatch.setattr(parameters._Part, "read", lambda *_: pytest.fail("Parquet was decoded"))
    vectors = store.vectors([5, 1, 5, 2])
    np.testing.assert_array_equal(vectors, np.stack([records[i].vector for i in (5, 1, 5, 2)]))
    assert vectors.flags.writeable


def test_a_part_cut_off_after_it_was_read_is_named(store, artifact):
    store.append(make_records(range(3)), SUBSET)
    store.vectors()
    (part,) = parts_of(artifact)
    os.truncate(part, 100)
    with pytest.raises(StorageError, match=f"{re.escape(str(part))}: damaged Parquet file"):
        store.vectors([2])


def test_more_parts_than_files_are_kept_open(store, artifact, monkeypatch):
    monkeypatch.setattr(parameters, "MAX_OPEN_FILES", 2)
    records = make_records(range(6))
    for record in records:
        store.append([record], SUBSET)
    opened = ParameterStore(artifact)
    for ids in (range(6), [5, 0, 3], range(6)):
        np.testing.assert_array_equal(opened.vectors(ids), np.stack([records[i].vector for i in ids]))
        assert len(opened._opened) == 2
    assert_same(with_vectors(opened), records)


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
    entries = artifact.manifest().files
    assert len(entries) == 1 + 4
    assert sorted(i for entry in entries.values() for i in entry.ids or []) == list(range(20))


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
    assert verify(artifact.storage, artifact.folder) == Findings()
    (part,) = parts_of(artifact)
    content = bytearray(part.read_bytes())
    at = content.index(make_records([1])[0].vector.tobytes())
    content[at + 8] ^= 1
    part.write_bytes(content)
    with pytest.raises(StorageError, match=re.escape(str(part))):
        ParameterStore(artifact).vectors([1])
    (problem,) = verify(artifact.storage, artifact.folder).problems
    assert problem.startswith(f"{part}: damaged")
    assert problem.endswith(f"delete {artifact.location} and run again to build it anew")


def test_missing_part_is_named(store, artifact):
    store.append(make_records(range(3)), SUBSET)
    finish(store)
    (part,) = parts_of(artifact)
    part.unlink()
    with pytest.raises(StorageError, match=re.escape(f"{part}: no such file")):
        ParameterStore(artifact).vectors()
    assert verify(artifact.storage, artifact.folder).problems == [f"{part}: no such file in storage"]


@pytest.mark.parametrize("keep", [0, 3, 100, -8, -1])
def test_truncated_part_is_named(store, artifact, keep):
    store.append(make_records(range(3)), SUBSET)
    (part,) = parts_of(artifact)
    part.write_bytes(part.read_bytes()[:keep])
    with pytest.raises(StorageError) as caught:
        ParameterStore(artifact)
    assert str(caught.value).startswith(f"{part}: damaged Parquet file")
    assert "differs from the digest in its name; delete it and run again" in str(caught.value)


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


def test_some_columns_are_read_alone(store):
    store.append(make_records(range(3), seed=5, wrong=b"\x05"), SUBSET)
    assert [(r.id, r.group, r.wrong, r.seed) for r in store.records([2, 0], ["wrong"])] == [
        (2, "original", b"\x05", None),
        (0, "original", b"\x05", None),
    ]


def test_of_an_object_store_several_are_waited_for_at_a_time(tmp_path, monkeypatch):
    storage, together = Storage(str(tmp_path)), threading.Barrier(2, timeout=10)

    def wait(item):
        together.wait()
        if item == 3:
            raise StorageError("away")
        return 10 * item

    monkeypatch.setattr(Storage, "local", None)
    assert storage.map(wait, [1, 2]) == [10, 20]
    with pytest.raises(StorageError, match="away"):
        storage.map(wait, [1, 3])
