"""Whether samples are replicas of the zoo's members, interpolations, Gaussian-like or new: sample by sample.

Vectors whose kind is known (draws of baselines; networks that no generator has seen) tell how each kind lies among the
members; the samples are a mixture of these kinds, and how much of each is estimated. `docs/method.md` has the formulas.

Shapes: K members, n samples, m vectors of a yardstick, D values each; F features of a vector.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pdiff_ray.evaluation.copying import Copying, data_copying, effective_number
from pdiff_ray.evaluation.geometry import Geometry, Place
from pdiff_ray.evaluation.kinds import WORDS, Family, Kind, log_t, mixture
from pdiff_ray.storage.matrix import Vectors

DEGREES = ("replica", "noise")  # of one thing
MAJORITY = 0.7  # the share from which on a word holds for the whole; below, samples are a mixture
NOTICED = 0.1  # the share from which on another word is a part of a mixture
SHOWN = 0.02  # the share from which on sentences name a word or a kind
COLLAPSED = 0.1  # of the members' mean distance: samples whose median distance is less are all alike
MIN_VECTORS = 10  # of a kind, below which it is not known how it lies
TOLD = 0.8  # the posterior from which on a sample's word is certain
MIN_LOSS_SPREAD = 0.02  # of the logarithm of losses
FAR = 2.5  # times as far from the likeliest kind as any of its own vectors: of no known kind
LOSSES_TELL = ("gaussian-like", "new")  # apart, where weights do not
Z95 = 1.96


@dataclass(frozen=True)
class Distances:
    """How near vectors are to the members.

    Attributes:
        nearest: mean distance to the nearest member, in units of the mean distance among members.
        cosine: mean of the largest cosine with a member, both seen from the zoo's mean.
    """

    nearest: float
    cosine: float


@dataclass(frozen=True)
class Undecided:
    """A question that stays open.

    Attributes:
        remedy: why, and what else would help.
        n: how many samples, or vectors of the yardstick, would decide; None if no number of them does.
    """

    question: str
    remedy: str
    n: int | None = None

    def __str__(self) -> str:
        enough = "" if self.n is None else f"; {self.n} would decide"
        return f"Undecided {self.question}: {self.remedy}{enough}."


@dataclass(frozen=True)
class Novelty:
    """What samples are.

    Attributes:
        word: of `WORDS`, if it holds for `MAJORITY` of the samples (replicas and noise, which differ by degree, count
            together); else "mixture"; "unknown", too, if nothing can be said.
        text: all of it in sentences, the first of which is the verdict.
        shares: of each word, by word.
        families: the share of each family and yardstick, by name; samples of no known kind are in none.
        mixed: whether a second word has a share of `NOTICED` or more.
        words, posteriors: of each sample (n), the likeliest word and its probability.
        collapsed: whether the samples are all alike.
        spread: mean distance among samples, in units of that among members.
        effective_rank, members_rank: of samples and of as many members, where both have more than one.
        distances: of the samples, the members (each to its nearest fellow) and the yardsticks, by name.
        copying: C_T by yardstick.
        certain: by word, the mean probability of the right word over the vectors that are known to be of it.
        undecided: what cannot be said, and what would decide.
    """

    word: str
    text: str
    shares: dict[str, float]
    families: dict[str, float]
    mixed: bool
    words: tuple[str, ...]
    posteriors: tuple[float, ...]
    collapsed: bool
    spread: float | None
    effective_rank: float | None
    members_rank: float | None
    distances: dict[str, Distances]
    copying: dict[str, Copying]
    certain: dict[str, float]
    undecided: tuple[Undecided, ...]

    @property
    def headline(self) -> str:
        """The first sentence of `text`."""
        return self.text.partition(". ")[0].rstrip(".") + "."

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON values."""
        changed = {
            "headline": self.headline,
            "words": list(self.words),
            "posteriors": [round(p, 4) for p in self.posteriors],
            "undecided": [asdict(one) for one in self.undecided],
        }
        return {**asdict(self), **changed}


def assess(
    geometry: Geometry,
    samples: Tensor | Vectors,
    families: Mapping[str, Family],
    yardsticks: Mapping[str, Tensor | Vectors],
    sample_losses: Tensor | None = None,
    losses: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Novelty:
    """Says what samples (n, D) are, one by one and as a whole; arguments as in `Known` and `Known.assess`."""
    return Known(geometry, families, yardsticks, losses, seed).assess(samples, sample_losses)


class Known:
    """What is known of a zoo: how vectors of each kind lie among its members.

    Args:
        geometry: of the members that the generator has learned.
        families: by name, what known ways of making vectors give, `MIN_VECTORS` of each or more.
        yardsticks: by name, vectors (m, D) that no generator has seen, in the order in which their runs kept them; what
            lies as they do is new. Those with fewer than `MIN_VECTORS` give distances alone.
        losses: of networks of families and yardsticks on validation images (not on test images, which choose nothing),
            by name. They tell new networks from Gaussian-like ones where the weights do not.
        seed: of the cells of C_T.
    """

    def __init__(
        self,
        geometry: Geometry,
        families: Mapping[str, Family],
        yardsticks: Mapping[str, Tensor | Vectors],
        losses: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.geometry, self.losses, self.seed = geometry, losses or {}, seed
        self.yardsticks = {name: geometry.place(vectors) for name, vectors in yardsticks.items()}
        self.kinds: dict[str, Kind] = {}
        self.undecided: list[Undecided] = []
        if geometry.degenerate:
            self.undecided.append(Undecided("what the samples are", geometry.degenerate))
            return
        for name, family in families.items():
            drawn = geometry.place(family.vectors() if callable(family.vectors) else family.vectors)
            if len(drawn.squares) >= MIN_VECTORS:
                self.kinds[name] = Kind(family.word, geometry.features_of(drawn), family.of)
        for name, place in self.yardsticks.items():
            if len(place.squares) >= MIN_VECTORS:
                worth = effective_number(place.nearest)
                self.kinds[name] = Kind("new", geometry.features_of(place), worth=worth)
            else:
                question = f"whether samples lie as the {spoken(name)} does"
                self.undecided.append(Undecided(question, f"it has {len(place.squares)} vectors", MIN_VECTORS))
        if not any(kind.word == "new" for kind in self.kinds.values()):
            self.undecided.append(Undecided("whether samples are new", "no yardstick is large enough", MIN_VECTORS))

    @functools.cached_property
    def certain(self) -> dict[str, float]:
        """How surely weights tell the kinds' own vectors, by word, if every kind is as likely."""
        found: dict[str, list[Tensor]] = {}
        for kind in self.kinds.values():
            posterior = torch.softmax(self.densities(kind.features), 0)
            same = torch.tensor([other.word == kind.word for other in self.kinds.values()], device=posterior.device)
            found.setdefault(kind.word, []).append(posterior[same].sum(0))
        certain = {word: float(torch.cat(values).mean()) for word, values in found.items()}
        return certain | ({"noise": certain["replica"]} if "replica" in certain else {})

    def densities(self, features: Tensor) -> Tensor:
        """Returns the log density of each kind (kinds, n) at features (n, F)."""
        return torch.stack([kind.log_density(features) for kind in self.kinds.values()])

    def words_of(self, posterior: Tensor, place: Place, features: Tensor) -> dict[str, dict[str, Tensor]]:
        """Returns the posterior (n,) of each kind by word and name, from those of kinds (kinds, n).

        A member with noise is a replica up to the distance that members have from each other; beyond, it is noise. The
        likeliest kind of a vector that is far from it is no more than the nearest one: its word is "unknown".
        """
        found: dict[str, dict[str, Tensor]] = {word: {} for word in WORDS}
        far = place.nearest >= self.geometry.mean_distance
        reach = torch.stack([kind.squares(features) / kind.reach for kind in self.kinds.values()])
        strange = reach.gather(0, posterior.argmax(0)[None])[0] > FAR**2
        for row, (name, kind) in zip(posterior, self.kinds.items(), strict=True):
            found["unknown"][name], row = row * strange, row * ~strange
            if kind.word == "replica":
                found["replica"][name], found["noise"][name] = row * ~far, row * far
            else:
                found[kind.word][name] = row
        return found

    def assess(self, samples: Tensor | Vectors, losses: Tensor | None = None) -> Novelty:
        """Says what samples (n, D) are, one by one and as a whole.

        Args:
            losses: of their networks on validation images (n,).
        """
        place = self.geometry.place(samples)
        facts = self._facts(samples, place)
        undecided = list(self.undecided)
        if not len(samples):
            undecided.append(Undecided("what the samples are", "there are none"))
        if not len(samples) or not self.kinds:
            return _unknown(facts, undecided)
        features = self.geometry.features_of(place)
        densities = self.densities(features)
        posterior, told = mixture(densities), False
        if losses is not None and (of_losses := self._of_losses(losses.to(densities))):
            # What the weights give to both words is shared out once more, by losses as well.
            rows = list(of_losses)
            mass, told = posterior[rows].sum(0), True
            posterior[rows] = mass * mixture(densities[rows] + torch.stack([*of_losses.values()]), mass)
        return self._verdict(facts, self.words_of(posterior, place, features), undecided, told)

    def _of_losses(self, losses: Tensor) -> dict[int, Tensor]:
        """Returns the log density (n,) of samples' losses for each kind, by its row, that losses tell from others.

        Kinds without losses take those of their word. Empty if a word has too few.
        """
        found = {}
        values = losses.clamp(min=1e-12).log()
        for row, (name, kind) in enumerate(self.kinds.items()):
            if kind.word in LOSSES_TELL:
                fellows = [other for other, its in self.kinds.items() if its.word == kind.word and other in self.losses]
                known = [self.losses[other].to(values) for other in ([name] if name in fellows else fellows)]
                logs = torch.cat([values[:0], *known]).clamp(min=1e-12).log()
                if len(logs) < MIN_VECTORS:
                    return {}
                variance = float(logs.var(correction=0)) + MIN_LOSS_SPREAD**2
                found[row] = log_t((values - logs.mean()).square() / variance, 1, math.log(variance) / 2)
        return found

    def _facts(self, samples: Tensor | Vectors, place: Place) -> dict[str, Any]:
        """Returns what is measured of samples, whatever they are: fields of `Novelty`, `collapsed` to `copying`."""
        geometry, num, count = self.geometry, len(samples), len(self.geometry.members)
        facts: dict[str, Any] = dict.fromkeys(("spread", "effective_rank", "members_rank"))
        facts |= {"collapsed": False, "distances": {}, "copying": {}}
        if not (unit := geometry.mean_distance):
            return facts
        for name, one in {"samples": place, "members": geometry.among, **self.yardsticks}.items():
            if len(one.squares):
                nearest, cosine = float(one.nearest.mean()) / unit, float(one.cosines.amax(1).mean())
                facts["distances"][name] = Distances(nearest, cosine)
        for name, one in self.yardsticks.items():
            if found := data_copying(geometry, place, one, self.seed):
                facts["copying"][name] = found
        if num > 1:
            among, both = Geometry(samples), min(num, count)  # a rank grows with the number of vectors
            facts["collapsed"] = float(among.pair_distances.median()) < COLLAPSED * unit
            facts["spread"] = among.mean_distance / unit
            facts["effective_rank"] = among.effective_rank_of([num * index // both for index in range(both)])
            facts["members_rank"] = geometry.effective_rank_of([count * index // both for index in range(both)])
        return facts

    def _verdict(
        self,
        facts: Mapping[str, Any],
        posterior: Mapping[str, Mapping[str, Tensor]],
        undecided: Sequence[Undecided],
        told: bool,
    ) -> Novelty:
        """Puts shares, words and facts into one verdict.

        Args:
            posterior: of each kind for each sample (n,), by word and name.
            told: whether losses have told new samples from Gaussian-like ones.
        """
        nothing = torch.zeros_like(next(iter(posterior["unknown"].values())))
        of_words = torch.stack([sum(kinds.values(), start=nothing) for kinds in posterior.values()])
        shares = dict(zip(WORDS, of_words.mean(1).tolist(), strict=True))
        known = [kinds for word, kinds in posterior.items() if word != "unknown"]
        families = {name: sum(float(kinds[name].mean()) for kinds in known if name in kinds) for name in self.kinds}
        best, num = of_words.max(0), len(nothing)
        first, second = sorted(shares, key=lambda word: -shares[word])[:2]
        # However much noise there is, a member with noise is one; where replicas end is a matter of degree.
        whole = sum(shares[word] for word in DEGREES) if first in DEGREES else shares[first]
        word = first if whole >= MAJORITY else "mixture"
        undecided = [*undecided, *self._open(shares, first, second, num, facts["copying"], told)]
        sentences = [
            f"{word}: {self._listed(posterior)} of {num} samples.",
            *_described(facts),
            *map(str, undecided),
        ]
        return Novelty(
            word,
            " ".join(sentences),
            shares,
            families,
            shares[second] >= NOTICED,
            tuple(list(WORDS)[row] for row in best.indices.tolist()),
            tuple(best.values.tolist()),
            certain=self.certain,
            undecided=tuple(undecided),
            **facts,
        )

    def _open(
        self,
        shares: Mapping[str, float],
        first: str,
        second: str,
        num: int,
        copying: Mapping[str, Copying],
        told: bool,
    ) -> Iterator[Undecided]:
        """Yields the questions that this evidence leaves open."""
        share = sum(shares[word] for word in DEGREES) if first in DEGREES else shares[first]
        needed = math.ceil(Z95**2 * share * (1 - share) / max(1e-9, (share - MAJORITY) ** 2))
        if needed > num:
            whole = f"whether the samples are {first} or a mixture of {first} and {second}"
            yield Undecided(whole, f"{share:.0%} is too close to {MAJORITY:.0%}", needed)
        if shares["unknown"] >= NOTICED:
            yield Undecided(f"what {shares['unknown']:.0%} of the samples are", "they are far from every known kind")
        for word in (first, second):
            if shares[word] >= NOTICED and self.certain.get(word, TOLD) < TOLD and not (told and word in LOSSES_TELL):
                remedy = f"of vectors known to be {word}, weights tell {self.certain[word]:.0%}"
                if word in LOSSES_TELL:
                    remedy += "; losses on validation images would tell more"
                yield Undecided(f"how many samples are {word}", remedy)
        for name, one in copying.items():
            if one.effective < MIN_VECTORS and abs(one.z) < Z95:
                remedy = f"neighbours are alike, which makes the {spoken(name)} worth {one.effective:.1f} vectors"
                needed = math.ceil(MIN_VECTORS * one.num / one.effective)
                yield Undecided(f"whether samples are nearer to the members than the {spoken(name)}", remedy, needed)

    def _listed(self, posterior: Mapping[str, Mapping[str, Tensor]]) -> str:
        """Returns the words that have a share, largest first, each with the kinds behind it."""
        shares = {
            word: {name: float(one.mean()) for name, one in kinds.items()} for word, kinds in posterior.items() if kinds
        }
        parts = []
        for word in sorted(shares, key=lambda word: -sum(shares[word].values())):
            if (share := sum(shares[word].values())) >= SHOWN:
                names = sorted((n for n, one in shares[word].items() if one >= SHOWN), key=lambda n: -shares[word][n])
                titles = ", ".join(dict.fromkeys(self.kinds[name].of or spoken(name) for name in names))
                nearest = "the nearest: " if word == "unknown" and titles else ""
                parts.append(f"{share:.0%} {word}" + (f" ({nearest}{titles})" if titles else ""))
        return ", ".join(parts)


def _unknown(facts: Mapping[str, Any], undecided: Sequence[Undecided]) -> Novelty:
    text = " ".join(["unknown:", *map(str, undecided)])
    return Novelty("unknown", text, {}, {}, False, (), (), certain={}, undecided=(*undecided,), **facts)


def _described(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yields sentences on what is measured."""
    if facts["collapsed"]:
        yield "They are collapsed: all alike, compared with members."
    if facts["spread"] is not None:
        yield (
            f"Samples are {facts['spread']:.2f} times as far from each other as members, and have an effective rank of "
            f"{facts['effective_rank']:.1f} where as many members have {facts['members_rank']:.1f}."
        )
    distances = dict(facts["distances"])
    if "samples" in distances:
        own = distances.pop("samples")
        others = [f"{spoken(name)} {one.nearest:.2f} and {one.cosine:.2f}" for name, one in distances.items()]
        yield (
            f"Their nearest member is at {own.nearest:.2f} of the mean distance among members, and at a cosine of "
            f"{own.cosine:.2f} seen from the zoo's mean ({', '.join(others)})."
        )
    for name, copying in facts["copying"].items():
        nearer = "as near to" if abs(copying.z) < Z95 else "nearer to" if copying.z < 0 else "farther from"
        yield (
            f"They are {nearer} the members {'as' if nearer.startswith('as') else 'than'} the {spoken(name)} "
            f"(C_T {copying.c_t:+.1f}, z {copying.z:+.1f})."
        )


def spoken(name: str) -> str:
    """Returns a name as sentences have it."""
    return {"held_out": "held-out members"}.get(name, name.replace("_", " "))
