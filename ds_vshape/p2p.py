"""Messages between pipeline ranks, asynchronous on a communicator for each channel.

DeepSpeed's p2p.py sends and receives on one communicator and blocks in both; around a V, where neighbours send to
each other in both directions, that hangs or serializes. Here every channel (source, target, content) has a process
group of its own, so no message ever stands behind one of another kind, and the order on a channel is the sender's.

A message is the tensors of one stage boundary. Their signature (shapes, dtypes, which want or have a gradient) goes
ahead of each message in an announced batch; in the batches after it the receiver knows it already.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.module import PipelineError
from torch import Tensor

from ds_vshape.config import TIMEOUT_SECONDS
from ds_vshape.groups import new_group
from ds_vshape.schedule.lowering import Channel, Content, Message

Payload = Tensor | tuple[Tensor | None, ...]

_HEADER_SIZE = 256
_DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128, torch.float16, torch.bfloat16, torch.uint8,
           torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
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
        """The signature of `payload`; PipelineError for what can't cross a stage boundary."""
        check_payload(payload)
        is_tuple = isinstance(payload, tuple)
        members = payload if isinstance(payload, tuple) else (payload,)
        return cls(tuple(t if t is None else TensorSignature(tuple(t.shape), t.dtype, t.requires_grad)
                         for t in members), is_tuple)

    def describes(self, payload: Payload) -> bool:
        """Whether this is `payload`'s signature: `of` in less time, for each message of each batch."""
        members = payload if isinstance(payload, tuple) else (payload,)
        return (isinstance(payload, tuple) is self.is_tuple and len(members) == len(self.tensors)
                and all(tensor is None if described is None else described.describes(tensor)
                        for described, tensor in zip(self.tensors, members)))

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(math.prod(t.shape) * t.dtype.itemsize for t in self.tensors if t is not None)

    def encode(self) -> list[int]:
        """The signature as numbers."""
        numbers = [int(self.is_tuple), len(self.tensors)]
        for tensor in self.tensors:
            if tensor is None:
                numbers.append(-1)
            else:
                numbers += [_DTYPE_IDS[tensor.dtype], int(tensor.requires_grad), len(tensor.shape), *tensor.shape]
        if len(numbers) > _HEADER_SIZE:
            raise PipelineError(f"a stage's output has too many tensors or dimensions: {len(numbers)} numbers describe "
                                f"it, and at most {_HEADER_SIZE} can be announced")
        return numbers

    @classmethod
    def decode(cls, numbers: Sequence[int]) -> Signature:
        """The signature that `encode` wrote."""
        stream = iter(numbers)
        is_tuple, count = bool(next(stream)), next(stream)
        tensors: list[TensorSignature | None] = []
        for _ in range(count):
            dtype = next(stream)
            if dtype < 0:
                tensors.append(None)
                continue
            requires_grad, dimensions = bool(next(stream)), next(stream)
            shape = tuple(next(stream) for _ in range(dimensions))
            tensors.append(TensorSignature(shape, _DTYPES[dtype], requires_grad))
        return cls(tuple(tensors), is_tuple)

    def __str__(self) -> str:
        return ", ".join("none" if tensor is None else str(tensor) for tensor in self.tensors)


def check_payload(payload: Any) -> None:
    """Raises PipelineError for what can't cross a stage boundary, between ranks or on one."""
    members = payload if isinstance(payload, tuple) else (payload,)
    if not members:
        raise PipelineError("a stage's output is an empty tuple: nothing would cross to the next stage")
    for member in members:
        if obstacle := _obstacle(member):
            raise PipelineError(f"a stage's output holds {obstacle}: only dense tensors and tuples of them can "
                                "cross to the next stage")


def _obstacle(member: Any) -> str | None:
    """What keeps `member` from crossing a stage boundary, if anything."""
    if member is None:
        return None
    if not torch.is_tensor(member):
        return type(member).__name__
    if member.layout is not torch.strided:
        return f"a {str(member.layout).removeprefix('torch.')} tensor"
    return None if member.dtype in _DTYPE_IDS else str(member.dtype)


class Withdrawn(Exception):
    """A message came without content: its sender has failed in this batch."""


class PeerLost(PipelineError):  # type: ignore[misc]
    """The connection to another rank broke, or it didn't answer in time: the job can't go on."""


# What goes out instead of a message in an announced batch.
_NOTHING = Signature((), True)

# By kind of content and receiving stage.
Signatures = dict[tuple[Content, int], Signature]


@dataclass
class _Transfer:
    """A message on its way: the works to wait for, and the tensors that must live until then."""

    works: list[Any] = field(default_factory=list)
    tensors: list[Tensor | None] = field(default_factory=list)
    signature: Signature | None = None

    def wait(self, peer: int) -> None:
        """Until all is there; PeerLost if the connection to pipeline rank `peer` breaks."""
        try:
            for work in self.works:
                work.wait()
        except RuntimeError as error:
            raise _lost(peer, error) from error
        self.works.clear()


def _lost(peer: int, error: RuntimeError) -> PeerLost:
    """What an error of torch.distributed says of pipeline rank `peer`."""
    # Gloo's errors begin with the place in its source.
    reason = str(error).splitlines()[0]
    return PeerLost(f"pipeline rank {peer} is lost: {reason.partition('] ')[2] or reason}")


@dataclass(frozen=True)
class End:
    """This rank's end of a channel between the global ranks `source` and `target`."""

    channel: Channel
    source: int
    target: int
    group: Any
    device: torch.device

    @property
    def sends(self) -> bool:
        """Whether this rank is the source."""
        return self.source == dist.get_rank()


class Channels:
    """This rank's ends of the channels.

    Args:
        channels: all channels of a pipeline, in the same order on every rank.
        pipelines: the global ranks of each pipeline of the job (one for each data and tensor parallel rank), in rank
            order.
        device: where messages are received.
        seconds: how long a message may take; then the other rank counts as lost (PeerLost).

    Creating it is collective over the whole job. Every transfer started in a batch must be waited for in it.
    """

    def __init__(self, channels: Sequence[Channel], pipelines: Sequence[Sequence[int]], device: torch.device,
                 seconds: float = TIMEOUT_SECONDS) -> None:
        self._device = device
        own, = (ranks for ranks in pipelines if dist.get_rank() in ranks)
        self._global_ranks = tuple(own)
        self._groups: dict[Channel, Any] = {}
        for ranks in pipelines:
            for channel in channels:
                # All ranks make all groups, since torch names a group by counting; it costs a stranger nothing.
                group = new_group([ranks[channel.source], ranks[channel.target]], seconds)
                if ranks is own and own.index(dist.get_rank()) in (channel.source, channel.target):
                    self._groups[channel] = group
        # With the places of source and target in the group. Past dist.isend and dist.irecv, which find these out and
        # check their arguments anew for each message, and take longer for that than the rest of sending does.
        self._ends = {channel: (group, dist.get_group_rank(group, own[channel.source]),
                                dist.get_group_rank(group, own[channel.target]))
                      for channel, group in self._groups.items()}
        self._sending: dict[Message, _Transfer] = {}
        self._receiving: dict[Message, _Transfer] = {}
        # Messages of an announced batch whose header isn't read yet, in the order in which they come.
        self._noted: dict[Channel, deque[Message]] = defaultdict(deque)
        self._signatures: Signatures = {}
        self._announced = True

    def ends(self) -> Iterator[End]:
        """This rank's ends of all its channels."""
        for channel, group in self._groups.items():
            source, target = self._global_ranks[channel.source], self._global_ranks[channel.target]
            yield End(channel, source, target, group, self._device)

    def begin_batch(self, signatures: Signatures | None) -> None:
        """Start a batch with the `signatures` of an earlier one, or None to announce each message."""
        self._announced = signatures is None
        self._signatures = {} if signatures is None else signatures

    def end_batch(self) -> Signatures:
        """What this rank's messages looked like, for `begin_batch`."""
        assert not self._sending and not self._receiving, "a message of this batch was never waited for"
        return self._signatures

    def send(self, message: Message, payload: Payload) -> None:
        """Start to send; the tensors must not change until `release`."""
        key = message.channel.content, message.stage
        transfer = _Transfer()
        if self._announced:
            self._signatures[key] = Signature.of(payload)
            self._announce(transfer, message.channel, self._signatures[key])
        elif not self._signatures[key].describes(payload):
            raise PipelineError(
                f"the {message.channel.content} for stage {message.stage} changed: [{self._signatures[key]}] in an "
                f"earlier batch, [{Signature.of(payload)}] in micro-batch {message.micro_batch} now. Set "
                "dynamic_shape=True in the PipelineModule, or call engine.reset_activation_shape() on every rank "
                "before the batch")
        self._sending[message] = transfer
        for tensor in payload if isinstance(payload, tuple) else (payload,):
            if tensor is not None:
                self._start_send(transfer, message.channel, tensor.detach().contiguous())

    def withdraw(self, message: Message) -> None:
        """Send a message without content, so that nobody waits: none in an announced batch, else zeros."""
        transfer = self._sending[message] = _Transfer()
        if self._announced:
            self._announce(transfer, message.channel, _NOTHING)
            return
        for described in self._signatures[message.channel.content, message.stage].tensors:
            if described is not None:
                self._start_send(transfer, message.channel, described.empty(self._device).zero_())

    def release(self, message: Message) -> None:
        """Wait until `message` has left."""
        self._sending.pop(message).wait(message.channel.target)

    def post(self, message: Message) -> None:
        """Offer a buffer for `message`; in an announced batch only take note of it, since nobody knows its size yet."""
        self._receiving[message] = _Transfer()
        if self._announced:
            self._noted[message.channel].append(message)
        else:
            self._start_payload(message, self._signatures[message.channel.content, message.stage])

    def receive(self, message: Message) -> Payload:
        """Wait for `message`; its tensors are leaves that require a gradient where the sender's did.

        Raises Withdrawn if nothing was sent.
        """
        while not self._receiving[message].signature:
            self._start_announced(self._noted[message.channel].popleft())
        transfer = self._receiving.pop(message)
        transfer.wait(message.channel.source)
        assert transfer.signature is not None
        if transfer.signature == _NOTHING:
            raise Withdrawn(f"{message.channel.content} for stage {message.stage}, micro-batch {message.micro_batch}")
        wants_gradient = message.channel.content is Content.ACTIVATION and torch.is_grad_enabled()
        for tensor, described in zip(transfer.tensors, transfer.signature.tensors):
            if tensor is not None and described is not None and wants_gradient:
                tensor.requires_grad_(described.requires_grad)
        if transfer.signature.is_tuple:
            return tuple(transfer.tensors)
        first, = transfer.tensors
        assert first is not None
        return first

    def works_into(self, message: Message) -> list[Any]:
        """What `receive` is going to wait for, once `message` is posted; others may be put in its place."""
        return self._receiving[message].works

    def discard(self, message: Message) -> None:
        """Take `message` in, if that isn't done yet, and forget it."""
        if message in self._receiving:
            with suppress(Withdrawn):
                self.receive(message)

    def measure_hops(self, messages: Sequence[Message], rounds: int = 5) -> list[float]:
        """The seconds of a hop of each of `messages` that this rank sends, half a round trip; 0 for all others.

        Args:
            messages: one activation for each stage boundary between two ranks, the same list on every rank.

        Collective over the pipeline, between batches, once signatures are known.
        """
        hops = [0.0] * len(messages)
        rank = self._global_ranks.index(dist.get_rank())
        for place, message in enumerate(messages):
            there = message.channel
            back = Channel(there.target, there.source, Content.GRADIENT)
            if rank not in (there.source, there.target):
                continue
            sample = torch.zeros(self._signatures[there.content, message.stage].nbytes, dtype=torch.uint8,
                                 device=self._device)
            trips = []
            for _ in range(rounds):
                start = time.perf_counter()
                for channel in (there, back):
                    if rank == channel.source:
                        dist.send(sample, self._global_ranks[channel.target], group=self._groups[channel])
                    else:
                        dist.recv(sample, self._global_ranks[channel.source], group=self._groups[channel])
                get_accelerator().synchronize()
                trips.append(time.perf_counter() - start)
            # The receiver's first trip counts its wait for the sender.
            if rank == there.source:
                hops[place] = statistics.median(trips) / 2
        return hops

    def _announce(self, transfer: _Transfer, channel: Channel, signature: Signature) -> None:
        numbers = signature.encode()
        header = torch.zeros(_HEADER_SIZE, dtype=torch.int64)
        header[:len(numbers)] = torch.tensor(numbers)
        self._start_send(transfer, channel, header.to(self._device))

    def _start_announced(self, message: Message) -> None:
        """Read the header of the channel's next message, then offer buffers for the rest."""
        header = torch.empty(_HEADER_SIZE, dtype=torch.int64, device=self._device)
        try:
            dist.recv(header, self._global_ranks[message.channel.source], group=self._groups[message.channel])
        except RuntimeError as error:
            raise _lost(message.channel.source, error) from error
        signature = Signature.decode(header.tolist())
        self._signatures[message.channel.content, message.stage] = signature
        self._start_payload(message, signature)

    def _start_payload(self, message: Message, signature: Signature) -> None:
        transfer = self._receiving[message]
        transfer.signature = signature
        for described in signature.tensors:
            tensor = None if described is None else described.empty(self._device)
            transfer.tensors.append(tensor)
            if tensor is not None:
                group, source, _ = self._ends[message.channel]
                _start(transfer, group.recv, tensor, source, message.channel.source)

    def _start_send(self, transfer: _Transfer, channel: Channel, tensor: Tensor) -> None:
        transfer.tensors.append(tensor)
        group, _, target = self._ends[channel]
        _start(transfer, group.send, tensor, target, channel.target)


def _start(transfer: _Transfer, start: Callable[..., Any], tensor: Tensor, place: int, peer: int) -> None:
    """Begin to send or receive `tensor`, unless it's empty; `start` is a group's send or recv."""
    if not tensor.numel():
        return
    try:
        transfer.works.append(start([torch.view_as_real(tensor) if tensor.is_complex() else tensor], place, 0))
    except RuntimeError as error:
        raise _lost(peer, error) from error
