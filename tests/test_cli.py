"""The commands as a user types them: what they print, how they exit, and what bad input gets."""

import contextlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.shell_completion import BashComplete
from helpers import TINY, build, encoded, pixels, tiny
from safetensors.torch import load_file, save_file

from pdiff_ray.cli.main import cli, guarded
from pdiff_ray.config import loading
from pdiff_ray.reports.answers import conclusion
from pdiff_ray.stages.base import load_network
from pdiff_ray.stages.table import STAGES, artifacts_of
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.parameters import ParameterStore, Record

SWEEPS = Path(__file__).parent.parent / "sweeps"


def pdiff(*arguments, code=0, errors=None):
    """Runs the command line; returns what it prints. A traceback would be an exception here.

    `errors` takes what goes to the standard error; default: it is returned as well.
    """
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(errors or printed),
        pytest.raises(SystemExit) as stopped,
    ):
        guarded(cli, [str(argument) for argument in arguments])
    assert (stopped.value.code or 0) == code, printed.getvalue()
    return printed.getvalue()


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """A finished tiny experiment."""
    folder = tmp_path_factory.mktemp("storage")
    pdiff("sweep", TINY, "--storage", folder, "--in-process")
    return folder


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("print('x' * 100_000)", 0, ""),
        ("raise PdiffError('so it is')", 1, "error: so it is\n"),
        ("raise ConfigError('so it is')", 2, "error: so it is\n"),
        ("raise SystemExit(3)", 3, ""),
        ("raise ValueError('a bug')", 1, "ValueError: a bug\n"),
    ],
)
def test_a_process_ends_with_all_that_was_printed_and_its_code(body, code, said):
    script = f"""
import atexit, click
from pdiff_ray.cli.main import guarded
from pdiff_ray.common.errors import ConfigError, PdiffError

@click.command()
def command():
    atexit.register(print, "registered by a library")
    {body}

guarded(command)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr.endswith(said)
    assert done.stdout == ("x" * 100_000 + "\n") * (code == 0) + "registered by a library\n"


def test_help_imports_nothing_heavy():
    code = "import sys; from pdiff_ray.cli.main import cli; cli(['--help'], standalone_mode=False); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "click" in loaded
    assert not loaded & {"torch", "ray", "mlflow", "pydantic", "pyarrow", "rich"}


def test_every_option_has_help():
    def commands(group):
        for command in group.commands.values():
            yield command
            if hasattr(command, "commands"):
                yield from commands(command)

    for command in commands(cli):
        assert command.help, command.name
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.help, f"{command.name} {parameter.name}"


def test_a_second_run_uses_everything(storage, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # where no Ray can be reached
    before = {file: file.stat().st_mtime_ns for file in storage.rglob("*") if file.is_file()}
    text = pdiff("sweep", TINY, "--storage", storage)
    assert "nothing, all of it is there" in text
    assert "generated" in text
    assert "report-" in text
    assert {file: file.stat().st_mtime_ns for file in storage.rglob("*") if file.is_file()} == before


def test_the_module_is_the_same_command(storage):
    result = subprocess.run(
        [sys.executable, "-m", "pdiff_ray.sweep", str(TINY), "--storage", str(storage)], capture_output=True, text=True
    )
    assert result.returncode == 0
    assert "original / ensemble / generated" in result.stdout


def test_dry_run_builds_nothing(tmp_path):
    text = pdiff("sweep", TINY, "--storage", tmp_path / "none", "--dry-run")
    assert "to build" in text
    assert "16 values" in text
    assert not (tmp_path / "none").exists()


def test_run_one_stage(tmp_path):
    text = pdiff("run", "base", TINY, "--storage", tmp_path, "--in-process")
    assert str(tmp_path / "base") in text
    assert (tmp_path / "base").exists()
    assert not (tmp_path / "zoo").exists()


def test_artifacts_list_show_verify(storage):
    listed = pdiff("artifacts", "list", "--storage", storage)
    assert all(stage in listed for stage in ("base", "zoo", "generator", "samples", "evaluation", "report"))
    key = next((storage / "samples").iterdir()).name
    shown = pdiff("artifacts", "show", key[:8], "--storage", storage)
    assert json.loads(shown[: shown.rindex("}") + 1])["info"]["samples"] == 6
    assert "generator/" in shown
    assert "base/" in shown.rpartition("made from")[2]
    assert "damaged" not in pdiff("artifacts", "verify", "--storage", storage)
    assert "no finished artifact" in pdiff("artifacts", "show", "zzz", "--storage", storage, code=2)


def test_verify_names_the_damaged_file(tmp_path):
    experiment, artifacts = tiny(tmp_path)
    build(experiment, artifacts, "base")
    (file,) = (tmp_path / artifacts["base"].folder).glob("network-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert str(file) in pdiff("artifacts", "verify", "--storage", tmp_path, code=2)


def test_exported_networks_load_in_the_plain_network(storage, tmp_path):
    key = next((storage / "samples").iterdir()).name
    assert "2 networks" in pdiff("export", key, tmp_path, "--ids", "1,4", "--storage", storage)
    experiment, artifacts = tiny(storage)
    network = load_network(experiment, artifacts)
    network.load_state_dict(load_file(tmp_path / "generated-0004.safetensors"), strict=True)
    store = ParameterStore(artifacts["samples"])
    assert torch.equal(store.subset().flatten(network.state_dict()), torch.from_numpy(store.vectors([4])[0].copy()))
    pdiff("export", key, tmp_path / "subset", "--subset-only", "--storage", storage)
    tensors = load_file(tmp_path / "subset" / "generated-0000.safetensors")
    assert set(tensors) == set(store.subset().names)
    assert not network.load_state_dict(tensors, strict=False).unexpected_keys


def test_export_replaces_nothing_unasked(storage, tmp_path):
    key, folder = next((storage / "samples").iterdir()).name, tmp_path / "out"
    pdiff("export", key, folder, "--ids", "1,2", "--storage", storage)
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "generated-0002.safetensors").write_bytes(b"mine")
    text = pdiff("export", key, folder, "--storage", storage, code=2)
    assert f"{folder}/generated-0002.safetensors: is there already" in text
    assert "--overwrite" in text
    assert {file.name for file in folder.iterdir()} == set(whole)  # nothing was written
    assert "2 networks" in pdiff("export", key, folder, "--ids", "1,2", "--overwrite", "--storage", storage)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole
    assert "6 networks" in pdiff("export", key, folder, "--storage", storage)  # the same two and the others


def test_import_of_checkpoints_and_the_way_from_there(storage, tmp_path):
    """Exported members, imported again as .pth and safetensors files, are judged as the originals were."""
    key = next((storage / "zoo").iterdir()).name
    pdiff("export", key, tmp_path / "files", "--storage", storage)
    for file in sorted((tmp_path / "files").iterdir())[::2]:
        torch.save({"state_dict": load_file(file)}, file.with_suffix(".pth"))
        file.unlink()
    target = tmp_path / "imported"
    options = ("--storage", target, "--set", "zoo.imported=exported")
    assert "zoo:" in pdiff("import", tmp_path / "files", TINY, *options)
    assert "there already" in pdiff("import", tmp_path / "files", TINY, *options)
    pdiff("run", "evaluation", TINY, *options, "--in-process")
    _experiment, artifacts = tiny(target, "zoo.imported=exported")
    _original, its = tiny(storage)
    rows = ParameterStore(artifacts["evaluation"]).records(range(12))
    assert [r.wrong for r in rows] == [r.wrong for r in ParameterStore(its["zoo"]).records()]


def test_import_takes_what_its_options_say(storage, tmp_path):
    pdiff("export", next((storage / "zoo").iterdir()).name, tmp_path / "whole", "--storage", storage)
    folder = tmp_path / "files"
    folder.mkdir()
    for index, file in enumerate(sorted((tmp_path / "whole").iterdir())[:4]):
        tensors = {f"net.{name}": tensor for name, tensor in load_file(file).items()}
        torch.save({"epoch": -index, "weights": tensors, "ema": tensors, "other": {}}, folder / f"e{index}.pt")
    options = ("--pattern", "e[012].pt", "--weights", "ema", "--prefix", "net.", "--order", "epoch")
    target = ("--storage", tmp_path / "s", "--set", "zoo.imported=x", "--set", "zoo.members=2")
    text = pdiff("import", folder, TINY, *target, *options, "--base", folder / "e3.pt")
    assert "e3.pt (--base)" in text
    assert "members: 2, in the order of epoch in them: e2.pt, e1.pt" in text
    assert "under 'ema', without the prefix 'net.'" in text
    assert "left out: e0.pt: the first 2 are taken" in text


def test_samples_of_another_tool_are_judged_and_exported(storage, tmp_path):
    """Exported samples, brought in again, are judged and exported as the generated ones were."""
    shutil.copytree(storage, tmp_path / "s")
    its = tiny(tmp_path / "s")[1]
    pdiff("export", its["samples"].key, tmp_path / "networks", "--storage", storage)
    changes = ("generator.name=imported", "generator.label=theirs")
    options = (TINY, "--storage", tmp_path / "s", *(part for change in changes for part in ("--set", change)))
    assert "no samples 'theirs' have been brought in" in pdiff("sweep", *options, "--in-process", code=2)
    text = pdiff("import", tmp_path / "networks", *options, "--as", "samples")
    assert "samples: 6, in the order of their names: generated-0000.safetensors" in text
    assert "verdict" in pdiff("sweep", *options, "--in-process")
    artifacts = tiny(tmp_path / "s", *changes)[1]
    found, expected = (ParameterStore(a["evaluation"]).records() for a in (artifacts, its))
    assert {r.group for r in expected} - {r.group for r in found} == {"autoencoder", "decoded"}
    found, expected = ([r for r in records if r.group == "generated"] for records in (found, expected))
    assert [(r.wrong, r.nearest_distance) for r in found] == [(r.wrong, r.nearest_distance) for r in expected]
    pdiff("export", artifacts["samples"].key, tmp_path / "again", "--storage", tmp_path / "s")
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("networks", "again")]
    assert files[0] == files[1]


def test_samples_without_a_zoo(tmp_path):
    np.save(tmp_path / "vectors.npy", np.ones((6, 16), np.float32))
    chosen = ("--set", "generator.name=imported", "--set", "generator.label=x", "--storage", tmp_path / "s")
    text = pdiff("import", tmp_path / "vectors.npy", TINY, *chosen, "--as", "samples", code=2)
    assert "the samples' zoo is not there; make it with `pdiff run zoo" in text
    text = pdiff("import", tmp_path / "vectors.npy", TINY, "--storage", tmp_path / "s", code=2)
    assert "vectors.npy: is a file; the checkpoints of a zoo are in a folder" in text


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/pdiff-was-here",)


def test_a_pickle_with_code_is_refused(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for index in range(12):
        (folder / f"{index}.pth").write_bytes(pickle.dumps({"layers.1.bn.weight": Evil()}))
    text = pdiff("import", folder, TINY, "--storage", tmp_path / "s", "--set", "zoo.imported=evil", code=2)
    assert "0.pth" in text
    assert "could run code" in text
    assert not os.path.exists("/tmp/pdiff-was-here")
    assert not (tmp_path / "s" / "zoo").exists()


def test_import_errors_name_the_file(storage, tmp_path):
    pdiff("export", next((storage / "zoo").iterdir()).name, tmp_path, "--storage", storage)
    options = (TINY, "--storage", tmp_path / "s", "--set", "zoo.imported=x")
    assert "zoo.members" in pdiff("import", tmp_path, *options, "--set", "zoo.members=50", code=2)
    other = tmp_path / "original-0005.safetensors"
    tensors = load_file(other)
    save_file({**tensors, "fc.weight": tensors["fc.weight"] + 1}, other)
    text = pdiff("import", tmp_path, *options, code=2)
    assert "original-0005.safetensors" in text
    assert "fc.weight" in text
    save_file({k: v for k, v in tensors.items() if "layers.1" not in k}, other)
    assert "original-0005.safetensors" in pdiff("import", tmp_path, *options, code=2)
    other.write_bytes(b"short")
    assert "original-0005.safetensors" in pdiff("import", tmp_path, *options, code=2)


@pytest.mark.parametrize(
    ("override", "code", "expected"),
    [
        ("data.name=cifar11", 2, "'cifar10'"),
        ("network.name=resnet19", 2, "'resnet18'"),
        ("network.args={width: [1]}", 2, "width"),
        ("zoo.subset={names: [conv9.*]}", 2, "'conv9.*'"),
        ("zoo.subset={norm_layers: [16, 18]}", 2, "2 normalization layers"),
        ("zoo.membrs=3", 2, "'members'"),
        ("generator.members=13", 2, "12 (zoo.members)"),
        ("zoo.members=many", 2, "'many'"),
        ("data.root", 2, "path=value"),
        ("zoo.imported=nothing", 2, "pdiff import"),
        ("data={name: mnist, root: /nonexistent}", 2, "data.download"),
        ("data={name: cifar10, source: parquet, root: /nonexistent}", 2, "train*.parquet"),
        ("training.batch_size=100000", 2, "batch_size is 100000"),
    ],
)
def test_bad_configuration(override, code, expected, tmp_path):
    text = pdiff("sweep", TINY, "--storage", tmp_path / "s", "--in-process", "--set", override, code=code)
    assert expected in text
    assert not list((tmp_path / "s").glob("*/*/manifest.json"))


def test_missing_file_and_bad_yaml(tmp_path):
    assert "no such file" in pdiff("sweep", tmp_path / "none.yaml", code=2)
    (tmp_path / "bad.yaml").write_text("name: x\ndata: [unclosed\n")
    assert "line" in pdiff("sweep", tmp_path / "bad.yaml", code=2)


def test_storage_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    text = pdiff("sweep", TINY, "--storage", tmp_path / "file" / "below", "--in-process", code=2)
    assert str(tmp_path / "file" / "below") in text
    assert "--storage" in text


def test_no_ray_at_the_address(tmp_path):
    text = pdiff("run", "base", TINY, "--storage", tmp_path, "--address", "127.0.0.1:1", code=1)
    assert "no Ray cluster at '127.0.0.1:1'" in text


def test_ui_before_the_first_run(tmp_path):
    assert "nothing is recorded yet" in pdiff("ui", "--storage", tmp_path, code=2)


def test_an_interrupted_import_leaves_nothing_in_the_next(storage, tmp_path):
    key = next((storage / "zoo").iterdir()).name
    pdiff("export", key, tmp_path / "files", "--storage", storage)
    options = ("--storage", tmp_path / "s", "--set", "zoo.imported=x")
    _experiment, artifacts = tiny(tmp_path / "s", "zoo.imported=x")
    subset = ParameterStore(tiny(storage)[1]["zoo"]).subset()
    other = Record(3, "original", vector=np.zeros(subset.size, dtype=np.float32))
    ParameterStore(artifacts["zoo"]).append([other], subset)  # what an import of other files has left
    pdiff("import", tmp_path / "files", TINY, *options)
    assert np.abs(ParameterStore(artifacts["zoo"]).vectors([3])).max() > 0


def test_import_refuses_statistics_that_would_be_lost(storage, tmp_path):
    pdiff("export", next((storage / "zoo").iterdir()).name, tmp_path, "--storage", storage)
    file = tmp_path / "original-0002.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "layers.0.bn.running_mean": tensors["layers.0.bn.running_mean"] + 1}, file)
    text = pdiff("import", tmp_path, TINY, "--storage", tmp_path / "s", "--set", "zoo.imported=x", code=2)
    assert "running_mean" in text
    assert "zoo.batchnorm" in text


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), None, {1: torch.zeros(2)}])
def test_checkpoints_that_are_no_state_dicts(content, tmp_path):
    for index in range(12):
        torch.save(content, tmp_path / f"{index}.pth")
    text = pdiff("import", tmp_path, TINY, "--storage", tmp_path / "s", "--set", "zoo.imported=x", code=2)
    assert "0.pth" in text


def test_recalibrated_networks_are_exported_with_the_statistics_they_were_judged_with(tmp_path):
    aligned = ("zoo.subset=all", "zoo.batchnorm=recalibrated", "alignment.method=weight_matching")
    experiment, artifacts = tiny(tmp_path, *aligned, "zoo.members=6", "sampling.samples=3")
    build(experiment, artifacts, "base", "zoo", "alignment", "generator", "samples")
    base = load_file(next((tmp_path / artifacts["base"].folder).glob("network-*.safetensors")))
    names = [name for name in base if name.endswith("running_var")]
    places = ("--storage", tmp_path)

    def exported(stage, *options, code=0):
        return pdiff("export", artifacts[stage].key, tmp_path / "out" / stage, *options, *places, code=code)

    assert "which are measured when it is judged" in exported("samples", code=2)
    assert "3 networks" in exported("samples", "--subset-only")
    shutil.rmtree(tmp_path / "out")
    build(experiment, artifacts, "evaluation")
    for stage, count in (("zoo", experiment.zoo.size), ("samples", 3)):
        said = exported(stage)
        assert f"{count} networks" in said
        assert "note" not in said  # predictions were compared with what was reported
        files = [load_file(file) for file in sorted((tmp_path / "out" / stage).iterdir())]
        assert len(files) == count
        for name in names:
            assert len({tuple(file[name].tolist()) for file in files} | {tuple(base[name].tolist())}) == count + 1
    assert "before it was aligned" in exported("alignment", code=2)


def test_independent_networks_without_batchnorm_are_exported_whole(tmp_path):
    zoo = {"regime": "independent", "subset": "all", "members": 2}
    sections = {"network": {"name": "s1"}, "training": {"epochs": 1}, "zoo": zoo, "storage": str(tmp_path)}
    experiment = loading.parse_experiment({"name": "whole", **sections}, "a test")
    artifacts = artifacts_of(experiment, Storage(str(tmp_path)))
    assert experiment.zoo.batchnorm == "recalibrated"
    build(experiment, artifacts, "base", "zoo")
    assert "2 networks" in pdiff("export", artifacts["zoo"].key, tmp_path / "out", "--storage", tmp_path)


def test_reports_hold_no_credentials(storage, tmp_path):
    options = ("--storage", storage, "--tracking-uri", "http://me:hunter2@127.0.0.1:1", "--in-process")
    text = pdiff("sweep", TINY, *options, "--set", "name=secretive")
    assert "hunter2" not in text
    pages = list(storage.glob("report/*/report-*.html"))
    assert len(pages) == 2, "another name is another report"
    assert not any("hunter2" in page.read_text() for page in pages)


def test_a_result_is_shown_again_by_file_and_by_key(storage):
    shown = pdiff("show", TINY, "--storage", storage)
    assert "original / ensemble / generated" in shown
    key = tiny(storage)[1]["report"].key
    assert pdiff("show", key[:8], "--storage", storage) == shown
    told = conclusion(json.loads(pdiff("show", key, "--storage", storage, "--json")))
    assert all(line in shown.replace("\n", " ") for line in told)
    base = next((storage / "base").iterdir()).name
    assert "is no result" in pdiff("show", base, "--storage", storage, code=2)
    assert "missing" in pdiff("show", TINY, "--storage", storage, "--set", "sampling.seed=5", code=1)
    told = pdiff("show", TINY, "--storage", storage, "--set", "resources.workers=2", code=1)
    assert "or ask with --set resources.workers=1 for what ran with --in-process" in " ".join(told.split())
    never = SWEEPS / "ablate_layers.yaml"
    assert "no trial has ended yet in" in pdiff("show", never, "--storage", storage, "--preset", "small", code=1)


def test_json_is_all_that_is_printed(storage):
    done = json.loads(pdiff("sweep", TINY, "--storage", storage, "--json", errors=io.StringIO()))
    assert done["groups"][0]["group"] == "original"
    planned = json.loads(pdiff("sweep", TINY, "--storage", storage, "--dry-run", "--json", errors=io.StringIO()))
    assert {stage["state"] for stage in planned["stages"]} == {"there"}
    listed = json.loads(pdiff("artifacts", "list", "--storage", storage, "--json", errors=io.StringIO()))
    assert {manifest["stage"] for manifest in listed} == {stage["stage"] for stage in planned["stages"]}
    verified = json.loads(pdiff("artifacts", "verify", "--storage", storage, "--json", errors=io.StringIO()))
    assert len(verified["problems"]) == len(listed)
    assert not any(verified["problems"].values())


def test_init_writes_an_experiment_that_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 6), ("test", 3)):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                (folder / f"{index}.png").write_bytes(encoded(pixels(1, size=16, seed=index)[0]))
    assert "mine.yaml: written" in pdiff("init", "images", "resnet18", "--output", "mine.yaml")
    text = (tmp_path / "mine.yaml").read_text()
    assert "12 training and 6 test images of 3 x 16 x 16 in 2 classes" in text
    assert "cifar_stem: true" in text
    experiment = loading.load("mine.yaml")
    assert experiment.data.source == "folder"
    assert str(experiment.zoo.subset) == "last 2 norm layers"
    assert pdiff("run", "base", "mine.yaml", "--in-process", "--set", "training.epochs=1").startswith("resnet18")
    assert "exists already" in pdiff("init", "images", "resnet18", "--output", "mine.yaml", code=2)
    assert "written" in pdiff("init", "images", "resnet20", "--output", "plain.yaml")  # it has no stem to change
    assert "cifar_stem" not in (tmp_path / "plain.yaml").read_text()
    assert "network.args has its arguments" in " ".join(pdiff("init", "images", "mlp", code=2).split())
    assert "neither a folder nor one of" in pdiff("init", "pictures", "resnet18", code=2)
    assert "did you mean 'resnet18'" in pdiff("init", "images", "resnet118", code=2)
    assert "network.name: '../etc/x' is no name of a network" in pdiff("init", "images", "../etc/x", code=2)


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("pdiff swe", ["sweep"]),
        ("pdiff run eva", ["evaluation"]),
        (f"pdiff sweep {SWEEPS / 'ablate_layers.yaml'} --preset s", ["small"]),
        ("pdiff export --storage {storage} {key}", ["{whole}"]),
    ],
)
def test_shells_complete(storage, monkeypatch, typed, found):
    whole = next((storage / "samples").iterdir()).name
    names = {"storage": storage, "key": whole[:6], "whole": whole}
    words = typed.format(**names).split()
    monkeypatch.setenv("COMP_WORDS", " ".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    shell = BashComplete(cli, {}, "pdiff", "_PDIFF_COMPLETE")
    assert [line.partition(",")[2] for line in shell.complete().splitlines()] == [
        word.format(**names) for word in found
    ]


def test_the_stages_of_run_are_those_of_the_table():
    assert "STAGE is one of " + ", ".join(STAGES) in " ".join(pdiff("run", "--help").split())
    assert "did you mean 'evaluation'" in pdiff("run", "evaluate", TINY, code=2)


def test_names_are_printed_as_they_are(tmp_path):
    """Rich would take what stands in brackets for its own marks."""
    storage = tmp_path / "a[red]b"
    variants = {"[/close]": {}, "[bold]": {"zoo.members": 9}}
    path = tmp_path / "s.yaml"
    swept = {"parameters": {"which": {"variants": variants}, "zoo.subset": [{"names": ["layers.*.bn.*"]}]}}
    path.write_text(json.dumps({"name": "s", "base": str(TINY), "sweep": swept}))
    shown = pdiff("sweep", path, "--storage", storage, "--dry-run")
    assert "[/close]" in shown
    assert "[bold]" in shown
    assert "a[red]b" in "".join(shown.split())
    assert "{names: [layers.*.bn.*]}" in shown
