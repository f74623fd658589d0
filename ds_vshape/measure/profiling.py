"""Measured times of a batch: those of each pass on every rank, and how they compare with the simulation."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ds_vshape.runtime.copy_engine import Copy
from ds_vshape.runtime.instructions import BufferId
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.schedule import Order, Schedule
from ds_vshape.schedule.timeline import Span, Timeline, Times, simulate


# How many Ws of each stage are timed entry by entry in a batch.
_TIMED_BY_ENTRIES = 3


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


Clock = HostClock | DeviceClock


def clock() -> Clock:
    """That of this process's accelerator."""
    return HostClock() if get_accelerator().is_synchronized_device() else DeviceClock()


class PassRecorder:
    """One batch on this rank: its passes and copies with start and end."""

    def __init__(self) -> None:
        self._clock = clock()
        self._marks: list[tuple[Pass, Any, Any]] = []
        # Of the pass that runs, and of some Ws: when it started, and when each entry was done.
        self._entry_marks: list[Any] | None = None
        self._of_entries: dict[int, list[list[Any]]] = defaultdict(list)
        self._copies: list[tuple[BufferId, Copy]] = []
        # The host's time, even if the device hasn't reached the batch yet: hosts start it together, devices don't.
        self._started = time.perf_counter()

    def start(self, action: Pass) -> Any:
        """`action` starts; returns what `end` needs."""
        now = self._clock.now()
        # Only a whole W has all entries.
        if (action.kind is Kind.W and action.pieces == 1
                and len(self._of_entries[action.stage]) < _TIMED_BY_ENTRIES):
            self._entry_marks = [now]
        return now

    def entry_done(self) -> None:
        """One entry of the W that runs is done."""
        if self._entry_marks is not None:
            self._entry_marks.append(self._clock.now())

    def end(self, action: Pass, start: Any) -> None:
        """`action` has ended."""
        if self._entry_marks is not None:
            self._of_entries[action.stage].append(self._entry_marks)
            self._entry_marks = None
        self._marks.append((action, start, self._clock.now()))

    @property
    def peak_alive(self) -> int:
        """How many activations were alive at once."""
        alive = peak = 0
        for action, *_ in self._marks:
            alive += action.kind is Kind.F
            peak = max(peak, alive)
            alive -= action.frees_activations
        return peak

    def copied(self, buffer_id: BufferId, copy: Copy) -> None:
        """`copy` is that of what a forward left, to the host and back."""
        self._copies.append((buffer_id, copy))

    def entry_seconds(self) -> dict[int, list[list[float]]]:
        """By stage, how long each entry of some whole Ws took."""
        return {stage: [[self._clock.seconds(start, end) for start, end in pairwise(marks)] for marks in of_stage]
                for stage, of_stage in self._of_entries.items()}

    def spans(self) -> tuple[Span, ...]:
        """Spans in seconds since this rank's host started the batch; a copy, of which the rank takes no part, is at its
        end."""
        return self._spans([(action, end if action.kind.is_copy else start, end) for action, start, end in self._marks])

    def copies(self) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
        """The spans of the copies to the host, and of those back, each in the order in which they ran."""
        back = self._spans([(Pass(Kind.R, *buffer_id), *copy.backwards) for buffer_id, copy in self._copies])
        return (self._spans([(Pass(Kind.O, *buffer_id), *copy.outwards) for buffer_id, copy in self._copies]),
                tuple(sorted(back, key=lambda span: span.start)))

    def copies_on_host(self) -> tuple[Span, ...]:
        """The copies by the host's clock (time.perf_counter)."""
        first = self._started
        return tuple(Span(span.action, span.start + first, span.end + first)
                     for spans in self.copies() for span in spans)

    def _spans(self, marks: Sequence[tuple[Pass, Any, Any]]) -> tuple[Span, ...]:
        times = iter(self._clock.on_host([mark for _, *of_action in marks for mark in of_action]))
        first = self._started
        return tuple(Span(action, next(times) - first, next(times) - first) for action, *_ in marks)


def gather_timeline(recorder: PassRecorder, orders: Sequence[Order], group: Any, device: torch.device) -> Timeline:
    """The whole pipeline's measured timeline, on every rank of `group` (collective).

    Each rank's times count from its host's start of the batch. The end of the previous batch synchronizes the ranks, so
    the clocks of the hosts need not agree. (What a script does on one rank between batches isn't measured.)
    """
    # What each rank has spans of: its passes, then the copies of each direction.
    kinds = [(order, *copies_in(order)) for order in orders]
    longest = max((sum(map(len, of_rank)) for of_rank in kinds), default=0)
    own = torch.zeros(longest, 2, dtype=torch.float64)
    for place, span in enumerate(chain(recorder.spans(), *recorder.copies())):
        own[place] = torch.tensor([span.start, span.end], dtype=torch.float64)
    gathered = [torch.empty(longest, 2, dtype=torch.float64, device=device) for _ in orders]
    dist.all_gather(gathered, own.to(device), group=group)
    found: tuple[list[tuple[Span, ...]], ...] = [], [], []
    for of_rank, times in zip(kinds, gathered):
        spans = iter(times.tolist())
        for actions, into in zip(of_rank, found):
            into.append(tuple(Span(action, *next(spans)) for action in actions))
    return Timeline(*map(tuple, found if any(found[1]) else found[:1]))


def copies_in(order: Order) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
    """The Os and the Rs of an order as they are copied: to the host in the order of the Fs."""
    found = {(action.kind, action.stage, action.micro_batch): action for action in order if action.kind.is_copy}
    if not found:
        return (), ()
    offloads = (found.get((Kind.O, action.stage, action.micro_batch)) for action in order if action.kind is Kind.F)
    return (tuple(action for action in offloads if action is not None),
            tuple(action for action in order if action.kind is Kind.R))


def seconds_taken(spans: Iterable[Span]) -> dict[tuple[Kind, int], list[float]]:
    """By kind and stage, how long the pass of each micro-batch took; the pieces of a W, which differ, as one."""
    taken: dict[tuple[Kind, int], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for span in spans:
        taken[span.action.kind, span.action.stage][span.action.micro_batch] += span.end - span.start
    return {key: list(of_micro_batches.values()) for key, of_micro_batches in taken.items()}


def mean_times(timeline: Timeline, stages: int) -> Times:
    """The mean seconds of F, B, W, C and copies of each stage in a measured timeline; a BW counts half as B and half as
    W."""
    taken: dict[tuple[Kind, int], list[float]] = defaultdict(list)
    for (of, stage), seconds in seconds_taken(chain.from_iterable(timeline.ranks)).items():
        if of is Kind.BW:
            taken[Kind.B, stage] += [each / 2 for each in seconds]
            taken[Kind.W, stage] += [each / 2 for each in seconds]
        elif not of.is_copy:
            taken[of, stage] += seconds
    for (of, stage), seconds in seconds_taken(chain.from_iterable((*timeline.offloads, *timeline.reloads))).items():
        taken[of, stage] += seconds

    def mean(kind: Kind) -> tuple[float, ...]:
        every = [taken[kind, stage] for stage in range(stages)]
        return tuple(sum(seconds) / len(seconds) if seconds else 0.0 for seconds in every)

    times = Times(mean(Kind.F), mean(Kind.B), mean(Kind.W))
    if any(timeline.offloads):
        times = replace(times, offload=mean(Kind.O), reload=mean(Kind.R))
    return replace(times, recompute=_recompute_times(timeline, times)) if any(mean(Kind.C)) else times


def _recompute_times(timeline: Timeline, times: Times) -> tuple[tuple[float, ...], ...]:
    """For each stage the mean seconds of C of its first layers, as many as were recomputed; 0 for other numbers."""
    taken: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for span in chain.from_iterable(timeline.ranks):
        if span.action.kind is Kind.C:
            taken[span.action.stage][span.action.layers].append(span.end - span.start)
    found = []
    for stage, forward in enumerate(times.forward):
        of_layers = {layers: statistics.mean(seconds) for layers, seconds in taken[stage].items()}
        whole = of_layers.pop(0, forward)
        found.append((*(of_layers.get(layers, 0.0) for layers in range(1, max(of_layers, default=0) + 1)), whole))
    return tuple(found)


def report(recorder: PassRecorder, schedule: Schedule, group: Any, device: torch.device) -> dict[str, Any]:
    """A measured batch of `schedule` in numbers; collective over the pipeline's `group`.

    Returns:
        "schedule": its name
        "predicted_bubble": the share of idle time in a simulation with the mean measured time of each pass
        "measured_bubble": the measured share of idle time
        "makespan": seconds from the first pass to the end of the last one
        "peak_activations": of each rank, in activations of 1/(2p) of the model for one micro-batch
    """
    timeline = gather_timeline(recorder, schedule.orders, group, device)
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
