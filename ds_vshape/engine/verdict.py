"""Whether a step that each rank took on its own is accepted: the reports of all ranks, and the verdict on them.

A step on a rank's own gradients is right if no rank of the job finds an overflow in its gradients, and the norm of all
gradients isn't clipped. All ranks judge the same reports, so they reach the same verdict.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

# DeepSpeed adds norms up in another order (scaled_global_norm in runtime/zero/stage_1_and_2.py). If the norm is closer
# than this to the limit, the order could matter, and DeepSpeed's own step decides.
_MARGIN = 1e-5
# DeepSpeed adds up squares in fp32, and treats an infinite sum as an overflow.
_LARGEST_SQUARE = 1e38


class Verdict(enum.Enum):
    """What becomes of a step."""

    ACCEPTED = enum.auto()
    REDO = enum.auto()  # with clipped gradients, or skipped after an overflow; also if the norm is near the limit
    FAILED = enum.auto()  # the batch doesn't count


@dataclass(frozen=True)
class StepReport:
    """A rank's report: whether its batch failed, whether its gradients overflowed, and their 2-norm, loss scale
    included (0 if either of the first two is true)."""

    failed: bool
    overflow: bool
    norm: float

    def numbers(self) -> tuple[float, ...]:
        """As numbers, for other ranks."""
        return tuple(map(float, astuple(self)))

    @classmethod
    def of(cls, numbers: Sequence[float]) -> StepReport:
        """The report from its `numbers`."""
        failed, overflow, norm = numbers
        return cls(bool(failed), bool(overflow), norm)


@dataclass(frozen=True)
class NormLimits:
    """What DeepSpeed would do about a norm: `clip` is the config's gradient_clipping (0 for none), `scale` the loss
    scale."""

    clip: float
    scale: float

    def allow(self, norm: float) -> bool:
        """Whether gradients of this norm, without the loss scale, are finite and far enough from being clipped."""
        return math.isfinite(norm) and (not self.clip or norm * (1 + _MARGIN) + 1e-6 <= self.clip)


def judge(reports: Sequence[StepReport], replicas: int, limits: NormLimits) -> tuple[Verdict, float]:
    """The verdict on all ranks' reports, and the norm of all gradients without the loss scale; infinite for an
    overflow.

    Each part of the norm is in the reports of all its `replicas`.
    """
    if any(report.failed for report in reports):
        return Verdict.FAILED, math.inf
    square = math.fsum(report.norm ** 2 for report in reports) / replicas
    if any(report.overflow for report in reports) or not square < _LARGEST_SQUARE:
        return Verdict.REDO, math.inf
    norm = math.sqrt(square) / limits.scale
    return Verdict.ACCEPTED if limits.allow(norm) else Verdict.REDO, norm
