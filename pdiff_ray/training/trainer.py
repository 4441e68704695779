"""Training steps: optimizer, learning-rate schedule, precision, and a state that can be saved and resumed exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pdiff_ray.common.errors import PdiffError
from pdiff_ray.common.registry import Registry
from pdiff_ray.config.schema import Optimizer

# Functions of the parameters and the settings. What an optimizer keeps of a parameter has the parameter's shape, but
# for the number of steps ("step"): networks that are trained as one program share one optimizer.
OPTIMIZERS: Registry[Callable[[Sequence[nn.Parameter], Optimizer], torch.optim.Optimizer]] = Registry(
    "optimizer",
    {
        "adamw": lambda parameters, s: torch.optim.AdamW(parameters, s.lr, weight_decay=s.weight_decay),
        "adam": lambda parameters, s: torch.optim.Adam(parameters, s.lr, weight_decay=s.weight_decay),
        "sgd": lambda parameters, s: torch.optim.SGD(parameters, s.lr, s.momentum, weight_decay=s.weight_decay),
    },
)


def _onecycle(step: int, num_steps: int) -> float:
    """Rises from 1/25 over the first 30 % and falls to zero, both as half cosines (Smith and Topin 2018)."""
    position = step / max(1, num_steps)
    if position < 0.3:
        return 1 / 25 + (1 - 1 / 25) * 0.5 * (1 - math.cos(math.pi * position / 0.3))
    return 0.5 * (1 + math.cos(math.pi * (position - 0.3) / 0.7))


# The learning rate at a step (of 0 to num_steps - 1), relative to its peak.
SCHEDULES: Registry[Callable[[int, int], float]] = Registry(
    "schedule",
    {
        "constant": lambda step, num_steps: 1.0,
        "cosine": lambda step, num_steps: 0.5 * (1 + math.cos(math.pi * (step / max(1, num_steps)))),
        "onecycle": _onecycle,
    },
)


class Trainer:
    """Gradient steps on some parameters.

    Args:
        parameters: what is trained.
        num_steps: length of the schedule.
        what: names the training in messages.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], config: Optimizer, num_steps: int, what: str) -> None:
        self.config, self.num_steps, self.what = config, num_steps, what
        self.optimizer = OPTIMIZERS[config.name](parameters, config)
        self.schedule = SCHEDULES[config.schedule]

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
            group["lr"] = self.config.lr * self.schedule(step, self.num_steps)
        self.optimizer.step()

    def check_loss(self, loss: float, step: int, lr_field: str) -> None:
        """Raises PdiffError if `loss` is not a finite number."""
        if not math.isfinite(loss):
            raise PdiffError(
                f"{self.what}: the loss is {loss} at step {step}; lower {lr_field} (it is {self.config.lr:g}) or check "
                "the data"
            )

    def state(self) -> dict[str, Any]:
        """Returns the optimizer's state, for `trees.save_tree`."""
        return {str(index): dict(state) for index, state in self.optimizer.state_dict()["state"].items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes up a state that `state` returned."""
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {int(i): s for i, s in state.items()}, "param_groups": groups})
