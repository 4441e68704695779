"""Whether samples copy members: the statistic C_T of Meehan, Chaudhuri and Dasgupta (2020).

Shapes: K members, n vectors, r components.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pdiff_ray.common.devices import one_thread
from pdiff_ray.evaluation.geometry import Geometry, Place

CELL = 20  # vectors of samples and yardstick, which a cell of C_T has
MAX_CELLS = 10


@dataclass(frozen=True)
class Copying:
    """The data-copying statistic C_T (Meehan, Chaudhuri and Dasgupta 2020) against a yardstick.

    Attributes:
        c_t: the mean over cells, weighted by the yardstick's share in them, of Z_U: below zero where samples lie closer
            to the members than the yardstick does.
        z: of C_T: divided by its standard deviation where samples are of the yardstick's kind, with the yardstick's
            effective number in place of its number. Copying where it is below -1.96.
        cells: that are averaged.
        num: vectors of the yardstick.
        effective: of how many independent vectors the yardstick is worth, given the autocorrelation of neighbours.
    """

    c_t: float
    z: float
    cells: int
    num: int
    effective: float


def data_copying(geometry: Geometry, samples: Place, yardstick: Place, seed: int = 0) -> Copying | None:
    """Returns C_T (Meehan, Chaudhuri and Dasgupta 2020, section 3) of samples against a yardstick, and its z-score.

    Cells are those of k-means on the members' components, one for every `CELL` vectors of the yardstick. In each, Z_U
    is the Mann-Whitney statistic of the distances to the nearest member of the cell, standardized; cells with less than
    `CELL` samples are left out, unless that leaves none: then all is one cell. None if samples or yardstick are empty.
    """
    num, others = len(samples.squares), len(yardstick.squares)
    if not num or not others or geometry.degenerate:
        return None
    cells = max(1, min(MAX_CELLS, others // CELL, num // CELL, len(geometry.members) // CELL))
    effective = effective_number(yardstick.nearest) / others
    scores: list[tuple[int, float, float]] = []
    while not scores:
        member_cells, centres = _cells(geometry, cells, seed)
        sample_cells, other_cells = (torch.cdist(p.components, centres).argmin(1) for p in (samples, yardstick))
        for cell in range(len(centres)):
            own = member_cells == cell
            mine, theirs = samples.distances[sample_cells == cell], yardstick.distances[other_cells == cell]
            if own.any() and len(theirs) and (len(mine) >= CELL or cells == 1):
                differences = mine[:, own].amin(1)[:, None] - theirs[:, own].amin(1)
                above = float((differences > 0).double().mean() + (differences == 0).double().mean() / 2)
                n, m = len(theirs), len(mine)
                scores.append((n, _z_u(above, n, m), _z_u(above, max(1.0, n * effective), m)))
        cells = 1
    weights = [n / sum(n for n, _, _ in scores) for n, _, _ in scores]
    c_t = sum(weight * z for weight, (_, z, _) in zip(weights, scores, strict=True))
    corrected = sum(weight * z for weight, (_, _, z) in zip(weights, scores, strict=True))
    return Copying(c_t, corrected / math.hypot(*weights), len(scores), others, effective * others)


def _z_u(above: float, n: float, m: int) -> float:
    """Returns the Mann-Whitney U of n and m values, U / nm = above, less its mean and over its deviation."""
    return (above - 0.5) / math.sqrt((n + m + 1) / (12 * n * m))


def _cells(geometry: Geometry, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns the cell of each member (K,), and the centres (cells, r), by k-means on their components."""
    components = geometry.components
    if count == 1:
        return torch.zeros(len(components), dtype=torch.long, device=components.device), components.mean(0)[None]
    from sklearn.cluster import KMeans

    with one_thread():
        found = KMeans(count, n_init=10, random_state=seed % 2**32).fit(components.cpu().numpy())
    centres = torch.from_numpy(found.cluster_centers_).to(components)
    return torch.from_numpy(found.labels_).to(components.device), centres


def effective_number(values: Tensor) -> float:
    """Returns how many independent values a sequence (n,) is worth: n over its ranks' autocorrelation time, 1 to n."""
    count = len(values)
    if count < 4:
        return float(count)
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[places].double()  # equals share their mean rank
    centred = ranks - ranks.mean()
    energy = float(centred.square().sum())
    if not energy:  # all are equal
        return float(count)
    time = autocorrelation_time(float(centred[: count - lag] @ centred[lag:]) / energy for lag in range(count))
    return count / min(float(count), time)


def autocorrelation_time(correlations: Iterable[float]) -> float:
    """Returns how many values of a sequence count as one independent draw: 1 + 2 (sum of autocorrelations), 1 or more.

    The sum ends before the first pair of neighbouring lags that adds up to nothing (Geyer 1992, section 3.3, the
    initial positive sequence).

    Args:
        correlations: by lag, from 0 on.
    """
    total, lags = 0.0, iter(correlations)
    for even in lags:
        if (pair := even + next(lags, 0.0)) <= 0:
            break
        total += pair
    return max(1.0, 2 * total - 1)
