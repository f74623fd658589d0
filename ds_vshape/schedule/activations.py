"""How much memory a schedule's activations take: sizes by stage, and the peak of each rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ds_vshape.schedule.lowering import AwaitSend, Content, Message, PostReceive, Program, Run, Send
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule


@dataclass(frozen=True)
class Activations:
    """Sizes for each stage and one micro-batch, in bytes or any one unit.

    `whole` is what F leaves until B; `kept` is what B leaves until W ends: inputs and output gradients of the split
    operators. A W in pieces gives back equal shares of it.
    """

    whole: tuple[float, ...]
    kept: tuple[float, ...]

    @classmethod
    def counted(cls, placement: Placement) -> Activations:
        """The paper's way (Table 1): whole until the end of W, in units of 1/(2p) of the model for one micro-batch."""
        sizes = (2 * placement.ranks / placement.stages,) * placement.stages
        return cls(sizes, sizes)

    def change(self, work: Pass) -> float:
        """What `work` adds to the memory of its rank, when it starts (F) or when it has ended (all others)."""
        stage = work.stage
        if work.kind is Kind.F:
            return self.whole[stage]
        if work.kind is Kind.B:
            return self.kept[stage] - self.whole[stage]
        if work.kind is Kind.W:
            return -self.kept[stage] / work.pieces
        return -self.whole[stage]


def peaks(schedule: Schedule, activations: Activations) -> tuple[float, ...]:
    """The most that is alive at once on each rank, in the unit of `activations`."""
    found = []
    for order in schedule.orders:
        alive = peak = 0.0
        for work in order:
            alive += activations.change(work)
            peak = max(peak, alive)
        found.append(peak)
    return tuple(found)


@dataclass(frozen=True)
class Working:
    """What is alive only while a rank works, for each stage and in the unit of its activations.

    `forward` is what F needs besides what it leaves, `backward` what B and `whole_backward` what BW needs besides what
    F left, `weights` what W needs besides what B left; `message` is the activation that the stage receives, whose
    gradient is as large.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    whole_backward: tuple[float, ...]
    weights: tuple[float, ...]
    message: tuple[float, ...]

    def of(self, work: Pass) -> float:
        """What `work` needs while it runs."""
        of_kind = {Kind.F: self.forward, Kind.B: self.backward, Kind.BW: self.whole_backward, Kind.W: self.weights}
        return of_kind[work.kind][work.stage]

    def size(self, message: Message) -> float:
        """Of a message."""
        into_chain = message.channel.content is Content.ACTIVATION
        return self.message[message.stage if into_chain else message.stage + 1]


def working_peaks(programs: Sequence[Program], activations: Activations, working: Working) -> tuple[float, ...]:
    """The most that is alive at once on each rank, with what passes need while they run, and with messages.

    A message lives on its receiver from the offer of its buffer, on its sender until it has left. Its data are the
    stage's inputs, which an F counts as its own.
    """
    return tuple(_working_peak(program, activations, working) for program in programs)


def _working_peak(program: Program, activations: Activations, working: Working) -> float:
    alive = peak = 0.0
    received: dict[Pass, float] = {}
    for step in program:
        if isinstance(step, (PostReceive, Send)):
            size = working.size(step.message)
            alive += size
            if isinstance(step, PostReceive):
                received[step.message.taker] = size
        elif isinstance(step, AwaitSend):
            alive -= working.size(step.message)
        elif isinstance(step, Run):
            work = step.work
            change = activations.change(work)
            taken = received.pop(replace(work, kind=Kind.B) if work.kind is Kind.BW else work, 0.0)
            before, alive = alive, alive + change - taken
            # What F leaves is counted from its start, what the others free until their end.
            peak = max(peak, (alive if work.kind is Kind.F else before) + working.of(work))
        peak = max(peak, alive)
    return peak
