"""A schedule: a placement, and each rank's passes in order."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.repeated import Repeated, times_of

# A tuple, or a Repeated where the schedule is for many micro-batches.
Order = Sequence[Pass]


class ScheduleError(ValueError):
    """A schedule that can't be run: a pass is missing, duplicated, on the wrong rank, or in a circular wait."""


@dataclass(frozen=True)
class Schedule:
    """What every rank does in one batch of `micro_batches`, communication aside.

    `orders[r]` is the sequence of passes of rank r.
    """

    name: str
    placement: Placement
    micro_batches: int
    orders: tuple[Order, ...]

    def passes(self) -> Iterator[tuple[int, Pass]]:
        """Every pass with its rank, rank by rank."""
        for rank, order in enumerate(self.orders):
            for action in order:
                yield rank, action

    @property
    def repeats(self) -> int:
        """How many times the middle of all orders repeats; 1 where none is known to."""
        return times_of(self.orders)

    @cached_property
    def gives_back_memory(self) -> bool:
        """Whether there is any C, O or R."""
        kinds = {action.kind for order in self.with_repeats(1).orders for action in order}
        return any(kind.is_optional for kind in kinds)

    def with_repeats(self, times: int) -> Schedule:
        """This schedule for as many micro-batches as it has with its middle so many `times`."""
        if times == self.repeats:
            return self
        orders = tuple(order.repeated(times) for order in self.orders if isinstance(order, Repeated))
        micro_batches = self.micro_batches + (times - self.repeats) * orders[0].interval
        return replace(self, orders=orders, micro_batches=micro_batches)

    def with_orders(self, orders: tuple[Order, ...]) -> Schedule:
        """This schedule with other orders."""
        return replace(self, orders=orders)


# By kind, stage and micro-batch: the passes that other schedules do without (BW, C, O and R).
Variants = Mapping[tuple[Kind, int, int], Pass]


def variants(schedule: Schedule) -> Variants:
    """Those of `schedule`."""
    return {(action.kind, action.stage, action.micro_batch): action for _, action in schedule.passes()
            if action.kind is Kind.BW or action.kind.is_optional}


def dependencies(action: Pass, last_stage: int, there: Variants) -> tuple[Pass, ...]:
    """The passes that must end before `action` may start.

    F waits for F of the stage before; B and BW for their own F and for the input gradient of the stage after; W for
    its own B. O and C wait for their own F, R for its O; C waits for its R, B and BW wait for C or, where there is
    none, for R: for the end of the copy that R starts. `there` are the schedule's `variants`.
    """
    stage, micro_batch = action.stage, action.micro_batch

    def own(*kinds: Kind) -> tuple[Pass, ...]:
        """The first of these that there is."""
        found = (there.get((kind, stage, micro_batch)) for kind in kinds)
        return next(((one,) for one in found if one is not None), ())

    if action.kind is Kind.F:
        return (Pass(Kind.F, stage - 1, micro_batch),) if stage else ()
    if action.kind is Kind.W:
        return (Pass(Kind.B, stage, micro_batch),)
    if action.kind is Kind.R:
        return (Pass(Kind.O, stage, micro_batch),)
    forward = Pass(Kind.F, stage, micro_batch)
    if action.kind is Kind.O:
        return (forward,)
    if action.kind is Kind.C:
        return forward, *own(Kind.R)
    needs = forward, *own(Kind.C, Kind.R)
    if stage == last_stage:
        return needs
    after = there.get((Kind.BW, stage + 1, micro_batch)) or Pass(Kind.B, stage + 1, micro_batch)
    return *needs, after


def check(schedule: Schedule) -> None:
    """Raise ScheduleError unless every stage runs every micro-batch once, on its own rank.

    A stage's micro-batch may be recomputed (C), offloaded and reloaded (O, then R), each once, between its F and its
    backward; C needs what R brings back. Whether the orders can run to their end is for the simulator to find out
    (`timeline.simulate`).

    Where the middle repeats, once and twice stand for all numbers of times. Be H what the heads run, B the bodies and R
    the rest, and x' what comes an interval d of micro-batches later. If H + B + R is each of m micro-batches once, and
    H + B + B' + R' each of m + d, then H + B - H' is the first d: with every further repeat it's these and the former
    ones, d later. Which micro-batches have C, O and R may differ, so where there are any, all repeats are looked at.
    """
    most = schedule.repeats if schedule.gives_back_memory else 2
    for times in sorted({1, min(2, schedule.repeats), min(most, schedule.repeats)}):
        _check(schedule.with_repeats(times))


# The kinds of a stage's passes for one micro-batch, in order.
_WITHOUT_W = re.compile("F(OR)?C?(?P<backward>BW?)")


def _check(schedule: Schedule) -> None:
    placement = schedule.placement
    if len(schedule.orders) != placement.ranks:
        raise ScheduleError(f"{schedule.name} has orders for {len(schedule.orders)} ranks, but its placement has "
                            f"{placement.ranks}")
    seen: dict[Pass, int] = {}
    for rank, action in schedule.passes():
        if action in seen:
            raise ScheduleError(f"{schedule.name}: {action} is on rank {seen[action]} and again on rank {rank}")
        seen[action] = rank
        if not 0 <= action.stage < placement.stages or not 0 <= action.micro_batch < schedule.micro_batches:
            raise ScheduleError(f"{schedule.name}: {action} is outside {placement.stages} stages "
                                f"and {schedule.micro_batches} micro-batches")
        if placement.rank_of(action.stage) != rank:
            raise ScheduleError(f"{schedule.name}: {action} is on rank {rank}, "
                                f"but its stage is on rank {placement.rank_of(action.stage)}")
    found: dict[tuple[int, int], list[Pass]] = {}
    complete = cache(_complete)
    for action in seen:
        found.setdefault((action.stage, action.micro_batch), []).append(action)
    for stage in range(placement.stages):
        for micro_batch in range(schedule.micro_batches):
            passes = found.get((stage, micro_batch), [])
            if not complete(tuple([(action.kind, action.piece, action.pieces) for action in passes])):
                names = ", ".join(map(repr, passes)) or "nothing"
                raise ScheduleError(f"{schedule.name}: stage {stage} has {names} for micro-batch {micro_batch}; it "
                                    "needs F with B and W (all pieces in turn), or F with BW; between them O, then R, "
                                    "and C after that, or without these")


def _complete(passes: tuple[tuple[Kind, int, int], ...]) -> bool:
    """Whether these passes (kind, piece, pieces) of one stage and micro-batch, in the rank's order, are what it takes.
    """
    pieces = [piece for kind, *piece in passes if kind is Kind.W]
    match = _WITHOUT_W.fullmatch("".join(kind for kind, _, _ in passes if kind is not Kind.W))
    if match is None or (match["backward"] == Kind.BW) == bool(pieces):
        return False
    return pieces == [[piece, len(pieces)] for piece in range(len(pieces))]
