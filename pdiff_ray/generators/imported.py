"""Samples that another tool made: a generator that is brought in, not fitted."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.config import schema
from pdiff_ray.generators.baselines import Baseline
from pdiff_ray.generators.interface import Fitting, State
from pdiff_ray.networks.subset import Subset


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
    """Vectors (n, D) in their order. It keeps members beside them for the view on both."""

    Settings = ImportedSettings

    def __init__(self, settings: ImportedSettings, subset: Subset) -> None:
        super().__init__(settings, subset)
        self.vectors = torch.zeros(0, subset.size)

    def fit(self, vectors: Tensor, fitting: Fitting) -> None:
        self.settings.check_fitting()

    def take(self, vectors: Tensor, members: Tensor) -> None:
        """Takes the samples (n, D), and the members (K, D) that they are seen beside."""
        super().fit(members, Fitting(members.device, 0))
        self.vectors = vectors

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        """Returns the first vectors (count, D)."""
        if count > len(self.vectors):
            raise ConfigError(
                f"sampling.samples is {count}, but {self.settings.label!r} (generator.label) has {len(self.vectors)}; "
                "lower the first"
            )
        return self.vectors[:count].to(self.mean.device)

    def state(self) -> State:
        return {**super().state(), "vectors": self.vectors}

    def load_state(self, state: State) -> None:
        super().load_state(state)
        self.vectors = state["vectors"]
