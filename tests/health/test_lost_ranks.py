"""A rank that dies or stops in the middle of a batch: every other one ends with an error that names what it waited for.

Over gloo, and on simulated GPUs over NCCL's stand-in: there waits are the device's, the host runs on, and a watchdog
ends processes without a word.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec
from pipelines import FP32_ZERO1, Block, Fatal, Job, data, specs
from ranks import RanksFailed, run_ranks
from simulated_gpu.device import DEVICE_OF_RANK
from simulated_gpu.processes import run_on_gpus

pytestmark = pytest.mark.slow

BATCHES = range(4)
# Of the job: no batch takes that long on a busy machine either, and a stopped process is waited for that long.
TIMEOUTS = {signal.SIGKILL: 60, signal.SIGSTOP: 24}
# Of its processes.
PATIENCE = 240.0
# Of the watchdog where nobody changes it.
WATCHDOG_SECONDS = 12.0


def train_until(rank: int, job: Job, number: int) -> None:
    engine = job.engine()
    Fatal.signal = number
    for batch in BATCHES:
        if batch == 2:
            Fatal.forwards_left = 3
        engine.train_batch(data(engine, batch))


def logs_of(failure: str) -> Iterator[tuple[int, str]]:
    """The rank and the log of each that failed."""
    parts = re.split(r"^rank (\d+)(?::| was )", failure, flags=re.MULTILINE)[1:]
    yield from zip(map(int, parts[::2]), parts[1::2], strict=True)


def layers_of(schedule: str) -> tuple[Any, ...]:
    """Eight blocks, one of which is fatal."""
    layers = specs(8)
    layers[3 if schedule == "1f1b" else 2] = LayerSpec(Fatal)
    return tuple(layers)


def others_told(failure: str, schedule: str, number: int) -> list[str]:
    """The last line of each other rank, which names the lost one."""
    logs = dict(logs_of(failure))
    lost = 1 if schedule == "1f1b" else next(rank for rank, log in logs.items() if "PeerLost" not in log)
    others = [log for rank, log in logs.items() if rank != lost]
    assert len(others) == 3, failure
    words = []
    for log in others:
        told, = re.findall(r"^ds_vshape.comm.channels.PeerLost: (.*)$", log, flags=re.MULTILINE)[-1:]
        assert re.search(r"pipeline rank \d on \S+ waits in \w+( of stage \d, micro-batch \d)?: ", told)
        why = "its process has ended" if number == signal.SIGKILL else "it has given no sign of life for"
        assert f": pipeline rank {lost} is lost (replica 0, global rank {lost}, on " in told and why in told
        assert told.endswith("the last batch done is number 2")
        words.append(told)
    return words


@pytest.mark.parametrize(["schedule", "number"], [("1f1b", signal.SIGKILL), ("v-half", signal.SIGKILL),
                                                  ("v-half", signal.SIGSTOP)])
def test_the_others_end_and_say_why(schedule: str, number: int) -> None:
    section: Any = {"name": schedule, "timeout_seconds": TIMEOUTS[signal.Signals(number)]}
    with pytest.raises(RanksFailed) as failed:
        run_ranks(4, train_until, Job(section, 4, 6, layers=layers_of(schedule)), number, timeout=PATIENCE)
    others_told(str(failed.value), schedule, number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_on_gpus_they_say_it_too_before_any_watchdog(number: int) -> None:
    section: Any = {"name": "v-half", "timeout_seconds": TIMEOUTS[signal.Signals(number)]}
    job = Job(section, 4, 6, FP32_ZERO1, layers_of("v-half"))
    with pytest.raises(RanksFailed) as failed:
        run_on_gpus(4, train_until, job, number, timeout=PATIENCE, watchdog_seconds=WATCHDOG_SECONDS)
    assert "Watchdog" not in str(failed.value)
    # The host has long come to the end of the batch, or waits for the device.
    for told in others_told(str(failed.value), "v-half", number):
        assert re.search(r"waits in (Wait|Release)(Activation|Grad) of stage \d, micro-batch \d: ", told), told


class Asking(Block):
    """A block whose forward lets the host wait for the device, once armed."""

    ask: Callable[[torch.Tensor], object] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if Asking.ask is not None:
            Asking.ask(x)
        return super().forward(x)


def wait_for_event(x: torch.Tensor) -> None:
    event = get_accelerator().Event()
    event.record()
    event.synchronize()


WAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "synchronize": lambda x: get_accelerator().synchronize(),
    "item": lambda x: x.sum().item(),
    "event": wait_for_event,
}


def train_asking(rank: int, job: Job, wait: str, host_spins: bool) -> None:
    engine = job.engine()
    Fatal.signal, DEVICE_OF_RANK.host_spins = signal.SIGKILL, host_spins
    for batch in BATCHES:
        if batch == 2:
            Fatal.forwards_left, Asking.ask = 3, WAITS[wait]
        engine.train_batch(data(engine, batch))


@pytest.mark.parametrize(["wait", "host_spins"], [("synchronize", True), ("item", True), ("item", False),
                                                  ("event", True)])
def test_a_host_that_waits_for_its_device_is_ended(wait: str, host_spins: bool) -> None:
    layers = specs(6)
    layers[1], layers[6] = LayerSpec(Fatal), LayerSpec(Asking)
    job = Job({"name": "1f1b", "timeout_seconds": 60}, 3, 6, layers=tuple(layers))
    with pytest.raises(RanksFailed) as failed:
        run_on_gpus(3, train_asking, job, wait, host_spins, timeout=PATIENCE)
    log = dict(logs_of(str(failed.value)))[2]
    told, = re.findall(r"^ds_vshape.comm.channels.PeerLost: (.*)$", log, flags=re.MULTILINE)[-1:]
    waits = r"pipeline rank 2 on \S+ waits in \w+ of stage \d, micro-batch \d: pipeline rank 0 is lost"
    assert re.match(waits, told), str(failed.value)
    assert told.endswith("the last batch done is number 2")
    assert "this process waits for what won't come, and is ended" in log


def train_slowly(rank: int, job: Job, seconds: float) -> list[float]:
    engine, losses = job.engine(), []
    for batch in BATCHES:
        if rank and batch == 2:
            DEVICE_OF_RANK.current.put(lambda: time.sleep(seconds))
        losses.append(float(engine.train_batch(data(engine, batch))))
    return losses


def test_a_batch_may_take_its_devices_as_long_as_it_needs() -> None:
    """Longer than ranks may give no sign of life, and than the watchdog's own time."""
    job = Job({"name": "v-half", "timeout_seconds": 2}, 2, 4, FP32_ZERO1)
    one, other = run_on_gpus(2, train_slowly, job, 7.0, watchdog_seconds=4.0)
    assert one == other and len(one) == len(BATCHES)
