"""What loading a checkpoint changes, kept so that a load that fails leaves a rank as it was, to the last bit.

Weights that are loaded in place are copied to the host, which takes as much memory there as this rank's weights and its
part of the master weights have. For the rest references are enough, since loading replaces it. This works for all of
DeepSpeed's optimizers: the parameters of torch's at their core are the master weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ds_vshape.deepspeed_adapter.optimizers import chain_of, mapping_of, set_mapping
from ds_vshape.runtime.rank import Rank

# What has a state in a checkpoint besides the module and the optimizer.
_SCHEDULERS = ("lr_scheduler", "random_ltd_scheduler")


class LoadingRank(Rank, Protocol):
    """A rank that may have a data loader, whose sampler's state is saved too."""

    training_dataloader: Any


class TrainingState:
    """The state of a rank's training: the weights, the optimizer, the schedulers, the counts."""

    def __init__(self, rank: LoadingRank) -> None:
        module, optimizers = rank.module, list(chain_of(rank.optimizer))
        self._undo: list[Callable[[], None]] = [_attributes(rank), _attributes(module)]
        self._undo += [_layer(owner) for owner in module.modules()]
        self._undo += [_attributes(optimizer) for optimizer in optimizers]
        if optimizers:
            self._undo.append(_of_optimizer(optimizers[-1]))
        for parameter in module.parameters():
            if mapping_of(parameter) is not None:
                self._undo.append(_mapping(parameter))
        loader = rank.training_dataloader
        others = [getattr(rank, name, None) for name in _SCHEDULERS] + [getattr(loader, "data_sampler", None)]
        self._undo += [_scheduler(other) for other in others if hasattr(other, "load_state_dict")]
        # A tensor under two names, such as a tied weight, is copied and restored once.
        seen: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] = {}
        for tensor in _tensors(module, optimizers):
            seen.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), tensor)
        self._tensors = [(tensor, tensor.to("cpu", copy=True)) for tensor in seen.values()]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back; not collective."""
        for undo in self._undo:
            undo()
        for tensor, kept in self._tensors:
            tensor.copy_(kept)


def _tensors(module: nn.Module, optimizers: list[Any]) -> Iterator[Tensor]:
    """What is loaded in place: weights, buffers and master weights."""
    for tensor in (*module.parameters(), *module.buffers()):
        yield tensor.detach()
    for group in optimizers[-1].param_groups if optimizers else ():
        for parameter in group["params"]:
            yield parameter.detach()


def _attributes(thing: Any) -> Callable[[], None]:
    kept = dict(vars(thing))

    def undo() -> None:
        for name in [name for name in vars(thing) if name not in kept]:
            del vars(thing)[name]
        vars(thing).update(kept)
    return undo


def _layer(owner: nn.Module) -> Callable[[], None]:
    """A module's own parameters and buffers, and what it saves besides."""
    parameters, buffers = dict(owner._parameters), dict(owner._buffers)
    memory = [(parameter, parameter.data) for parameter in parameters.values() if parameter is not None]
    saves_more = type(owner).get_extra_state is not nn.Module.get_extra_state
    extra = copy.deepcopy(owner.get_extra_state()) if saves_more else None

    def undo() -> None:
        _refill(owner._parameters, parameters)
        _refill(owner._buffers, buffers)
        for parameter, tensor in memory:
            if parameter.data_ptr() != tensor.data_ptr():
                parameter.data = tensor
        if saves_more:
            owner.set_extra_state(extra)
    return undo


def _of_optimizer(optimizer: Any) -> Callable[[], None]:
    """torch's optimizer: the options of its groups, and where the state of each parameter is."""
    state, groups = optimizer.state, optimizer.param_groups
    states = {parameter: dict(of_parameter) for parameter, of_parameter in state.items()}
    options = [dict(group) for group in groups]

    def undo() -> None:
        _refill(state, states)
        for group, kept in zip(groups, options, strict=True):
            _refill(group, kept)
    return undo


def _mapping(parameter: Any) -> Callable[[], None]:
    mapping = mapping_of(parameter)
    fragments = mapping.optim_fragment
    kept = None if fragments is None else dict(fragments)

    def undo() -> None:
        set_mapping(parameter, mapping)
        mapping.optim_fragment = fragments
        if fragments is not None:
            _refill(fragments, kept)
    return undo


def _scheduler(scheduler: Any) -> Callable[[], None]:
    own = {name: copy.copy(value) if isinstance(value, (list, dict)) else value
           for name, value in vars(scheduler).items()}
    state = copy.deepcopy(scheduler.state_dict())

    def undo() -> None:
        # For what it keeps in other objects; a scheduler that can't load raises here again.
        with suppress(Exception):
            scheduler.load_state_dict(state)
        vars(scheduler).update(own)
    return undo


def _refill(place: Any, kept: Mapping[Any, Any] | None) -> None:
    place.clear()
    place.update(kept)
