"""Reports that a script asks for on one rank alone: what is known there, or an error that names the others."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pipelines import FP32_ZERO1, Job, data, specs
from ranks import RanksFailed, run_ranks

from ds_vshape.measure.rank_memory import RankMemory

SECONDS = 4


def trained() -> Any:
    """An engine after the batches in which all is measured."""
    engine = Job({"name": "v-half", "timeout_seconds": SECONDS}, 2, 4, FP32_ZERO1, tuple(specs(4))).engine()
    for batch in range(2):
        engine.train_batch(data(engine, batch))
    return engine


def asked(rank: int, ranks: tuple[int, ...]) -> tuple[RankMemory, ...]:
    engine = trained()
    found = engine.memory_report() if rank in ranks else ()
    engine.train_batch(data(engine, 2))
    # Of another number of micro-batches, once there is a plan for it.
    engine.set_train_batch_size(engine.train_batch_size() // 2)
    engine.train_batch(data(engine, 3))
    return found + engine.memory_report() if rank in ranks else found


def test_one_rank_knows_the_memory_of_all() -> None:
    of_both, (alone, nothing) = run_ranks(2, asked, (0, 1)), run_ranks(2, asked, (0,))
    # The process has other memory each time.
    known = [[(memory.parameters, memory.optimizer, memory.activations_peak, memory.working, memory.batch_end)
              for memory in found] for found in (*of_both, alone)]
    assert known[0] == known[1] == known[2] and len(alone) == 4
    assert alone[0].activations_peak > alone[2].activations_peak
    assert nothing == ()


def asked_alone(rank: int, method: str) -> None:
    engine = trained()
    if rank == 0:
        getattr(engine, method)()
    engine.train_batch(data(engine, 2))


@pytest.mark.parametrize("method", ["pipeline_report", pytest.param("timelines", marks=pytest.mark.slow)])
def test_what_other_ranks_must_say_too_names_them(method: str) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(2, asked_alone, method, timeout=SECONDS + 30)
    told = re.findall(r"PeerLost: pipeline rank 0 on \S+ waits in (\w+): (.*)", str(failed.value))
    assert told, failed.value
    name, why = told[-1]
    assert name == method
    assert re.search(rf"all ranks wait for each other: rank 0 in {method}; rank 1 in \w+", why), why
