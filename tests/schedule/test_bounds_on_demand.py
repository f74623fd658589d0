"""The lower bound with recomputation and offload: against the optimum, found by trying everything, and any schedule."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_orders import random_schedule

from ds_vshape.schedule.activations import Activations, peak_activations
from ds_vshape.schedule.bounds import lower_bound_of_limits
from ds_vshape.schedule.builders.everything import with_everything_offloaded, with_everything_recomputed
from ds_vshape.schedule.named import SCHEDULES, build
from ds_vshape.schedule.passes import BW, B, C, F, Kind, O, Pass, R, W
from ds_vshape.schedule.placement import PLACEMENTS, Placement, linear, v
from ds_vshape.schedule.schedule import Schedule, ScheduleError, check
from ds_vshape.schedule.timeline import Times, simulate

BOTH = (Kind.C, Kind.O)


@pytest.mark.parametrize(("placement", "micro_batches", "kinds", "copy"), [
    (linear(1), 2, BOTH, 1), (linear(1), 2, (Kind.O,), 3), (linear(1), 2, (Kind.C,), 1), (v(1), 1, BOTH, 2),
    (linear(2), 1, BOTH, 1), (linear(2), 2, (Kind.O,), 1), (linear(2), 2, (Kind.C,), 1), (v(2), 1, (Kind.O,), 1)],
    ids=lambda value: f"{value.name}{value.ranks}" if isinstance(value, Placement) else str(value))
def test_never_above_the_optimum(placement: Placement, micro_batches: int, kinds: Collection[Kind], copy: float
                                 ) -> None:
    stages = placement.stages
    times = Times((3,) * stages, (4,) * stages, (2,) * stages, (1,) * (stages - 1), recompute=((2,),) * stages,
                  offload=(copy,) * stages, reload=(copy,) * stages, copied=((0.5,),) * stages)
    activations = Activations((4,) * stages, (2,) * stages, ((1,),) * stages, (3,) * stages)
    whole = len(placement.chunks[0]) > 1 or placement.ranks > 1
    orders = [list(all_orders(chunks, micro_batches, kinds, whole)) for chunks in placement.chunks]
    found = 0
    for limit in (4, 6, 8):
        best = optimum(placement, micro_batches, orders, times, activations, limit)
        if best is not None:
            bound = lower_bound_of_limits(placement, micro_batches, times, activations, (limit,) * placement.ranks,
                                          kinds)
            assert 0.6 * best <= bound <= best
            found += 1
    assert found


def all_orders(chunks: Sequence[int], micro_batches: int, kinds: Collection[Kind], whole: bool
               ) -> Iterator[tuple[Pass, ...]]:
    """All orders of a rank with each stage's micro-batch kept, recomputed, offloaded or both."""
    chains = []
    for stage, i in product(chunks, range(micro_batches)):
        backward = [BW(stage, i)] if whole else [B(stage, i), W(stage, i)]
        middles = [[], *([[C(stage, i)]] if Kind.C in kinds else []),
                   *([[O(stage, i), R(stage, i)]] if Kind.O in kinds else []),
                   *([[O(stage, i), R(stage, i), C(stage, i)]] if len(kinds) > 1 else [])]
        chains.append([(F(stage, i), *middle, *backward) for middle in middles])
    for chosen in product(*chains):
        yield from interleaved(chosen)


def interleaved(chains: Sequence[tuple[Pass, ...]]) -> Iterator[tuple[Pass, ...]]:
    """All orders that keep the order of each chain."""
    if len(chains) == 1:
        yield chains[0]
        return
    for rest in interleaved(chains[1:]):
        total = len(chains[0]) + len(rest)
        for places in combinations(range(total), len(chains[0])):
            first, others = iter(chains[0]), iter(rest)
            yield tuple(next(first) if place in places else next(others) for place in range(total))


def optimum(placement: Placement, micro_batches: int, orders: Sequence[Sequence[tuple[Pass, ...]]], times: Times,
            activations: Activations, limit: float) -> float | None:
    """The least makespan of all combinations of orders within the limit; None if there is none that runs."""
    fitting = [[order for order in of_rank if within(order, placement, micro_batches, activations, limit)]
               for of_rank in orders]
    best: float | None = None
    for chosen in product(*fitting):
        schedule = Schedule("any", placement, micro_batches, chosen)
        try:
            makespan = simulate(schedule, times).makespan
        except ScheduleError:
            continue
        best = makespan if best is None else min(best, makespan)
    return best


def within(order: tuple[Pass, ...], placement: Placement, micro_batches: int, activations: Activations, limit: float
           ) -> bool:
    one = Schedule("one", placement, micro_batches, (order,))
    return peak_activations(one, activations)[0] <= limit


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from(sorted(PLACEMENTS)), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_no_order_is_below(ranks: int, micro_batches: int, placement: str, dice: random.Random) -> None:
    assert_above(random_schedule(ranks, micro_batches, placement, dice), dice)


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 5), st.integers(1, 12), st.integers(0, 3), st.booleans(),
       st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_no_regular_schedule_is_below(name: str, ranks: int, micro_batches: int, ahead: int, recomputes: bool,
                                      dice: random.Random) -> None:
    schedule = build(name, ranks, micro_batches)
    schedule = with_everything_recomputed(schedule) if recomputes else schedule
    assert_above(with_everything_offloaded(schedule, dice.randint(1, 2), ahead) if ahead else schedule, dice)


def assert_above(schedule: Schedule, dice: random.Random) -> None:
    check(schedule)
    stages = range(schedule.placement.stages)

    def each(least: float, most: float) -> tuple[float, ...]:
        return tuple(dice.uniform(least, most) for _ in stages)

    times = Times(each(0.1, 3), each(0.1, 3), each(0, 3), each(0, 2)[1:],
                  dice.choice(((), tuple(dice.uniform(0.5, 2) for _ in range(schedule.micro_batches)))),
                  recompute=tuple(zip(each(0, 2), each(0, 3))), offload=each(0, 4), reload=each(0, 4),
                  copied=tuple(zip(each(0, 1), each(0, 1))))
    activations = Activations(each(0.1, 5), each(0.1, 5), tuple(zip(each(0, 3), each(0, 3))), each(0, 5))
    limits = peak_activations(schedule, activations)
    bounds = [lower_bound_of_limits(schedule.placement, schedule.micro_batches, times, activations, limits, kinds)
              for kinds in (BOTH, (Kind.C,), (Kind.O,), ())]
    assert bounds[0] <= simulate(schedule, times).makespan * (1 + 1e-9)
    # What is allowed less can't be faster.
    assert all(bounds[0] <= bound * (1 + 1e-3) for bound in bounds[1:])


def test_copies_that_take_longest_set_the_time() -> None:
    """Half of a unit of memory is free: each of 20 micro-batches must go to the host and come back, 5 each way."""
    activations = Activations((1,) * 4, (0,) * 4)
    times = Times.uniform(4, copy=5)
    bound = lower_bound_of_limits(linear(4), 20, times, activations, (1.5,) * 4, (Kind.O,))
    assert bound > 20 * 5
    assert bound > lower_bound_of_limits(linear(4), 20, Times.uniform(4, copy=1), activations, (1.5,) * 4, (Kind.O,))
