"""Plans: each rank lowers and checks its own program, and what is wrong on one is an error on all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from pipelines import SAMPLES, Job, data
from ranks import run_ranks

from ds_vshape.engine import plans as engine_plans
from ds_vshape.engine.plans import Plans
from ds_vshape.health.failures import Agreement
from ds_vshape.health.names import rank_names
from ds_vshape.health.preflight import Preflight
from ds_vshape.health.watch import watch_job
from ds_vshape.schedule.lowering import AwaitSend, Lowering, Program
from ds_vshape.schedule.named import build
from ds_vshape.schedule.proofs.own_proof import NotShown
from ds_vshape.schedule.timeline import Times


def program_of(rank: int, spoil: str) -> str:
    """What a rank's plan is, or its error; with something `spoil`ed first."""
    schedule = build("v-half", 2, 40)
    names = rank_names(["here", "there"], PipeDataParallelTopology(num_pp=2, num_dp=1))
    source: Any = None
    plans = Plans(schedule.placement, rank, schedule.name, source, list, recomputes=False, knows_sizes=lambda: False,
                  agreement=Agreement(names[rank]), preflight=Preflight(watch_job(60.0)))
    all_checked = []
    with pytest.MonkeyPatch.context() as patch:
        whole = engine_plans.check_with_synchronization
        patch.setattr(engine_plans, "check_with_synchronization",
                      lambda *args: all_checked.append(whole(*args)))  # type: ignore[func-returns-value]
        if spoil == "proof" and rank == 1:
            patch.setattr(engine_plans, "show", not_shown)
        try:
            found = plans.program(schedule, without_last_release if spoil == "lowering" else Lowering.programs)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    assert found == Lowering(schedule, Times.uniform(4)).programs()[rank]
    return f"{len(all_checked)} checks of all programs"


def not_shown(*_: object) -> None:
    raise NotShown("spoilt")


def without_last_release(lowering: Lowering, ranks: Sequence[int] | None) -> tuple[Program, ...]:
    """Rank 1 doesn't wait for the last message that it sends."""
    programs = list(map(list, lowering.programs(ranks)))
    for rank, program in zip((0, 1) if ranks is None else ranks, programs):
        if rank == 1:
            del program[max(place for place, step in enumerate(program) if isinstance(step, AwaitSend))]
    return tuple(map(tuple, programs))


def test_a_rank_checks_its_own_and_all_of_them_where_one_could_not() -> None:
    assert run_ranks(2, program_of, "nothing") == ["0 checks of all programs"] * 2
    assert run_ranks(2, program_of, "proof") == ["1 checks of all programs"] * 2


def test_a_program_that_is_wrong_on_one_rank_is_an_error_on_all() -> None:
    first, second = run_ranks(2, program_of, "lowering")
    assert first == second and first.startswith("DeadlockError: rank 1 "), (first, second)


def told_by(call: Callable[[], Any]) -> str:
    try:
        return f"{call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def own_of_one_rank(rank: int) -> list[str]:
    """What ranks are told where one of them has something else than the others, and batches between."""
    engine = Job({"name": "v-half", "timeout_seconds": 10}, 2, 4).engine()
    usual, other = engine.schedule(), build("v-zb", 2, 4)
    cut = replace(usual, orders=(usual.orders[0], tuple(usual.orders[1])[:-1]))
    calls: list[Callable[[], Any]] = [
        lambda: engine.use_schedule((usual, other)[rank]),
        lambda: engine.use_schedule((usual, build("v-half", 2, 5))[rank]),
        lambda: engine.use_schedule((usual, cut)[rank]),
        lambda: engine.use_schedule((build("1f1b", 2, 4), usual)[rank]),
        lambda: engine.set_train_batch_size((2, 3)[rank] * SAMPLES),
        lambda: engine.set_train_batch_size((4 * SAMPLES, 3)[rank])]
    told = []
    for batch, call in enumerate(calls):
        told.append(told_by(call))
        assert float(engine.train_batch(data(engine, batch))) > 0
        assert engine.schedule() == usual
    return told


def test_what_one_rank_alone_has_is_an_error_on_all() -> None:
    schedules, numbers, missing, placement, sizes, illegal = zip(*run_ranks(2, own_of_one_rank, timeout=90))
    for both, names in ((schedules, ("orders = ", 'schedule = "v-half" on rank 0')),
                        (numbers, ("micro-batches = 4 on rank 0", "5 on rank 1")),
                        (sizes, ("train_batch_size = 4 on rank 0", "6 on rank 1")),
                        (illegal, ("train_batch_size = 8 on rank 0", "3 on rank 1"))):
        assert both[0] == both[1] and both[0].startswith("PreflightError: the ranks must have the same: "), both
        assert all(name in both[0] for name in names), both[0]
    assert missing[1].startswith("ScheduleError: ") and missing[1] in missing[0], missing
    assert placement[0].startswith("PipelineError: 1f1b places its stages as ") and placement[0] in placement[1]
