"""Whether anything else may write to a tensor that W will read, and copies for W where that is so.

Others often hold a gradient too: the other branch of a residual, a hook, the caller of backward. Autograd reads it at
once, so a change in place afterwards does no harm. W reads it later, so B copies what others hold. References are
counted: Python's own, those of the tensor (another node that waits for the same gradient) and those of its memory (a
view of it). How many there are while nothing else holds one is found out once, by a backward of this module's own.

A run of autograd holds the gradients that it starts from, its first ones, until it ends. If its caller drops them then
(`run_from`), these references don't count.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, _engine_run_backward, get_gradient_edge

# Of a tensor: references from Python, references to the tensor, and those to its memory; the first two of the tensor
# that it is a view of, if it is one.
_Counts = tuple[int, int, int, int, int]

# The first gradients of the runs of autograd that `run_from` has begun, by id.
_first_gradients: set[int] = set()


class _Unshared(NamedTuple):
    """The counts of an output gradient that nothing else holds, of one that is a view, of a first gradient and a view
    of one, and of a saved tensor."""

    own: _Counts
    view: _Counts
    first: _Counts
    view_of_first: _Counts
    saved: _Counts


def run_from(roots: tuple[GradientEdge, ...], gradients: tuple[Tensor, ...]) -> None:
    """Run autograd from `roots`, as torch.autograd.backward does without its checks of shapes: no graph is retained or
    made, and all leaves get their gradients.

    The caller must hold `gradients` by this tuple alone, and drop it afterwards: then a gradient counts as shared only
    where something else holds it.
    """
    started = {id(gradient) for gradient in gradients} - _first_gradients
    _first_gradients.update(started)
    try:
        _engine_run_backward(roots, gradients, False, False, (), allow_unreachable=True, accumulate_grad=True)
    finally:
        _first_gradients.difference_update(started)


def is_shared(output_gradients: tuple[Tensor | None, ...], position: int) -> bool:
    """Whether anything else holds the gradient at `position` of the tuple with which autograd called a backward."""
    gradient = output_gradients[position]
    if gradient is None:
        return False
    unshared = _unshared()
    if gradient._base is None:
        least = unshared.first if id(gradient) in _first_gradients else unshared.own
    else:
        least = unshared.view_of_first if id(gradient._base) in _first_gradients else unshared.view
    del gradient
    return _exceed(_counts(output_gradients, position), least)


def saved_is_shared(saved_tensors: tuple[Tensor | None, ...], position: int) -> bool:
    """Whether anything but its node has the tensor at `position` of a node's saved tensors; with a reference from the
    tuple and one from the caller."""
    return _exceed(_counts(saved_tensors, position), _unshared().saved)


def own_copy(tensor: Tensor) -> Tensor:
    """`tensor`, without its history, in memory of its own and no larger than it was.

    The strides stay as they are: the same calls of a library then give the same bits.
    """
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor.clone()
    once = tensor
    for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride())):
        if size > 1 and stride == 0:
            once = once.narrow(dimension, 0, 1)
    if _overlaps(once.shape, once.stride()):
        return tensor.clone()
    copy = torch.empty_strided(once.shape, once.stride(), dtype=once.dtype, device=once.device)
    return copy.copy_(once).expand(tensor.shape)


def _overlaps(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether two indices may mean one place."""
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _counts(tensors: tuple[Tensor | None, ...], position: int) -> _Counts:
    tensor: Any = tensors[position]
    base = tensor._base
    return (
        sys.getrefcount(tensor),
        tensor._use_count(),
        torch._C._storage_Use_Count(tensor.untyped_storage()._cdata),
        0 if base is None else sys.getrefcount(base),
        0 if base is None else base._use_count(),
    )


def _exceed(counts: _Counts, unshared: _Counts) -> bool:
    for count, least in zip(counts, unshared):
        if count > least:
            return True
    return False


class _Probe(torch.autograd.Function):
    """Notes the counts of an output gradient and of a saved tensor that nothing else holds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: list[_Counts]) -> Tensor:
        ctx.save_for_backward(torch.ones(2))
        ctx.found = found
        return x * 2

    @staticmethod
    def backward(ctx: Any, *output_gradients: Any) -> Any:
        saved = ctx.saved_tensors
        tensor = saved[0]  # noqa: F841
        ctx.found += [_counts(output_gradients, 0), _counts(saved, 0)]
        return None, None


@cache
def _unshared() -> _Unshared:
    found: list[_Counts] = []
    with torch.enable_grad(), torch._C.DisableTorchFunction():
        for shape in ((2,), (2, 1)):
            for is_first in (False, True):
                value: Any = _Probe.apply(torch.ones(2, requires_grad=True), found)  # type: ignore[no-untyped-call]
                value = value if shape == (2,) else value.view(shape)
                if is_first:
                    run_from((get_gradient_edge(value),), (torch.ones(shape),))
                else:
                    torch.autograd.backward(value * 3, torch.ones(shape))
    own, first, view, view_of_first = found[::2]
    return _Unshared(own, view, first, view_of_first, saved=found[1])
