"""The framework of "Pipeline Parallelism with Controllable Memory" (section 3): one pattern, repeated, then tightened.

Writing down a good order for p ranks and m micro-batches by hand is hard, and its memory harder to see. The idea: fix
only where ONE micro-batch's passes stand, the building block, and start the next micro-batch the same way one
interval later. If no two passes of a rank meet, the repetition runs without a steady bubble, and its memory is read
off the block: an activation lives from the start of its F to the end of its W.

    symbol      here                    meaning
    d, p        ranks                   pipeline ranks
    n, m        micro_batches           micro-batches of a batch
    T           interval                time from one micro-batch's F on stage 0 to the next one's
    delta       offsets                 time between the starts of neighbouring passes of the block
    l           lifespan(stage)         from the start of F to the end of W
    ceil(l/T)   activations(stage)      the most micro-batches whose activations the stage keeps

V-Min with 4 ranks, offsets of 1 all the way down, up, down and up; capital letters are the first half of the model,
small letters the second. The next micro-batch starts at 6, between the passes of this one:

    time      0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15 16 17
    rank 0    F                    f  b     w              B     W
    rank 1       F              f        b  w           B        W
    rank 2          F        f              b     w  B     W
    rank 3             F  f                    b  B  w  W

Three steps make the schedule:

    repeat      the block every `interval`; each rank's passes sorted by start
    squeeze     each pass as early as order and dependencies allow: that is what `timeline.simulate` does
    reorder     in warm-up and cool-down a rank still waits; let it run a later pass that is ready already

Times here count passes: F, B and W take 1 and BW takes 2. The result is an order, so real times may differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Order, Schedule

UNITS = {Kind.F: 1, Kind.B: 1, Kind.W: 1, Kind.BW: 2}


@dataclass(frozen=True)
class BuildingBlock:
    """Where one micro-batch's passes start, stage by stage; `weight_grad` is empty if the backward runs as BW."""

    placement: Placement
    interval: int
    forward: tuple[int, ...]
    input_grad: tuple[int, ...]
    weight_grad: tuple[int, ...] = ()

    @classmethod
    def from_offsets(cls, placement: Placement, interval: int, offsets: Sequence[int]) -> BuildingBlock:
        """The block with whole backwards (BW) whose neighbouring passes start `offsets` after each other.

        `offsets` follow the micro-batch: from F of the first stage to F of the last (stages - 1 of them), to the
        last stage's backward (1), and back to the first stage's (stages - 1).
        """
        stages = placement.stages
        if len(offsets) != 2 * stages - 1:
            raise ValueError(f"{stages} stages take {2 * stages - 1} offsets, not {len(offsets)}")
        starts = [0]
        for offset in offsets:
            starts.append(starts[-1] + offset)
        return cls(placement, interval, tuple(starts[:stages]), tuple(reversed(starts[stages:])))

    def split(self) -> BuildingBlock:
        """This block with B and W in place of BW: each W in its rank's first free slot after its B.

        Raises ValueError if two passes of a rank meet.
        """
        weight_grad = [0] * self.placement.stages
        for rank, chunks in enumerate(self.placement.chunks):
            starts = [starts[stage] for stage in chunks for starts in (self.forward, self.input_grad)]
            taken = {start % self.interval for start in starts}
            if len(taken) < len(starts) or 3 * len(chunks) > self.interval:
                raise ValueError(f"two passes of rank {rank} start at the same time in {self}")
            for stage in sorted(chunks, key=lambda stage: self.input_grad[stage]):
                start = self.input_grad[stage] + 1
                while start % self.interval in taken:
                    start += 1
                taken.add(start % self.interval)
                weight_grad[stage] = start
        return replace(self, weight_grad=tuple(weight_grad))

    def delayed(self, intervals: Sequence[int]) -> BuildingBlock:
        """This split block with the W of each stage put off by so many intervals: its slot stays the same."""
        weight_grad = (start + self.interval * count for start, count in zip(self.weight_grad, intervals, strict=True))
        return replace(self, weight_grad=tuple(weight_grad))

    def lifespan(self, stage: int) -> int:
        """Time from the start of the stage's F to the end of its W (or BW)."""
        end = self.weight_grad[stage] + 1 if self.weight_grad else self.input_grad[stage] + UNITS[Kind.BW]
        return end - self.forward[stage]

    def activations(self, stage: int) -> int:
        """The most micro-batches whose activations `stage` keeps at once."""
        return ceil(self.lifespan(stage) / self.interval)

    def passes(self, stage: int) -> Iterator[tuple[int, Kind]]:
        """Start and kind of each pass of `stage`."""
        yield self.forward[stage], Kind.F
        if self.weight_grad:
            yield self.input_grad[stage], Kind.B
            yield self.weight_grad[stage], Kind.W
        else:
            yield self.input_grad[stage], Kind.BW


def repeat(block: BuildingBlock, micro_batches: int, name: str) -> Schedule:
    """The schedule that starts `block` once every interval; a rank's passes in the order of their starts."""
    orders = []
    for chunks in block.placement.chunks:
        starts = [(start + block.interval * micro_batch, kind is Kind.F, Pass(kind, stage, micro_batch))
                  for stage in chunks for start, kind in block.passes(stage) for micro_batch in range(micro_batches)]
        # Where whole backwards overlap a forward, the backward goes first: it frees what the forward takes.
        starts.sort(key=lambda entry: entry[:2])
        orders.append(tuple(action for _, _, action in starts))
    return Schedule(name, block.placement, micro_batches, tuple(orders))


def reorder(schedule: Schedule, limit: int) -> Schedule:
    """Squeeze `schedule` and use the ranks' waits in warm-up and cool-down, with at most `limit` activations on a rank.

    `limit` counts (stage, micro-batch) activations; an order that exceeds it before stays as large as it is. Each
    stage's passes of one kind must stand in micro-batch order, and they still do afterwards. Two rules, neither of
    which makes any F or B start later than in the squeezed schedule:

    [1] Between two forwards of a rank, a B that is ready goes ahead of the Ws: others wait for it, and the activations
        kept at the next forward are the same.
    [2] A rank whose next passes all wait runs the first later pass of 1 unit that is ready. A forward is pulled ahead
        so only if what the rank keeps stays within `limit` on all the way that it skips.
    """
    ranks = [_Rank(order, limit) for order in schedule.orders]
    progress = _Progress([0] * schedule.placement.stages, [0] * schedule.placement.stages)
    free_at = [0] * len(ranks)
    ending: dict[int, list[Pass]] = {}
    time, left = 0, sum(len(order) for order in schedule.orders)
    while left:
        for action in ending.pop(time, ()):
            progress.end(action)
        for index, rank in enumerate(ranks):
            if free_at[index] > time:
                continue
            work_now = rank.choose(progress)
            if work_now is not None:
                free_at[index] = time + UNITS[work_now.kind]
                ending.setdefault(free_at[index], []).append(work_now)
                left -= 1
        time += 1
        if left and not ending:
            raise ValueError(f"{schedule.name}: its passes wait for each other in a circle")
    return schedule.with_orders(tuple(tuple(rank.done) for rank in ranks))


@dataclass(frozen=True)
class _Progress:
    """How many micro-batches each stage has passed on: forwards to the stage after, input gradients to that before."""

    forwards: list[int]
    backwards: list[int]

    def end(self, action: Pass) -> None:
        """Take note that `action` is done."""
        if action.kind is Kind.F:
            self.forwards[action.stage] += 1
        elif action.kind is not Kind.W:
            self.backwards[action.stage] += 1

    def ready(self, action: Pass) -> bool:
        """Whether all that `action` needs is done; counts suffice because each stage goes in micro-batch order."""
        stage, micro_batch = action.stage, action.micro_batch
        if action.kind is Kind.F:
            return stage == 0 or self.forwards[stage - 1] > micro_batch
        if action.kind is Kind.W:
            return self.backwards[stage] > micro_batch
        last = stage + 1 == len(self.forwards)
        return self.forwards[stage] > micro_batch and (last or self.backwards[stage + 1] > micro_batch)


class _Rank:
    """One rank's passes to do (`queues`: for each kind and stage, with their places in the order) and done."""

    def __init__(self, order: Order, limit: int) -> None:
        self.order = order
        self.limit = limit
        self.done: list[Pass] = []
        self.alive = 0
        self.head = 0
        self.taken = [False] * len(order)
        queues: dict[tuple[Kind, int], list[int]] = {}
        for place, action in enumerate(order):
            queues.setdefault((action.kind, action.stage), []).append(place)
        self.queues = [list(reversed(places)) for places in queues.values()]

    def choose(self, progress: _Progress) -> Pass | None:
        """Take the pass that runs now; None to wait."""
        # The first pass of each queue, as they stand in the order; [1] and [2] are the rules of `reorder`.
        order = self.order
        fronts = sorted(places[-1] for places in self.queues if places)
        next_forward = next((place for place in fronts if order[place].kind is Kind.F), len(order))
        first_weight_grad: int | None = None
        for place in fronts:
            action = order[place]
            if place > next_forward and first_weight_grad is not None:
                break
            if not progress.ready(action) or (place != self.head and UNITS[action.kind] > 1):
                continue  # [2]; a pass of 2 units would still run when one before it gets ready
            if action.kind is Kind.W and place < next_forward:
                first_weight_grad = place if first_weight_grad is None else first_weight_grad  # [1]
            elif action.kind is not Kind.F or (first_weight_grad is None and self._fits(place)):
                return self._take(place)
        return None if first_weight_grad is None else self._take(first_weight_grad)

    def _fits(self, place: int) -> bool:
        """Whether the forward at `place` may go ahead of all that still stands before it."""
        if place == self.head:
            return True
        alive = most = self.alive
        for action, taken in zip(self.order[self.head:place], self.taken[self.head:place]):
            if not taken:
                alive += (action.kind is Kind.F) - action.kind.gives_weight_gradients
                most = max(most, alive)
        return most < self.limit

    def _take(self, place: int) -> Pass:
        action = self.order[place]
        next(places for places in self.queues if places and places[-1] == place).pop()
        self.taken[place] = True
        while self.head < len(self.order) and self.taken[self.head]:
            self.head += 1
        self.alive += (action.kind is Kind.F) - action.kind.gives_weight_gradients
        self.done.append(action)
        return action
