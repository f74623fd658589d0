"""Where a weight gradient goes that comes later than its backward; the sums over ranks, and the clipping, of all.

An ordinary backward leaves gradients in `.grad`, and each of DeepSpeed's optimizers picks them up from there at a
moment of its own; a gradient that comes after that moment would be lost without a word. So W hands its gradients to
the place where the optimizer accumulates them:

    optimizer                                                        place
    BF16_Optimizer (runtime/bf16_optimizer.py)                       its buffer of high precision
    DeepSpeedZeroOptimizer with an accumulation dtype of its own     parameter.grad_accum
    all others                                                       parameter.grad

Where a gradient is added to that place by the product that computes it, the sum is rounded once, not twice: a little
more exact than an unsplit backward's, so not equal to it bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import bwc_tensor_model_parallel_rank, is_model_parallel_parameter
from torch import Tensor
from torch.nn import Parameter

from ds_vshape.split_backward import Delivery, WholeGradients


def delivery_for(optimizer: Any, fusion: bool = False) -> Delivery:
    """How a late weight gradient gets to a parameter's gradient of this batch; to be used in the order of the
    micro-batches. With `fusion` a product may be added to the sum where it lies.
    """
    place = _place_of(optimizer)
    return place if fusion else WholeGradients(place.add)


def _place_of(optimizer: Any) -> Delivery:
    if isinstance(optimizer, BF16_Optimizer):
        return InHighPrecisionBuffers(optimizer)
    if getattr(optimizer, "use_grad_accum_attribute", False):
        return InGradAccum(optimizer.gradient_accumulation_dtype)
    return InGrad()


class InGrad:
    """`parameter.grad`, where autograd adds too."""

    def add(self, parameter: Parameter, gradient: Tensor, /) -> None:
        if parameter.grad is None:
            # DeepSpeed flattens gradients with view(-1).
            parameter.grad = gradient.contiguous()
        else:
            parameter.grad.add_(gradient)

    def buffer(self, parameter: Parameter, /) -> Tensor | None:
        return parameter.grad


class InGradAccum:
    """`parameter.grad_accum`, of a dtype of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def add(self, parameter: Any, gradient: Tensor, /) -> None:
        if parameter.grad_accum is None:
            parameter.grad_accum = gradient.to(self._dtype)
        else:
            # Where the sums are narrower DeepSpeed rounds each gradient first; else the sum itself widens it.
            widens = torch.promote_types(gradient.dtype, self._dtype) is self._dtype
            rounded = gradient if widens else gradient.to(self._dtype)
            parameter.grad_accum.add_(rounded.view(parameter.grad_accum.shape))

    def buffer(self, parameter: Any, /) -> Tensor | None:
        so_far: Tensor | None = parameter.grad_accum
        return None if so_far is None else so_far.view(parameter.shape)


class InHighPrecisionBuffers:
    """BF16_Optimizer's accumulation buffers, by parameter. It zeroes every `.grad` when the next backward begins."""

    def __init__(self, optimizer: BF16_Optimizer) -> None:
        self._optimizer = optimizer
        self._places = {
            parameter: (group, index)
            for group, parameters in enumerate(optimizer.bf16_groups)
            for index, parameter in enumerate(parameters)
        }

    @torch.no_grad()
    def add(self, parameter: Any, gradient: Tensor, /) -> None:
        self.buffer(parameter).add_(gradient)

    def buffer(self, parameter: Any, /) -> Tensor:
        group, index = self._places[parameter]
        flat: Tensor = self._optimizer.fp32_groups_gradients[group][index]
        parameter._hp_grad = flat
        self._optimizer.fp32_groups_has_gradients[group][index] = True
        return flat.view(parameter.shape)


def sums_so_far(parameters: Iterable[Any]) -> Iterator[Tensor]:
    """What gradients of `parameters` have added up to in this batch, wherever any optimizer has them add up."""
    for parameter in parameters:
        for place in ("grad", "grad_accum", "_hp_grad"):
            found = getattr(parameter, place, None)
            if found is not None:
                yield found


def reduce_tied_gradients(module: Any, optimizer: Any, delivery: Delivery) -> None:
    """Add up the gradients of tied weights over the pipeline ranks that hold them (collective).

    DeepSpeed's own (_exec_reduce_tied_grads in runtime/pipe/engine.py) looks for them in `.grad`, which is empty where
    they accumulate in `grad_accum`: each rank would then train its copy of the weight by its own gradient alone.
    """
    if isinstance(optimizer, BF16_Optimizer):
        place = "_hp_grad"
    else:
        place = "grad_accum" if getattr(optimizer, "use_grad_accum_attribute", False) else "grad"
    for weight, group in module.get_tied_weights_and_groups():
        if not weight.requires_grad:
            continue
        if getattr(weight, place, None) is None:
            # Not used by the layers of this rank, but perhaps by those of another one: all must take part.
            delivery.add(weight, torch.zeros_like(weight, requires_grad=False))
        dist.all_reduce(getattr(weight, place), group=group)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Any], max_norm: float, mpu: Any) -> float:
    """Scale all gradients so that their 2-norm over the whole model is at most `max_norm`; returns the norm before.

    For a plain torch optimizer in fp32. DeepSpeed's own (clip_grad_norm_ in runtime/utils.py) counts only what the
    first pipeline rank holds. Here every parameter counts once: a tied one on its first rank, one that tensor
    parallel ranks share on the first of them. Collective over the pipeline and tensor parallel ranks.
    """
    with_grad = [p for p in parameters if p.grad is not None]
    first_tensor_rank = bwc_tensor_model_parallel_rank(mpu) == 0
    counted = [p.grad.float().norm() for p in with_grad
               if not p.ds_pipe_replicated and (first_tensor_rank or is_model_parallel_parameter(p))]
    group = mpu.get_model_parallel_group()
    nothing = torch.zeros((), device=get_accelerator().current_device_name())
    square = torch.stack(counted).square().sum() if counted else nothing
    dist.all_reduce(square, group=group)
    norm = square.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in with_grad:
        parameter.grad.mul_(scale)
    return float(norm)
