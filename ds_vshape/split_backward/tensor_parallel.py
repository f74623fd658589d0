"""The sum of an input gradient over tensor parallel ranks, concurrently with a weight gradient that waits.

A column parallel layer has its whole input on every rank and a part of its outputs, so its input gradient is a sum
over the ranks, and B waits for it. With a split backward there is other work to do meanwhile: weight gradients that
wait for their W. One of them is computed during each sum, and that W gets shorter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_vshape.split_backward import active_store


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.store = group, active_store()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        summing = dist.all_reduce(total, group=ctx.group, async_op=True)
        if ctx.store is not None:
            ctx.store.meanwhile()
        summing.wait()
        return total, None


def sum_gradient(x: Tensor, group: Any) -> Tensor:
    """`x`, with its gradient summed over the ranks of `group`: for the input of a column parallel layer, as in
    DeepSpeed's ColumnParallel (module_inject/layers.py) or Megatron's copy_to_tensor_model_parallel_region.

    During the sum a pending weight gradient is computed. Weight gradients are still computed in the order of their
    micro-batches, so the result is the same as without the overlap.
    """
    if dist.get_world_size(group) == 1:
        return x
    summed: Tensor = _SumGradient.apply(x, group)  # type: ignore[no-untyped-call]
    return summed
