"""The planning process: whatever happens to it is one error in bounded time, and training continues."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from eventually import eventually
from internals import planner_of
from logged import Lines
from pipelines import Job, data, train
from ranks import RanksFailed, run_ranks

from ds_vshape.engine import planning
from ds_vshape.engine.planning import PlannerFailed, PlanningProcess
from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.builders.fuse import unfused
from ds_vshape.schedule.named import build
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.request import Request, answer, read_answer
from ds_vshape.schedule.serial import schedule_to_json
from ds_vshape.schedule.timeline import Times

pytestmark = pytest.mark.usefixtures("cache")
REQUEST = Request("v-half", v(2), 4, Times.uniform(4), Activations.counted(v(2)), None, 1.0, None)
LIMITED = replace(REQUEST, name="adaptive", limits=(3.0, 3.0))


def code(text: str) -> list[str]:
    """A planner that runs `text`."""
    return ["-c", f"import json, os, sys, time\n{text}"]


def prints(text: str) -> list[str]:
    return code(f"sys.stdout.write({text!r})")


def answers(name: str = "v-half", micro_batches: int = 4, **more: Any) -> list[str]:
    schedule = schedule_to_json(replace(build("v-half", 2, micro_batches), name=name))
    return prints(json.dumps({"schedule": schedule, "lower_bound": 1.0, "planning_s": 1.0, **more}))


def orders_that_wait() -> list[str]:
    """Each rank begins with its second chunk, whose inputs come from its first."""
    schedule = schedule_to_json(build("v-half", 2, 4))
    schedule["orders"] = [sorted(order, key=lambda action: -action[1]) for order in schedule["orders"]]
    return prints(json.dumps({"schedule": schedule, "lower_bound": 1.0, "planning_s": 1.0}))


def test_a_choice_is_no_slower_than_what_has_run(processor_time: None) -> None:
    """A busy planner may find less than an earlier one did for other times."""
    times = Times((5.0, 6.0, 7.0, 5.0, 4.0, 6.0, 7.0, 9.0), (8.0, 7.0, 9.0, 10.0, 8.0, 8.0, 7.0, 12.0),
                  (3.0, 4.0, 2.0, 5.0, 3.0, 4.0, 3.0, 6.0))
    request = Request.within(4.5, "adaptive", v(4), 9, times, time_limit=2.0)
    running, hasty = request.choose(), replace(request, time_limit=0.0)
    before = hasty.choose()
    assert running.timeline.makespan < before.timeline.makespan
    # As ranks run it while they measure: B and W apart.
    asked = replace(hasty, running=(unfused(running.schedule), before.schedule))
    found = Request.from_json(json.loads(json.dumps(asked.to_json()))).choose()
    assert found.schedule == running.schedule
    assert (found.timeline, found.peaks, found.lower_bound) == (running.timeline, running.peaks, running.lower_bound)
    # One that takes more than the limits allow isn't chosen.
    less = replace(asked, limits=(3.0,) * 4)
    assert less.choose().schedule == replace(less, running=()).choose().schedule


SIGNS = "while True: os.utime(1); time.sleep(0.05)"
# What the planner does, what is asked, and what is told.
FAILING: dict[str, tuple[list[str], Request, str]] = {
    "ends at once": (["--no-such-option"], REQUEST, "ended with status 2"),
    "raises": (code("raise MemoryError"), REQUEST, "ended with status 1"),
    "is killed": (code("os.kill(os.getpid(), 9)"), REQUEST, "ended with status -9"),
    "says nothing": (code(""), REQUEST, "an invalid answer: Invalid JSON"),
    "garbage": (prints("all is well\n"), REQUEST, "an invalid answer: Invalid JSON"),
    "no text": (code("sys.stdout.buffer.write(bytes(range(256)))"), REQUEST, "an invalid answer: Invalid"),
    "a warning before the answer": (prints("a warning\n" + answers()[1]), REQUEST, "an invalid answer"),
    "cut off": (prints('{"schedule": {"name": "v-half"'), REQUEST, "an invalid answer: Invalid JSON"),
    "deep": (prints("[" * 2000), REQUEST, "an invalid answer"),
    "a list": (prints("[1, 2]"), REQUEST, "an invalid answer"),
    "an empty answer": (prints("{}"), REQUEST, "an invalid answer"),
    "an error that is none": (prints('{"error": 3}'), REQUEST, "an invalid answer"),
    "too much": (code("sys.stdout.write('x' * 10**7)"), REQUEST, "wrote more than"),
    "too much without an end": (code("while True: sys.stdout.write('x' * 10**5)"), REQUEST, "wrote more than"),
    "another schedule": (answers("v-zb"), REQUEST, "it is 'v-zb' for 2 ranks"),
    "another batch": (answers(micro_batches=5), REQUEST,
                      "5 micro-batches, not 'v-half' for 2 ranks (v, 2 stages each) and 4"),
    "too much memory": (answers("adaptive"), replace(LIMITED, limits=(2.0, 2.0)), "more memory than the limits"),
    "orders that get stuck": (orders_that_wait(), REQUEST, "can't run"),
    "an infinite bound": (answers(lower_bound=float("inf")), REQUEST, "lower_bound"),
    "no planning time": (answers(planning_s="long"), REQUEST, "planning_s"),
    "no sign of life": (code("time.sleep(1000)"), REQUEST, "no sign of life for 0.6 s: is it stopped?"),
    "too late": (code(SIGNS), REQUEST, "wasn't done 0.8 s after its 0.1 s"),
}


def failure_of(request: Request, seconds: float = 60.0) -> str:
    """The error of a planner, which has ended by then."""
    deadline = time.monotonic() + seconds
    process = PlanningProcess(request)
    with pytest.raises(PlannerFailed) as failed:
        while process.answer(0.1) is None:
            assert time.monotonic() < deadline
    assert planner_of(process).poll() is not None
    return str(failed.value)


@pytest.mark.parametrize("name", FAILING)
def test_a_planner_that_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, request, told = FAILING[name]
    monkeypatch.setattr(planning, "WORKER", worker)
    monkeypatch.setattr(planning, "SILENT_SECONDS", 0.6 if name == "no sign of life" else 60.0)
    monkeypatch.setattr(planning, "LATE_SECONDS", 0.8 if name == "too late" else 60.0)
    assert told in failure_of(replace(request, time_limit=0.1))


def test_a_suspended_job_is_no_late_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours pass between two looks, in which the planner was suspended too."""
    monkeypatch.setattr(planning, "WORKER", code("time.sleep(1000)"))
    process = PlanningProcess(REQUEST)
    assert process.answer(0.1) is None
    real = time.monotonic
    monkeypatch.setattr(planning.time, "monotonic", lambda: real() + 36_000)
    assert process.answer(0.1) is None
    process.stop()


def raising(error: Exception) -> Callable[..., Any]:
    def raise_it(*_: Any, **__: Any) -> Any:
        raise error

    return raise_it


@pytest.mark.parametrize("where, error", [
    ("subprocess.Popen", BlockingIOError(11, "Resource temporarily unavailable")),
    ("subprocess.Popen", MemoryError()),
    ("os.memfd_create", OSError(24, "Too many open files"))])
def test_a_planner_that_cannot_start(where: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"ds_vshape.engine.planning.{where}", raising(error))
    with pytest.raises(PlannerFailed, match=f"can't start: {type(error).__name__}"):
        PlanningProcess(REQUEST)


def answered(request: Request, seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    process = PlanningProcess(request)
    while (text := process.answer(0.1)) is None:
        assert time.monotonic() < deadline
    return read_answer(text)


def test_it_needs_neither_programs_nor_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No `nice`, no folder for temporary files, no home; and a limit that can't be met isn't the planner's failure."""
    for name in ("PATH", "TMPDIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "gone"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert answered(REQUEST)["schedule"] == build("v-half", 2, 4)
    assert "can't be met" in answered(replace(LIMITED, limits=(1.0, 1.0)))["error"]


def test_only_a_limit_that_cannot_be_met_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other error of the planner's is its own."""
    monkeypatch.setattr("ds_vshape.schedule.request.schedule_for", raising(ValueError("a batch got stuck")))
    with pytest.raises(ValueError, match="stuck"):
        answer(REQUEST)


def fork_with_a_planner(worker: list[str], hangup: signal.Handlers) -> tuple[int, int]:
    """The processes of a rank that waits and of its planner, for which SIGHUP is as nohup leaves it or not."""
    out, into = os.pipe()
    rank = os.fork()
    if not rank:
        try:
            signal.signal(signal.SIGHUP, hangup)
            planning.WORKER = worker
            process = PlanningProcess(replace(REQUEST, name="adaptive", time_limit=600.0))
            os.write(into, str(planner_of(process).pid).encode())
            time.sleep(600)
        finally:
            os._exit(1)
    os.close(into)
    planner = int(os.read(out, 20))
    os.close(out)
    return rank, planner


STARTS_LATE = code("time.sleep(3)\nfrom ds_vshape.schedule.worker import main\nmain()")


@pytest.mark.parametrize("hangup", [signal.SIG_DFL, signal.SIG_IGN])
@pytest.mark.parametrize("worker, is_ready", [(planning.WORKER, True), (STARTS_LATE, False)])
def test_a_stopped_planner_does_not_outlive_its_rank(worker: list[str], is_ready: bool,
                                                     hangup: signal.Handlers) -> None:
    """Neither one that has asked to end with its parent, nor one that hasn't come to that."""
    rank, pid = fork_with_a_planner(worker, hangup)
    planner = psutil.Process(pid)
    try:
        before = os.getpriority(os.PRIO_PROCESS, 0)
        if is_ready:
            eventually("the planner has lowered its priority", lambda: planner.nice() != before)
        planner.suspend()
    finally:
        os.kill(rank, signal.SIGKILL)
        os.waitpid(rank, 0)
    try:
        # The process that adopts it may take its time to collect its status.
        eventually("the planner has ended",
                   lambda: not planner.is_running() or planner.status() == psutil.STATUS_ZOMBIE, 20)
    finally:
        if planner.is_running():
            planner.kill()


# -- in a job


def losses_of(job: Job, batches: int) -> tuple[list[float], list[str], str]:
    """The losses, the log lines about the planner, and the schedule at the end."""
    with Lines() as lines:
        engine = job.engine()
        losses = train(engine, range(batches)).losses
    return losses, lines.with_word("planning process"), engine.schedule().name


# Times that move don't matter here.
PROFILED = {"name": "v-half", "times": "profile", "planning_seconds": 0.5, "drift": 1000}


def train_by_failing_planners(rank: int) -> Iterator[Any]:
    planning.SILENT_SECONDS = 1.0
    found = {}
    for name in ("garbage", "no sign of life"):
        planning.WORKER = FAILING[name][0]
        found[name] = losses_of(Job(PROFILED, 2, 3), 80 if name == "no sign of life" else 20)
    real, subprocess.Popen = subprocess.Popen, raising(BlockingIOError(11, "no more processes"))
    found["can't start"] = losses_of(Job(PROFILED, 2, 3), 10)
    # No schedule is there yet: the table's, where one keeps to the limit.
    found["first plan"] = losses_of(Job({"name": "adaptive", "planning_seconds": 0.5}, 2, 3), 5)
    subprocess.Popen = real
    planning.WORKER = code("os.kill(os.getpid(), 19)")
    found["first plan stopped"] = losses_of(Job({"name": "adaptive", "planning_seconds": 0.5}, 2, 3), 5)
    return found


def train_plainly(rank: int) -> list[float]:
    return train(Job(None, 2, 3).engine(), range(80)).losses


@pytest.mark.slow
def test_training_goes_on_whatever_the_planner_does() -> None:
    """With DeepSpeed's losses, one line in the log of rank 0, and nothing said by others."""
    first, second = run_ranks(2, train_by_failing_planners, timeout=180)
    oracle = run_ranks(2, train_plainly)[0]
    for name, (losses, lines, schedule) in first.items():
        assert losses == second[name][0] == oracle[:len(losses)], name
        line, = lines
        assert not second[name][1]
        if name.startswith("first plan"):
            assert f"Training uses {schedule}, the fastest schedule of the table within the limit" in line
        else:
            assert schedule == "v-half" and "pipeline_schedule v-half stays as it is: the planning process" in line


def start_without_a_plan(rank: int) -> None:
    planning.SILENT_SECONDS = 1.0
    planning.WORKER = code("os.kill(os.getpid(), 19)")
    engine = Job({"name": "adaptive", "memory_limit": 0.75, "planning_seconds": 0.5}, 2, 6).engine()
    engine.train_batch(data(engine, 0))


def test_no_schedule_at_all_is_one_error_on_every_rank() -> None:
    """Nothing of the table keeps to three quarters of 1F1B's peak on two ranks."""
    with pytest.raises(RanksFailed) as failed:
        run_ranks(2, start_without_a_plan)
    told = "no sign of life for 1 s: is it stopped?. No schedule of the table is within the limit"
    assert str(failed.value).count(told) == 2


def lose_rank_0(rank: int) -> None:
    # The planning process's parent is rank 0, and the others wait for its answer by now.
    planning.WORKER = code("for _ in range(20): os.utime(1); time.sleep(0.05)\nos.kill(os.getppid(), 9)")
    section = {"name": "adaptive", "memory_limit": 0.75, "planning_seconds": 600, "timeout_seconds": 20}
    Job(section, 2, 6).engine()


def test_a_rank_lost_while_others_wait_for_its_planner() -> None:
    with pytest.raises(RanksFailed, match="PeerLost: not all ranks asked for the planner's answer"):
        run_ranks(2, lose_rank_0, timeout=60)
