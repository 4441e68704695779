"""What a zoo offers a generator: how much its members differ, in how many directions, and how many of them count.

Definitions, sources and the measurements behind the limits: docs/method.md, "Diagnostics of a zoo".
Shapes: K members, D values, T test images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pdiff_ray.evaluation.copying import autocorrelation_time
from pdiff_ray.evaluation.similarity import mean_within, unpack_wrong
from pdiff_ray.storage.matrix import CHUNK_VALUES, Vectors, pieces
from pdiff_ray.storage.parameters import Record

LEAST_MEMBERS = 20  # below, ranks and autocorrelations say more of K than of the zoo, and are not judged


@dataclass(frozen=True)
class Measure:
    """A number that is said of a zoo.

    Attributes:
        about: what it is.
        least, most: limits of what is good; without any, the number is for information.
        percent: whether it is a fraction, shown in percent.
        advice: what to change where it is beyond a limit, by the fields of the configuration.
    """

    about: str
    least: float | None = None
    most: float | None = None
    percent: bool = False
    advice: str = ""

    def good(self, value: float | None) -> bool | None:
        """Returns whether a value is within the limits; None if it is unknown or has none."""
        if value is None or (self.least is None and self.most is None):
            return None
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


MEASURES = {  # in the order in which they are shown
    "diversity": Measure("mean distance of two members, relative to the norm of their mean", percent=True),
    "disagreement": Measure(
        "1 - IoU of the wrong test predictions of two members, on average",
        least=0.075,
        advice="The members predict nearly the same, and samples can do nothing else. Raise zoo.optimizer.lr, and where"
        " the training images are fitted, keep gradients alive with data.train_noise or data.augment.",
    ),
    "effective_rank": Measure(
        "directions in which members differ (participation ratio; a random walk of any length has 4.1)",
        least=2.0,
        advice="The members lie along a line: there is a path to learn, and no distribution. Use zoo.optimizer.name "
        "adamw with a larger zoo.optimizer.lr, or more runs (zoo.regime branches, zoo.branches).",
    ),
    "drift": Measure(
        "share of the members' variance that their order in their run explains (of a random walk: 43%)",
        most=0.67,
        percent=True,
        advice="The runs were still on their way when members were kept. Raise zoo.warmup_steps or zoo.optimizer.lr, "
        "and keep gradients alive with data.train_noise or data.augment.",
    ),
    "autocorrelation": Measure("correlation of a member with the next one of its run"),
    "independent_members": Measure(
        "how many independent draws say as much as the members (a random walk of any length: 5)",
        least=8.0,
        advice="Members repeat their neighbours, so that more of them from the same run add nothing. Take more runs "
        "(zoo.regime branches, zoo.branches); steps between members (zoo.steps_per_member) help only where runs have "
        "settled.",
    ),
    "unexplained_variance": Measure(
        "share of the members' variance that the encoder loses",
        most=0.2,
        percent=True,
        advice="Decoded members are drawn to the mean, and samples will be. Raise generator.autoencoder.steps or "
        "generator.autoencoder.latent_dim, or set generator.normalize to dimension; of a subspace, raise "
        "generator.encoder.rank or generator.encoder.variance.",
    ),
    "lost_accuracy": Measure(
        "validation accuracy of members, less that of decoded ones",
        percent=True,
        advice="The decoder costs accuracy, and no sample can be better than it. Raise generator.autoencoder.steps or "
        "generator.autoencoder.latent_dim; of a subspace, generator.encoder.rank or generator.encoder.variance.",
    ),
}


@dataclass(frozen=True)
class Finding:
    """What a measure says of a zoo.

    Attributes:
        value: None if it is unknown.
        good: whether it is within the measure's limits; None if it is not judged.
        shown: the value as text.
        advice: what to change; empty unless it is not good.
    """

    name: str
    value: float | None
    good: bool | None
    shown: str
    about: str
    advice: str

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Diagnosis:
    """All that is said of a zoo, in the order of `MEASURES`; what is unknown is left out."""

    findings: tuple[Finding, ...]

    @property
    def values(self) -> dict[str, float]:
        """The numbers by name."""
        return {finding.name: finding.value for finding in self.findings if finding.value is not None}

    @property
    def bad(self) -> tuple[Finding, ...]:
        """The findings that something can be done about."""
        return tuple(finding for finding in self.findings if finding.good is False)

    def to_list(self) -> list[dict[str, Any]]:
        """Returns the findings as JSON values."""
        return [finding.to_dict() for finding in self.findings]

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return {"findings": self.to_list()}


def diagnose(
    vectors: np.ndarray | Vectors | None,
    runs: Sequence[int],
    steps: Sequence[int | None] | None = None,
    wrong: np.ndarray | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Diagnosis:
    """Measures a zoo.

    Args:
        vectors: of the members (K, D), which need not be in memory; None leaves out what is said of them.
        runs: the training run of each member (K).
        steps: of training behind each member (K), by which those of a run are ordered; default: as they come.
        wrong: which test images each member gets wrong (K, T), bool.
        notes: of the generator that was fitted to them (`Fitting.notes`), if one was.
    """
    notes, values = notes or {}, dict[str, float | None]()
    judged = len(runs) >= LEAST_MEMBERS
    if vectors is not None and len(vectors) > 1:
        values |= _of_vectors(Vectors.of(vectors), in_runs(runs, steps))
    if wrong is not None:
        same = mean_within(wrong)
        values["disagreement"] = None if same is None else 1 - same
    values["unexplained_variance"] = notes.get("unexplained_variance")
    gate = notes.get("gate") or {}
    if gate:
        values["lost_accuracy"] = gate["validation_accuracy"] - gate["decoded_validation_accuracy"]
    findings = []
    for name, measure in MEASURES.items():
        if (value := values.get(name)) is not None:
            good = gate["passed"] if name == "lost_accuracy" else measure.good(value)
            good = good if judged or name in ("disagreement", "lost_accuracy", "unexplained_variance") else None
            shown = f"{100 * value:.3g}%" if measure.percent else f"{value:.3g}"
            advice = measure.advice if good is False else ""
            findings.append(Finding(name, value, good, shown, measure.about, advice))
    return Diagnosis(tuple(findings))


def diagnose_members(
    vectors: np.ndarray | Vectors, records: Sequence[Record], notes: Mapping[str, Any] | None = None
) -> Diagnosis:
    """Measures a zoo by its members' vectors (K, D) and rows (K), of which those of a run have its seed."""
    places = {seed: place for place, seed in enumerate(dict.fromkeys(record.seed for record in records))}
    packed = [record.wrong for record in records if record.wrong is not None]
    wrong = unpack_wrong(packed, 8 * len(packed[0])) if len(packed) == len(records) > 0 else None
    runs, steps = [places[record.seed] for record in records], [record.step for record in records]
    return diagnose(vectors, runs, steps, wrong, notes)


def in_runs(runs: Sequence[int], steps: Sequence[int | None] | None = None) -> list[np.ndarray]:
    """Returns the indices of the members of each run, in the order of their steps."""
    order = np.arange(len(runs)) if steps is None else np.argsort([step or 0 for step in steps], kind="stable")
    of = np.asarray(runs)[order]
    return [order[of == run] for run in np.unique(of)]


def _of_vectors(vectors: Vectors, members: Sequence[np.ndarray]) -> dict[str, float | None]:
    moved, scaled, norm = _products(vectors)
    squares = np.diag(moved)[:, None] + np.diag(moved)[None] - 2 * moved
    distance = np.sqrt(squares.clip(0))[np.triu_indices(len(vectors), 1)].mean()
    found: dict[str, float | None] = {"diversity": float(distance / norm) if norm else None}
    if not np.trace(scaled):  # all members are the same
        return found
    found |= {"effective_rank": effective_rank(scaled), "drift": drift(scaled, members)}
    neighbours = sum(len(run) - 1 for run in members)
    if neighbours:
        found["autocorrelation"] = autocorrelations(scaled, members)[1] * len(vectors) / neighbours
    found["independent_members"] = len(vectors) / autocorrelation_time(autocorrelations(scaled, members).tolist())
    return found


def _products(vectors: Vectors) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns scalar products (K, K) of centred members, and of those with each value at standard deviation 1.

    Returns:
        Both, and the norm of the mean member.
    """
    count = len(vectors)
    moved, scaled, norm = np.zeros((count, count)), np.zeros((count, count)), 0.0
    for columns in pieces(vectors, values=CHUNK_VALUES):
        piece = vectors.columns(columns.start, columns.stop).cpu().numpy().astype(np.float64)
        mean = piece.mean(0)
        piece -= mean
        norm += float(np.square(mean).sum())
        moved += piece @ piece.T
        std = piece.std(0)
        piece /= np.where(std > 1e-7 * np.abs(mean), std, np.inf)  # what rounding errors move has not moved
        scaled += piece @ piece.T
    return moved, scaled, norm**0.5


def effective_rank(products: np.ndarray) -> float:
    """Returns the participation ratio of the covariance's eigenvalues, (sum l)^2 / sum l^2, from 1 to K - 1.

    Args:
        products: scalar products (K, K) of centred vectors, whose eigenvalues other than 0 are K times those.
    """
    return float(np.trace(products) ** 2 / np.square(products).sum())


def drift(products: np.ndarray, runs: Sequence[np.ndarray]) -> float:
    """Returns the share of all variance that the order of members within their runs explains, linearly.

    Args:
        products: scalar products (K, K) of centred vectors.
        runs: indices of each run's members, in order.
    """
    explained = 0.0
    for members in runs:
        order = np.arange(len(members)) - (len(members) - 1) / 2
        if len(members) > 1:
            explained += order @ products[np.ix_(members, members)] @ order / (order @ order)
    return float(explained / np.trace(products))


def autocorrelations(products: np.ndarray, runs: Sequence[np.ndarray]) -> np.ndarray:
    """Returns for each lag the sum of products of members so far apart in a run, over the sum of squares.

    The mean is that of all runs, so that runs that stay apart count as correlated.
    """
    sums = np.zeros(max(map(len, runs)))
    for members in runs:
        own = products[np.ix_(members, members)]
        sums[: len(members)] += [np.trace(own, lag) for lag in range(len(members))]
    return sums / sums[0]
