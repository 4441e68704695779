"""How alike networks are: in what they get wrong, and in weight space.

Shapes: n and m networks, T test images, D values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pdiff_ray.storage.matrix import CHUNK_VALUES, Vectors, pieces


def unpack_wrong(packed: Sequence[bytes], num_images: int) -> np.ndarray:
    """Returns wrong predictions (n, T), bool, from what `np.packbits` made of each network's."""
    rows = [np.unpackbits(np.frombuffer(bits, np.uint8), count=num_images) for bits in packed]
    return np.array(rows, dtype=bool).reshape(len(packed), num_images)


def iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns the similarity |W1 & W2| / |W1 | W2| (n, m) of wrong predictions (n, T) and (m, T); paper, section 3.1.

    Two networks that get everything right are the same: 1.
    """
    a, b = first.astype(np.float32), second.astype(np.float32)
    both = a @ b.T
    either = a.sum(1)[:, None] + b.sum(1)[None] - both
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def mean_within(wrong: np.ndarray) -> float | None:
    """Returns the mean similarity of pairs of different networks by wrong predictions (n, T); None below two."""
    if len(wrong) < 2:
        return None
    return float(iou(wrong, wrong)[np.triu_indices(len(wrong), 1)].mean())


def distances(first: np.ndarray | Vectors, second: np.ndarray | Vectors) -> np.ndarray:
    """Returns the L2 distances (n, m) of vectors (n, D) and (m, D), in float64; they need not be in memory.

    From |a - b|^2 = |a|^2 - 2 ab + |b|^2, which takes a matrix product instead of n m differences; seen from one of the
    vectors, so that close ones lose no digits to what they have in common.
    """
    both = Vectors.of(first), Vectors.of(second)
    squares = np.zeros((len(first), len(second)))
    for piece in pieces(*both, values=CHUNK_VALUES):  # copies may not fit into memory
        a, b = (vectors.columns(piece.start, piece.stop).cpu().numpy() for vectors in both)
        origin = b[0].astype(np.float64)
        a, b = a - origin, b - origin
        squares += np.square(a).sum(1)[:, None] - 2 * a @ b.T + np.square(b).sum(1)
    return np.sqrt(squares.clip(0))
