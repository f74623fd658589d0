"""SplitBackward: while it is active, operators with a weight are recorded so that their backward is split.

A torch function mode sees every torch call made from Python, so any model is split without edits, by operator and not
by module class: nn.Linear, a Conv1D written with addmm, a tensor-parallel linear and a user's module alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ds_vshape.split_backward.function import Operators
from ds_vshape.split_backward.operators import MATRIX_OPERATORS
from ds_vshape.split_backward.store import WeightGradientStore


class SplitBackward(TorchFunctionMode):
    """Split the backward of what runs inside: weight gradients go to `store`, the rest to autograd.

        store = WeightGradientStore()
        with SplitBackward(store):
            loss = stage(inputs)            # F
        with SplitBackward(store):          # B: for the recompute of activation checkpoints
            loss.backward()
        store.run(deliver)                  # W

    `operators` maps a torch function to its split counterpart (see `operators.py`). A call is left to autograd, which
    is correct and puts its weight gradient into B, when the function isn't in the table, its weight isn't a Parameter
    or carries hooks (`weights.py`), an argument is of an exotic kind, autocast casts the operands, or a
    torch.func transform or torch.compile traces it.
    """

    def __init__(self, store: WeightGradientStore, operators: Operators = MATRIX_OPERATORS) -> None:
        super().__init__()
        self.store = store
        self._operators = operators

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Each torch call of the forward comes through here, attributes like x.shape included: one look-up decides.
        operator = self._operators.get(func)
        if operator is not None and torch.is_grad_enabled() and not _is_traced_or_cast():
            value = operator(self.store, *args, **kwargs) if kwargs else operator(self.store, *args)
            if value is not NotImplemented:
                return value
        return func(*args, **kwargs) if kwargs else func(*args)


def _is_traced_or_cast() -> bool:
    """Whether torch.compile or a torch.func transform is tracing, or autocast is on."""
    return (
        torch.compiler.is_dynamo_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_any_autocast_enabled()
    )
