"""Limits on the peak of activations."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ds_vshape.schedule.memory_limit import (MemoryLimitError, check_activation_limit, check_memory_limit,
                                             fraction_of_1f1b, peak_of_1f1b)
from ds_vshape.schedule.named import SCHEDULES, build
from ds_vshape.schedule.schedule import Schedule

SIZES = st.tuples(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 8), st.integers(1, 12))


def peak_fraction(schedule: Schedule) -> Fraction:
    """The most of the model's activations that a rank holds at once, over 1F1B's: by the definition, pass by pass."""
    share = Fraction(1, schedule.placement.stages)
    most = Fraction(0)
    for order in schedule.orders:
        held: set[tuple[int, int]] = set()
        for action in order:
            if action.kind.value == "F":
                held.add((action.stage, action.micro_batch))
            elif action.kind.value in ("W", "BW"):
                held.remove((action.stage, action.micro_batch))
            most = max(most, share * len(held))
    ranks = schedule.placement.ranks
    # 1F1B's first rank holds a p-th of the model for p micro-batches, or for all where there are fewer.
    return most / (Fraction(1, ranks) * min(ranks, schedule.micro_batches))


@settings(max_examples=100)
@given(SIZES)
def test_fractions_are_the_definitions(size: tuple[str, int, int]) -> None:
    schedule = build(*size)
    assert fraction_of_1f1b(schedule) == pytest.approx(float(peak_fraction(schedule)))


@given(st.integers(1, 12), st.integers(1, 24))
def test_1f1b_is_the_unit(ranks: int, micro_batches: int) -> None:
    assert peak_of_1f1b(ranks, micro_batches) == 2 * min(ranks, micro_batches)
    assert fraction_of_1f1b(build("1f1b", ranks, micro_batches)) == 1


@settings(max_examples=50)
@given(SIZES, st.floats(0.05, 2))
def test_what_fits_passes_and_what_does_not_is_told_what_does(size: tuple[str, int, int], limit: float) -> None:
    name, ranks, micro_batches = size
    fraction = {other: float(peak_fraction(build(other, ranks, micro_batches))) for other in SCHEDULES}
    assume(all(abs(limit - value) > 1e-6 for value in fraction.values()))
    schedule = build(*size)
    check_memory_limit(schedule, None)
    if fraction[name] < limit:
        check_memory_limit(schedule, limit)
        check_activation_limit(schedule, limit * peak_of_1f1b(ranks, micro_batches))
        return
    with pytest.raises(MemoryLimitError) as caught:
        check_memory_limit(schedule, limit)
    message = str(caught.value)
    assert message.startswith(f"memory_limit = {limit:g}: {name} needs {fraction[name]:.3g} of 1F1B's peak activations "
                              f"on {ranks} ranks with {micro_batches} micro-batches. Within the limit: ")
    assert set(re.findall(r"([\w-]+) \(", message)) == {other for other, value in fraction.items() if value < limit}
    assert message.endswith(f"with {min(fraction.values()):.3g}")
    with pytest.raises(MemoryLimitError, match="u of chunk activations"):
        check_activation_limit(schedule, limit * peak_of_1f1b(ranks, micro_batches))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_limit_that_is_met_exactly_is_met(name: str) -> None:
    for ranks in (3, 7):  # whose fractions no float holds exactly
        schedule = build(name, ranks, 3 * ranks)
        check_memory_limit(schedule, fraction_of_1f1b(schedule))
        check_activation_limit(schedule, fraction_of_1f1b(schedule) * peak_of_1f1b(ranks, 3 * ranks))
        with pytest.raises(MemoryLimitError):
            check_memory_limit(schedule, fraction_of_1f1b(schedule) - 0.01)


def test_the_message_in_both_units() -> None:
    schedule = build("v-zb", 4, 8)
    with pytest.raises(MemoryLimitError) as caught:
        check_memory_limit(schedule, 0.6)
    assert str(caught.value) == (
        "memory_limit = 0.6: v-zb needs 1 of 1F1B's peak activations on 4 ranks with 8 micro-batches. "
        "Within the limit: v-min (0.5); the least is v-min with 0.5")
    with pytest.raises(MemoryLimitError) as caught:
        check_activation_limit(schedule, 6)
    assert str(caught.value) == (
        "memory_limit = 6u: v-zb needs 8u of chunk activations on 4 ranks with 8 micro-batches. "
        "Within the limit: 1f1b-v (6), v-min (4), v-half (6); the least is v-min with 4")
    with pytest.raises(MemoryLimitError, match="Within the limit: none; the least is v-min with 0.5"):
        check_memory_limit(schedule, 0.1)
