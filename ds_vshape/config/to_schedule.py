"""From the "pipeline_schedule" section to a schedule, for training and for predictions.

A schedule of the table is built from its name. The planner makes adaptive ones, and those with a fixed level of memory
for the job's own times. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ds_vshape.config.section import KEY, ActivationLimit, ScheduleConfig
from ds_vshape.schedule.activations import Activations, Working
from ds_vshape.schedule.adaptive.problem import SLACK
from ds_vshape.schedule.builders.everything import with_everything_offloaded, with_everything_recomputed
from ds_vshape.schedule.memory_limit import (MemoryLimitError, check_fraction, check_memory_limit, check_possible,
                                              count_of, fraction_of_1f1b)
from ds_vshape.schedule.named import ADAPTIVE, build, names_on
from ds_vshape.schedule.partition.layers import Layers
from ds_vshape.schedule.partition.partition_and_order import PartitionProblem, limits_of_1f1b
from ds_vshape.schedule.request import Request
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Times, simulate
from ds_vshape.schedule.within import peaks_with_passes


@dataclass(frozen=True)
class KnownStages:
    """Stages whose layers' costs are known before any batch: their `bounds`, and the schedule that was planned together
    with them.
    """

    layers: Layers
    bounds: tuple[int, ...]
    schedule: Schedule

    @property
    def times(self) -> Times:
        """Of the stages. Hops are unknown, and count as nothing; so are the entries of W, which stays whole."""
        return replace(self.layers.times(self.bounds), entry_costs=((1.0,),) * (len(self.bounds) - 1))

    @property
    def activations(self) -> Activations:
        """Of the stages, in the unit of the layers' sizes."""
        return self.layers.activations(self.bounds)


def partition_problem(config: ScheduleConfig, layers: Layers, ranks: int, micro_batches: int,
                      noise: float) -> PartitionProblem | None:
    """What is planned where the partition is free too; `noise` as in PartitionProblem.

    None where only the work of ranks is balanced: for schedules of a fixed order, and where more must be known than the
    layers, for limits in bytes and for recomputation and offload.
    """
    if config.name != ADAPTIVE or gives_back_memory(config) or is_in_bytes(config):
        return None
    limits = limits_of_1f1b(fraction_of(config), layers, ranks, micro_batches)
    return PartitionProblem(layers, config.placement_on(ranks), micro_batches, limits, max_pieces=1, noise=noise)


def fraction_of(config: ScheduleConfig) -> float:
    """The memory limit of a config as a fraction of 1F1B's peak, which holds where there is none."""
    return config.memory_limit if isinstance(config.memory_limit, float) else 1.0


def is_planned(config: ScheduleConfig) -> bool:
    """Whether the planner makes the schedule."""
    return config.name == ADAPTIVE or config.times == "profile"


def is_in_bytes(config: ScheduleConfig) -> bool:
    """Whether its memory limit is known to be kept only when the sizes of activations are known."""
    return isinstance(config.memory_limit, (int, ActivationLimit))


@dataclass(frozen=True)
class Room:
    """The bytes that the passes of each rank may take; None for those that the config says, of activations alone.

    `activations` are the bytes of each stage's, and `working` what its passes need while they run.
    """

    activations: Activations
    working: Working
    limits: tuple[float, ...] | None = None

    def holds(self, schedule: Schedule) -> bool:
        """Whether all ranks keep to the limits under `schedule`, while passes run too."""
        if self.limits is None:
            return True
        peaks = peaks_with_passes(schedule, self.activations, self.working)
        return all(peak <= limit * (1 + SLACK) for peak, limit in zip(peaks, self.limits, strict=True))


@contextmanager
def in_full() -> Iterator[None]:
    """Name the key of a limit that isn't met as users write it."""
    try:
        yield
    except MemoryLimitError as error:
        raise MemoryLimitError(f"{KEY}.{error}") from None


def check_limit(config: ScheduleConfig, ranks: int, micro_batches: int) -> None:
    """Raise MemoryLimitError if no adaptive schedule can keep to the limit of `config`, a fraction of 1F1B's peak,
    whatever the sizes of activations are. With recomputation and offload more depends on these."""
    if config.name == ADAPTIVE and isinstance(config.memory_limit, float):
        chunks = config.placement_on(ranks).chunks_each
        with in_full():
            check_possible(config.memory_limit, ranks, micro_batches, 2 / chunks if gives_back_memory(config) else 2)


@in_full()
def request_for(config: ScheduleConfig, ranks: int, micro_batches: int, times: Times, room: Room | None = None,
                cache: Path | None = None, known: KnownStages | None = None) -> Request:
    """The planner's request for a batch whose passes take `times`.

    Args:
        room: for a limit in bytes, which is ignored without it. For all other limits activations are counted as in the
            paper. Without it nothing is recomputed or offloaded.
        cache: the folder of cached plans.
        known: the stages, if their layers' costs are known: all other limits are then fractions of what 1F1B keeps of
            these at most. Without them activations are counted as in the paper.

    Raises:
        MemoryLimitError: if no schedule can peak at the limit, a fraction of 1F1B's peak, with the key in full.
    """
    limit, placement = config.memory_limit, config.placement_on(ranks)
    asked = partial(Request.within, name=config.name, placement=placement, micro_batches=micro_batches, times=times,
                    time_limit=config.planning_seconds, cache=cache)
    if known is not None:
        problem = partition_problem(config, known.layers, ranks, micro_batches, noise=0.0)
        assert problem is not None  # else no stages were planned
        fraction = fraction_of(config)
        check_fraction(fraction, fraction * problem.growth(known.bounds), ranks, micro_batches)
        return asked(problem.limits[0], activations=known.activations)
    if room is None:
        if isinstance(limit, float):
            check_possible(limit, ranks, micro_batches)
            return asked(count_of(limit, ranks, micro_batches))
        return asked(None)
    gives_back = gives_back_memory(config)
    if isinstance(limit, ActivationLimit):
        request = asked(float(limit.activations), activations=room.activations)
    elif isinstance(limit, int):
        request = replace(asked(None, activations=room.activations), limits=room.limits, working=room.working)
    else:
        if limit is not None and not gives_back:
            check_possible(limit, ranks, micro_batches)
        counted = room.activations.shares_in(Activations.counted(placement)) if gives_back else None
        request = asked(None if limit is None else count_of(limit, ranks, micro_batches), activations=counted)
    return replace(request, recompute=config.recompute, offload=config.offload) if gives_back else request


def least_schedule(config: ScheduleConfig, ranks: int, micro_batches: int) -> Schedule:
    """The schedule of the table that needs least memory, with all activations recomputed or offloaded as far as
    `config` lets a plan do that; but not those of one micro-batch, whose sizes can be measured."""
    schedule = min(_table(config, ranks, micro_batches), key=fraction_of_1f1b)
    if config.recompute:
        schedule = with_everything_recomputed(schedule)
    if config.offload:
        schedule = with_everything_offloaded(schedule)
    measured = min(1, micro_batches - 1)
    return schedule.with_orders(tuple(
        tuple(action for action in order if not (action.kind.is_optional and action.micro_batch == measured))
        for order in schedule.orders))


def gives_back_memory(config: ScheduleConfig) -> bool:
    """Whether a plan may recompute or offload."""
    return config.recompute or config.offload


def equal_times(stages: int) -> Times:
    """Times for a plan without any that are measured: all passes and copies alike, and W whole, whose entries aren't
    known."""
    return replace(Times.uniform(stages, copy=1), entry_costs=((1.0,),) * stages)


@in_full()
def table_schedule(config: ScheduleConfig, ranks: int, micro_batches: int) -> Schedule | None:
    """The schedule of the table that `config` names. For an adaptive one, the fastest within its limit, or None if
    there is none; for a limit in bytes, which can't be checked before sizes are known, the one that needs least memory.

    Raises MemoryLimitError if the named schedule peaks above the limit.
    """
    if config.name != ADAPTIVE:
        schedule = build(config.name, ranks, micro_batches, config.chunks)
        if isinstance(config.memory_limit, float):
            check_memory_limit(schedule, config.memory_limit)
        return schedule
    schedules = _table(config, ranks, micro_batches)
    limit = 1.0 if config.memory_limit is None else config.memory_limit
    if not isinstance(limit, float):
        return min(schedules, key=fraction_of_1f1b)
    fitting = [schedule for schedule in schedules if fraction_of_1f1b(schedule) <= limit + 1e-9]
    equal = Times.uniform(config.placement_on(ranks).stages)
    return min(fitting, key=lambda schedule: simulate(schedule, equal).makespan, default=None)


def _table(config: ScheduleConfig, ranks: int, micro_batches: int) -> list[Schedule]:
    """The schedules of the table on the placement of `config`."""
    placement = config.placement_on(ranks)
    return [build(name, ranks, micro_batches, placement.chunks_each) for name in names_on(placement)]
