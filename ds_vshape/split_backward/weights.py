"""Which tensors take part in a split: weights whose gradient may come late, and operands of an ordinary kind."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

_PLAIN_TYPES = (Tensor, Parameter)


def is_deferrable(weight: Any) -> TypeGuard[Parameter]:
    """Whether the gradient of `weight` may be handed over in W instead of by autograd in B.

    It must be a trainable Parameter (a leaf that isn't one may be the stage's input) and must carry no hook that
    expects autograd to produce its gradient. DeepSpeed's own post-accumulate hooks (ZeRO, BF16_Optimizer) don't count:
    whoever delivers the gradient does their work.
    """
    if type(weight) is not Parameter or not weight.requires_grad or weight._backward_hooks:
        return False
    if not weight.is_floating_point():  # The operators' formulas leave out the conjugates of complex numbers.
        return False
    hooks = weight._post_accumulate_grad_hooks
    return not hooks or all(_is_deepspeed_hook(hook) for hook in hooks.values())


def _is_deepspeed_hook(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("deepspeed.")


def is_plain(tensor: Any) -> bool:
    """Whether `tensor` is an ordinary dense tensor: no subclass, sparse or nested one."""
    return type(tensor) in _PLAIN_TYPES and tensor.layout is torch.strided and not tensor.is_nested


def is_plain_bias(bias: Any, size: int) -> bool:
    """Whether `bias` is None or `size` numbers, either frozen or with a gradient that may be deferred."""
    if bias is None:
        return True
    return is_plain(bias) and bias.shape == (size,) and (not bias.requires_grad or is_deferrable(bias))
