"""A killed job continues from its last checkpoint bit for bit, wherever in a batch or a save it was killed."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec
from pipelines import BF16_ZERO1_FP32, FP32_ZERO1, Fatal, Job, Outcome, merged, specs, train
from ranks import RanksFailed, run_ranks

from ds_vshape.checkpoint import checkpointing

FIRST, SECOND, LAST = 2, 4, 6  # batches done when a checkpoint is saved, and at the end


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_within_a_file(engine: Any) -> None:
    """The second file stays half written."""
    save, number = engine.checkpoint_engine.save, 0

    def save_half(state_dict: Any, path: str) -> None:
        nonlocal number
        number += 1
        save(state_dict, path)
        if number == 2:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    engine.checkpoint_engine.save = save_half


def die_before_a_file(engine: Any) -> None:
    engine.checkpoint_engine.save = die


def die_when_all_is_written(engine: Any) -> None:
    checkpointing.Draft.commit = die  # type: ignore[method-assign]


def die_between_two_names(engine: Any) -> None:
    rename, number = os.rename, 0

    def rename_once(*names: Any) -> None:
        nonlocal number
        number += 1
        if number == 2:
            die()
        rename(*names)

    os.rename = rename_once  # type: ignore[assignment]


def die_before_latest(engine: Any) -> None:
    checkpointing.name_latest = die


def die_within_latest(engine: Any) -> None:
    os.replace = die  # type: ignore[assignment]


def die_while_the_old_one_goes(engine: Any) -> None:
    checkpointing.Draft.forget_replaced = die  # type: ignore[method-assign]


def save_and_die(rank: int, job: Job, folder: str, tag: str | None, victim: int, arm: Callable[[Any], None]) -> None:
    engine = job.engine()
    train(engine, range(FIRST))
    engine.save_checkpoint(folder, tag)
    train(engine, range(FIRST, SECOND))
    if rank == victim:
        arm(engine)
    engine.save_checkpoint(folder, tag)


def go_on(rank: int, job: Job, folder: str, tag: str | None) -> tuple[int, Outcome]:
    engine = job.engine()
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    done = engine.global_steps
    before = train(engine, range(done, SECOND))
    engine.save_checkpoint(folder, tag)
    after = train(engine, range(SECOND, LAST))
    return done, Outcome(before.losses + after.losses, after.weights)


def train_whole(rank: int, job: Job) -> Outcome:
    return train(job.engine(), range(LAST))


def assert_goes_on(job: Job, folder: Path, tag: str | None, ranks: int, expected: int) -> None:
    """Fresh processes load the checkpoint of `expected` batches, and end as a job that wasn't killed."""
    oracle = merged(run_ranks(ranks, train_whole, job))
    results = run_ranks(ranks, go_on, job, str(folder), tag)
    assert [done for done, _ in results] == [expected] * ranks
    outcome = merged([outcome for _, outcome in results])
    assert outcome.losses == oracle.losses[expected:]
    assert all(torch.equal(outcome.weights[name], value) for name, value in oracle.weights.items())
    # What the kill had left is gone with the next save of that checkpoint.
    assert not [path.name for path in folder.iterdir() if path.suffix in (".draft", ".replaced")]


@pytest.mark.parametrize(["arm", "victim", "tag", "expected"], [
    (die_within_a_file, 1, None, FIRST),
    (die_within_a_file, 0, "last", FIRST),
    pytest.param(die_before_a_file, 0, None, FIRST, marks=pytest.mark.slow),
    pytest.param(die_when_all_is_written, 0, "last", FIRST, marks=pytest.mark.slow),
    pytest.param(die_between_two_names, 0, "last", FIRST, marks=pytest.mark.slow),
    pytest.param(die_before_latest, 0, None, FIRST, marks=pytest.mark.slow),
    pytest.param(die_within_latest, 0, None, FIRST, marks=pytest.mark.slow),
    pytest.param(die_while_the_old_one_goes, 0, "last", SECOND, marks=pytest.mark.slow),
])
@pytest.mark.quick_cases("die_within_a_file-0-last-2")
def test_a_kill_during_save(arm: Any, victim: int, tag: str | None, expected: int, tmp_path: Path) -> None:
    job = Job("v-half", 2, 2, FP32_ZERO1)
    with pytest.raises(RanksFailed) as failed:
        run_ranks(2, save_and_die, job, str(tmp_path), tag, victim, arm, timeout=60)
    assert f"rank {victim}:" in str(failed.value) and "was still running" not in str(failed.value)
    assert_goes_on(job, tmp_path, tag, 2, expected)


def train_and_die(rank: int, job: Job, folder: str, victim: int) -> None:
    engine = job.engine()
    train(engine, range(FIRST))
    engine.save_checkpoint(folder)
    Fatal.signal = signal.SIGKILL
    for batch in range(FIRST, LAST):
        if batch == SECOND and rank == victim:
            Fatal.forwards_left = 2
        train(engine, range(batch, batch + 1))


def test_a_kill_in_mid_batch(tmp_path: Path) -> None:
    """Two replicas of two stages, ZeRO-1: one rank dies, three end and say why, four start again."""
    layers = tuple(LayerSpec(Fatal) if place == 1 else spec for place, spec in enumerate(specs(4)))
    job = Job({"name": "v-half", "timeout_seconds": 60}, 2, 4, BF16_ZERO1_FP32, layers)
    with pytest.raises(RanksFailed) as failed:
        run_ranks(4, train_and_die, job, str(tmp_path), 0, timeout=90)
    logs = dict(zip(*[iter(re.split(r"^rank (\d):\n", str(failed.value), flags=re.MULTILINE)[1:])] * 2))
    assert sorted(logs) == ["0", "1", "2", "3"]
    for rank in ("1", "2", "3"):
        told, = re.findall(r"^ds_vshape.comm.channels.PeerLost: (.*)$", logs[rank], flags=re.MULTILINE)[-1:]
        assert re.match(r"pipeline rank \d on \S+ waits in \w+( of stage \d, micro-batch \d)?: ", told)
        assert ": pipeline rank 0 is lost (replica 0, global rank 0, on " in told
        assert told.endswith(f"the last batch done is number {SECOND}")
    assert_goes_on(job, tmp_path, None, 4, FIRST)


class FullDisk:
    """No room for the files of one rank."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.save = engine, engine.checkpoint_engine.save

    def __enter__(self) -> None:
        def refuse(state_dict: Any, path: str) -> None:
            raise OSError(28, "No space left on device", path)

        self.engine.checkpoint_engine.save = refuse

    def __exit__(self, *_: Any) -> None:
        self.engine.checkpoint_engine.save = self.save


def save_on_a_full_disk(rank: int, job: Job, folder: str) -> tuple[str, Outcome]:
    engine = job.engine()
    train(engine, range(FIRST))
    engine.save_checkpoint(folder, "last")
    if rank:
        with pytest.raises(OSError) as error, FullDisk(engine):
            engine.save_checkpoint(folder, "last")
        told, = error.value.__notes__
        assert told.startswith("in the save_checkpoint on pipeline rank 1, replica 0 (global rank 1 on ")
        assert told.endswith("; no rank counts this checkpoint")
    else:
        with pytest.raises(Exception) as error:
            engine.save_checkpoint(folder, "last")
    train(engine, range(FIRST, SECOND))
    engine.load_checkpoint(folder)
    return str(error.value), train(engine, range(FIRST, LAST))


def test_a_disk_that_is_full_on_one_rank(tmp_path: Path) -> None:
    """Both ranks raise; the previous checkpoint is kept, and training continues."""
    job = Job("v-half", 2, 2, FP32_ZERO1)
    results = run_ranks(2, save_on_a_full_disk, job, str(tmp_path))
    oracle = merged(run_ranks(2, train_whole, job))
    for told, outcome in results:
        assert "[Errno 28] No space left on device" in told
        assert outcome.losses == oracle.losses[FIRST:]
    assert re.match(r"save_checkpoint on pipeline rank 1, .*: OSError:", results[0][0])
