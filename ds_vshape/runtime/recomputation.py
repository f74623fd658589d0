"""A forward that keeps nothing, and is run again before the backward.

The graph of F stays, without the tensors that it saved: those of a layer are dropped when the next layer starts. C runs
the layers a second time, from the same inputs, random numbers and buffers, and gives the graph what is saved then. So
the backward is that of F, node by node; the second graph is dropped. Autocast needs no care: both run in one batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from deepspeed.runtime.pipe.module import PipelineError
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ds_vshape.runtime.random_state import RandomState
from ds_vshape.runtime.saved_tensors import SavedTensor


class _Held(NamedTuple):
    """What a module has as a buffer: by which name, the tensor, and a copy of its numbers."""

    buffers: dict[str, Tensor | None]
    name: str
    tensor: Tensor
    value: Tensor

    def is_unchanged(self) -> bool:
        return self.buffers[self.name] is self.tensor and torch.equal(self.tensor, self.value)

    def put_back(self) -> None:
        self.buffers[self.name] = self.tensor
        # By `data`, which autograd doesn't look at: a graph may have saved the buffer.
        self.tensor.data.copy_(self.value)


class ChangingBuffers:
    """Those of the buffers of `modules` that a forward changes or replaces, such as a norm's statistics: C must find
    them as F did, and leave them as they are."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._places = [(part._buffers, name) for module in modules for part in module.modules()
                        for name, buffer in part._buffers.items() if buffer is not None]
        self._known = False

    @contextmanager
    def noted(self) -> Iterator[list[_Held]]:
        """Around a forward; gives what they held before it. The first time it finds out which they are, and waits for
        the device."""
        before = self._held()
        yield before
        if not self._known:
            before[:] = [held for held in before if not held.is_unchanged()]
            self._places = [(held.buffers, held.name) for held in before]
            self._known = True

    @contextmanager
    def at(self, before: Sequence[_Held]) -> Iterator[None]:
        """Inside they hold what they did `before`."""
        # Of those that were replaced, both tensors may be known elsewhere.
        now = [*(held._replace(value=held.tensor.clone()) for held in before), *self._held()]
        for held in before:
            held.put_back()
        try:
            yield
        finally:
            for held in now:
                held.put_back()

    def _held(self) -> list[_Held]:
        return [_Held(buffers, name, tensor, tensor.clone()) for buffers, name in self._places
                if (tensor := buffers[name]) is not None]


class _Expected(NamedTuple):
    """What C has to save in its turn, for a tensor of F's graph."""

    saved: weakref.ref[SavedTensor]
    shape: torch.Size
    dtype: torch.dtype


class Recomputation:
    """The first layers of a stage, run twice for one micro-batch.

    Args:
        what: the stage and micro-batch, as errors name them.
        stop: the number of the layer at which F starts to keep everything.
        buffers: those of the layers before it.
    """

    def __init__(self, what: str, stop: int, buffers: ChangingBuffers) -> None:
        self._what, self._stop, self._buffers = what, stop, buffers
        self._random = RandomState()
        self._before: list[_Held] = []
        self._expected: list[_Expected] = []
        # How many of them are dropped, and how many C has given back.
        self._dropped = self._filled = 0
        self._hooks = ExitStack()

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """Around F, which has to tell when each of its layers starts."""
        with self._buffers.noted() as before, self._hooks:
            self._hooks.enter_context(saved_tensors_hooks(self._pack, SavedTensor.unpacked))
            yield
        self._drop()
        self._before = before

    def starts(self, layer: int) -> None:
        """Layer number `layer` of the model starts, or all layers before it have ended."""
        self._drop()
        if layer == self._stop:
            self._hooks.close()

    def _pack(self, tensor: Tensor) -> SavedTensor:
        saved = SavedTensor(tensor)
        self._expected.append(_Expected(weakref.ref(saved), tensor.shape, tensor.dtype))
        return saved

    def _drop(self) -> None:
        for expected in self._expected[self._dropped:]:
            saved = expected.saved()
            if saved is not None:
                saved.tensor = None
        self._dropped = len(self._expected)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Around C. Raises PipelineError where the layers save other tensors than they did in F."""
        with RandomState.kept(), self._buffers.at(self._before):
            self._random.restore()
            with saved_tensors_hooks(self._fill, SavedTensor.unpacked):
                yield
        if self._filled < len(self._expected):
            raise self._differs(f"{self._filled} of them")
        self._expected.clear()
        self._before.clear()

    def _fill(self, tensor: Tensor) -> SavedTensor:
        if self._filled == len(self._expected):
            raise self._differs("more")
        expected = self._expected[self._filled]
        if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
            raise self._differs(f"a {_described(tensor.shape, tensor.dtype)} in place of a "
                                f"{_described(expected.shape, expected.dtype)}")
        self._filled += 1
        new, saved = SavedTensor(tensor), expected.saved()
        if saved is not None:
            saved.tensor, saved.version = new.tensor, new.version
        return new

    def _differs(self, found: str) -> PipelineError:
        return PipelineError(f"{self._what} is recomputed, and its layers don't do the same the second time: its "
                             f"forward saved {len(self._expected)} tensors, and now there are {found}. Layers that "
                             "depend on anything but inputs, weights, buffers and random numbers can't be recomputed")


def _described(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} tensor of shape {list(shape)}"
