"""A batch before it runs: the schedule, simulated with the costs of gpt_costs.py, and the memory of each rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ds_vshape.config.section import KEY, ScheduleConfig
from ds_vshape.config.to_schedule import Room, equal_times, in_full, is_planned, request_for
from ds_vshape.layouts.gpt_costs import TrainingCosts
from ds_vshape.measure.rank_memory import RankMemory, beyond, least, rooms, with_passes
from ds_vshape.schedule.builders.pending import with_few_pending
from ds_vshape.schedule.memory_limit import MemoryLimitError, check_memory_limit
from ds_vshape.schedule.named import ADAPTIVE, build
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Timeline, Times, simulate


@dataclass(frozen=True)
class Prediction:
    """The simulated batch of a training; `seconds` with the reduction after the passes, without the optimizer's step.
    """

    training: TrainingCosts
    schedule: Schedule
    timeline: Timeline
    seconds: float
    memory: tuple[RankMemory, ...]

    @property
    def fullest(self) -> int:
        """The bytes of the rank that needs most."""
        return max(memory.total for memory in self.memory)

    @property
    def bubble(self) -> float:
        """The share of the time until the last pass in which ranks wait."""
        return self.timeline.bubble

    @property
    def mfu(self) -> float:
        """The share of the devices' FLOPs that the model needs."""
        return self.training.mfu(self.seconds)

    @property
    def samples_per_second(self) -> float:
        """Sequences, of all replicas."""
        training = self.training
        return training.samples * training.micro_batches * training.data / self.seconds


def predict(config: ScheduleConfig, training: TrainingCosts, times: Times,
            progress: Callable[[float], None] = lambda fraction: None) -> Prediction:
    """The batch of `training` by the schedule of `config`, whose stages take `times`.

    Raises LimitError and MemoryLimitError (both ValueErrors) for a limit that can't be kept, and ValueError for an
    unknown name.
    """
    placement = config.placement_on(training.ranks)
    sizes = training.activations(placement), training.working(placement)
    state = training.state(placement)
    if config.optimizer_post_validation:
        state = [replace(of_rank, rollback=of_rank.optimizer) for of_rank in state]
    limit = config.memory_limit
    if isinstance(limit, int):
        _check(limit, "the least possible is", least(state, placement, sizes, config))
    room = Room(*sizes, rooms(limit, state) if isinstance(limit, int) else None)
    schedule = _schedule(config, training, times, room, progress)
    memory = with_passes(state, schedule, sizes)
    if isinstance(limit, int):
        _check(limit, f"{config.name} needs", memory)
    timeline = simulate(schedule, times)
    return Prediction(training, schedule, timeline, timeline.makespan + training.reduction(placement), memory)


def _check(limit: int, what: str, memory: Sequence[RankMemory]) -> None:
    if error := beyond(f"{KEY}.memory_limit", limit, what, memory):
        raise MemoryLimitError(error)


# A search asks for the same ones again and again.
@lru_cache(maxsize=256)
def _named(name: str, ranks: int, micro_batches: int, chunks: int | None) -> Schedule:
    return build(name, ranks, micro_batches, chunks)


def _schedule(config: ScheduleConfig, training: TrainingCosts, times: Times, room: Room,
              progress: Callable[[float], None]) -> Schedule:
    """The one that the job will train by, once its times are measured if `config` says so."""
    ranks, micro_batches = training.ranks, training.micro_batches
    if is_planned(config):
        planned_for = times if config.times == "profile" else equal_times(len(times.forward))
        schedule = request_for(config, ranks, micro_batches, planned_for, room).choose(progress).schedule
    else:
        schedule = _named(config.name, ranks, micro_batches, config.chunks)
    if config.name != ADAPTIVE and isinstance(config.memory_limit, float):
        with in_full():
            check_memory_limit(schedule, config.memory_limit)
    return with_few_pending(schedule) if training.recompute else schedule
