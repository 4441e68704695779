"""Benchmarks of networks that share most of their tensors, without Ray and MLflow.

Weights and images are random: times do not depend on them.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Result, Work, compare, matrix_rate, peak_mib, result, seconds
from pdiff_ray.common.devices import autocast
from pdiff_ray.config.schema import Data, Network, SubsetRule
from pdiff_ray.data.cache import Cached
from pdiff_ray.data.dataset import Dataset, Split
from pdiff_ray.data.sources import DataInfo
from pdiff_ray.evaluation.judge import Judge
from pdiff_ray.networks.build import build_network
from pdiff_ray.networks.subset import Subset, resolve

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAST_TWO = SubsetRule(last_norm_layers=2)
RESNET18 = Network(name="resnet18", source="torchvision", cifar_stem=True)
SCRIPT_BATCH = 256
AS_SCRIPTS = "as scripts do it in PyTorch's default layout"
VIT, CONVNEXT = Network(name="vit_tiny_patch16_224"), Network(name="convnext_tiny", source="timm")
VIT_BASE = Network(name="vit_base_patch16_224")
GPU_IMAGES = 10_000
PRECISIONS = ("float32", "bfloat16") if DEVICE.type == "cuda" else ("float32",)


@dataclass(frozen=True)
class Case:
    """Networks that differ in a subset, and images to judge them on."""

    title: str
    network: Network
    subset: SubsetRule
    image_size: int
    images: int  # on a CPU; all `GPU_IMAGES` on a GPU
    blocks: int  # of images, each a paired run
    plain: tuple[int, int]  # networks and images of a block on which the other way is measured
    target: float | None = None


CASES = [
    Case("ResNet-18 (CIFAR stem), last two norm layers", RESNET18, LAST_TWO, 32, 10_000, 5, (1, 500), 20.0),
    Case("ViT-Tiny, last two norm layers", VIT, LAST_TWO, 224, 300, 3, (2, 100)),
    Case("ViT-Base, last two norm layers", VIT_BASE, LAST_TWO, 224, 60, 3, (2, 20)),
    Case("ConvNeXt-T, last two norm layers", CONVNEXT, LAST_TWO, 224, 150, 3, (2, 50)),
    Case("ConvNet-3, all parameters", Network(name="convnet"), SubsetRule(all=True), 32, 1500, 3, (20, 500)),
]


class Subject:
    """Networks on random images: their judge, and the plain way beside it."""

    def __init__(
        self, network: Network, rule: SubsetRule, image_size: int, num_images: int, precision: str = "float32"
    ) -> None:
        info = DataInfo(num_classes=10, channels=3, image_size=image_size, mean=(0.5,) * 3, std=(0.25,) * 3)
        self.network = build_network(network, info, 0).to(DEVICE).eval().requires_grad_(False)
        self.network.to(memory_format=torch.channels_last)
        self.subset: Subset = resolve(rule, self.network)
        random, shape = np.random.default_rng(0), (num_images, info.channels, image_size, image_size)
        pixels: np.ndarray = random.integers(256, size=shape, dtype=np.uint8)
        self.info, self.images = info, Cached(pixels, random.integers(info.num_classes, size=num_images), f"{shape}")
        self.precision = precision
        self.judge = Judge(self.network, self.subset, self.dataset(slice(None)), DEVICE, precision=precision)

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
    def plain(self, vectors: Tensor, rows: slice = slice(None), script: bool = False) -> list[bytes | None]:
        """The same from a full pass of each network: in as good a layout, and over as many images at a time.

        Args:
            script: as scripts do it instead: in PyTorch's default layout, in batches of a common size.
        """
        dataset = self.dataset(rows)
        network, layout = (self.default, torch.contiguous_format) if script else (self.network, torch.channels_last)
        found: list[bytes | None] = []
        for vector in vectors.to(DEVICE):
            tensors = self.subset.unflatten(vector)
            wrong = []
            for pixels, labels in dataset.test.in_order(SCRIPT_BATCH if script else self.judge.capacity.images):
                images = dataset.prepare(pixels, DEVICE).contiguous(memory_format=layout)
                with autocast(DEVICE, self.precision):
                    logits = functional_call(network, tensors, (images,))
                wrong.append(logits.argmax(1) != labels.to(DEVICE))
            found.append(np.packbits(torch.cat(wrong).cpu().numpy()).tobytes())
        return found

    @functools.cached_property
    def default(self) -> nn.Module:
        """The network in PyTorch's default layout."""
        return copy.deepcopy(self.network).to(memory_format=torch.contiguous_format)

    def check(self, vectors: Tensor, rows: slice) -> None:
        """Both ways give the same predictions; in bfloat16, nearly, as no two kernels round alike."""
        found = self._bits(self.shared(vectors, rows))
        for script in (False, True):
            other = self._bits(self.plain(vectors, rows, script))
            changed = (found != other).mean() if found.shape == other.shape else 1.0
            assert changed <= (0.0 if self.precision == "float32" else 0.02), "the two ways predict otherwise"

    @staticmethod
    def _bits(wrong: Sequence[bytes | None]) -> np.ndarray:
        return np.array([np.unpackbits(np.frombuffer(bits or b"", np.uint8)) for bits in wrong])


def evaluate(networks: int = 100, cases: Sequence[Case] = tuple(CASES)) -> Iterator[Result]:
    """Networks on a test set: what they share computed once, against a full pass for each."""
    for case in cases:
        for precision in PRECISIONS:
            yield from _evaluated(case, networks, precision)


def _evaluated(case: Case, networks: int, precision: str) -> Iterator[Result]:
    on_gpu = DEVICE.type == "cuda"
    count = GPU_IMAGES if on_gpu else case.images
    size = count // case.blocks
    few, some = case.plain[0], size if on_gpu else case.plain[1]
    subject = Subject(case.network, case.subset, case.image_size, count, precision)
    vectors = subject.vectors(networks)
    subject.check(vectors[:3], slice(0, min(200, some)))
    shared = subject.judge.partitioned.shared
    pairs: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for start in range(0, size * case.blocks, size):
        block, part = slice(start, start + size), slice(start, start + some)
        ours = seconds(lambda block=block: subject.shared(vectors, block))
        for script, found in pairs.items():
            other = seconds(lambda part=part, script=script: subject.plain(vectors[:few], part, script))
            found.append((ours * case.blocks, other * networks / few * count / some))
    image = subject.dataset(slice(None)).prepare(subject.images.images[:1], DEVICE)
    whole = flops(lambda: subject.network(image))
    products = matrix_rate(DEVICE, getattr(torch, precision))
    ours_flops = count * whole * (shared + networks * (1 - shared))
    for script, against in (
        (False, "a full pass each"),
        (True, f"a full pass each, {AS_SCRIPTS}, in batches of {SCRIPT_BATCH}"),
    ):
        ours_s, other_s = (statistics.median(times) for times in zip(*pairs[script], strict=True))
        rates = ours_flops / ours_s, count * networks * whole / other_s
        yield result(
            "evaluate",
            f"{networks} x {case.title}, on {count:,} images of {case.image_size} x {case.image_size}, {precision}",
            against,
            pairs[script],
            target=case.target,
            limit=1 / (1 - shared + shared / networks),
            note=f"{shared:.1%} of a network's operations are shared; of the rest an image takes "
            f"{whole * (1 - shared) / 1e6:.1f} MFLOP; at {rates[0] / 1e9:.0f} and {rates[1] / 1e9:.0f} GFLOP/s (matrix "
            f"products: {products / 1e9:.0f}); the other way measured on {few} networks and {some} images after each "
            f"of {case.blocks} blocks of images, and scaled",
        )


def zoo_step(batch_size: int = 128, branches: int = 4, case: Case = CASES[0]) -> Iterator[Result]:
    """A training step of the subset: on cached frontier tensors, against the whole network; and of several subsets."""
    subject = Subject(case.network, case.subset, case.image_size, batch_size)
    split = subject.judge.partitioned
    images = subject.judge.dataset.prepare(subject.images.images, DEVICE)
    labels = subject.images.labels.to(DEVICE)
    values = [subject.subset.unflatten(vector) for vector in subject.vectors(branches).to(DEVICE)]
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in values[0].items()}
    frontier = split.prefix(images)

    def ours() -> list[Tensor]:
        return _gradients(split.suffix(frontier, tensors), labels, tensors)

    def whole(script: bool) -> list[Tensor]:
        network = subject.default if script else subject.network
        given = images.contiguous() if script else images
        return _gradients(functional_call(network, tensors, (given,)), labels, tensors)

    what = f"{case.title}: gradients at batch {batch_size}, cached frontier"
    limit = flops(lambda: whole(False)) / max(1, flops(ours))
    for script, against in ((False, "the whole network"), (True, f"the whole network, {AS_SCRIPTS}")):
        other = functools.partial(whole, script)
        _check_close(ours(), other(), 1e-5 if not script else 1e-4)
        yield compare("zoo_step", what, ours, against, other, n=7, target=10.0, limit=limit)

    stacked = {name: torch.stack([own[name] for own in values]).requires_grad_() for name in tensors}
    batches = [(tuple(t.roll(i, 0) for t in frontier), labels.roll(i)) for i in range(branches)]
    frontiers = tuple(torch.stack(parts) for parts in zip(*(own for own, _ in batches), strict=True))

    def together() -> list[Tensor]:
        logits = torch.vmap(split.suffix)(frontiers, stacked).flatten(0, 1)
        return _gradients(logits, torch.cat([own for _, own in batches]), stacked, branches)

    def in_turn() -> list[Tensor]:
        alone = []
        for own, (rows, classes) in zip(values, batches, strict=True):
            for name, tensor in tensors.items():
                tensor.data.copy_(own[name])
            alone.append(_gradients(split.suffix(rows, tensors), classes, tensors))
        return [torch.stack(parts) for parts in zip(*alone, strict=True)]

    _check_close(together(), in_turn(), 1e-4)
    what = f"{case.title}: gradients of {branches} branches as one program"
    yield compare("zoo_step", what, together, "one after another", in_turn, n=7)


def _gradients(logits: Tensor, labels: Tensor, tensors: dict[str, Tensor], branches: int = 1) -> list[Tensor]:
    for tensor in tensors.values():
        tensor.grad = None
    (functional.cross_entropy(logits, labels) * branches).backward()
    return [tensor.grad for tensor in tensors.values() if tensor.grad is not None]


def _check_close(ours: Sequence[Tensor], other: Sequence[Tensor], tolerance: float) -> None:
    for a, b in zip(ours, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


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
                note=f"{subject.judge.partitioned.shared:.1%} of a network's operations are shared"
                * (axis == "parameters"),
            )
