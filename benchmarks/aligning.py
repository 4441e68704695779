"""Weight matching of many networks, against the same algorithm network by network and tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness import Result, compare
from pdiff_ray.config.schema import Network, SubsetRule
from pdiff_ray.data.sources import DATASETS
from pdiff_ray.networks.alignment import match
from pdiff_ray.networks.build import blank_images, build_network
from pdiff_ray.networks.subset import Subset, resolve
from pdiff_ray.networks.symmetries import Symmetries, find_symmetries

TARGETS: dict[str, float | None] = {"s2": 5.0, "convnet3": None}


def align(count: int = 200, names: tuple[str, ...] = tuple(TARGETS)) -> Iterator[Result]:
    """Networks of MNIST from initialisations of their own, matched to the first of them."""
    info = DATASETS["mnist"]
    for name in names:
        config = Network(name=name)
        network = build_network(config, info, 0).eval()
        subset = resolve(SubsetRule(all=True), network, "included", blank_images(info))
        images = torch.randn(blank_images(info).shape, generator=torch.Generator().manual_seed(0))
        symmetries = find_symmetries(network, subset, images)
        states = (build_network(config, info, seed).state_dict() for seed in range(count))
        vectors = torch.stack([subset.flatten(state) for state in states])

        def together(symmetries: Symmetries = symmetries, vectors: Tensor = vectors) -> Tensor:
            return symmetries.permuted(vectors, match(symmetries, vectors[0], vectors, 0))

        def singly(symmetries: Symmetries = symmetries, subset: Subset = subset, vectors: Tensor = vectors) -> Tensor:
            return torch.stack([_plain(symmetries, subset, vectors[0], vector) for vector in vectors])

        before, *after = ((rows - vectors[0]).norm(dim=1).mean() for rows in (vectors, together(), singly()))
        torch.testing.assert_close(*after, rtol=1e-3, atol=0)
        yield compare(
            "align",
            f"{count} {name} of {subset.size:,} parameters",
            together,
            "SciPy's assignment one network at a time, tensor by tensor",
            singly,
            target=TARGETS.get(name),
            note=f"distance to the reference {before:.2f}, then {after[0]:.3f} against {after[1]:.3f}",
        )


def _plain(symmetries: Symmetries, subset: Subset, reference: Tensor, vector: Tensor) -> Tensor:
    """Algorithm 1 as it is written, for groups that are whole axes."""
    from scipy.optimize import linear_sum_assignment

    theirs, own = subset.unflatten(reference), subset.unflatten(vector)
    orders = [torch.arange(group.size) for group in symmetries.groups]
    axes: dict[str, list[tuple[int, int]]] = {name: [] for name in own}
    for index, group in enumerate(symmetries.groups):
        for place in group.places:
            axes[place.name].append((place.axis, index))

    def permuted(name: str, but: int | None = None) -> Tensor:
        tensor = own[name]
        for axis, index in axes[name]:
            tensor = tensor if axis == but else tensor.index_select(axis, orders[index])
        return tensor

    random, progress = torch.Generator().manual_seed(0), True
    while progress:
        progress = False
        for index in torch.randperm(len(orders), generator=random).tolist():
            group = symmetries.groups[index]
            likeness = torch.zeros(group.size, group.size)
            for place in group.places:
                pair = (theirs[place.name], permuted(place.name, place.axis))
                one, other = (tensor.movedim(place.axis, 0).reshape(group.size, -1) for tensor in pair)
                likeness += one @ other.T
            order = torch.from_numpy(linear_sum_assignment(likeness.numpy(), maximize=True)[1])
            old, new = (likeness.gather(1, o[:, None]).sum() for o in (orders[index], order))
            if new > old + 1e-6 * reference.norm() * vector.norm():
                orders[index], progress = order, True
    return subset.flatten({name: permuted(name) for name in own})
