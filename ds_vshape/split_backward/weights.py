"""Which tensors take part in a split: weights whose gradient may come late, and operands of an ordinary kind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


class Cast:
    """One cast of a parameter, or of its transpose, as autocast multiplies it: the gradients of its uses add up in
    `dtype` before their sum is cast back."""

    __slots__ = ("dtype", "parameter", "transposed")

    def __init__(self, parameter: Parameter, dtype: torch.dtype, transposed: bool) -> None:
        self.parameter, self.dtype, self.transposed = parameter, dtype, transposed

    @classmethod
    def mark(cls, values: Tensor, parameter: Parameter, transposed: bool = False) -> Tensor:
        """`values`, known from now on for a cast of `parameter` (recorded by autograd) or of its transpose."""
        setattr(values, _CAST, cls(parameter, values.dtype, transposed))
        return values


# Whose gradient waits: the sums of a parameter, or of one cast of it.
Target = Parameter | Cast

_PLAIN_TYPES = (Tensor, Parameter)
# Attributes: of a cast, and of Parameters whose gradients are autograd's business.
_CAST = "ds_vshape_cast"
_NEVER_DEFERRED = "ds_vshape_never_deferred"
# In a node's metadata, which torch itself uses for anomaly detection only.
_HOOKS = "ds_vshape: hooks"


def parameter_of(target: Target) -> Parameter:
    """The parameter that the gradient is for in the end."""
    return target.parameter if isinstance(target, Cast) else target


def is_deferrable(weight: Any) -> bool:
    """Whether the gradient of `weight` may be handed over in W instead of by autograd in B.

    It must be a trainable Parameter (a leaf that isn't one may be the stage's input) or a cast of one, not one of
    `never_defer`'s, and must carry no hook that expects autograd to produce its gradient. DeepSpeed's own hooks (ZeRO,
    BF16_Optimizer) don't count: the delivery of the gradient does their work.
    """
    if type(weight) is not Parameter:
        cast = _cast_of(weight)
        return cast is not None and not cast.transposed and is_deferrable(cast.parameter)
    if not weight.requires_grad or has_hooks(weight) or _NEVER_DEFERRED in weight.__dict__:
        return False
    return weight.is_floating_point()  # The operators' formulas leave out the conjugates of complex numbers.


def _cast_of(weight: Any) -> Cast | None:
    """What `weight` is a cast of; None where the gradient of the cast itself is asked for."""
    cast: Cast | None = getattr(weight, _CAST, None)
    return None if cast is None or weight._backward_hooks or weight.retains_grad else cast


def target_of(weight: Tensor) -> Target:
    """Where the gradient of a deferrable weight, or of the transpose of one, adds up."""
    cast = _cast_of(weight)
    if cast is not None:
        return cast
    return weight if isinstance(weight, Parameter) else weight._base  # type: ignore[return-value]


def never_defer(weight: Parameter) -> None:
    """Leave the gradient of `weight` to autograd, until `may_defer`."""
    setattr(weight, _NEVER_DEFERRED, True)


def may_defer(weight: Parameter) -> None:
    """Take `never_defer` back."""
    weight.__dict__.pop(_NEVER_DEFERRED, None)


def has_hooks(weight: Parameter) -> bool:
    """Whether the parameter has a hook, other than DeepSpeed's, that sees its gradient."""
    if weight._backward_hooks:
        return True
    hooks = weight._post_accumulate_grad_hooks
    return bool(hooks) and any_of_script(hooks.values())


def node_has_hooks(node: Any) -> bool:
    """Whether a node of the graph has a hook, other than DeepSpeed's, that sees a gradient which goes there.

    On the node that adds to a parameter's `.grad` such hooks are older than those on parameters (Apex, Horovod). Torch
    doesn't list a node's hooks; but registering one gives the dict in which all of them are.
    """
    found = node.metadata.get(_HOOKS)
    if found is None:
        handles = node.register_hook(_nothing), node.register_prehook(_nothing)
        found = node.metadata[_HOOKS] = tuple(handle.hooks_dict_ref() for handle in handles)
        for handle in handles:
            handle.remove()
    after, before = found
    return bool(after and any_of_script(after.values()) or before and any_of_script(before.values()))


def has_post_hooks(node: Any) -> bool:
    """Whether a hook on a node of an operator may change what comes out of it, the weights' gradients among it."""
    handle = node.register_hook(_nothing)
    hooks = handle.hooks_dict_ref()
    found = len(hooks) > 1
    handle.remove()
    return found


def any_of_script(hooks: Iterable[Any]) -> bool:
    """Whether one of `hooks` isn't DeepSpeed's own, which are those of ZeRO and BF16_Optimizer."""
    for hook in hooks:
        if not str(getattr(hook, "__module__", "")).startswith("deepspeed."):
            return True
    return False


def _nothing(*_: Any) -> None:
    pass


def is_plain(tensor: Any) -> bool:
    """Whether `tensor` is an ordinary dense tensor: no subclass, sparse or nested one."""
    return type(tensor) in _PLAIN_TYPES and tensor.layout is torch.strided and not tensor.is_nested


def is_plain_bias(bias: Any, size: int) -> bool:
    """Whether `bias` is None or `size` numbers, either frozen or with a gradient that may be deferred."""
    if bias is None:
        return True
    return is_plain(bias) and bias.shape == (size,) and (not bias.requires_grad or is_deferrable(bias))


def is_transposed_weight(matrix: Tensor) -> bool:
    """Whether `matrix` is the transpose of a weight, as in x @ weight.t(), or a cast of one, whose gradient may be
    deferred."""
    cast = _cast_of(matrix)
    if cast is not None:
        return cast.transposed and is_deferrable(cast.parameter)
    weight: Any = matrix._base
    view = matrix.grad_fn
    if view is None or type(weight) is not Parameter or not is_deferrable(weight):
        return False
    if matrix._backward_hooks or matrix.retains_grad:
        return False  # someone expects a gradient of the view itself
    return (
        matrix.shape == weight.shape[::-1]
        and matrix.stride() == weight.stride()[::-1]
        and matrix.storage_offset() == weight.storage_offset()
        # not a view of a view, nor one that someone wrote to
        and getattr(view.next_functions[0][0], "variable", None) is weight
    )
