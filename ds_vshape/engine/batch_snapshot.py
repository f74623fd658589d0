"""What a batch changes before its gradients are reduced, kept so that the batch can run again as if it hadn't run.

It holds random states and buffers (rollback.py), plain attributes of modules besides (counters, tensors, generators of
their own), numbers and flags of DeepSpeed's engine and optimizer, and gradients, of which there are seldom any when a
batch starts. What a layer keeps elsewhere, in globals or in objects of its own, stays as the batch has left it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ds_vshape.deepspeed_adapter.optimizers import GRADIENTS
from ds_vshape.engine.rollback import PassesSnapshot
from ds_vshape.runtime.rank import Rank

_NUMBERS = (bool, int, float, complex, str, bytes, type(None))
# What nn.Module has of its own: parameters, buffers and hooks.
_OF_MODULE = frozenset(vars(nn.Module()))

# Puts a value back, and gives what its owner should refer to.
_Restore = Callable[[], Any]


class BatchSnapshot:
    """The state of `rank` before a training batch."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._passes = PassesSnapshot(rank.module)
        self._numbers = [(owner, _numbers(owner)) for owner in (rank, rank.optimizer)]
        self._attributes = [(module, set(vars(module)), _attributes(module)) for module in _modules(rank.module)]
        self._gradients = [(parameter, place, *_kept_gradient(getattr(parameter, place)))
                           for parameter in rank.module.parameters() for place in GRADIENTS
                           if hasattr(parameter, place)]
        self._before = {id(gradient) for _, _, gradient, _ in self._gradients}

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back to what it was before the batch."""
        optimizer = self._rank.optimizer
        if hasattr(optimizer, "zero_grad"):
            optimizer.zero_grad()
        for parameter, place, gradient, kept in self._gradients:
            if gradient is not None:
                gradient.zero_() if kept is None else gradient.copy_(kept)
            setattr(parameter, place, gradient)
        for module, names, attributes in self._attributes:
            state = vars(module)
            for name in [name for name in state if name not in names]:
                del state[name]
            state.update({name: restore() for name, restore in attributes.items()})
        for owner, numbers in self._numbers:
            vars(owner).update(numbers)
        self._passes.restore()

    def forgets(self, parameter: Any, gradient: Tensor) -> bool:
        """Whether `restore` only drops this gradient and doesn't overwrite it: the batch has made it, and it isn't in
        the optimizer's memory."""
        made = id(gradient) not in self._before
        return made and any(gradient is getattr(parameter, place, None) for place in GRADIENTS)


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    yield from module.modules()
    loss_fn = getattr(module, "loss_fn", None)
    if isinstance(loss_fn, nn.Module):
        yield from loss_fn.modules()


def _numbers(owner: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(owner).items() if isinstance(value, _NUMBERS)}


def _attributes(module: nn.Module) -> dict[str, _Restore]:
    found = ((name, _restorer(value)) for name, value in vars(module).items() if name not in _OF_MODULE)
    return {name: restore for name, restore in found if restore is not None}


def _kept_gradient(gradient: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A gradient with a copy of it, unless it's zero."""
    kept = None if gradient is None or not gradient.detach().to_dense().any() else gradient.detach().clone()
    return gradient, kept


def _restorer(value: Any) -> _Restore | None:
    """What puts `value` back where it is, if it is plain data; None if it isn't."""
    if isinstance(value, _NUMBERS) or isinstance(value, Tensor) and value.requires_grad:
        return lambda: value
    if isinstance(value, Tensor):
        return _tensor(value)
    for kind, get, put in _GENERATORS:
        if isinstance(value, kind):
            state = get(value)
            return lambda: (put(value, state), value)[1]
    if isinstance(value, tuple) and type(value) is tuple:
        return _container(value, lambda members: tuple(members))
    if type(value) in (list, deque):
        return _container(value, lambda members: _refilled(value, value.extend, members))
    if type(value) is dict:
        keys = list(value)
        return _container(value.values(), lambda members: _refilled(value, value.update, zip(keys, members)))
    if type(value) is set:
        return _container(value, lambda members: _refilled(value, value.update, members))
    return None


def _tensor(tensor: Tensor) -> _Restore | None:
    if tensor.layout is not torch.strided or tensor.is_inference():
        return None
    kept = tensor.clone()

    def restore() -> Tensor:
        return tensor if torch.equal(tensor, kept) else tensor.copy_(kept)

    return restore


def _container(members: Iterable[Any], made: Callable[[Iterable[Any]], Any]) -> _Restore | None:
    restorers = [_restorer(member) for member in members]
    known = [restore for restore in restorers if restore is not None]
    return None if len(known) < len(restorers) else lambda: made([restore() for restore in known])


def _refilled(container: Any, fill: Callable[[Any], None], members: Iterable[Any]) -> Any:
    container.clear()
    fill(members)
    return container


def _set_numpy(generator: numpy.random.Generator, state: Any) -> None:
    generator.bit_generator.state = state


_GENERATORS: tuple[tuple[type, Callable[[Any], Any], Callable[[Any, Any], Any]], ...] = (
    (torch.Generator, torch.Generator.get_state, torch.Generator.set_state),
    (random.Random, random.Random.getstate, random.Random.setstate),
    (numpy.random.RandomState, numpy.random.RandomState.get_state, numpy.random.RandomState.set_state),
    (numpy.random.Generator, lambda generator: generator.bit_generator.state, _set_numpy),
)
