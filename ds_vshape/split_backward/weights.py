"""Which tensors take part in a split: weights whose gradient may come late, and operands of an ordinary kind."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter


class Cast:
    """One cast of a parameter: the gradients of its uses add up in `dtype` before their sum is cast back."""

    __slots__ = ("dtype", "parameter")

    def __init__(self, parameter: Parameter, dtype: torch.dtype) -> None:
        self.parameter, self.dtype = parameter, dtype


class CastWeight(Parameter):
    """A weight in the dtype in which autocast has it multiplied: memory of its own, outside the parameter's graph."""

    cast: Cast

    @classmethod
    def of(cls, parameter: Parameter, values: Tensor) -> CastWeight:
        """`values` as a cast of `parameter`."""
        weight = cls(values)
        weight.cast = Cast(parameter, values.dtype)
        return weight


# Whose gradient waits: the sums of a parameter, or of one cast of it.
Target = Parameter | Cast

_PLAIN_TYPES = (Tensor, Parameter, CastWeight)
# An attribute of Parameters whose gradients are autograd's business.
_NEVER_DEFERRED = "ds_vshape_never_deferred"


def parameter_of(target: Target) -> Parameter:
    """The parameter that the gradient is for in the end."""
    return target.parameter if isinstance(target, Cast) else target


def is_deferrable(weight: Any) -> TypeGuard[Parameter]:
    """Whether the gradient of `weight` may be handed over in W instead of by autograd in B.

    It must be a trainable Parameter (a leaf that isn't one may be the stage's input), not one of `never_defer`'s, and
    must carry no hook that expects autograd to produce its gradient. DeepSpeed's own post-accumulate hooks (ZeRO,
    BF16_Optimizer) don't count: whoever delivers the gradient does their work.
    """
    if type(weight) is not Parameter:
        return type(weight) is CastWeight and is_deferrable(weight.cast.parameter)
    if not weight.requires_grad or weight._backward_hooks:
        return False
    if not weight.is_floating_point():  # The operators' formulas leave out the conjugates of complex numbers.
        return False
    if _NEVER_DEFERRED in weight.__dict__:
        return False
    hooks = weight._post_accumulate_grad_hooks
    return not hooks or all(_is_deepspeed_hook(hook) for hook in hooks.values())


def never_defer(weight: Parameter) -> None:
    """Leave the gradient of `weight` to autograd, until `may_defer`."""
    setattr(weight, _NEVER_DEFERRED, True)


def may_defer(weight: Parameter) -> None:
    """Take `never_defer` back."""
    weight.__dict__.pop(_NEVER_DEFERRED, None)


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


def transposed_weight(matrix: Tensor) -> Parameter | None:
    """The weight of which `matrix` is the transpose, as in x @ weight.t(), if its gradient may be deferred."""
    weight = matrix._base
    view = matrix.grad_fn
    if view is None or not is_deferrable(weight):
        return None
    if matrix._backward_hooks or matrix.retains_grad:
        return None  # someone expects a gradient of the view itself
    is_transpose: bool = (
        matrix.shape == weight.shape[::-1]
        and matrix.stride() == weight.stride()[::-1]
        and matrix.storage_offset() == weight.storage_offset()
        # not a view of a view, nor one that someone wrote to
        and getattr(view.next_functions[0][0], "variable", None) is weight
    )
    return weight if is_transpose else None
