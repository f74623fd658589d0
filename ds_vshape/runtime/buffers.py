"""What a stage holds of one micro-batch from its forward to the end of its backward.

    before F     inputs
    F to B       inputs (which require gradients), and the loss or the roots, where the backward enters the graph; what
                 it takes to run some layers again, or to move memory to the host and back
    B to W       the store: inputs and output gradients of the split operators, nothing else
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ds_vshape.comm.ownership import Versions, check_unwritten, own, versions
from ds_vshape.comm.payload import Payload, check_payload, members
from ds_vshape.runtime.instructions import BufferId
from ds_vshape.runtime.recomputation import Recomputation
from ds_vshape.runtime.saved_tensors import SavedTensors
from ds_vshape.schedule.lowering import Content
from ds_vshape.schedule.placement import Placement
from ds_vshape.split_backward import WeightGradientStore
from ds_vshape.split_backward.ownership import own_copy


@dataclass
class Buffer:
    """The tensors of one (stage, micro-batch); each is released as soon as nothing needs it."""

    inputs: Payload | None = None
    labels: Any = None
    loss: Any = None
    roots: tuple[GradientEdge | None, ...] = ()
    output_grads: tuple[Tensor | None, ...] = ()
    store: WeightGradientStore = field(default_factory=WeightGradientStore)
    # Of layers that are run again before the backward.
    recomputation: Recomputation | None = None
    # Of a forward whose memory goes to the host.
    saved: SavedTensors | None = None
    # The versions of inputs or output gradients from the same rank, at the time when these were handed over.
    versions: Versions | None = None

    def saving(self, device: torch.device) -> AbstractContextManager[Any]:
        """Around a forward on `device` of which what it leaves will be moved."""
        self.saved = SavedTensors(device.type)
        return self.saved.hooks()

    def take_input_grads(self) -> list[Tensor | None]:
        """The gradients of the inputs. The buffer releases both; the list has the only references to the gradients."""
        assert self.inputs is not None
        grads = [None if t is None else t.grad for t in members(self.inputs)]
        for tensor in members(self.inputs):
            if tensor is not None:
                tensor.grad = None
        self.inputs = None
        return grads

    def check_unwritten(self, content: Content) -> None:
        """Raise PipelineError if tensors that were handed over on the same rank have been modified since."""
        if self.versions is not None:
            tensors = self.output_grads
            if content is Content.ACTIVATION and self.inputs is not None:
                tensors = members(self.inputs)
            check_unwritten(tensors, self.versions, content)
            self.versions = None


class Buffers:
    """All that rank `rank` holds of a batch, including the results of its passes that wait to be sent."""

    def __init__(self, placement: Placement, rank: int) -> None:
        self._placement, self._rank = placement, rank
        self._buffers: dict[BufferId, Buffer] = {}
        self._outbox: dict[tuple[Content, BufferId], Payload] = {}

    def __getitem__(self, buffer_id: BufferId) -> Buffer:
        return self._buffers[buffer_id]

    def open(self, buffer_id: BufferId) -> Buffer:
        """The buffer, created if it doesn't exist."""
        buffer = self._buffers.get(buffer_id)
        if buffer is None:
            buffer = self._buffers[buffer_id] = Buffer()
        return buffer

    def close(self, buffer_id: BufferId) -> None:
        """Release the buffer."""
        del self._buffers[buffer_id]

    def waiting(self, apart: BufferId) -> WeightGradientStore | None:
        """The store of the earliest micro-batch with pending weight gradients, except the one whose B is running."""
        found = {(buffer_id.micro_batch, buffer_id.stage): buffer.store for buffer_id, buffer in self._buffers.items()
                 if buffer.store and buffer_id != apart}
        return found[min(found)] if found else None

    def hand_over(self, content: Content, receiver: BufferId, results: list[Tensor | None], is_tuple: bool) -> None:
        """Give what a pass made to the neighbour stage: at once on this rank, else by `take`.

        `results` must have the only references to the tensors (see `own`), and is emptied.
        """
        tensors = own(results)
        if self._placement.rank_of(receiver.stage) != self._rank:
            self._outbox[content, receiver] = _payload(tensors, is_tuple)
            return
        buffer = self.open(receiver)
        buffer.versions = versions(tensors)
        if content is Content.ACTIVATION:
            buffer.inputs = _payload(tensors, is_tuple)
        else:
            buffer.output_grads = tensors

    def take(self, content: Content, receiver: BufferId) -> Payload:
        """What was handed over to a stage of another rank, to be sent."""
        return self._outbox.pop((content, receiver))

    def outputs(self, buffer_id: BufferId) -> Any:
        """What the forward that has just run on a buffer made: the loss, or what it has handed over."""
        if buffer_id.stage == self._placement.last_stage:
            return self._buffers[buffer_id].loss
        receiver = BufferId(buffer_id.stage + 1, buffer_id.micro_batch)
        if receiver in self._buffers:
            return self._buffers[receiver].inputs
        return self._outbox[Content.ACTIVATION, receiver]

    def clear(self) -> None:
        """Release everything."""
        for buffer in self._buffers.values():
            if buffer.saved is not None:
                buffer.saved.abandon()
        self._buffers.clear()
        self._outbox.clear()


def edges(outputs: Payload, device: torch.device) -> tuple[GradientEdge | None, ...]:
    """Where a backward enters the graph of a stage's outputs; unlike these, edges keep no data alive.

    Raises PipelineError for outputs that no other stage can get from a rank on `device`.
    """
    check_payload(outputs, device)
    return tuple(get_gradient_edge(t) if t is not None and t.requires_grad else None for t in members(outputs))


def _payload(tensors: tuple[Tensor | None, ...], is_tuple: bool) -> Payload:
    return tensors if is_tuple else tensors[0]  # type: ignore[return-value]


def leaves(payload: Payload) -> Payload:
    """The same data, outside the graph, wanting gradients where it did."""
    cut = tuple(None if t is None else t.detach().requires_grad_(t.requires_grad) for t in members(payload))
    return _payload(cut, isinstance(payload, tuple))


class _Enter(torch.autograd.Function):
    @classmethod
    def unguarded(cls, *tensors: Tensor) -> tuple[Tensor, ...]:
        """As `apply`, past its care for torch.func, which costs some microseconds: no transform is active here."""
        return super(torch.autograd.Function, cls).apply(*tensors)  # type: ignore[misc,no-any-return]

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


class _EnterCopies(_Enter):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(own_copy(tensor) for tensor in tensors)


def enter(payload: Payload) -> Payload:
    """The inputs as the stage's forward gets them: it may change them in place, which a leaf forbids.

    DeepSpeed clones them for that; here no memory is copied.
    """
    if isinstance(payload, Tensor):
        return _Enter.unguarded(payload)[0] if payload.requires_grad else payload
    if not any(t is not None and t.requires_grad for t in payload):
        return payload
    return _entered(payload, _Enter, lambda tensor: tensor)


def enter_copies(payload: Payload) -> Payload:
    """As `enter`, with copies: the forward will run again, and must then find the inputs as they are now."""
    return _entered(payload, _EnterCopies, own_copy)


def _entered(payload: Payload, function: type[_Enter], other: Callable[[Tensor], Tensor]) -> Payload:
    """The payload inside the graph: `function` of what wants a gradient, `other` of the rest."""
    wanting = [t for t in members(payload) if t is not None and t.requires_grad]
    entered = iter(function.unguarded(*wanting) if wanting else ())
    inside = tuple(None if t is None else next(entered) if t.requires_grad else other(t) for t in members(payload))
    return _payload(inside, isinstance(payload, tuple))
