"""Whether generated networks are more accurate than others, with intervals over networks and over test images.

Shapes: n networks of a group, T test images, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from pdiff_ray.common.seeds import derive_seed
from pdiff_ray.evaluation.similarity import unpack_wrong

RESAMPLES = 2000
LEVEL = 0.95
Z = 1.959964  # the standard normal's quantile, two-sided
EQUAL, EQUAL_OF_ERROR = 0.005, 0.1  # a difference below half a point and a tenth of the validation error is none
MAX_NAMED = 3  # groups in a sentence
CHUNK_VALUES = 2**21

Word = Literal["better", "equal", "undecided", "worse"]
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
            point and a tenth of the group's validation error; else "undecided".
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
        against: the baselines.
        best: the simplest of those that are best on validation images; None without baselines.
        ahead: baselines above the generated networks, by intervals that are widened for the number of baselines.
        means: of every group.
        differences: by the other group.
    """

    generated: str
    networks: int
    images: int
    against: Sequence[str]
    best: str | None
    ahead: Sequence[str]
    means: Mapping[str, Interval]
    differences: Mapping[str, Difference]

    @property
    def word(self) -> Word | None:
        """What the generated networks are, beside the best baseline.

        Better takes being better than each of them; to be worse than the one that validation images have chosen is
        enough, or than another one beyond what the best of so many reaches by chance.
        """
        if self.best is None:
            return None
        found = self.differences[self.best].word
        if found == "worse" or self.ahead:
            return "worse"
        if all(self.differences[name].word == "better" for name in self.against):
            return "better"
        return "undecided" if found == "better" else found

    @property
    def text(self) -> str:
        """The word with its reasons: what was compared, with intervals, and what would decide."""
        if self.best is None:
            return "There is no baseline to compare the samples with."
        found = self.differences[self.best]
        reasons = [f"{found.points} {self.best}, the simplest of the best baselines on validation images"]
        if "original" in self.differences and self.best != "original":
            reasons.append(f"{self.differences['original'].points} the originals")
        above = sorted(set(self.ahead) - {self.best}, key=lambda name: self.differences[name].estimate)
        below = [f"{self.differences[name].points} {name}" for name in above[:MAX_NAMED]]
        if below and found.word != "worse":  # what makes them worse comes first
            reasons, below = [*below, *reasons], []
        counts = f"{self.networks} samples and {found.networks} of {self.best} on {self.images:,} test images"
        text = f"{self.word}: {', '.join(reasons)} (95 % intervals; {counts})."
        others = [name for name in self.against if name != self.best]
        if below:
            text += f" Also {' and '.join(below)}."
        elif found.word == "better" and not above:
            near = [name for name in others if self.differences[name].word != "better"]
            text += f" Not better than {' and '.join(near[:MAX_NAMED])}." if near else " Better than all others, too."
        if self.word == "undecided" and found.needed:
            needed = " and ".join(f"{count:,} {COUNTED[kind]}" for kind, count in found.needed.items())
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
    num_validation: float = math.inf,
) -> Comparison:
    """Compares mean test accuracies of groups, by a bootstrap over networks and over test images.

    Both are resampled: the networks of each group for itself, the images once for all groups, which have all seen the
    same ones. Of a group of one network, such as an average, images alone are: its interval holds for that network.
    What an interval does not cover is in docs/method.md.

    Args:
        wrong: of each group, what `np.packbits` made of each network's wrong test predictions.
        num_images: T, of the test set.
        validation: validation accuracies of the networks of each group.
        against: the baselines, the simplest first. The generated networks are compared with all groups in any case.
        num_validation: validation images: baselines are equally good on them within a standard error of the best one
            (Breiman et al., 1984).
    """
    groups = {name: _Group.of(packed, num_images) for name, packed in wrong.items()}
    drawn = _drawn(groups, num_images, seed)
    means = {name: _contrast({name: 1}, groups, drawn).interval for name in groups}
    means = {  # of few networks on few images an interval may reach beyond what accuracies are
        name: replace(mean, lower=max(0.0, mean.lower), upper=min(1.0, mean.upper)) for name, mean in means.items()
    }
    contrasts = {name: _contrast({generated: 1, name: -1}, groups, drawn) for name in groups if name != generated}
    accuracies = {name: float(np.mean(values)) for name, values in validation.items()}
    differences = {
        name: _difference(found, groups[generated], 1 - accuracies[name]) for name, found in contrasts.items()
    }
    return Comparison(
        generated,
        len(wrong[generated]),
        num_images,
        tuple(against),
        _best({name: accuracies[name] for name in against}, num_validation),
        _ahead({name: contrasts[name] for name in against}),
        means,
        differences,
    )


def _best(validation: Mapping[str, float], num_images: float) -> str | None:
    """Returns the first group whose validation accuracy is within a standard error of the highest."""
    if not validation:
        return None
    highest = max(validation.values())
    limit = highest - math.sqrt(highest * (1 - highest) / num_images)
    return next(name for name, accuracy in validation.items() if accuracy >= limit)


def _ahead(contrasts: Mapping[str, _Contrast]) -> tuple[str, ...]:
    """Returns the groups that are above the generated networks, by bounds that hold for all of them at once."""
    spreads = {name: float(found.deviations.std()) for name, found in contrasts.items()}
    relative = [found.deviations / spreads[name] for name, found in contrasts.items() if spreads[name]]
    factor = float(np.quantile(np.max(relative, 0), (1 + LEVEL) / 2)) if relative else 0.0
    return tuple(name for name, found in contrasts.items() if found.interval.estimate + factor * spreads[name] < 0)


@dataclass(frozen=True)
class _Group:
    """Accuracy of each network (n,), how many networks get an image right (T,), and the interaction's variance.

    The model is y = mean + network + image + interaction, y being 1 for a right prediction and 0 for a wrong one.
    """

    networks: np.ndarray
    right: np.ndarray
    interaction: float  # 0 of one network: it cannot be told from the images' part

    @classmethod
    def of(cls, packed: Sequence[bytes], num_images: int) -> _Group:
        networks, counts = np.empty(len(packed)), np.zeros(num_images)
        step = max(1, CHUNK_VALUES // num_images)
        for start in range(0, len(packed), step):
            right = ~unpack_wrong(packed[start : start + step], num_images)
            networks[start : start + step] = right.mean(1)
            counts += right.sum(0)
        n, t, mean = len(packed), num_images, networks.mean()
        squares = n * t * mean - t * np.square(networks).sum() - np.square(counts).sum() / n + n * t * mean**2
        interaction = squares / max(1, (n - 1) * (t - 1)) if n > 1 else 0.0
        return cls(networks, counts, max(0.0, float(interaction)))

    @property
    def images(self) -> np.ndarray:
        """Share of the networks that get an image right (T,)."""
        return self.right / len(self.networks)

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
    # Counts, as sums of whole numbers are exact: by however many threads, the result is the same.
    right = np.stack([groups[name].right for name in names], 1)
    predictions = np.array([num_images * len(groups[name].networks) for name in names])
    random, step = np.random.default_rng(derive_seed(seed, "images")), max(1, CHUNK_VALUES // num_images)
    by_image = []
    for start in range(0, RESAMPLES, step):
        count = min(step, RESAMPLES - start)
        picks = random.integers(0, num_images, (count, num_images)) + num_images * np.arange(count)[:, None]
        weights = np.bincount(picks.ravel(), minlength=count * num_images).reshape(count, num_images)
        by_image.append((weights @ right - right.sum(0)) / predictions)
    drawn = dict(zip(names, np.concatenate(by_image).T, strict=True))
    for name, group in groups.items():
        # Seeded by the group's name: one more group changes nothing of the others.
        random, n = np.random.default_rng(derive_seed(seed, "networks", name)), len(group.networks)
        picks = random.integers(0, n, (RESAMPLES, n))
        drawn[name] = drawn[name] + group.networks[picks].mean(1) - group.networks.mean()
    return drawn


@dataclass(frozen=True)
class _Contrast:
    """A mean, or a difference of two.

    Attributes:
        deviations: of resamples from it (B,), as wide as the interval.
        networks, images, both: parts of its variance: by networks, by images, and by their interaction.
    """

    interval: Interval
    deviations: np.ndarray
    networks: float
    images: float
    both: float


def _contrast(signs: Mapping[str, int], groups: Mapping[str, _Group], drawn: Mapping[str, np.ndarray]) -> _Contrast:
    """Returns the sum of some groups' means, each with its sign.

    The interval is the bootstrap's percentiles, stretched as Hesterberg (2015) advises: to the variance's unbiased
    estimate (Searle, Casella and McCulloch, 1992), and to Student's quantile, its degrees of freedom Satterthwaite's.
    """
    chosen = [groups[name] for name in signs]
    shares = np.sum([sign * groups[name].images for name, sign in signs.items()], 0)
    num_images, estimate = len(shares), float(shares.mean())
    by_networks = sum(group.variance for group in chosen)
    by_images = float(shares.var(ddof=1)) / num_images if num_images > 1 else 0.0
    both = sum(group.interaction / (len(group.networks) * num_images) for group in chosen)
    networks, images = max(0.0, by_networks - both), max(0.0, by_images - both)  # each has the interaction in it
    variance = networks + images + both
    spread = [group.variance**2 / (len(group.networks) - 1) for group in chosen if len(group.networks) > 1]
    spread.append(by_images**2 / max(1, num_images - 1))
    deviations = np.sum([sign * drawn[name] for name, sign in signs.items()], 0)
    found = float(deviations.var())
    if found > 0 and variance > 0:
        deviations = deviations * math.sqrt(variance / found) * student(variance**2 / sum(spread)) / Z
    lower, upper = estimate + np.quantile(deviations, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    interval = Interval(len(chosen[-1].networks), estimate, float(lower), float(upper))
    return _Contrast(interval, deviations, networks, images, both)


def _difference(contrast: _Contrast, generated: _Group, error: float) -> Difference:
    """Puts a difference into a word; error: of the other group, on validation images, as test images set no limits."""
    found = contrast.interval
    margin = min(EQUAL, EQUAL_OF_ERROR * error)  # half a point is much where hardly anything is wrong
    word: Word = "undecided"
    if found.lower > 0 or found.upper < 0:
        word = "better" if found.lower > 0 else "worse"
    elif max(-found.lower, found.upper) <= margin:
        word = "equal"
    limit: Literal["networks", "images"] = "images" if contrast.images >= contrast.networks else "networks"
    needed = _needed(margin, contrast, generated) if word == "undecided" else {}
    return Difference(**asdict(found), word=word, limit=limit, needed=needed)


def _needed(margin: float, parts: _Contrast, group: _Group) -> dict[str, int]:
    """Returns how many networks, or images, or both, make the interval as wide as the margin.

    Wherever it then lies, it leaves 0 out or is within the margin on both sides.
    """
    wanted, networks, images = (margin / 2 / Z) ** 2, len(group.networks), len(group.images)
    if parts.images >= parts.networks and parts.networks < wanted:
        return {"images": math.ceil(images * (parts.images + parts.both) / (wanted - parts.networks))}
    if parts.networks > parts.images and parts.images < wanted:
        return {"networks": math.ceil(networks * (parts.networks + parts.both) / (wanted - parts.images))}
    times = (parts.networks + parts.images + parts.both) / wanted if wanted else math.inf
    return {"networks": math.ceil(times * networks), "images": math.ceil(times * images)} if times < math.inf else {}


def student(freedom: float) -> float:
    """Returns the 97.5 % quantile of Student's t, by its expansion around the normal's (Abramowitz, Stegun, 26.7.5)."""
    if freedom < 3:  # where the expansion is too small
        return 4.302653 if freedom >= 2 else 12.706205
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
    )
    return Z + sum(term / freedom**power for power, term in enumerate(terms, 1))
