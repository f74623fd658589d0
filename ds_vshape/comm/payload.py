"""What crosses a stage boundary: its tensors, their signature, and the form in which they travel.

The signature of a message says shapes, dtypes, and which members require (activation) or have (gradient) a gradient.
As numbers it is the header of a message:

    [is it a tuple, number of members, then for each member: -1 for None, or
     dtype, requires gradient, number of dimensions, sizes ...]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.pipe.module import PipelineError
from torch import Tensor

Payload = Tensor | tuple[Tensor | None, ...]

HEADER_SIZE = 256
# What gloo and NCCL both carry as it is.
_CARRIED = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int32,
            torch.int64, torch.bool)
# The places are their numbers in a header. What isn't carried travels as pairs of real numbers or as bytes.
_DTYPES = (*_CARRIED, torch.complex64, torch.complex128, torch.int16, torch.uint16, torch.uint32,
           torch.uint64, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
           torch.float8_e8m0fnu)
_DTYPE_IDS = {dtype: number for number, dtype in enumerate(_DTYPES)}


@dataclass(frozen=True)
class TensorSignature:
    """What a receiver must know of a tensor to make room for it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    def describes(self, tensor: Tensor | None) -> bool:
        """Whether this is `tensor`'s signature."""
        return (tensor is not None and tensor.shape == self.shape and tensor.dtype is self.dtype
                and tensor.requires_grad is self.requires_grad and tensor.layout is torch.strided)

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=device)

    def __str__(self) -> str:
        wanted = " with gradient" if self.requires_grad else ""
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}{wanted}"


@dataclass(frozen=True)
class Signature:
    """The signature of a message; None stands for a member without gradient."""

    tensors: tuple[TensorSignature | None, ...]
    is_tuple: bool

    @classmethod
    def of(cls, payload: Payload) -> Signature:
        """The signature of a payload that `check_payload` accepts."""
        return cls(tuple(t if t is None else TensorSignature(tuple(t.shape), t.dtype, t.requires_grad)
                         for t in members(payload)), isinstance(payload, tuple))

    def describes(self, payload: Payload) -> bool:
        """Whether this is `payload`'s signature: `of` in less time, for each message of each batch."""
        tensors = members(payload)
        if isinstance(payload, tuple) is not self.is_tuple or len(tensors) != len(self.tensors):
            return False
        for described, tensor in zip(self.tensors, tensors):
            fits = tensor is None if described is None else described.describes(tensor)
            if not fits:
                return False
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(math.prod(t.shape) * t.dtype.itemsize for t in self.tensors if t is not None)

    def encode(self) -> list[int]:
        """The signature as numbers, at most HEADER_SIZE."""
        numbers = [int(self.is_tuple), len(self.tensors)]
        for tensor in self.tensors:
            if tensor is None:
                numbers.append(-1)
            else:
                numbers += [_DTYPE_IDS[tensor.dtype], int(tensor.requires_grad), len(tensor.shape), *tensor.shape]
        if len(numbers) > HEADER_SIZE:
            raise PipelineError(f"a stage's output has too many tensors or dimensions: {len(numbers)} numbers describe "
                                f"it, and at most {HEADER_SIZE} can be announced")
        return numbers

    @classmethod
    def decode(cls, numbers: Sequence[int]) -> Signature:
        """The signature that `encode` wrote, with zeros after it; ValueError for numbers that it can't have written."""
        stream = iter(numbers)
        is_tuple, count = _within(stream, 0, 1), _within(stream, 0, len(numbers))
        tensors = tuple(_decoded(stream, len(numbers)) for _ in range(count))
        if not is_tuple and count != 1:
            raise ValueError(f"{count} tensors without a tuple")
        if any(stream):
            raise ValueError("it continues after the last tensor")
        return cls(tensors, bool(is_tuple))

    def __str__(self) -> str:
        return ", ".join("none" if tensor is None else str(tensor) for tensor in self.tensors)


def _within(stream: Iterator[int], least: int, most: float) -> int:
    """The next number of a header; ValueError unless there is one in this range."""
    number = next(stream, None)
    if number is None:
        raise ValueError("it ends too early")
    if not least <= number <= most:
        raise ValueError(f"{number} isn't a number from {least} to {most}")
    return number


def _decoded(stream: Iterator[int], length: int) -> TensorSignature | None:
    dtype = _within(stream, -1, len(_DTYPES) - 1)
    if dtype < 0:
        return None
    requires_grad, dimensions = bool(_within(stream, 0, 1)), _within(stream, 0, length)
    shape = tuple(_within(stream, 0, math.inf) for _ in range(dimensions))
    return TensorSignature(shape, _DTYPES[dtype], requires_grad)


def members(payload: Payload) -> tuple[Tensor | None, ...]:
    """The tensors of what crosses a stage boundary."""
    return payload if isinstance(payload, tuple) else (payload,)


def check_payload(payload: Any, device: torch.device, what: str = "a stage's output") -> None:
    """Raises PipelineError unless `payload`, which errors call `what`, can cross a stage boundary from a rank on
    `device`, to another rank or to the next stage on the same one."""
    tensors = members(payload)
    if not tensors:
        raise PipelineError(f"{what} is an empty tuple: nothing would cross to the next stage")
    for place, tensor in enumerate(tensors):
        if obstacle := _obstacle(tensor, device):
            where = f"{what} holds {obstacle}" + (f" (member {place} of {len(tensors)})" if len(tensors) > 1 else "")
            raise PipelineError(f"{where}: only dense tensors on {device} and tuples of them can cross to another "
                                "stage")


def _obstacle(member: Any, device: torch.device) -> str | None:
    """What keeps `member` from crossing a stage boundary, if anything."""
    if member is None:
        return None
    if not torch.is_tensor(member):
        return type(member).__name__
    if member.layout is not torch.strided or member.is_nested:
        return f"a {'nested' if member.is_nested else str(member.layout).removeprefix('torch.')} tensor"
    if member.dtype not in _DTYPE_IDS:
        return str(member.dtype)
    if member.device.type != device.type or device.index not in (None, member.device.index):
        return f"a {str(member.dtype).removeprefix('torch.')} tensor of shape {list(member.shape)} on {member.device}"
    return None


def settled(tensor: Tensor) -> Tensor:
    """The numbers of `tensor` as its memory must hold them to travel: contiguous, with nothing left to be conjugated
    or negated. A copy only where they don't lie so."""
    tensor = tensor.detach()
    if tensor.is_conj():
        tensor = tensor.resolve_conj()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor.contiguous()


def carried(tensor: Tensor) -> Tensor:
    """The memory of a `settled` tensor, or of one to be received, as a tensor of a dtype that all backends carry."""
    if tensor.dtype in _CARRIED:
        return tensor
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor.reshape(-1).view(torch.uint8)
