"""The checker: shows that a set of programs is free of deadlock before any process runs it.

Two rules of the libraries below us can turn a plausible program into one that hangs:

    rendezvous   a send completes only once its receive is posted (gloo, and NCCL beyond its buffers)
    in order     on one communicator a rank's operations run in the order of posting, one after the other (NCCL)

and one of our own runtime: while shapes are announced, a receive isn't posted before it is waited for.

`check` runs the programs against a rule without times: an operation completes as soon as the rule lets it. Whether
one more operation can complete never depends on the order of the others, so what is stuck here is stuck on every
real run, and what runs to its end here does so on every real run.
"""

from __future__ import annotations

import enum
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence

from ds_vshape.schedule.lowering import (AwaitReceive, AwaitSend, Channel, Message, PostReceive, Program, Run, Send, Step,
                                         message_into)
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import dependencies


class Rule(enum.Enum):
    """What holds back an operation whose partner is posted."""

    RENDEZVOUS = "rendezvous"
    IN_ORDER = "in order on each communicator"
    LATE_RECEIVES = "receives posted only when waited for"


class DeadlockError(RuntimeError):
    """The programs can't run to their end; the message names each waiting rank and its step."""


def check(programs: Sequence[Program], placement: Placement,
          communicator: Callable[[Channel], Hashable] = lambda channel: channel) -> None:
    """Raise DeadlockError unless `programs` run to their end under each Rule and every pass finds its input.

    `communicator` tells which channels share one; the runtime gives each channel its own.
    """
    for rule in Rule:
        _Run(programs, placement, rule, communicator).to_the_end()


class _Run:
    """One run of the programs under one rule."""

    def __init__(self, programs: Sequence[Program], placement: Placement, rule: Rule,
                 communicator: Callable[[Channel], Hashable]) -> None:
        self._programs, self._placement, self._rule = programs, placement, rule
        self._communicator = communicator
        self._place = [0] * len(programs)
        self._sent: dict[Channel, list[Message]] = defaultdict(list)
        self._posted: dict[Channel, list[Message]] = defaultdict(list)
        self._noted: dict[Channel, deque[PostReceive]] = defaultdict(deque)
        self._started: set[tuple[type[Step], Message]] = set()
        self._matched: dict[Channel, int] = defaultdict(int)
        # For each (rank, communicator) the channels of the operations that aren't complete, in the order of posting.
        self._queues: dict[tuple[int, Hashable], deque[Channel]] = defaultdict(deque)
        self._complete: set[Message] = set()
        self._awaited: set[tuple[type[Step], Message]] = set()
        self._done: set[Pass] = set()

    def to_the_end(self) -> None:
        while any([self._advance(rank) for rank in range(len(self._programs))]):
            pass
        stuck = [f"rank {rank} at {program[place]}" for rank, (program, place) in
                 enumerate(zip(self._programs, self._place)) if place < len(program)]
        if stuck:
            raise DeadlockError(f"deadlock ({self._rule.value}): " + "; ".join(stuck))
        for channel in self._sent.keys() | self._posted.keys():
            if len(self._sent[channel]) != len(self._posted[channel]):
                raise DeadlockError(f"channel {channel}: {len(self._sent[channel])} messages are sent "
                                    f"and {len(self._posted[channel])} received")
            for message in self._sent[channel]:
                if (AwaitSend, message) not in self._awaited:
                    raise DeadlockError(f"nobody waits for the send of {message}")

    def _advance(self, rank: int) -> bool:
        """Run `rank` as far as it goes; whether it went anywhere."""
        program, before = self._programs[rank], self._place[rank]
        while self._place[rank] < len(program) and self._step(rank, program[self._place[rank]]):
            self._place[rank] += 1
        return self._place[rank] > before

    def _step(self, rank: int, step: Step) -> bool:
        """Do `step`, or return False if it has to wait."""
        if isinstance(step, Send):
            self._start(rank, step.message.channel.source, step, self._sent)
        elif isinstance(step, PostReceive):
            self._noted[step.message.channel].append(step)
            if self._rule is not Rule.LATE_RECEIVES:
                self._start_noted(rank, step.message)
        elif isinstance(step, (AwaitSend, AwaitReceive)):
            if isinstance(step, AwaitReceive):
                self._start_noted(rank, step.message)
            if (Send if isinstance(step, AwaitSend) else PostReceive, step.message) not in self._started:
                raise DeadlockError(f"rank {rank} waits for {step.message} before it started it")
            if step.message not in self._complete:
                return False
            self._awaited.add((type(step), step.message))
        elif isinstance(step, Run):
            self._run(rank, step.work)
        return True

    def _start_noted(self, rank: int, message: Message) -> None:
        """Start the channel's receives that stand up to `message`."""
        noted = self._noted[message.channel]
        while PostReceive(message) in noted:
            step = noted.popleft()
            self._start(rank, step.message.channel.target, step, self._posted)

    def _start(self, rank: int, end: int, step: Send | PostReceive, started: dict[Channel, list[Message]]) -> None:
        message, channel = step.message, step.message.channel
        if rank != end:
            raise DeadlockError(f"rank {rank} is at the wrong end of {message}")
        self._queues[rank, self._communicator(channel)].append(channel)
        started[channel].append(message)
        self._started.add((type(step), message))
        self._match(channel)

    def _match(self, first: Channel) -> None:
        """Complete the next operation of `first` if the rule lets it, and what that sets free."""
        candidates = [first]
        while candidates:
            channel = candidates.pop()
            number = self._matched[channel]
            if number >= min(len(self._sent[channel]), len(self._posted[channel])):
                continue
            sent, posted = self._sent[channel][number], self._posted[channel][number]
            if sent != posted:
                raise DeadlockError(f"channel {channel}: message {number} is sent as {sent} and received as {posted}")
            queues = [self._queues[rank, self._communicator(channel)] for rank in (channel.source, channel.target)]
            if self._rule is Rule.IN_ORDER and any(queue[0] != channel for queue in queues):
                continue
            for queue in queues:
                queue.remove(channel)
            self._complete.add(sent)
            self._matched[channel] += 1
            candidates += [queue[0] for queue in queues if queue]

    def _run(self, rank: int, work: Pass) -> None:
        """The pass must find its input: received and awaited, or made on this rank."""
        message = message_into(work, self._placement)
        if message is not None and (AwaitReceive, message) not in self._awaited:
            raise DeadlockError(f"rank {rank} runs {work} without having waited for {message}")
        for need in dependencies(work, self._placement.last_stage, frozenset()):
            whole = Pass(Kind.BW, need.stage, need.micro_batch) if need.kind is Kind.B else need
            if self._placement.rank_of(need.stage) == rank and not {need, whole} & self._done:
                raise DeadlockError(f"rank {rank} runs {work} before {need}")
        self._done.add(work)
