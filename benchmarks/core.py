"""Benchmarks of the core, with torch alone: no Ray, no MLflow."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.func import functional_call
from torch.nn import functional

from benchmarks.harness import Result, compare
from pdiff_ray.artifacts import Artifact, Storage
from pdiff_ray.config import Diffusion as DiffusionSettings
from pdiff_ray.config import Network, Sampling, SubsetRule
from pdiff_ray.generators.diffusion import Diffusion
from pdiff_ray.networks import build_network
from pdiff_ray.sources import DATASETS
from pdiff_ray.split import split_network
from pdiff_ray.store import ParameterStore, Record
from pdiff_ray.subset import Entry, Subset, resolve

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LATENT_DIM, NUM_SAMPLES = 32, 100


def sampling() -> Iterator[Result]:
    """100 latents through 1000 steps: in one batch, against one at a time."""
    for denoiser, width, singles in (("mlp", 256, 5), ("cnn", 64, 1)):
        model = Diffusion(DiffusionSettings(denoiser=denoiser, width=width), LATENT_DIM).to(DEVICE).eval()
        one = Sampling(samples=1, seed=0)

        def in_turn(model: Diffusion = model, one: Sampling = one, singles: int = singles) -> None:
            for _ in range(singles):
                model.sample(1, one, DEVICE)

        yield compare(
            "sampling",
            f"{NUM_SAMPLES} samples, 1000 steps, {denoiser} denoiser, in one batch",
            lambda model=model: model.sample(NUM_SAMPLES, Sampling(seed=0), DEVICE),
            "one at a time",
            in_turn,
            other_scale=singles / NUM_SAMPLES,
            note=f"the other way measured on {singles} of {NUM_SAMPLES} samples and scaled",
        )


def few_step() -> Iterator[Result]:
    """100 latents with few-step samplers, against 1000 steps."""
    model = Diffusion(DiffusionSettings(), LATENT_DIM).to(DEVICE).eval()
    for sampler, steps in (("ddim", 50), ("dpmsolver++", 20)):
        few = Sampling(sampler=sampler, steps=steps, seed=0)
        yield compare(
            "few_step",
            f"{NUM_SAMPLES} samples, {sampler} with {steps} steps",
            lambda few=few: model.sample(NUM_SAMPLES, few, DEVICE),
            "ddpm with 1000 steps",
            lambda: model.sample(NUM_SAMPLES, Sampling(seed=0), DEVICE),
        )


def store() -> Iterator[Result]:
    """Reading members of a store of 10,000 with 2,048 values each, against a `.pth` file per member."""
    dimension, count, k = 2048, 10_000, 200
    subset = Subset((Entry("weight", (dimension,), 0, "parameter"),))
    vectors = np.random.default_rng(0).standard_normal((count, dimension), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(f"{folder}/storage")
        artifact = Artifact(storage, "zoo", {"benchmark": "store"}, {})
        growing = ParameterStore(artifact)
        for start in range(0, count, 100):
            growing.append([Record(i, "original", vector=vectors[i]) for i in range(start, start + 100)], subset)
        artifact.commit({}, {}, 0.0, growing.manifest_entries(range(count)))
        for i in range(count):
            torch.save({"weight": torch.from_numpy(vectors[i])}, f"{folder}/{i}.pth")
        opened = ParameterStore(artifact)

        def from_files(ids: range) -> np.ndarray:
            loaded = [torch.load(Path(folder) / f"{i}.pth", weights_only=True)["weight"] for i in ids]
            return torch.stack(loaded).numpy()

        for ids, what in ((range(5000, 5001), "one member"), (range(k), f"{k} of {count:,} members")):
            np.testing.assert_array_equal(opened.vectors(ids), from_files(ids))
            yield compare(
                "store",
                f"read {what} of {dimension:,} values from Parquet",
                lambda ids=ids: opened.vectors(ids),
                ".pth files",
                lambda ids=ids: from_files(ids),
                n=9,
            )


def evaluate() -> Iterator[Result]:
    """Networks that differ in their last two norm layers: the shared part once, against a full pass each."""
    num_images, num_networks, measured = 1000, 100, 3
    network, names, images = _resnet18(num_images)
    random = torch.Generator(DEVICE).manual_seed(0)
    own = {name: dict(network.named_parameters())[name].detach() for name in names}
    networks = [
        {name: t + 0.1 * torch.randn(t.shape, generator=random, device=DEVICE) for name, t in own.items()}
        for _ in range(num_networks)
    ]
    split = split_network(network, names, images[:4])

    @torch.inference_mode()
    def ours(count: int = num_networks) -> torch.Tensor:
        predictions = []
        for chunk in images.split(250):
            frontier = split.prefix(chunk)
            predictions.append(torch.stack([split.suffix(frontier, tensors).argmax(1) for tensors in networks[:count]]))
        return torch.cat(predictions, 1)

    @torch.inference_mode()
    def other() -> torch.Tensor:
        whole = lambda tensors, chunk: functional_call(network, tensors, (chunk,)).argmax(1)  # noqa: E731
        return torch.stack([torch.cat([whole(t, c) for c in images.split(250)]) for t in networks[:measured]])

    assert torch.equal(ours(measured), other())
    yield compare(
        "evaluate",
        f"{num_networks} ResNet-18 (CIFAR stem, last two norm layers) on {num_images:,} images, split",
        ours,
        "a full pass each",
        other,
        n=3,
        other_scale=measured / num_networks,
        note=f"the other way measured on {measured} of {num_networks} networks and scaled; {split.shared:.1%} of the "
        "FLOPs are shared",
    )


def zoo_step() -> Iterator[Result]:
    """A training step of the subset at batch 128: on cached frontier tensors, against the whole network."""
    network, names, images = _resnet18(128)
    labels = torch.randint(10, (128,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    split = split_network(network, names, images[:4])
    tensors = {name: dict(network.named_parameters())[name].detach().requires_grad_() for name in names}
    frontier = split.prefix(images)

    def gradients(logits: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(functional.cross_entropy(logits, labels), list(tensors.values())))

    def ours() -> list[torch.Tensor]:
        return gradients(split.suffix(frontier, tensors))

    def other() -> list[torch.Tensor]:
        return gradients(functional_call(network, tensors, (images,)))

    for a, b in zip(ours(), other(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    yield compare("zoo_step", "ResNet-18 step at batch 128, cached frontier", ours, "the whole network", other, n=5)


def _resnet18(num_images: int) -> tuple[torch.nn.Module, list[str], torch.Tensor]:
    info = DATASETS["cifar10"]
    network = build_network(Network(name="resnet18", source="torchvision", cifar_stem=True), info, 0).to(DEVICE).eval()
    network.requires_grad_(False)
    names = resolve(SubsetRule(last_norm_layers=2), network).names
    images = torch.randn(num_images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return network, names, images.to(DEVICE, memory_format=torch.channels_last)


BENCHMARKS: dict[str, Callable[[], Iterator[Result]]] = {
    "evaluate": evaluate,
    "zoo_step": zoo_step,
    "sampling": sampling,
    "few_step": few_step,
    "store": store,
}
