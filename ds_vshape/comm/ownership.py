"""What crosses a stage boundary has memory of its own: nothing else writes to it.

In one process a result is used at once. Here it waits, for a link or for the next stage's turn, and meanwhile its stage
runs other micro-batches; or the next stage, on the same rank, changes what it got in place. But a layer may pass on
memory that it will write again (a buffer of positions), that isn't its to give away (a parameter, an input that it has
passed through), or that two results share. Such results are copied:

    result                                                                          copied
    an operator's                                                                   no
    a tensor that something else keeps                                              yes
    memory that others have too, and the result of no operator, written in place,
    or a part of a parameter or of another tensor that no operator made             yes
    memory that isn't torch's own (of a numpy array), and the result of no operator  yes
    memory of an earlier member of the same results                                 yes

The other holder of the memory may be autograd, which saved it for the backward; so the last rule but one copies,
without need, what an in-place operator has both made and saved (relu_). Writes that get past these rules (of a kernel
of the user's, say) are found by tensors' versions, if torch counts them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from deepspeed.runtime.pipe.module import PipelineError
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)

Versions = tuple[int | None, ...]


def _holders(tensor: Tensor) -> int:
    """The number of references to the memory of `tensor`, that of this call included."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


_ALONE = _holders(torch.empty(1))


@dataclass(slots=True)
class _Result:
    """A tensor on its way: its numbers outside of the graph, and what decides whether its memory is its own."""

    numbers: Tensor
    requires_grad: bool
    may_be_kept: bool
    original: weakref.ref[Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> _Result:
        # That of a parameter or of what no operator made.
        is_part_of_leaf = tensor._base is not None and tensor._base.is_leaf
        written = not tensor.is_inference() and tensor._version > 0
        return cls(tensor.detach(), tensor.requires_grad, tensor.grad_fn is None or written or is_part_of_leaf,
                   weakref.ref(tensor))

    def owned(self, others: set[int]) -> Tensor:
        """The numbers, copied if something else may write to them, or holds them.

        `others` is the memory of other members.
        """
        memory = self.numbers.untyped_storage()._cdata
        shared = (self.original() is not None or memory in others
                  or self.may_be_kept and (type(self.numbers) not in _PLAIN or _holders(self.numbers) > _ALONE
                                           or not self.numbers.untyped_storage().resizable()))
        others.add(memory)
        return (self.numbers.clone() if shared else self.numbers).requires_grad_(self.requires_grad)


def own(results: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """`results` as leaves that require a gradient where they did, in memory of their own.

    The list is emptied, and its caller must have no other reference to them: one that is kept elsewhere is copied.
    """
    taken = [None if result is None else _Result.of(result) for result in results]
    results.clear()
    others: set[int] = set()
    return tuple(None if result is None else result.owned(others) for result in taken)


def versions(tensors: Iterable[Tensor | None]) -> Versions:
    """How often torch has seen the memory of `tensors` written, for `check_unwritten`."""
    return tuple(None if tensor is None or tensor.is_inference() else tensor._version for tensor in tensors)


def check_unwritten(tensors: Iterable[Tensor | None], before: Versions, what: str, *which: object) -> None:
    """Raises PipelineError if the memory of `tensors`, which errors call `what.format(*which)`, was written since
    `before`."""
    if versions(tensors) != before:
        raise PipelineError(f"the {what.format(*which)} was written to after its stage had passed it on, and before it "
                            "was used: something keeps its memory and changes it. Pass on a copy instead, made by "
                            "clone()")
