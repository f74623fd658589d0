"""Which rank is lost, judged by the reports of ranks alone; no process is needed for that."""

from __future__ import annotations

import pytest

from ds_vshape.health.attendance import Attendance, JobLost, Status

SECONDS = 100.0
WORKING = Status()


def all_here(*ranks: int) -> Attendance:
    attendance = Attendance(ranks, SECONDS)
    for rank in ranks:
        attendance.heard(rank, 0.0, WORKING)
    return attendance


def test_who_tells_something_is_there() -> None:
    attendance = all_here(0, 1, 2)
    for now in (99.0, 198.0, 297.0):
        for rank in range(3):
            attendance.heard(rank, now, WORKING)
        assert attendance.complete and attendance.loss(now + 99.0) is None
    assert attendance.silent(300.0, 10.0) == [] and attendance.silent(310.0, 10.0) == [0, 1, 2]


def test_the_first_loss_is_the_jobs() -> None:
    """What comes after it is its consequence."""
    attendance = all_here(0, 1, 2)
    attendance.gone(2)
    attendance.gone(1)
    assert attendance.loss(1.0) == attendance.loss(1000.0) == JobLost(2, "its process has ended")


def test_a_silent_rank() -> None:
    attendance = all_here(0, 1)
    attendance.heard(0, 50.0)
    assert attendance.loss(100.0) is None
    loss = attendance.loss(100.5)
    assert loss is not None and loss.rank == 1 and "no sign of life for 100 seconds" in loss.why


def test_a_rank_that_does_not_come() -> None:
    attendance = Attendance(range(3), SECONDS)
    for now in (0.0, 90.0):
        attendance.heard(0, now)
        attendance.heard(2, now)
    assert not attendance.complete and attendance.loss(100.0) is None
    loss = attendance.loss(101.0)
    assert loss is not None and loss.rank == 1 and "hasn't reached its PipelineModule" in loss.why


def test_a_script_that_ends_well_is_no_loss_and_one_that_fails_is() -> None:
    attendance = all_here(0, 1, 2)
    attendance.left(1, "")
    attendance.gone(1)
    attendance.heard(0, 500.0, WORKING)
    attendance.heard(2, 500.0, WORKING)
    assert attendance.loss(500.0) is None
    attendance.left(2, "ZeroDivisionError: division by zero")
    assert attendance.loss(500.0) == JobLost(2, "its script has ended in ZeroDivisionError: division by zero")


@pytest.mark.parametrize(["waits", "stuck"], [((99.0, 300.0), False), ((100.0, 100.0), True), ((0.0, 300.0), False)])
def test_ranks_that_wait_for_each_other(waits: tuple[float, float], stuck: bool) -> None:
    attendance = Attendance(range(2), SECONDS)
    for rank, seconds in enumerate(waits):
        attendance.heard(rank, 0.0, Status(seconds, f"place {rank}"))
    loss = attendance.loss(1.0)
    assert (loss is not None) is stuck
    assert loss is None or loss == JobLost(None, "all ranks wait for each other: rank 0 in place 0; rank 1 in place 1")


def test_a_failure_that_others_wait_for() -> None:
    """They will wait soon; but a rank that is busy may still learn of it."""
    failed = Status(20.0, "AgreeOnBatch", "OptimizerStep on rank 1: ValueError: no")
    for waits in (5.0, 20.0):
        attendance = all_here(0, 1, 2)
        attendance.heard(1, 1.0, failed)
        attendance.heard(0, 1.0, Status(20.0, "OptimizerStep"))
        attendance.heard(2, 1.0, Status(waits, "OptimizerStep"))
        expected = JobLost(1, "OptimizerStep on rank 1: ValueError: no; waiting for it: ranks 0, 2 in OptimizerStep",
                        "has failed")
        assert attendance.loss(1.0) == (expected if waits > 10.0 else None)


def test_a_script_that_has_ended_and_others_wait_for() -> None:
    attendance = all_here(0, 1)
    attendance.left(1, "")
    attendance.heard(0, 1.0, Status(11.0, "save_checkpoint"))
    assert attendance.loss(1.0) == JobLost(1, "its script has ended; waiting for it: rank 0 in save_checkpoint")
