"""A batch before it runs: the schedule, simulated with the costs of gpt_costs.py, and the memory of each rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from ds_vshape.layouts.gpt_costs import Training
from ds_vshape.measure.rank_memory import RankMemory
from ds_vshape.schedule.activations import Activations, peaks
from ds_vshape.schedule.choose import Limits, schedule_for
from ds_vshape.schedule.memory_limit import check_memory_limit, peak_of_1f1b
from ds_vshape.schedule.named import ADAPTIVE, build, placement_of
from ds_vshape.schedule.pending import with_few_pending
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.timeline import Timeline, Times, simulate


@dataclass(frozen=True)
class Wanted:
    """A schedule by its name, as the "pipeline_schedule" section has it.

    `memory_limit` is a fraction of 1F1B's peak of activations, or bytes; `measured` means that the job will plan for
    its own times. Of those that don't, an adaptive one is planned for equal times. `rolls_back` means that the job will
    keep what a step changes until that is validated.
    """

    name: str
    memory_limit: float | int | None = None
    measured: bool = False
    planning_seconds: float = 10.0
    rolls_back: bool = False


@dataclass(frozen=True)
class Prediction:
    """The simulated batch of a training; `seconds` with the reduction after the passes, without the optimizer's step.
    """

    training: Training
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


def predict(wanted: Wanted, training: Training, times: Times,
            progress: Callable[[float], None] = lambda fraction: None) -> Prediction:
    """The batch of `training` where its stages, as the schedule wants them, take `times`.

    Raises LimitError and MemoryLimitError (both ValueErrors) for a limit that can't be kept, and ValueError for an
    unknown name.
    """
    placement = placement_of(wanted.name, training.ranks)
    activations = training.activations(placement)
    schedule = _schedule(wanted, training, times, activations, progress)
    timeline = simulate(schedule, times)
    memory = tuple(RankMemory(round(weights), round(gradients), round(optimizer), round(peak),
                              rollback=round(optimizer) if wanted.rolls_back else 0)
                   for (weights, gradients, optimizer), peak
                   in zip(training.state(placement), peaks(schedule, activations), strict=True))
    return Prediction(training, schedule, timeline, timeline.makespan + training.reduction(placement), memory)


# A grid asks for the same ones again and again.
@lru_cache(maxsize=256)
def _named(name: str, ranks: int, micro_batches: int) -> Schedule:
    return build(name, ranks, micro_batches)


def _schedule(wanted: Wanted, training: Training, times: Times, activations: Activations,
              progress: Callable[[float], None]) -> Schedule:
    """As the engine finds it (ds_vshape/engine/scheduling.py): activations are counted unless the limit is in bytes."""
    ranks, micro_batches = training.ranks, training.micro_batches
    if wanted.name != ADAPTIVE and not wanted.measured:
        schedule = _named(wanted.name, ranks, micro_batches)
    else:
        limits: Limits | None = None
        if isinstance(wanted.memory_limit, int):
            limits = (float(wanted.memory_limit),) * ranks
        else:
            activations = Activations.counted(placement_of(wanted.name, ranks))
            if wanted.memory_limit is not None:
                limits = (wanted.memory_limit * peak_of_1f1b(ranks, micro_batches),) * ranks
        schedule = schedule_for(wanted.name, ranks, micro_batches,
                                times if wanted.measured else Times.uniform(2 * ranks), activations, limits,
                                time_limit=wanted.planning_seconds, progress=progress).schedule
    if wanted.name != ADAPTIVE:
        check_memory_limit(schedule, wanted.memory_limit)
    return with_few_pending(schedule) if training.recompute else schedule
