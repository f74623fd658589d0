"""The checker: shows that a set of programs is free of deadlock before any process runs it.

Two rules of the libraries below us can turn a plausible program into one that hangs:

    rendezvous   a send completes only once its receive is started (gloo, and NCCL beyond its buffers)
    in order     on one communicator a rank's operations complete in the order of their start (NCCL)

and one of our own runtime: while shapes are announced, on a CPU a receive isn't started when it is posted, but when it,
or one that was posted after it on its communicator, is waited for. (On a GPU the post itself waits until its message is
sent; `Lowering.announced` puts it where that has happened.)

`check` looks in three steps:

    [1] each program alone     a pass has its input, and runs once; what is started is waited for, and nothing else; a
                               message is made before it is sent and taken after it has come; a micro-batch is loaded
                               once, before it is needed; what is offloaded or forgotten is back before the backward
    [2] each communicator      both ends see the same messages in the same sequence, each once
    [3] all programs together  they run to their end, without times: an operation completes as soon as both rules let it
                               (`rendezvous`)

Starting one more operation never keeps another from completing, so the order in which [3] tries the ranks doesn't
matter: what is stuck here is stuck on every real run, and what runs to its end here does so on every real run.
What passes under both rules also passes where only the first one binds.

Copies to the host and back can't be stuck, so [3] leaves them out: a rank's engine copies in the order of their starts,
and [1] shows that a copy starts after the F that made its data has run, and one back after its O has waited for the
end of the copy to the host. So none waits for anything but what this rank has started before.

What repeats is looked at until the state comes back (`repeated.run_through`): what is in flight, and what each rank has
done and still waits for, all but for the number of the micro-batch. In [3] that includes the steps that a rank can't do
yet: where ranks are of very unequal speed, one may wait for what another does in a later repeat.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence

from ds_vshape.schedule.communicators import communicator_of
from ds_vshape.schedule.lowering import (AwaitOffload, AwaitReceive, AwaitReload, AwaitSend, Channel, CopyStep, Load,
                                         Message, Offload, PostReceive, Program, Reload, Run, Send, Step, message_into)
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.proofs.rendezvous import DeadlockError, JointRun, Place, Receives, run_together
from ds_vshape.schedule.repeated import ComesBack, run_through
from ds_vshape.schedule.schedule import dependencies


def check(programs: Sequence[Program], placement: Placement,
          communicator: Callable[[Channel], Hashable] = communicator_of, early: JointRun | None = None) -> None:
    """Raise DeadlockError unless `programs` run to their end and every pass finds its input.

    Args:
        programs: those of all ranks.
        placement: of their stages.
        communicator: which channels share one, as they do at runtime unless it is given.
        early: the run in which receives start when they are posted, where that looks at more.
    """
    # Programs may be made without the data.
    loading = any(isinstance(step, Load) for program in programs for step in program)
    alone = [Alone(rank, placement, loading) for rank in range(len(programs))]

    def each_alone(parts: Sequence[Sequence[Step]]) -> None:
        for of_rank, part in zip(alone, parts):
            of_rank.run(part)

    run_through(programs, each_alone, ComesBack(lambda start: [of_rank.state(start) for of_rank in alone]))
    for of_rank in alone:
        of_rank.end()
    sequences = _Sequences(communicator)
    run_through(programs, sequences.run, ComesBack(sequences.state))
    sequences.end()
    run_together(programs, communicator, [early or JointRun(Receives.EARLY), JointRun(Receives.LATE)])


# -- [1] each program alone


# In turn, for each offload.
_COPY_STEPS: tuple[type[CopyStep], ...] = (Offload, AwaitOffload, Reload, AwaitReload)


class _MicroBatches:
    """A set of micro-batches, most of which come in turn."""

    __slots__ = ("_others", "_until")

    def __init__(self) -> None:
        self._until, self._others = 0, set[int]()

    def __contains__(self, micro_batch: int) -> bool:
        return 0 <= micro_batch < self._until or micro_batch in self._others

    def add(self, micro_batch: int) -> None:
        """Take one more in."""
        if micro_batch != self._until:
            self._others.add(micro_batch)
            return
        self._until += 1
        while self._until in self._others:
            self._others.remove(self._until)
            self._until += 1

    def counted_from(self, start: int) -> Hashable:
        """The same sets, with other starts, are equal."""
        return self._until - start, frozenset(micro_batch - start for micro_batch in self._others)


class Alone:
    """One rank's program on its own; where `loading`, with the data of the first and the last stage."""

    def __init__(self, rank: int, placement: Placement, loading: bool) -> None:
        self._rank, self._placement, self._loading = rank, placement, loading
        self._ends = (0, placement.last_stage)
        self._started: dict[type[Step], set[Message]] = {Send: set(), PostReceive: set()}
        self._received: set[Message] = set()
        self._loaded = _MicroBatches()
        # Of which micro-batches there is each stage's output (F), input gradient (B) and weight gradients (W).
        self._done: dict[tuple[Kind, int], _MicroBatches] = defaultdict(_MicroBatches)
        # By stage and micro-batch, between B and W: which pieces of W are done, as (piece, pieces).
        self._pieces: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._needs: dict[tuple[Kind, int], tuple[Channel | None, list[Pass]]] = {}
        # By stage and micro-batch, until the backward: which of `_COPY_STEPS` is done last, and what is recomputed.
        self._copied: dict[tuple[int, int], type[Step]] = {}
        self._recomputed: set[tuple[int, int]] = set()

    def run(self, program: Sequence[Step]) -> None:
        """Go through some steps; DeadlockError where one can't be done."""
        for step in program:
            if isinstance(step, Run):
                self._compute(step.action)
            elif isinstance(step, (Send, PostReceive)):
                self._start(step)
            elif isinstance(step, (AwaitSend, AwaitReceive)):
                waited_for = self._started[Send if isinstance(step, AwaitSend) else PostReceive]
                if step.message not in waited_for:
                    raise DeadlockError(f"rank {self._rank} waits for {step.message} before it started it")
                waited_for.remove(step.message)
                if isinstance(step, AwaitReceive):
                    self._received.add(step.message)
            elif isinstance(step, CopyStep):
                self._copy(step)
            elif isinstance(step, Load):
                if step.micro_batch in self._loaded:
                    raise DeadlockError(f"rank {self._rank} loads micro-batch {step.micro_batch} twice")
                self._loaded.add(step.micro_batch)

    def _start(self, step: Send | PostReceive) -> None:
        message = step.message
        sends = isinstance(step, Send)
        if self._rank != (message.channel.source if sends else message.channel.target):
            raise DeadlockError(f"rank {self._rank} is at the wrong end of {message}")
        if sends:
            maker = message.maker
            if self._placement.rank_of(maker.stage) != self._rank:
                raise DeadlockError(f"rank {self._rank} sends {message}, but stage {maker.stage} is on rank "
                                    f"{self._placement.rank_of(maker.stage)}")
            if message.micro_batch not in self._done[maker.kind, maker.stage]:
                raise DeadlockError(f"rank {self._rank} sends {message} before {maker} has made it")
        self._started[type(step)].add(message)

    def _copy(self, step: CopyStep) -> None:
        """The steps of a copy to the host and back stand in turn between the F and its backward."""
        rank, action, now = self._rank, step.action, type(step)
        stage, micro_batch = of = action.stage, action.micro_batch
        if micro_batch not in self._done[Kind.F, stage] or micro_batch in self._done[Kind.B, stage]:
            raise DeadlockError(f"rank {rank} has {step} before {Pass(Kind.F, stage, micro_batch)} or after its "
                                "backward")
        if of in self._recomputed:
            raise DeadlockError(f"rank {rank} has {step} after what was forgotten is recomputed")
        before = dict(zip(_COPY_STEPS[1:], _COPY_STEPS)).get(now)
        if self._copied.get(of) is not before:
            raise DeadlockError(f"rank {rank} has {step} without {before.__name__ if before else 'its F'} right before")
        self._copied[of] = now

    def _take_back(self, action: Pass) -> None:
        """DeadlockError if something that `action` needs is on the host."""
        last = self._copied.get((action.stage, action.micro_batch), AwaitReload)
        if last is not AwaitReload:
            raise DeadlockError(f"rank {self._rank} runs {action} before what was offloaded is back: it is at "
                                f"{last.__name__}")

    def _compute(self, action: Pass) -> None:
        """The pass must stand on its stage's rank, and find its input: received, or made on this rank."""
        rank, kind, stage, micro_batch = self._rank, action.kind, action.stage, action.micro_batch
        channel, needs = self._needs.get((kind, stage)) or self._look_up(action)
        if kind is Kind.W:
            self._compute_weights(action)
            return
        made = Kind.B if kind is Kind.BW else kind
        if micro_batch in self._done[made, stage] or (kind is Kind.C and (stage, micro_batch) in self._recomputed):
            raise DeadlockError(f"rank {rank} runs {action} twice")
        if kind is not Kind.F:
            self._take_back(action)
        if channel is not None:
            message = Message(channel, stage, micro_batch)
            if message not in self._received:
                raise DeadlockError(f"rank {rank} runs {action} without having waited for {message}")
            self._received.remove(message)
        for need in needs:
            if micro_batch not in self._done[need.kind, need.stage]:
                raise DeadlockError(f"rank {rank} runs {action} before {need.later(micro_batch)}")
        if self._loading and kind is Kind.F and stage in self._ends and micro_batch not in self._loaded:
            raise DeadlockError(f"rank {rank} runs {action} before it has loaded the micro-batch")
        if kind is Kind.C:
            self._recompute(action)
            return
        self._done[made, stage].add(micro_batch)
        if kind is Kind.B:
            self._pieces[stage, micro_batch] = []
        elif kind is Kind.BW:
            self._done[Kind.W, stage].add(micro_batch)
        if kind.gives_input_gradient:
            self._copied.pop((stage, micro_batch), None)
            self._recomputed.discard((stage, micro_batch))

    def _recompute(self, action: Pass) -> None:
        """A C comes before the backward."""
        stage, micro_batch = action.stage, action.micro_batch
        if micro_batch in self._done[Kind.B, stage]:
            raise DeadlockError(f"rank {self._rank} runs {action} after the backward")
        self._recomputed.add((stage, micro_batch))

    def _compute_weights(self, action: Pass) -> None:
        """The pieces of a W run in turn, behind their B."""
        stage, micro_batch, piece = action.stage, action.micro_batch, (action.piece, action.pieces)
        done = self._pieces.get((stage, micro_batch))
        if micro_batch in self._done[Kind.W, stage] or (done and piece in done):
            raise DeadlockError(f"rank {self._rank} runs {action} twice")
        if action.piece and (action.piece - 1, action.pieces) not in (done or []):
            raise DeadlockError(f"rank {self._rank} runs {action} before {action._replace(piece=action.piece - 1)}")
        if done is None:
            raise DeadlockError(f"rank {self._rank} runs {action} before {Pass(Kind.B, stage, micro_batch)}")
        done.append(piece)
        if action.frees_activations:
            self._done[Kind.W, stage].add(micro_batch)
            del self._pieces[stage, micro_batch]

    def _look_up(self, action: Pass) -> tuple[Channel | None, list[Pass]]:
        """From where the action gets a message, and what it needs of this rank, for micro-batch 0."""
        first, rank_of = Pass(action.kind, action.stage, 0), self._placement.rank_of
        if rank_of(action.stage) != self._rank:
            raise DeadlockError(f"rank {self._rank} runs {action}, but its stage is on rank {rank_of(action.stage)}")
        message = message_into(first, self._placement)
        needs = [need for need in dependencies(first, self._placement.last_stage, {})
                 if rank_of(need.stage) == self._rank]
        found = self._needs[action.kind, action.stage] = (message.channel if message else None), needs
        return found

    def state(self, start: int) -> Hashable:
        """As `ComesBack` wants it."""
        messages = [frozenset(message.later(-start) for message in each)
                    for each in (*self._started.values(), self._received)]
        done = frozenset((key, each.counted_from(start)) for key, each in self._done.items())
        pieces = frozenset((stage, micro_batch - start, *each) for (stage, micro_batch), each in self._pieces.items())
        copied = frozenset((stage, micro_batch - start, step) for (stage, micro_batch), step in self._copied.items())
        recomputed = frozenset((stage, micro_batch - start) for stage, micro_batch in self._recomputed)
        return *messages, done, pieces, copied, recomputed, self._loaded.counted_from(start if 0 in self._loaded else 0)

    def end(self) -> None:
        """DeadlockError for what is left."""
        for message in self._started[Send]:
            raise DeadlockError(f"rank {self._rank} never waits for its send of {message}")
        for message in self._started[PostReceive]:
            raise DeadlockError(f"rank {self._rank} never waits for its receive of {message}")
        for message in self._received:
            raise DeadlockError(f"rank {self._rank} receives {message}, but never runs {message.taker}")
        for stage, micro_batch in self._copied:
            raise DeadlockError(f"rank {self._rank} offloads {Pass(Kind.F, stage, micro_batch)}, but never runs its "
                                "backward")


# -- [2] each communicator


class _Sequence:
    """The messages of one direction of a communicator, as either end starts them."""

    def __init__(self) -> None:
        self.counts = {Send: 0, PostReceive: 0}
        # What one end has started and the other hasn't, yet.
        self.ahead: deque[Message] = deque()
        self.first: type[Step] = Send
        self.seen: dict[tuple[Channel, int], _MicroBatches] = defaultdict(_MicroBatches)
        self.failure: str | None = None

    def start(self, step: Send | PostReceive) -> None:
        """One end's next message."""
        message, end = step.message, type(step)
        if end is Send:
            seen = self.seen[message.channel, message.stage]
            if message.micro_batch in seen:
                self.failure = self.failure or f"{message} is sent twice"
            seen.add(message.micro_batch)
        if self.ahead and end is not self.first:
            other = self.ahead.popleft()
            if other != message:
                out, into = (message, other) if end is Send else (other, message)
                self.failure = self.failure or f"number {self.counts[end]} is sent as {out} and received as {into}"
        else:
            self.first = end
            self.ahead.append(message)
        self.counts[end] += 1


class _Sequences:
    """Those of all communicators."""

    def __init__(self, communicator: Callable[[Channel], Hashable]) -> None:
        self._communicator = communicator
        self._of_channel: dict[Channel, _Sequence] = {}
        self._every: dict[Place, _Sequence] = defaultdict(_Sequence)

    def run(self, parts: Sequence[Sequence[Step]]) -> None:
        """Take in some steps of all ranks."""
        for part in parts:
            for step in part:
                if isinstance(step, (Send, PostReceive)):
                    channel = step.message.channel
                    found = self._of_channel.get(channel)
                    if found is None:
                        place = channel.source, channel.target, self._communicator(channel)
                        found = self._of_channel[channel] = self._every[place]
                    found.start(step)

    def state(self, start: int) -> Hashable:
        """As `ComesBack` wants it."""
        return tuple((place, each.first if each.ahead else None, tuple(message.later(-start) for message in each.ahead),
                      tuple((of, micro_batches.counted_from(start)) for of, micro_batches in each.seen.items()))
                     for place, each in self._every.items())

    def end(self) -> None:
        """DeadlockError for sequences that differ."""
        for (source, target, _), each in sorted(self._every.items(), key=lambda entry: entry[0][:2]):
            if each.failure is None and each.ahead:
                each.failure = (f"{each.ahead[0]} is {'sent' if each.first is Send else 'received'} by one end only; "
                                f"{each.counts[Send]} messages are sent and {each.counts[PostReceive]} received")
            if each.failure is not None:
                raise DeadlockError(f"messages {source}->{target}: {each.failure}")
