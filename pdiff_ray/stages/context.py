"""Where a stage runs, and what stages of one process hand on to each other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdiff_ray.common.progress import Progress, silent

if TYPE_CHECKING:
    import torch

    from pdiff_ray.evaluation.judge import Judge

LEAVING_S = 1.0  # between the states that are saved on a machine that will be gone in a moment


@dataclass(frozen=True)
class Context:
    """Where a stage runs.

    Attributes:
        cache: folder of this node for decoded images.
        rank, world: this worker among those that build the stage together (torch.distributed where world > 1).
        checkpoint_s: seconds between the states that interrupted work resumes from, which bound what is lost.
        leaving: tells whether this machine will be gone in a moment, so that there is no later.
        judges: the one that a stage has made, for the next one (`judging.base_judge`).
    """

    device: torch.device
    cache: Path
    rank: int = 0
    world: int = 1
    progress: Progress = field(default=silent, compare=False)
    checkpoint_s: float = 10.0
    leaving: Callable[[], bool] = field(default=lambda: False, compare=False)
    judges: dict[Any, Judge] = field(default_factory=dict, compare=False, repr=False)

    def due(self, saved: float) -> bool:
        """Tells whether work whose state was saved at a time (of `time.monotonic`) is to be saved now."""
        return time.monotonic() - saved >= (min(LEAVING_S, self.checkpoint_s) if self.leaving() else self.checkpoint_s)
