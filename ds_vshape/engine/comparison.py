"""How far two runs of one batch agree: their losses, and the gradients of their parameters.

They are equal to the last bit, or else to rounding. W may add a product to its sum where that lies, which is rounded
once where a whole backward rounds twice, and the gradients of a weight that two stages share add up in another order;
then the norm of the difference counts, as a share of the gradient's norm. A gradient that is zero but for rounding (the
bias of keys in attention) has nothing but noise to be compared with, so no norm is taken for smaller than a tenth of
what is usual on its rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# Shares of a norm that rounding may change, in sums of up to 64 micro-batches: far above what it does, far below what a
# gradient that misses or repeats a micro-batch does.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_MICRO_BATCHES = 64
_SMALLEST = 0.1


@dataclass(frozen=True)
class Difference:
    """The norm of the difference of two values, as a share of the second's norm; 0 if they are equal bit for bit."""

    share: float
    tolerance: float

    @property
    def is_close(self) -> bool:
        """Whether rounding explains the difference."""
        return self.share <= self.tolerance


def tolerance(dtype: torch.dtype, micro_batches: int) -> float:
    """What rounding may change in sums over `micro_batches`, as a share of their norm."""
    of_dtype = _TOLERANCES.get(dtype.to_real() if dtype.is_complex else dtype, max(_TOLERANCES.values()))
    return of_dtype * max(1.0, math.sqrt(micro_batches / _MICRO_BATCHES))


def usual_size(gradients: Iterable[Tensor | None]) -> float:
    """The root of the mean square of all numbers in `gradients`."""
    known = [gradient for gradient in gradients if gradient is not None]
    squares = sum(_norm(gradient) ** 2 for gradient in known)
    return math.sqrt(squares / max(1, sum(gradient.numel() for gradient in known)))


@torch.no_grad()
def compare(found: Tensor | None, expected: Tensor | None, allowed: float, usual: float = 0.0) -> Difference:
    """The difference of `found` from `expected`, where None is zero; `allowed` is its tolerance, and `usual` the usual
    size of such numbers."""
    if found is None or expected is None:
        present = found if expected is None else expected
        if present is None:
            return Difference(0.0, allowed)
        expected = torch.zeros_like(present) if expected is None else expected
        found = torch.zeros_like(present) if found is None else found
    found, expected = found.to_dense(), expected.to_dense()
    if torch.equal(found, expected):
        return Difference(0.0, allowed)
    distance = _norm(_wide(found) - _wide(expected))
    size = max(_norm(expected), _SMALLEST * usual * math.sqrt(expected.numel()))
    share = distance / size if size else math.inf
    return Difference(math.inf if math.isnan(share) else share, allowed)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float64, torch.complex128) or tensor.is_complex() else tensor.float()


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(_wide(tensor.to_dense())))
