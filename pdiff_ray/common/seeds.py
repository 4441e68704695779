"""Seeds of random numbers: each use derives a seed of its own, so that results do not depend on the order of work."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """Returns a 63-bit seed that is a fixed function of `parts`, as in `derive_seed(seed, "zoo", run, step)`."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_global(*parts: int | str) -> None:
    """Seeds torch's global generators, the only ones that dropout can use, by `derive_seed(*parts)`."""
    torch.manual_seed(derive_seed(*parts))


def rng(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """Returns a torch generator on `device`, seeded by `derive_seed(*parts)`."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))
