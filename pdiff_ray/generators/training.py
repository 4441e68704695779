"""The training loop of the generators' models: AdamW with a cosine schedule, an average of the weights, resuming."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pdiff_ray.common.seeds import rng
from pdiff_ray.config.schema import Optimizer
from pdiff_ray.generators.autoencoder import Autoencoder, AutoencoderSettings
from pdiff_ray.generators.conditioning import ConditionedTraining
from pdiff_ray.generators.diffusion import DenoiserSettings, Diffusion
from pdiff_ray.generators.flow import Flow
from pdiff_ray.generators.graphs import graphed
from pdiff_ray.generators.interface import Fitting
from pdiff_ray.training.trainer import Trainer


class EMA:
    """Exponential moving average of a model's weights, with the usual warm-up min(decay, (1 + t) / (10 + t)).

    Running statistics are averaged as well: those of the last weights are not the averages'.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: tensor.clone() for name, tensor in _averaged(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), list(_averaged(model).values()), 1 - decay)


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    """Returns a model's parameters and running statistics."""
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def fit_model(
    name: str,
    model: Autoencoder | Diffusion | Flow | ConditionedTraining,
    data: Tensor,
    settings: AutoencoderSettings | DenoiserSettings,
    fitting: Fitting,
    ema_decay: float = 0.0,
    rungs: range = range(0),
    preview: Callable[[], Tensor] | None = None,
) -> None:
    """Trains `model` in place on rows drawn from `data` (K, ...).

    Args:
        name: of the model, for progress, messages and the history of losses.
        model: whose `loss` of rows and random numbers is lowered.
        ema_decay: above 0, the model ends with the average of its weights.
        rungs: at which `fitting.preview` is shown the vectors that `preview` gives; spread evenly over the steps.
    """
    num_steps, batch_size = settings.steps, settings.batch_size
    optimizer = Optimizer(lr=settings.lr, weight_decay=settings.weight_decay, schedule="cosine")
    trainer = Trainer(list(model.parameters()), optimizer, num_steps, f"training of the {name}")
    random = rng(fitting.device, fitting.seed, name)
    ema = EMA(model, ema_decay) if ema_decay else None
    losses = torch.zeros(num_steps, device=fitting.device)
    first = 0
    saved = fitting.load(name)
    if saved is not None and saved["device"] == fitting.device.type:  # another device has other random numbers
        first = saved["step"]
        model.load_state_dict(saved["model"])
        trainer.load_state(saved.get("optimizer", {}))
        random.set_state(saved["random"])
        losses[:first] = saved["losses"].to(fitting.device)
        if ema:  # in the model's order, which a stored dict does not keep
            ema.average = {key: saved["ema"][key].to(fitting.device) for key in ema.average}

    def save(step: int) -> None:
        state = {
            "step": step,
            "device": fitting.device.type,
            "model": model.state_dict(),
            "optimizer": trainer.state(),
            "random": random.get_state(),
        }
        fitting.save(name, {**state, "losses": losses[:step], **({"ema": ema.average} if ema else {})})

    def backward() -> Tensor:
        batch = data
        if batch_size < len(data):
            batch = data[torch.randint(len(data), (batch_size,), generator=random, device=fitting.device)]
        loss = model.loss(batch, random)
        trainer.backward(loss)
        return loss.detach()

    due = {num_steps * (i + 1) // len(rungs): rung for i, rung in enumerate(rungs)}
    last_saved = time.monotonic()
    model.train()
    if fitting.graphs and fitting.device.type == "cuda" and first < num_steps:
        backward = graphed(backward, model, random)
    for step in range(first, num_steps):
        losses[step] = backward()
        trainer.apply(step)
        if ema:
            ema.update(model, step)
        # Before the state is saved: a rung may be shown twice, but is never left out.
        if fitting.preview and preview and step + 1 in due:
            current = {name: tensor.clone() for name, tensor in _averaged(model).items()}
            if ema:
                model.load_state_dict(ema.average, strict=False)
            model.eval()
            with torch.inference_mode():
                vectors = preview()
            fitting.preview(due[step + 1], vectors)
            model.load_state_dict(current, strict=False)
            model.train()
        if (step + 1) % 50 == 0 or step + 1 == num_steps:
            value = losses[step].item()
            trainer.check_loss(value, step, f"{settings.section}.lr")
            fitting.progress(name, step + 1, num_steps, f"loss {value:.4f}")
        if step + 1 < num_steps and fitting.due(last_saved):
            save(step + 1)
            last_saved = time.monotonic()
    model.zero_grad(set_to_none=True)  # a graph's memory goes with its gradients
    # A model that is done is kept too: the next one's training may be interrupted.
    if first < num_steps:
        save(num_steps)
    if ema:
        model.load_state_dict(ema.average, strict=False)
    model.eval()
    fitting.history[name] = losses.tolist()
