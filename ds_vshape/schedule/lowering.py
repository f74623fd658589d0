"""Lowering: from a schedule to each rank's program, communication included.

Where to put sends and receives decides between a pipeline that overlaps and one that hangs. Everything here follows
one simulated order of the whole pipeline, so both ends of a channel see its messages in the same sequence:

    sender      ... [F0.3] send ........................ release ...
    receiver    ... post [B7.1] ... [F1.2] ... await [F1.3] ...

    send        at once after the pass that made the message; nothing waits for it
    post        the receive is posted a pass before the sender starts to make the message, so its buffer is there early
    await       right before the pass that needs it
    release     the send is waited for when its receiver has long used it, so that its memory is given back
"""

from __future__ import annotations

import bisect
import enum
from collections.abc import Iterator
from dataclasses import dataclass

from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule, dependencies, whole_backwards
from ds_vshape.schedule.timeline import Span, Times, simulate


class Content(str, enum.Enum):
    """What a message carries: a stage's input from the stage before, or its output gradient from the stage after."""

    ACTIVATION = "activation"
    GRADIENT = "gradient"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, order=True)
class Channel:
    """One direction between two ranks for one kind of content; it delivers in order."""

    source: int
    target: int
    content: Content

    def __str__(self) -> str:
        return f"{self.content} {self.source}->{self.target}"


@dataclass(frozen=True)
class Message:
    """What `stage` receives for `micro_batch`."""

    channel: Channel
    stage: int
    micro_batch: int

    def __repr__(self) -> str:
        return f"{self.channel.content} of {self.stage}.{self.micro_batch} ({self.channel.source}->{self.channel.target})"


@dataclass(frozen=True)
class Load:
    """Take the next micro-batch from the data: the inputs where stage 0 is, the labels where the last stage is."""

    micro_batch: int


@dataclass(frozen=True)
class Run:
    """Compute a pass; `split` tells whether its micro-batch's backward on this stage comes as B and W."""

    work: Pass
    split: bool


@dataclass(frozen=True)
class PostReceive:
    """Offer a buffer for the message; doesn't wait."""

    message: Message


@dataclass(frozen=True)
class AwaitReceive:
    """Wait until the message is there."""

    message: Message


@dataclass(frozen=True)
class Send:
    """Start to send the message; doesn't wait."""

    message: Message


@dataclass(frozen=True)
class AwaitSend:
    """Wait until the message has left, and let go of its memory."""

    message: Message


Step = Load | Run | PostReceive | AwaitReceive | Send | AwaitSend
Program = tuple[Step, ...]


def channels(placement: Placement) -> list[Channel]:
    """Every channel that the placement needs, in an order that is the same on all ranks."""
    hops = {(placement.rank_of(stage), placement.rank_of(stage + 1)) for stage in range(placement.last_stage)}
    found = set()
    for source, target in hops:
        if source != target:
            found |= {Channel(source, target, Content.ACTIVATION), Channel(target, source, Content.GRADIENT)}
    return sorted(found)


def message_into(work: Pass, placement: Placement) -> Message | None:
    """What `work` receives from another rank, if anything: F an activation, B and BW an output gradient."""
    neighbour = work.stage - 1 if work.kind is Kind.F else work.stage + 1
    if work.kind is Kind.W or not 0 <= neighbour <= placement.last_stage:
        return None
    source, target = placement.rank_of(neighbour), placement.rank_of(work.stage)
    content = Content.ACTIVATION if work.kind is Kind.F else Content.GRADIENT
    return None if source == target else Message(Channel(source, target, content), work.stage, work.micro_batch)


@dataclass(frozen=True)
class _Transfer:
    """A message with the pass that makes it and the pass that needs it, as places in their ranks' orders."""

    message: Message
    made_at: int
    made: Span
    needed_at: int
    needed: Span


def lower(schedule: Schedule, times: Times) -> tuple[Program, ...]:
    """The programs of all ranks.

    `times` decide only how early a receive is posted and how late a send is released: whatever they are, the
    programs are right. Raises ScheduleError if the schedule can't run.
    """
    timeline = simulate(schedule, times)
    starts = [[span.start for span in spans] for spans in timeline.ranks]
    before: list[list[list[Step]]] = [[[] for _ in range(len(order) + 1)] for order in schedule.orders]
    after: list[list[list[Step]]] = [[[] for _ in order] for order in schedule.orders]
    posts: list[list[list[Step]]] = [[[] for _ in order] for order in schedule.orders]
    for transfer in _transfers(schedule, timeline.ranks):
        message = transfer.message
        source, target = message.channel.source, message.channel.target
        after[source][transfer.made_at].append(Send(message))
        running = bisect.bisect_right(starts[target], transfer.made.start) - 1
        posts[target][min(max(running - 1, 0), transfer.needed_at)].append(PostReceive(message))
        before[target][transfer.needed_at].append(AwaitReceive(message))
        before[source][max(bisect.bisect_left(starts[source], transfer.needed.end), transfer.made_at + 1)].append(
            AwaitSend(message))
    split = {(work.stage, work.micro_batch) for _, work in schedule.passes() if work.kind is Kind.W}
    programs = []
    for rank, order in enumerate(schedule.orders):
        steps: list[Step] = []
        for place, work in enumerate(order):
            steps += posts[rank][place]
            steps += before[rank][place]
            if work.kind is Kind.F and _loads(work, schedule.placement):
                steps.append(Load(work.micro_batch))
            steps.append(Run(work, split=(work.stage, work.micro_batch) in split))
            steps += after[rank][place]
        programs.append(tuple(steps + before[rank][len(order)]))
    return tuple(programs)


def _transfers(schedule: Schedule, ranks: tuple[tuple[Span, ...], ...]) -> Iterator[_Transfer]:
    """All messages, each sender's in the order in which it makes them."""
    placement, whole = schedule.placement, whole_backwards(schedule)
    where = {span.work: (place, span) for spans in ranks for place, span in enumerate(spans)}
    transfers = []
    for work, (needed_at, needed) in where.items():
        message = message_into(work, placement)
        if message is not None:
            made_at, made = where[dependencies(work, placement.last_stage, whole)[-1]]
            transfers.append(_Transfer(message, made_at, made, needed_at, needed))
    return iter(sorted(transfers, key=lambda transfer: (transfer.message.channel, transfer.made_at)))


def _loads(work: Pass, placement: Placement) -> bool:
    """Whether this forward is the first on its rank to need something of the micro-batch's data."""
    if work.stage == 0:
        return True
    return work.stage == placement.last_stage and placement.rank_of(0) != placement.rank_of(work.stage)
