"""How many images and networks fit into memory at a time.

Shapes: B images of a batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pdiff_ray.common.devices import autocast, differentiable_in_vmap, enough_memory, free_bytes
from pdiff_ray.networks.partition import PartitionedNetwork

# Images of a chunk. On a CPU their largest tensor stays in its caches, without which prefixes and wide suffixes take up
# to twice as long; an accelerator wants much work at a time.
CPU_IMAGES, CPU_TENSOR_BYTES = (32, 500), 16 * 2**20
GPU_IMAGES, GPU_SHARE = 4096, 0.25
FEW_IMAGES = 64  # with fewer at a time, networks are taken apart first where memory ends
LIVE_TENSORS = 4  # of the largest size, at a time: input, output, shortcut and workspace of a layer

T = TypeVar("T")


class Capacity:
    """The number of images and networks that are computed at a time; lowered when memory ends.

    Args:
        network: whose suffixes are computed for several networks.
        own: the values (of one network) of what is generated, by name.
        examples: a few images (B, C, S, S) as the network takes them, on its device.
        precision: "bfloat16" for autocast.
        images: per forward pass; default: as memory allows.
        networks: whose suffixes run as one program; default: as many as fit on an accelerator, one on a CPU, where it
            takes up to four times as long (grouped convolutions). One if the network does not allow it.

    Attributes:
        images, networks: that are computed at a time.
    """

    def __init__(
        self,
        network: PartitionedNetwork,
        own: Mapping[str, Tensor],
        examples: Tensor,
        precision: str = "float32",
        images: int | None = None,
        networks: int | None = None,
    ) -> None:
        self.network, self.own, self.examples, self.precision = network, own, examples, precision
        self.device = examples.device
        self.images = images or self._images()
        self.networks = self._networks(networks)

    def with_less(self, work: Callable[[], T]) -> T:
        """Returns what `work` gives, tried with fewer images at a time when memory ends, then fewer networks.

        Raises:
            PdiffError: memory does not suffice for one image of one network.
        """
        with enough_memory("judging", "evaluation.networks_per_task"):
            while self.images > 1 or self.networks > 1:
                with contextlib.suppress(torch.OutOfMemoryError):
                    return work()
                if self.images > FEW_IMAGES or self.networks == 1:
                    self.images //= 2
                else:
                    self.networks //= 2
            return work()

    def trained_together(self, batch_size: int, most: int | None = None) -> int:
        """Returns how many networks may be trained as one program, each on a batch of its own; one if that fails.

        Args:
            most: default: as many as fit on an accelerator, one on a CPU.
        """
        if most == 1 or (most is None and self.device.type != "cuda"):
            return 1
        frontiers = tuple(torch.stack([tensor, tensor]) for tensor in self.network.prefix(self.examples))
        with differentiable_in_vmap(self.device):
            if not self._stackable(functools.partial(torch.vmap(self.network.suffix), frontiers)):
                return 1
        if most:
            return most
        # Every tensor is kept for the backward pass, which makes a gradient of about each one's size.
        activations = 2 * sum(self._suffix_bytes_per_image()) * batch_size
        weights = 6 * self._own_bytes()  # with gradient, an optimizer's state and what its step makes
        return max(1, int(GPU_SHARE * free_bytes(self.device) / (activations + weights)))

    def _images(self) -> int:
        per_image = max(self._bytes_per_image(lambda images: self.network(*images, self.own), [self.examples]))
        if self.device.type == "cuda":
            return max(1, min(GPU_IMAGES, int(self._free_bytes() / per_image)))
        fewest, most = CPU_IMAGES
        return max(fewest, min(most, int(CPU_TENSOR_BYTES / per_image)))

    def _networks(self, wanted: int | None) -> int:
        if wanted == 1 or (wanted is None and self.device.type != "cuda"):
            return 1
        frontier = self.network.prefix(self.examples)
        with torch.no_grad():
            if not self._stackable(torch.vmap(functools.partial(self.network.suffix, frontier))):
                return 1
        if wanted:
            return wanted
        activations = max(self._suffix_bytes_per_image()) * self.images
        return max(1, int(self._free_bytes() / (activations + self._own_bytes())))

    def _stackable(self, together: Callable[[dict[str, Tensor]], Tensor]) -> bool:
        """Returns whether `together` turns stacked tensors into two networks' logits, and gradients if they are on."""
        stacked = {
            name: torch.stack([tensor, tensor]).requires_grad_(tensor.is_floating_point() or tensor.is_complex())
            for name, tensor in self.own.items()
        }
        tolerance = 1e-3 if self.precision == "float32" else 3e-2  # of the largest logit
        try:
            with autocast(self.device, self.precision):
                expected, logits = self.network(self.examples, self.own).float(), together(stacked).float()
            torch.testing.assert_close(
                logits, expected.expand_as(logits), rtol=0, atol=tolerance * float(expected.abs().max())
            )
            if logits.requires_grad:
                logits.sum().backward()
        except (torch.OutOfMemoryError, torch.AcceleratorError):  # say nothing of the network
            raise
        except Exception:  # whatever vmap meets in a network
            return False
        return True

    def _own_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.own.values())

    def _free_bytes(self) -> float:
        """Returns the memory for one of the tensors that are alive at a time, on an accelerator."""
        return GPU_SHARE * free_bytes(self.device) / LIVE_TENSORS

    def _suffix_bytes_per_image(self) -> list[float]:
        frontier = self.network.prefix(self.examples)
        return self._bytes_per_image(lambda inputs: self.network.suffix(inputs, self.own), frontier)

    def _bytes_per_image(self, run: Callable[[Sequence[Tensor]], Tensor], inputs: Sequence[Tensor]) -> list[float]:
        """Returns the sizes of the tensors on the way from inputs (B, ...), as far as they grow with the batch."""
        sizes, half = [], len(self.examples) // 2
        for count in (half, 2 * half):
            with torch.no_grad(), autocast(self.device, self.precision), _Sizes() as found:
                run([tensor[:count] for tensor in inputs])
            sizes.append(found.nbytes)
        if len(sizes[0]) != len(sizes[1]):  # a network that branches has computed other tensors: all of them count
            return [size / (2 * half) for size in sizes[1]]
        return [(large - small) / half for small, large in zip(*sizes, strict=True)]


class _Sizes(TorchDispatchMode):
    """A note of the size of every tensor that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.nbytes += [leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result
