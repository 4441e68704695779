"""Devices: threads, exact float32, mixed precision, free memory, and the message when memory runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from threadpoolctl import threadpool_limits
from torch.nn.attention import SDPBackend, sdpa_kernel

from pdiff_ray.common.errors import PdiffError


def limit_threads(threads: int) -> None:
    """Limits this process to so many threads, in PyTorch and in NumPy.

    Sums depend on it in their last digits, so that the same work takes the same number wherever it runs.
    """
    torch.set_num_threads(threads)
    threadpool_limits(threads, user_api="blas")


def one_thread() -> contextlib.AbstractContextManager[object]:
    """Returns a context in which scikit-learn computes with one thread.

    By itself it takes all cores, whose threads wait for each other without pause: small work takes twice as long where
    something else runs on one of them, or forty times.
    """
    return threadpool_limits(1)


def exact_float32() -> None:
    """Makes GPUs compute float32 exactly and repeatably, in this process.

    By default, PyTorch lets convolutions round to TF32, whose mantissa of 10 bits makes the results of a network differ
    from those of its parts, and lets cuDNN add up gradients in any order, so that a seed does not determine the result.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def differentiable_in_vmap(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which attention inside of vmap can be differentiated.

    A GPU's fast kernels do not see that gradients are needed inside of vmap, and do not keep what these need.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else contextlib.nullcontext()


def describe_devices() -> str:
    """Returns the names of this machine's GPUs; empty if there is none.

    Raises:
        PdiffError: there are some that cannot be used.
    """
    count = torch.cuda.device_count()
    if count and not torch.cuda.is_available():
        raise PdiffError(f"{count} GPUs that CUDA {torch.version.cuda} cannot use; update their driver")
    return ", ".join(torch.cuda.get_device_name(index) for index in range(count))


def free_bytes(device: torch.device) -> float:
    """Returns how many bytes of a GPU's memory this process can still use, within its share of that memory."""
    free, total = torch.cuda.mem_get_info(device)
    used, held = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    share = torch.cuda.get_per_process_memory_fraction(device.index)  # None stands for the current GPU
    return min(free + held - used, share * total - used)


@contextlib.contextmanager
def enough_memory(what: str, remedy: str) -> Iterator[None]:
    """Turns the error of a GPU that runs out of memory into a message.

    Args:
        what: names the work.
        remedy: names the fields that lower the memory that the work takes.

    Raises:
        PdiffError: the GPU has run out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise PdiffError(f"{what}: {reason}; lower {remedy}, or give each process more of a GPU") from None


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns a context of mixed precision, which does nothing unless `precision` is "bfloat16"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
