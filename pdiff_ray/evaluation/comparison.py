"""Whether generated networks are more accurate than others, with intervals over networks and over test images.

Shapes: n networks of a group, T test images, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from pdiff_ray.common.seeds import derive_seed
from pdiff_ray.evaluation.similarity import unpack_wrong

RESAMPLES = 2000
LEVEL = 0.95
Z = 1.959964  # the standard normal's quantile, two-sided
EQUAL, EQUAL_OF_ERROR = 0.005, 0.1  # a difference below half a point and a tenth of the error is none
CHUNK_VALUES = 2**21

Word = Literal["better", "equal", "undecided", "worse"]
WORDS: Mapping[Word, str] = {
    "better": "better than",
    "equal": "equal to",
    "undecided": "not told apart from",
    "worse": "worse than",
}
COUNTED = {"networks": "samples", "images": "test images"}


@dataclass(frozen=True)
class Interval:
    """A test accuracy, or a difference of two, as a fraction, with its 95 % interval; n networks of the group."""

    networks: int
    estimate: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Difference(Interval):
    """Mean test accuracy of the generated networks minus that of a group of n networks.

    Attributes:
        word: "better" or "worse" if the interval is on one side of 0; "equal" if it holds 0 and nothing beyond half a
            point and a tenth of the group's error; else "undecided".
        limit: of what there are too few, mostly: networks or images.
        needed: of undecided ones, how many networks in each group that is drawn, or test images, or both together,
            would decide whatever comes out.
    """

    word: Word
    limit: Literal["networks", "images"]
    needed: Mapping[str, int]

    @property
    def points(self) -> str:
        """The difference with its interval, such as "0.50 [0.09, 0.92] points below"."""
        sign = -1 if self.estimate < 0 else 1
        low, high = sorted((sign * self.lower, sign * self.upper))
        numbers = f"{100 * abs(self.estimate):.2f} [{100 * low:.2f}, {100 * high:.2f}]"
        return f"{numbers} points {'below' if sign < 0 else 'above'}"


@dataclass(frozen=True)
class Comparison:
    """Accuracies of groups of networks, and how far the generated ones differ from each other group.

    Attributes:
        networks, images: that were judged, of the generated group and of the test set.
        best: the baseline with the highest mean accuracy on validation images, as test labels choose nothing; None
            without baselines.
        means: of every group.
        differences: by the other group.
    """

    generated: str
    networks: int
    images: int
    best: str | None
    means: Mapping[str, Interval]
    differences: Mapping[str, Difference]

    @property
    def word(self) -> Word | None:
        """What the generated networks are, beside the best baseline."""
        return self.differences[self.best].word if self.best else None

    @property
    def text(self) -> str:
        """The comparison with the best baseline, and with the originals, in a sentence."""
        if self.best is None:
            return "There is no baseline to compare the samples with."
        found = self.differences[self.best]
        parts = [f"{found.points} it"]
        if "original" in self.differences and self.best != "original":
            parts.append(f"{self.differences['original'].points} the originals")
        text = (
            f"{WORDS[found.word]} {self.best}, the best simple baseline on validation images: {', '.join(parts)} "
            f"(95 % intervals; {self.networks} samples against {found.networks}, {self.images:,} test images)."
        )
        if needed := " and ".join(f"{count:,} {COUNTED[kind]}" for kind, count in found.needed.items()):
            text += f" {needed} would decide."
        return text

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return {**asdict(self), "word": self.word, "text": self.text}


def compare(
    wrong: Mapping[str, Sequence[bytes]],
    num_images: int,
    validation: Mapping[str, Sequence[float]],
    against: Sequence[str],
    generated: str = "generated",
    seed: int = 0,
) -> Comparison:
    """Compares mean test accuracies of groups, by a bootstrap over networks and over test images.

    Both are resampled: the networks of each group for itself, the images once for all groups, which have all seen the
    same ones. Of a group of one network, such as an average, images alone are: its interval holds for that network.
    What an interval does not cover is in docs/method.md.

    Args:
        wrong: of each group, what `np.packbits` made of each network's wrong test predictions.
        num_images: T, of the test set.
        validation: validation accuracies of each network of the groups in `against`.
        against: the simple baselines, of which the best one is named; the generated networks are compared with all
            groups in any case.
    """
    groups = {name: _Group.of(packed, num_images) for name, packed in wrong.items()}
    drawn = _drawn(groups, num_images, seed)
    means = {name: _contrast({name: 1}, groups, drawn)[0] for name in groups}
    differences = {name: _difference(generated, name, groups, drawn) for name in groups if name != generated}
    best = max(against, key=lambda name: float(np.mean(validation[name])), default=None)
    return Comparison(generated, len(wrong[generated]), num_images, best, means, differences)


@dataclass(frozen=True)
class _Group:
    """Accuracy of each network (n,), share of networks that get an image right (T,), and the interaction's variance.

    The model is y = mean + network + image + interaction, y being 1 for a right prediction and 0 for a wrong one.
    """

    networks: np.ndarray
    images: np.ndarray
    interaction: float  # 0 of one network: it cannot be told from the images' part

    @classmethod
    def of(cls, packed: Sequence[bytes], num_images: int) -> _Group:
        networks, images = np.empty(len(packed)), np.zeros(num_images)
        step = max(1, CHUNK_VALUES // num_images)
        for start in range(0, len(packed), step):
            right = ~unpack_wrong(packed[start : start + step], num_images)
            networks[start : start + step] = right.mean(1)
            images += right.sum(0)
        images /= len(packed)
        n, t, mean = len(packed), num_images, networks.mean()
        squares = n * t * mean - t * np.square(networks).sum() - n * np.square(images).sum() + n * t * mean**2
        interaction = squares / max(1, (n - 1) * (t - 1)) if n > 1 else 0.0
        return cls(networks, images, max(0.0, float(interaction)))

    @property
    def variance(self) -> float:
        """Of the group's mean, as its networks vary."""
        n = len(self.networks)
        return float(self.networks.var(ddof=1)) / n if n > 1 else 0.0


def _drawn(groups: Mapping[str, _Group], num_images: int, seed: int) -> dict[str, np.ndarray]:
    """Returns how far each resample's mean accuracy is from the group's (B,).

    A mean is linear in the resample's weights of the networks, and in those of the images; the product of the two
    deviations is left out, as the interaction is in both of them already (Owen, 2007: the pigeonhole bootstrap counts
    it three times). So a resample takes sums over n and over T numbers, instead of over all predictions.
    """
    names = list(groups)
    shares = np.stack([groups[name].images for name in names], 1)
    random, step = np.random.default_rng(derive_seed(seed, "images")), max(1, CHUNK_VALUES // num_images)
    by_image = []
    for start in range(0, RESAMPLES, step):
        count = min(step, RESAMPLES - start)
        picks = random.integers(0, num_images, (count, num_images)) + num_images * np.arange(count)[:, None]
        weights = np.bincount(picks.ravel(), minlength=count * num_images).reshape(count, num_images)
        by_image.append(weights @ shares / num_images - shares.mean(0))
    drawn = dict(zip(names, np.concatenate(by_image).T, strict=True))
    for name, group in groups.items():
        # Seeded by the group's name: one more group changes nothing of the others.
        random, n = np.random.default_rng(derive_seed(seed, "networks", name)), len(group.networks)
        picks = random.integers(0, n, (RESAMPLES, n))
        drawn[name] = drawn[name] + group.networks[picks].mean(1) - group.networks.mean()
    return drawn


@dataclass(frozen=True)
class _Parts:
    """The variance of an estimate: by networks, by images, and by their interaction."""

    networks: float
    images: float
    interaction: float


def _contrast(
    signs: Mapping[str, int], groups: Mapping[str, _Group], drawn: Mapping[str, np.ndarray]
) -> tuple[Interval, _Parts]:
    """Returns the sum of some groups' means, each with its sign, and what makes it uncertain.

    The interval is the bootstrap's percentiles, stretched as Hesterberg (2015) advises: to the variance's unbiased
    estimate (Searle, Casella and McCulloch, 1992), and to Student's quantile, its degrees of freedom Satterthwaite's.
    """
    chosen = [groups[name] for name in signs]
    images = np.sum([sign * groups[name].images for name, sign in signs.items()], 0)
    num_images, estimate = len(images), float(images.mean())
    by_networks = sum(group.variance for group in chosen)
    by_images = float(images.var(ddof=1)) / num_images if num_images > 1 else 0.0
    both = sum(group.interaction / (len(group.networks) * num_images) for group in chosen)
    parts = _Parts(max(0.0, by_networks - both), max(0.0, by_images - both), both)
    variance = parts.networks + parts.images + parts.interaction
    spread = [group.variance**2 / (len(group.networks) - 1) for group in chosen if len(group.networks) > 1]
    spread.append(by_images**2 / max(1, num_images - 1))
    deviations = np.sum([sign * drawn[name] for name, sign in signs.items()], 0)
    found = float(deviations.var())
    if found > 0 and variance > 0:
        deviations = deviations * math.sqrt(variance / found) * _student(variance**2 / sum(spread)) / Z
    lower, upper = estimate + np.quantile(deviations, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(len(chosen[-1].networks), estimate, float(lower), float(upper)), parts


def _difference(
    generated: str, other: str, groups: Mapping[str, _Group], drawn: Mapping[str, np.ndarray]
) -> Difference:
    found, parts = _contrast({generated: 1, other: -1}, groups, drawn)
    # Halves of a point are much where hardly anything is wrong.
    margin = min(EQUAL, EQUAL_OF_ERROR * (1 - float(groups[other].images.mean())))
    word: Word = "undecided"
    if found.lower > 0 or found.upper < 0:
        word = "better" if found.lower > 0 else "worse"
    elif max(-found.lower, found.upper) <= margin:
        word = "equal"
    limit: Literal["networks", "images"] = "images" if parts.images >= parts.networks else "networks"
    networks, images = len(groups[generated].networks), len(groups[generated].images)
    needed = _needed(margin, parts, networks, images) if word == "undecided" else {}
    return Difference(**asdict(found), word=word, limit=limit, needed=needed)


def _needed(margin: float, parts: _Parts, networks: int, images: int) -> dict[str, int]:
    """Returns how many networks, or images, or both, make the interval as wide as the margin.

    Wherever it then lies, it leaves 0 out or is within the margin on both sides.
    """
    wanted = (margin / 2 / Z) ** 2
    if parts.images >= parts.networks and parts.networks < wanted:
        return {"images": math.ceil(images * (parts.images + parts.interaction) / (wanted - parts.networks))}
    if parts.networks > parts.images and parts.images < wanted:
        return {"networks": math.ceil(networks * (parts.networks + parts.interaction) / (wanted - parts.images))}
    times = (parts.networks + parts.images + parts.interaction) / wanted if wanted else math.inf
    return {"networks": math.ceil(times * networks), "images": math.ceil(times * images)} if times < math.inf else {}


def _student(freedom: float) -> float:
    """Returns the 97.5 % quantile of Student's t, by its expansion around the normal's (Abramowitz, Stegun, 26.7.5)."""
    freedom = max(1.0, freedom)
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
    )
    return Z + sum(term / freedom**power for power, term in enumerate(terms, 1))
