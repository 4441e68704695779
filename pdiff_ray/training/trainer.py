"""Training steps: optimizer, learning-rate schedule, precision, and a state that can be saved and resumed exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pdiff_ray.common.errors import PdiffError
from pdiff_ray.config.schema import Optimizer


def lr_factor(schedule: str, step: int, num_steps: int) -> float:
    """The learning rate at `step` (of 0 to num_steps - 1), relative to its peak.

    "onecycle" rises from 1/25 over the first 30 % and falls to zero, both as half cosines (Smith and Topin 2018).
    """
    if schedule == "constant":
        return 1.0
    position = step / max(1, num_steps)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * position))
    if position < 0.3:
        return 1 / 25 + (1 - 1 / 25) * 0.5 * (1 - math.cos(math.pi * position / 0.3))
    return 0.5 * (1 + math.cos(math.pi * (position - 0.3) / 0.7))


class Trainer:
    """Gradient steps on some parameters.

    Args:
        parameters: what is trained.
        num_steps: length of the schedule.
        what: names the training in messages.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], config: Optimizer, num_steps: int, what: str) -> None:
        self.config, self.num_steps, self.what = config, num_steps, what
        kwargs: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
        if config.name == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, momentum=config.momentum, **kwargs)
        else:
            self.optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name](parameters, **kwargs)

    def step(self, loss: Tensor, step: int) -> None:
        """Applies the gradient of `loss` with the learning rate of `step`."""
        self.backward(loss)
        self.apply(step)

    def backward(self, loss: Tensor) -> None:
        """Replaces the gradients by those of `loss`."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()

    def apply(self, step: int) -> None:
        """Applies the gradients with the learning rate of `step`."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * lr_factor(self.config.schedule, step, self.num_steps)
        self.optimizer.step()

    def check(self, loss: float, step: int, lr_field: str) -> None:
        """Raises PdiffError if `loss` is not a finite number."""
        if not math.isfinite(loss):
            raise PdiffError(
                f"{self.what}: the loss is {loss} at step {step}; lower {lr_field} (it is {self.config.lr:g}) or check "
                "the data"
            )

    def state(self) -> dict[str, Any]:
        """The optimizer's state, for `artifacts.save_tree`."""
        return {str(index): dict(state) for index, state in self.optimizer.state_dict()["state"].items()}

    def load_state(self, state: dict[str, Any]) -> None:
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {int(i): s for i, s in state.items()}, "param_groups": groups})
