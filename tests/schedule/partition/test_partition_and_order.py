"""Partition and order planned together: against all partitions with the best order of each, and against balance."""

from __future__ import annotations

import math
import time
from itertools import combinations, count

import pytest
from optimum import least_makespan

from ds_vshape.schedule.adaptive import LimitError
from ds_vshape.schedule.bounds import lower_bound_of_limits
from ds_vshape.schedule.partition.balance import PartitionError, balance
from ds_vshape.schedule.partition.layers import Layers
from ds_vshape.schedule.partition.partition_and_order import PartitionProblem, limits_of_1f1b, plan_partition
from ds_vshape.schedule.placement import linear, v


def model(layers: int, head: float, state: tuple[float, ...] = ()) -> Layers:
    """An embedding, layers that take 2, 2 and 2, and a head of so many of them."""
    times = (1.0, *(2.0,) * layers, 2.0 * head)
    sizes = (1.0, *(4.0,) * (layers + 1))
    return Layers(times, times, times, sizes, sizes, state)


def problem(ranks: int, micro_batches: int, layers: int, head: float, limit: float) -> PartitionProblem:
    costs = model(layers, head)
    return PartitionProblem(costs, v(ranks), micro_batches, limits_of_1f1b(limit, costs, ranks, micro_batches),
                            max_pieces=1)


def least_of_all(asked: PartitionProblem, known: float) -> float:
    """The least makespan of all partitions and orders, or `known` if none is below: those that the bound doesn't rule
    out are solved."""
    layers = len(asked.layers)
    for inner in combinations(range(1, layers), 2 * asked.ranks - 1):
        try:
            one = asked.on((0, *inner, layers))
        except LimitError:
            continue
        if lower_bound_of_limits(one.placement, one.micro_batches, one.times, one.activations, one.limits) < known:
            _, found, proved = least_makespan(one, 60, 0.1, below=known)
            assert found == proved
            known = min(known, found)
    return known


@pytest.mark.parametrize("ranks, micro_batches, layers, head, limit", [
    (2, 3, 4, 8, 0.7), (2, 4, 6, 1, 1), (2, 4, 6, 8, 0.5), (2, 4, 6, 8, 1), (2, 4, 6, 30, 0.5), (3, 4, 6, 8, 0.5),
    (4, 4, 8, 1, 0.5)])
@pytest.mark.quick_cases("2-3-4-8-0.7")
def test_no_partition_and_order_are_much_better(ranks: int, micro_batches: int, layers: int, head: float,
                                                limit: float) -> None:
    asked = problem(ranks, micro_batches, layers, head, limit)
    found = plan_partition(asked, 1.0, clock=time.process_time).plan.timeline.makespan
    assert found <= 1.03 * least_of_all(asked, found)


def test_it_is_no_slower_than_balance_and_gains_where_memory_is_short() -> None:
    """A head of eight layers on four ranks: with half of 1F1B's memory balance's stages leave room for few forwards."""
    asked = problem(4, 8, 14, 8, 0.5)
    found = plan_partition(asked, 0.7, clock=time.process_time)
    assert found.balanced_bounds == balance(asked.layers.costs, v(4)) and found.balanced is not None
    assert found.plan.timeline.makespan < 0.95 * found.balanced.timeline.makespan
    one = asked.on(found.bounds)
    assert all(peak <= limit for peak, limit in zip(found.plan.peaks, one.limits))
    assert found.plan.schedule.placement == v(4) and found.plan.schedule.micro_batches == 8


def test_the_same_clock_gives_the_same_plan() -> None:
    def ticking() -> tuple[tuple[int, ...], float]:
        ticks = count()
        found = plan_partition(problem(2, 4, 6, 8, 0.6), 1.0, clock=lambda: next(ticks) / 4)
        return found.bounds, found.plan.timeline.makespan

    assert ticking() == ticking()


def test_what_layers_keep_all_the_time_counts() -> None:
    """A head whose weights leave its rank room for no more than a micro-batch of one layer beside it."""
    costs = model(6, 1, state=(0.0, *(1.0,) * 6, 30.0))
    asked = PartitionProblem(costs, v(2), 4, (39.0, 39.0))
    assert asked.excess(balance(costs.costs, v(2)))
    found = plan_partition(asked, 0.5, clock=time.process_time)
    assert found.balanced is None
    assert found.bounds[1] + len(costs) - found.bounds[-2] <= 3
    states = costs.states(found.bounds, v(2))
    assert all(peak + state <= 39 for peak, state in zip(found.plan.peaks, states))


def test_what_fits_nowhere() -> None:
    with pytest.raises(LimitError, match="a limit of 3 on rank"):
        plan_partition(PartitionProblem(model(6, 1), v(2), 4, (3.0, 3.0)), 0.05)
    with pytest.raises(LimitError, match="leaves no room for activations"):
        plan_partition(PartitionProblem(model(6, 1, state=(2.0,) * 8), v(2), 4, (3.0, 3.0)), 0.05)
    with pytest.raises(PartitionError, match="3 layers can't fill 4 stages"):
        PartitionProblem(model(1, 1), v(2), 4, (30.0, 30.0))
    with pytest.raises(ValueError, match="a limit for each of 2 ranks, not 1"):
        PartitionProblem(model(6, 1), v(2), 4, (30.0,))


def test_costs_of_stages_are_sums() -> None:
    layers = Layers((1.0, 2.0, 3.0), (0.0, 1.0, 0.5), (0.1, 0.2, 0.3), (5.0, 6.0, 7.0), (1.0, 0.0, 2.0),
                    (9.0, 8.0, 7.0))
    times, sizes = layers.times((0, 1, 3), (0.5,)), layers.activations((0, 1, 3))
    assert (times.forward, times.input_grad, times.hops) == ((1.0, 5.0), (0.0, 1.5), (0.5,))
    assert times.weight_grad == pytest.approx((0.1, 0.5))
    assert (sizes.after_forward, sizes.after_backward) == ((5.0, 13.0), (1.0, 2.0))
    assert layers.states((0, 1, 3), v(1)) == (24.0,)
    assert layers.costs == pytest.approx((1.1, 3.2, 3.8))
    with pytest.raises(ValueError, match="after_backward must be 3 finite numbers"):
        Layers((1.0,) * 3, (1.0,) * 3, (1.0,) * 3, (1.0,) * 3, (1.0, math.inf, 1.0))


def test_the_limit_is_a_share_of_what_1f1b_keeps() -> None:
    """Balanced on two ranks: layers 0 to 4 and 5 to 7. Rank 0 keeps two micro-batches, if there are two."""
    costs = model(6, 2)
    assert balance(costs.costs, linear(2)) == (0, 5, 8)
    assert limits_of_1f1b(0.5, costs, 2, 8) == (17.0, 17.0)
    assert limits_of_1f1b(1, costs, 2, 1) == (17.0, 17.0)
