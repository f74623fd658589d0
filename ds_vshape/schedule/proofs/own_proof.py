"""The checker, divided: each rank shows of its own program what, shown by all ranks, proves them all together.

All ranks give each pass x of the schedule the same number t(x): its start in one simulation by equal times. A rank
looks at its own program, at these numbers and at the orders of the ranks that it has messages with. Let a pass a make
the message m and a pass n need it, and let m be posted before pass k of the receiver, behind pass k - 1:

    [1] alone       the program passes `deadlock.Alone`, and runs the passes of its order, where t rises
    [2] sends       a message is sent right after a; a communicator's messages are posted in the order of t(a)
    [3] waits       m is awaited right before n, and t(n) >= t(a) + 1; its sender waits for it before a pass j with
                    t(j) >= t(n) + 1, or at the end; what is posted before a pass stands ahead of what is awaited there
    [4] not late    t(k - 1) <= t(a + 1)
    [5] not early   t(k) >= t(a); or none of what the sender needs of this rank, up to a, is made by k or later, and on
                    a ring of p ranks t(a) < t(k) + p - 1
    [6] the loss    it is shared before the first pass with t(k) >= L, where L - 1 is when its last forward starts

If that holds on all ranks, then all programs run to their end: by [2] both ends of a communicator see one sequence, and
by [3] each step waits only for steps ahead of passes with lower numbers, whether receives start when they are posted or
when they are awaited. So they never wait in a circle.

And any rank may synchronize its device in any pass: what an operation waits for was done by ranks ahead of some pass,
which knows only of passes with lower numbers. By [4] a post knows of none that its sender runs after a. By [5] a send
doesn't know of k: directly it could only through a message that is needed up to a, which is ruled out, or through an
earlier message that was awaited as sent, whose post stands ahead of k by [2]; and around a ring it would take p - 1
messages, each of which raises the number by 1. By [6] nobody knows of a pass that another rank runs after it shares the
loss.

Where the middle repeats, its numbers do too, each repeat a period later. Let w be the most repeats between two places
that are compared for one message. Of 2 w + 2 repeats, all places that are compared for two messages which meet are in
all but the last one, or in all but the first one. So one more repeat adds only what is there already, for earlier
micro-batches; and so on, for any number of repeats.

Not every program that is right has all of this; none with C, O or R has. Then all programs are checked together, by
`synchronization.check_with_synchronization`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ds_vshape.schedule.lowering import (AwaitReceive, AwaitSend, DirectNeeds, Load, Lowering, Message, PostReceive,
                                         Program, Run, Send, ShareLoss, Step, Transfer, detour, message_into)
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.proofs.deadlock import Alone
from ds_vshape.schedule.proofs.rendezvous import DeadlockError
from ds_vshape.schedule.repeated import ComesBack, Repeated, run_through
from ds_vshape.schedule.schedule import Schedule

# The place of a pass: its rank, and its place in the rank's order.
_Place = tuple[int, int]


class NotShown(Exception):
    """A rank's program of which this doesn't show what all of them would prove; the message says what is missing."""


def show(program: Program, rank: int, schedule: Schedule, lowering: Lowering) -> None:
    """Return if `program`, that of `rank` for `schedule` by `lowering`, has what the module asks for; else NotShown."""
    if schedule.gives_back_memory:
        raise NotShown("there are passes of no time")
    alone = Alone(rank, schedule.placement, loading=True)
    try:
        run_through([program], lambda parts: alone.run(parts[0]), ComesBack(alone.state))
        alone.end()
    except DeadlockError as error:
        raise NotShown(str(error)) from error
    if not isinstance(program, Repeated):
        _Walk(rank, _Numbered(schedule, schedule.repeats, 0, lowering)).through(program)
        return
    # The head of the program has all but one of the repeats that it was lowered with.
    more = program.times - 1
    bodies = 2
    while bodies <= more:
        reach = _Walk(rank, _Numbered(schedule, schedule.repeats - more + bodies - 1, bodies, lowering)).through(
            program.repeated(bodies))
        if bodies >= 2 * reach + 2:
            return
        bodies = 2 * reach + 2
    _Walk(rank, _Numbered(schedule, schedule.repeats, 0, lowering)).through(program)


class _Numbered:
    """`schedule` with its middle so many times, with the numbers of its passes.

    `bodies`: the last ones of these repeats, which the program that is looked at repeats.
    """

    def __init__(self, schedule: Schedule, repeats: int, bodies: int, lowering: Lowering) -> None:
        self.schedule, self.bodies = schedule.with_repeats(repeats), bodies
        self._repeats = repeats
        # The fewest with which they get regular, or all of them: the same on all ranks.
        known = 1
        while known < schedule.repeats and lowering.moments(known).period is None:
            known = min(2 * known, schedule.repeats)
        self._known, self._moments = known, lowering.moments(known)
        # From its last but one repeat on the numbers are regular; those of a repeated program must be, in all repeats.
        if known > repeats - max(bodies - 1, 0):
            raise NotShown("the numbers of passes aren't regular")
        self._numbers: dict[int, list[float]] = {}
        self._places: dict[int, dict[tuple[Kind, int, int], int]] = {}

    def numbers(self, rank: int) -> Sequence[float]:
        """Those of a rank's passes, in its order."""
        if rank not in self._numbers:
            found = [tie for _, tie in self._moments.starts(rank)]
            order, more = self.schedule.orders[rank], self._repeats - self._known
            if more:
                assert isinstance(order, Repeated) and self._moments.period is not None
                period, start = self._moments.period[1], len(found) - len(order.tail)
                body, tail = found[start - len(order.body):start], found[start:]
                found = found[:start]
                for time in range(1, more + 1):
                    found += [number + time * period for number in body]
                found += [number + more * period for number in tail]
            self._numbers[rank] = found
        return self._numbers[rank]

    def place(self, action: Pass) -> _Place:
        """That of an F, or of the B or BW of a stage and micro-batch."""
        rank = self.schedule.placement.rank_of(action.stage)
        if rank not in self._places:
            self._places[rank] = {
                (Kind.B if each.kind is Kind.BW else each.kind, each.stage, each.micro_batch): place
                for place, each in enumerate(self.schedule.orders[rank]) if each.kind is not Kind.W}
        return rank, self._places[rank][action.kind, action.stage, action.micro_batch]

    def number(self, place: _Place) -> float:
        """That of the pass there; minus infinity and infinity ahead of a rank's first and behind its last one."""
        numbers = self.numbers(place[0])
        return float("-inf") if place[1] < 0 else numbers[place[1]] if place[1] < len(numbers) else float("inf")

    def repeat(self, place: _Place) -> int:
        """In which of the last repeats a place is, counted from 1; 0 ahead of them, and one more than there are behind
        them. 0 for all places where nothing is repeated."""
        if not self.bodies:
            return 0
        order = self.schedule.orders[place[0]]
        assert isinstance(order, Repeated)
        start = len(order) - len(order.tail) - self.bodies * len(order.body)
        return min(max((place[1] - start) // len(order.body) + 1, 0), self.bodies + 1)


class _Walk:
    """Through one rank's program, step by step."""

    def __init__(self, rank: int, numbered: _Numbered) -> None:
        self._rank, self._numbered, self._placement = rank, numbered, numbered.schedule.placement
        self._order = tuple(numbered.schedule.orders[rank])
        self._detour = detour(self._placement)
        # The next pass; what the last one must still send; what is awaited between them.
        self._next = 0
        self._due: Message | None = None
        self._awaited: list[Message] = []
        self._waits, self._shared = False, False
        # By sender: of the message that was posted last, the places of its maker and of the pass behind the post.
        self._posted: dict[int, tuple[_Place, _Place]] = {}
        self._reach = 0
        last = Pass(Kind.F, self._placement.last_stage, numbered.schedule.micro_batches - 1)
        self._loss = numbered.place(last)
        self._needs = DirectNeeds([*self._sent()])

    def through(self, program: Sequence[Step]) -> int:
        """Look at all steps; over how many repeats the messages reach. NotShown where something is missing."""
        for step in program:
            self._look(step)
        self._expect(self._due is None, "a message isn't sent")
        self._expect(self._next == len(self._order) and self._shared, "passes are missing, or the loss isn't shared")
        return self._reach

    def _look(self, step: Step) -> None:
        if isinstance(step, Send):
            self._expect(step.message == self._due, f"{step} doesn't follow the pass that makes it")
            self._due = None
            return
        self._expect(self._due is None, f"{self._due} isn't sent at once")
        if isinstance(step, Run):
            self._run(step.action)
        elif isinstance(step, PostReceive):
            self._post(step.message)
        elif isinstance(step, AwaitReceive):
            self._waits = True
            self._awaited.append(step.message)
        elif isinstance(step, AwaitSend):
            self._release(step.message)
        elif isinstance(step, ShareLoss):
            self._share()
        else:
            self._expect(isinstance(step, Load), f"there is {step}")

    def _run(self, action: Pass) -> None:
        place = self._next
        self._expect(place < len(self._order) and self._order[place] == action, f"{action} isn't the next pass")
        self._expect(self._t(place - 1) < self._t(place), f"{action} has no higher number than the pass before it")
        message = message_into(action, self._placement)
        self._expect(self._awaited == ([] if message is None else [message]), f"{action} has other messages before it")
        if message is not None:
            maker = self._numbered.place(message.maker)
            self._expect(self._t(place) >= self._numbered.number(maker) + 1, f"{action} comes too early for {message}")
            self._take(maker, (self._rank, place))
        self._next += 1
        self._due, self._awaited, self._waits = _made_by(action, self._placement), [], False

    def _post(self, message: Message) -> None:
        place, maker = self._next, self._numbered.place(message.maker)
        self._expect(not self._waits, f"{message} is posted behind what is awaited")
        begun = self._numbered.number(maker)
        before = self._posted.get(message.channel.source)
        self._expect(before is None or self._numbered.number(before[0]) < begun, f"{message} isn't posted in turn")
        follower = maker[0], maker[1] + 1
        self._expect(self._t(place - 1) <= self._numbered.number(follower), f"{message} is posted late")
        if self._t(place) < begun:
            last_needed = self._needs.last_before(*maker, self._rank)
            self._expect(last_needed < place and begun < self._t(place) + self._detour,
                         f"{message} is posted early")
        self._take(maker, follower, *self._around(place), *(before or ()))
        self._posted[message.channel.source] = maker, (self._rank, place)

    def _release(self, message: Message) -> None:
        place, taker = self._next, self._numbered.place(message.taker)
        self._waits = True
        self._expect(self._t(place) >= self._numbered.number(taker) + 1, f"the send of {message} is awaited early")
        self._take(taker, self._numbered.place(message.maker), *self._around(place))

    def _share(self) -> None:
        known = self._numbered.number(self._loss) + 1
        self._expect(not self._shared and not self._waits and self._t(self._next - 1) < known <= self._t(self._next),
                     "the loss isn't shared when it is known")
        # It must come as late, whatever is repeated.
        self._expect(all(self._numbered.repeat(each) > 1 for each in (self._loss, *self._around(self._next))
                         if self._numbered.bodies), "the loss is known before the middle repeats")
        self._shared = True

    def _sent(self) -> Iterator[Transfer]:
        """What this rank sends."""
        for made_at, action in enumerate(self._order):
            message = _made_by(action, self._placement)
            if message is not None:
                yield Transfer(message, made_at, self._numbered.place(message.taker)[1])

    def _t(self, place: int) -> float:
        return self._numbered.number((self._rank, place))

    def _around(self, place: int) -> Iterator[_Place]:
        """The passes between which a step ahead of `place` stands, as far as there are any."""
        return ((self._rank, each) for each in (place - 1, place) if 0 <= each < len(self._order))

    def _take(self, *places: _Place) -> None:
        """Take note that something is said of these together."""
        repeats = [self._numbered.repeat(each) for each in places]
        self._reach = max(self._reach, max(repeats) - min(repeats))

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise NotShown(f"rank {self._rank}: {otherwise}")


def _made_by(action: Pass, placement: Placement) -> Message | None:
    """What `action` sends to another rank, if anything."""
    if action.kind is Kind.F and action.stage < placement.last_stage:
        return message_into(Pass(Kind.F, action.stage + 1, action.micro_batch), placement)
    if action.kind.gives_input_gradient and action.stage:
        return message_into(Pass(Kind.B, action.stage - 1, action.micro_batch), placement)
    return None
