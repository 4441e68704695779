"""Neural network diffusion as a Ray system: zoos of networks, generators of weights, and their evaluation.

The names below are the Python API (`pdiff_ray.api`); they are imported when they are first used, which takes seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pdiff_ray.common.errors import ConfigError, PdiffError, StorageError

if TYPE_CHECKING:
    from pdiff_ray.api import (
        Experiment,
        FittedGenerator,
        Networks,
        Plan,
        Result,
        SweepFile,
        SweepResult,
        fit,
        judge,
        load_experiment,
        load_sweep,
        open_networks,
        open_result,
        plan,
        run,
    )

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "Experiment",
    "FittedGenerator",
    "Networks",
    "PdiffError",
    "Plan",
    "Result",
    "StorageError",
    "SweepFile",
    "SweepResult",
    "fit",
    "judge",
    "load_experiment",
    "load_sweep",
    "open_networks",
    "open_result",
    "plan",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pdiff_ray import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
