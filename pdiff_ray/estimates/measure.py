"""What pieces of work cost, by short runs of the real training, judging and denoising.

Nothing needs data: images are noise of the right size. What would take too long is run on fewer images, or counted in
FLOPs, and scaled.

Shapes: B images of a batch, C channels, S the edge in pixels, D values in the subset, K members, Z latent dimensions.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pdiff_ray.common.devices import autocast, exact_float32
from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config import schema
from pdiff_ray.config.schema import Data
from pdiff_ray.data.cache import random_images
from pdiff_ray.data.dataset import Dataset, Split
from pdiff_ray.data.sources import DataInfo
from pdiff_ray.estimates.anatomy import (
    CLASSES,
    MAX_BUILT,
    Anatomy,
    Dissection,
    Trace,
    dissect,
    generated_tensors,
    network_to_dissect,
    plain,
)
from pdiff_ray.generators.autoencoder import Autoencoder
from pdiff_ray.generators.interface import Fitting, make_generator
from pdiff_ray.generators.latent_diffusion import LatentDiffusion
from pdiff_ray.networks.build import build_network, check_network
from pdiff_ray.networks.split import split_network
from pdiff_ray.networks.subset import Entry, Subset

PIECE_S = 0.04  # that a measurement takes, about
LONGEST_S = 0.3  # of its shortest run; what would take longer is counted
TOTAL_S = 1.2  # of measuring; after that, the rest is counted
EFFICIENCY = 0.8  # of networks, in matrix products' FLOP/s; for what is counted
MAX_BATCH_BYTES = 2**28  # of a measured batch's operations
MIN_CHUNK, CHUNK_BYTES = 32, 16 * 2**20  # images that judging takes at a time on a CPU: their largest tensor's size
MAX_VALUES = 5_000  # of vectors that a generator is measured with; its cost is proportional to D
UPDATE_PASSES = {"sgd": 3, "adam": 7, "adamw": 8}  # over all parameters, in a step of an optimizer

T = TypeVar("T")


@dataclass(frozen=True)
class Passes:
    """Seconds per image of forward passes without gradients, at the batch size of the evaluation."""

    prefix: float
    suffix: float

    @property
    def whole(self) -> float:
        return self.prefix + self.suffix


@dataclass(frozen=True)
class GeneratorCost:
    """Seconds of a generator's work with K members, and its size.

    Attributes:
        fit: all of fitting.
        sample: drawing and decoding all samples.
        parameters: of the autoencoder.
        row_bytes: outputs of its operations for a vector.
    """

    fit: float
    sample: float
    parameters: int
    row_bytes: float


class Meter:
    """Measures on a device, each distinct piece once.

    Attributes:
        spent_s: that measuring took so far.
        counted: whether a network was counted in FLOPs instead of run.
    """

    def __init__(self, device: torch.device, total_s: float = TOTAL_S) -> None:
        exact_float32()  # as in the work that is measured
        self.device, self.total_s = device, total_s
        self.spent_s = 0.0
        self.counted = False
        self._known: dict[str, Any] = {}
        self._built: tuple[str, nn.Module] | None = None
        self._examined: tuple[str, nn.Module] | None = None

    def anatomy(self, network: schema.Network, info: DataInfo, zoo: schema.Zoo) -> Anatomy:
        """The anatomy of a network for images of `info` and the subset of `zoo`.

        Raises:
            ConfigError: the network cannot be built, or has no such subset.
        """

        def measure() -> Anatomy:
            if ":" in network.name:
                return self._own_anatomy(network, info, zoo)
            if str(CLASSES) in str(network.args):
                return self._dissect(network, info, zoo).anatomy(info.num_classes)
            many = replace(info, num_classes=CLASSES)
            found = self._once(
                lambda: self._dissect(network, many, zoo), "dissection", network, _shape(many), _cut(zoo)
            )
            return found.anatomy(info.num_classes)

        return self._once(measure, "anatomy", network, _shape(info), _cut(zoo))

    def _own_anatomy(self, network: schema.Network, info: DataInfo, zoo: schema.Zoo) -> Anatomy:
        """Of the user's own network; it may be one that cannot be split. To try the known ones would take seconds."""
        found = self._dissect(network, info, zoo).anatomy(info.num_classes)
        if not found.subset.entries:
            return found
        built = self._network(network, info).eval()
        for parameter in built.parameters():
            if not parameter.any():  # as heads often are before training: all logits would be zero
                nn.init.normal_(parameter, std=0.01)
        names = [name for name, _ in generated_tensors(built, found.subset, zoo)]
        reason = split_network(built, names, self._images(info, 4)).reason
        if reason is None:
            return found
        return replace(
            found, prefix_flops=0.0, suffix_flops=found.flops, suffix_bytes=found.operation_bytes, runs_whole=reason
        )

    def passes(self, network: schema.Network, info: DataInfo, zoo: schema.Zoo, batch_size: int, threads: int) -> Passes:
        """Of a network's prefix and suffix."""
        anatomy = self.anatomy(network, info, zoo)

        def measure() -> Passes:
            most = max(MIN_CHUNK, int(CHUNK_BYTES / anatomy.largest_bytes)) if self.device.type == "cpu" else batch_size
            count = self._affordable(anatomy, min(batch_size, most), threads)
            if not count:
                return Passes(
                    *(self._counted(flops, threads) for flops in (anatomy.prefix_flops, anatomy.suffix_flops))
                )
            built = self._network(network, info).eval()
            images = self._images(info, count)
            generated = [tensor for _, tensor in generated_tensors(built, anatomy.subset, zoo)]
            with _threads(threads), torch.no_grad(), Trace([images], generated) as trace:
                built(images)
            with _threads(threads), torch.no_grad():
                prefix, suffix = (self._seconds(_replay(trace.calls[own])) / count for own in (False, True))
            return Passes(prefix, suffix)

        return self._once(measure, "passes", network, _shape(info), _cut(zoo), batch_size, threads)

    def step(
        self,
        network: schema.Network,
        info: DataInfo,
        data: Data,
        zoo: schema.Zoo,
        training: schema.Training | schema.Zoo,
        batch_size: int,
        threads: int,
    ) -> float:
        """Seconds of a step of `training`: of the whole network, or, if it is the zoo's, of its subset."""
        anatomy, whole = self.anatomy(network, info, zoo), isinstance(training, schema.Training)

        def measure() -> float:
            flops = 3 * anatomy.flops if whole else anatomy.prefix_flops + 3 * anatomy.suffix_flops
            count = self._affordable(anatomy, batch_size, threads, passes=flops / max(1, anatomy.flops))
            if not count:
                return batch_size * self._counted(flops, threads)
            built = self._network(network, info).train(whole or zoo.batchnorm == "recalibrated")
            chosen = None if whole else {name for name, _ in generated_tensors(built, anatomy.subset, zoo)}
            with _threads(threads):
                forward_backward, update = self._step(built, info, data, chosen, training, count)
            return forward_backward * batch_size / count + update  # which does not grow with the batch

        noise = (data.augment, bool(data.train_noise), bool(data.pixel_noise))
        what = (training.optimizer.name, training.precision, batch_size, threads)
        return self._once(measure, "step", network, _shape(info), noise, "whole" if whole else _cut(zoo), *what)

    def generator(
        self, settings: schema.Generator, values: int, members: int, sampling: schema.Sampling, threads: int
    ) -> GeneratorCost:
        """Of fitting to `members` vectors of `values` numbers each, and of sampling."""
        subset = Subset((Entry("values", (min(values, MAX_VALUES),), 0, "parameter"),))
        scale = values / subset.size
        with _threads(threads):
            if settings.name != "latent_diffusion":
                fit, sample = self._once(
                    lambda: self._plain_generator(settings, subset, members, sampling),
                    "generator", settings.name, values, members, sampling.samples, threads,
                )  # fmt: skip
                return GeneratorCost(fit * scale, sample * scale, 0, 0.0)
            ae, diffusion = settings.autoencoder, settings.diffusion
            parameters, row_bytes = self._once(lambda: _autoencoder_size(ae, values), "size", _sizes(ae), values)
            rows = min(ae.batch_size, members)
            ae_step = scale * self._once(
                lambda: self._ae_step(settings, subset, rows), "autoencoder", _sizes(ae), subset.size, rows, threads
            )
            rows_of_latents = min(diffusion.batch_size, members)
            of_diffusion = (_sizes(diffusion), ae.latent_dim, threads)
            diffusion_step = self._once(
                lambda: self._diffusion_step(settings, rows_of_latents), "diffusion", rows_of_latents, *of_diffusion
            )
            denoising = self._once(
                lambda: self._denoising_step(settings, sampling.samples), "denoising", sampling.samples, *of_diffusion
            )
        coded = ae_step / 6 / rows  # a vector to a latent or back: a step is the way there and back three times
        fit = ae.steps * ae_step + diffusion.steps * diffusion_step + 2 * members * coded
        steps = sampling.steps or diffusion.num_timesteps
        sample = steps * denoising + (2 * sampling.samples + members) * coded
        return GeneratorCost(fit, sample, parameters, row_bytes)

    # --- what is run --------------------------------------------------------------------------------------------------

    def _step(
        self,
        network: nn.Module,
        info: DataInfo,
        data: Data,
        chosen: Collection[str] | None,
        training: schema.Training | schema.Zoo,
        count: int,
    ) -> tuple[float, float]:
        """Seconds of forward and backward pass of `count` images, and of the update of the parameters `chosen`."""
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(chosen is None or name in chosen)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        source = random_images(info, data, count)
        source.to(self.device)
        split = Split(source, np.arange(count))
        dataset = Dataset(info, data, split, split, split, split)
        batches = dataset.training_batches(count, 0, 2**40, self.device, "measurement")

        def run() -> None:
            images, labels = next(batches)
            with autocast(self.device, training.precision):
                logits = network(images)
            functional.cross_entropy(logits.float(), labels).backward()

        return self._seconds(run), self._update(trained, UPDATE_PASSES[training.optimizer.name])

    def _ae_step(self, settings: schema.Generator, subset: Subset, rows: int) -> float:
        model = LatentDiffusion(settings, subset).autoencoder.to(self.device)
        return self._fit_step(model, torch.randn(rows, subset.size, device=self.device))

    def _diffusion_step(self, settings: schema.Generator, rows: int) -> float:
        data = torch.randn(rows, settings.autoencoder.latent_dim, device=self.device)
        return self._fit_step(self._diffusion(settings), data, 1 if settings.diffusion.ema_decay else 0)

    def _fit_step(self, model: Any, data: Tensor, more_passes: int = 0) -> float:
        random = torch.Generator(self.device)

        def run() -> None:
            model.loss(data, random).backward()

        return self._seconds(run) + self._update(list(model.parameters()), UPDATE_PASSES["adamw"] + more_passes)

    def _update(self, parameters: Sequence[Tensor], passes: int) -> float:
        """Of so many passes over parameters. To make an optimizer would import the compiler: two seconds."""
        values, others = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
        return passes * self._seconds(lambda: torch._foreach_add_(values, others))

    def _denoising_step(self, settings: schema.Generator, samples: int) -> float:
        denoiser = self._diffusion(settings).denoiser.eval()
        x = torch.randn(samples, settings.autoencoder.latent_dim, device=self.device)
        with torch.inference_mode():
            time_embedding = denoiser.embedding(torch.zeros(1, device=self.device))
            return self._seconds(lambda: denoiser(x, time_embedding))

    def _diffusion(self, settings: schema.Generator) -> Any:
        subset = Subset((Entry("values", (1,), 0, "parameter"),))
        return LatentDiffusion(settings, subset).diffusion.to(self.device)

    def _plain_generator(
        self, settings: schema.Generator, subset: Subset, members: int, sampling: schema.Sampling
    ) -> tuple[float, float]:
        """Seconds of fitting and of sampling."""
        generator = make_generator(settings, subset)
        vectors = torch.randn(members, subset.size, device=self.device)
        fit = self._seconds(lambda: generator.fit(vectors, Fitting(self.device, seed=0)))
        return fit, self._seconds(lambda: generator.sample(sampling.samples, sampling, self.device))

    def _network(self, network: schema.Network, info: DataInfo) -> nn.Module:
        """The network on the device; one at a time, as they may be large."""
        key = repr((network, _shape(info)))
        if self._built is None or self._built[0] != key:
            self._built = key, build_network(plain(network), info).to(self.device)
        for parameter in self._built[1].parameters():
            parameter.grad = None
        return self._built[1]

    def _dissect(self, network: schema.Network, info: DataInfo, zoo: schema.Zoo) -> Dissection:
        key = repr((network, _shape(info)))
        if self._examined is None or self._examined[0] != key:  # sweeps cut one network in many ways
            self._examined = key, network_to_dissect(network, info)
        try:
            return dissect(self._examined[1], info, zoo)
        except ConfigError:
            raise
        except Exception:  # as in `network_to_dissect`
            self._examined = key, check_network(network, info)
            return dissect(self._examined[1], info, zoo)

    def _images(self, info: DataInfo, count: int) -> Tensor:
        images = torch.randn(count, info.channels, info.image_size, info.image_size, device=self.device)
        return images.contiguous(memory_format=torch.channels_last)

    # --- how long -----------------------------------------------------------------------------------------------------

    def _once(self, measure: Callable[[], T], *what: Any) -> T:
        key = repr(what)
        if key not in self._known:
            started, before = time.monotonic(), self.spent_s
            self._known[key] = measure()
            self.spent_s = before + time.monotonic() - started  # with what this one measured on its way
        known: T = self._known[key]
        return known

    def _affordable(self, anatomy: Anatomy, batch_size: int, threads: int, passes: float = 1.0) -> int:
        """How many images, up to a batch, a measurement may take; 0 for none."""
        in_time = LONGEST_S / max(passes * self._counted(anatomy.flops, threads), 1e-12)
        if in_time < 2 or anatomy.parameters > MAX_BUILT or self.spent_s > self.total_s:
            self.counted = True
            return 0
        in_memory = MAX_BATCH_BYTES / max(anatomy.operation_bytes, 1)
        return max(2, min(batch_size, int(in_time), int(in_memory)))

    def _counted(self, flops: float, threads: int) -> float:
        """Seconds of a network's FLOPs."""
        return flops / (EFFICIENCY * self._rate(threads))

    def _rate(self, threads: int) -> float:
        """FLOP/s of matrix products, in float32."""

        def measure() -> float:
            edge = 512 if self.device.type == "cpu" else 4096
            matrix = torch.randn(edge, edge, device=self.device)
            with _threads(threads):
                return 2 * edge**3 / self._seconds(lambda: matrix @ matrix, PIECE_S / 3)

        return self._once(measure, "rate", threads)

    def _seconds(self, work: Callable[[], Any], budget_s: float = PIECE_S) -> float:
        """The median of as many runs as fit into a budget, after the first, which is slower.

        On a CPU, time that other processes take is left out.
        """
        times: list[float] = []
        began = time.perf_counter()
        while not times or (time.perf_counter() - began < budget_s and len(times) < 30):
            self._synchronize()
            started, processor = time.perf_counter(), time.process_time()
            work()
            self._synchronize()
            wall_s, cpu_s = time.perf_counter() - started, time.process_time() - processor
            times.append(min(wall_s, cpu_s) if self.device.type == "cpu" else wall_s)
        return statistics.median(times[1:] or times)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _autoencoder_size(settings: schema.Autoencoder, values: int) -> tuple[int, float]:
    """Parameters, and bytes of all operations on a vector."""
    with torch.device("meta"):
        model = Autoencoder(settings, values)
    parameters = sum(p.numel() for p in model.parameters())
    device = "cpu" if parameters <= MAX_BUILT else "meta"  # as in `network_to_dissect`
    with torch.device(device):
        model, vectors = Autoencoder(settings, values), torch.zeros(1, values)
    with torch.no_grad(), Trace([vectors]) as trace:
        model.decode(model.encode(vectors))
    return parameters, sum(operation.bytes for operation in trace.operations)


def _replay(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _sizes(section: schema.Section) -> Mapping[str, Any]:
    """What of a model's settings its time per step depends on."""
    sized = ("channels", "kernel_size", "stride", "latent_dim", "denoiser", "width", "depth")
    return {name: value for name, value in section.model_dump().items() if name in sized}


def _shape(info: DataInfo) -> tuple[int, int, int]:
    return info.channels, info.image_size, info.num_classes


def _cut(zoo: schema.Zoo) -> tuple[Any, ...]:
    return zoo.subset, zoo.batchnorm


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
