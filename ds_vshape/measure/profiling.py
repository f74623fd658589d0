"""Measured times of a batch: those of each pass on every rank, and how they compare with the simulation."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.schedule import Order, Schedule
from ds_vshape.schedule.timeline import Span, Timeline, Times, simulate


class HostClock:
    """Reads the host's clock: correct if a pass has ended when its call returns, as on CPU."""

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def on_host(self, marks: Sequence[float]) -> list[float]:
        return [*marks]


class DeviceClock:
    """Puts events on the current stream: right where the host runs ahead of the device."""

    def now(self) -> Any:
        event = get_accelerator().Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    def on_host(self, marks: Sequence[Any]) -> list[float]:
        """When the device came to the `marks`, by the host's clock (time.perf_counter); waits until it is past them."""
        if not marks:
            return []
        # The two clocks are read together here, where the host waits anyway.
        now = self.now()
        now.synchronize()
        on_host = time.perf_counter()
        return [on_host - self.seconds(mark, now) for mark in marks]


class PassRecorder:
    """One batch on this rank: its passes with start and end, and how many activations were alive at once."""

    def __init__(self) -> None:
        self._clock = HostClock() if get_accelerator().is_synchronized_device() else DeviceClock()
        self._marks: list[tuple[Pass, Any, Any]] = []
        self._alive = 0
        # The host's time, even if the device hasn't reached the batch yet: hosts start it together, devices don't.
        self._started = time.perf_counter()
        self.peak_alive = 0

    def start(self, action: Pass) -> Any:
        """`action` starts; returns what `end` needs."""
        if action.kind is Kind.F:
            self._alive += 1
            self.peak_alive = max(self.peak_alive, self._alive)
        return self._clock.now()

    def end(self, action: Pass, start: Any) -> None:
        """`action` has ended."""
        self._marks.append((action, start, self._clock.now()))
        if action.frees_activations:
            self._alive -= 1

    def spans(self) -> tuple[Span, ...]:
        """Spans in seconds since this rank's host started the batch."""
        times = iter(self._clock.on_host([mark for _, *marks in self._marks for mark in marks]))
        first = self._started
        return tuple(Span(action, next(times) - first, next(times) - first) for action, _, _ in self._marks)


def gather_timeline(spans: Sequence[Span], orders: Sequence[Order], group: Any, device: torch.device) -> Timeline:
    """The whole pipeline's measured timeline, on every rank of `group` (collective).

    Each rank's times count from its host's start of the batch. The end of the previous batch synchronizes the ranks, so
    the clocks of the hosts need not agree. (What a script does on one rank between batches isn't measured.)
    """
    longest = max(map(len, orders), default=0)
    own = torch.zeros(longest, 2, dtype=torch.float64)
    for place, span in enumerate(spans):
        own[place] = torch.tensor([span.start, span.end], dtype=torch.float64)
    gathered = [torch.empty(longest, 2, dtype=torch.float64, device=device) for _ in orders]
    dist.all_gather(gathered, own.to(device), group=group)
    return Timeline(tuple(tuple(Span(action, *times) for action, times in zip(order, rank.tolist()))
                          for order, rank in zip(orders, gathered)))


def seconds_taken(spans: Iterable[Span]) -> dict[tuple[Kind, int], list[float]]:
    """By kind and stage, how long the pass of each micro-batch took; the pieces of a W, which differ, as one."""
    taken: dict[tuple[Kind, int], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for span in spans:
        taken[span.action.kind, span.action.stage][span.action.micro_batch] += span.end - span.start
    return {key: list(of_micro_batches.values()) for key, of_micro_batches in taken.items()}


def mean_times(timeline: Timeline, stages: int) -> Times:
    """The mean seconds of F, B and W of each stage in a measured timeline; a BW counts half as B and half as W."""
    taken: dict[tuple[Kind, int], list[float]] = defaultdict(list)
    for (of, stage), seconds in seconds_taken(chain.from_iterable(timeline.ranks)).items():
        if of is Kind.BW:
            taken[Kind.B, stage] += [each / 2 for each in seconds]
            taken[Kind.W, stage] += [each / 2 for each in seconds]
        else:
            taken[of, stage] += seconds

    def mean(kind: Kind) -> tuple[float, ...]:
        every = [taken[kind, stage] for stage in range(stages)]
        return tuple(sum(seconds) / len(seconds) if seconds else 0.0 for seconds in every)

    return Times(mean(Kind.F), mean(Kind.B), mean(Kind.W))


def report(recorder: PassRecorder, schedule: Schedule, group: Any, device: torch.device) -> dict[str, Any]:
    """A measured batch of `schedule` in numbers; collective over the pipeline's `group`.

    Returns:
        "schedule": its name
        "predicted_bubble": the share of idle time in a simulation with the mean measured time of each pass
        "measured_bubble": the measured share of idle time
        "makespan": seconds from the first pass to the end of the last one
        "peak_activations": of each rank, in activations of 1/(2p) of the model for one micro-batch
    """
    timeline = gather_timeline(recorder.spans(), schedule.orders, group, device)
    ranks, stages = schedule.placement.ranks, schedule.placement.stages
    peaks = [torch.empty(1, dtype=torch.int64, device=device) for _ in schedule.orders]
    dist.all_gather(peaks, torch.tensor([recorder.peak_alive * 2 * ranks // stages], device=device), group=group)
    return {
        "schedule": schedule.name,
        "predicted_bubble": simulate(schedule, mean_times(timeline, stages)).bubble,
        "measured_bubble": timeline.bubble,
        "makespan": timeline.makespan,
        "peak_activations": [int(peak) for peak in peaks],
    }
