"""The groups of networks that are judged side by side: originals, baselines and generated networks.

A new baseline is a class and its line in `GROUPS`; the user's own are named in `evaluation.baselines`.
Shapes: K members that the generator has learned from, D values each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.common.registry import imported
from pdiff_ray.config.schema import Evaluation, Experiment
from pdiff_ray.networks.subset import Subset
from pdiff_ray.storage.parameters import Record, is_group


@dataclass(frozen=True)
class Recipe:
    """What tells a network from the others of its group.

    Attributes:
        parent: number of the member, or of the sample, that it is made from.
        sigma: of the noise that is added to it.
    """

    parent: int | None = None
    sigma: float | None = None


@dataclass(frozen=True)
class Material:
    """What the vectors of networks are made from.

    Attributes:
        experiment: whose networks they are.
        subset: the tensors of a vector.
        members: vectors (K, D) that the generator has learned from.
        sample: gives the vector (D,) of the generated network with a number.
        train: gives the vector (D,) that a vector becomes in some training steps of the zoo's kind, with a seed.
    """

    experiment: Experiment
    subset: Subset
    members: np.ndarray
    sample: Callable[[int], np.ndarray]
    train: Callable[[np.ndarray, int, int], np.ndarray]


class Group:
    """Networks that are made in one way; a baseline is a subclass with a name, `recipes` and `vector`.

    Attributes:
        name: of the group in rows, tables and metrics.
        trained: whether a network takes training: each is then a task of its own, and comes first.
        colour, marker, size: of its points in figures.
        variants: colours and markers of its networks by sigma, used over again if there are more sigmas.
    """

    name: ClassVar[str]
    trained: ClassVar[bool] = False
    colour: ClassVar[str] = "#CC79A7"
    marker: ClassVar[str] = "D"
    size: ClassVar[int] = 18
    variants: ClassVar[tuple[tuple[str, str], ...]] = ()

    def recipes(self, experiment: Experiment) -> Iterable[Recipe]:
        """Returns a recipe for each network of the group."""
        raise NotImplementedError

    def vector(self, record: Record, material: Material) -> np.ndarray:
        """Returns the parameters (D,) of a network.

        Args:
            record: the network's row: its recipe, and a seed of its own.
        """
        raise NotImplementedError

    def title(self, record: Record) -> str:
        """Returns the name that a network's line in tables and figures has."""
        return self.name.replace("_", "-")

    def style(self, position: int) -> tuple[str, str]:
        """Returns colour and marker of the networks with a sigma at a position among all."""
        return self.variants[position % len(self.variants)] if self.variants else (self.colour, self.marker)


class Original(Group):
    """The zoo's members, judged when they were made; an imported zoo's are judged with the others."""

    name, colour, marker = "original", "#0072B2", "o"

    def recipes(self, experiment: Experiment) -> Iterable[Recipe]:
        return ()  # their rows are the zoo's

    def vector(self, record: Record, material: Material) -> np.ndarray:
        return material.members[record.id]


class Ensemble(Group):
    """The average of the members' parameters."""

    name, colour, marker, size = "ensemble", "#000000", "*", 90

    def recipes(self, experiment: Experiment) -> Iterable[Recipe]:
        return [Recipe()]

    def vector(self, record: Record, material: Material) -> np.ndarray:
        return material.members.mean(0)


class NoiseAdded(Group):
    """Members with Gaussian noise, its sigma in standard deviations of each tensor's values."""

    name, colour, marker = "noise_added", "#999999", "x"
    variants = (("#999999", "+"), ("#666666", "x"), ("#333333", "1"))

    def recipes(self, experiment: Experiment) -> Iterable[Recipe]:
        config = experiment.evaluation
        parents = spread_over(experiment.num_members, config.noise_networks)
        return [Recipe(parent, sigma) for sigma in config.noise_sigmas for parent in parents]

    def vector(self, record: Record, material: Material) -> np.ndarray:
        parent = material.members[record.parent]
        noise = np.random.default_rng(record.seed).standard_normal(len(parent), dtype=np.float32)
        for entry in material.subset.entries:
            piece = slice(entry.offset, entry.offset + entry.size)
            noise[piece] *= (record.sigma or 0.0) * parent[piece].std()
        return parent + noise

    def title(self, record: Record) -> str:
        return f"noise-added {record.sigma:g}"


class FineTuned(Group):
    """Members trained a little further."""

    name, colour, marker = "fine_tuned", "#009E73", "s"
    trained = True

    def recipes(self, experiment: Experiment) -> Iterable[Recipe]:
        count, wanted = experiment.num_members, experiment.evaluation.fine_tuned_networks
        return [Recipe(parent) for parent in spread_over(count, min(wanted, count))]

    def vector(self, record: Record, material: Material) -> np.ndarray:
        assert record.seed is not None
        steps = material.experiment.evaluation.fine_tuned_steps
        return material.train(material.members[record.parent], steps, record.seed)


class Generated(Group):
    """The samples of the generator."""

    name, colour, marker = "generated", "#D55E00", "^"

    def recipes(self, experiment: Experiment) -> Iterable[Recipe]:
        return [Recipe(parent=sample) for sample in range(experiment.sampling.samples)]

    def vector(self, record: Record, material: Material) -> np.ndarray:
        assert record.parent is not None
        return material.sample(record.parent)


# In the order of their numbers and lines; networks are judged from the last group to the first.
GROUPS: dict[str, Group] = {
    group.name: group for group in (Original(), Ensemble(), NoiseAdded(), FineTuned(), Generated())
}


def groups_of(config: Evaluation) -> Mapping[str, Group]:
    """Returns all groups of an evaluation by name, the user's own baselines last.

    Raises:
        ConfigError: a baseline cannot be imported, is no `Group`, or has the name of another one.
    """
    found = dict(GROUPS)
    for path in config.baselines:
        kind = imported(path, "evaluation.baselines")
        if not (isinstance(kind, type) and issubclass(kind, Group)) or not getattr(kind, "name", None):
            raise ConfigError(
                f"evaluation.baselines: {path} is no class of a baseline; derive one from "
                "pdiff_ray.evaluation.groups.Group and give it a name"
            )
        if not is_group(kind.name):
            raise ConfigError(
                f"evaluation.baselines: {path} has the name {kind.name!r}; a name has letters, digits, '_' and '-'"
            )
        if kind.name in found:
            raise ConfigError(f"evaluation.baselines: {path} has the name {kind.name!r} of another group; change it")
        found[kind.name] = kind()
    return found


def spread_over(count: int, picks: int) -> list[int]:
    """Returns so many numbers below `count`, evenly apart."""
    return [index * count // picks for index in range(picks)]
