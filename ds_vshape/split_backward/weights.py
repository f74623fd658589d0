"""Which tensors take part in a split: weights whose gradient may come late, and operands of an ordinary kind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_vshape.split_backward.targets import Cast, Made, Target, made_from, parameter_of


_PLAIN_TYPES = (Tensor, Parameter)
# The attribute of Parameters whose gradients are autograd's business.
_NEVER_DEFERRED = "ds_vshape_never_deferred"
# In a node's metadata, which torch itself uses for anomaly detection only.
_HOOKS = "ds_vshape: hooks"


def is_deferrable(weight: Any) -> bool:
    """Whether the gradient of `weight` may be handed over in W instead of by autograd in B.

    It must be a trainable Parameter (a leaf that isn't one may be the stage's input) or made of one (targets.py), not
    one of `never_defer`'s, and must carry no hook that expects autograd to produce its gradient. DeepSpeed's own hooks
    (ZeRO, BF16_Optimizer) don't count: the accumulator that gets the gradient does their work.
    """
    if type(weight) is not Parameter:
        made = made_from(weight) if isinstance(weight, Tensor) else None
        return made is not None and not _is_cast_transpose(made) and is_deferrable(parameter_of(made))
    if not weight.requires_grad or has_hooks(weight) or _NEVER_DEFERRED in weight.__dict__:
        return False
    return weight.is_floating_point()  # The operators' formulas leave out the conjugates of complex numbers.


def target_of(weight: Tensor) -> Target:
    """Where the gradient of a deferrable weight, or of the transpose of one, adds up."""
    if isinstance(weight, Parameter):
        return weight
    return made_from(weight) or weight._base  # type: ignore[return-value]


def _is_cast_transpose(made: Made) -> bool:
    return isinstance(made, Cast) and made.transposed


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
    deferred; of a batch of matrices, the transpose of each."""
    weight: Any = matrix._base
    view = matrix.grad_fn
    if type(weight) is not Parameter:
        made = made_from(matrix)
        return made is not None and _is_cast_transpose(made) and is_deferrable(parameter_of(made))
    if view is None or weight.dim() < 2 or not is_deferrable(weight):
        return False
    if matrix._backward_hooks or matrix.retains_grad:
        return False  # someone expects a gradient of the view itself
    return (
        matrix.shape == _transposed(weight.shape)
        and matrix.stride() == _transposed(weight.stride())
        and matrix.storage_offset() == weight.storage_offset()
        # not a view of a view, nor one that someone wrote to
        and getattr(view.next_functions[0][0], "variable", None) is weight
    )


def _transposed(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return (*sizes[:-2], sizes[-1], sizes[-2])
