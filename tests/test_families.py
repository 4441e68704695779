"""One network of every module of timm and every family of torchvision, from the plan to exported files.

Each is right end to end, or refused before anything is trained; `docs/networks.md` has a row of each. To renew it:
`PDIFF_FAMILIES=FOLDER uv run pytest -m long tests/test_families.py`, then `uv run python docs/generate.py FOLDER`.
"""

import functools
import os
from pathlib import Path

import pytest
import timm
import torch
from helpers import EVALUATED, build_missing, context, pixels, write_parquet
from safetensors.torch import load_file
from torch.nn import functional
from torchvision import models

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config.schema import Experiment
from pdiff_ray.networks.build import build_network, load_tensors
from pdiff_ray.networks.partition import call_with
from pdiff_ray.networks.subset import norm_layers
from pdiff_ray.running.experiment import check_plan, make_plan
from pdiff_ray.stages.base import load_network, open_dataset, untrained_network
from pdiff_ray.stages.stored import Networks
from pdiff_ray.storage.parameters import ParameterStore

PAGE = Path(__file__).parents[1] / "docs/networks.md"
SMALL = 64  # pixels along an edge, tried before the size that the network is made for
CPU = torch.device("cpu")
# Networks of one gibibyte and more of parameters take too long here.
LARGEST = 250e6


def family_of(name):
    return models.get_model_builder(name).__module__.removeprefix("torchvision.models.")


FAMILIES = [("timm", family) for family in timm.list_modules()]
FAMILIES += [("torchvision", family) for family in sorted({family_of(name) for name in models.list_models()})]


@functools.cache
def smallest(source, family):
    """The name of the variant with the fewest parameters, and how many these are."""
    if source == "torchvision":
        sizes = {
            name: min(weights.meta["num_params"] for weights in models.get_model_weights(name))
            for name in models.list_models()
            if family_of(name) == family
        }
    else:
        sizes = {}
        for name in timm.list_models(module=family):
            with torch.device("meta"):
                sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    return min(sizes.items(), key=lambda item: item[::-1])


def experiment_of(name, source, size, folder, layers):
    return Experiment.model_validate(
        {
            "name": "family",
            "storage": str(folder),
            "data": {"name": "custom", "source": "parquet", "root": str(folder.parent / "images"), "image_size": size},
            "network": {"name": name, "source": source},
            "training": {"epochs": 1, "batch_size": 8},  # some start with logits that are all zero
            "zoo": {"members": 2, "subset": layers, "warmup_steps": 0, "steps_per_member": 1, "batch_size": 4},
            "generator": {"name": "gaussian"},
            "sampling": {"samples": 2},
            "evaluation": {"baseline_networks": 0, "fine_tuned_networks": 0, "networks_per_program": 2},
        }
    )


def build(name, source, folder):
    """Runs an experiment at the small size, or at the network's own; gives what it made, or why it was refused."""
    cfg = timm.get_pretrained_cfg(name) if source == "timm" else None
    for size in (SMALL, cfg.input_size[-1] if cfg else 224):
        layers = {"last_norm_layers": 2}
        while True:
            experiment = experiment_of(name, source, size, folder / f"storage-{size}", layers)
            plan = make_plan(experiment)
            try:
                check_plan(plan)
            except ConfigError as error:
                refused = str(error)
                if "no normalization layer" not in refused:
                    break
                last = list(untrained_network(experiment).named_parameters())[-1][0]
                layers = {"names": [last.rpartition(".")[0] + ".*"]}
                continue
            return run(plan)
    assert refused.startswith("network")
    return refused


def run(plan):
    one = context()  # which keeps the judge, with the network in two parts
    for stage in EVALUATED:
        build_missing(stage, plan.experiment, plan.artifacts, one)
    return plan.experiment, plan.artifacts, one


@torch.no_grad()
def check_order(network, images):
    """Layers stand in the order in which hooks see them."""
    found, seen = list(norm_layers(network, images)), []
    for name in norm_layers(network):
        hook = lambda module, inputs, name=name: seen.append(name)  # noqa: E731
        network.get_submodule(name).register_forward_pre_hook(hook)
    network(images)
    assert list(dict.fromkeys(seen)) == [name for name in found if name in seen]
    assert set(seen) <= set(found)


@torch.no_grad()
def check(experiment, artifacts, one, folder):
    """Compares what shares, stacks and exports networks with plain passes; gives the result in words."""
    store, samples = ParameterStore(artifacts["zoo"]), ParameterStore(artifacts["samples"])
    subset, vectors, members = store.subset(), torch.from_numpy(samples.vectors()), torch.from_numpy(store.vectors())
    (judge,) = one.judges.values()
    split, network, dataset = judge.partitioned, judge.network.eval(), open_dataset(experiment, one)
    assert not torch.equal(*members), "a training step changes nothing"
    images, labels = next(dataset.test.in_order(len(dataset.test)))
    images, base = dataset.prepare(images, CPU), load_network(experiment, artifacts)
    assert torch.equal(network(images), base(images)), "splitting or training changes the network"

    generated = [r for r in ParameterStore(artifacts["evaluation"]).records() if r.group == "generated"]
    exact, expected = True, []
    for vector, record in zip(vectors, generated, strict=True):  # which were judged as one program where that works
        tensors = subset.unflatten(vector)
        load_tensors(base, subset.under_all_names(tensors), strict=False)
        expected.append(base(images))
        exact = exact and torch.equal(split(images, tensors), expected[-1])
        close(split(images, tensors), expected[-1])
        assert record.test_loss == pytest.approx(functional.cross_entropy(expected[-1], labels).item(), rel=1e-3)

    own = {name: tensor.requires_grad_() for name, tensor in subset.unflatten(members[0].clone()).items()}
    with torch.enable_grad():
        ours = torch.autograd.grad(split(images, own).square().sum(), list(own.values()))
        theirs = torch.autograd.grad(call_with(network, own, images).square().sum(), list(own.values()))
    for gradient, wanted in zip(ours, theirs, strict=True):
        close(gradient, wanted, 1e-3)

    (file,) = Networks(artifacts["samples"]).export(folder, [0])
    fresh = build_network(experiment.network, dataset.info, "fresh").eval()
    load_tensors(fresh, load_file(file))
    close(fresh(images), expected[0])

    check_order(network, images)
    if split.reason:
        return f"runs whole: {split.reason}"
    stacked = "" if judge.capacity.networks == 2 else "; not stacked"
    return f"{split.shared:.1%} shared, {'equal bits' if exact else 'equal but for rounding'}{stacked}"


def close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()) + 1e-9)


def write_images(folder):
    write_parquet(folder / "images/train.parquet", pixels(20), torch.arange(20).numpy() % 4)
    write_parquet(folder / "images/test.parquet", pixels(8, seed=1), torch.arange(8).numpy() % 4)


@pytest.mark.parametrize("name", ["convnet_mini", "mlp_mini", "resnet_mini", "vit_mini", "convnext_mini"])
def test_small_networks_of_the_paper_are_generated_whole(name, tmp_path):
    write_images(tmp_path)
    plan = make_plan(experiment_of(name, "paper", 32, tmp_path / "storage", "all"))
    assert check_plan(plan) == sum(p.numel() for p in untrained_network(plan.experiment).parameters())
    result = check(*run(plan), tmp_path / "exported")
    assert result.startswith("0.0% shared, equal")
    assert "not stacked" not in result


@pytest.mark.long
@pytest.mark.parametrize(("source", "family"), FAMILIES, ids=["-".join(pair) for pair in FAMILIES])
def test_family(source, family, tmp_path):
    name, parameters = smallest(source, family)
    if parameters > LARGEST:
        pytest.skip(f"{name} has {parameters:,} parameters")
    write_images(tmp_path)
    built = build(name, source, tmp_path)
    if isinstance(built, str):
        size, result = "", f"refused: {built}"
    else:
        size, result = built[0].data.image_size, check(*built, tmp_path / "exported")
    about = " ".join(result.replace("|", "/").split())
    row = f"| {source} | {family} | `{name}` | {parameters / 1e6:,.1f} M | {size} | {about} |"
    if folder := os.environ.get("PDIFF_FAMILIES"):
        (Path(folder) / f"{source}-{family}.md").write_text(row + "\n", encoding="utf-8")
    else:
        kept = row.partition(", equal")[0]  # processors round differently
        assert kept in PAGE.read_text(encoding="utf-8"), "run as the head of this file says"
