"""What B leaves to W: for each use of a weight, the operator's input and its output gradient, nothing else.

B adds entries; W removes them one by one, so memory is released while W runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_vshape.schedule.pieces import cut
from ds_vshape.split_backward.autocast import autocast_as, is_autocast_enabled
from ds_vshape.split_backward.targets import Cast, Element, Selection, Target, becomes_whole, parameter_of, shape_of

if TYPE_CHECKING:
    from ds_vshape.split_backward.function import HalfContext, SplitFunction

OperatorBuffers = tuple[Tensor | None, ...]


def _nothing() -> None:
    pass


class GradientAccumulator(Protocol):
    """Where the gradients of a batch add up, for each parameter."""

    def add(self, parameter: Parameter, gradient: Tensor, /) -> None:
        """Add a gradient of the parameter's shape and dtype: new memory, which may be kept."""

    def buffer(self, parameter: Parameter, /) -> Tensor | None:
        """The sum so far, with the parameter's shape and any dtype, to which a gradient is added in place at once; None
        if there is no sum yet, or if only `add` may change it."""


@dataclass(frozen=True, slots=True)
class WholeGradients:
    """Accumulates by `add` only: sums are rounded as by autograd, but need a temporary tensor and a second pass."""

    add: Callable[[Parameter, Tensor], None]

    def buffer(self, parameter: Parameter, /) -> None:
        return None


@dataclass(slots=True)
class Entry:
    """One pending backward_weight. `targets` are in the order of the function's weight arguments, None for an argument
    that needs no gradient; `autocast` is the state of autocast in B."""

    function: type[SplitFunction]
    context: HalfContext
    output_gradients: tuple[Tensor | None, ...]
    targets: tuple[Target | None, ...]
    autocast: Mapping[str, torch.dtype] = field(default_factory=dict)
    versions: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.versions = self._current_versions()

    def check_unmodified(self) -> None:
        """Raise RuntimeError if a kept tensor has been modified since B (autograd itself checks only until B)."""
        if self.versions != self._current_versions():
            raise RuntimeError(
                "one of the tensors needed for a weight gradient has been modified by an inplace operation between "
                "its input-gradient pass (B) and its weight-gradient pass (W)"
            )

    def _current_versions(self) -> list[int]:
        kept = (*self.context.saved_tensors, *self.output_gradients)
        return [tensor._version for tensor in kept if tensor is not None]

    @property
    def weights(self) -> int:
        """The number of elements of its gradients."""
        return sum(shape_of(target).numel() for target in self.targets if target is not None)

    def tensors(self) -> Iterator[Tensor]:
        """What it keeps alive; parts of one memory may come more than once, and weights are among them."""
        for kept in (self.output_gradients, *vars(self.context).values()):
            for tensor in kept if isinstance(kept, (tuple, list)) else (kept,):
                if isinstance(tensor, Tensor):
                    yield tensor

    def weight_gradients(self, accumulator: GradientAccumulator) -> tuple[Tensor | None, ...]:
        """The gradient of each target, in a memory layout that may be kept as `parameter.grad`; None where it has been
        added to the accumulator's buffer."""
        self.check_unmodified()
        buffers = tuple(None if target is None else _buffer(target, accumulator) for target in self.targets)
        if self.autocast or is_autocast_enabled():
            with autocast_as(self.autocast):
                gradients = self.function.accumulate_weight(self.context, buffers, *self.output_gradients)
        else:
            gradients = self.function.accumulate_weight(self.context, buffers, *self.output_gradients)
        if not isinstance(gradients, tuple):
            gradients = (gradients,)
        if len(gradients) != len(self.targets):
            raise RuntimeError(
                f"{self.function.__name__}.backward_weight gave {len(gradients)} gradients for its "
                f"{len(self.targets)} weight arguments"
            )
        return tuple(
            None if target is None or gradient is None else self._own(target, gradient)
            for target, gradient in zip(self.targets, gradients)
        )

    def _own(self, target: Target, gradient: Tensor) -> Tensor:
        """`gradient`, copied where autograd would copy it before it becomes `parameter.grad`: when it is of another
        dtype, its memory is also used elsewhere, or it is laid out unlike the parameter."""
        if gradient.shape != shape_of(target):
            raise RuntimeError(
                f"{self.function.__name__}.backward_weight gave a gradient of shape {tuple(gradient.shape)} for a "
                f"parameter of shape {tuple(shape_of(target))}"
            )
        like = parameter_of(target) if becomes_whole(target) else gradient
        as_wanted = gradient.dtype == target.dtype and gradient.stride() == like.stride()
        if as_wanted and not self._keeps_memory_of(gradient):
            return gradient
        return torch.empty_like(like, dtype=target.dtype, requires_grad=False).copy_(gradient)

    def _keeps_memory_of(self, gradient: Tensor) -> bool:
        for other in (*self.output_gradients, *self.context.saved_tensors):
            if other is not None and torch._C._is_alias_of(gradient, other):  # type: ignore[attr-defined]
                return True
        return False


def _buffer(target: Target, accumulator: GradientAccumulator) -> Tensor | None:
    """Where a gradient of `target` may be added in place: in the sum for the parameter, if there is one."""
    if isinstance(target, Parameter):
        return accumulator.buffer(target)
    sums = _buffer(target.of, accumulator)
    return None if sums is None else target.within(sums)


class WeightGradientStore:
    """The pending weight gradients of one stage for one micro-batch, in the order in which B reached them.

    The gradients of a parameter that the forward used several times are summed before they are delivered, in the
    order and the precision of autograd's own sums, so that accumulation over micro-batches adds the same numbers as an
    unsplit backward. What a function adds to a buffer of the accumulator is delivered with that.
    """

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque()
        # Of a parameter: its uses, what was made of it being one. Of that: the operators that were given it.
        self._uses: dict[Target, int] = {}
        self._partial_sums: dict[Target, Tensor] = {}
        # How many entries W has taken, and after how many each of its pieces ends.
        self._taken = 0
        self._ends: tuple[int, ...] = ()
        # Whether a run of autograd may leave entries here: not one that a layer starts by itself (mode.py), nor one
        # that comes after W.
        self.deferring = True
        # What may be done while this micro-batch's B waits for other ranks (tensor_parallel.py).
        self.meanwhile: Callable[[], None] = _nothing

    def __len__(self) -> int:
        return len(self._entries)

    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters with pending gradients, each once."""
        return tuple(target for target in self._uses if isinstance(target, Parameter))

    def tensors(self) -> Iterator[Tensor]:
        """What all entries keep alive, as in `Entry.tensors`, and the unfinished sums."""
        for entry in self._entries:
            yield from entry.tensors()
        yield from self._partial_sums.values()

    def add(self, entry: Entry) -> None:
        """B: keep `entry` for W."""
        self._entries.append(entry)
        for target in entry.targets:
            if target is not None:
                self._add_use(target)

    def _add_use(self, target: Target) -> None:
        uses = self._uses.get(target, 0)
        self._uses[target] = uses + 1
        if not isinstance(target, Parameter) and not uses:
            self._add_use(target.of)

    @contextmanager
    def set_deferring(self, deferring: bool) -> Iterator[None]:
        """Meanwhile, runs of autograd leave entries here, or compute everything at once."""
        before, self.deferring = self.deferring, deferring
        try:
            yield
        finally:
            self.deferring = before

    def run(self, accumulator: GradientAccumulator) -> None:
        """W: compute every gradient and hand it to `accumulator`, freeing each entry as it's done."""
        while self._entries:
            self.run_next(accumulator)
        self.deferring = False

    def run_piece(self, piece: int, pieces: int, accumulator: GradientAccumulator, costs: tuple[float, ...] = (),
                  after_entry: Callable[[], None] = _nothing) -> None:
        """Piece `piece` (from 0, in turn) of W cut into `pieces`, between entries (`schedule.pieces.cut`). The sums are
        those of `run`.

        Args:
            costs: of all entries. Without them, or if there are more or fewer entries, an entry costs what its
                gradients have of numbers.
            after_entry: called after each entry.
        """
        if piece == 0 and pieces > 1:
            if len(costs) == self._taken + len(self._entries):
                self._ends = cut(costs, pieces)
            else:
                left = cut(tuple(float(entry.weights) for entry in self._entries), pieces)
                self._ends = tuple(self._taken + end for end in left)
        # Where there are fewer entries than pieces, the last pieces are empty.
        while self._entries and (piece == pieces - 1 or self._taken < self._ends[piece]):
            self.run_next(accumulator)
            after_entry()
        if piece == pieces - 1:
            self.deferring = False

    def run_next(self, accumulator: GradientAccumulator) -> None:
        """One entry of W; raises IndexError if there is none.

        `accumulator.add` is called at the last of a parameter's uses, with the sum of all that found no buffer.
        """
        # As torch.no_grad(), without its Python.
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            # The entry is dropped before the gradients are handed over: what it kept isn't needed any more.
            targets, gradients = self._take(accumulator)
            for target, gradient in zip(targets, gradients):
                if target is not None:
                    self._finish_use(target, gradient, accumulator)
        finally:
            torch._C._set_grad_enabled(before)

    def _take(self, accumulator: GradientAccumulator) -> tuple[tuple[Target | None, ...], tuple[Tensor | None, ...]]:
        entry = self._entries.popleft()
        self._taken += 1
        return entry.targets, entry.weight_gradients(accumulator)

    def _finish_use(self, target: Target, gradient: Tensor | None, accumulator: GradientAccumulator) -> None:
        total = self._partial_sums.pop(target, None)
        if total is None:
            total = gradient
        elif gradient is not None:
            total.add_(gradient)
        uses = self._uses[target] - 1
        if uses > 0:
            self._uses[target] = uses
            if total is not None:
                self._partial_sums[target] = total
            return
        del self._uses[target]
        if isinstance(target, Parameter):
            if total is not None:
                accumulator.add(target, total)
            return
        if total is not None and not _add_into_buffer(target, total, accumulator):
            self._partial_sums[target.of] = target.add_to(self._partial_sums.get(target.of), total)
        self._finish_use(target.of, None, accumulator)


def _add_into_buffer(target: Cast | Element | Selection, total: Tensor, accumulator: GradientAccumulator) -> bool:
    """Add the gradient of some elements of a parameter to the parameter's sum, if there is one: a gradient of the
    whole would be mostly zeros."""
    if isinstance(target, Cast):
        return False
    sums = accumulator.buffer(target.of)
    if sums is None:
        return False
    target.add_in_place(sums, total)
    return True
