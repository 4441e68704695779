"""Checkpoints as other code leaves them: which files are taken, where in them the weights are, and what is refused."""

import argparse
import contextlib
import io
import pickle
import zipfile
from dataclasses import dataclass

import pytest
import torch
from helpers import tiny
from torch import nn

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.stages import checkpoints
from pdiff_ray.stages.base import load_network, untrained_network
from pdiff_ray.stages.checkpoints import Options, import_zoo
from pdiff_ray.storage import matching, weights
from pdiff_ray.storage.parameters import ParameterStore

NETWORK = untrained_network(tiny("unused")[0])


def state(index, **more):
    """A network whose subset is member `index`'s, all else alike."""
    tensors = {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in NETWORK.state_dict().items()
    }
    generator = torch.Generator().manual_seed(index)
    for name in ("layers.1.bn.weight", "layers.1.bn.bias"):
        tensors[name] += torch.randn(tensors[name].shape, generator=generator)
    return {**tensors, **more}


def prefixed(prefix, tensors):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


@pytest.fixture
def bring(files, tmp_path):
    """Imports files; gives the report, and which members are in the zoo, by `state`'s index."""

    def bring(contents, members, *overrides, **options):
        folder = files(contents)
        experiment, artifacts = tiny(
            tmp_path / "s", f"zoo.members={members}", "zoo.imported=x", "zoo.branches=2", "zoo.regime=trajectory",
            *overrides
        )  # fmt: skip
        report = import_zoo(folder, experiment, artifacts, Options(**options))
        store = ParameterStore(artifacts["zoo"])
        known = {store.subset().flatten(state(i)).numpy().tobytes(): i for i in range(20)}
        assert (
            untrained_network(experiment).state_dict().keys() == load_network(experiment, artifacts).state_dict().keys()
        )
        return report, [known[store.vectors([i])[0].tobytes()] for i in range(members)], artifacts

    return bring


@pytest.fixture
def refused(bring):
    """Imports files that are refused; gives the message. Nothing is stored."""

    def refused(contents, members=2, *overrides, **options):
        with pytest.raises(ConfigError) as caught:
            bring(contents, members, *overrides, **options)
        return str(caught.value)

    return refused


def test_files_beside_the_epochs_are_no_members(bring):
    epochs = {f"epoch_{i}.pth": state(i) for i in (10, 2, 1)}
    beside = {"best.pth": state(7), "last.pth": state(10), "latest": b"epoch_10.pth", "._epoch_1.pth": b"\0\5\26\7"}
    beside |= {".hidden/epoch_3.pth": state(3), "__MACOSX/epoch_3.pth": b"", "optimizer.pt": {"state": {}}}
    report, members, artifacts = bring({**epochs, **beside}, 3)
    assert members == [1, 2, 10]
    assert report.base == "epoch_1.pth, the first member"
    assert set(report.left_out) == {"best.pth", "last.pth", "optimizer.pt"}
    text = str(report)
    assert "members: 3, in the order of their names: epoch_1.pth, epoch_2.pth, epoch_10.pth" in text
    assert "left out: best.pth, last.pth: named in another way than epoch_#; --pattern takes it" in text
    assert artifacts["zoo"].manifest().info["left_out"] == report.left_out


def test_equal_files_are_one_member(bring, refused):
    contents = {f"{name}.pt": state(i) for name, i in {"a": 1, "b": 2, "best": 2, "last": 3}.items()}
    report, members, _ = bring(contents, 3)
    assert members == [1, 2, 3]
    assert report.left_out == {"best.pt": "equal to b.pt in zoo.subset"}
    assert "best.pt: equal to b.pt" in refused(contents, 4)


def test_two_series_are_asked_about(bring, refused):
    series = {f"{name}_{i}.pt": state(i + shift) for name, shift in {"ema": 5, "net": 0}.items() for i in (1, 2)}
    assert "ema_# (2 files), net_# (2 files); choose with --pattern, for example --pattern 'ema_*'" in refused(series)
    assert bring(series, 2, pattern="net_*")[1] == [1, 2]


@pytest.mark.parametrize(("pattern", "expected"), [("*", [6, 7, 1, 2]), ("ema/*", [6, 7]), ("*_1.weights", [6, 1])])
def test_a_pattern_takes_what_it_says(bring, pattern, expected):
    series = {f"{name}/n_{i}.weights": state(i + shift) for name, shift in {"ema": 5, "net": 0}.items() for i in (1, 2)}
    contents = {name: _saved(content) for name, content in series.items()}
    assert bring(contents, len(expected), pattern=pattern)[1] == expected


def _saved(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def test_the_order_may_be_that_of_a_number_in_the_files(bring, refused):
    contents = {f"{name}.ckpt": {"epoch": i, "state_dict": state(i)} for name, i in {"a": 3, "b": 1, "c": 2}.items()}
    report, members, _ = bring(contents, 3, order="epoch")
    assert members == [1, 2, 3]
    assert report.base.startswith("b.ckpt")
    assert "no number 'steps' (--order); it has epoch" in refused(contents, order="steps")


def test_numbers_of_the_files_are_kept_beside(bring):
    beside = {
        "global_step": 40,
        "best_acc1": 91.5,
        "note": "x",
        "done": True,
        "meta": {"epoch": 7},
        "bad": float("nan"),
    }
    _, _, artifacts = bring({f"{i}.pt": {**beside, "model": state(i)} for i in (1, 2)}, 2)
    records = ParameterStore(artifacts["zoo"]).records()
    assert [record.step for record in records] == [40, 40]
    assert [record.test_accuracy for record in records] == [None, None]  # nothing here has measured it
    kept = {"global_step": 40, "best_acc1": 91.5, "meta.epoch": 7}
    assert artifacts["zoo"].manifest().info["files"] == [{"file": f"{i}.pt", **kept} for i in (1, 2)]


class Config:
    """A class of the code that made a checkpoint."""

    def __init__(self):
        self.lr = 0.1


@dataclass
class Touch:
    """What a pickle would write when it is run."""

    file: str

    def __reduce__(self):
        return open, (self.file, "w")


def _lightning(tensors):
    return {"epoch": 1, "state_dict": prefixed("model.", tensors), "hyper_parameters": Config(), "callbacks": {},
            "optimizer_states": [torch.optim.Adam(nn.Linear(2, 2).parameters()).state_dict()],
            "args": argparse.Namespace(lr=0.1)}  # fmt: skip


WRAPPED = {
    "plain": (lambda s: s, "named as the network's"),
    "compiled": (lambda s: prefixed("_orig_mod.", s), "without '_orig_mod' in the names"),
    "compiled, then parallel": (lambda s: prefixed("module._orig_mod.", s), "without the prefix 'module.'"),
    "parallel, then compiled": (lambda s: prefixed("_orig_mod.module.", s), "without the prefix 'module.'"),
    "a compiled part": (
        lambda s: {n.replace("layers.1", "layers.1._orig_mod"): t for n, t in s.items()},
        "without '_orig_mod' in the names",
    ),
    "lightning": (_lightning, "under 'state_dict', without the prefix 'model.'"),
    "averaged": (lambda s: {"n_averaged": torch.tensor(3), **prefixed("module.", s)}, "without the prefix 'module.'"),
    "nested": (lambda s: {"trainer": {"nets": {"student": s}}}, "under 'trainer.nets.student'"),
    **{key: (lambda s, key=key: {key: s, "epoch": 3}, f"under {key!r}") for key in ("net", "params", "model_ema")},
    "parameters": (lambda s: {n: nn.Parameter(t) if t.is_floating_point() else t for n, t in s.items()}, "named"),
    "of double precision": (lambda s: {n: t.double() if t.is_floating_point() else t for n, t in s.items()}, "named"),
}


@pytest.mark.parametrize("suffix", ["pth", "PTH", "ckpt", "bin", "pth.tar", "Pt"])
@pytest.mark.parametrize(("wrap", "found"), list(WRAPPED.values())[:1])
def test_suffixes(bring, suffix, wrap, found):
    assert bring({f"e{i}.{suffix}": wrap(state(i)) for i in (1, 2)}, 2)[1] == [1, 2]


@pytest.mark.parametrize(("wrap", "found"), WRAPPED.values(), ids=WRAPPED)
def test_weights_are_found_wherever_they_are(bring, wrap, found):
    report, members, _ = bring({f"e{i}.pt": wrap(state(i)) for i in (1, 2)}, 2)
    assert members == [1, 2]
    assert found in str(report)


def test_nothing_of_what_a_pickle_names_is_run(bring, tmp_path):
    """Objects beside the weights are passed over; not even their class is imported."""
    contents = {f"e{i}.pt": {"state_dict": state(i), "x": Touch(str(tmp_path / "was-run"))} for i in (1, 2)}
    assert bring(contents, 2)[1] == [1, 2]
    assert not (tmp_path / "was-run").exists()


def test_folders_and_parts(bring):
    """Of Hugging Face's: a folder for each network, whole or in parts with an index."""
    contents = {}
    for i in (10, 9):
        first, second = {}, {}
        for position, (name, tensor) in enumerate(state(i).items()):
            (second if position % 2 else first)[name] = tensor
        parts = {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second}
        places = {name: part for part, tensors in parts.items() for name in tensors}
        contents |= {f"checkpoint-{i}/{part}": tensors for part, tensors in parts.items()}
        contents |= {f"checkpoint-{i}/model.safetensors.index.json": {"weight_map": places}}
        contents |= {f"checkpoint-{i}/optimizer.bin": {}, f"checkpoint-{i}/training_args.bin": Config()}
    contents["checkpoint-3/pytorch_model.bin"] = state(3)
    report, members, _ = bring(contents, 2)
    assert members == [9, 10]
    assert report.members[0] == "checkpoint-9/model.safetensors.index.json"
    assert bring({"model-00001-of-00002.bin": b""}, 2, "zoo.imported=y", pattern="*index.json")[1] == [9, 10]


def test_parts_that_are_missing(refused):
    index = {"weight_map": {"fc.weight": "model-00001-of-00002.safetensors"}}
    assert "index of the parts" in refused({"a/model-00001-of-00002.safetensors": {"x": torch.ones(1)}})
    assert "names model-00001-of-00002.safetensors, which is not" in refused({"b/m.index.json": index}, pattern="b/*")
    for place in ("é" * 130, "../x.bin", "/x.bin", 3, None):
        assert "is no name of a file" in refused({"c/m.index.json": {"weight_map": {"a": place}}}, pattern="c/*")
    assert "index" in refused({"c/m.index.json": b"[" * 100_000}, pattern="c/*")


def test_two_sets_of_weights_are_asked_about(bring, refused):
    contents = {f"e{i}.pt": {"state_dict": state(i), "state_dict_ema": state(i + 5)} for i in (1, 2)}
    text = refused(contents)
    assert "2 times: state_dict, state_dict_ema; choose with --weights" in text
    assert bring(contents, 2, weights="state_dict_ema")[1] == [6, 7]
    assert "no tensors under 'emma' (--weights); it does under state_dict, state_dict_ema" in refused(
        contents, weights="emma"
    )


def test_two_prefixes_are_asked_about(bring, refused):
    both = {f"e{i}.pt": {**prefixed("model.", state(i)), **prefixed("ema.", state(i + 5))} for i in (1, 2)}
    assert "2 times: model., ema.; choose with --prefix" in refused(both)
    report, members, _ = bring(both, 2, prefix="ema")
    assert members == [6, 7]
    assert "ignored: what the network has not: model.layers.0.conv.weight" in str(report)


def test_the_same_mapping_under_two_keys_is_one(bring):
    for_each = {i: state(i) for i in (1, 2)}
    assert bring({f"e{i}.pt": {"model": s, "state_dict": s} for i, s in for_each.items()}, 2)[1] == [1, 2]


def test_what_the_network_has_not_is_told(bring):
    more = {"loss_fn.weight": torch.ones(3), "total_ops": torch.zeros(1)}
    report, _, _ = bring({f"e{i}.pt": state(i, **more) for i in (1, 2)}, 2)
    assert "ignored: what the network has not: loss_fn.weight, total_ops, in 2 of them" in str(report)
    fewer = {f"f{i}.pt": {n: t for n, t in state(i).items() if "num_batches" not in n} for i in (1, 2)}
    assert bring(fewer, 2, "zoo.imported=y", pattern="f*")[1] == [1, 2]


def test_subsets_beside_a_base(bring, refused, files, tmp_path):
    torch.save({"net": prefixed("module.", state(0))}, tmp_path / "whole.pth")
    parts = {f"e{i}.pt": {n: t for n, t in state(i).items() if "layers.1.bn" in n} for i in (1, 2)}
    assert "e1.pt: lacks layers.0.conv.weight" in (text := refused(parts))
    assert "--base" in text
    report, members, _ = bring(parts, 2, base=tmp_path / "whole.pth")
    assert members == [1, 2]
    assert "whole.pth (--base)" in report.base


REFUSED = {
    "another number of classes": (
        lambda s: {**s, "fc.weight": torch.ones(100, 8)},
        ["fc.weight has shape (100, 8), the network's has (10, 8)", "network.args"],
    ),
    "a missing tensor": (
        lambda s: {n: t for n, t in s.items() if n != "fc.bias"},
        ["lacks fc.bias", "--base"],
    ),
    "a missing tensor of the subset": (
        lambda s: {n: t for n, t in s.items() if n != "layers.1.bn.bias"},
        ["lacks layers.1.bn.bias; did you mean 'layers.0.bn.bias'", "7 of the network's 8 parameters"],
    ),
    "missing statistics": (
        lambda s: {n: t for n, t in s.items() if "running_var" not in n},
        ["lacks layers.0.bn.running_var"],
    ),
    "another network": (
        lambda s: {"conv9.weight": torch.ones(2)},
        ["none of the network's parameters", "conv9.weight"],
    ),
    "quantized": (lambda s: {**s, "fc.weight": s["fc.weight"].char()}, ["fc.weight is torch.int8", "quantized"]),
    "not finite": (lambda s: {**s, "fc.weight": s["fc.weight"] * float("nan")}, ["fc.weight holds", "not finite"]),
    "a whole module": (lambda s: NETWORK, ["an object of pdiff_ray.networks.paper.ConvNet", "state_dict()"]),
    "a module under a key": (lambda s: {"net": NETWORK}, ["ConvNet under 'net'", "state_dict()"]),
    "an object in place of a tensor": (lambda s: {**s, "fc.bias": Touch("x")}, ["lacks fc.bias"]),
    "no tensors": (lambda s: {"epoch": 3}, ["no tensors by name"]),
    "nothing": (lambda s: b"", ["is empty"]),
    "a pointer of Git LFS": (lambda s: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["git lfs pull"]),
    "a pickle": (lambda s: pickle.dumps({"fc.weight": Touch("x")}), ["could run code", "weights_only=True"]),
    "text": (lambda s: b"epoch 1\n" * 20, ["neither of torch.save nor safetensors", "state_dict()"]),
    "a cut file": (lambda s: _saved(s)[:-600], ["cannot be read as a checkpoint"]),
}


@pytest.mark.parametrize(("change", "expected"), REFUSED.values(), ids=REFUSED)
def test_refused(refused, change, expected):
    text = refused({f"e{i}.pt": change(state(i)) for i in (1, 2)})
    assert "e1.pt" in text
    assert [part for part in expected if part not in text] == []
    assert "weights_only=False" not in text


def test_a_program_beside_its_weights_is_refused(refused, tmp_path):
    stream = io.BytesIO()
    with pytest.warns(FutureWarning):
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), stream)
    text = refused({"e1.pt": stream.getvalue(), "e2.pt": b""})
    assert "TorchScript" in text
    assert "state_dict()" in text
    assert "weights_only=False" not in text


def _archive(data, compression=zipfile.ZIP_STORED, **entries):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in {"data.pkl": data, "version": b"3", **entries}.items():
            archive.writestr(f"archive/{name}", content)
    return stream.getvalue()


def test_archives_that_say_more_than_they_hold(files, monkeypatch):
    """All that is described is compared with what is there, before anything of that size is made."""
    whole = _saved({"a": torch.arange(6.0)})
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        program = archive.read("archive/data.pkl")
    assert program.count(b"K\x06") == 2  # BININT1 6: of the storage, and of the shape
    longer = program.replace(b"K\x06", b"K\x07")
    folder = files(
        {
            "longer.pt": _archive(longer, **{"data/0": bytes(24)}),
            "absent.pt": _archive(program),
            "packed.pt": _archive(program, zipfile.ZIP_DEFLATED, **{"data/0": bytes(24)}),
            "endless.pt": _archive(program[:-1], **{"data/0": bytes(24)}),
            "whole.pt": _archive(program, **{"data/0": bytes(24)}),
        }
    )
    for name, expected in {
        "longer": "reaches beyond its 24 bytes",
        "absent": "no entry '0' in data/",
        "packed": "compressed",
        "endless": "no end|damaged|pickle exhausted",
    }.items():
        with pytest.raises(ConfigError, match=expected):
            weights.read(folder / f"{name}.pt")
    assert weights.read(folder / "whole.pt")["a"].shape == (6,)
    monkeypatch.setattr(weights, "MAX_EXPANDED", 100)
    repeated = files({"repeated.pt": {"a": torch.zeros(1).expand(26)}, "bias.pt": {"a": torch.zeros(1).expand(25)}})
    assert weights.read(repeated / "bias.pt")["a"].shape == (25,)
    with pytest.raises(ConfigError, match="repeats its 4 bytes"):
        weights.read(repeated / "repeated.pt")
    monkeypatch.setattr(weights, "MAX_DESCRIPTION_BYTES", 100)
    with pytest.raises(ConfigError, match="on describing its tensors"):
        weights.read(folder / "whole.pt")
    monkeypatch.setattr(matching, "MAX_NAMES", 3)
    with pytest.raises(ConfigError, match="more than 3 tensors"):
        matching.match({str(i): weights.Weight(folder, "", torch.int8, ()) for i in range(4)}, ["1"])


def test_views_and_types_are_as_torch_loads_them(files):
    flat = torch.arange(24.0)
    tensors = {
        "view": flat[4:16].view(3, 4).t(),
        "repeated": flat[:3].expand(2, 3),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3),
        **{str(t): torch.ones(3).to(t) for t in weights.TORCH_DTYPES.values()},
    }
    for protocol in (2, 4):
        folder = files({})
        folder.mkdir(exist_ok=True)
        torch.save(tensors, folder / "a.pt", pickle_protocol=protocol)
        loaded = weights.load(weights.read(folder / "a.pt"))
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name], tensor), name


def test_any_bytes_give_a_checkpoint_or_a_message(files):
    """Flipped bytes of files of each kind; what is read then is as if it had been saved so."""
    generator = torch.Generator().manual_seed(0)
    stream = io.BytesIO()
    torch.save({"epoch": 3, "state_dict": state(0), "args": argparse.Namespace(a=1)}, stream)
    folder = files({"whole.safetensors": state(0), "whole.pt": stream.getvalue()})
    for name in ("whole.safetensors", "whole.pt"):
        content = (folder / name).read_bytes()
        described = [*range(min(3000, len(content))), *range(max(0, len(content) - 2500), len(content))]
        for _ in range(300):
            damaged = bytearray(content)
            position = described[int(torch.randint(len(described), (), generator=generator))]
            damaged[position] ^= 1 << int(torch.randint(8, (), generator=generator))
            (folder / "damaged").write_bytes(damaged)
            with contextlib.suppress(ConfigError):
                read = weights.read(folder / "damaged")
                weights.load(matching.match(read, [n for n, _ in NETWORK.named_parameters()]).named())


def test_a_base_that_another_folder_left_is_told_of(bring, refused, monkeypatch):
    def fails(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(checkpoints, "commit", fails)
        with pytest.raises(KeyboardInterrupt):
            bring({"a_1.pt": state(1), "a_2.pt": state(2)}, 2)
    others = {f"a_{i}.pt": state(i) | {"layers.0.conv.weight": NETWORK.layers[0].conv.weight + 1} for i in (1, 2)}
    message = refused(others)
    assert "the base of zoo.imported 'x' is there" in message
    assert "differs from a_1.pt, the first member; choose another label, or delete it" in message
    assert bring({"a_1.pt": state(1), "a_2.pt": state(2)}, 2)[1] == [1, 2]


def test_many_files_that_are_left_out_are_counted(bring, monkeypatch):
    monkeypatch.setattr(checkpoints, "MAX_LEFT_OUT", 1)
    report, _, artifacts = bring({f"a_{i}.pt": state(i) for i in range(5)}, 2)
    info = artifacts["zoo"].manifest().info
    assert (len(info["left_out"]), info["num_left_out"]) == (1, len(report.left_out)) == (1, 3)
