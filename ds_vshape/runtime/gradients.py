"""Where the gradients of a batch add up, their sums over ranks, and their clipping.

An ordinary backward leaves gradients in `.grad`. Each of DeepSpeed's optimizers collects them from there at a different
time, and a gradient that arrives later would be lost without an error. So W adds its gradients where the optimizer
accumulates them:

    optimizer                                                        place
    BF16_Optimizer (runtime/bf16_optimizer.py)                       its buffer of high precision
    DeepSpeedZeroOptimizer with an accumulation dtype of its own     parameter.grad_accum
    all others                                                       parameter.grad

Gradients that come into `.grad` from elsewhere count too, at any time: from a backward that a layer or a loss function
runs in its forward, from a loss with weights of its own, from a script between two batches. With BF16_Optimizer `.grad`
holds nothing else. DeepSpeed zeroes it when a backward reaches a stage's outputs, so here it is moved to the buffer
before that, and after the backward.

Weights that the optimizer doesn't hold get their gradients in `.grad`, by autograd in B, as under DeepSpeed.

If the product that computes a gradient also adds it to the sum, the result is rounded once instead of twice. It is
slightly more exact than that of an unsplit backward, and therefore not equal to it bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.nn import Parameter

from ds_vshape.deepspeed_adapter.experts import expert_peers, is_moe_param
from ds_vshape.deepspeed_adapter.optimizers import Bf16Sums, GradAccumSums, held_by, sums_of
from ds_vshape.deepspeed_adapter.utils import is_first_tensor_rank, is_model_parallel_parameter, is_pipe_replicated
from ds_vshape.split_backward import GradientAccumulator, WholeGradients, may_defer, never_defer


class Place(GradientAccumulator, Protocol):
    """Where an optimizer has the gradients of a batch add up."""

    def holds(self, parameter: Parameter, /) -> bool:
        """Whether the optimizer has `parameter`; the gradients of all others stay in `.grad`."""

    def take_in(self) -> None:
        """Move what is in `.grad` to this place, if that is another one."""

    def total(self, parameter: Parameter, /) -> Tensor | None:
        """The sum so far, as the optimizer has it; None where there is none yet."""


def place_of(optimizer: Any) -> Place:
    """Where `optimizer`, one of DeepSpeed's or torch's, has gradients add up."""
    sums = sums_of(optimizer)
    if isinstance(sums, Bf16Sums):
        return InHighPrecisionBuffers(sums)
    return InGrad(held_by(optimizer)) if sums is None else InGradAccum(sums)


def accumulator_of(place: Place, fusion: bool) -> GradientAccumulator:
    """What W hands its gradients to, in the order of the micro-batches, for them to add up in `place`.

    With `fusion` a product may be added to the sum in one call.
    """
    return place if fusion else WholeGradients(place.add)


def leave_to_backward(parameters: Iterable[Parameter], place: Place) -> None:
    """Let B compute the gradients of those that the optimizer doesn't hold, so that nothing is kept for them until W.
    """
    for parameter in parameters:
        if place.holds(parameter):
            may_defer(parameter)
        else:
            never_defer(parameter)


class InGrad:
    """`parameter.grad`, where autograd adds too."""

    def __init__(self, held: Iterable[Parameter] | None = None) -> None:
        self._held = None if held is None else set(held)

    def holds(self, parameter: Parameter, /) -> bool:
        return self._held is None or parameter in self._held

    def add(self, parameter: Parameter, gradient: Tensor, /) -> None:
        if parameter.grad is None:
            # DeepSpeed flattens gradients with view(-1).
            parameter.grad = gradient.contiguous()
        elif parameter.grad.layout is torch.strided:
            parameter.grad.add_(gradient)
        else:
            # Of an embedding with sparse gradients; autograd makes the sum dense too.
            parameter.grad = gradient + parameter.grad

    def buffer(self, parameter: Parameter, /) -> Tensor | None:
        so_far = parameter.grad
        return so_far if so_far is not None and so_far.layout is torch.strided else None

    def total(self, parameter: Parameter, /) -> Tensor | None:
        return parameter.grad

    def take_in(self) -> None:
        pass


class InGradAccum:
    """`parameter.grad_accum`, of a dtype of its own. DeepSpeed moves there what autograd accumulates."""

    def __init__(self, sums: GradAccumSums) -> None:
        self._sums = sums

    def holds(self, parameter: Parameter, /) -> bool:
        return parameter in self._sums.parameters

    def add(self, parameter: Parameter, gradient: Tensor, /) -> None:
        so_far, dtype = self._sums.total(parameter), self._sums.dtype
        if so_far is None:
            self._sums.start(parameter, gradient.to(dtype))
        else:
            # Where the sums are narrower DeepSpeed rounds each gradient first; else the sum itself widens it.
            widens = torch.promote_types(gradient.dtype, dtype) is dtype
            so_far.add_((gradient if widens else gradient.to(dtype)).view(so_far.shape))

    def buffer(self, parameter: Parameter, /) -> Tensor | None:
        so_far = self._sums.total(parameter)
        return None if so_far is None else so_far.view(parameter.shape)

    def total(self, parameter: Parameter, /) -> Tensor | None:
        return self._sums.total(parameter)

    def take_in(self) -> None:
        self._sums.take_in()


class InHighPrecisionBuffers:
    """BF16_Optimizer's accumulation buffers, by parameter."""

    def __init__(self, sums: Bf16Sums) -> None:
        self._sums = sums

    def holds(self, parameter: Parameter, /) -> bool:
        return self._sums.holds(parameter)

    @torch.no_grad()
    def add(self, parameter: Parameter, gradient: Tensor, /) -> None:
        self.buffer(parameter).add_(gradient)

    def buffer(self, parameter: Parameter, /) -> Tensor:
        return self._sums.buffer(parameter).view(parameter.shape)

    def total(self, parameter: Parameter, /) -> Tensor | None:
        return self._sums.total(parameter)

    def take_in(self) -> None:
        for parameter in self._sums.parameters:
            if parameter.grad is not None:
                self.add(parameter, parameter.grad)
                parameter.grad = None


def reduce_tied_gradients(module: Any, place: Place) -> None:
    """Add up the gradients of tied weights over the pipeline ranks that hold them (collective).

    DeepSpeed's own (_exec_reduce_tied_grads in runtime/pipe/engine.py) looks for them in `.grad`, which is empty where
    they accumulate in `grad_accum`: each rank would then train its copy of the weight by its own gradient alone.
    """
    for weight, group in module.get_tied_weights_and_groups():
        if not weight.requires_grad or not place.holds(weight):
            continue
        if place.total(weight) is None:
            # Not used by the layers of this rank, but perhaps by those of another one: all must take part.
            place.add(weight, torch.zeros_like(weight, requires_grad=False))
        dist.all_reduce(place.total(weight), group=group)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Any], max_norm: float, mpu: Any) -> Tensor:
    """Scale all gradients so that their 2-norm over the whole model is at most `max_norm`; returns the norm before, one
    number on the device, for which the host doesn't wait.

    For a plain torch optimizer in fp32. DeepSpeed's own (clip_grad_norm_ in runtime/utils.py) counts only what the
    first pipeline rank holds. Here every parameter counts once: a tied one on its first rank, one that tensor
    parallel ranks share on the first of them; an expert of a mixture on the replica that has it, where DeepSpeed takes
    the mean over replicas. Collective over the pipeline, tensor parallel and expert parallel ranks.
    """
    with_grad = [p for p in parameters if p.grad is not None]
    first_tensor_rank = is_first_tensor_rank(mpu)
    counted = [p for p in with_grad
               if not is_pipe_replicated(p) and (first_tensor_rank or is_model_parallel_parameter(p))]
    square = _square([p for p in counted if not is_moe_param(p)])
    # Replicas have the same layers, so they come to the same groups in the same order.
    for name in sorted({p.group_name for p in with_grad if is_moe_param(p)}):
        of_experts = [p for p in with_grad if is_moe_param(p) and p.group_name == name]
        square_of_experts = _square([p for p in counted if is_moe_param(p) and p.group_name == name])
        dist.all_reduce(square_of_experts, group=expert_peers(of_experts[0]))
        square += square_of_experts
    dist.all_reduce(square, group=mpu.get_model_parallel_group())
    norm = square.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in with_grad:
        parameter.grad.mul_(scale)
    return norm


def _square(parameters: Iterable[Any]) -> Tensor:
    """The sum of the squares of their gradients."""
    norms = [p.grad.float().norm() for p in parameters]
    nothing = torch.zeros((), device=get_accelerator().current_device_name())
    return torch.stack(norms).square().sum() if norms else nothing
