"""CUDA graphs of steps that are many small kernels, whose launches take longer than they do."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn


def capture(step: Callable[[], Tensor | None]) -> tuple[torch.cuda.CUDAGraph, Tensor | None]:
    """Captures the graph of a step that works on the same memory each time, and its result, which a replay overwrites.

    The step runs once before it is captured. Generators that it draws from go on with each replay.

    Raises:
        RuntimeError: the step cannot be captured.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # libraries set themselves up on a first call, which no graph may hold
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def graphed(backward: Callable[[], Tensor], model: nn.Module, random: torch.Generator) -> Callable[[], Tensor]:
    """Returns `backward` as the replay of a graph; as it is, with a warning, if its loss or gradients would be others.

    Args:
        backward: makes the gradients of the model's parameters anew and returns the loss, with numbers from `random`;
            the steps that try it leave no trace in the model's running statistics.
    """
    parameters, buffers = list(model.parameters()), list(model.buffers())
    state, kept = random.get_state(), [buffer.clone() for buffer in buffers]

    def rewind() -> None:
        random.set_state(state)
        for buffer, value in zip(buffers, kept, strict=True):
            buffer.copy_(value)

    try:
        graph, loss = capture(backward)
        assert loss is not None
        gradients = [parameter.grad for parameter in parameters]
        rewind()
        graph.replay()
        found = [tensor.clone() for tensor in (loss, *gradients) if tensor is not None]
        rewind()
        expected = [backward(), *(parameter.grad for parameter in parameters if parameter.grad is not None)]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 * float(b.abs().max()))
    except (RuntimeError, AssertionError, ValueError) as error:
        warnings.warn(f"training without a CUDA graph, which is slower: {error}", stacklevel=2)
        rewind()
        return backward
    rewind()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient  # where a replay writes them

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay
