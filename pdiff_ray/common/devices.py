"""What holds on every device: exact float32, how much memory is free, and what is said when it runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pdiff_ray.common.errors import PdiffError


def exact_float32() -> None:
    """Makes float32 mean that on GPUs too, in this process; "bfloat16" is there for speed.

    PyTorch lets convolutions round to TF32, 10 bits of a mantissa, in which a network and its parts do not agree, and
    cuDNN add gradients up in any order, so that a seed would not repeat itself.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def differentiable_in_vmap(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Attention inside of vmap keeps what its gradients need; a GPU's fast kernels, which see none there, do not."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else contextlib.nullcontext()


def free_bytes(device: torch.device) -> float:
    """Memory of a GPU that this process can take: what is free, or what is left of its share."""
    free, total = torch.cuda.mem_get_info(device)
    used, held = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    share = torch.cuda.get_per_process_memory_fraction(device.index)  # None is the current one
    return min(free + held - used, share * total - used)


@contextlib.contextmanager
def enough_memory(what: str, remedy: str) -> Iterator[None]:
    """Turns the end of a GPU's memory into a message.

    Args:
        what: is done.
        remedy: the fields that lower what it takes.

    Raises:
        PdiffError
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise PdiffError(f"{what}: {reason}; lower {remedy}, or give each process more of a GPU") from None


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision where `precision` is "bfloat16"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
