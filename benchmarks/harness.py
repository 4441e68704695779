"""Paired timing of two ways that give the same result."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pdiff_ray.storage.artifacts import versions

Work = Callable[[], Any]


@dataclass(frozen=True)
class Result:
    """One comparison. Seconds, or what has another unit, are medians; the ratio is that of other / ours over pairs."""

    name: str
    what: str
    against: str
    ours_s: float
    other_s: float
    ratio: float
    spread: tuple[float, float]  # smallest and largest ratio
    n: int  # paired runs
    target: float | None = None  # the ratio to reach
    limit: float | None = None  # the ratio of floating-point operations (of matrix products and convolutions)
    peak_mib: float | None = None  # memory that ours takes beyond what was there before
    note: str = ""
    unit: str = "s"
    load: float = 0.0  # processes that wanted a core in the last minute
    hardware: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    name: str, what: str, ours: Work, against: str, other: Work, *, n: int = 3, other_scale: float = 1.0, **fields: Any
) -> Result:
    """Times `ours` and `other` in turn, n times, after a warm-up of each.

    Args:
        other_scale: the other way does this fraction of the work, and its time is scaled up; say so in `note`.
        fields: further ones of `Result`.
    """
    ours()
    other()
    pairs = [(seconds(ours), seconds(other) / other_scale) for _ in range(n)]
    return result(name, what, against, pairs, **fields)


def result(name: str, what: str, against: str, pairs: Sequence[tuple[float, float]], **fields: Any) -> Result:
    """The result of paired times or other quantities, ours and other.

    Args:
        fields: further ones of `Result`.
    """
    ratios = [b / a for a, b in pairs]
    return Result(
        name=name,
        what=what,
        against=against,
        ours_s=statistics.median(a for a, _ in pairs),
        other_s=statistics.median(b for _, b in pairs),
        ratio=statistics.median(ratios),
        spread=(min(ratios), max(ratios)),
        n=len(pairs),
        load=round(os.getloadavg()[0], 1),
        hardware=hardware(),
        versions=versions(),
        **fields,
    )


def seconds(work: Work) -> float:
    synchronize()  # what was begun before is not counted
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matrix_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of matrix products on the device: what its arithmetic can be compared with."""
    edge = 1024 if device.type == "cpu" else 8192
    matrix = torch.randn(edge, edge, device=device).to(dtype)
    work = lambda: matrix @ matrix  # noqa: E731
    return 2 * edge**3 / statistics.median([seconds(work) for _ in range(12)][2:])


def peak_mib(work: Work) -> float | None:
    """Memory that `work` takes at most, beyond what was there before; None where the system does not say."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before does not hide what is taken now
        Path("/proc/self/clear_refs").write_text("5")  # the highest memory so far is what is there now
        before = _status_kib("VmRSS")
    except (OSError, AttributeError):
        return None
    work()
    return (_status_kib("VmHWM") - before) / 2**10


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def hardware() -> str:
    """Processor, threads in use, and the GPU if there is one."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as file:
        processor = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}"
