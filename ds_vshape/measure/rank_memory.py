"""The bytes that a rank needs, by purpose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from ds_vshape.config.section import ScheduleConfig
from ds_vshape.schedule.activations import Activations, Working, peak_activations
from ds_vshape.schedule.placement import Placement
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.schedule.within import besides_activations, one_at_a_time

# Of each stage for one micro-batch, in bytes.
Sizes = tuple[Activations, Working]

# Parts that a log line leaves out where they are 0.
_OPTIONAL = ("rollback", "communicators", "batch_end", "process")


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one pipeline rank."""

    parameters: int
    """Those of all chunks, with flat buffers and their padding."""

    gradients: int
    """The sums over the micro-batches of a batch."""

    optimizer: int
    """This rank's shard: high-precision weights and moments."""

    activations_peak: int | None
    """The peak under the schedule, from the sizes of one micro-batch of each stage; None if unknown."""

    working: int | None = 0
    """What the peak of allocated memory is above all others: temporary memory of passes, and messages in transit."""

    rollback: int = 0
    """With `optimizer_post_validation`: what a step changes, until the first backward of the next batch."""

    communicators: int = 0
    """Over NCCL: those of messages between pipeline ranks, estimated in schedule/communicators.py; not DeepSpeed's."""

    batch_end: int = 0
    """What the reduction of gradients and the step need besides, when activations are gone: buckets, copies of
    gradients, and temporary memory of the optimizer."""

    process: int = 0
    """What the process has besides tensors: on a GPU the device's context, communicators that aren't counted above, and
    what the allocator keeps; on a CPU the interpreter and its libraries. 0 where it isn't measured."""

    @property
    def permanent(self) -> int:
        """What is there when the first pass starts, or comes to stay during the batch."""
        return (self.parameters + self.gradients + self.optimizer + self.rollback + self.communicators + self.process)

    @property
    def passes(self) -> int:
        """What comes and goes with the passes, as far as it is known."""
        return (self.activations_peak or 0) + (self.working or 0)

    @property
    def total(self) -> int:
        """The most at once: with the passes or at the end of the batch, when activations are gone."""
        return self.permanent + max(self.passes, self.batch_end)

    @property
    def largest_part(self) -> tuple[str, int]:
        """What takes most, in words, and its bytes."""
        name, size = max(asdict(self).items(), key=lambda part: part[1] or 0)
        return _in_words(name), size or 0

    def __str__(self) -> str:
        parts = (f"{_in_words(name)} {'unknown' if size is None else readable(size)}"
                 for name, size in asdict(self).items() if size != 0 or name not in _OPTIONAL)
        at_least = "at least " if self.activations_peak is None else ""
        return f"{at_least}{readable(self.total)}: {', '.join(parts)}"


def batch_end_bytes(gradients: int, temporary: int, flat: int = 0, made: int = 0, bucket: int = 0) -> int:
    """What comes to `gradients` in their reduction and in the step.

    Args:
        temporary: the optimizer's memory while it steps.
        flat: the copy of gradients that the step takes, 0 where it takes them as they are. Then they are free.
        made: what making that copy takes.
        bucket: memory into which gradients move when they are reduced.
    """
    if not flat:
        return temporary
    return max(bucket, bucket - min(bucket, gradients) + made, flat + temporary - gradients, 0)


def with_passes(memory: Sequence[RankMemory], schedule: Schedule, sizes: Sizes) -> tuple[RankMemory, ...]:
    """The `memory` of all ranks, with what passes need under `schedule`."""
    peaks = zip(peak_activations(schedule, sizes[0]), besides_activations(schedule, *sizes), strict=True)
    return tuple(replace(of_rank, activations_peak=round(alive), working=round(besides))
                 for of_rank, (alive, besides) in zip(memory, peaks, strict=True))


def rooms(limit: int, memory: Sequence[RankMemory]) -> tuple[float, ...]:
    """What a `limit` of bytes leaves for the passes of each rank."""
    return tuple(float(limit - of_rank.permanent) for of_rank in memory)


def least(memory: Sequence[RankMemory], placement: Placement, sizes: Sizes, config: ScheduleConfig
          ) -> tuple[RankMemory, ...]:
    """The `memory` of all ranks under the order that needs least, recomputed and offloaded as far as `config` says."""
    return with_passes(memory, one_at_a_time(placement, sizes[0], recompute=config.recompute, offload=config.offload),
                       sizes)


def beyond(key: str, limit: int, what: str, needed: Sequence[RankMemory],
           least: Sequence[RankMemory] | None = None) -> str:
    """The error for a `limit` of bytes that ranks break which need what is `needed`, as `what` says; nothing if all of
    them keep to it. `least` is what they would need under the order that needs least."""
    over = [rank for rank, of_rank in enumerate(needed) if of_rank.total > limit]
    if not over:
        return ""
    fullest = max(over, key=lambda rank: needed[rank].total)
    part, size = needed[fullest].largest_part
    totals = ", ".join(f"{readable(needed[rank].total)} on rank {rank}" for rank in over)
    told = (f"{key} = {readable(limit)}: {what} {totals}. Rank {fullest} needs most, {readable(size)}, for {part}, of "
            f"{needed[fullest]}")
    if least is None:
        return told
    lowest = max(of_rank.total for of_rank in least)
    return f"{told}. The least possible is {readable(lowest)}"


def _in_words(part: str) -> str:
    return part.replace("_", " ")


def readable(size: float) -> str:
    """Bytes in the unit that gives the fewest digits before the point."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(int(size).bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{size / 1024 ** power:.4g} {units[power]}"
