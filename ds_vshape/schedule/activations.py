"""How much memory a schedule's activations take: sizes by stage, the peak of each rank, and its memory over time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ds_vshape.schedule.lowering import (AwaitOffload, AwaitSend, Content, Message, PostReceive, Program, Reload, Run,
                                         Send)
from ds_vshape.schedule.of_stages import check_numbers, check_numbers_of_layers, of_layers
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Span


class Change(NamedTuple):
    """What an action adds to its rank's memory when it starts, and when it has ended."""

    at_start: float
    at_end: float


@dataclass(frozen=True)
class Activations:
    """Sizes for each stage and one micro-batch, in bytes or any one unit.

    `after_forward` is what F leaves until B; `after_backward` is what B leaves until W ends: inputs and output
    gradients of the split operators. A W in pieces counts as ending with its last piece: what the others free depends
    on the stage's operators, so no peak relies on it.

    `recomputed[s][k - 1]` is what F of stage s leaves if its first k layers are recomputed, the last of them if all
    are; without any, as much as otherwise. `offloadable` is what an offload frees of what F leaves: without any, all of
    it. The rest stays, whether layers are recomputed or not.

    Raises ValueError for `recomputed` and `offloadable` that aren't sizes for each stage.
    """

    after_forward: tuple[float, ...]
    after_backward: tuple[float, ...]
    recomputed: tuple[tuple[float, ...], ...] = ()
    offloadable: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        stages = len(self.after_forward)
        if self.recomputed:
            check_numbers_of_layers("activations.recomputed", self.recomputed, stages)
        if self.offloadable:
            check_numbers("activations.offloadable", self.offloadable, stages)

    @classmethod
    def counted(cls, placement: Placement) -> Activations:
        """The paper's way (Table 1): whole until the end of W, in units of 1/(2p) of the model for one micro-batch."""
        sizes = (2 * placement.ranks / placement.stages,) * placement.stages
        return cls(sizes, sizes)

    def shares_in(self, counted: Activations) -> Activations:
        """`counted`, of which recomputation and offload leave the same shares as of these."""
        scales = [unit / whole for unit, whole in zip(counted.after_forward, self.after_forward)]
        return replace(counted, offloadable=tuple(size * scale for size, scale in zip(self.offloadable, scales)),
                       recomputed=tuple(tuple(size * scale for size in row)
                                        for row, scale in zip(self.recomputed, scales)))

    def left(self, stage: int, recompute: Pass | None = None) -> float:
        """What F of `stage` leaves until its backward, or until the C `recompute` if there is one."""
        return of_layers(recompute, self.recomputed) if recompute and self.recomputed else self.after_forward[stage]

    def least_between(self, stage: int, recompute: bool, offload: bool) -> tuple[float, Kind | None]:
        """The least that F of `stage` can leave until its backward is near, and by which of C and O, as far as they may
        be used; None where nothing gives less than the F itself."""
        whole = self.after_forward[stage]
        ways: list[tuple[float, Kind | None]] = [(whole, None)]
        if recompute:
            ways.append((self.left(stage, Pass(Kind.C, stage, 0)), Kind.C))
        if offload:
            ways.append((whole + self.change(Pass(Kind.O, stage, 0)).at_end, Kind.O))
        return min(ways, key=lambda way: way[0])

    def change(self, action: Pass, recompute: Pass | None = None) -> Change:
        """What `action` adds to the memory of its rank; `recompute` is the C of its stage and micro-batch, if any.

        F takes all at its start, and gives back at its end what is recomputed; C takes that again at its start. O, B
        and W free at their end, R takes at its start.
        """
        stage, kind = action.stage, action.kind
        whole = self.after_forward[stage]
        if kind is Kind.F:
            return Change(whole, self.left(stage, recompute) - whole)
        if kind is Kind.B:
            return Change(0.0, self.after_backward[stage] - whole)
        if kind is Kind.W:
            return Change(0.0, -self.after_backward[stage] if action.frees_activations else 0.0)
        if kind is Kind.BW:
            return Change(0.0, -whole)
        if kind is Kind.C:
            return Change(whole - self.left(stage, action), 0.0)
        stays = max(0.0, whole - self.offloadable[stage]) if self.offloadable else 0.0
        moved = max(0.0, self.left(stage, recompute) - stays)
        return Change(0.0, -moved) if kind is Kind.O else Change(moved, 0.0)

    def changes(self, order: Sequence[Pass]) -> Iterator[Change]:
        """That of each action of a rank's order."""
        recompute = {(action.stage, action.micro_batch): action for action in order if action.kind is Kind.C}
        return (self.change(action, recompute.get((action.stage, action.micro_batch))) for action in order)


def peak_activations(schedule: Schedule, activations: Activations | None = None) -> tuple[float, ...]:
    """The most that is alive at once on each rank, in the unit of `activations`; counted as the paper does without
    them."""
    sizes = activations or Activations.counted(schedule.placement)
    # A repeat frees what it takes; but which micro-batches are recomputed or offloaded may differ.
    looked_at = schedule if schedule.gives_back_memory else schedule.with_repeats(1)
    found = []
    for order in looked_at.orders:
        alive = peak = 0.0
        for at_start, at_end in sizes.changes(order):
            peak = max(peak, alive + at_start, alive + at_start + at_end)
            alive += at_start + at_end
        found.append(peak)
    return tuple(found)


def memory_curve(spans: Sequence[Span], activations: Activations) -> list[tuple[float, float]]:
    """(time, what is alive from then on) at each change on the rank with these spans, in order.

    What an action takes it takes when it starts, what it frees when it ends (`Activations.change`). Memory that is
    taken again at once leaves no dip. The maximum is the rank's peak in `peak_activations`.
    """
    curve: list[tuple[float, float]] = []
    alive = 0.0
    for span, change in zip(spans, activations.changes([span.action for span in spans])):
        for time, more in ((span.start, change.at_start), (span.end, change.at_end)):
            if more:
                alive += more
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
        """What `action` needs while it runs: C as much as F, a copy nothing."""
        of_kind = {Kind.F: self.forward, Kind.B: self.backward, Kind.BW: self.whole_backward, Kind.W: self.weights,
                   Kind.C: self.forward}
        return 0.0 if action.kind.is_copy else of_kind[action.kind][action.stage]

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
    recompute = {(step.action.stage, step.action.micro_batch): step.action for step in program
                 if isinstance(step, Run) and step.action.kind is Kind.C}
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
        elif isinstance(step, (Run, AwaitOffload, Reload)):
            action = step.action
            change = activations.change(action, recompute.get((action.stage, action.micro_batch)))
            taken = received.pop(action._replace(kind=Kind.B) if action.kind is Kind.BW else action, 0.0)
            # The data of a message are the F's own from its start, and gone when a B ends.
            at_start, at_end = (taken, 0.0) if action.kind is Kind.F else (0.0, taken)
            alive += change.at_start - at_start
            peak = max(peak, alive + working.of(action))
            alive += change.at_end - at_end
        peak = max(peak, alive)
    return peak
