"""From the section to a schedule: what the planner is asked for, and that a prediction plans what training does."""

from __future__ import annotations

import json

import pytest

from ds_vshape.config.section import ScheduleConfig
from ds_vshape.config.to_schedule import Room, is_planned, request_for, table_schedule
from ds_vshape.layouts.composition import compose_job
from ds_vshape.layouts.job_costs import predict_job
from ds_vshape.schedule.activations import Activations, Working, peak_activations
from ds_vshape.schedule.memory_limit import MemoryLimitError, fraction_of_1f1b
from ds_vshape.schedule.named import SCHEDULES, TIMED, build
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.request import Request
from ds_vshape.schedule.timeline import Times, simulate
from ds_vshape.schedule.within import peaks_with_passes

EQUAL = Times.uniform(8)
SIZES = Activations((300.0,) * 8, (100.0,) * 8)
WORKING = Working((50.0,) * 8, (90.0,) * 8, (60.0,) * 8, (10.0,) * 8, (20.0,) * 8)
ROOM = Room(SIZES, WORKING, (4000.0, 3900.0, 3800.0, 3700.0))


def test_a_fraction_counts_and_bytes_are_bytes() -> None:
    fraction = request_for(ScheduleConfig(name="adaptive", memory_limit=0.5), 4, 6, EQUAL, ROOM)
    assert (fraction.limits, fraction.activations) == ((4.0,) * 4, Activations.counted(v(4)))
    in_bytes = ScheduleConfig(name="adaptive", memory_limit={"activations": "6KiB"}, times="profile",
                              planning_seconds=3)
    request = request_for(in_bytes, 4, 6, EQUAL, ROOM)
    assert (request.limits, request.activations, request.time_limit) == ((6144.0,) * 4, SIZES, 3)
    assert request.working is None
    of_rank = request_for(ScheduleConfig(name="adaptive", memory_limit="9KiB", times="profile"), 4, 6, EQUAL, ROOM)
    assert (of_rank.limits, of_rank.activations, of_rank.working) == (ROOM.limits, SIZES, WORKING)
    assert Request.from_json(json.loads(json.dumps(of_rank.to_json()))) == of_rank
    unknown = request_for(in_bytes, 4, 6, EQUAL)
    assert (unknown.limits, unknown.activations) == (None, Activations.counted(v(4)))
    unlimited = request_for(ScheduleConfig(name="v-half", times="profile"), 4, 6, EQUAL, ROOM)
    assert (unlimited.name, unlimited.limits, unlimited.activations) == ("v-half", None, Activations.counted(v(4)))
    with pytest.raises(MemoryLimitError, match="the least possible peak on 4 ranks with 6 micro-batches is 0.25"):
        request_for(ScheduleConfig(name="adaptive", memory_limit=0.2), 4, 6, EQUAL)


def test_the_table_has_the_schedule_of_a_name_and_the_fastest_within_a_limit() -> None:
    for name in SCHEDULES:
        assert table_schedule(ScheduleConfig(name=name), 4, 6) == build(name, 4, 6)
        assert not is_planned(ScheduleConfig(name=name))
    with pytest.raises(MemoryLimitError, match="v-zb needs 1 of 1F1B's"):
        table_schedule(ScheduleConfig(name="v-zb", memory_limit=0.75), 4, 6)
    for limit in (0.3, 0.5, 0.75, 1.0):
        fitting = [build(name, 4, 6) for name in TIMED if fraction_of_1f1b(build(name, 4, 6)) <= limit]
        found = table_schedule(ScheduleConfig(name="adaptive", memory_limit=limit), 4, 6)
        assert (found is None) == (not fitting)
        if found is not None:
            assert found in fitting
            assert simulate(found, EQUAL).makespan == min(simulate(each, EQUAL).makespan for each in fitting)
    assert table_schedule(ScheduleConfig(name="adaptive", memory_limit="1KiB", times="profile"), 4, 6) == build(
        "v-min", 4, 6)


@pytest.mark.parametrize("words", [[], ["schedule.times=equal"], ["schedule.memory_limit={activations:700KB}"],
                                   ["schedule.memory_limit=3MB"]])
def test_a_prediction_keeps_to_the_limit_that_training_plans_for(words: list[str]) -> None:
    """Of an adaptive schedule: counted for a fraction, in the cost model's bytes for bytes."""
    job = compose_job(["model=tiny", "schedule=adaptive", "schedule.planning_seconds=0.2", *words])
    section, prediction = job.section, predict_job(job)
    assert section is not None and prediction.schedule.name == "adaptive"
    sizes = prediction.training.activations(job.placement)
    times = prediction.training.times(job.placement, prediction.training.speeds.inside)
    limit, working = section.memory_limit, prediction.training.working(job.placement)
    rooms = tuple(float(limit - of_rank.permanent) for of_rank in prediction.memory) if isinstance(limit, int) else None
    request = request_for(section, 4, 8, times, Room(sizes, working, rooms))
    assert request.limits is not None
    taken = peak_activations(prediction.schedule, request.activations)
    if isinstance(limit, int):
        taken = peaks_with_passes(prediction.schedule, sizes, working)
        assert all(of_rank.total <= limit for of_rank in prediction.memory)
    assert all(peak <= limit * (1 + 1e-9) for peak, limit in zip(taken, request.limits, strict=True))
