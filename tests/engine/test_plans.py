"""Plans: each rank lowers and checks its own program, and what is wrong on one is an error on all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from ranks import run_ranks

from ds_vshape.engine import plans as engine_plans
from ds_vshape.engine.plans import Plans
from ds_vshape.health.failures import Agreement
from ds_vshape.health.names import rank_names
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
                  agreement=Agreement(names[rank]))
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
