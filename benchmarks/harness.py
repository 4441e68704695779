"""Paired timing of two ways that give the same result."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from pdiff_ray.artifacts import versions


@dataclass(frozen=True)
class Result:
    """One comparison. Times are medians in seconds; the ratio is the median of other / ours over paired runs."""

    name: str
    what: str
    against: str
    ours_s: float
    other_s: float
    ratio: float
    spread: tuple[float, float]  # smallest and largest ratio
    n: int  # paired runs
    note: str = ""
    hardware: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    name: str,
    what: str,
    ours: Callable[[], Any],
    against: str,
    other: Callable[[], Any],
    *,
    n: int = 3,
    other_scale: float = 1.0,
    note: str = "",
) -> Result:
    """Times `ours` and `other` in turn, n times, after a warm-up of each.

    Args:
        other_scale: the other way does this fraction of the work, and its time is scaled up; say so in `note`.
    """
    ours()
    other()
    pairs = [(_seconds(ours), _seconds(other) / other_scale) for _ in range(n)]
    ratios = [b / a for a, b in pairs]
    return Result(
        name=name,
        what=what,
        against=against,
        ours_s=statistics.median(a for a, _ in pairs),
        other_s=statistics.median(b for _, b in pairs),
        ratio=statistics.median(ratios),
        spread=(min(ratios), max(ratios)),
        n=n,
        note=note,
        hardware=hardware(),
        versions=versions(),
    )


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def hardware() -> str:
    """Processor, threads in use, and the GPU if there is one."""
    import torch

    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            processor = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}"
