"""What layers need to run on the meta device, with shapes and without data.

Autocast casts there as it would on its own device. Attention by scaled_dot_product_attention is taken to be fused,
without dropout: it keeps queries, keys, values, output and a number for each row of scores, and computes the scores
again in B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from ds_vshape.split_backward.autocast import enabled_autocast

# The attribute of a tensor that torch.any has returned.
_IS_ANY = "ds_vshape_is_any"
# The functions by which attributes of tensors are read and set.
_ATTRIBUTES = ("__get__", "__set__")
GROUPED_MM = torch.ops.aten._grouped_mm.default


def _ignore(flops: int) -> None:
    pass


@contextmanager
def on_meta(attention_flops: Callable[[int], None] = _ignore) -> Iterator[None]:
    """Around a pass on the meta device; `attention_flops` is told those of each attention."""
    with torch.device("meta"), _FusedAttention(attention_flops), _Autocast():
        with _Answers():  # type: ignore[no-untyped-call]
            yield


class _Answers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers where a forward asks for the value of a tensor, which has none here: False if the tensor comes from
    torch.any, and True otherwise. Forwards ask whether all tokens count (no padding), and whether any is illegal."""

    # Else torch refuses torch.cond and its like while a mode is active.
    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            if args[0].device.type != "meta":
                return func(*args)
            return not getattr(args[0], _IS_ANY, False)
        result = _grouped(*args, **(kwargs or {})) if func is GROUPED_MM else func(*args, **(kwargs or {}))
        if func._overloadpacket is torch.ops.aten.any:
            setattr(result, _IS_ANY, True)
        return result


def _grouped(left: Tensor, right: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """The shape of a product of groups of rows with a matrix each, as experts multiply, or of the gradients of one; on
    the meta device torch's own takes bf16 alone."""
    if left.ndim == right.ndim == 2:
        assert offs is not None
        return left.new_empty(len(offs), len(left), right.shape[-1])
    if left.ndim == right.ndim:
        return left.new_empty(*left.shape[:2], right.shape[-1])
    return left.new_empty(left.shape[-2], right.shape[-1])


class _Autocast(TorchFunctionMode):
    """Autocast, which leaves tensors of the meta device alone. What it casts for a call, the same call shows of fake
    tensors that are on autocast's device."""

    def __torch_function__(self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        for device in enabled_autocast():
            args, kwargs = _cast_for(func, args, kwargs, device)
        return func(*args, **kwargs)


def _cast_for(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
              device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call as autocast for `device` hands them to its kernel."""
    leaves, structure = tree_flatten((args, kwargs))
    operands = {place: leaf for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    if getattr(func, "__name__", "") in _ATTRIBUTES or not any(map(Tensor.is_floating_point, operands.values())):
        return args, kwargs

    def casts(enabled: bool) -> dict[int, torch.dtype]:
        fakes = {place: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                 for place, tensor in operands.items()}
        given, named = tree_unflatten([fakes.get(place, leaf) for place, leaf in enumerate(leaves)], structure)
        torch.set_autocast_enabled(device, enabled)
        noted = _NotedCasts(fakes)
        # Fails for dtypes that don't go together without autocast, and for what no fake tensor can be given to.
        with noted, suppress(Exception):
            func(*given, **named)
        return noted.found

    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad(), FakeTensorMode():
        by_itself = casts(False)
        found = casts(True)
    for place, dtype in found.items():
        if by_itself.get(place) is not dtype:
            leaves[place] = leaves[place].to(dtype)
    return tree_unflatten(leaves, structure)  # type: ignore[no-any-return]


class _NotedCasts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes to which dtype each of some `tensors` is cast first."""

    def __init__(self, tensors: Mapping[int, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tensors = tensors
        self.found: dict[int, torch.dtype] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and kwargs and "dtype" in kwargs:
            for place, tensor in self._tensors.items():
                if args[0] is tensor:
                    self.found.setdefault(place, kwargs["dtype"])
        return func(*args, **(kwargs or {}))


class _FusedAttention(TorchFunctionMode):
    """In place of torch's attention, which on the meta device would be the one that keeps scores."""

    def __init__(self, flops: Callable[[int], None]) -> None:
        super().__init__()
        self._flops = flops

    def __torch_function__(self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            query, key, value, *others = args
            mask = others[0] if others else (kwargs or {}).get("attn_mask")
            return _Attention.apply(self._flops, query, key, value, mask)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """The shapes of a fused attention's outputs and gradients, and its FLOPs."""

    @staticmethod
    def forward(ctx: Any, flops: Callable[[int], None], query: Tensor, key: Tensor, value: Tensor,
                mask: Tensor | None) -> Tensor:
        samples, heads, length, _ = query.shape
        # In the order of the tokens, as kernels return it: what comes next then needs no copy.
        output = query.new_empty(samples, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.flops = flops
        ctx.save_for_backward(query, key, value, mask, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        flops(sdpa_flop_count(query.shape, _heads(key, query), _heads(value, query)))  # type: ignore[no-untyped-call]
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        ctx.flops(sdpa_backward_flop_count(  # type: ignore[no-untyped-call]
            gradient.shape, query.shape, _heads(key, query), _heads(value, query)))
        return None, torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _heads(of: Tensor, query: Tensor) -> torch.Size:
    """The shape of keys or values, with a head for each of the queries'."""
    return torch.Size((of.shape[0], query.shape[1], *of.shape[2:]))
