"""Benchmarks of networks that share most of their tensors, with torch alone: no Ray, no MLflow.

Weights and images are random: times do not depend on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Result, Work, compare, peak_mib, result, seconds
from pdiff_ray.config import Data, Network, SubsetRule
from pdiff_ray.data import Dataset, Split, random_images
from pdiff_ray.judge import Judge
from pdiff_ray.networks import build_network
from pdiff_ray.sources import DataInfo
from pdiff_ray.subset import Subset, resolve

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAST_TWO = SubsetRule(last_norm_layers=2)
RESNET18 = Network(name="resnet18", source="torchvision", cifar_stem=True)
VIT, CONVNEXT = Network(name="vit_tiny_patch16_224"), Network(name="convnext_tiny", source="timm")


@dataclass(frozen=True)
class Case:
    """Networks that differ in a subset, and images to judge them on."""

    title: str
    network: Network
    subset: SubsetRule
    image_size: int
    images: int
    blocks: int  # of images, each a paired run
    plain: tuple[int, int]  # networks and images of a block on which the other way is measured
    target: float | None = None


CASES = [
    Case("ResNet-18 (CIFAR stem), last two norm layers", RESNET18, LAST_TWO, 32, 10_000, 5, (1, 500), 20.0),
    Case("ViT-Tiny, last two norm layers", VIT, LAST_TWO, 224, 300, 3, (2, 100)),
    Case("ConvNeXt-T, last two norm layers", CONVNEXT, LAST_TWO, 224, 150, 3, (2, 50)),
    Case("ConvNet-3, all parameters", Network(name="convnet"), SubsetRule(all=True), 32, 1500, 3, (20, 500)),
]


class Subject:
    """Networks on random images: their judge, and the plain way beside it."""

    def __init__(self, network: Network, rule: SubsetRule, image_size: int, num_images: int) -> None:
        info = DataInfo(num_classes=10, channels=3, image_size=image_size, mean=(0.5,) * 3, std=(0.25,) * 3)
        self.network = build_network(network, info, 0).to(DEVICE).eval().requires_grad_(False)
        self.network.to(memory_format=torch.channels_last)
        self.subset: Subset = resolve(rule, self.network)
        self.info, self.images = info, random_images(info, Data(), num_images)
        self.judge = Judge(self.network, self.subset, self.dataset(slice(None)), DEVICE)

    def dataset(self, rows: slice) -> Dataset:
        split = Split(self.images, np.arange(len(self.images))[rows])
        return Dataset(self.info, Data(), split, split, split, split)

    def vectors(self, count: int) -> Tensor:
        """Networks (count, D) about the one that there is."""
        own = self.subset.flatten(self.network.state_dict()).cpu()
        return own + 0.1 * torch.randn(count, len(own), generator=torch.Generator().manual_seed(0))

    def shared(self, vectors: Tensor, rows: slice = slice(None)) -> list[bytes | None]:
        """Wrong predictions of each network, from what they share computed once."""
        self.judge.dataset = self.dataset(rows)
        return [judgement.wrong for judgement in self.judge.judge(vectors, ("test",))]

    @torch.inference_mode()
    def plain(self, vectors: Tensor, rows: slice = slice(None)) -> list[bytes | None]:
        """The same from a full pass of each network, over as many images at a time."""
        dataset = self.dataset(rows)
        found: list[bytes | None] = []
        for vector in vectors.to(DEVICE):
            tensors = self.subset.unflatten(vector)
            wrong = []
            for images, labels in dataset.test.in_order(self.judge.batch_size):
                logits = functional_call(self.network, tensors, (dataset.prepare(images, DEVICE),))
                wrong.append(logits.argmax(1) != labels.to(DEVICE))
            found.append(np.packbits(torch.cat(wrong).cpu().numpy()).tobytes())
        return found

    def check(self, vectors: Tensor, rows: slice) -> None:
        assert self.shared(vectors, rows) == self.plain(vectors, rows), "the two ways predict otherwise"


def evaluate(networks: int = 100, cases: Sequence[Case] = tuple(CASES)) -> Iterator[Result]:
    """Networks on a test set: what they share computed once, against a full pass for each."""
    for case in cases:
        yield _evaluated(case, networks)


def _evaluated(case: Case, networks: int) -> Result:
    size = case.images // case.blocks
    few, some = case.plain
    subject = Subject(case.network, case.subset, case.image_size, case.images)
    vectors = subject.vectors(networks)
    subject.check(vectors[:3], slice(0, min(200, some)))
    shared = subject.judge.split.shared
    pairs = []
    for start in range(0, size * case.blocks, size):
        block, some_of_it = slice(start, start + size), slice(start, start + some)
        ours = seconds(lambda block=block: subject.shared(vectors, block))
        other = seconds(lambda rows=some_of_it: subject.plain(vectors[:few], rows))
        pairs.append((ours * case.blocks, other * networks / few * case.images / some))
    return result(
        "evaluate",
        f"{networks} x {case.title}, on {case.images:,} images of {case.image_size} x {case.image_size}",
        "a full pass each",
        pairs,
        target=case.target,
        limit=1 / (1 - shared + shared / networks),
        note=f"{shared:.1%} of a network's operations are shared; the other way measured on {few} networks and {some} "
        f"images after each of {case.blocks} blocks of images, and scaled",
    )


def zoo_step(batch_size: int = 128, case: Case = CASES[0]) -> Iterator[Result]:
    """A training step of the subset: on cached frontier tensors, against the whole network."""
    subject = Subject(case.network, case.subset, case.image_size, batch_size)
    split, network = subject.judge.split, subject.network
    images = subject.judge.dataset.prepare(subject.images.images, DEVICE)
    labels = subject.images.labels.to(DEVICE)
    own = subject.subset.unflatten(subject.vectors(1)[0].to(DEVICE))
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in own.items()}
    frontier = split.prefix(images)

    def gradients(logits: Tensor) -> list[Tensor]:
        for tensor in tensors.values():
            tensor.grad = None
        functional.cross_entropy(logits, labels).backward()
        return [tensor.grad for tensor in tensors.values() if tensor.grad is not None]

    def ours() -> list[Tensor]:
        return gradients(split.suffix(frontier, tensors))

    def other() -> list[Tensor]:
        return gradients(functional_call(network, tensors, (images,)))

    for a, b in zip(ours(), other(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    yield compare(
        "zoo_step",
        f"{case.title}: gradients at batch {batch_size}, cached frontier",
        ours,
        "the whole network, forward and backward to the same parameters",
        other,
        n=7,
        target=10.0,
        limit=flops(other) / max(1, flops(ours)),
    )

    count = 4
    branches = [subject.subset.unflatten(vector) for vector in subject.vectors(count).to(DEVICE)]
    stacked = {name: torch.stack([own[name] for own in branches]).requires_grad_() for name in tensors}

    def together() -> list[Tensor]:
        for tensor in stacked.values():
            tensor.grad = None
        logits = torch.vmap(lambda own: split.suffix(frontier, own))(stacked)
        (functional.cross_entropy(logits.flatten(0, 1), labels.repeat(count)) * count).backward()
        return [tensor.grad for tensor in stacked.values() if tensor.grad is not None]

    def in_turn() -> list[Tensor]:
        alone = []
        for own in branches:
            for name, tensor in tensors.items():
                tensor.data.copy_(own[name])
            alone.append(ours())
        return [torch.stack(parts) for parts in zip(*alone, strict=True)]

    for a, b in zip(together(), in_turn(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    what = f"{case.title}: {count} branches as one program"
    yield compare("zoo_step", what, together, "one after another", in_turn, n=7)


def flops(work: Work) -> int:
    """Of matrix products and convolutions, two each multiply and add."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def growth(
    samples: Sequence[int] = (10, 100, 1000),
    images: Sequence[int] = (1000, 10_000, 50_000),
    subsets: Sequence[SubsetRule] = (
        SubsetRule(last_norm_layers=1), SubsetRule(last_norm_layers=2), SubsetRule(last_norm_layers=3),
        SubsetRule(all=True),
    ),
) -> Iterator[Result]:  # fmt: skip
    """Time and memory of an evaluation against its size; the other way is the first case's time, in proportion.

    Memory is what the evaluation takes beyond the images and the networks' vectors.
    """
    small = Network(name="convnet", args={"widths": [16, 32, 64]})
    last_two = SubsetRule(last_norm_layers=2)
    cases = [
        ("samples", [(last_two, count, images[0], count / samples[0]) for count in samples]),
        ("images", [(last_two, samples[0], count, count / images[0]) for count in images]),
        ("parameters", [(rule, samples[1], images[0], 1.0) for rule in subsets]),
    ]
    for axis, sizes in cases:
        first = None
        for rule, num_samples, num_images, factor in sizes:
            subject = Subject(small, rule, 32, num_images)
            vectors = subject.vectors(num_samples)
            subject.check(vectors[:3], slice(0, 200))
            work = lambda subject=subject, vectors=vectors: subject.shared(vectors)  # noqa: E731
            taken: list[float] = []
            peak = peak_mib(lambda work=work, taken=taken: taken.append(seconds(work)))
            if first is None:
                taken += [seconds(work) for _ in range(2)]
                first = float(np.median(taken))
            yield result(
                "growth",
                f"{axis}: {num_samples} x ConvNet 16-32-64, {subject.subset.size:,} parameters, {num_images:,} images",
                f"the first case x {factor:g}",
                [(own, first * factor) for own in taken],
                peak_mib=peak,
                note=f"{subject.judge.split.shared:.1%} of a network's operations are shared" * (axis == "parameters"),
            )
