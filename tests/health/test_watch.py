"""A rank that is killed or stopped, whatever it is at: every other one ends, soon, and says which it was.

And one that works on something for long, or is stopped and goes on in time, isn't taken for lost.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from deepspeed.runtime.pipe import engine as stock
from instruction_functions import around_instruction
from internals import replace_probe
from pipelines import FP32_ZERO1, Block, Job, data, specs
from ranks import RanksFailed, run_ranks

from ds_vshape.runtime import instructions as instr

RANKS, SECONDS = 3, 5
# The batch in which, or before which, the rank is lost.
BATCH = 2
# What others may need to hear of it and to end, on a busy machine.
GRACE = 20


class Struck(Block):
    """A block in whose construction or forward pass its process is struck."""

    strike: Callable[[], None] | None = None
    forwards_left = -1

    def __init__(self) -> None:
        if Struck.strike is not None and Struck.forwards_left < 0:
            Struck.strike()
        super().__init__()

    def forward(self, x: Any) -> Any:
        Struck.forwards_left -= 1
        if Struck.forwards_left == 0:
            assert Struck.strike is not None
            Struck.strike()
        return super().forward(x)


def before_the_module(strike: Callable[[], None]) -> None:
    strike()


def in_the_module(strike: Callable[[], None]) -> None:
    Struck.strike = strike


def in_a_new_group(strike: Callable[[], None]) -> None:
    calls, make = iter(range(10**6)), dist.new_group

    def new_group(*args: Any, **kwargs: Any) -> Any:
        return strike() if next(calls) == 4 else make(*args, **kwargs)

    dist.new_group = new_group


def in_the_probe(strike: Callable[[], None]) -> None:
    replace_probe(strike)


def in_the_constructor(strike: Callable[[], None]) -> None:
    stock.PipelineEngine._configure_optimizer = lambda *_: strike()


# Before there is an engine: what is done there, and what the others wait in.
STARTS = {start.__name__: (start, waits) for start, waits in (
    (before_the_module, "PipelineModule"), (in_the_module, "PipelineModule"), (in_a_new_group, "PipelineModule"),
    (in_the_constructor, "initialize"), (in_the_probe, "initialize"))}


def in_instruction(engine: Any, kind: Any, strike: Callable[[], None]) -> None:
    def struck(execute: Callable[[], None]) -> None:
        if engine.global_steps == BATCH:
            strike()
        execute()

    around_instruction(engine, kind, struck)


INSTRUCTIONS = [instr.SplitForwardPass, instr.WeightGradPass, instr.ReturnLoss, instr.AgreeOnBatch,
                instr.ReduceTiedGrads, instr.ReduceGrads, instr.OptimizerStep]


def in_first_batch(engine: Any, strike: Callable[[], None], folder: str) -> None:
    Struck.strike, Struck.forwards_left = strike, 2


def in_inner_step(engine: Any, strike: Callable[[], None], folder: str) -> None:
    engine.optimizer.optimizer.step = lambda *_: strike()


def in_scheduler(engine: Any, strike: Callable[[], None], folder: str) -> None:
    engine.lr_scheduler.step = lambda *_: strike()


def in_save(engine: Any, strike: Callable[[], None], folder: str) -> None:
    engine.checkpoint_engine.save = lambda *_, **__: strike()


def in_load(engine: Any, strike: Callable[[], None], folder: str) -> None:
    engine.checkpoint_engine.load = lambda *_, **__: strike()


def between(engine: Any, strike: Callable[[], None], folder: str) -> None:
    strike()


LATER = {place.__name__: place for place in (in_inner_step, in_scheduler, in_save, in_load, between)}


def train(rank: int, place: str, victim: int, number: int, folder: str) -> str:
    def strike() -> None:
        Path(folder, "struck").write_text(str(time.time()))
        os.kill(os.getpid(), number)

    blocks = specs(2 * RANKS - 2, Struck)
    config = {**FP32_ZERO1, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}
    job = Job({"name": "v-half", "timeout_seconds": SECONDS}, RANKS, 4, config, tuple(blocks))
    if place in STARTS and rank == victim:
        STARTS[place][0](strike)
    engine = job.engine()
    if place == "in_first_batch" and rank == victim:
        in_first_batch(engine, strike, folder)
    for kind in INSTRUCTIONS:
        if place == kind.__name__ and rank == victim:
            in_instruction(engine, kind, strike)
    for batch in range(2 * BATCH):
        if batch == BATCH and place in LATER and rank == victim:
            LATER[place](engine, strike, folder)
        if batch == BATCH and place in ("in_save", "in_load"):
            engine.save_checkpoint(folder)
            engine.load_checkpoint(folder)
        engine.train_batch(data(engine, batch))
    return "done"


def told_by(failure: str) -> dict[int, str]:
    """The last line of each rank."""
    parts = re.split(r"^rank (\d+)(?::| was )", failure, flags=re.MULTILINE)[1:]
    logs = zip(map(int, parts[::2]), parts[1::2], strict=True)
    words = {rank: re.findall(r"^ds_vshape.comm.channels.PeerLost: (.*)$", log, flags=re.MULTILINE)
             for rank, log in logs}
    return {rank: said[-1] for rank, said in words.items() if said}


def assert_named(place: str, victim: int, number: int, folder: Path) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(RANKS, train, place, victim, number, str(folder), timeout=SECONDS + GRACE)
    told = told_by(str(failed.value))
    others = sorted({*range(RANKS)} - {victim})
    assert sorted(told) == others, str(failed.value)
    if place == "before_the_module":
        assert all(f"global rank {victim} is lost: it hasn't reached its PipelineModule within" in words
                   for words in told.values())
        return
    why = "its process has ended" if number == signal.SIGKILL else (
        f"it has given no sign of life for {SECONDS} seconds: its process is stopped, or its host cut off")
    named = rf": pipeline rank {victim} is lost \(replica 0, global rank {victim}, on \S+\): {why}"
    for rank, words in told.items():
        assert re.search(named, words), words
        waits = STARTS[place][1] if place in STARTS else r"\w+( of stage \d, micro-batch \d)?"
        assert re.match(rf"pipeline rank {rank} on \S+ waits in {waits}: ", words), words
        if place not in STARTS:
            done = 0 if place == "in_first_batch" else BATCH
            # Others may have come to the end of a batch in which one is lost after their last exchange with it.
            assert re.search(f"; the last batch done is number ({done}|{done + 1})(;|$)", words), words


@pytest.mark.parametrize(["place", "victim"], [("in_the_module", 1), ("WeightGradPass", 2), ("OptimizerStep", 0)])
def test_a_killed_rank_is_named_by_all(place: str, victim: int, tmp_path: Path) -> None:
    assert_named(place, victim, signal.SIGKILL, tmp_path)


PLACES = [*STARTS, "in_first_batch", *(kind.__name__ for kind in INSTRUCTIONS), *LATER]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("place", PLACES)
def test_every_phase(place: str, number: int, tmp_path: Path) -> None:
    assert_named(place, 1 + PLACES.index(place) % 2, number, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["in_the_constructor", "SplitForwardPass", "OptimizerStep", "in_save"])
def test_the_first_rank_stopped(place: str, tmp_path: Path) -> None:
    """The rank to which all others send their signs of life."""
    assert_named(place, 0, signal.SIGSTOP, tmp_path)


def train_slowly(rank: int, how: str, folder: str) -> list[float]:
    engine = Job({"name": "v-half", "timeout_seconds": 3}, 2, 2, FP32_ZERO1).engine()
    losses = []
    for batch in range(3):
        if rank and batch == 1:
            if how == "stopped":
                stopped = os.getpid()
                if not os.fork():
                    time.sleep(1.5)
                    os.kill(stopped, signal.SIGCONT)
                    os._exit(0)
                os.kill(stopped, signal.SIGSTOP)
            else:
                time.sleep(5)
        losses.append(float(engine.train_batch(data(engine, batch))))
    return losses


@pytest.mark.quick_cases("stopped")
@pytest.mark.parametrize("how", ["stopped", "busy"])
def test_who_takes_long_is_not_lost(how: str, tmp_path: Path) -> None:
    slow, _ = run_ranks(2, train_slowly, how, str(tmp_path), timeout=90)
    assert len(slow) == 3


def end_early(rank: int) -> str:
    engine = Job("v-half", 2, 2).engine()
    engine.train_batch(data(engine, 0))
    if rank:
        raise ZeroDivisionError("between two batches")
    engine.train_batch(data(engine, 1))
    return "done"


def test_a_script_that_fails_on_one_rank() -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(2, end_early, timeout=60)
    assert ": pipeline rank 1 is lost (replica 0, global rank 1, on " in told_by(str(failed.value))[0]
