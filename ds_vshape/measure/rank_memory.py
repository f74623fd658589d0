"""The bytes that a rank needs, by purpose."""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one pipeline rank. DeepSpeed's buckets during the reduction of gradients aren't counted."""

    parameters: int
    """Those of all chunks, with flat buffers and their padding."""

    gradients: int
    """The sums over the micro-batches of a batch."""

    optimizer: int
    """This rank's shard: high-precision weights and moments."""

    activations_peak: int | None
    """The peak under the schedule, from the measured sizes of one micro-batch of each stage; None if unknown."""

    working: int | None = 0
    """What the peak of allocated memory is above all others: temporary memory of passes, and messages in transit."""

    rollback: int = 0
    """With `optimizer_post_validation`: what a step changes, until the first backward of the next batch."""

    communicators: int = 0
    """Over NCCL: those of messages between pipeline ranks, estimated in schedule/communicators.py; not DeepSpeed's."""

    @property
    def total(self) -> int:
        """The sum of what is known, as if all peaks coincided: at the last micro-batches they nearly do."""
        return sum(size for size in astuple(self) if size is not None)

    def __str__(self) -> str:
        parts = (f"{name} {'unknown' if size is None else readable(size)}"
                 for name, size in asdict(self).items() if size != 0 or name not in ("rollback", "communicators"))
        at_least = "at least " if self.activations_peak is None else ""
        return f"{at_least}{readable(self.total)}: {', '.join(parts).replace('_', ' ')}"


def readable(size: float) -> str:
    """Bytes in the unit that gives the fewest digits before the point."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(int(size).bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{size / 1024 ** power:.4g} {units[power]}"
