"""Whether the verdict in weight space is right on samples of known kind, over three kinds of zoo."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pdiff_ray as pd
from benchmarks.harness import Result, result
from pdiff_ray.config.schema import Experiment
from pdiff_ray.config.section import merge
from pdiff_ray.evaluation.geometry import Geometry
from pdiff_ray.evaluation.kinds import WORDS, recipes
from pdiff_ray.evaluation.novelty import Known, Novelty
from pdiff_ray.running import experiment as running
from pdiff_ray.stages.stored import Networks
from pdiff_ray.stages.verdict import families, held_out_by_run
from pdiff_ray.storage.matrix import Vectors

QUICKSTART = Path(__file__).parent.parent / "sweeps" / "quickstart.yaml"
DRAWS = 100  # samples of each kind
TARGET = 0.95
HALVES = 0.15  # from which the shares of a mixture of halves may differ
# A network of 2,410 parameters, which is trained whole for each member.
INDEPENDENT: dict[str, Any] = {
    "network": {"name": "s1", "args": {}},
    "training": {"epochs": 8},
    "zoo": {"regime": "independent", "subset": {"all": True}, "batchnorm": "included"},
}
KINDS: dict[str, dict[str, Any]] = {
    "trajectory": {},
    "branches": {"zoo": {"regime": "branches"}},
    "independent": INDEPENDENT,
}
# What a generator returns: its word, and the generator.
GENERATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "members": ("replica", {"name": "average", "count": 1}),
    **{f"noise {sigma:g}": ("replica", {"name": "noise", "sigma": sigma}) for sigma in (0.02, 0.05, 0.15, 0.5, 1, 3)},
    **{f"deviation {b:g}": ("replica", {"name": "gaussian_kernel", "bandwidth": b}) for b in (0.001, 0.05, 0.15)},
    "averages of 2": ("interpolation", {"name": "average", "count": 2}),
    "averages of 16": ("interpolation", {"name": "average", "count": 16}),
    "between two": ("interpolation", {"name": "interpolation"}),
    "5 components": ("interpolation", {"name": "gaussian_pca", "rank": 5}),
    "20 components": ("interpolation", {"name": "gaussian_pca", "rank": 20}),
    "Gaussian": ("gaussian-like", {"name": "gaussian"}),
    "Gaussian per value": ("gaussian-like", {"name": "gaussian_diagonal"}),
}


class Subject:
    """A zoo, and samples whose kind is known.

    Args:
        kind: of `KINDS`.
        sections: of the experiment, laid over those of the kind.
    """

    def __init__(self, kind: str, seed: int, **sections: Any) -> None:
        self.kind, self.sections = kind, {**merge(KINDS[kind], sections), "seed": seed}
        self.experiment, zoo = self._zoo()
        split, self.subset = self.experiment.split, zoo.subset
        self.members = zoo.vectors(split.learned)
        kept_back = {"held_out": held_out_by_run(self.experiment), "second_run": split.second_run}
        yardsticks = {group: zoo.vectors(ids) for group, ids in kept_back.items() if ids}
        geometry = Geometry(self.members)
        self.unit, self.place = geometry.mean_distance, geometry.place
        judged = {name: recipes(geometry)[name].generator for name in ("gaussian", "gaussian per value")}
        losses = {name: self.losses(self._draw(generator, 1)) for name, generator in judged.items()}
        losses |= {group: self.losses(vectors) for group, vectors in yardsticks.items()}
        kinds = families(Vectors.of(self.members), geometry, self.subset, seed)
        self.known = Known(geometry, kinds, yardsticks, losses, seed)

    def samples(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yields the name, the right word and the vectors of samples of known kind."""
        for name, (word, generator) in GENERATORS.items():
            drawn = self._draw(generator, 2)
            far = word == "replica" and self.place(drawn).nearest.median() >= self.unit
            yield name, "noise" if far else word, drawn
        copies, noisy = self._draw(GENERATORS["members"][1], 3), self._draw(GENERATORS["noise 0.15"][1], 3)
        yield "members in bfloat16", "replica", copies.bfloat16().float()
        yield "80 members, 20 with noise 0.15", "replica", torch.cat([copies[:80], noisy[:20]])
        fresh = self._fresh()
        yield "fresh", "new", fresh
        half = fresh[::2]
        yield "half members, half fresh", "mixture", torch.cat([copies[: len(half)], half])
        if self.kind != "independent":
            yield "continued", "new", self._continued()

    def verdicts(self) -> Iterator[tuple[str, str, Novelty]]:
        """Yields the name, the right word and the verdict of samples of known kind."""
        names, words, vectors = zip(*self.samples(), strict=True)
        losses = self.losses(torch.cat(vectors)).split([len(one) for one in vectors])  # judged at once
        for name, word, one, its in zip(names, words, vectors, losses, strict=True):
            yield name, word, self.known.assess(one, its)

    def losses(self, vectors: Tensor) -> Tensor:
        """Returns the losses of networks (n, D) on validation images (n,)."""
        table = pd.judge(self.experiment, vectors, ["validation"])
        return torch.tensor(table.column("validation_loss").to_pylist())

    def _fresh(self) -> Tensor:
        """Returns networks of runs with another seed, spread over them."""
        _, zoo = self._zoo(seed=1000 + self.sections["seed"], second_run=0)
        return zoo.vectors(zoo.ids[:: max(1, len(zoo.ids) // DRAWS)])

    def _continued(self) -> Tensor:
        """Returns networks that the learned runs come to when they go on."""
        config, members = self.experiment.zoo, self.experiment.zoo.members
        _, zoo = self._zoo(members=members + members // 2, second_run=0)
        runs = config.branches if self.kind == "branches" else 1
        learned = {id_ % runs for id_ in self.experiment.split.learned}
        return zoo.vectors([id_ for id_ in range(members, len(zoo)) if id_ % runs in learned])

    def _zoo(self, **fields: Any) -> tuple[Experiment, Networks]:
        """Returns an experiment whose zoo differs in some fields, and its zoo: from storage, if it is there."""
        experiment = pd.load_experiment(QUICKSTART, **merge(self.sections, {"zoo": fields}))
        plan = running.make_plan(experiment, "zoo")
        with contextlib.redirect_stdout(io.StringIO()):
            running.run(plan, in_process=True)
        return experiment, Networks(plan.artifacts["zoo"])

    def _draw(self, generator: Mapping[str, Any], seed: int) -> Tensor:
        settings = dict(generator)
        return pd.fit(self.members, settings.pop("name"), subset=self.subset, **settings).sample(DRAWS, seed=seed)


def is_right(found: Novelty, word: str) -> bool:
    """Tells whether the verdict has the right word and, of a mixture of halves, sees that they are halves."""
    halves = all(abs(found.shares[part] - 0.5) < HALVES for part in ("replica", "new"))
    return found.word == word and (word != "mixture" or halves)


def verdict(seeds: int = 10, kinds: Iterable[str] = tuple(KINDS), **sections: Any) -> Iterator[Result]:
    """Asks for the verdict on samples of known kind, of zoos of three kinds; its note has the table of confusions.

    Zoos are built where they are missing from storage.

    Args:
        kinds: of `KINDS`.
        sections: of the experiments, such as `storage`.
    """
    for kind in kinds:
        table: dict[str, Counter[str]] = {}
        pairs, wrong = [], []
        for seed in range(seeds):
            subject, right, asked = Subject(kind, seed, **sections), 0, 0
            for name, word, found in subject.verdicts():
                table.setdefault(name, Counter())[found.word] += 1
                asked += 1
                if is_right(found, word):
                    right += 1
                else:
                    wrong.append(f"seed {seed}, {name} is {word}, found {found.text.partition('. ')[0]}")
            pairs.append((float(right), float(asked)))
        share = sum(right for right, _ in pairs) / sum(asked for _, asked in pairs)
        yield result(
            "verdict",
            f"right words of a zoo of regime {kind}",
            "samples of known kind",
            pairs,
            unit="",
            limit=1.0,
            target=1 / TARGET,
            note="\n".join([f"{share:.1%} right", *confusions(table), *wrong]),
        )


def confusions(table: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Returns the lines of a table of how often each kind of samples (rows) was given each word (columns)."""
    words = [*WORDS, "mixture"]
    rows = [[name, *(str(found.get(word) or "") for word in words)] for name, found in table.items()]
    return ["| " + " | ".join(row) + " |" for row in [["samples", *words], ["---"] * (len(words) + 1), *rows]]
