"""Stored files that are damaged, or made by someone else: named in one message, never used, never leading outside."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import TINY, tiny
from test_cli import pdiff
from test_store import SUBSET, make_records

import pdiff_ray
from pdiff_ray.common.errors import ConfigError, StorageError
from pdiff_ray.config.schema import Evaluation
from pdiff_ray.config.section import merge
from pdiff_ray.evaluation.groups import Group, groups_of
from pdiff_ray.evaluation.summary import by_title
from pdiff_ray.stages.base import load_state
from pdiff_ray.stages.report import load_summary
from pdiff_ray.stages.stored import Networks
from pdiff_ray.storage import artifacts, sealed
from pdiff_ray.storage.artifacts import WORK, Artifact, artifact_key, is_finished, opened, read_manifest
from pdiff_ray.storage.checks import Findings, folders, verify
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.parameters import ParameterStore
from pdiff_ray.storage.sealed import digest, read_listed, seal, write_listed
from pdiff_ray.storage.trees import load_tree, save_tree
from pdiff_ray.sweeps.ledger import Ledger, read_trial, records, verify_sweep
from pdiff_ray.tracking.runs import trial_run

SWEEP = {"parameters": {"generator.members": [6, 12]}}
UNFINISHED = ("zoo", {"members": 4}, {})


def sweep(root, **section):
    return pdiff_ray.load_sweep(TINY, storage=str(root), sweep={**SWEEP, **section})


@pytest.fixture
def root(tmp_path):
    """A storage with files of every kind, and nothing that took training."""
    storage, inputs = Storage(str(tmp_path / "storage")), {}
    network = save_tree({f"tensor.{i}": torch.arange(5.0) for i in range(3)})
    for stage, files, vectors in (
        ("base", {"network.safetensors": network}, None),
        ("zoo", {"subset.json": SUBSET.to_json().encode()}, True),
        ("evaluation", {"summary.json": b'{"groups": []}'}, False),
        ("report", {"report.html": b"<html>", "table.csv": b"a,b"}, None),
    ):
        artifact = Artifact(storage, stage, {"seed": 1, "name": "x"}, inputs)
        store, parts = ParameterStore(artifact), {}
        if vectors is not None:
            rows = [replace(r, vector=r.vector if vectors else None, wrong=b"\x05") for r in make_records(range(3))]
            store.append(rows, SUBSET, {"sharing": {"shared": 0.5}, "span": [1.0, 2.0]})
            parts = store.manifest_entries(range(3))
        artifact.commit(files, {"accuracy": 0.1}, 1.5, parts)
        inputs = {stage: artifact.key}
    growing = Artifact(storage, *UNFINISHED)
    ParameterStore(growing).append(make_records(range(2)), SUBSET)
    growing.save_work("run-0.safetensors", save_tree({"kept": 2, "vector": torch.arange(3.0)}))
    ledger = Ledger(sweep(tmp_path / "storage"), storage)
    ledger.record(replace(ledger.ask(), state="finished", objective=0.5, curve=((1, 0.25),)))
    write_listed(storage, ledger.folder, {"report.html": b"<html>", "summary.md": b"| a |"})
    return tmp_path / "storage"


def content(root, folder):
    """All that is read of a folder."""
    storage = Storage(str(root))
    if folder.startswith("sweeps/"):
        return [read_trial(storage, name) for name in records(storage, folder)], read_listed(storage, folder)
    if not is_finished(storage, folder):
        artifact = Artifact(storage, *UNFINISHED)
        store, files = ParameterStore(artifact), [str(load_state(artifact, "run-0.safetensors"))]
    else:
        manifest = read_manifest(storage, folder)
        artifact = opened(storage, manifest)
        store, files = ParameterStore(artifact), [manifest]
        files += [artifact.read(name) for name, entry in manifest.files.items() if entry.ids is None]
    if store.ids:
        files += [store.records(), *map(store.about, store.manifest_entries(store.ids)), store.subset()]
        files += [] if folder.startswith("evaluation") else [store.vectors().tobytes()]
    return files


def problems_of(root, folder):
    return (verify_sweep if folder.startswith("sweeps/") else verify)(Storage(str(root)), folder).problems


# --- flipped bytes ----------------------------------------------------------------------------------------------------


def test_every_flipped_byte_is_named(root):
    generator = random.Random(0)
    kinds = set()
    for folder in [*folders(Storage(str(root))), *Storage(str(root)).list("sweeps")]:
        whole = content(root, folder)
        assert problems_of(root, folder) == []
        for name in Storage(str(root)).list(folder, recursive=True):
            file = root / name
            kept = file.read_bytes()
            kinds.add(file.suffix)
            for _ in range(60):
                damaged = bytearray(kept)
                damaged[generator.randrange(len(kept))] ^= generator.randrange(1, 256)
                file.write_bytes(damaged)
                with pytest.raises(StorageError) as caught:
                    content(root, folder)
                assert str(file) in str(caught.value)
                assert caught.value.exit_code == 2
            assert any(str(file) in problem for problem in problems_of(root, folder))
            file.write_bytes(kept)
        assert content(root, folder) == whole
    assert kinds == {".json", ".safetensors", ".parquet", ".html", ".csv", ".md"}


def test_a_vector_that_changes_after_it_was_read_is_named(root):
    networks = Networks.find(Storage(str(root)), "zoo/")
    expected = networks.vectors()
    (file,) = (root / networks.artifact.folder).glob("networks/*")
    kept = file.read_bytes()
    at = kept.index(expected[1].numpy().tobytes())
    file.write_bytes(kept[:at] + bytes([kept[at] ^ 1]) + kept[at + 1 :])
    assert torch.equal(networks.vectors([0, 2]), expected[[0, 2]])
    with pytest.raises(StorageError, match=str(file)):
        networks.vectors([1])


def test_a_damaged_part_of_unfinished_work_goes_alone(root):
    artifact = Artifact(Storage(str(root)), *UNFINISHED)
    (file,) = (root / artifact.folder).glob("networks/*")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StorageError, match=r"digest in its name; delete it and run again to make its networks anew"):
        ParameterStore(artifact)
    file.unlink()
    (root / artifact.folder / "networks/.DS_Store").touch()  # what is no part does not matter
    assert ParameterStore(artifact).ids == []


def test_long_vectors_get_parts_of_their_own(artifact, monkeypatch):
    monkeypatch.setattr("pdiff_ray.storage.parameters.PART_BYTES", 2 * 4 * SUBSET.size)
    store = ParameterStore(artifact)
    store.append(make_records(range(5)), SUBSET)
    assert [len(entry["ids"]) for entry in store.manifest_entries(range(5)).values()].count(2) == 2
    assert ParameterStore(artifact).records() == [replace(r, vector=None) for r in make_records(range(5))]


# --- manifests --------------------------------------------------------------------------------------------------------

OLD = """{
 "format": 2,
 "stage": "base",
 "key": "ac2e3ba5ab876c39",
 "config": {
  "seed": 3,
  "lr": 0.1
 },
 "inputs": {},
 "files": {
  "table.csv": {
   "path": "table-5be08c9684a1.csv",
   "sha256": "5be08c9684a1d25efcee09318204824278b08bbfb4aef973ffefd0b9d7478313"
  }
 },
 "info": {
  "gate": null
 },
 "seed": 3,
 "seconds": 0.5,
 "created_at": "2026-11-21T09:00:00+00:00",
 "versions": {
  "pdiff_ray": "0.1.0"
 }
}"""
OLD_KEY = "ac2e3ba5ab876c39"


def write_old(root, text):
    folder = root / "base" / OLD_KEY
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(text)
    (folder / "table-5be08c9684a1.csv").write_bytes(b"a,b\n")
    return Storage(str(root)), f"base/{OLD_KEY}"


def test_manifests_without_a_digest_open(tmp_path):
    storage, folder = write_old(tmp_path, OLD)
    assert opened(storage, artifacts.find(storage, OLD_KEY[:6])).read("table.csv") == b"a,b\n"
    assert verify(storage, folder) == Findings()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"format": 2', '"format": 3', r"format: 3: this version of pdiff_ray reads format 2"),
        ('"format": 2', '"format": "2"', r"format: '2': Input should be a valid integer"),
        ('"seed": 3,\n "seconds"', '"seconds"', r"seed: Field required"),
        ('"seconds": 0.5', '"seconds": NaN', r"seconds: nan: "),
        ('"seconds": 0.5', '"seconds": 0.5, "mine": 1', r"mine: Extra inputs"),
        ('"lr": 0.1', '"lr": 0.2', r"altered: .* its configuration and inputs make"),
        ('"stage": "base"', '"stage": "zoo"', r"altered: it calls itself zoo/"),
        ('"stage": "base"', '"stage": "../base"', r"stage: '../base'"),
        ('"inputs": {}', '"inputs": {"zoo": "../../x"}', r"inputs.zoo: '../../x'"),
        ('"inputs": {}', '"inputs": {"..": "0123456789abcdef"}', r"inputs"),
        (
            '"path": "table-5be08c9684a1.csv"',
            '"path": "/etc/hostname"',
            r"path: '/etc/hostname': the name .* leads out",
        ),
        ('"path": "table-5be08c9684a1.csv"', '"path": "../../../x"', r"path: .* leads out of its folder"),
        ('"path": "table-5be08c9684a1.csv"', r'"path": "a\\..\\b"', r"path: .* leads out of its folder"),
        ('"path": "table-5be08c9684a1.csv"', r'"path": "C:x"', r"path: .* leads out of its folder"),
        ('"path": "table-5be08c9684a1.csv"', r'"path": "a\u0000b"', r"path: .* leads out of its folder"),
        ('"path": "table-5be08c9684a1.csv"', r'"path": "\ud800"', r"Invalid JSON"),
        ('"table.csv": {', '"../table.csv": {', r"files.*leads out of its folder"),
        ('"created_at": "2026', '"created_at": "soon 2026', r"created_at: "),
        ('"gate": null', '"gate": ' + "[" * 500 + "]" * 500, r"recursion limit"),
    ],
)
def test_manifests_that_are_no_manifests(tmp_path, old, new, expected):
    assert old in OLD
    storage, folder = write_old(tmp_path, OLD.replace(old, new))
    with pytest.raises(StorageError, match=expected) as caught:
        read_manifest(storage, folder)
    assert str(tmp_path / folder / "manifest.json") in str(caught.value)
    assert str(caught.value).endswith("delete its folder to build it again")
    assert verify(storage, folder).problems == [str(caught.value)]
    assert str(tmp_path / folder) in pdiff("artifacts", "list", "--storage", tmp_path, code=2)


def test_too_large_a_record_is_not_read(root, monkeypatch):
    monkeypatch.setattr(sealed, "MAX_JSON", 100)
    folder = artifacts.finished(Storage(str(root)))[0]
    with pytest.raises(StorageError, match=r"manifest.json: damaged, it has [\d,]+ bytes; delete it"):
        read_manifest(Storage(str(root)), folder)


def test_keys_are_the_same_after_a_round_trip(tmp_path):
    """Of all that a configuration can hold: the key is made again from what a manifest says."""
    for artifact in tiny(tmp_path, "training.optimizer.lr=0.1234567890123456789")[1].values():
        kept = json.loads(seal({"config": artifact.config}))["config"]
        assert artifact_key(artifact.stage, kept, artifact.inputs) == artifact.key


# --- storages of someone else -----------------------------------------------------------------------------------------


def altered(root, stage, change):
    """Changes the manifest of a stage and writes it with a digest that is right."""
    (file,) = root.glob(f"{stage}/*/manifest.json")
    fields = json.loads(file.read_text())
    del fields["sha256"]
    change(fields)
    file.write_bytes(seal(fields))
    return file


@pytest.mark.parametrize("name", ["../../../outside/x.html", "{outside}/x.html"])
def test_files_of_a_manifest_stay_below_it(root, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    name = name.format(outside=outside)

    def rename(fields):
        fields["files"][name] = fields["files"].pop("report.html")

    altered(root, "report", rename)
    storage = Storage(str(root))
    report = Artifact(storage, "report", {"seed": 1, "name": "x"}, {})
    found = {stage: replace(report, stage=stage) for stage in artifacts.KINDS}
    (folder,) = (f for f in artifacts.finished(storage) if f.startswith("report"))
    for command in (["show", folder], ["artifacts", "show", folder], ["artifacts", "verify"]):
        assert "leads out of its folder" in pdiff(*command, "--storage", root, code=2)
    with pytest.raises(StorageError):
        trial_run(tiny(root)[0], found)
    assert not any(outside.iterdir())


def test_names_that_lead_outside_are_refused_wherever_they_come_from(root):
    storage = Storage(str(root))
    for name in ("/etc/hostname", "../x", "zoo/../../x", "zoo//x", "zoo/./x", "zoo\\x", "zoo/a\nb"):
        for use in (storage.read, storage.exists, storage.delete, storage.list, lambda name: storage.write(name, b"")):
            with pytest.raises(StorageError, match="leads out of its folder"):
                use(name)


@pytest.mark.parametrize("group", ["../../x", "/x", "a b", "", None])
def test_groups_are_plain_words(root, tmp_path, group):
    artifact = Artifact(Storage(str(root)), "samples", {"seed": 9}, {})
    store = ParameterStore(artifact)
    store.append([replace(record, group=group) for record in make_records([0])], SUBSET)
    artifact.commit({}, {}, 1.0, store.manifest_entries([0]))
    out = tmp_path / "a" / "out"
    text = pdiff("export", artifact.key, out, "--subset-only", "--storage", root, code=2)
    assert f"of group {group!r}" in text
    assert [*tmp_path.rglob("*.safetensors")] == [*root.rglob("*.safetensors")]
    assert problems_of(root, artifact.folder)


def test_a_group_that_the_evaluation_does_not_have():
    with pytest.raises(StorageError, match="network 0 is of group 'strange'"):
        by_title([replace(record, group="strange") for record in make_records([0])])


class Spacious(Group):
    name = "a b"


def test_baselines_have_plain_names():
    with pytest.raises(ConfigError, match="has the name 'a b'"):
        groups_of(Evaluation(baselines=[f"{__name__}:Spacious"]))


@pytest.mark.parametrize("link", ["tmp", "zoo", "zoo/{key}/work", "zoo/{key}/networks"])
def test_links_out_of_a_storage_are_not_followed(tmp_path, link):
    artifact = Artifact(Storage(str(tmp_path / "storage")), "zoo", {"members": 4}, {})
    outside, place = tmp_path / "outside", tmp_path / "storage" / link.format(key=artifact.key)
    outside.mkdir()
    (outside / "mine").write_text("mine")
    os.utime(outside / "mine", (0, 0))
    place.parent.mkdir(parents=True)
    place.symlink_to(outside)

    def make():
        artifact.storage.check_writable()
        store = ParameterStore(artifact)
        store.append(make_records([0]), SUBSET)
        artifact.commit({"a": b"a"}, {}, 1.0, store.manifest_entries([0]))

    with pytest.raises(StorageError, match=r"a symbolic link leads out of the storage; .* or remove it"):
        make()
    assert [(file.name, file.read_text()) for file in outside.iterdir()] == [("mine", "mine")]


def test_a_storage_may_be_a_link_itself(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    assert artifacts.finished(Storage(str(tmp_path / "link"))) == artifacts.finished(Storage(str(root)))
    inside = root / "zoo" / "fedcba9876543210"
    inside.symlink_to(next((root / "base").iterdir()))
    assert any("damaged or altered" in problem for problem in problems_of(root, "zoo/fedcba9876543210"))


def test_a_named_pipe_is_no_file(root):
    (file,) = root.glob("report/*/table-*.csv")
    file.unlink()
    os.mkfifo(file)
    assert any(f"{file}: no such file" in p for p in problems_of(root, str(file.parent.relative_to(root))))


GROUPS = ("original", "ensemble", "generated")
INTERVAL = {
    "networks": 2,
    "estimate": 0.5,
    "lower": 0.4,
    "upper": 0.6,
    "word": "equal",
    "limit": "images",
    "needed": {},
}
SHARES = {"replica": 0.1, "interpolation": 0.9, "new": 0.0}
SUMMARY = {
    "groups": [{"group": group, "networks": 2, "mean": 0.5, "best_id": None} for group in GROUPS],
    "verdict": {
        **{"word": "interpolation", "text": "interpolation", "accuracy": "equal", "baseline": "ensemble"},
        **{"shares": SHARES, "failed": 0.0, "collapsed": False},
    },
    "novelty": {
        **{"word": "interpolation", "shares": SHARES, "text": "interpolation", "headline": "interpolation: all"},
        "distances": {"samples": {"nearest": 0.4, "cosine": 0.8}, "held_out": {"nearest": 0.5, "cosine": 0.6}},
        "copying": {"held_out": {"c_t": -3.0, "z": -1.8, "cells": 2, "num": 40, "effective": 7.3}},
        "undecided": [{"question": "whether it is so", "remedy": "take more", "n": 55}],
        **{"spread": 0.8, "effective_rank": 1.8, "members_rank": 2.7},
    },
    "comparison": {
        **{"networks": 2, "best": "ensemble", "word": "equal", "text": "equal: 0 points above ensemble"},
        "means": dict.fromkeys(GROUPS, INTERVAL),
        "differences": dict.fromkeys(GROUPS[:-1], INTERVAL),
    },
    "zoo": [{"name": "drift", "shown": "0.5", "good": False, "advice": "Take more."}],
    "condition": {
        **{"condition": "accuracy", "samples": 2, "lowest": 0.1, "highest": 0.9},
        "correlations": {"accuracy": {"estimate": 0.5, "lower": 0.1, "upper": 0.8, "members": 0.4}},
    },
}


def summary(group, **parts):
    """The content of a summary whose groups have other fields, as have some of its parts."""
    return json.dumps(merge(SUMMARY, {"groups": [{**one, **group} for one in SUMMARY["groups"]], **parts})).encode()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[]", "AttributeError"),
        (b'{"groups": [{}], "verdict": {"text": ""}}', "KeyError"),
        (b"[" * 100_000, "RecursionError"),
        (summary({"mean": 10**400}), "OverflowError"),
        (summary({"best_id": [1]}), "TypeError"),
        (summary({}, novelty={"undecided": [{"remedy": ""}]}), r"TypeError\(.*question"),
        (summary({}).replace(b'"text": "interpolation", "accuracy"', b'"accuracy"'), r"KeyError\('text'"),
    ],
)
def test_a_summary_that_is_none(tmp_path, content, expected):
    artifact = Artifact(Storage(str(tmp_path)), "evaluation", {}, {})
    artifact.commit({"summary.json": content}, {}, 1.0)
    with pytest.raises(StorageError, match=rf"{artifact.location}: summary.json: no summary \({expected}"):
        load_summary({"evaluation": artifact})


def part_of(root, change):
    """A finished artifact with one part file that was written by someone else, its digest right."""
    artifact = Artifact(Storage(str(root)), "zoo", {"of": "someone"}, {})
    store = ParameterStore(artifact)
    store.append(make_records(range(3)), SUBSET)
    (entry,) = store.manifest_entries(range(3)).values()
    (root / artifact.folder / entry["path"]).unlink()
    file = root / artifact.folder / "networks" / "x"
    store.append([replace(r, id=r.id + 3) for r in make_records(range(3))], SUBSET)
    (part,) = file.parent.iterdir()
    pq.write_table(change(pq.read_table(part)), file, use_dictionary=False, compression="none")
    part.unlink()
    sha = digest(file.read_bytes())
    name = f"networks/part-{sha}.parquet"
    file.rename(file.with_name(f"part-{sha}.parquet"))
    artifact.commit({}, {}, 1.0, {name: {"path": name, "sha256": sha, "ids": [3, 4, 5]}})
    return artifact


def changed(name, column):
    return lambda table: table.set_column(table.column_names.index(name), name, column)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (changed("id", pa.array([3, 4, 7])), "network 5 stands there as number 7"),
        (changed("id", pa.array(["3", "4", "5"])), "its column id is string, and not int64"),
        (lambda table: table.slice(1), "it has 2 rows, for 3 numbers"),
        (lambda table: table.drop_columns("seed"), "its column seed is None"),
        (lambda table: table.drop_columns("vector"), "it has no column vector"),
        (lambda table: table.append_column("id", table["id"]), "several of its columns have one name"),
        (lambda table: table.replace_schema_metadata({}), "damaged Parquet file"),
        (lambda table: table.replace_schema_metadata({"pdiff_ray": "[" * 100_000}), "damaged Parquet file"),
        (lambda table: table.replace_schema_metadata({"pdiff_ray": '{"subset": [{"name": 1}]}'}), "damaged Parquet"),
        (lambda table: table.replace_schema_metadata({"pdiff_ray": '{"subset": []}'}), "do not make up a vector"),
        (changed("vector", pa.nulls(3, pa.list_(pa.float32(), 100_000))), "3 rows of 100000 values are more than it"),
    ],
)
def test_parts_that_say_other_things_than_the_manifest(tmp_path, change, expected):
    artifact = part_of(tmp_path, change)
    networks = Networks(artifact)
    with pytest.raises(StorageError, match=expected) as caught:
        _ = networks.table(), networks.subset, networks.vectors()
    assert str(tmp_path / artifact.folder / "networks" / "part-") in str(caught.value)


def test_trees_that_lead_nowhere():
    for tree in ({"a": torch.ones(1), "a|b": torch.ones(1)}, {"a": 1, "a|b": 2}):
        with pytest.raises(StorageError, match="x: not a whole safetensors file"):
            load_tree(save_tree(tree), "x")


def test_what_torch_says_of_its_own_inside_is_not_told():
    """Of a size that no number can hold, torch says so with the calls that led there."""
    content = save_tree({"a": torch.ones(0, 0)})
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].decode().replace('"shape":[0,0]', f'"shape":[0,{2**63}]').encode()
    with pytest.raises(StorageError, match="not a whole safetensors file") as caught:
        load_tree(len(header).to_bytes(8, "little") + header + content[8 + size :], "x")
    assert "\n" not in str(caught.value)


# --- sweeps -----------------------------------------------------------------------------------------------------------


def test_records_of_earlier_versions_and_other_files(root):
    (file,) = root.glob("sweeps/*/trials/*.json")
    fields = json.loads(file.read_text())
    del fields["sha256"]
    file.write_text(json.dumps(fields, indent=1))
    file.with_name(".DS_Store").touch()
    file.with_name("00000.json~").write_text("an editor's")
    (trial,) = Ledger(sweep(root)).trials.values()
    assert (trial.objective, trial.curve, trial.repeats) == (0.5, ((1, 0.25),), (0,))


@pytest.mark.parametrize(
    "change",
    [
        {"assignment": {"generator.members": 7}},
        {"assignment": {"network.name": "os:system"}},
        {"number": 1},
        {"state": "over"},
        {"repeats": []},
        {"objective": "0.5"},
    ],
)
@pytest.mark.parametrize("section", [{}, {"search": "random", "num_trials": 2}])
def test_records_that_are_not_the_sweeps(root, change, section):
    ledger = Ledger(sweep(root, **section))
    trial = ledger.ask()
    file = root / ledger.folder / "trials" / f"{trial.number:05d}.json"
    fields = json.loads(file.read_text())
    del fields["sha256"]
    file.write_bytes(seal(fields | change))
    with pytest.raises(StorageError, match=rf"{file}: damaged.*; delete it to run its trial again"):
        Ledger(sweep(root, **section))


def test_what_someone_else_wrote_does_not_steer_the_terminal(root):
    word = "\x1b[2J[bold]x"
    artifact = Artifact(Storage(str(root)), "base", {"seed": 5}, {})
    artifact.commit({}, {"imported_from": word}, 1.0)
    assert r"\x1b[2J[bold]x" in pdiff("artifacts", "list", "--storage", root)
    (root / "base" / artifact.key / word).touch()
    assert r"\x1b[2J[bold]x: no manifest knows it" in pdiff("artifacts", "verify", "--storage", root)
    assert str(StorageError(word + "\ud800")) == r"\x1b[2J[bold]x\ud800"


def test_what_is_damaged_beside_does_not_keep_networks_from_being_exported(root, tmp_path):
    artifact = Artifact(Storage(str(root)), "samples", {"seed": 9}, {})
    store = ParameterStore(artifact)
    store.append([replace(record, group="generated") for record in make_records([0])], SUBSET)
    artifact.commit({}, {}, 1.0, store.manifest_entries([0]))
    (beside,) = root.glob("evaluation/*/manifest.json")
    beside.write_text("{")
    text = pdiff("export", artifact.key, tmp_path / "out", "--subset-only", "--storage", root)
    assert f"note: {beside}: damaged" in text.replace("\n", "")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["generated-0000.safetensors"]


# --- verify -----------------------------------------------------------------------------------------------------------


def test_verify_names_all_and_notes_the_rest(root):
    printed = pdiff("artifacts", "verify", "--storage", root)
    unfinished = f"zoo/{artifact_key(*UNFINISHED)}"
    assert f"note: {root}/{unfinished}: unfinished" in printed
    assert "damaged" not in printed
    (extra,) = root.glob("report/*/report-*.html")
    extra = extra.with_name("mine.txt")
    extra.touch()
    assert f"note: {extra}: no manifest knows it" in pdiff("artifacts", "verify", "--storage", root)
    damaged = [next(root.glob(name)) for name in ("sweeps/*/trials/*", "sweeps/*/summary.md", f"zoo/*/{WORK}/*")]
    for file in damaged:
        file.write_bytes(file.read_bytes()[:-1])
    printed = pdiff("artifacts", "verify", "--storage", root, "--json", code=2)
    found = json.loads(printed[: printed.rindex("}") + 1])
    named = [problem for problems in found["problems"].values() for problem in problems]
    assert len(named) == len(damaged)
    assert all(any(str(file) in problem for problem in named) for file in damaged)
    assert "unfinished" in found["notes"][unfinished][0]


def test_what_a_command_says_of_damage_comes_soon_and_small(root):
    """A message within the time and memory that Python and PyTorch take to start."""
    file = next(root.glob("zoo/*/networks/*"))
    key = file.parts[-3]
    file.write_bytes(os.urandom(2**20))
    code = (
        "import sys, time; from pdiff_ray.stages import stored; from pdiff_ray.cli.main import main\n"
        "started = time.monotonic()\n"
        f"sys.argv = ['pdiff', 'export', 'zoo/{key}', 'out', '--storage', {str(root)!r}]\n"
        "try: main()\n"
        # getrusage counts what the process that started this one had taken.
        "finally: print(time.monotonic() - started, open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {file}: damaged Parquet file")
    assert int(done.stdout.split()[-1]) < 2**20  # KiB


def test_a_file_beyond_the_memory_is_named(root):
    """Its length alone: nothing of it is there."""
    (file,) = root.glob("report/*/table-*.csv")
    os.truncate(file, 2**43)
    assert any(
        f"{file}: damaged, it has 8,796,093,022,208 bytes" in p
        for p in problems_of(root, str(file.parent.relative_to(root)))
    )
