"""A head and its loss in chunks of tokens: neither logits [tokens, vocabulary] nor their gradients ever exist whole.

    logits, their loss, the loss's gradient by them      of one chunk after the other, in F
    gradient of the hidden states                        kept from F to B, as large as they are
    gradient of the weight                               added to its sum over the micro-batches, in F

Such a head keeps hidden states and their gradient; logits, and what a cross-entropy keeps of them, would each be larger
by vocabulary / hidden. Liger's fused_linear_cross_entropy.py computes in the same way, and keeps a gradient of the
weight, as large as the weight, from F to B. Here F adds it to the engine's sums, which takes no memory: F knows the
factor by which B will multiply, because the engine tells it (`EarlyGradients`). Without an engine it is kept as there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from ds_vshape.split_backward.accumulate import add_product
from ds_vshape.split_backward.store import GradientAccumulator
from ds_vshape.split_backward.weights import is_deferrable

# The label of a token that doesn't count, as in torch's cross_entropy and in transformers.
IGNORE_INDEX = -100
# With fewer tokens, matrix products are slow.
_LEAST_CHUNK = 16
# By how much B's factor may differ, by rounding, from the one that F was told.
_TOLERANCE = 1e-3

# The sum of the losses of logits [tokens, vocabulary] with labels [tokens].
SummedLoss = Callable[[Tensor, Tensor], Tensor]
# Logits of hidden states [tokens, hidden] by a function that multiplies with the weight.
Forward = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy in nats, in fp32, of all labels but -100."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")


def product_alone(project: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """A head that is nothing but a product."""
    return project(hidden)


@dataclass(frozen=True)
class Projection:
    """What makes logits: weight [vocabulary, hidden], bias [vocabulary] or None, and what surrounds the product."""

    weight: Tensor
    bias: Tensor | None = None
    forward: Forward = product_alone


class HeadOutput(NamedTuple):
    """The output of a last layer that leaves its logits to the loss: hidden states [..., hidden], and what multiplies
    them. The engine adds where gradients may go in F."""

    hidden: Tensor
    projection: Projection
    early: EarlyGradients | None = None

    def logits(self) -> Tensor:
        """The whole logits [..., vocabulary]."""
        by = self.projection
        flat = by.forward(lambda hidden: F.linear(hidden, by.weight, by.bias), self.hidden.flatten(0, -2))
        return flat.view(*self.hidden.shape[:-1], -1)

    def loss(self, labels: Tensor, items: Tensor | int | None = None, summed: SummedLoss = summed_cross_entropy,
             chunk: int | None = None) -> Tensor:
        """The sum of the losses of all tokens, divided by `items`; by default their mean, of labels other than -100.

        The engine must get the result as the loss, or as `loss` in (loss, auxiliary loss); if it was multiplied, B
        raises RuntimeError.

        Args:
            labels: [...], as the hidden states without their last dimension.
            chunk: how many tokens are computed at a time; by default so many that their logits are as large as the
                hidden states of all.
        """
        labels = labels.flatten()
        if items is None:
            items = (labels != IGNORE_INDEX).sum()
        hidden, by = self.hidden.flatten(0, -2), self.projection
        chunk = chunk or max(_LEAST_CHUNK, -(-hidden.numel() // by.weight.shape[0]))
        may_add = torch.is_grad_enabled() and isinstance(by.weight, Parameter) and is_deferrable(by.weight)
        early = self.early if may_add and self.early is not None and self.early.accumulator is not None else None
        scale = None if early is None else early.factor() / items
        total: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
            hidden, by.weight, by.bias, labels, by.forward, summed, chunk, early, scale, torch.is_grad_enabled())
        return total / items


def with_logits(outputs: Any) -> Any:
    """Outputs of a last layer, with whole logits where it has left them to the loss."""
    if isinstance(outputs, HeadOutput):
        return outputs.logits()
    return tuple(map(with_logits, outputs)) if type(outputs) is tuple else outputs


class EarlyGradients:
    """Where F of a stage may add gradients of weights, and by which factor B will multiply the loss.

    Args:
        device: of the losses.
    """

    def __init__(self, device: torch.device) -> None:
        # The largest deviation that B has noted and `check` hasn't looked at.
        self._worst: Tensor | None = None
        self.accumulator: GradientAccumulator | None = None
        self.factor: Callable[[], Tensor] = lambda: torch.ones((), device=device)

    @contextmanager
    def active(self, outputs: Any, accumulator: GradientAccumulator, factor: Callable[[], Tensor]) -> Iterator[Any]:
        """Around the loss function: gives the outputs of the last layer as the function is to get them. `factor` gives
        the derivative of what B starts from by the function's result."""
        self.accumulator, self.factor = accumulator, factor
        try:
            yield self._joined_to(outputs)
        finally:
            self.accumulator = None

    def _joined_to(self, outputs: Any) -> Any:
        if isinstance(outputs, HeadOutput):
            return outputs._replace(early=self)
        return tuple(map(self._joined_to, outputs)) if type(outputs) is tuple else outputs

    def note(self, ratio: Tensor) -> None:
        """B has found its factor, as a multiple of the one that F was told."""
        off = (ratio.detach().float() - 1).abs()
        self._worst = off if self._worst is None else torch.maximum(self._worst, off)
        if ratio.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raise RuntimeError if gradients were added with a wrong factor; waits for the device, if there were any."""
        if self._worst is None:
            return
        worst, self._worst = float(self._worst), None
        if worst > _TOLERANCE:
            raise RuntimeError("the loss of a head in chunks of tokens was multiplied or used twice after it was "
                               f"computed, so that the head's gradient is wrong by {worst:.3g} of it: the loss "
                               "function must return it as it is, or (it, auxiliary loss), or have whole logits")


class _ChunkedLoss(torch.autograd.Function):
    """hidden (n, h), weight (v, h), bias (v) or None, labels (n) -> the sum of the losses."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, forward: Forward,
                summed: SummedLoss, chunk: int, early: EarlyGradients | None, scale: Tensor | None,
                trains: bool) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        matrix, offset = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
        weight_sum = _WeightSum(weight, early) if trains and weight.requires_grad else None
        bias_sum = None
        if trains and bias is not None and bias.requires_grad:
            bias_sum = torch.zeros_like(bias, dtype=torch.float32)
        gradient = torch.empty_like(hidden) if trains and hidden.requires_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        # An active mode would split the products of each chunk.
        with torch._C.DisableTorchFunction():
            for start in range(0, hidden.shape[0], chunk):
                rows = slice(start, start + chunk)
                one = _Chunk(hidden[rows], matrix, offset, forward, trains)
                with torch.set_grad_enabled(trains):
                    loss = summed(one.logits, labels[rows])
                total += loss.detach()
                if not trains:
                    continue
                by_logits = one.differentiate(loss, scale)
                if weight_sum is not None:
                    weight_sum.add(by_logits, one.projected)
                if bias_sum is not None:
                    bias_sum += by_logits.sum(0)
                if gradient is not None:
                    gradient[rows] = one.by_hidden(by_logits.mm(matrix))
        ctx.gradients = (gradient, None if weight_sum is None else weight_sum.finish(),
                         None if bias_sum is None or bias is None else bias_sum.to(bias.dtype))
        ctx.early, ctx.scale = early, scale
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_total: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss of a head in chunks of tokens can be differentiated once")
        gradients, ctx.gradients = ctx.gradients, None
        factor = by_total
        if ctx.scale is not None:
            factor = by_total / ctx.scale
            ctx.early.note(factor)
        return (*(None if gradient is None else gradient.mul_(factor) for gradient in gradients), *[None] * 7)


class _Chunk:
    """The logits of some tokens, outside the autograd graph of the stage."""

    def __init__(self, hidden: Tensor, matrix: Tensor, offset: Tensor | None, forward: Forward, trains: bool) -> None:
        self._hidden = hidden.detach().requires_grad_(trains)
        self._matrix, self._offset, self._trains = matrix, offset, trains
        with torch.set_grad_enabled(trains):
            self.logits = forward(self._project, self._hidden)

    def _project(self, hidden: Tensor) -> Tensor:
        self._received = hidden
        self.projected = hidden.detach().flatten(0, -2).to(self._matrix.dtype)
        product = F.linear(self.projected, self._matrix, self._offset)
        self._product = product.requires_grad_(self._trains)
        return self._product.view(*hidden.shape[:-1], -1)

    def differentiate(self, loss: Tensor, scale: Tensor | None) -> Tensor:
        """The gradient of the loss, times `scale`, with respect to the product; frees the logits."""
        of_loss = None if scale is None else scale.to(loss.dtype).reshape(loss.shape)
        gradient, = torch.autograd.grad(loss, self._product, of_loss)
        del self.logits, self._product
        return gradient

    def by_hidden(self, by_projected: Tensor) -> Tensor:
        """The gradient with respect to the hidden states."""
        if self._received is self._hidden:
            return by_projected
        gradient, = torch.autograd.grad(self._received, self._hidden, by_projected.view_as(self._received).to(
            self._received.dtype))
        return gradient


class _WeightSum:
    """The gradient of a weight: added where the engine's sums are, or in a tensor of its own."""

    def __init__(self, weight: Any, early: EarlyGradients | None) -> None:
        self._weight, self._accumulator = weight, None if early is None else early.accumulator
        sums = None if self._accumulator is None else self._accumulator.buffer(weight)
        # Products of a few tokens would be rounded one by one in a narrow sum.
        is_own = sums is None or sums.dtype != torch.float32
        self._own = torch.zeros_like(weight, dtype=torch.float32, requires_grad=False) if is_own else None
        self._sums = sums if self._own is None else self._own

    def add(self, by_logits: Tensor, hidden: Tensor) -> None:
        """by_logits (n, v), hidden (n, h)."""
        assert self._sums is not None
        if not add_product(self._sums, by_logits.t(), hidden):
            self._sums.add_(by_logits.t().mm(hidden))

    def finish(self) -> Tensor | None:
        """The gradient for autograd to add; None if the engine's sums have it."""
        own = None if self._own is None else self._own.to(self._weight.dtype)
        if self._accumulator is None:
            return own
        if own is not None:
            self._accumulator.add(self._weight, own)
        return None
