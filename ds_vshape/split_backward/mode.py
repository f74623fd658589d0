"""SplitForward and SplitBackward: around F, operators with a weight are recorded so that their backward can be split;
around B, it is.

A torch function mode sees every torch call made from Python, so any model is split without edits, by operator and not
by module class: nn.Linear, a Conv1D written with addmm, a tensor-parallel linear and a user's module alike.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType, FunctionType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from ds_vshape.split_backward.autocast import is_autocast_enabled
from ds_vshape.split_backward.casts import cast_arguments
from ds_vshape.split_backward.function import Operator, Operators, RecordingMode
from ds_vshape.split_backward.operators import MATRIX_OPERATORS
from ds_vshape.split_backward.store import WeightGradientStore


class SplitForward(RecordingMode):
    """F of a split: record what runs inside so that its backward can leave weight gradients to `store`.

        store = WeightGradientStore()
        with SplitForward(store):
            loss = stage(inputs)            # F
        with SplitBackward(store):
            loss.backward()                 # B
        store.run(deliver)                  # W

    `operators` maps a torch function to its split counterpart (see `operators.py`). A call is left to autograd, which
    is correct and puts its weight gradient into B, when the function isn't in the table, its weight isn't a Parameter
    or carries hooks (`weights.py`), an argument is of an exotic kind, or a torch.func transform,
    forward-mode autograd or torch.compile traces it.

    A backward that a layer runs by itself, inside its forward, computes everything at once.
    """

    _deferring: ClassVar[bool] = False

    def __init__(self, store: WeightGradientStore, operators: Operators = MATRIX_OPERATORS) -> None:
        super().__init__()
        self.store = store
        self._operators = operators
        self._before: list[bool] = []

    def __enter__(self) -> Self:
        _active.append(self)
        self._before.append(self.store.deferring)
        self.store.deferring = self._deferring
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        _active.pop()
        self.store.deferring = self._before.pop()
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
            return self._look_into(func, args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)

    def _under_autocast(self, operator: Operator, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cast = cast_arguments(func, args, kwargs)
        return NotImplemented if cast is None else operator(self.store, *cast[0], **cast[1])

    def _look_into(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`func` with this mode active inside; all at once where it is a backward that is run inside a backward."""
        nested = func is torch.autograd.backward and torch._C._current_graph_task_id() >= 0
        deferring = self.store.deferring and not (nested and not _recomputes(sys._getframe(2)))
        TorchFunctionMode.__enter__(self)  # type: ignore[no-untyped-call]
        try:
            with self.store.set_deferring(deferring):
                return _LOOKED_INTO[func](*args, **kwargs)
        finally:
            TorchFunctionMode.__exit__(self, None, None, None)  # type: ignore[no-untyped-call]


class SplitBackward(SplitForward):
    """B of a split: the backward that runs inside leaves weight gradients to `store`.

    A checkpoint's recomputation is recorded as in SplitForward, and its backward is part of B. Any other backward that
    runs inside B (in a function of the user's own, say) computes everything at once: its caller may look at
    `.grad`.
    """

    _deferring = True


# Of this process: on a GPU a backward, and what it recomputes, runs in a thread of its own.
_active: list[SplitForward] = []


def active_store() -> WeightGradientStore | None:
    """The store of the innermost active SplitForward or SplitBackward."""
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


# Where a backward comes from: the modules between its caller and this one, and those whose functions run a backward
# of what they have recomputed and look at no gradient of a weight.
_BETWEEN = {"torch._tensor", "torch.autograd", "torch.overrides"}
_RECOMPUTING = ("torch.utils.checkpoint", "deepspeed.", "megatron.core.")


def _recomputes(frame: FrameType | None) -> bool:
    """Whether the backward that led to `frame` is that of a checkpoint."""
    while frame is not None and frame.f_globals.get("__name__") in _BETWEEN:
        frame = frame.f_back
    return frame is not None and str(frame.f_globals.get("__name__")).startswith(_RECOMPUTING)


def _is_traced() -> bool:
    """Whether torch.compile, a torch.func transform or forward-mode autograd is tracing."""
    return (
        torch.compiler.is_dynamo_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
