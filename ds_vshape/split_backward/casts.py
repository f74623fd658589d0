"""Autocast's part in a split call: its casts of the operands, made ahead of the operator.

Autocast works below Python: a kernel gets casts of the tensors that the call names, and autograd has a node for each
cast. A split operator needs the casts themselves, since W multiplies them. Here they are made by autocast's own rules
(aten/src/ATen/autocast_mode.cpp):

    products, convolutions    every operand of the device, unless it's of 64 bits, becomes autocast's dtype
    norms                     32 bits on a GPU; as they are on a CPU
    embedding, grouped        as they are, and so are functions of the user's own
    products, indexing

A 32-bit leaf that wants a gradient is cast once while autocast's cache lives: until the outermost context ends. The
gradients of all uses of that cast add up in the low precision, and their sum is cast back. Anything else is cast at
each use, and its gradients add up in its own precision.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_vshape.split_backward.autocast import enabled_autocast
from ds_vshape.split_backward.function import apply_split_function
from ds_vshape.split_backward.targets import Cast
from ds_vshape.split_backward.weights import is_deferrable, is_plain, is_transposed_weight, target_of

# Devices whose rules are known here, with their dispatch keys.
_DISPATCH_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}

_LOW_PRECISION: frozenset[Callable[..., Any]] = frozenset({
    torch.nn.functional.linear,
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.matmul, Tensor.matmul),
    *(torch.mm, Tensor.mm, torch.bmm, Tensor.bmm),
    *(torch.addmm, Tensor.addmm),
})
_WHERE_REGISTERED_32_BITS = {torch.nn.functional.layer_norm: "aten::layer_norm",
                             torch.nn.functional.rms_norm: "aten::rms_norm"}
_AS_THEY_ARE: frozenset[Callable[..., Any]] = frozenset({
    torch.nn.functional.embedding,
    *(torch._grouped_mm, Tensor.__getitem__),
    apply_split_function,
})

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def cast_arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """The arguments of a call as autocast, which is on, hands them to the kernel.

    None where a weight can't be deferred anyway, or the rules for the function or the device aren't known here.
    """
    if function in _AS_THEY_ARE:
        return args, kwargs
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not tensors or not all(is_plain(tensor) for tensor in tensors):
        return None
    here = tensors[0].device.type
    # With shapes alone, those of the device for which autocast is on.
    device = here if here != "meta" else next(iter(enabled_autocast()), here)
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return args, kwargs
    if device not in _DISPATCH_KEYS:
        return None
    if function in _LOW_PRECISION:
        dtype = torch.get_autocast_dtype(device)
    elif function not in _WHERE_REGISTERED_32_BITS:
        return None
    elif _is_registered(_WHERE_REGISTERED_32_BITS[function], _DISPATCH_KEYS[device]):
        dtype = torch.float32
    else:
        return args, kwargs
    if not any(map(_is_weight, tensors)):
        return None
    # A weight by a weight: one of them is an input, whose gradient isn't deferred, and may be the other weight too.
    if sum(tensor.dim() > 1 and _is_weight(tensor) for tensor in tensors) > 1:
        return None
    # The other uses of a parameter that can't be deferred get autocast's own cast, and so has this one to.
    if any(type(tensor) is Parameter and tensor.requires_grad and not is_deferrable(tensor) for tensor in tensors):
        return None

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device.type != here or not value.is_floating_point():
            return value
        return value if value.dtype in (torch.float64, dtype) else _cast(value, dtype, device)

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and (is_deferrable(value) or is_transposed_weight(value))


def _cast(tensor: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """One cast, recorded by autograd."""
    if is_transposed_weight(tensor):
        return Cast.mark(tensor.to(dtype), tensor._base, transposed=True)  # type: ignore[arg-type]
    is_cached = (dtype is torch.get_autocast_dtype(device) and tensor.dtype is torch.float32 and tensor.is_leaf
                 and tensor.requires_grad and not tensor._is_view() and torch.is_autocast_cache_enabled())
    casts = _casts(tensor.device, dtype) if is_cached else {}
    made = casts.get(tensor)
    if made is None:
        made = tensor.to(dtype)
        if is_deferrable(tensor):
            Cast.mark(made, target_of(tensor))
        casts[tensor] = made
    return made


class _Casts(dict[Tensor, Tensor]):
    """Casts by the tensor that was cast; a dict that a weak reference may lead to."""


_known_casts: dict[tuple[torch.device, torch.dtype], weakref.ref[_Casts]] = {}


def _casts(device: torch.device, dtype: torch.dtype) -> dict[Tensor, Tensor]:
    """The casts that live as long as what autocast has in its cache now.

    Nothing tells when autocast empties its cache. So a leaf of no elements is put there, and the node of its cast,
    which the cache alone keeps alive, keeps these.
    """
    reference = _known_casts.get((device, dtype))
    casts = None if reference is None else reference()
    if casts is None:
        leaf, matrix = torch.empty(0, device=device, requires_grad=True), torch.empty(0, 0, device=device)
        # The product of a biased linear layer is autocast's on every device, and saves nothing for this backward.
        node: Any = torch.addmm(leaf, matrix, matrix).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        casts = node.metadata["ds_vshape.casts"] = _Casts()
        _known_casts[device, dtype] = weakref.ref(casts)
    return casts


@cache
def _is_registered(operator: str, dispatch_key: str) -> bool:
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key(operator, dispatch_key)
    return found
