"""Where random numbers come from: every use derives its own seed, so that nothing depends on the order of work."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a fixed function of `parts`, for example `derive_seed(seed, "zoo", run, step)`."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_global(*parts: int | str) -> None:
    """Seeds torch's global generators by `derive_seed(*parts)`: dropout takes no other."""
    import torch

    torch.manual_seed(derive_seed(*parts))


def generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """A torch generator on `device`, seeded by `derive_seed(*parts)`."""
    import torch

    return torch.Generator(device).manual_seed(derive_seed(*parts))
