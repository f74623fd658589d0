"""The figures of a schedule: its bound holds for what it does, with the sizes that it is measured with."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_orders import random_schedule

from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.builders.everything import with_everything_recomputed
from ds_vshape.schedule.metrics import measure
from ds_vshape.schedule.named import build
from ds_vshape.schedule.placement import PLACEMENTS
from ds_vshape.schedule.timeline import Times


def test_the_bound_is_for_the_peak_as_it_is() -> None:
    """Recomputed activations are a tenth: a peak of 3.4 isn't one of 2, and C gives memory back."""
    schedule = with_everything_recomputed(build("gpipe", 4, 8))
    found = measure(schedule, Times.uniform(4), activations=Activations((2.0,) * 4, (2.0,) * 4, ((0.2,),) * 4))
    assert max(found.peak_activations) == pytest.approx(8 * 0.2 + 1.8)
    assert 3 * 8 + 3 <= found.lower_bound <= found.makespan


@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from(sorted(PLACEMENTS)), st.randoms(use_true_random=False))
def test_never_above_the_makespan(ranks: int, micro_batches: int, placement: str, dice: random.Random) -> None:
    schedule = random_schedule(ranks, micro_batches, placement, dice)
    stages = schedule.placement.stages
    sizes = [tuple(dice.uniform(0.1, 3) for _ in range(stages)) for _ in range(2)]
    activations = Activations(*sizes, tuple((dice.random() * size,) for size in sizes[0]))
    times = Times(*(tuple(dice.uniform(0.1, 3) for _ in range(stages)) for _ in range(3)))
    found = measure(schedule, times, activations=activations)
    assert found.lower_bound <= found.makespan * (1 + 1e-9)
