"""One communicator for each direction between two ranks serves every schedule, in the order that NCCL keeps."""

from __future__ import annotations

import random

import pytest
from programs import lower_announced, lowered, of_the_direction, own

from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.builders.forward_only import forward_only
from ds_vshape.schedule.choose import schedule_for
from ds_vshape.schedule.communicators import communicator_of, communicators, communicators_of_ranks
from ds_vshape.schedule.lowering import PostReceive, channels, lower
from ds_vshape.schedule.named import ADAPTIVE, SCHEDULES, build
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.proofs.deadlock import check
from ds_vshape.schedule.proofs.rendezvous import DeadlockError
from ds_vshape.schedule.proofs.synchronization import check_synchronization
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Times


def assert_runs(schedule: Schedule, times: Times) -> None:
    programs = lower(schedule, times)
    check(programs, schedule.placement, of_the_direction)
    check_synchronization(programs, of_the_direction)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_named_schedule(name: str) -> None:
    for ranks, micro_batches in ((1, 1), (2, 1), (2, 7), (3, 5), (4, 8), (5, 16), (8, 24)):
        schedule = build(name, ranks, micro_batches)
        uniform = Times.uniform(schedule.placement.stages)
        assert_runs(schedule, uniform)
        assert_runs(forward_only(schedule.placement, micro_batches), uniform)
        check(lower_announced(schedule, uniform), schedule.placement, of_the_direction)


def adaptive(pick: random.Random) -> tuple[Schedule, Times]:
    ranks, micro_batches = pick.randint(2, 4), pick.randint(2, 9)
    stages = 2 * ranks
    times = Times(*(tuple(pick.choice([0.5, 1.0, 3.0]) for _ in range(stages)) for _ in range(3)),
                  (pick.choice([0.0, 0.4, 5.0]),) * (stages - 1))
    limits = (pick.uniform(0.5, 1.0) * 2 * ranks,) * ranks
    return schedule_for(ADAPTIVE, v(ranks), micro_batches, times, Activations.counted(v(ranks)), limits,
                        time_limit=0.2).schedule, times


def test_plans_for_measured_times() -> None:
    for seed in range(8):
        schedule, times = adaptive(random.Random(seed))
        assert_runs(schedule, times)
        assert_runs(schedule, Times.uniform(schedule.placement.stages))


def test_what_shares_a_communicator_comes_in_one_order() -> None:
    (first, second), placement = lowered("v-half", 2, 2)
    posts = [place for place, step in enumerate(second) if isinstance(step, PostReceive)]
    one, other = next((one, other) for one, other in zip(posts, posts[1:])
                      if second[one].message.channel != second[other].message.channel)
    mixed = list(second)
    mixed[one], mixed[other] = mixed[other], mixed[one]
    check((first, tuple(mixed)), placement, own)
    with pytest.raises(DeadlockError, match=r"^messages 0->1: number \d is sent as \w+ of .* and received as \w+ of"):
        check((first, tuple(mixed)), placement)


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_channel_has_one(name: str) -> None:
    placement = build(name, 8, 16).placement
    assert {communicator_of(channel) for channel in channels(placement)} == set(communicators(placement))
    assert len(communicators(placement)) == 2 * 7 + 2 * (placement.name == "interleaved")


def test_eight_ranks_and_sixty_four_pipelines() -> None:
    placement = build("v-half", 8, 16).placement
    assert communicators_of_ranks(placement) == [2, 4, 4, 4, 4, 4, 4, 2]
    assert 64 * len(communicators(placement)) == 896
