"""Which schedule trains the next batch: one for equal times, or one for the measured ones.

    NamedSchedules      a schedule of the table
    PlannedSchedules    the planner's, for equal times
    MeasuredSchedules   the planner's, for times that this job measured; it goes through four phases

        warm up     batches that aren't timed
        measure     some batches on a schedule made for equal times: F, B and W of every stage, then the hops
        plan        the planner works while training continues; after each batch all ranks ask for its answer together
        settled     the new schedule runs; now and then the stages' times are compared with the plan's: if they have
                    changed, back to measuring

All ranks go through the phases together, so every exchange here is a collective over the whole job. A limit that can't
be met is found by each rank alone, and raised by all together (`Preflight.run`).
"""

from __future__ import annotations

import enum
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, pairwise
from typing import Protocol

import torch.distributed as dist
from deepspeed.runtime.pipe.module import PipelineError
from deepspeed.utils import logger

from ds_vshape.comm.channels import PeerLost
from ds_vshape.comm.exchange import Exchange
from ds_vshape.config.compatibility import check_demands
from ds_vshape.config.section import KEY, ActivationLimit, ScheduleConfig
from ds_vshape.config.to_schedule import (KnownStages, Room, check_limit, equal_times, gives_back_memory, is_in_bytes,
                                          is_planned, least_schedule, request_for, table_schedule)
from ds_vshape.engine.planning import Planner, PlannerFailed
from ds_vshape.health.preflight import Preflight
from ds_vshape.measure.profiling import PassRecorder, seconds_taken
from ds_vshape.schedule.activations import peak_activations
from ds_vshape.schedule.adaptive import cache
from ds_vshape.schedule.builders.fuse import unfused
from ds_vshape.schedule.named import ADAPTIVE
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.request import Answer, Planned, Request, usable_cores
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Span, Times, simulate

# The first allocates and exchanges shapes, in the second the engine measures activations.
WARM_UP_BATCHES = 2
MEASURED_BATCHES = 3
BATCHES_BETWEEN_CHECKS = 50


@dataclass
class StageSamples:
    """Seconds of this rank's passes, by kind and stage, over some batches; and of all passes of each micro-batch.

    `average` is the median, which a slow moment of the machine doesn't move, or the mean where lengths are mixed.
    """

    average: Callable[[list[float]], float] = statistics.median
    seconds: dict[tuple[Kind, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    of_micro_batches: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    of_entries: dict[int, list[list[float]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, spans: tuple[Span, ...], entries: Mapping[int, list[list[float]]]) -> None:
        """Take in a batch: its passes, and by stage the seconds of the entries of some Ws."""
        for stage, of_stage in entries.items():
            self.of_entries[stage] += of_stage
        for key, seconds in seconds_taken(spans).items():
            self.seconds[key] += seconds
        for span in spans:
            self.of_micro_batches[span.action.micro_batch] += span.end - span.start

    def averages(self, stages: int) -> list[list[float]]:
        """F, B and W of each stage; 0 for stages of other ranks. Where B and W ran as one they share its time."""
        table = []
        for stage in range(stages):
            row = {kind: self.average(samples) for (kind, of), samples in self.seconds.items() if of == stage}
            half = row.get(Kind.BW, 0.0) / 2
            table.append([row.get(Kind.F, 0.0), row.get(Kind.B, half), row.get(Kind.W, half)])
        return table

    def entry_costs(self, stage: int) -> list[float]:
        """The average seconds of each entry of W; none for stages of other ranks, and where their number changes."""
        rows = self.of_entries[stage]
        return [self.average(list(column)) for column in zip(*rows)] if len({*map(len, rows)}) == 1 else []


def agreed_times(samples: StageSamples, hops: Sequence[float], placement: Placement, exchange: Exchange) -> Times:
    """The times that all ranks plan with (collective over `exchange`).

    Of each pass the mean over the job's pipelines, of each hop the slowest pipeline's: `hops` are those that this rank
    measured, 0 for all other boundaries.
    """
    stages = placement.stages
    own = [seconds for row in samples.averages(stages) for seconds in row]
    entries = [samples.entry_costs(stage) for stage in range(stages)]
    try:
        longest = exchange.largest(max(map(len, entries)))
        rows = [[float(len(costs)), *costs, *(0.0,) * (longest - len(costs))] for costs in entries]
        every = exchange.start_numbers([*own, *hops, *chain.from_iterable(rows)]).result()
    except RuntimeError as error:
        raise PeerLost(f"not all ranks reported their times: {str(error).partition(chr(10))[0]}") from error
    pipelines = len(every) // placement.ranks
    means = [sum(seconds) / pipelines for seconds in zip(*(numbers[:3 * stages] for numbers in every))]
    slowest = map(max, zip(*(numbers[3 * stages:3 * stages + len(hops)] for numbers in every)))
    first = 3 * stages + len(hops)
    costs = (_mean_costs([numbers[start:start + longest + 1] for numbers in every], pipelines)
             for start in range(first, first + stages * (longest + 1), longest + 1))
    return Times(tuple(means[0::3]), tuple(means[1::3]), tuple(means[2::3]), tuple(slowest), entry_costs=tuple(costs))


def _mean_costs(rows: list[list[float]], pipelines: int) -> tuple[float, ...]:
    """The mean over pipelines of the entries' costs, in `rows` (number of entries, their costs) of all ranks; none if
    pipelines disagree about their number.
    """
    found = [costs[:int(count)] for count, *costs in rows if count]
    if len(found) != pipelines or len({*map(len, found)}) != 1:
        return ()
    return tuple(sum(costs) / pipelines for costs in zip(*found))


def agreed_scales(samples: StageSamples, micro_batches: int, exchange: Exchange) -> tuple[float, ...]:
    """How long the micro-batch in each place of a batch takes, as a multiple of their mean, over all ranks and batches
    of the samples (collective over `exchange`).
    """
    try:
        every = exchange.start_numbers([samples.of_micro_batches[place] for place in range(micro_batches)]).result()
    except RuntimeError as error:
        raise PeerLost(f"not all ranks told their times: {str(error).partition(chr(10))[0]}") from error
    sums = list(map(sum, zip(*every)))
    mean = statistics.mean(sums) or 1.0
    return tuple(seconds / mean for seconds in sums)


class Schedules(Protocol):
    """Where the engine gets its schedules from; called on all ranks together."""

    def first(self, micro_batches: int) -> Schedule:
        """What to train by when a batch has `micro_batches` for the first time."""

    def after_batch(self, schedule: Schedule, record: PassRecorder) -> Schedule | None:
        """Take note of a training batch of `schedule`; another one to train by from now on, or None."""

    def within(self, room: Room) -> Schedule | None:
        """A schedule for equal times within `room`, where the first one needs more; None if there is no other."""

    @property
    def will_plan(self) -> bool:
        """Whether a schedule within the room that is measured will follow the present one."""

    @property
    def times(self) -> Times | None:
        """The times that the present schedule was planned for, if they were measured."""

    @property
    def entry_costs(self) -> tuple[tuple[float, ...], ...]:
        """The costs of W's entries of each stage, by which the latest plan cuts them; none if they weren't measured."""


def schedules_for(config: ScheduleConfig, placement: Placement, measure_hops: Callable[[], list[float]],
                  room: Callable[[], Room | None], with_keeping: Callable[[Times], Times], preflight: Preflight,
                  known: KnownStages | None) -> Schedules:
    """The source of schedules that `config` asks for; ConfigError on every rank if its demands don't go together.
    `preflight` is that of the job; `known` are the stages if they were planned together with a first schedule.

    Collective over the job, as all that the source does.
    """
    preflight.run(partial(check_demands, config))
    if not is_planned(config):
        return NamedSchedules(config, placement, preflight)
    planner = Planner(preflight.exchange, dist.get_rank() == 0, config.timeout_seconds)
    first_plans = _FirstPlans(config, placement, planner, preflight, known)
    if config.times == "profile":
        return MeasuredSchedules(first_plans, measure_hops, room, with_keeping)
    return PlannedSchedules(first_plans)


class _Unmeasured:
    """Nothing is measured, so the first schedule stays."""

    def after_batch(self, schedule: Schedule, record: PassRecorder) -> Schedule | None:
        return None

    def within(self, room: Room) -> Schedule | None:
        return None

    @property
    def will_plan(self) -> bool:
        return False

    @property
    def times(self) -> Times | None:
        return None

    @property
    def entry_costs(self) -> tuple[tuple[float, ...], ...]:
        return ()


@dataclass(frozen=True)
class NamedSchedules(_Unmeasured):
    """One schedule of the table."""

    config: ScheduleConfig
    placement: Placement
    preflight: Preflight

    def first(self, micro_batches: int) -> Schedule:
        schedule = self.preflight.run(partial(table_schedule, self.config, self.placement.ranks, micro_batches))
        assert schedule is not None  # only an adaptive one may have none
        return schedule


@dataclass(frozen=True)
class _FirstPlans:
    """Plans for equal times or those of known stages, which the first batch has to wait for."""

    config: ScheduleConfig
    placement: Placement
    planner: Planner
    preflight: Preflight
    known: KnownStages | None

    def wait(self, micro_batches: int, room: Room | None = None) -> Schedule:
        """The planner's schedule (collective), for a limit in bytes within `room`; where the planner fails, the table's
        fastest within the limit.

        Raises PipelineError on every rank if there is neither.
        """
        known = self.known
        if known is not None and known.schedule.micro_batches == micro_batches:
            return known.schedule
        times = equal_times(self.placement.stages) if known is None else known.times
        request = self.preflight.run(partial(request_for, self.config, self.placement.ranks, micro_batches, times, room,
                                             cache.folder(), known))
        # All ranks wait.
        self.planner.start(replace(request, cores=usable_cores()))
        try:
            return _planned(self.planner.wait(), self.config)["schedule"]
        except PlannerFailed as failure:
            named = table_schedule(self.config, self.placement.ranks, micro_batches)
            if named is None:
                raise PipelineError(f"{_asked(self.config)}: {failure}. No schedule of the table is within the limit, "
                                    "so training can't start without a plan") from failure
            if dist.get_rank() == 0:
                logger.error(f"{_asked(self.config)}: {failure}. Training uses {named.name}, the fastest schedule "
                             "of the table within the limit")
            return named


@dataclass(frozen=True)
class PlannedSchedules(_Unmeasured):
    """The planner's schedule for equal times, or for those of known stages; training waits for it."""

    first_plans: _FirstPlans

    def first(self, micro_batches: int) -> Schedule:
        return self.first_plans.wait(micro_batches)


class _Phase(enum.Enum):
    WARM_UP = enum.auto()
    MEASURE = enum.auto()
    PLAN = enum.auto()
    SETTLED = enum.auto()


class MeasuredSchedules:
    """The planner's schedule for this job's own times.

    Args:
        first_plans: plans until times are measured.
        measure_hops: measures the seconds of this rank's hops [boundary], 0 for others' (collective over a pipeline).
        room: for a limit in bytes what passes may take and what they need, the same on all ranks of the job; None where
            sizes are unknown.
        with_keeping: adds the times of recomputation and copies, where these may be planned (collective).
    """

    def __init__(self, first_plans: _FirstPlans, measure_hops: Callable[[], list[float]],
                 room: Callable[[], Room | None], with_keeping: Callable[[Times], Times]) -> None:
        self._first_plans, self._exchange = first_plans, first_plans.preflight.exchange
        self._config, self._placement, self._known = first_plans.config, first_plans.placement, first_plans.known
        self._measure_hops, self._room, self._with_keeping = measure_hops, room, with_keeping
        # Then lengths rise and fall over each batch in the same way, and the plan is made for that.
        self._orders = self._config.micro_batch_order == "length"
        self._micro_batches = 0
        # By number of micro-batches: the schedules to measure by, and the latest plans for measured times.
        self._safe: dict[int, Schedule] = {}
        self._planned: dict[int, Schedule] = {}
        self._times: Times | None = None
        # Why there can't be a plan, if there can't.
        self._refused: PipelineError | None = None
        self._enter(_Phase.WARM_UP)

    def first(self, micro_batches: int) -> Schedule:
        safe = self._safe_schedule(micro_batches)
        self._micro_batches = micro_batches
        # Scales are those of as many micro-batches.
        if self._times is None or self._times.scales:
            self._enter(_Phase.WARM_UP)
        else:
            self._plan(self._times)
        return safe

    def _safe_schedule(self, micro_batches: int) -> Schedule:
        """A schedule for equal times, or those of known stages, within the memory limit, in which every B and W can be
        timed, where there is room for that."""
        if micro_batches not in self._safe:
            safe = self._first_plans.preflight.run(partial(self._without_plan, micro_batches))
            self._safe[micro_batches] = unfused(self._first_plans.wait(micro_batches) if safe is None else safe)
        return self._safe[micro_batches]

    def _without_plan(self, micro_batches: int) -> Schedule | None:
        """A safe schedule that needs no plan, if there is one; MemoryLimitError if the limit can't be met."""
        size = self._config, self._placement.ranks, micro_batches
        safe = None
        if self._known is None:
            check_limit(*size)
            safe = table_schedule(*size)
        if gives_back_memory(self._config) and (safe is None or isinstance(self._config.memory_limit, int)):
            safe = least_schedule(*size)
        return safe

    def within(self, room: Room) -> Schedule | None:
        if self._config.name != ADAPTIVE:
            return None
        fused = self._first_plans.wait(self._micro_batches, room)
        apart = unfused(fused)
        self._safe[self._micro_batches] = apart if room.holds(apart) else fused
        if self._phase is _Phase.PLAN:  # the planner has left that for this one
            assert self._times is not None
            self._plan(self._times)
        return self._safe[self._micro_batches]

    @property
    def will_plan(self) -> bool:
        return self._config.name == ADAPTIVE

    def after_batch(self, schedule: Schedule, record: PassRecorder) -> Schedule | None:
        if schedule.micro_batches != self._micro_batches:
            self.first(schedule.micro_batches)
            return None
        if self._refused is not None:
            raise self._refused.with_traceback(None)
        self._batches += 1
        try:
            return self._follow(record)
        except PlannerFailed as failure:
            # Training continues unchanged: a plan isn't worth the finished batches.
            if dist.get_rank() == 0:
                logger.error(f"{KEY} {self._config.name} stays as it is: {failure}")
            self._enter(_Phase.SETTLED)
            return None
        except PeerLost:
            raise
        except PipelineError as error:
            # On all ranks. A script that goes on is told again after each batch.
            self._refused = error
            raise

    def _follow(self, record: PassRecorder) -> Schedule | None:
        """What its phase does with a batch."""
        if self._phase is _Phase.PLAN:
            return self._take_plan()
        if self._phase is _Phase.WARM_UP:
            if self._batches == WARM_UP_BATCHES:
                self._enter(_Phase.MEASURE)
        elif self._phase is _Phase.MEASURE:
            self._samples.add(record.spans(), record.entry_seconds())
            if self._batches == MEASURED_BATCHES:
                self._plan(self._agreed_times())
        else:
            return self._watch(record)
        return None

    @property
    def times(self) -> Times | None:
        return self._times if self._phase is _Phase.SETTLED else None

    @property
    def entry_costs(self) -> tuple[tuple[float, ...], ...]:
        return self._times.entry_costs if self._times is not None else ()

    def _enter(self, phase: _Phase) -> None:
        self._phase, self._batches = phase, 0
        self._refused = None
        self._samples = StageSamples(statistics.mean if self._orders else statistics.median)

    def _plan(self, times: Times) -> None:
        self._times = times
        in_bytes = is_in_bytes(self._config)
        room = self._room() if in_bytes or gives_back_memory(self._config) else None
        request = request_for(self._config, self._placement.ranks, self._micro_batches, times, room, cache.folder(),
                              self._known)
        running = [self._safe_schedule(self._micro_batches)]
        if self._micro_batches in self._planned:
            running.append(self._planned[self._micro_batches])
        request = replace(request, cores=_spare_cores(), running=tuple(running))
        self._first_plans.planner.start(self._within_least(request) if in_bytes and room is None else request)
        self._enter(_Phase.PLAN)

    def _within_least(self, request: Request) -> Request:
        """`request` with the memory of the schedule that has run so far, which needs least: for a limit in bytes when
        sizes are unknown.
        """
        if dist.get_rank() == 0:
            logger.warning(f"{_limit(self._config)} can't be planned for, because the "
                           "sizes of activations are unknown; planning for the memory of the schedule of the table "
                           "that needs least")
        return replace(request, limits=peak_activations(self._safe_schedule(self._micro_batches), request.activations))

    def _take_plan(self) -> Schedule | None:
        answer = self._first_plans.planner.poll()
        if answer is None:
            return None
        found = _planned(answer, self._config)
        schedule = found["schedule"]
        self._planned[schedule.micro_batches] = schedule
        if dist.get_rank() == 0:
            assert self._times is not None
            timeline = simulate(schedule, self._times)
            logger.info(f"{KEY} {schedule.name}: planned in {found['planning_s']:.1f} s during "
                        f"{self._batches} batches; makespan {timeline.makespan:.4f} s with the measured times, bubble "
                        f"{timeline.bubble:.1%}, the lower bound is {found['lower_bound']:.4f} s")
        self._enter(_Phase.SETTLED)
        return schedule

    def _watch(self, record: PassRecorder) -> Schedule | None:
        """Compare the latest batches with the times of the plan every so often; if they moved, measure again."""
        if self._batches > BATCHES_BETWEEN_CHECKS - MEASURED_BATCHES:
            self._samples.add(record.spans(), record.entry_seconds())
        if self._batches < BATCHES_BETWEEN_CHECKS:
            return None
        if self._times is None:
            # They couldn't be measured before.
            self._enter(_Phase.MEASURE)
            return None
        times = self._agreed_times()
        moved = moved_by(_of_the_same_lengths(times, self._times) if self._orders else times, self._times)
        if moved <= self._config.drift:
            self._enter(_Phase.SETTLED)
            return None
        if dist.get_rank() == 0:
            logger.info(f"pipeline_schedule {self._config.name}: times have moved by {moved:.0%} since the plan "
                        "was made; measuring and planning again")
        # The present schedule may run B and W as one, which can't tell their times.
        self._enter(_Phase.MEASURE)
        return self._safe_schedule(self._micro_batches)

    def _agreed_times(self) -> Times:
        times = self._with_keeping(agreed_times(self._samples, self._measure_hops(), self._placement, self._exchange))
        if not self._orders:
            return times
        return replace(times, scales=agreed_scales(self._samples, self._micro_batches, self._exchange))


def _spare_cores() -> int:
    """How many cores the planner may use while this host's ranks train: one for each of them is theirs, and one the
    planner's in any case, at the lowest priority. Without the launcher's word all ranks of the job are on this host.
    """
    return max(1, usable_cores() - int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())))


def _asked(config: ScheduleConfig) -> str:
    return f"{KEY} = {config.model_dump(exclude_defaults=True)}"


def _limit(config: ScheduleConfig) -> str:
    limit = config.memory_limit
    if isinstance(limit, ActivationLimit):
        return f"{KEY}.memory_limit.activations = {limit.activations} bytes"
    return f"{KEY}.memory_limit = {limit!r}"


def _planned(answer: Answer, config: ScheduleConfig) -> Planned:
    """The plan in an answer; PipelineError if the limits of `config` can't be met."""
    if "schedule" in answer:
        return answer
    unit = "bytes" if is_in_bytes(config) else "activations of one of 2p chunks"
    raise PipelineError(f"{_limit(config)}: {answer['error']} ({unit})")


def _of_the_same_lengths(now: Times, then: Times) -> Times:
    """`now` as if its batches had been as long as those of `then`: what matters is which stages have become slower."""
    stages = range(len(then.forward))
    share = sum(map(then.of_stage, stages)) / (sum(map(now.of_stage, stages)) or 1.0)
    forward, input_grad, weight_grad = (tuple(share * seconds for seconds in of_stages) for of_stages in
                                        (now.forward, now.input_grad, now.weight_grad))
    return replace(now, forward=forward, input_grad=input_grad, weight_grad=weight_grad)


def moved_by(now: Times, then: Times) -> float:
    """How far times have moved: the greatest change of a stage or a hop, as a share of that stage's time then.

    Of a hop the stage is the faster of those that it joins, since a short hop may double without any effect.
    """
    stages = [then.of_stage(stage) for stage in range(len(then.forward))]
    changes = [(abs(now.of_stage(stage) - before), before) for stage, before in enumerate(stages)]
    changes += [(abs(hop - before), min(joined)) for hop, before, joined in zip(now.hops, then.hops, pairwise(stages))]
    return max(change / whole if whole else float(change > 0) for change, whole in changes)
