"""Micro-batches of different lengths: their times, and the order in which ranks wait least."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import permutations

import pytest

from ds_vshape.schedule.builders.micro_batch_order import in_order, micro_batch_order, rising_and_falling
from ds_vshape.schedule.named import build
from ds_vshape.schedule.passes import BW, B, F, W
from ds_vshape.schedule.serial import times_from_json, times_to_json
from ds_vshape.schedule.timeline import Times, simulate


def long_tailed(count: int, seed: int, sigma: float = 0.7) -> tuple[float, ...]:
    """Scales with a mean of 1, lognormal as lengths of texts are."""
    dice = random.Random(seed)
    lengths = [dice.lognormvariate(0, sigma) for _ in range(count)]
    return tuple(length * count / sum(lengths) for length in lengths)


def test_times_by_micro_batch() -> None:
    times = Times((1, 2), (3, 4), (5, 6), (0.5,), (1, 2, 0.25))
    assert [times.of(action) for action in (F(1, 1), B(0, 2), W(1, 0), BW(0, 1))] == [4, 0.75, 6, 16]
    assert times.of(W(1, 2).cut(3)[1]) == 0.5
    assert times_from_json(times_to_json(times)) == times
    # Two forwards of 1 and 2 on the first rank; the second one waits for each, and then for the backward of the other.
    timeline = simulate(build("1f1b", 2, 1), Times((1, 1), (1, 1), (0, 0), (), (3,)))
    assert timeline.makespan == 12


def test_in_order_of_the_places() -> None:
    assert in_order(Times((1,), (1,), (1,), (), (10, 20, 30)), (2, 0, 1)).scales == (30, 10, 20)


def test_rising_and_falling() -> None:
    scales = (5, 1, 4, 2, 3)
    assert [[scales[i] for i in rising_and_falling(scales, share)] for share in (1, 0, 0.5)] == [
        [1, 2, 3, 4, 5], [5, 4, 3, 2, 1], [2, 4, 5, 3, 1]]


def test_the_order_of_the_data_where_all_are_alike() -> None:
    schedule = build("v-half", 2, 4)
    for scales in ((), (2.0,) * 4):
        assert micro_batch_order(schedule, replace(Times.uniform(4), scales=scales)) == (0, 1, 2, 3)


@pytest.mark.parametrize("name", ["1f1b", "v-half", "v-zb"])
def test_near_the_best_of_all_orders(name: str) -> None:
    schedule = build(name, 2, 6)
    for seed in range(3):
        times = replace(Times.uniform(schedule.placement.stages), scales=long_tailed(6, seed))
        spans = [simulate(schedule, in_order(times, order)).makespan for order in permutations(range(6))]
        chosen = simulate(schedule, in_order(times, micro_batch_order(schedule, times))).makespan
        assert min(spans) <= chosen <= min(1.08 * min(spans), spans[0])


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "v-min", "v-half", "v-zb"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_wins_back_half_of_the_added_bubble(name: str, ranks: int) -> None:
    """Summed over batches; the work is the same, so that makespans differ by the bubble alone."""
    schedule = build(name, ranks, 4 * ranks)
    alike = Times.uniform(schedule.placement.stages)
    even = simulate(schedule, alike).makespan
    added = left = 0.0
    for seed in range(5):
        times = replace(alike, scales=long_tailed(4 * ranks, seed))
        added += simulate(schedule, times).makespan - even
        left += simulate(schedule, in_order(times, micro_batch_order(schedule, times))).makespan - even
    assert added > 0.25 * even and left < added / 2


def test_large_batches_are_ordered_without_simulations() -> None:
    schedule = build("1f1b", 32, 256)
    times = replace(Times.uniform(32), scales=long_tailed(256, 0))
    assert micro_batch_order(schedule, times) == rising_and_falling(times.scales, 0.5)
