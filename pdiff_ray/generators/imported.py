"""Samples that another tool made: a generator that is brought in, not fitted."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config import schema
from pdiff_ray.generators.baselines import Baseline
from pdiff_ray.generators.interface import Fitting, State
from pdiff_ray.networks.subset import Subset
from pdiff_ray.storage.matrix import Vectors


class ImportedSettings(schema.Generator):
    """The section `generator` where its name is imported."""

    name: schema.GeneratorName = "imported"
    label: str = Field(
        min_length=1, description="of samples that `pdiff import --as samples` brought in; none is drawn"
    )

    def check_fitting(self) -> None:
        raise ConfigError(
            f"generator.label: no samples {self.label!r} have been brought in for this zoo and split; do so with "
            "`pdiff import FOLDER FILE --as samples`"
        )


class Imported(Baseline):
    """Vectors (n, D) in their order, and the members beside them for the view on both."""

    Settings = ImportedSettings

    def __init__(self, settings: ImportedSettings, subset: Subset) -> None:
        super().__init__(settings, subset)
        self.vectors = torch.zeros(0, subset.size)

    def fit(self, vectors: Vectors | Tensor, fitting: Fitting) -> None:
        self.settings.check_fitting()

    def draw(self, count: int, sampling: schema.Sampling, device: torch.device) -> Iterator[Tensor]:
        """Yields the first vectors (count, D)."""
        if count > len(self.vectors):
            raise ConfigError(
                f"sampling.samples is {count}, but {self.settings.label!r} (generator.label) has {len(self.vectors)}; "
                "lower the first"
            )
        yield self.vectors[:count].to(device)

    def state(self) -> State:
        return {"vectors": self.vectors}

    def load_state(self, state: State, members: Vectors | Tensor) -> None:
        super().load_state(state, members)
        self.vectors = state["vectors"]
