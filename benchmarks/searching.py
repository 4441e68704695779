"""How failures are told to a search: as pruned, as this project does, as failed, and a search that is told nothing."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import nn

from benchmarks.harness import Result, result
from pdiff_ray.common.errors import PdiffError
from pdiff_ray.config.schema import Optimizer
from pdiff_ray.config.sweep import Assignment, Parameter, Sweep
from pdiff_ray.sweeps.search import suggest
from pdiff_ray.sweeps.trial import Trial
from pdiff_ray.training.trainer import Trainer

STEPS, BATCH = 60, 8
SPACES = {"learning rates, of which many diverge": (1e-3, 100.0), "learning rates, of which none diverges": (1e-3, 0.1)}


def searching(trials: int = 60, seeds: int = 7) -> Iterator[Result]:
    """Searches for the SGD of a small autoencoder, which are told of failures as pruned, against other ways."""
    for space, learning_rates in SPACES.items():
        search = partial(_search, learning_rates, trials)
        ours = [search("optuna", True, seed) for seed in range(seeds)]
        for against, way, told in (("told as failed", "optuna", False), ("random search", "random", True)):
            other = [search(way, told, seed) for seed in range(seeds)]
            yield result(
                "searching",
                f"best loss of {trials} trials over {space}, failures told as pruned",
                against,
                list(zip(map(_best, ours), map(_best, other), strict=True)),
                unit="",
                note=f"failed of the last half: {_failures(ours)} against {_failures(other)}",
            )


def _search(learning_rates: tuple[float, float], count: int, way: str, told: bool, seed: int) -> list[Trial]:
    """Runs a search; without `told` it does not hear of failures, which is what TPE makes of trials that failed."""
    parameters = {
        "lr": Parameter(loguniform=learning_rates),
        "momentum": Parameter(uniform=(0.0, 0.95)),
        "weight_decay": Parameter(loguniform=(1e-6, 1e-1)),
    }
    metric = "generated/mean_validation_loss"
    sweep = Sweep.model_validate(
        {"search": way, "num_trials": count, "metric": metric, "parameters": parameters, "seed": seed}
    )
    done: list[Trial] = []
    for number in range(count):
        trial = Trial(number, suggest(sweep, number, [t for t in done if told or t.state == "finished"]), (0,))
        try:
            ended = Trial(number, trial.assignment, (0,), "finished", _fit(trial.assignment))
        except PdiffError as error:
            ended = Trial(number, trial.assignment, (0,), "failed", reason=str(error))
        done.append(ended)
    return done


def _fit(values: Assignment) -> float:
    """Trains an autoencoder of 16 numbers on 256 vectors near 8 directions; returns its loss on 256 others."""
    random = torch.Generator().manual_seed(0)
    vectors = torch.randn(512, 8, generator=random) @ torch.randn(8, 64, generator=random) / 8**0.5
    vectors += 0.1 * torch.randn(512, 64, generator=random)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 64))
    optimizer = Optimizer.model_validate({"name": "sgd", **values})
    trainer = Trainer(list(network.parameters()), optimizer, STEPS, "training of the autoencoder")
    for step in range(STEPS):
        batch = vectors[torch.randint(256, (BATCH,), generator=random)]
        trainer.step(loss := nn.functional.mse_loss(network(batch), batch), step)
        trainer.check_loss(loss.item(), step, "lr")
    with torch.inference_mode():
        loss = nn.functional.mse_loss(network(vectors[256:]), vectors[256:])
    trainer.check_loss(loss.item(), STEPS, "lr")
    return loss.item()


def _best(trials: Sequence[Trial]) -> float:
    return min(trial.objective for trial in trials if trial.objective is not None)


def _failures(searches: Sequence[Sequence[Trial]]) -> str:
    """Returns the share of failed trials in the second halves of searches: median, smallest and largest."""
    shares = [statistics.mean(t.state == "failed" for t in trials[len(trials) // 2 :]) for trials in searches]
    return f"{statistics.median(shares):.0%} ({min(shares):.0%}-{max(shares):.0%})"
