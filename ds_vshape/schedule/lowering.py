"""Lowering: from a schedule to each rank's program, communication included.

Where to put sends and receives decides between a pipeline that overlaps and one that hangs. Everything here follows
one simulated order of the whole pipeline, so both ends of a channel see its messages in the same sequence:

    sender      ... [F0.3] send ........................ release ...
    receiver    ... post [B7.1] ... [F1.2] ... await [F1.3] ...

    send        at once after the pass that made the message; nothing waits for it
    post        the receive is posted a pass before the sender starts to make the message, so its buffer is there early;
                but within bounds that a synchronization of the device demands
    await       right before the pass that needs it
    release     the send is waited for when its receiver has long used it, so that its memory is given back
    offload     the copy to the host starts after its F and what that sends; O waits for its end
    reload      the copy back starts at R, and is waited for right before the pass that needs it
    share       the loss goes to all ranks; each takes part when the last micro-batch's loss has been computed, so that
                no pass of a rank whose device is synchronized keeps the others from it

A rank that synchronizes its device inside a pass (an allocator that is short of memory does, and so does the first
launch of a kernel) waits for all messages that it has posted. It gets them only if none of them depends on that pass:

    not too early   after the last own pass that the message depends on; else a synchronization of the receiver waits
                    for a message that waits for it. Such a pass has sent something straight to the message's sender,
                    or on a ring of ranks something that can have come the other way around by then
    not too late    before the first own pass that depends on a pass which the sender starts after it has sent; else a
                    synchronization of the sender waits for a post that waits for it. None does that starts before the
                    message's maker

Where messages are announced, their sizes aren't known before they are made, and a post waits on the host until its
message is sent. It stands before the first pass that starts when the message has been sent (`Lowering.announced`). So a
pass waits only for what was started before it, even if all passes of all ranks synchronize their devices: for the
posts of what its rank has sent, which stand after passes that started before this one; for makers of what its rank has
posted, which ended before it.
"""

from __future__ import annotations

import bisect
import enum
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Self

from ds_vshape.schedule.moments import Moment, Moments
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.repeated import Repeated, later
from ds_vshape.schedule.schedule import Order, Schedule, Variants, dependencies, variants
from ds_vshape.schedule.timeline import Times


class Content(str, enum.Enum):
    """What a message carries: a stage's input from the stage before, or its output gradient from the stage after."""

    ACTIVATION = "activation"
    GRADIENT = "gradient"

    # Enum's own is a function in Python.
    __hash__ = str.__hash__

    def __str__(self) -> str:
        return self.value

    @classmethod
    def into(cls, action: Pass) -> Content:
        """What F and B take from another stage."""
        return cls.ACTIVATION if action.kind is Kind.F else cls.GRADIENT

    @property
    def kind(self) -> Kind:
        """The kind of pass that takes it: F, or B (whole or split)."""
        return Kind.F if self is Content.ACTIVATION else Kind.B


# A plan looks channels and messages up some times for each pass: as tuples they hash and compare in C.
class Channel(NamedTuple):
    """One direction between two ranks for one kind of content; it delivers in order."""

    source: int
    target: int
    content: Content

    def __str__(self) -> str:
        return f"{self.content} {self.source}->{self.target}"


class Message(NamedTuple):
    """What `stage` receives for `micro_batch`."""

    channel: Channel
    stage: int
    micro_batch: int

    def later(self, micro_batches: int) -> Message:
        """The same for a later micro-batch."""
        return Message(self.channel, self.stage, self.micro_batch + micro_batches)

    @property
    def taker(self) -> Pass:
        """The pass that it goes into; B for a whole backward too."""
        return Pass(self.channel.content.kind, self.stage, self.micro_batch)

    @property
    def maker(self) -> Pass:
        """The pass that makes it; B for a whole backward too."""
        return Pass(self.channel.content.kind, self.stage + (1 if self.channel.content is Content.GRADIENT else -1),
                    self.micro_batch)

    def __repr__(self) -> str:
        channel = self.channel
        return f"{channel.content} of {self.stage}.{self.micro_batch} ({channel.source}->{channel.target})"


@dataclass(frozen=True)
class Load:
    """Take the next micro-batch from the data: the inputs where stage 0 is, the labels where the last stage is."""

    micro_batch: int

    def later(self, micro_batches: int) -> Load:
        """The same for a later micro-batch, as all steps have it."""
        return Load(self.micro_batch + micro_batches)


@dataclass(frozen=True)
class Run:
    """Compute a pass."""

    action: Pass

    def later(self, micro_batches: int) -> Run:
        return Run(self.action.later(micro_batches))


@dataclass(frozen=True)
class MessageStep:
    """A step of communication."""

    message: Message

    def later(self, micro_batches: int) -> Self:
        return type(self)(self.message.later(micro_batches))


class PostReceive(MessageStep):
    """Offer a buffer for the message; doesn't wait."""


class AwaitReceive(MessageStep):
    """Wait until the message is there."""


class Send(MessageStep):
    """Start to send the message; doesn't wait."""


class AwaitSend(MessageStep):
    """Wait until the message has left, and let go of its memory."""


@dataclass(frozen=True)
class ShareLoss:
    """Start to tell all ranks the loss of the batch; doesn't wait."""

    def later(self, micro_batches: int) -> ShareLoss:
        return self


@dataclass(frozen=True)
class CopyStep:
    """A step of a copy to the host or back; `action` is its O or R."""

    action: Pass

    def later(self, micro_batches: int) -> Self:
        return type(self)(self.action.later(micro_batches))


class Offload(CopyStep):
    """Start the copy to the host that the O `action` waits for; doesn't wait."""


class AwaitOffload(CopyStep):
    """Run an O: wait until the copy is on the host, and free what was copied."""


class Reload(CopyStep):
    """Run an R: take memory, and start the copy back; doesn't wait."""


class AwaitReload(CopyStep):
    """Wait until what the R `action` has started is back."""


Step = Load | Run | MessageStep | CopyStep | ShareLoss
# A tuple, or a Repeated where the schedule is for many micro-batches.
Program = Sequence[Step]

# The steps of a rank: for each of its passes those before it, itself, and those after it; then what is left.
_Groups = list[list[Step]]


def channels(placement: Placement) -> list[Channel]:
    """Every channel that the placement needs, in an order that is the same on all ranks."""
    hops = {(placement.rank_of(stage), placement.rank_of(stage + 1)) for stage in range(placement.last_stage)}
    found = set()
    for source, target in hops:
        if source != target:
            found |= {Channel(source, target, Content.ACTIVATION), Channel(target, source, Content.GRADIENT)}
    return sorted(found)


def message_into(action: Pass, placement: Placement) -> Message | None:
    """What `action` receives from another rank, if anything: F an activation, B and BW an output gradient."""
    neighbour = action.stage - 1 if action.kind is Kind.F else action.stage + 1
    if not (action.kind is Kind.F or action.kind.gives_input_gradient) or not 0 <= neighbour <= placement.last_stage:
        return None
    source, target = placement.rank_of(neighbour), placement.rank_of(action.stage)
    if source == target:
        return None
    return Message(Channel(source, target, Content.into(action)), action.stage, action.micro_batch)


class Transfer(NamedTuple):
    """A message with the places of the pass that makes it and the pass that needs it, each in its rank's order."""

    message: Message
    made_at: int
    needed_at: int


class Lowering:
    """The programs of `schedule`, of all ranks or some; where the middle of all orders repeats, so does that of them.

    `times` decide only how early a receive is posted and how late a send is released: whatever they are, the
    programs are right. All ranks must lower with the same ones. Methods raise ScheduleError if the schedule can't run.

    What a rank does depends on when passes run, on which all ranks decide by the same simulation, and on the orders of
    its own and of those that it has messages with.
    """

    def __init__(self, schedule: Schedule, times: Times) -> None:
        self._schedule, self._times = schedule, times
        self._moments: dict[int, Moments] = {}

    def moments(self, repeats: int) -> Moments:
        """Those of the schedule with its middle so many times."""
        if repeats not in self._moments:
            self._moments[repeats] = Moments(self._schedule.with_repeats(repeats), self._times)
        return self._moments[repeats]

    def programs(self, ranks: Sequence[int] | None = None) -> tuple[Program, ...]:
        """Those of `ranks` (None: of all), for batches in which the sizes of messages are known."""
        return self._repeating(ranks, _lowered)

    def announced(self, ranks: Sequence[int] | None = None) -> tuple[Program, ...]:
        """As `programs`, for a batch in which messages are announced: with the posts where they wait for nothing that
        comes later."""
        return self._repeating(ranks, _lowered_announced)

    def _repeating(self, ranks: Sequence[int] | None,
                   lowered: Callable[[Moments, Sequence[int]], Sequence[_Groups]]) -> tuple[Program, ...]:
        """The programs, lowered with the schedule's middle as few times as show how they go on: until the last of these
        times has the steps of the one before, on all ranks.
        """
        schedule, times = self._schedule, 1
        chosen = range(schedule.placement.ranks) if ranks is None else ranks
        while True:
            every = lowered(self.moments(times), chosen)
            if times == schedule.repeats:
                return tuple(tuple(_flat(groups)) for groups in every)
            # The programs of all ranks show by themselves whether all ranks repeat what they do.
            if len(chosen) == schedule.placement.ranks or self.moments(times).period is not None:
                programs = [_repeated(groups, schedule.orders[rank], times) for groups, rank in zip(every, chosen)]
                found = tuple(program for program in programs if program is not None)
                if len(found) == len(programs):
                    return found
            times = min(2 * times, schedule.repeats)


def lower(schedule: Schedule, times: Times) -> tuple[Program, ...]:
    """`Lowering.programs` of all ranks."""
    return Lowering(schedule, times).programs()


def _repeated(groups: _Groups, order: Order, times: int) -> Program | None:
    """The program of `order`, lowered with the order's body so many `times`; None if its steps don't repeat."""
    assert isinstance(order, Repeated)
    end, length = len(order.head) + times * len(order.body), len(order.body)
    start, before = end - length, end - 2 * length
    body = _flat(groups[start:end])
    if before < 0 or body != list(later(_flat(groups[before:start]), order.interval)) or not _is_even(body):
        return None
    return Repeated(_flat(groups[:start]), body, _flat(groups[end:]), order.times - times + 1, order.interval)


def _is_even(body: Sequence[Step]) -> bool:
    """Whether as many messages are waited for as are started, on each channel: else what is left grows with each
    repeat, as where a message takes longer than all passes."""
    left: Counter[tuple[bool, Channel]] = Counter()
    for step in body:
        if isinstance(step, (Send, AwaitSend, PostReceive, AwaitReceive)):
            left[isinstance(step, (Send, AwaitSend)), step.message.channel] += (
                1 if isinstance(step, (Send, PostReceive)) else -1)
    return not any(left.values())


def _lowered(moments: Moments, ranks: Sequence[int]) -> Sequence[_Groups]:
    schedule = moments.schedule
    transfers = list(_transfers(schedule, ranks))
    needs, around = DirectNeeds(transfers), detour(schedule.placement)

    def ahead(transfer: Transfer) -> int:
        message, made_at, _ = transfer
        source, target = message.channel.source, message.channel.target
        starts, begun = moments.starts(target), moments.starts(source)[made_at]
        earliest = needs.last_before(source, made_at, target) + 1
        place = bisect.bisect_right(starts, begun) - 2
        while place > earliest and schedule.orders[target][place].kind.is_copy:
            place -= 1
        place = max(place, earliest)
        # By equal times each of the passes on a detour takes 1 at least.
        while place < len(starts) and starts[place][1] + around <= begun[1]:
            place += 1
        return place

    return _groups(moments, ranks, transfers, ahead)


def _lowered_announced(moments: Moments, ranks: Sequence[int]) -> Sequence[_Groups]:

    def once_sent(transfer: Transfer) -> int:
        channel = transfer.message.channel
        return bisect.bisect_left(moments.starts(channel.target), moments.ends(channel.source)[transfer.made_at])

    return _groups(moments, ranks, list(_transfers(moments.schedule, ranks)), once_sent)


def _groups(moments: Moments, ranks: Sequence[int], transfers: Sequence[Transfer],
            posted_at: Callable[[Transfer], int]) -> list[_Groups]:
    """The steps of each of `ranks` by its passes; `posted_at` gives the place of the pass before which the receiver
    posts."""
    schedule = moments.schedule
    there = variants(schedule) if schedule.gives_back_memory else {}
    lengths = {rank: len(schedule.orders[rank]) for rank in ranks}
    before: dict[int, _Groups] = {rank: [[] for _ in range(length + 1)] for rank, length in lengths.items()}
    after: dict[int, _Groups] = {rank: [[] for _ in range(length)] for rank, length in lengths.items()}
    # What meets another rank's step, with when that comes. The posts of a channel are in the order of its sends.
    meeting: dict[int, list[list[tuple[Moment, Step]]]] = {
        rank: [[] for _ in range(length + 1)] for rank, length in lengths.items()}
    for transfer in sorted(transfers, key=lambda one: one.made_at):
        message, made_at, needed_at = transfer
        source, target = message.channel.source, message.channel.target
        if source in lengths:
            after[source][made_at].append(Send(message))
            released_at = bisect.bisect_left(moments.starts(source), moments.ends(target)[needed_at])
            before[source][released_at].append(AwaitSend(message))
        if target in lengths:
            meeting[target][posted_at(transfer)].append((moments.ends(source)[made_at], PostReceive(message)))
            before[target][needed_at].append(AwaitReceive(message))
    of_loss = schedule.placement.rank_of(schedule.placement.last_stage)
    known_at = max(place for place, action in enumerate(schedule.orders[of_loss])
                   if action.kind is Kind.F and action.stage == schedule.placement.last_stage)
    known = moments.ends(of_loss)[known_at]
    for rank in ranks:
        place = known_at + 1 if rank == of_loss else bisect.bisect_left(moments.starts(rank), known)
        meeting[rank][place].append((known, ShareLoss()))

    def met(rank: int, place: int) -> list[Step]:
        return [step for _, step in sorted(meeting[rank][place], key=lambda entry: entry[0])]

    every = []
    for rank in ranks:
        groups = []
        for place, action in enumerate(schedule.orders[rank]):
            steps = [*met(rank, place), *before[rank][place]]
            if action.kind is Kind.F and _loads(action, schedule.placement):
                steps.append(Load(action.micro_batch))
            steps += _ran(action, there)
            groups.append(steps + after[rank][place] + _offloads(action, there))
        every.append([*groups, [*met(rank, lengths[rank]), *before[rank][lengths[rank]]]])
    return every


def _ran(action: Pass, there: Variants) -> list[Step]:
    """The steps that run `action`: a pass once its reload has ended, or one end of a copy."""
    if action.kind is Kind.O:
        return [AwaitOffload(action)]
    if action.kind is Kind.R:
        return [Reload(action)]
    # The reload is among a pass's dependencies where that is the first to need it.
    reloads = [need for need in dependencies(action, action.stage, there) if need.kind is Kind.R] if there else []
    return [*map(AwaitReload, reloads), Run(action)]


def _offloads(action: Pass, there: Variants) -> list[Step]:
    """The start of the copy of what an F leaves, where there is one."""
    offload = there.get((Kind.O, action.stage, action.micro_batch)) if action.kind is Kind.F else None
    return [Offload(offload)] if offload else []


def _flat(groups: _Groups) -> list[Step]:
    return [step for steps in groups for step in steps]


class DirectNeeds:
    """Of which passes of another rank the passes of a rank need messages.

    Args:
        transfers: all of some ranks, whatever rank is at the other end.
    """

    def __init__(self, transfers: Sequence[Transfer]) -> None:
        taken: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for (channel, _, _), made_at, needed_at in transfers:
            taken[channel.target, channel.source].append((needed_at, made_at))
        # By rank and sender: the places that need messages, and the last place that has made one by then.
        self._makers: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
        for pair, places in taken.items():
            places.sort()
            self._makers[pair] = [needed for needed, _ in places], list(accumulate((made for _, made in places), max))

    def last_before(self, rank: int, place: int, other: int) -> int:
        """The place of the last pass of `other` from which `rank`, up to the pass at `place`, needs a message; -1 if
        there is none."""
        needed, made = self._makers.get((rank, other), ((), ()))
        count = bisect.bisect_right(needed, place)
        return made[count - 1] if count else -1


def detour(placement: Placement) -> float:
    """How many messages it takes at least from a rank to one that it has messages with, but not on a direct way.

    Where all messages are between neighbours on a line there is no other way, and on a ring the one around it.
    """
    pairs = {(channel.source, channel.target) for channel in channels(placement)}
    if all(abs(source - target) == 1 for source, target in pairs):
        return math.inf
    on_a_ring = all((source - target) % placement.ranks in (1, placement.ranks - 1) for source, target in pairs)
    return placement.ranks - 1 if on_a_ring else 2


def _transfers(schedule: Schedule, ranks: Sequence[int]) -> Iterator[Transfer]:
    """All messages that one of `ranks` sends or receives."""
    placement, own = schedule.placement, set(ranks)
    neighbours = own.union(*((channel.source, channel.target) for channel in channels(placement)
                             if channel.source in own or channel.target in own))
    # Places of the passes that make what each (stage, micro-batch) needs.
    activations: dict[tuple[int, int], int] = {}
    gradients: dict[tuple[int, int], int] = {}
    for rank in neighbours:
        for place, action in enumerate(schedule.orders[rank]):
            if action.kind is Kind.F:
                activations[action.stage + 1, action.micro_batch] = place
            elif action.kind.gives_input_gradient:
                gradients[action.stage - 1, action.micro_batch] = place
    for rank in sorted(neighbours):
        for needed_at, action in enumerate(schedule.orders[rank]):
            message = message_into(action, placement)
            if message is not None and (message.channel.source in own or message.channel.target in own):
                made_at = activations if action.kind is Kind.F else gradients
                yield Transfer(message, made_at[action.stage, action.micro_batch], needed_at)


def _loads(action: Pass, placement: Placement) -> bool:
    """Whether this forward is the first on its rank to need something of the micro-batch's data."""
    if action.stage == 0:
        return True
    return action.stage == placement.last_stage and placement.rank_of(0) != placement.rank_of(action.stage)
