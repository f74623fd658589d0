"""Balanced cuts, against all cuts that there are."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_vshape.schedule.partition.balance import (MIDDLES, PartitionError, balance, check_bounds, check_costs,
                                                  rank_loads, stage_loads)
from ds_vshape.schedule.placement import PLACEMENTS, Placement, interleaved, linear, v


def value(costs: Sequence[float], bounds: Sequence[int], placement: Placement) -> tuple[float, float]:
    """What is to be made small: the most loaded rank, then the squares of the stages."""
    loads = [sum(costs[start:stop]) for start, stop in itertools.pairwise(bounds)]
    ranks = [sum(loads[stage] for stage in stages) for stages in placement.chunks]
    return max(ranks), sum(load * load for load in loads)


def least(costs: Sequence[float], placement: Placement) -> tuple[float, float]:
    """The oracle: every cut into stages of at least one layer."""
    layers = len(costs)
    return min(value(costs, (0, *inner, layers), placement)
               for inner in itertools.combinations(range(1, layers), placement.stages - 1))


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], Placement]:
    """Whole numbers, so that sums are exact; layers that cost nothing and heavy ones among them."""
    placement = PLACEMENTS[draw(st.sampled_from(sorted(PLACEMENTS)))](draw(st.integers(1, 4)))
    layers = draw(st.integers(placement.stages, min(placement.stages + 7, 13)))
    cost = st.one_of(st.sampled_from([0, 1, 1, 2]), st.integers(0, 50))
    costs = draw(st.lists(cost, min_size=layers, max_size=layers).filter(any))
    return costs, placement


@given(problems())
@settings(max_examples=200)
def test_nothing_is_better(problem: tuple[list[int], Placement]) -> None:
    costs, placement = problem
    assert len(costs) <= 2 * placement.ranks + MIDDLES - 1 or placement.name != "interleaved"
    bounds = balance(costs, placement)
    assert check_bounds(bounds, placement.stages, len(costs)) == bounds
    assert value(costs, bounds, placement) == least(costs, placement)


@given(problems(), st.sampled_from([1e-6, 1 / 3, 0.1, 1e9]))
@settings(max_examples=50)
def test_the_unit_does_not_matter(problem: tuple[list[int], Placement], scale: float) -> None:
    costs, placement = problem
    scaled = [cost * scale for cost in costs]
    assert value(costs, balance(scaled, placement), placement) == value(costs, balance(costs, placement), placement)


@given(problems(), st.sampled_from([0.05, 0.5]))
@settings(max_examples=100)
def test_slack_is_spent_on_even_stages(problem: tuple[list[int], Placement], slack: float) -> None:
    costs, placement = problem
    limit = least(costs, placement)[0] * (1 + slack) * (1 + 1e-9)
    cuts = ((0, *inner, len(costs)) for inner in itertools.combinations(range(1, len(costs)), placement.stages - 1))
    oracle = min(squares for most, squares in (value(costs, cut, placement) for cut in cuts) if most <= limit)
    most, squares = value(costs, balance(costs, placement, slack), placement)
    assert most <= limit and squares == oracle


def test_a_heavy_head_stands_beside_a_light_first_stage() -> None:
    """An embedding, 14 blocks and a head like five of them: two layers a stage would be 7.5 on rank 0. With the head
    and the embedding it has 5.5, which no cut can take from it, and three ranks share the blocks."""
    costs = [0.5, *[1.0] * 14, 5.0]
    assert rank_loads(costs, range(0, 17, 2), v(4)) == (7.5, 4, 4, 4)
    bounds = balance(costs, v(4))
    assert stage_loads(costs, bounds)[0] == 0.5
    first, *others = rank_loads(costs, bounds, v(4))
    assert first == 5.5 and sorted(others) == [4, 5, 5]


def test_ranks_are_balanced_where_stages_cannot_be() -> None:
    """Stages of 3 and 1, and 1 and 3: each rank has 4, though the two stages of each rank differ."""
    assert rank_loads([3, 1, 1, 3, 1, 3, 3, 1], (0, 1, 2, 3, 4, 5, 6, 7, 8), interleaved(4)) == (4, 4, 4, 4)
    costs = [1, 5, 1, 5]
    assert balance(costs, interleaved(2)) == (0, 1, 2, 3, 4)
    assert rank_loads(costs, balance(costs, v(2)), v(2)) == (6, 6)


@pytest.mark.parametrize("placement", [linear(64), v(32), interleaved(32)], ids=lambda placement: placement.name)
def test_200_layers_in_64_stages(placement: Placement) -> None:
    """Within seconds, and where all layers cost the same not above the fewest layers that a rank can have."""
    began = time.process_time()
    costs = [1.0] * 200
    most = max(rank_loads(costs, balance(costs, placement), placement))
    assert most == -(-200 // placement.ranks)
    costs = [0.1, *[1.0] * 198, 10.0]
    most = max(rank_loads(costs, balance(costs, placement), placement))
    assert most == pytest.approx({"linear": 10.0, "v": 10.1, "interleaved": 11.0}[placement.name])
    assert time.process_time() - began < 20


@pytest.mark.parametrize("bounds, message", [
    ([0, 2, 4], "the partition has 3 bounds: 4 stages need 5"),
    ([], "the partition has 0 bounds: 4 stages need 5"),
    ([1, 2, 3, 4, 6], "the partition goes from 1 to 6: it must go from 0 to 6"),
    ([0, 1, 2, 3, 7], "the partition goes from 0 to 7: it must go from 0 to 6"),
    ([0, 2, 2, 4, 6], "the partition's bounds 2, 2 leave stage 1 without a layer: they must increase"),
    ([0, 3, 2, 4, 6], "the partition's bounds 3, 2 leave stage 1 without a layer: they must increase"),
    ([0, 9, 3, 4, 6], "the partition's bounds 9, 3 leave stage 1 without a layer: they must increase"),
])
def test_bad_bounds(bounds: list[int], message: str) -> None:
    with pytest.raises(PartitionError) as error:
        check_bounds(bounds, 4, 6)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("costs, message", [
    ([1, 2], "the partition has costs of 2 layers: the model has 3"),
    ([1, -2, 3], "the partition's cost of layer 1 is -2: must be a number from 0 on"),
    ([1, 2, float("nan")], "the partition's cost of layer 2 is nan"),
    ([1, float("inf"), 3], "the partition's cost of layer 1 is inf"),
    ([(1.0, 1.0, -1.0), 1, 1], "the partition's cost of layer 0 is -1.0"),
    ([0, 0, (0.0, 0.0, 0.0)], "the partition's costs are all 0: at least one layer must cost something"),
])
def test_bad_costs(costs: list[float | tuple[float, float, float]], message: str) -> None:
    with pytest.raises(PartitionError) as error:
        check_costs(costs, 3)
    assert str(error.value).startswith(message)


def test_costs_of_passes_are_added_up() -> None:
    assert check_costs([1, (1.0, 2.0, 0.5), 0.25], 3) == (1.0, 3.5, 0.25)


def test_what_cannot_be_balanced() -> None:
    with pytest.raises(PartitionError, match="3 layers can't fill 4 stages"):
        balance([1, 1, 1], v(2))
    with pytest.raises(ValueError, match="can't be balanced over the placement"):
        balance([1, 1, 1], Placement("v", ((0, 2), (1,))))
