"""Messages between pipeline ranks, asynchronous on a communicator for each direction between two ranks.

DeepSpeed's p2p.py sends and receives on one communicator and blocks in both; around a V, where neighbours send to
each other in both directions, that hangs or serializes. Here each direction has a process group of its own, on which
the order is the sender's: schedule/communicators.py says why that is enough.

A message is the tensors of one stage boundary. Their signature (shapes, dtypes, which want or have a gradient) goes
ahead of each message in an announced batch; in the batches after it the receiver knows it already. It is for the host,
and goes over gloo whatever the job's backend is: from a GPU the host would have to wait for all that the GPU does. An
announced message is received once all that came before it in its direction are.
"""

from __future__ import annotations

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

from ds_vshape.comm.device_waits import DeviceWaits
from ds_vshape.comm.groups import GLOO, light_options, messenger, new_group
from ds_vshape.comm.ownership import Versions, check_unwritten, versions
from ds_vshape.comm.payload import HEADER_SIZE, Payload, Signature, carried, check_payload, members, settled
from ds_vshape.schedule.communicators import Communicator, communicator_of
from ds_vshape.schedule.lowering import AwaitReceive, AwaitSend, Channel, Content, Message


class Withdrawn(Exception):
    """A message came without content: its sender has failed in this batch."""


class PeerLost(PipelineError):  # type: ignore[misc]
    """The connection to another rank broke, or it didn't answer in time: the job can't go on."""


# Words of the transports' errors, which torch raises as plain RuntimeErrors. In lower case.
_COMMUNICATION_WORDS = ("gloo", "nccl", "pair closure", "connection", "socket", "timed out", "timeout", "broken pipe",
                        "no route to host", "aborted")


def is_connection_error(error: BaseException) -> bool:
    """Whether an error raised while a rank communicates is one of the connection, and not of what it sends: torch
    raises RuntimeError for both."""
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
        return False
    return isinstance(error, (dist.DistError, TimeoutError)) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _COMMUNICATION_WORDS))


# What goes out instead of a message in an announced batch.
_NOTHING = Signature((), True)

_Await = AwaitReceive | AwaitSend
# By kind of content and receiving stage.
Signatures = dict[tuple[Content, int], Signature]


@dataclass(slots=True)
class _Transfer:
    """A message on its way: the works to wait for, and the tensors that must live until then."""

    works: list[Any] = field(default_factory=list)
    tensors: list[Tensor | None] = field(default_factory=list)
    # What is sent ahead of them, in an announced batch.
    header: Tensor | None = None
    # Of a message to be received: known once its header is read, in an announced batch.
    signature: Signature | None = None
    # Whether buffers for all of its tensors are offered.
    is_posted: bool = False
    # Of a message that is sent, when it started.
    versions: Versions = ()

    def wait(self, peer: int) -> None:
        """Until all is there; PeerLost if the connection to pipeline rank `peer` breaks."""
        with _Losing(peer):
            for work in self.works:
                work.wait()
        self.works.clear()


class _Losing:
    """Around communication with pipeline rank `peer`: PeerLost for an error of the connection.

    A class, since every message goes through it and a generator would take four times as long.
    """

    __slots__ = ("_peer",)

    def __init__(self, peer: int) -> None:
        self._peer = peer

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, RuntimeError) and is_connection_error(error):
            # Gloo's errors begin with the place in its source.
            reason = str(error).splitlines()[0]
            raise PeerLost(f"pipeline rank {self._peer} is lost: {reason.partition('] ')[2] or reason}") from error


@dataclass(frozen=True)
class End:
    """This rank's end of a pipeline's `communicator`, between the global ranks `source` and `target`."""

    communicator: Communicator
    source: int
    target: int
    group: Any
    device: torch.device

    @property
    def sends(self) -> bool:
        """Whether this rank is the source."""
        return self.source == dist.get_rank()

    def transfer(self, tensor: Tensor) -> None:
        """Send `tensor`, or fill it with what the other end sends, and wait for that; on a GPU the stream waits."""
        if self.sends:
            self.group.send([tensor], dist.get_group_rank(self.group, self.target), 0).wait()
        else:
            self.group.recv([tensor], dist.get_group_rank(self.group, self.source), 0).wait()


class Channels:
    """This rank's ends of the channels.

    Args:
        channels: all channels of a pipeline, in the same order on every rank.
        pipelines: the global ranks of each pipeline of the job (one for each data and tensor parallel rank), in rank
            order.
        device: where messages are received.

    Creating it is collective over the whole job. Every transfer started in a batch must be waited for in it.
    """

    def __init__(self, channels: Sequence[Channel], pipelines: Sequence[Sequence[int]], device: torch.device) -> None:
        self._device = device
        own, = (ranks for ranks in pipelines if dist.get_rank() in ranks)
        self._global_ranks = tuple(own)
        self._groups: dict[Communicator, Any] = {}
        for ranks in pipelines:
            headers = new_group(ranks, GLOO)
            if ranks is own:
                self._headers = headers
            for communicator in dict.fromkeys(map(communicator_of, channels)):
                # All ranks make all groups, since torch names a group by counting; it costs a stranger nothing.
                group = new_group([ranks[place] for place in communicator], options=light_options())
                if ranks is own and own.index(dist.get_rank()) in communicator:
                    self._groups[communicator] = group
        # By channel: what sends and receives in its group, and the places of source and target there. Messages bypass
        # dist.isend and dist.irecv, which look the places up and check their arguments for each message, and where it's
        # gloo torch's dispatcher: both take longer than the rest.
        self._ends = {channel: (messenger(group), dist.get_group_rank(group, own[channel.source]),
                                dist.get_group_rank(group, own[channel.target]))
                      for channel in channels if (group := self._groups.get(communicator_of(channel))) is not None}
        self._sending: dict[Message, _Transfer] = {}
        self._receiving: dict[Message, _Transfer] = {}
        # Messages of an announced batch whose header isn't read yet, in the order in which they come.
        self._noted: dict[Communicator, deque[Message]] = defaultdict(deque)
        self._signatures: Signatures = {}
        self._announced = True
        # Of a device that runs behind the host.
        self._device_waits: DeviceWaits[_Await] | None = None
        if not get_accelerator().is_synchronized_device():
            self._device_waits = DeviceWaits()

    def ends(self) -> Iterator[End]:
        """This rank's ends of all its communicators."""
        for communicator, group in self._groups.items():
            source, target = (self._global_ranks[place] for place in communicator)
            yield End(communicator, source, target, group, self._device)

    def nbytes(self, message: Message) -> int:
        """Bytes of `message`, once this rank has sent or received one like it."""
        return self._signatures[message.channel.content, message.stage].nbytes

    def begin_batch(self, signatures: Signatures | None) -> None:
        """Start a batch with the `signatures` of an earlier one, or None to announce each message."""
        self._announced = signatures is None
        self._signatures = {} if signatures is None else signatures

    def end_batch(self) -> Signatures:
        """What this rank's messages looked like, for `begin_batch`."""
        assert not self._sending and not self._receiving, "a message of this batch was never waited for"
        return self._signatures

    def send(self, message: Message, payload: Payload) -> None:
        """Start to send; the tensors must not change until `release`. PipelineError for what can't be sent."""
        key = message.channel.content, message.stage
        if self._announced:
            check_payload(payload, self._device, f"the {message.channel.content} for stage {message.stage}")
            signature = Signature.of(payload)
            header = signature.encode()
            self._signatures[key] = signature
        elif self._signatures[key].describes(payload):
            header = None
        else:
            raise PipelineError(
                f"the {message.channel.content} for stage {message.stage} changed: [{self._signatures[key]}] in an "
                f"earlier batch, [{Signature.of(payload)}] in micro-batch {message.micro_batch} now. Set "
                "dynamic_shape=True in the PipelineModule, or call engine.reset_activation_shape() on every rank "
                "before the batch")
        # All that can fail but the connection comes before the first tensor goes: the receiver takes in all or none.
        self._start_sends(message, [settled(tensor) for tensor in members(payload) if tensor is not None], header)

    def withdraw(self, message: Message) -> None:
        """Send a message without content, so that its receiver doesn't wait: none in an announced batch, else zeros."""
        if self._announced:
            self._start_sends(message, [], _NOTHING.encode())
            return
        described = self._signatures[message.channel.content, message.stage].tensors
        self._start_sends(message, [one.empty(self._device).zero_() for one in described if one is not None])

    def release(self, message: Message) -> None:
        """Wait until `message` has left; PipelineError if its tensors have changed meanwhile."""
        transfer = self._sending.pop(message)
        self._wait(AwaitSend, message, transfer)
        check_unwritten(transfer.tensors, transfer.versions, "{0.channel.content} for stage {0.stage}, "
                        "micro-batch {0.micro_batch},", message)

    def post(self, message: Message) -> None:
        """Offer a buffer for `message`.

        In an announced batch its size isn't known before it is sent. On a GPU this waits until then: the host runs
        ahead, and the sender may need the buffer to go on. On a CPU, where the wait would cost time, `receive` does.
        """
        if not self._announced:
            transfer = self._receiving[message] = _Transfer()
            transfer.signature = self._signatures[message.channel.content, message.stage]
            self._start_receives(message, transfer)
        elif get_accelerator().is_synchronized_device():
            self._receiving[message] = _Transfer()
            self._noted[communicator_of(message.channel)].append(message)
        else:
            # There already is a transfer if this was called before, and there was no memory for the buffers.
            self._start_announced(message, self._receiving.setdefault(message, _Transfer()))

    def receive(self, message: Message) -> Payload:
        """Wait for `message`; its tensors are leaves that require a gradient where the sender's did.

        Raises Withdrawn if nothing was sent. After any other error but PeerLost it may be called again: what has come
        meanwhile isn't forgotten.
        """
        transfer = self._receiving[message]
        while not transfer.is_posted:
            noted = self._noted[communicator_of(message.channel)]
            self._start_announced(noted[0], self._receiving[noted[0]])
            noted.popleft()
        del self._receiving[message]
        self._wait(AwaitReceive, message, transfer)
        assert transfer.signature is not None
        if self._announced and transfer.signature == _NOTHING:
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

    def awaited_by_device(self) -> _Await | None:
        """The first wait that a device which runs behind the host hasn't got past, if any. In any thread."""
        return self._device_waits.first() if self._device_waits is not None else None

    def works_into(self, message: Message) -> list[Any]:
        """What `receive` is going to wait for, once `message` is posted; others may be put in its place."""
        return self._receiving[message].works

    def discard(self, message: Message) -> None:
        """Take `message` in or let it leave, if that isn't done yet, and forget it."""
        if message in self._sending:
            self._wait(AwaitSend, message, self._sending.pop(message))
        if message in self._receiving:
            with suppress(Withdrawn):
                self.receive(message)

    def _wait(self, kind: type[_Await], message: Message, transfer: _Transfer) -> None:
        transfer.wait(message.channel.source if kind is AwaitReceive else message.channel.target)
        if self._device_waits is not None:
            self._device_waits.put(kind(message))

    def _start_sends(self, message: Message, tensors: Sequence[Tensor], header: Sequence[int] | None = None) -> None:
        """Start to send `tensors`, which lie as they travel, behind the `header` if there is one."""
        transfer = self._sending[message] = _Transfer(tensors=list(tensors), versions=versions(tensors))
        group, _, target = self._ends[message.channel]
        if header is not None:
            transfer.header = torch.tensor([*header, *[0] * (HEADER_SIZE - len(header))])
            with _Losing(message.channel.target):
                transfer.works.append(self._headers.send([transfer.header], message.channel.target, 0))
        _start(transfer, group.send, tensors, target, message.channel.target)

    def _start_announced(self, message: Message, transfer: _Transfer) -> None:
        """Read the header of `message`, the next in its direction, unless that is done, and offer buffers."""
        if transfer.signature is None:
            transfer.signature = self._read_header(message.channel)
            if transfer.signature != _NOTHING:
                self._signatures[message.channel.content, message.stage] = transfer.signature
        self._start_receives(message, transfer)

    def _read_header(self, channel: Channel) -> Signature:
        header = torch.empty(HEADER_SIZE, dtype=torch.int64)
        with _Losing(channel.source):
            self._headers.recv([header], channel.source, 0).wait()
        try:
            return Signature.decode(header.tolist())
        except ValueError as error:
            raise PeerLost(f"pipeline rank {channel.source} is out of step: it sent something else where a "
                           f"message's header was expected ({error})") from error

    def _start_receives(self, message: Message, transfer: _Transfer) -> None:
        """Offer buffers for all tensors of `message`, or for none where there is no memory."""
        assert transfer.signature is not None
        tensors = [None if described is None else described.empty(self._device)
                   for described in transfer.signature.tensors]
        transfer.tensors, transfer.is_posted = tensors, True
        group, source, _ = self._ends[message.channel]
        _start(transfer, group.recv, tensors, source, message.channel.source)


def _start(transfer: _Transfer, start: Callable[..., Any], tensors: Sequence[Tensor | None], place: int,
           peer: int) -> None:
    """Start to send or receive those of `tensors` that aren't empty; `start` is a group's send or recv."""
    try:
        with _Losing(peer):
            for tensor in tensors:
                if tensor is not None and tensor.numel():
                    transfer.works.append(start([carried(tensor)], place, 0))
    except RuntimeError as error:
        if not transfer.works:
            raise
        raise PeerLost(f"a message between this rank and pipeline rank {peer} stopped half way: {error}") from error
