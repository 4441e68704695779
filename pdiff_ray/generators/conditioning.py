"""Denoisers that are told something of what they denoise: classifier-free guidance (Ho and Salimans, 2022, arXiv
2207.12598).

Shapes: B latents of Z values, each with a condition, a standardized number that is NaN where nothing is known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class ConditionedDenoiser(nn.Module):
    """A denoiser, called as it is alone, that adds a code of the condition to the embedding of time.

    Args:
        denoiser: any, whose `embedding` gives (B, width) of timesteps (B,).
    """

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        self.denoiser = denoiser
        with torch.no_grad():
            width = denoiser.embedding(torch.zeros(1)).shape[-1]
        self.code = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self._codes: Tensor | None = None
        self._guidance = 1.0

    def embedding(self, t: Tensor) -> Tensor:
        embedded: Tensor = self.denoiser.embedding(t)
        return embedded

    @contextlib.contextmanager
    def told(self, condition: Tensor, guidance: float = 1.0) -> Iterator[None]:
        """Tells the denoiser conditions (B,) meanwhile; otherwise it is told of none.

        Args:
            guidance: how far to go from what it predicts untold to what it predicts told: 0 to 1, or beyond.
        """
        known = condition.isfinite()
        codes = self.code(condition.where(known, 0.0)[:, None])
        self._codes, self._guidance = codes * known[:, None], guidance
        try:
            yield
        finally:
            self._codes = None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        codes, guidance = self._codes, self._guidance
        untold = self.denoiser(x, time) if codes is None or guidance != 1 else None
        if codes is None or guidance == 0:
            assert untold is not None
            return untold
        prediction: Tensor = self.denoiser(x, time + codes)
        return prediction if untold is None else torch.lerp(untold, prediction, guidance)


class ConditionedTraining(nn.Module):
    """Trains the model of a conditioned denoiser on rows (B, Z + 1), latents that end with their conditions.

    Args:
        model: has a `ConditionedDenoiser`, and a loss of latents (B, Z).
        dropout: probability with which a row's condition is not told.
    """

    def __init__(self, model: Any, dropout: float) -> None:
        super().__init__()
        self.model, self.dropout = model, dropout

    def loss(self, rows: Tensor, random: torch.Generator) -> Tensor:
        """Computes the model's loss."""
        told = torch.rand(len(rows), generator=random, device=rows.device) >= self.dropout
        with self.model.denoiser.told(rows[:, -1].where(told, torch.nan)):
            loss: Tensor = self.model.loss(rows[:, :-1], random)
        return loss
