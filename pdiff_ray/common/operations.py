"""Operations counted while they run, by the formulas of torch's FLOP counter."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Operations(TorchDispatchMode):
    """Adds up FLOPs, apart for operations that read a tensor with gradients (True) and others (False); and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[bool] = Counter()
        self.bytes = 0  # of outputs that are new

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if formula := flop_registry.get(func.overloadpacket):
            reached = any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves((args, kwargs)))
            self.flops[reached] += formula(*args, **kwargs, out_val=output)
        if not func.is_view and not func._schema.is_mutable:
            self.bytes += sum(t.nbytes for t in tree_leaves(output) if isinstance(t, Tensor))
        return output
