"""Networks whose numbers would not hold are refused before training; exported files are what was judged."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import build, context, tiny
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from pdiff_ray.common.errors import ConfigError, PdiffError
from pdiff_ray.config.schema import SubsetRule
from pdiff_ray.evaluation.metrics import JudgedGroup
from pdiff_ray.evaluation.similarity import unpack_wrong
from pdiff_ray.evaluation.summary import by_title as groups_by_title
from pdiff_ray.networks.subset import Subset, resolve
from pdiff_ray.running.results import Result
from pdiff_ray.stages import exports
from pdiff_ray.stages.base import NETWORK_FILE, open_dataset
from pdiff_ray.stages.checkpoints import import_zoo
from pdiff_ray.stages.checks import checked_subset
from pdiff_ray.stages.evaluation import SUMMARY_FILE
from pdiff_ray.stages.report import load_summary
from pdiff_ray.stages.stored import Networks
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.files import Storage
from pdiff_ray.storage.parameters import ParameterStore


class Small(nn.Module):
    """A network of two linear layers around a layer of its own."""

    def __init__(self, image_size, num_classes, middle, width=16, **_):
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(image_size**2, width), middle, nn.Linear(width, num_classes)

    def forward(self, images):
        return self.head(self.middle(self.first(images.flatten(1))).relu())


class Layer(nn.Module):
    """A layer that is a function of its input and itself."""

    def __init__(self, function, **tensors):
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    def forward(self, x):
        return self.function(self, x)


class AlwaysTraining(nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(True)


def masked(persistent):
    layer = Layer(lambda self, x: x * self.mask)
    layer.register_buffer("mask", (torch.rand(16) < 0.5).float(), persistent=persistent)
    return layer


def sharing_memory():
    layer = Layer(lambda self, x: x * self.a + self.b, a=nn.Parameter(torch.ones(16)), b=nn.Parameter(torch.ones(16)))
    layer.b.data = layer.a.data
    return layer


def shared():
    twice = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.BatchNorm1d(16))
    return nn.Sequential(twice, nn.ReLU(), twice)


def tied():
    layer = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    layer[2].weight = layer[0].weight
    return layer


def parameter(dtype):
    return Layer(lambda self, x: x * self.scale.to(torch.float32), scale=nn.Parameter(torch.rand(16).to(dtype) + 1))


def rotation(dtype=torch.complex64):
    def rotate(self, x):
        return torch.view_as_real(torch.complex(x[:, ::2], x[:, 1::2]).to(dtype) * self.turn).flatten(1).float()

    return Layer(rotate, turn=nn.Parameter(torch.randn(8, dtype=dtype)))


def magnified(self, x):
    """Doubles small differences 20 times, as a hundred layers may."""
    x = x.sigmoid()
    for _ in range(20):
        x = 4 * x * (1 - x)
    return x


def permuted():
    order = nn.Parameter(torch.randperm(16), requires_grad=False)
    return Layer(lambda self, x: x[:, self.order], order=order)


def mixed():
    return nn.Sequential(shared(), tied(), rotation(), parameter(torch.float64), permuted(), masked(persistent=True))


MIDDLES = {
    "batch statistics": lambda: nn.BatchNorm1d(16, track_running_stats=False),
    "training mode": lambda: AlwaysTraining(16),
    "centred": lambda: Layer(lambda self, x: x - x.mean(0)),
    "faintly centred": lambda: Layer(lambda self, x: x - 0.03 * x.mean(0)),
    "attending": lambda: Layer(lambda self, x: (x @ x.T).softmax(1) @ x),
    "summed": lambda: Layer(lambda self, x: x.cumsum(0)),
    "squeezed": lambda: Layer(lambda self, x: x.squeeze()),
    "dropout": lambda: Layer(lambda self, x: functional.dropout(x, 0.1)),
    "noise": lambda: Layer(lambda self, x: x + torch.randn_like(x)),
    "mask": lambda: masked(persistent=False),
    "attribute": lambda: Layer(lambda self, x: x * self.mask, mask=torch.rand(16)),
    "number": lambda: Layer(lambda self, x: x * self.scale, scale=torch.rand(()).item()),
    "sharing memory": sharing_memory,
    "complex128": lambda: rotation(torch.complex128),
    "plain": nn.Identity,
    "running": lambda: Centred(),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(16, 16)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(16, 16)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(16, 16)),
    "tokens": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 4)), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten()
    ),
    "sequence": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 4)), Layer(lambda self, x: self.gru(x)[0].flatten(1), gru=nn.GRU(4, 4, batch_first=True))
    ),
    "magnifying": lambda: Layer(magnified),
    "mixed": mixed,
    "norms": lambda: nn.Sequential(nn.BatchNorm1d(16), nn.Dropout(), nn.LayerNorm(16)),
    "persistent": lambda: masked(persistent=True),
    "constant": lambda: Layer(lambda self, x: x * self.mask, mask=torch.arange(16.0)),
    "shared": shared,
    "tied": tied,
    "complex": rotation,
    "float64": lambda: parameter(torch.float64),
    "float16": lambda: parameter(torch.float16),
    "bfloat16": lambda: parameter(torch.bfloat16),
    "integers": permuted,
}


def small(middle, **info):
    return Small(middle=MIDDLES[middle](), **info)


def experiment(storage, middle, *overrides):
    network = ("network.name=test_checks:small", f"network.args={{middle: {middle}}}")
    subset = ("zoo.subset=all", "zoo.members=4", "generator={name: gaussian}")
    return tiny(storage, *network, *subset, *overrides)


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        ("batch statistics", "cannot take one image alone"),
        ("training mode", r"\(middle\)"),
        ("centred", "among other images"),
        ("faintly centred", "among other images"),
        ("attending", "among other images"),
        ("summed", "among other images"),
        ("squeezed", "among other images"),
        ("dropout", "second pass"),
        ("noise", "second pass"),
        ("mask", r"built anew.*\(middle.mask\)"),
        ("attribute", r"built anew.*\(middle.mask\)"),
        ("number", "built anew"),
        ("sharing memory", "one Parameter"),
        ("complex128", "complex128"),
    ],
)
def test_refused_before_training(tmp_path, middle, message):
    with pytest.raises(ConfigError, match=message):
        checked_subset(experiment(tmp_path, middle)[0])


@pytest.mark.parametrize(
    "middle",
    [
        "plain",
        "magnifying",
        "weight norm",
        "spectral norm",
        "old spectral norm",
        "tokens",
        "sequence",
        "norms",
        "persistent",
        "constant",
        "shared",
        "tied",
        "complex",
        "float64",
        "float16",
        "bfloat16",
        "integers",
    ],
)
def test_accepted(tmp_path, middle):
    assert checked_subset(experiment(tmp_path, middle)[0]).size


def test_networks_that_share_no_initialisation_share_no_random_tensors(tmp_path):
    independent = ("zoo.regime=independent", "zoo.batchnorm=included")
    for middle, name in {"persistent": "mask", "running": "centre"}.items():
        with pytest.raises(ConfigError, match=rf"seed or its training decides \(middle.{name}\)"):
            checked_subset(experiment(tmp_path, middle, *independent)[0])
        assert checked_subset(experiment(tmp_path, middle)[0]).size
    assert checked_subset(experiment(tmp_path, "norms", *independent)[0]).size


@pytest.mark.parametrize("middle", ["shared", "tied"])
def test_a_tied_tensor_is_in_the_vector_once_under_any_of_its_names(middle):
    network = small(middle, image_size=8, num_classes=10)
    first, second = {
        "shared": ("middle.0.0.weight", "middle.2.0.weight"),
        "tied": ("middle.0.weight", "middle.2.weight"),
    }[middle]
    for names in ([first], [second], [first, second]):
        (entry,) = resolve(SubsetRule(names=tuple(names)), network).entries
        assert (entry.name, entry.also) == (first, (second,))
    subset = resolve(SubsetRule(all=True), network)
    assert subset.size == sum(p.numel() for p in network.parameters())
    assert Subset.from_json(subset.to_json()) == subset
    state = network.state_dict()
    del state[first]  # as files have it that keep one name of each tensor
    vector = subset.flatten(state)
    assert torch.equal(vector, subset.flatten(network.state_dict()))
    assert set(subset.under_all_names(subset.unflatten(vector))) == {
        name for name, _ in network.named_parameters(remove_duplicate=False)
    }


@pytest.mark.parametrize(
    ("middle", "dtype"), [("complex", torch.complex64), ("float64", torch.float64), ("bfloat16", torch.bfloat16)]
)
def test_types_come_back(middle, dtype):
    network = small(middle, image_size=8, num_classes=10)
    subset = Subset.from_json(resolve(SubsetRule(all=True), network).to_json())
    vectors = torch.stack([subset.flatten(network.state_dict())] * 2)
    assert vectors.dtype == torch.float32
    assert vectors.shape[1] == subset.size
    for name, parameter in network.named_parameters():
        found = subset.unflatten(vectors)[name]
        assert found.dtype == parameter.dtype
        assert torch.allclose(found, parameter.expand_as(found), atol=1e-7)


def test_integers_are_left_out_or_refused():
    network = small("integers", image_size=8, num_classes=10)
    assert "middle.order" not in resolve(SubsetRule(all=True), network).names
    with pytest.raises(ConfigError, match=r"'middle.order' holds torch.int64"):
        resolve(SubsetRule(names=("middle.*",)), network)


class Centred(nn.Module):
    """Subtracts a running mean, which is in the state dict, but in no vector."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(16))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.centre.lerp_(x.mean(0), 0.5)
        return x - self.centre


def test_independent_members_are_judged_as_what_is_kept_of_them(tmp_path):
    independent = ("zoo.regime=independent", "zoo.batchnorm=included", "zoo.members=2")
    config, artifacts = experiment(tmp_path, "running", *independent)
    build(config, artifacts, "base", "zoo")
    zoo, dataset = Networks(artifacts["zoo"]), open_dataset(config, context())
    reported = zoo.table()["test_accuracy"].to_pylist()
    found = [accuracy_of(file, dataset, "running") for file in zoo.export(tmp_path / "files")]
    assert found == pytest.approx(reported, abs=1e-9)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A finished experiment whose network has all that is accepted."""
    small_ones = ("zoo.members=3", "sampling.samples=2", "evaluation.fine_tuned_networks=0", "zoo.batchnorm=included")
    found = experiment(tmp_path_factory.mktemp("storage"), "mixed", *small_ones)
    build(*found)
    return found


def accuracy_of(file, dataset, middle="mixed"):
    """The accuracy on test images of a file's network, in the plain way."""
    network = small(middle, image_size=8, num_classes=10)
    network.load_state_dict(load_file(file), strict=True)
    images, labels = next(dataset.test.in_order(len(dataset.test)))
    with torch.no_grad():
        predicted = network.eval()(dataset.prepare(images, torch.device("cpu"))).argmax(1)
    return (predicted == labels).double().mean().item()


@pytest.mark.parametrize(("stage", "group"), [("zoo", "original"), ("samples", "generated")])
def test_exported_files_are_the_networks_that_were_judged(judged, tmp_path, stage, group, capsys):
    config, artifacts = judged
    networks, dataset = Networks(artifacts[stage]), open_dataset(config, context())
    files = list(networks.export(tmp_path))
    rows = [row for row in ParameterStore(artifacts["evaluation"]).records() if row.group == group]
    assert [file.stem for file in files] == [f"{group}-{row.number:04d}" for row in rows]
    for file, row in zip(files, rows, strict=True):
        assert accuracy_of(file, dataset) == pytest.approx(row.test_accuracy, abs=1e-9)
    parts = [load_file(file) for file in networks.export(tmp_path / "parts", subset_only=True)]
    assert parts[0].keys() == {name for entry in networks.subset.entries for name in entry.names}
    assert "note" not in capsys.readouterr().out


@pytest.mark.slow
def test_an_exported_network_is_as_reported_in_a_plain_process(tmp_path):
    """By the example in the documentation, which has nothing of the package."""
    page = (Path(__file__).parents[1] / "docs/storage.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "timm" in block]
    network = ("network.name=test_resnet", "network.source=timm", "network.args={}")
    config, artifacts = tiny(tmp_path, *network, "training.epochs=3", "zoo.members=3", "evaluation.baseline_networks=0")
    build(config, artifacts)
    *_, file = Networks(artifacts["samples"]).export(tmp_path / "files")
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = next(r for r in ParameterStore(artifacts["evaluation"]).records() if r.group == "generated" and r.parent == 5)
    wrong = unpack_wrong([row.wrong], 897)[0].nonzero()[0].tolist()
    assert done.stdout.strip() == f"accuracy {row.test_accuracy:.6f}, wrong {wrong}"
    assert 100 < len(wrong) < 800


def test_tied_tensors_are_imported(judged, tmp_path):
    files = list(Networks(judged[1]["zoo"]).export(tmp_path / "files"))
    change = ("zoo.imported=own", "zoo.members=3", "zoo.batchnorm=included")
    config, artifacts = experiment(tmp_path / "storage", "mixed", *change)
    import_zoo(tmp_path / "files", config, artifacts)
    found, expected = Networks(artifacts["zoo"]), Networks(judged[1]["zoo"])
    assert torch.equal(found.vectors(), expected.vectors())
    assert found.subset == expected.subset
    assert len(list(found.export(tmp_path / "again"))) == 3
    tensors = load_file(files[1])
    save_file({**tensors, "middle.1.2.weight": tensors["middle.1.2.weight"] + 1}, files[1])
    with pytest.raises(PdiffError, match=r"0001.*middle.1.0.weight and middle.1.2.weight differ"):
        import_zoo(tmp_path / "files", *experiment(tmp_path / "other", "mixed", *change))


def test_a_network_that_has_changed_since_is_not_exported(judged, tmp_path, monkeypatch):
    monkeypatch.setitem(MIDDLES, "mixed", lambda: nn.Sequential(*mixed(), Layer(lambda self, x: -x)))
    with pytest.raises(PdiffError, match=r"original-0000.safetensors: network 0 .* test images") as caught:
        list(Networks(judged[1]["zoo"]).export(tmp_path / "out"))
    assert "changed since" in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_what_only_the_building_decides_is_not_exported(tmp_path):
    """As in a storage of an earlier version, which did not check networks."""
    config, artifacts = experiment(tmp_path, "mask", "zoo.members=2")
    build(config, artifacts, "base", "zoo")
    for only in (True, False):
        with pytest.raises(PdiffError, match="built anew"):
            list(Networks(artifacts["zoo"]).export(tmp_path / "out", subset_only=only))
    assert not list((tmp_path / "out").iterdir())


def test_what_is_not_compared_is_said(judged, tmp_path, capsys, monkeypatch):
    config, artifacts = experiment(tmp_path, "plain", "zoo.members=2")
    build(config, artifacts, "base", "zoo")
    manifest = tmp_path / artifacts["base"].folder / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["files"]["images.safetensors"], content["sha256"]  # as earlier versions had it
    manifest.write_text(json.dumps(content))
    networks = Networks.find(Storage(str(tmp_path)), artifacts["zoo"].folder)
    assert len(list(networks.export(tmp_path / "out"))) == 2
    assert "an earlier version kept no images" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(exports, "_is_installed", lambda name: True)
    assert len(list(networks.export(tmp_path / "out"))) == 2
    assert "not tried" in capsys.readouterr().out


def test_code_of_packages_is_not_run_for_a_storage(judged, tmp_path):
    base = judged[1]["base"]
    for field, name in {"name": "torch.hub:load", "source": "os:getcwd"}.items():
        config = {**base.config, "network": {**base.config["network"], field: name}}
        other = Artifact(Storage(str(tmp_path / field)), "base", config, {})
        other.commit({NETWORK_FILE: base.read(NETWORK_FILE)}, base.manifest().info, 0.0)
        with pytest.raises(ConfigError, match="must not choose"):
            exports.Trial(other, Networks(judged[1]["zoo"]).subset)
    assert exports._is_installed("torch.hub:load")
    assert exports._is_installed("os:system")
    assert exports._is_installed("nowhere:nothing")
    assert not exports._is_installed(f"{__name__}:small")


def test_one_number_per_network(judged):
    artifacts = judged[1]
    records = ParameterStore(artifacts["evaluation"]).records()
    best = {group["group"]: group["best_id"] for group in load_summary(artifacts)["groups"]}
    for line, name in (("original", "original"), ("generated", "generated")):
        group = [record for record in records if record.group == name]
        chosen = JudgedGroup(group, (), 1, 1).best
        assert best.pop(line) == chosen.number == group.index(chosen)
    assert set(best.values()) == {None}, "baselines are not kept"
    networks = Result("mixed", artifacts).networks().to_pylist()
    assert [row["id"] for row in networks if row["group"] == "generated"] == [0, 1]


def test_numbers_of_earlier_versions_are_translated(judged, tmp_path):
    artifacts = judged[1]
    store, summary = ParameterStore(artifacts["evaluation"]), load_summary(artifacts)
    now = [group["best_id"] for group in summary["groups"]]
    by_title, old = groups_by_title(store.records()), Artifact(Storage(str(tmp_path)), "evaluation", {}, {})
    for group in summary["groups"]:
        records = by_title[group["group"]]
        group["best_id"] = JudgedGroup(records, (), 1, 1).best.id
    assert [group["best_id"] for group in summary["groups"]] != now
    ParameterStore(old).append(store.records(), store.subset())
    parts = ParameterStore(old).manifest_entries(store.ids)
    old.commit({SUMMARY_FILE: json.dumps(summary).encode()}, {}, 0.0, parts)
    assert [group["best_id"] for group in load_summary({"evaluation": old})["groups"]] == now
