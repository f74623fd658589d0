"""The bytes that a rank needs, by what they are for.

    parameters     those of both chunks, flat buffers and their padding included
    gradients      as they are accumulated over a batch
    optimizer      this rank's shard: weights of high precision and moments
    activations    the peak under a schedule, of the sizes that one micro-batch of each stage has
    working        what the peak is higher by for what passes need only while they run, and for messages on their way
    rollback       with optimizer_post_validation: what a step changes, until the next batch's first backward

Activations and working are None where they couldn't be measured. Not counted: DeepSpeed's buckets during the reduction
of gradients.
"""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one pipeline rank."""

    parameters: int
    gradients: int
    optimizer: int
    activations_peak: int | None
    working: int | None = 0
    rollback: int = 0

    @property
    def total(self) -> int:
        """The sum of what is known, as if the peaks of all came at once: at the last micro-batches they nearly do."""
        return sum(size for size in astuple(self) if size is not None)

    def __str__(self) -> str:
        parts = (f"{name} {'unknown' if size is None else readable(size)}"
                 for name, size in asdict(self).items() if size != 0 or name != "rollback")
        at_least = "at least " if self.activations_peak is None else ""
        return f"{at_least}{readable(self.total)}: {', '.join(parts).replace('_', ' ')}"


def readable(size: float) -> str:
    """Bytes in the unit that gives the fewest digits before the point."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(int(size).bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{size / 1024 ** power:.4g} {units[power]}"
