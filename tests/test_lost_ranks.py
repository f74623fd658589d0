"""A rank that dies or stops in the middle of a batch: every other one ends, and says what it waited for."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from deepspeed.pipe import LayerSpec
from pipelines import Fatal, Job, data, specs
from ranks import RanksFailed, run_ranks

pytestmark = pytest.mark.slow

BATCHES = range(4)
# Of a job, and of its processes: no batch takes that long on a busy machine either, and a stopped process is waited for
# to the end.
TIMEOUTS = {signal.SIGKILL: (60, 120), signal.SIGSTOP: (12, 60)}


def train_until(rank: int, job: Job, number: int) -> None:
    engine = job.engine()
    Fatal.signal = number
    for batch in BATCHES:
        if batch == 2:
            Fatal.forwards_left = 3
        engine.train_batch(data(engine, batch))


def logs_of(failure: str) -> Iterator[tuple[int, str]]:
    """The rank and the log of each that failed."""
    parts = re.split(r"^rank (\d+)(?::| was still)", failure, flags=re.MULTILINE)[1:]
    yield from zip(map(int, parts[::2]), parts[1::2], strict=True)


@pytest.mark.parametrize(["schedule", "number"], [("1f1b", signal.SIGKILL), ("v-half", signal.SIGKILL),
                                                  ("v-half", signal.SIGSTOP)])
def test_the_others_end_and_say_why(schedule: str, number: int) -> None:
    layers = specs(8)
    layers[3 if schedule == "1f1b" else 2] = LayerSpec(Fatal)
    seconds, patience = TIMEOUTS[signal.Signals(number)]
    section: Any = {"name": schedule, "timeout_seconds": seconds}
    with pytest.raises(RanksFailed) as failed:
        run_ranks(4, train_until, Job(section, 4, 6, layers=tuple(layers)), number, timeout=patience)
    logs = dict(logs_of(str(failed.value)))
    lost = 1 if schedule == "1f1b" else next(rank for rank, log in logs.items() if "PeerLost" not in log)
    others = [log for rank, log in logs.items() if rank != lost]
    assert len(others) == 3
    for log in others:
        told, = re.findall(r"^ds_vshape.comm.channels.PeerLost: (.*)$", log, flags=re.MULTILINE)[-1:]
        assert re.search(r"pipeline rank \d on \S+ waits in \w+( of stage \d, micro-batch \d)?: ", told)
        why = "its process has ended" if number == signal.SIGKILL else "it has given no sign of life for"
        assert f": pipeline rank {lost} is lost (replica 0, global rank {lost}, on " in told and why in told
        assert told.endswith("the last batch done is number 2")
