"""Stage `base`: trains the network whose subset will be generated; data-parallel over the workers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from pdiff_ray.common.devices import autocast, enough_memory
from pdiff_ray.common.seeds import seed_global
from pdiff_ray.config.schema import Experiment
from pdiff_ray.data.dataset import Dataset, load, steps_per_epoch
from pdiff_ray.data.sources import describe
from pdiff_ray.evaluation.judge import Judge
from pdiff_ray.networks.build import build_network, load_tensors
from pdiff_ray.networks.subset import Subset
from pdiff_ray.stages.context import Context
from pdiff_ray.storage.artifacts import Artifact
from pdiff_ray.storage.trees import load_tree, save_tree
from pdiff_ray.training.trainer import Trainer

NETWORK_FILE = "network.safetensors"
IMAGES_FILE = "images.safetensors"
HISTORY_FILE = "history.safetensors"
CHECKPOINT = "checkpoint.safetensors"
KEPT_IMAGES = 16  # test images beside a base, with which exported networks are tried where the data set is not


def build(experiment: Experiment, artifacts: Mapping[str, Artifact], context: Context) -> None:
    """Trains and stores the base network; resumes at the last saved epoch."""
    artifact, config = artifacts["base"], experiment.training
    dataset = open_dataset(experiment, context)
    started = time.monotonic()
    network, history = train_network(experiment, dataset, context, ("base", config.seed or 0), "base", artifact)
    if context.rank == 0:
        files = files_of(network, dataset)
        files[HISTORY_FILE] = save_tree({name: torch.tensor(values) for name, values in history.items()})
        info = describe_base(experiment, network, dataset, context)
        artifact.commit(files, info, time.monotonic() - started)
    if context.world > 1:
        dist.barrier()


def files_of(network: nn.Module, dataset: Dataset) -> dict[str, bytes]:
    """Returns a base's files by name: its tensors, and the first test images (B, C, S, S), prepared, with labels."""
    images, labels = next(dataset.test.in_order(KEPT_IMAGES))
    kept = {"images": dataset.prepare(images, torch.device("cpu")), "labels": labels}
    return {NETWORK_FILE: save_tree(dict(network.state_dict())), IMAGES_FILE: save_tree(kept)}


def describe_base(experiment: Experiment, network: nn.Module, dataset: Dataset, context: Context) -> dict[str, Any]:
    """Returns what the manifest says of a base network: accuracies, and what later stages need to know of the data."""
    judge = Judge(network, Subset(()), dataset, context.device, batch_size=experiment.evaluation.batch_size)
    judgement = judge.judge(torch.empty(1, 0))[0]
    return {
        "train_accuracy": judgement.train_accuracy,
        "validation_accuracy": judgement.validation_accuracy,
        "test_accuracy": judgement.test_accuracy,
        "parameters": sum(p.numel() for p in network.parameters()),
        "train_images": len(dataset.train),
        "validation_images": len(dataset.validation),
        "test_images": len(dataset.test),
        "num_classes": dataset.info.num_classes,
    }


def open_dataset(experiment: Experiment, context: Context) -> Dataset:
    """Opens the experiment's data, on the context's device where it fits."""
    dataset = load(experiment.data, context.cache, lambda *state: context.progress("images", *state))
    for split in (dataset.train, dataset.test):
        split.source.to(context.device)
    return dataset


def untrained_network(experiment: Experiment) -> nn.Module:
    """Builds the experiment's network, to be given its parameters; no pretrained ones are loaded.

    Raises:
        ConfigError: the network cannot be built.
    """
    return build_network(experiment.network.model_copy(update={"pretrained": False}), describe(experiment.data))


def load_network(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> nn.Module:
    """Returns the trained base network, on the CPU, in eval mode."""
    network = untrained_network(experiment)
    tree = load_tree(artifacts["base"].read(NETWORK_FILE), artifacts["base"].location)
    load_tensors(network, tree)
    return network.eval()


def load_state(artifact: Artifact, name: str) -> dict[str, Any] | None:
    """Returns the tree that unfinished work has saved under `name`, None if there is nothing."""
    saved = artifact.load_work(name)
    return None if saved is None else load_tree(saved, artifact.storage.location(artifact.work(name)))


def train_network(
    experiment: Experiment,
    dataset: Dataset,
    context: Context,
    seed: tuple[int | str, ...],
    task: str,
    checkpoints: Artifact | None = None,
) -> tuple[nn.Module, dict[str, list[float]]]:
    """Trains all parameters of a new network by the recipe of `experiment.training`.

    Args:
        seed: of the initialisation, the order of the images and their augmentation.
        task: names the training in progress reports and messages.
        checkpoints: where to resume from and save to; by rank 0.

    Returns:
        The network, and per epoch its mean training loss and validation accuracy.
    """
    config, device, main = experiment.training, context.device, context.rank == 0
    network = build_network(experiment.network, dataset.info, *seed).to(device)
    per_epoch = steps_per_epoch(len(dataset.train), config.batch_size)
    num_steps = config.epochs * per_epoch
    trainer = Trainer(list(network.parameters()), config.optimizer, num_steps, f"training of the {task}")
    history: dict[str, list[float]] = {"loss": [], "validation_accuracy": []}
    first = 0
    state = load_state(checkpoints, CHECKPOINT) if checkpoints else None
    if state is not None:
        load_tensors(network, state["network"])
        trainer.load_state(state["optimizer"])
        first, history = state["epoch"], {name: state["history"][name] for name in history}
    model: nn.Module = network
    if context.world > 1:
        model = DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)
    judge = Judge(network, Subset(()), dataset, device, batch_size=experiment.evaluation.batch_size)
    last_saved = time.monotonic()
    for epoch in range(first, config.epochs):
        model.train()
        total = torch.zeros((), device=device)
        start = epoch * per_epoch
        batches = dataset.training_batches(
            config.batch_size, start, start + per_epoch, device, *seed, rank=context.rank, world=context.world
        )
        with enough_memory(trainer.what, "training.batch_size"):
            for step, (images, labels) in enumerate(batches, start):
                seed_global(*seed, "step", step, context.rank)
                with autocast(device, config.precision):
                    logits = model(images)
                loss = functional.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
                trainer.step(loss, step)
                total += loss.detach()
                if main and step % 10 == 0:
                    context.progress(task, step, num_steps, f"epoch {epoch + 1}/{config.epochs}")
        total /= per_epoch
        if context.world > 1:
            dist.all_reduce(total)
        mean = (total / context.world).item()
        trainer.check_loss(mean, start + per_epoch, "training.optimizer.lr")
        if not main:
            continue
        accuracy = judge.judge(torch.empty(1, 0), ["validation"])[0].validation_accuracy
        history["loss"].append(mean)
        history["validation_accuracy"].append(float(accuracy or 0))
        context.progress(task, start + per_epoch, num_steps, f"loss {mean:.3f}, validation {accuracy:.1%}")
        if checkpoints and epoch + 1 < config.epochs and context.due(last_saved):
            state = {
                "epoch": epoch + 1,
                "history": history,
                "network": network.state_dict(),
                "optimizer": trainer.state(),
            }
            checkpoints.save_work(CHECKPOINT, save_tree(state))
            last_saved = time.monotonic()
    return network.eval(), history
