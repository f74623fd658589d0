"""What a step changes, and what a batch's first passes change, kept so that both can be taken back to the last bit."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ds_vshape.deepspeed_adapter.engine import step_state
from ds_vshape.deepspeed_adapter.optimizers import ZeroStep
from ds_vshape.health.waits import is_ended_wait
from ds_vshape.runtime.random_state import RandomState
from ds_vshape.runtime.rank import Rank


class StepSnapshot:
    """The state of a rank's engine and its optimizer before `step`."""

    def __init__(self, rank: Rank, step: ZeroStep) -> None:
        self._rank, self._step = rank, step
        self._of_engine, self._of_optimizer = step_state(rank), step.state()
        self._weights = [weight.detach().clone() for weight in step.weights]
        self._state = {weight: _kept(state) for weight, state in step.core.state.items()}
        self._groups = self._after = _options(step.core)
        self._gradients = dict(step.gradients)
        # The step scales these where they lie.
        self._scaled = [(tensor, tensor.clone()) for tensor in map(step.flat, self._gradients.values())
                        if tensor is not None]
        scheduler = rank.lr_scheduler
        self._scheduler = None if scheduler is None else copy.deepcopy(scheduler.state_dict())
        self._last_lr = copy.copy(getattr(scheduler, "_last_lr", None))

    def stepped(self) -> None:
        """To be called when the step is taken: what differs later on has been changed by something else."""
        self._after = _options(self._step.core)

    @torch.no_grad()
    def restore(self) -> None:
        """Take the step back; collective over data parallel ranks, which have each other's weights."""
        step, scheduler = self._step, self._rank.lr_scheduler
        vars(self._rank).update(self._of_engine)
        step.put_back(self._of_optimizer)
        for weight, kept in zip(step.weights, self._weights, strict=True):
            weight.copy_(kept)
        state = step.core.state
        for weight in [weight for weight in state if weight not in self._state]:
            del state[weight]
        for weight, of_weight in self._state.items():
            _put_back(state[weight], of_weight)
        for group, options in zip(step.core.param_groups, self._groups, strict=True):
            _put_back(group, {**options, "params": group["params"]})
        if scheduler is not None:
            scheduler.load_state_dict(self._scheduler)
            if self._last_lr is not None:
                scheduler._last_lr = self._last_lr
        step.update_module()

    @torch.no_grad()
    def restore_gradients(self) -> None:
        """Let the next step find the gradients of this one."""
        for tensor, kept in self._scaled:
            tensor.copy_(kept)
        self._step.gradients.update(self._gradients)

    def changes(self) -> list[dict[str, Any]]:
        """What the script has changed in each parameter group since the step: a learning rate it sets by hand."""
        now = _options(self._step.core)
        return [{key: value for key, value in options.items() if not _same(value, after.get(key))}
                for options, after in zip(now, self._after, strict=True)]


def change(step: ZeroStep, changes: list[dict[str, Any]]) -> None:
    """Change the parameter groups as the script has done before."""
    for group, options in zip(step.core.param_groups, changes, strict=True):
        group.update(options)


def snapshot_bytes(step: ZeroStep) -> int:
    """Bytes of a StepSnapshot, gradients not counted: they would be there without it."""
    tensors = list(step.weights)
    for state in step.core.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def _options(optimizer: Any) -> list[dict[str, Any]]:
    """The parameter groups without the parameters."""
    return [{key: _kept(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else (
        {key: _kept(member) for key, member in value.items()} if isinstance(value, dict) else copy.deepcopy(value))


def _put_back(place: dict[Any, Any], kept: dict[Any, Any]) -> None:
    """Make `place` what it was; tensors stay where they are, since others refer to them."""
    for key in [key for key in place if key not in kept]:
        del place[key]
    for key, value in kept.items():
        present = place.get(key)
        if isinstance(value, Tensor) and isinstance(present, Tensor) and present.shape == value.shape:
            present.copy_(value)
        else:
            place[key] = value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)


class PassesSnapshot:
    """What the forward passes of a batch change in `module`, before the first of them: random states and buffers."""

    def __init__(self, module: nn.Module) -> None:
        self._random = RandomState()
        self._buffers = [(owner, name, buffer, buffer.clone()) for owner in module.modules()
                         for name, buffer in owner._buffers.items() if buffer is not None]

    @torch.no_grad()
    def restore(self) -> None:
        """As if no pass had run."""
        self._random.restore()
        for owner, name, buffer, kept in self._buffers:
            owner._buffers[name] = buffer.copy_(kept)


class Samples:
    """The micro-batches that a batch has loaded by `load`, for its second run.

    What loading them drew from the host's generators is drawn again.
    """

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load
        self._keeps = False
        # How many are still to be loaded if the batch doesn't run again.
        self._skipped = 0
        self._kept: list[tuple[Any, RandomState | None]] = []
        self._again: deque[tuple[Any, RandomState | None]] = deque()

    def keep(self) -> None:
        """Keep the samples of the batch that starts, since it may have to run again."""
        self.drop()
        self._keeps = True

    def drop(self) -> None:
        """Forget the samples: the batch won't run again. What was skipped is loaded."""
        self._keeps = False
        self._kept.clear()
        self._again.clear()
        while self._skipped:
            self._skipped -= 1
            self.skip()

    def again(self) -> None:
        """The batch starts again."""
        self._keeps, self._skipped = False, 0
        self._again.extend(self._kept)
        self._kept.clear()

    def skip(self) -> None:
        """Load a micro-batch that isn't trained, since the batch has failed; later, if that may run again: loading
        draws from the generators in the order of the passes."""
        if self._keeps:
            self._skipped += 1
            return
        try:
            self.take()
        except Exception as error:
            if is_ended_wait(error):
                raise

    def take(self) -> Any:
        """The next micro-batch; raises what loading it raises."""
        if self._again:
            sample, after = self._again.popleft()
            if after is not None:
                after.restore_host()
        elif self._keeps:
            before = RandomState()
            sample = loaded(self._load)
            after = RandomState()
            # The layers that receive a sample may change it.
            self._kept.append((tree_map(_own, sample), None if after.same_host(before) else after))
        else:
            return self._load()
        return unless_raised(sample)


class _Raised:
    def __init__(self, error: Exception) -> None:
        self.error = error


def loaded(load: Callable[[], Any]) -> Any:
    """What `load` gives, or what it raises, for `unless_raised`."""
    try:
        return load()
    except Exception as error:
        return _Raised(error)


def unless_raised(sample: Any) -> Any:
    """What was `loaded`; raises what that raised."""
    if isinstance(sample, _Raised):
        raise sample.error
    return sample


def _own(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
