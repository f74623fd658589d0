"""Python between passes: the CPU time of an instruction in the thread that runs them, and where it goes.

    python bench/instructions.py                        # the mean of all instructions, and each kind's
    python bench/instructions.py --places 20            # and the parts and the 20 functions that take most of it

Two ranks with layers that sleep for no time. A batch's CPU seconds, without those that its layers take when they run
alone, are divided by its number of instructions: so the batch's end is in it, and what DeepSpeed's engine does.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

import record
from contenders import contender_name, engine_of
from ranks import run_ranks
from rich.console import Console
from rich.table import Table
from workloads import Sleeping

from ds_vshape.comm import channels

# Seconds of CPU between two looks at where the thread is.
_INTERVAL = 0.0005
# The functions that call gloo.
_GLOO = ("comm/channels.py:_start", "comm/channels.py:_Transfer.wait")
# Batches before all else: the first two allocate, exchange shapes and measure activations.
_WARM_UP = 4


@dataclass(frozen=True)
class Instructions:
    """CPU seconds of a rank's instructions: their number in a batch, the mean of all with the batch's end and without
    the layers, those of each kind with the layers, and those of parts of the program and of functions in a batch."""

    number: int
    mean: float
    kinds: dict[str, tuple[int, float]]
    parts: dict[str, float]
    places: dict[str, float]


def measured(rank: int, schedule: str, workload: Sleeping, batches: int, places: bool) -> Instructions:
    """Train some batches on this rank, and measure; collective."""
    engine = engine_of(schedule, workload)
    layers = [workload.spec(number).build() for number in range(workload.layers // workload.ranks)]

    def train() -> None:
        engine.train_batch(iter(workload.batch(0)))

    def alone() -> None:
        for inputs, labels in workload.batch(0):
            for layer in layers:
                outputs = layer(inputs.requires_grad_())
                outputs.backward(labels)

    for _ in range(_WARM_UP):
        train()
        alone()
    number = len(engine._train_schedule().instructions)
    batch = _least(train, batches)
    mean = (batch - _least(alone, batches)) / number
    timed = _Timed()
    with engine._wrappers.during(timed.around):
        for _ in range(batches):
            train()
    kinds = {name: (count // batches, timed.seconds[name] / count) for name, count in timed.counts.items()}
    if not places:
        return Instructions(number, mean, kinds, {}, {})
    gloo = _in_gloo(train, batches)
    parts, functions = _sampled(train, batches, batch - gloo)
    return Instructions(number, mean, kinds, {"gloo": gloo, **parts}, functions)


def _least(run: Callable[[], None], times: int) -> float:
    """The CPU seconds of the fastest."""
    seconds = []
    gc.collect()
    for _ in range(times):
        start = time.thread_time()
        run()
        seconds.append(time.thread_time() - start)
    return min(seconds)


class _Timed:
    """CPU seconds by kind of instruction."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.counts: Counter[str] = Counter()

    def around(self, functions: Mapping[Any, Callable[..., None]]) -> dict[Any, Callable[..., None]]:
        """The same functions, timed."""
        return {kind: self._around(kind.__name__, function) for kind, function in functions.items()}

    def _around(self, name: str, function: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any, **kwargs: Any) -> None:
            start = time.thread_time()
            function(*args, **kwargs)
            self.seconds[name] += time.thread_time() - start
            self.counts[name] += 1
        return timed


def _in_gloo(run: Callable[[], None], times: int) -> float:
    """The CPU seconds of a run in calls of gloo, each of which is timed: samples come on the time of its threads too,
    which work when it is called."""
    seconds = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal seconds
            start = time.thread_time()
            result = function(*args)
            seconds += time.thread_time() - start
            return result
        return call

    start, wait = channels._start, channels._Transfer.wait
    channels._start = lambda transfer, begin, *rest: start(transfer, timed(begin), *rest)
    channels._Transfer.wait = timed(wait)  # type: ignore[method-assign]
    try:
        for _ in range(times):
            run()
    finally:
        channels._start, channels._Transfer.wait = start, wait  # type: ignore[method-assign]
    return seconds / times


def _sampled(run: Callable[[], None], times: int, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """The `seconds` of a run outside of gloo by part and by function: samples, each of which stands for the time since
    the one before."""
    parts, places = Counter[str](), Counter[str]()
    last = time.thread_time()

    def look(_: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.thread_time()
        if _name(frame) not in _GLOO:
            parts[_part(frame)] += now - last
            places[_place(frame)] += now - last
        # What looking takes isn't the run's.
        last = time.thread_time()

    before = signal.signal(signal.SIGPROF, look)
    signal.setitimer(signal.ITIMER_PROF, _INTERVAL, _INTERVAL)
    try:
        for _ in range(times):
            run()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    share = seconds / sum(places.values())
    return ({part: share * each for part, each in parts.most_common()},
            {place: share * each for place, each in places.most_common()})


def _part(frame: FrameType | None) -> str:
    """What runs: the layers, torch, DeepSpeed or a folder of ours; whatever else counts as its caller."""
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.parts[-2:] == ("bench", "layers.py"):
            return "the layers"
        for package in ("ds_vshape", "deepspeed", "torch"):
            if package in file.parts[:-1]:
                return f"ds_vshape/{file.parts[-2]}" if package == "ds_vshape" else package
        frame = frame.f_back
    return "?"


def _place(frame: FrameType | None) -> str:
    """The function that runs, and which of ours has called it."""
    inner = _name(frame)
    while frame is not None and "ds_vshape" not in frame.f_code.co_filename:
        frame = frame.f_back
    ours = _name(frame)
    return ours if ours == inner else f"{ours} > {inner}"


def _name(frame: FrameType | None) -> str:
    if frame is None:
        return "?"
    file = Path(frame.f_code.co_filename)
    return f"{'/'.join(file.parts[-2:])}:{frame.f_code.co_qualname}"


def measured_instruction(ranks: int, batches: int) -> float:
    """The mean over ranks of an instruction's CPU seconds under v-half, with one layer a stage."""
    found = _on_ranks("v-half", ranks, 16 * ranks, batches, False)
    return sum(each.mean for each in found) / len(found)


def _on_ranks(schedule: str, ranks: int, micro_batches: int, batches: int, places: bool) -> list[Instructions]:
    workload = Sleeping(ranks, 2 * ranks, micro_batches, (0.0, 0.0, 0.0))
    found: list[Instructions] = run_ranks(ranks, measured, schedule, workload, batches, places, timeout=300)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", type=contender_name, default="v-half")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=32)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--places", type=int, default=0, metavar="N",
                        help="show the N parts and the N functions that take most")
    record.add_json_option(parser)
    options = parser.parse_args()
    found = _on_ranks(options.schedule, options.ranks, options.micro_batches, options.batches, bool(options.places))
    console = Console(width=150)
    for rank, each in enumerate(found):
        table = Table(title=f"rank {rank}: {1e6 * each.mean:.1f} us an instruction, {each.number} in a batch")
        for column in ("", "in a batch", "us each"):
            table.add_column(column, justify="right" if column else "left")
        for name, (count, seconds) in sorted(each.kinds.items(), key=lambda entry: -entry[1][0] * entry[1][1]):
            table.add_row(name, str(count), f"{1e6 * seconds:.1f}")
        console.print(table)
    if options.places:
        for what, shown in (("part", found[0].parts), ("function", found[0].places)):
            table = Table(title=f"rank 0: us of a batch, divided by its {found[0].number} instructions")
            for column in ("us", what):
                table.add_column(column)
            for place, seconds in list(shown.items())[:options.places]:
                table.add_row(f"{1e6 * seconds / found[0].number:.2f}", place)
            console.print(table)
    record.write(options.json, [asdict(each) for each in found])


if __name__ == "__main__":
    main()
