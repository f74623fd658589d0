"""How much memory a schedule's activations take: sizes by stage, the peak of each rank, and its memory over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ds_vshape.schedule.lowering import AwaitSend, Content, Message, PostReceive, Program, Run, Send
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Span


@dataclass(frozen=True)
class Activations:
    """Sizes for each stage and one micro-batch, in bytes or any one unit.

    `after_forward` is what F leaves until B; `after_backward` is what B leaves until W ends: inputs and output
    gradients of the split operators. A W in pieces counts as ending with its last piece: what the others free depends
    on the stage's operators, so no peak relies on it.
    """

    after_forward: tuple[float, ...]
    after_backward: tuple[float, ...]

    @classmethod
    def counted(cls, placement: Placement) -> Activations:
        """The paper's way (Table 1): whole until the end of W, in units of 1/(2p) of the model for one micro-batch."""
        sizes = (2 * placement.ranks / placement.stages,) * placement.stages
        return cls(sizes, sizes)

    def change(self, action: Pass) -> float:
        """What `action` adds to the memory of its rank, when it starts (F) or when it has ended (all others)."""
        stage = action.stage
        if action.kind is Kind.F:
            return self.after_forward[stage]
        if action.kind is Kind.B:
            return self.after_backward[stage] - self.after_forward[stage]
        if action.kind is Kind.W:
            return -self.after_backward[stage] if action.frees_activations else 0.0
        return -self.after_forward[stage]


def peak_activations(schedule: Schedule, activations: Activations | None = None) -> tuple[float, ...]:
    """The most that is alive at once on each rank, in the unit of `activations`; counted as the paper does without
    them."""
    sizes = activations or Activations.counted(schedule.placement)
    found = []
    # A repeat frees what it takes.
    for order in schedule.with_repeats(1).orders:
        alive = peak = 0.0
        for action in order:
            alive += sizes.change(action)
            peak = max(peak, alive)
        found.append(peak)
    return tuple(found)


def memory_curve(spans: Sequence[Span], activations: Activations) -> list[tuple[float, float]]:
    """(time, what is alive from then on) at each change on the rank with these spans, in order.

    F takes its memory when it starts; the other passes free theirs when they end. Memory that is taken again at once
    leaves no dip. The maximum is the rank's peak in `peak_activations`.
    """
    curve: list[tuple[float, float]] = []
    alive = 0.0
    for span in spans:
        change = activations.change(span.action)
        if change:
            alive += change
            time = span.start if span.action.kind is Kind.F else span.end
            if curve and curve[-1][0] == time and curve[-1][1] <= alive:
                curve.pop()
            curve.append((time, alive))
    return curve


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

    def of(self, action: Pass) -> float:
        """What `action` needs while it runs."""
        of_kind = {Kind.F: self.forward, Kind.B: self.backward, Kind.BW: self.whole_backward, Kind.W: self.weights}
        return of_kind[action.kind][action.stage]

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
            action = step.action
            change = activations.change(action)
            taken = received.pop(replace(action, kind=Kind.B) if action.kind is Kind.BW else action, 0.0)
            before, alive = alive, alive + change - taken
            # What F leaves is counted from its start, what the others free until their end.
            peak = max(peak, (alive if action.kind is Kind.F else before) + working.of(action))
        peak = max(peak, alive)
    return peak
