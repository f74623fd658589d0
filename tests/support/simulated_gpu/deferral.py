"""Operators on the device's memory are put on the current stream; what needs their numbers on the host waits for them.

    views, new memory         at once: no numbers are read
    numbers for the host      item(), tolist(), .cpu(), shapes that depend on numbers: the host waits; it is noted
    numbers to the host       copy_ into page-locked memory with non_blocking: late, no one waits
    numbers of the host       .to(device), tensor(..., device): the host waits, which is noted. With non_blocking it
                              doesn't, and page-locked memory is read late, other memory at once
    random numbers            at once, after all before: a real device gets the generator's state with the launch

Where an operator is given memory of the host and of the device it raises, as torch does for two devices; numbers of no
dimensions may be of the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from simulated_gpu.device import DEVICE, DEVICE_OF_RANK
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
_NUMBERS_FOR_THE_HOST = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select,
                         aten._unique2, aten.unique_consecutive, aten.unique_dim, aten.repeat_interleave,
                         aten.bincount, aten.index}
# Buffers of which little is ever used stay untouched, so that they take no memory.
_LARGE = 1 << 20
# New memory, whose numbers are whatever they are.
_EMPTY = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


class Deferral(TorchDispatchMode):
    """Puts operators on the device's current stream while it is active."""

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        device = DEVICE_OF_RANK
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [device.holds(tensor) for tensor in tensors]
        asked = kwargs.get("device")
        wanted = asked is not None and asked.index == DEVICE.index
        if not any(here):
            result = func(*args, **kwargs)
            if wanted:
                for tensor in tree_leaves(result):
                    device.take(tensor)
                    if func.overloadpacket in _EMPTY:
                        poison(tensor)
            return result
        device.load(func)
        packet, schema = func._schema.name, func._schema
        name = func.overloadpacket
        written = [argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments]
        if name is aten.copy_ and here != [True] * len(here):
            return self._copy_between(func, args, kwargs, here)
        if strangers := [tensor for tensor, is_here in zip(tensors, here) if not is_here and tensor.dim()]:
            raise RuntimeError(f"Expected all tensors to be on the same device: {packet} got the device's and the "
                               f"host's {[list(tensor.shape) for tensor in strangers]}")
        if not any(written) and any(result.alias_info is not None for result in schema.returns) or name in _EMPTY:
            result = func(*args, **kwargs)
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    device.take(tensor)
                    if name in _EMPTY:
                        poison(tensor)
            return result
        if name in _NUMBERS_FOR_THE_HOST and (name is not aten.index or _has_mask(args)):
            device.note_synchronization(packet)
            device.finish()
            return _taken(func(*args, **kwargs))
        if torch.Tag.nondeterministic_seeded in func.tags:
            device.finish()
            return _taken(func(*args, **kwargs))
        return self._put(func, args, kwargs, written)

    def _put(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: Sequence[bool]) -> Any:
        stream = DEVICE_OF_RANK.current
        names = [argument.name for argument in func._schema.arguments]
        given = {**dict(zip(names, args)), **kwargs}
        targets = {result.alias_info: given[name] for name, is_written, argument in
                   zip(names, written, func._schema.arguments) if is_written
                   for result in func._schema.returns if _same_alias(argument.alias_info, result.alias_info)}
        if any(written):
            fresh = [result.alias_info is None for result in func._schema.returns]
            if any(fresh):
                # Some results are new, as those of a norm that updates its statistics: done at once, in its turn.
                DEVICE_OF_RANK.finish()
                return _taken(func(*args, **kwargs))
            args, kwargs = same_memory((args, kwargs))
            stream.put(lambda: func(*args, **kwargs), tensors_of(args, kwargs))
            values = [targets[result.alias_info] for result in func._schema.returns]
            return values[0] if len(values) == 1 else tuple(values) if values else None
        result = _shaped(func, args, kwargs)
        inputs = {StorageWeakRef(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs))
                  if isinstance(leaf, Tensor)}
        # Some views say nothing of being one (_unsafe_view).
        outputs = [leaf for leaf in tree_leaves(result)
                   if isinstance(leaf, Tensor) and StorageWeakRef(leaf.untyped_storage()) not in inputs]
        if not outputs:
            return result
        for output in outputs:
            DEVICE_OF_RANK.take(output)
            poison(output)
        args, kwargs = same_memory((args, kwargs))
        outputs = same_memory(outputs)

        def run() -> None:
            values = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for output, value in zip(outputs, values, strict=True):
                output.copy_(value)

        stream.put(run, tensors_of(args, kwargs, outputs))
        return result

    def _copy_between(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], here: list[bool]) -> Any:
        target, source, *rest = args
        is_blocking = not (rest[0] if rest else kwargs.get("non_blocking", False))
        if DEVICE_OF_RANK.holds(target):
            if is_blocking and source.dim():
                _note_copy_from_host()
            late = not is_blocking and DEVICE_OF_RANK.is_pinned(source)
            numbers, target_memory = source if late else source.clone(), same_memory(target)
            DEVICE_OF_RANK.current.put(lambda: func(target_memory, numbers, *rest, **kwargs), (target_memory,))
            return target
        if DEVICE_OF_RANK.is_pinned(target):
            # By a stream of the device, as one that doesn't wait.
            target_memory, numbers = same_memory((target, source))
            DEVICE_OF_RANK.current.put(lambda: func(target_memory, numbers, *rest, **kwargs), (numbers,))
            return target
        # Memory that torch's own C++ has made with the options of a tensor, which don't tell the device.
        DEVICE_OF_RANK.take(target)
        return self._put(func, args, kwargs, [True, *(False for _ in func._schema.arguments[1:])])


def same_memory(tensors: Any) -> Any:
    """Tensors on the memory that `tensors` (nested) have now, as a launched kernel keeps its pointers: a tensor's
    `data` may be another one's by the time at which the kernel runs."""
    return tree_map(lambda leaf: aten.alias.default(leaf) if isinstance(leaf, Tensor) else leaf, tensors)


def _shaped(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A result for its shapes and strides alone: what `func` reads may be wrong yet, and no indices."""
    try:
        return func(*args, **kwargs)
    except (IndexError, RuntimeError):
        args, kwargs = tree_map(_without_indices, (args, kwargs))
        return func(*args, **kwargs)


def _without_indices(leaf: Any) -> Any:
    is_index = isinstance(leaf, Tensor) and not leaf.is_floating_point() and not leaf.is_complex()
    return torch.zeros_like(leaf) if is_index else leaf


def tensors_of(*nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def poison(tensor: Tensor) -> None:
    """Fill `tensor` with NaN, which shows wherever it is read too early, or with 0 where it can't hold NaN: integers
    may be indices."""
    if tensor.numel() > _LARGE:
        return
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(torch.nan)
    else:
        tensor.zero_()


def _same_alias(one: Any, other: Any) -> bool:
    return one is not None and other is not None and one.before_set == other.before_set


def _has_mask(args: tuple[Any, ...]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _taken(result: Any) -> Any:
    return tree_map(lambda leaf: DEVICE_OF_RANK.take(leaf) if isinstance(leaf, Tensor) else leaf, result)


def _wait_for(tensor: Tensor) -> None:
    """The host needs the numbers of `tensor`."""
    if DEVICE_OF_RANK.holds(tensor):
        DEVICE_OF_RANK.note_synchronization("to the host")
        DEVICE_OF_RANK.finish()


def _on_the_host(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of `tensor` in the host's memory."""
    _wait_for(tensor)
    with _disable_current_modes():
        return tensor.to(dtype or tensor.dtype, copy=True)


_DEVICE_OF = Tensor.device.__get__


class Residence(TorchFunctionMode):
    """What torch does without an operator on a CPU, and with one on a device: .device, .to(), .cpu(), tolist()..."""

    def __torch_function__(self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload):
            # Of another dispatch mode, which passes on what torch's own C++ has asked for.
            return func(*args, **kwargs)
        asked = kwargs.get("device")
        if asked is not None and torch.device(asked).index != DEVICE.index:
            # From here on nobody can tell whether the host was asked for, or is the tensor's own device.
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and asked is not None:
            # Made of numbers of the host, by no operator.
            _note_copy_from_host()
            return DEVICE_OF_RANK.take(func(*args, **kwargs))
        if kwargs.get("pin_memory"):
            return DEVICE_OF_RANK.pin(func(*args, **{**kwargs, "pin_memory": False}))
        if func is Tensor.is_pinned:
            return DEVICE_OF_RANK.is_pinned(args[0])
        if func == _DEVICE_OF:
            return DEVICE if DEVICE_OF_RANK.holds(args[0]) else func(*args)
        if func is Tensor.copy_ and not DEVICE_OF_RANK.holds(args[0]) and DEVICE_OF_RANK.holds(args[1]):
            if DEVICE_OF_RANK.is_pinned(args[0]) and kwargs.get("non_blocking"):
                return func(*args, **kwargs)
            _wait_for(args[1])
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func is Tensor.to:
            return _to(*args, **kwargs)
        if func is Tensor.cpu:
            return _on_the_host(args[0]) if DEVICE_OF_RANK.holds(args[0]) else args[0]
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__repr__, Tensor.data_ptr):
            if func is not Tensor.data_ptr:
                _wait_for(args[0])
        elif func is Tensor.pin_memory:
            return args[0] if DEVICE_OF_RANK.is_pinned(args[0]) else DEVICE_OF_RANK.pin(args[0].clone())
        return func(*args, **kwargs)


def _to(tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Any:
    if args and isinstance(args[0], Tensor):
        like, *rest = args
        args = DEVICE if DEVICE_OF_RANK.holds(like) else torch.device("cpu"), like.dtype, *rest
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    if device is None or (device.index == DEVICE.index) == DEVICE_OF_RANK.holds(tensor):
        same = dtype is None or dtype == tensor.dtype
        if same and not copy:
            return tensor
        with torch._C.DisableTorchFunction():
            return tensor.to(dtype=dtype or tensor.dtype, copy=copy)
    if device.index == DEVICE.index:
        with torch._C.DisableTorchFunction():
            if tensor.requires_grad:
                moved = _Move.apply(tensor, dtype, non_blocking)
            else:
                moved = _moved(tensor, dtype, non_blocking)
        return moved
    return _on_the_host(tensor, dtype)


def _moved(tensor: Tensor, dtype: torch.dtype | None, non_blocking: bool) -> Tensor:
    return torch.empty_like(tensor, dtype=dtype or tensor.dtype, device=DEVICE).copy_(tensor, non_blocking)


def _note_copy_from_host() -> None:
    DEVICE_OF_RANK.note_synchronization("from the host")
    DEVICE_OF_RANK.finish()


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dtype: torch.dtype | None, non_blocking: bool) -> Tensor:
        ctx.dtype = tensor.dtype
        return _moved(tensor, dtype, non_blocking)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.cpu().to(ctx.dtype), None, None
