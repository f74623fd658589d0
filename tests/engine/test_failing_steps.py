"""A step that fails on one rank fails on all, at the same batch; and training continues unless states differ."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from pipelines import BF16_ZERO1_FP32, FP32, FP32_ZERO1, Job, data
from ranks import run_ranks

SCHEDULER = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}


def failing(owner: Any, name: str) -> Callable[[], None]:
    """Let `owner`'s method raise once; what is called when it's over."""
    method = getattr(owner, name)

    def fail(*args: Any, **kwargs: Any) -> Any:
        setattr(owner, name, method)
        raise ZeroDivisionError(f"no {name} today")

    setattr(owner, name, fail)
    return lambda: setattr(owner, name, method)


def optimizer_fails(engine: Any) -> None:
    failing(getattr(engine.optimizer, "optimizer", engine.optimizer), "step")


def scheduler_fails(engine: Any) -> None:
    failing(engine.lr_scheduler, "step")


def monitor_fails(engine: Any) -> None:
    failing(engine.monitor.csv_monitor, "write_events")


def before_all_exchanges(engine: Any) -> None:
    failing(engine.optimizer, "step")


def error_of(act: Callable[[], Any]) -> str:
    with pytest.raises(Exception) as error:
        act()
    return "; ".join([f"{type(error.value).__name__}: {error.value}", *getattr(error.value, "__notes__", [])])


def train(rank: int, job: Job, fail: Callable[[Any], None], where: int, folder: str) -> tuple[list[float], list[float],
                                                                                           list[str]]:
    """Losses without a failure and with one in batch 1, from a checkpoint where that is asked for; and the errors."""
    engine = job.engine()
    oracle = [float(engine.train_batch(data(engine, batch))) for batch in range(3)]
    engine = job.engine()
    losses = [float(engine.train_batch(data(engine, 0)))]
    engine.save_checkpoint(folder)
    if rank == where or where < 0:
        fail(engine)
    errors = [error_of(lambda: engine.train_batch(data(engine, 1)))]
    if "may differ" in errors[0]:
        errors += [error_of(lambda: engine.train_batch(data(engine, 1))),
                   error_of(lambda: engine.eval_batch(data(engine, 1))),
                   error_of(lambda: engine.save_checkpoint(folder))]
        engine.load_checkpoint(folder)
    if "the step is done" not in errors[0]:
        losses.append(float(engine.train_batch(data(engine, 1))))
    losses.append(float(engine.train_batch(data(engine, 2))))
    return oracle, losses, errors


@pytest.mark.parametrize(["config", "fail"], [(FP32, optimizer_fails), (FP32_ZERO1, optimizer_fails),
                                              (BF16_ZERO1_FP32, optimizer_fails), (FP32_ZERO1, scheduler_fails)])
def test_states_that_differ_are_not_trained_on(config: Any, fail: Callable[[Any], None], tmp_path: Path) -> None:
    """Not before a checkpoint is loaded, from which training continues as if nothing had happened."""
    job = Job("v-half", 2, 4, {**config, **SCHEDULER})
    results = run_ranks(2, train, job, fail, 1, str(tmp_path))
    for (oracle, losses, errors), kind in zip(results, ["PipelineError", "ZeroDivisionError"], strict=True):
        assert losses == oracle
        assert errors[0].startswith(kind) and "no step today" in errors[0]
        assert "OptimizerStep on pipeline rank 1, replica 0 (global rank 1 on " in errors[0]
        assert len(errors) == 4
        for refused in errors[1:]:
            assert refused.startswith("PipelineError: a step has failed on some ranks: ") and "load_ch" in refused


def test_replicas_go_through_their_exchanges(tmp_path: Path) -> None:
    """The others of a ZeRO-1 step exchange their weights after the optimizer has failed on one."""
    job = Job("v-half", 2, 4, {**FP32_ZERO1, "gradient_clipping": 1.0})
    for oracle, losses, errors in run_ranks(4, train, job, optimizer_fails, 2, str(tmp_path)):
        assert losses == oracle and "no step today" in errors[0] and len(errors) == 4


def test_a_failure_before_any_rank_has_stepped(tmp_path: Path) -> None:
    """On all ranks: nothing is changed, and the batch can be tried again."""
    for oracle, losses, errors in run_ranks(2, train, Job("v-half", 2, 4, FP32_ZERO1), before_all_exchanges, -1,
                                            str(tmp_path)):
        assert losses == oracle
        assert len(errors) == 1 and "no rank counts this batch" in errors[0]


def monitored(folder: Path, **more: Any) -> dict[str, Any]:
    """A config with a monitor that writes into `folder`."""
    csv = {"enabled": True, "output_path": str(folder / "csv"), "job_name": "job"}
    return {**FP32_ZERO1, "csv_monitor": csv, **more}


@pytest.mark.parametrize("every", [1e9, 1], ids=["never", "each batch"])
def test_a_monitor_that_fails(every: float, tmp_path: Path) -> None:
    """All ranks raise; the step counts. Where reports are due, which are collective, all ranks come to them."""
    job = Job("v-half", 2, 4, monitored(tmp_path, steps_per_print=every))
    for oracle, losses, errors in run_ranks(2, train, job, monitor_fails, 0, str(tmp_path)):
        assert losses == [oracle[0], oracle[2]]
        assert len(errors) == 1 and "no write_events today" in errors[0]
        assert "the step is done on all ranks, as number 2" in errors[0]


def train_with_reports(rank: int, config: dict[str, Any]) -> tuple[list[float], list[str]]:
    """DeepSpeed's profile of the first batch can't be written, then no event of an evaluation can."""
    engine = Job("v-half", 2, 4, config).engine()
    errors = [error_of(lambda: engine.train_batch(data(engine, 0)))]
    if rank == 0:
        monitor_fails(engine)
    errors.append(error_of(lambda: engine.eval_batch(data(engine, 0))))
    return [float(engine.eval_batch(data(engine, 0))), float(engine.train_batch(data(engine, 1)))], errors


def test_reports_that_fail_on_their_one_rank(tmp_path: Path) -> None:
    config = monitored(tmp_path, steps_per_print=1, flops_profiler={
        "enabled": True, "profile_step": 0, "output_file": str(tmp_path / "job.txt" / "profile")})
    (tmp_path / "job.txt").write_text("a file, and no folder")
    first, second = run_ranks(2, train_with_reports, config)
    assert first[0] == second[0]
    for profile, events in (first[1], second[1]):
        assert "flops profiler's report on pipeline rank 0" in profile
        assert "the step is done on all ranks, as number 1" in profile
        assert "no write_events today" in events and "monitor on pipeline rank 0" in events
    assert all(told.startswith("PipelineError") for told in second[1])


def train_past_two_errors(rank: int, config: dict[str, Any]) -> tuple[list[float], list[float], str]:
    """The monitor fails while a step is validated, in a batch whose data fail too."""
    job = Job({"name": "v-half", "optimizer_post_validation": True}, 2, 4, config)
    engine = job.engine()
    oracle = [float(engine.train_batch(data(engine, batch))) for batch in range(5)]
    engine = job.engine()
    losses = [float(engine.train_batch(data(engine, batch))) for batch in range(2)]
    if rank == 0:
        monitor_fails(engine)
    told = error_of(lambda: engine.train_batch(islice(data(engine, 2), 3)))
    losses += [float(engine.train_batch(data(engine, batch))) for batch in range(2, 5)]
    return oracle, losses, told


def test_an_error_of_a_report_fails_no_later_batch(tmp_path: Path) -> None:
    """If the batch in which it came has failed for something else."""
    for oracle, losses, told in run_ranks(2, train_past_two_errors, monitored(tmp_path)):
        assert losses == oracle and told.startswith("StopIteration")


def train_validated_later(rank: int, job: Job) -> tuple[list[float], list[float], str]:
    engine = job.engine()
    oracle = [float(engine.train_batch(data(engine, batch))) for batch in range(4)]
    engine = job.engine()
    losses = [float(engine.train_batch(data(engine, batch))) for batch in range(2)]
    if rank:
        optimizer_fails(engine)
    assert float(engine.train_batch(data(engine, 2))) == oracle[2]
    told = error_of(lambda: engine.train_batch(data(engine, 3)))
    losses += [float(engine.train_batch(data(engine, batch))) for batch in (2, 3)]
    return oracle, losses, told


def test_a_step_that_is_validated_later_is_taken_back() -> None:
    job = Job({"name": "v-half", "optimizer_post_validation": True}, 2, 4, FP32_ZERO1)
    for oracle, losses, told in run_ranks(2, train_validated_later, job):
        assert losses == oracle
        assert "no step today" in told and "while the batch before was validated" in told


def train_into_a_wait(rank: int) -> str:
    """What is raised where one rank fails before DeepSpeed's step asks the others for anything."""
    engine = Job({"name": "v-half", "timeout_seconds": 4}, 2, 4, FP32_ZERO1).engine()
    engine.train_batch(data(engine, 0))
    if rank:
        before_all_exchanges(engine)
    return error_of(lambda: engine.train_batch(data(engine, 1)))


def test_a_failure_for_which_others_wait_within_the_step() -> None:
    """These can't continue, and say why."""
    for told in run_ranks(2, train_into_a_wait, timeout=90):
        assert told.startswith("PeerLost: pipeline rank ")
        assert ": pipeline rank 1 has failed (replica 0, global rank 1, on " in told
        assert "OptimizerStep on pipeline rank 1" in told and "ZeroDivisionError: no step today" in told
        assert "; waiting for it: rank 0 in OptimizerStep" in told
