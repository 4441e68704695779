"""Artifacts: whole, found again, and checked."""

import pickle
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import TINY
from torch import nn

import pdiff_ray
from pdiff_ray.common.errors import StorageError
from pdiff_ray.storage import artifacts, sealed
from pdiff_ray.storage.artifacts import artifact_key
from pdiff_ray.storage.checks import Findings, verify
from pdiff_ray.storage.files import Storage
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


def test_a_manifest_that_could_not_be_read_is_not_written(artifact, monkeypatch):
    monkeypatch.setattr(sealed, "MAX_JSON", 2000)
    with pytest.raises(StorageError, match=r"bytes, more than the 2,000 of a record"):
        artifact.commit({}, {"left_out": "x" * 2000}, 1.0)
    assert not artifact.exists()
