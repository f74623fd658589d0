"""SplitBackward: while it is active, operators with a weight are recorded so that their backward is split.

A torch function mode sees every torch call made from Python, so any model is split without edits, by operator and not
by module class: nn.Linear, a Conv1D written with addmm, a tensor-parallel linear and a user's module alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ds_vshape.split_backward.autocast import is_autocast_enabled
from ds_vshape.split_backward.casts import cast_arguments
from ds_vshape.split_backward.function import Operator, Operators
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
    or carries hooks (`weights.py`), an argument is of an exotic kind, or a torch.func transform or torch.compile
    traces it.
    """

    def __init__(self, store: WeightGradientStore, operators: Operators = MATRIX_OPERATORS) -> None:
        super().__init__()
        self.store = store
        self._operators = operators

    def __enter__(self) -> SplitBackward:
        _active.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        _active.pop()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Each torch call of the forward comes through here, attributes like x.shape included: one look-up decides.
        operator = self._operators.get(func)
        if operator is not None and torch.is_grad_enabled() and not _is_traced():
            if is_autocast_enabled():
                value = self._under_autocast(operator, func, args, kwargs or {})
            else:
                value = operator(self.store, *args, **kwargs) if kwargs else operator(self.store, *args)
            if value is not NotImplemented:
                return value
        elif func in _LOOKED_INTO and not torch.compiler.is_dynamo_compiling():
            with self:
                return _LOOKED_INTO[func](*args, **(kwargs or {}))
        return func(*args, **kwargs) if kwargs else func(*args)

    def _under_autocast(self, operator: Operator, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cast = cast_arguments(func, args, kwargs)
        return NotImplemented if cast is None else operator(self.store, *cast[0], **cast[1])


# Of this process: on a GPU a backward, and what it recomputes, runs in a thread of its own.
_active: list[SplitBackward] = []


def active_store() -> WeightGradientStore | None:
    """The store of the innermost active SplitBackward."""
    return _active[-1].store if _active else None


def _without_dispatch(function: Any) -> Any:
    """`function`, a Python function of torch, without its first step of offering itself to a torch function mode."""
    skipped = {name: _never for name in function.__globals__ if name.startswith("has_torch_function")}
    names = {**function.__globals__, **skipped}
    twin = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _never(*_: Any) -> bool:
    return False


# A mode isn't active inside the calls that it handles, which is right for most. In these it must see what happens
# inside: a backward may recompute a checkpoint, and torch's attention calls linear.
_LOOKED_INTO = {
    function: _without_dispatch(function)
    for function in (
        Tensor.backward,
        torch.autograd.backward,
        torch.autograd.grad,
        torch.nn.functional.multi_head_attention_forward,
    )
}


def _is_traced() -> bool:
    """Whether torch.compile or a torch.func transform is tracing."""
    return torch.compiler.is_dynamo_compiling() or torch._C._are_functorch_transforms_active()
