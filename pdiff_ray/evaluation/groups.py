"""The groups of networks that are judged side by side: originals, baselines and generated networks.

A new baseline is a class and its line in `GROUPS`; the user's own are named in `evaluation.baselines`.
Shapes: K members that the generator has learned from, D values each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pdiff_ray.common.errors import ConfigError
from pdiff_ray.common.registry import imported
from pdiff_ray.config.schema import Evaluation, Experiment
from pdiff_ray.networks.subset import Subset
from pdiff_ray.storage.matrix import Vectors
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
        vectors: (K, D) that the generator has learned from; they need not be in memory.
        member: gives the vector (D,) of any member of the zoo by its id.
        sample: gives the vector (D,) of the generated network with a number.
        draw: gives the vector (D,) that a simple generator with these settings draws, fitted to `vectors`, with a seed.
        encode, decode: gives the latents (latent,) of a vector (D,), and the other way round, by the generator.
        num_latents: gives the number of values that a latent has.
        train: gives the vector (D,) that a vector becomes in some training steps of the zoo's kind, with a seed.
    """

    experiment: Experiment
    subset: Subset
    vectors: Vectors
    member: Callable[[int], np.ndarray]
    sample: Callable[[int], np.ndarray]
    draw: Callable[[Mapping[str, Any], int], np.ndarray]
    encode: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]
    num_latents: Callable[[], int]
    train: Callable[[np.ndarray, int, int], np.ndarray]

    @functools.cached_property
    def members(self) -> np.ndarray:
        """The vectors (K, D), all in memory."""
        return self.vectors.all().cpu().numpy()


class Group:
    """Networks that are made in one way; a baseline is a subclass with a name, `recipes` and `vector`.

    Attributes:
        name: of the group in rows, tables and metrics.
        trained: whether a network takes training: each is then a task of its own, and comes first.
        colour, marker, size: of its points in figures.
        variants: colours and markers of its networks by sigma, used over again if there are more sigmas.
    """

    name: str
    trained: bool = False
    colour: str = "#CC79A7"
    marker: str = "D"
    size: int = 18
    variants: tuple[tuple[str, str], ...] = ()

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


class Members(Group):
    """Members of the zoo, judged when they were made; an imported zoo's are judged with the others."""

    def __init__(self, name: str, colour: str, marker: str) -> None:
        self.name, self.colour, self.marker = name, colour, marker

    def recipes(self, experiment: Experiment) -> Iterable[Recipe]:
        return ()  # their rows are the zoo's

    def vector(self, record: Record, material: Material) -> np.ndarray:
        return material.member(record.id)


class Ensemble(Group):
    """The average of the members' parameters."""

    name, colour, marker, size = "ensemble", "#000000", "*", 90

    def recipes(self, experiment: Experiment) -> Iterable[Recipe]:
        return [Recipe()]

    def vector(self, record: Record, material: Material) -> np.ndarray:
        return np.concatenate([values.cpu().numpy().mean(0) for _, values in material.vectors.chunks()])


class Drawn(Group):
    """Networks that a simple generator draws from the members.

    Args:
        settings: of the generator, as in the section `generator`.
        title: of its line.
    """

    def __init__(self, name: str, settings: Mapping[str, Any], title: str, colour: str, marker: str) -> None:
        self.name, self.settings, self.colour, self.marker = name, settings, colour, marker
        self._title = title

    def recipes(self, experiment: Experiment) -> Iterable[Recipe]:
        return [Recipe()] * baseline_networks(experiment)

    def vector(self, record: Record, material: Material) -> np.ndarray:
        assert record.seed is not None
        return material.draw(self.settings, record.seed)

    def title(self, record: Record) -> str:
        return self._title


class NoiseAdded(Group):
    """Members with Gaussian noise, its sigma in standard deviations of each tensor's values."""

    name, colour, marker = "noise_added", "#999999", "x"
    variants = (("#999999", "+"), ("#666666", "x"), ("#333333", "1"))

    def recipes(self, experiment: Experiment) -> Iterable[Recipe]:
        sigmas = experiment.evaluation.noise_sigmas
        return [Recipe(sigma=sigma) for sigma in sigmas for _ in range(baseline_networks(experiment))]

    def vector(self, record: Record, material: Material) -> np.ndarray:
        assert record.seed is not None
        return material.draw({"name": "noise", "sigma": record.sigma}, record.seed)

    def title(self, record: Record) -> str:
        return f"noise-added {record.sigma:g}"


class Decoded(Group):
    """Members, encoded and decoded again by the generator: what its autoencoder alone makes of them."""

    name, colour, marker = "decoded", "#E69F00", "p"

    def recipes(self, experiment: Experiment) -> Iterable[Recipe]:
        if not experiment.generator.lossy:
            return []
        return [Recipe(parent) for parent in spread_over(experiment.split.learned, baseline_networks(experiment))]

    def vector(self, record: Record, material: Material) -> np.ndarray:
        assert record.parent is not None
        return material.decode(material.encode(material.member(record.parent)))


class Undiffused(Group):
    """Standard normal latents, decoded by the generator: what it draws without a diffusion model."""

    name, colour, marker = "autoencoder", "#E69F00", "h"

    def recipes(self, experiment: Experiment) -> Iterable[Recipe]:
        return [Recipe()] * (baseline_networks(experiment) if experiment.generator.lossy else 0)

    def vector(self, record: Record, material: Material) -> np.ndarray:
        latents = np.random.default_rng(record.seed).standard_normal(material.num_latents())
        return material.decode(latents.astype(np.float32))

    def title(self, record: Record) -> str:
        return "autoencoder alone"


class FineTuned(Group):
    """Members trained a little further."""

    name, colour, marker = "fine_tuned", "#009E73", "s"
    trained = True

    def recipes(self, experiment: Experiment) -> Iterable[Recipe]:
        wanted = experiment.evaluation.fine_tuned_networks
        return [Recipe(parent) for parent in spread_over(experiment.split.learned, wanted)]

    def vector(self, record: Record, material: Material) -> np.ndarray:
        assert record.seed is not None
        assert record.parent is not None
        steps = material.experiment.evaluation.fine_tuned_steps
        return material.train(material.member(record.parent), steps, record.seed)


class Generated(Group):
    """The samples of the generator."""

    name, colour, marker = "generated", "#D55E00", "^"

    def recipes(self, experiment: Experiment) -> Iterable[Recipe]:
        return [Recipe(parent=sample) for sample in range(experiment.sampling.samples)]

    def vector(self, record: Record, material: Material) -> np.ndarray:
        assert record.parent is not None
        return material.sample(record.parent)


# In the order of their numbers and lines; networks are judged from the last group to the first.
_GROUPS: tuple[Group, ...] = (
    Members("original", "#0072B2", "o"),
    Members("held_out", "#56B4E9", "o"),
    Members("second_run", "#009E73", "o"),
    Ensemble(),
    Drawn("average_2", {"name": "average", "count": 2}, "average of 2", "#000000", "$2$"),
    Drawn("average_4", {"name": "average", "count": 4}, "average of 4", "#000000", "$4$"),
    Drawn("average_16", {"name": "average", "count": 16}, "average of 16", "#000000", "$16$"),
    Drawn("interpolation", {"name": "interpolation"}, "between two", "#000000", "D"),
    NoiseAdded(),
    FineTuned(),
    Drawn("gaussian_diagonal", {"name": "gaussian_diagonal"}, "diagonal Gaussian", "#CC79A7", "v"),
    Drawn("gaussian", {"name": "gaussian"}, "full Gaussian", "#CC79A7", "P"),
    Drawn("gaussian_pca", {"name": "gaussian_pca"}, "low-rank Gaussian", "#CC79A7", "X"),
    Undiffused(),
    Decoded(),
    Generated(),
)
GROUPS: dict[str, Group] = {group.name: group for group in _GROUPS}


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
        if kind.name.replace("-", "_") in {name.replace("-", "_") for name in found}:  # tables have "held-out"
            raise ConfigError(f"evaluation.baselines: {path} has the name {kind.name!r} of another group; change it")
        found[kind.name] = kind()
    return found


def baseline_networks(experiment: Experiment) -> int:
    """Returns the number of networks of each baseline that is drawn."""
    wanted = experiment.evaluation.baseline_networks
    return experiment.sampling.samples if wanted is None else wanted


def spread_over(ids: Sequence[int], wanted: int) -> list[int]:
    """Returns so many of some ids, evenly apart; all if there are fewer."""
    picks = min(wanted, len(ids))
    return [ids[index * len(ids) // picks] for index in range(picks)]
