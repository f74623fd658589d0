"""Checks the inputs and labels of a micro-batch, and its losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.module import PipelineError
from deepspeed.utils import logger
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ds_vshape.comm.payload import Payload


class Intake:
    """Splits a sample of the data iterator: inputs and labels are its first two members, as in DeepSpeed.

    Args:
        needed: how many members this rank needs: 2 if it computes the loss, else 1.
        tells: whether this rank warns, once, that further members are ignored.
    """

    def __init__(self, needed: int, tells: bool) -> None:
        self._needed, self._tells = needed, tells

    def pair(self, sample: Any) -> tuple[Any, Any]:
        """The inputs and the labels (None if missing and not needed). Raises PipelineError if it isn't a pair."""
        if sample is None:
            raise PipelineError("there is no data: this rank needs an iterator that gives (inputs, labels)")
        if not isinstance(sample, (tuple, list)) or len(sample) < self._needed:
            given = _counted(len(sample)) if isinstance(sample, (tuple, list)) else f"a {type(sample).__name__}"
            raise PipelineError(f"the data iterator gave {given}: must be a pair (inputs, labels)")
        if len(sample) > 2 and self._tells:
            self._tells = False
            logger.warning(f"the data iterator gives {_counted(len(sample))}: the first two are used as (inputs, "
                           "labels), as in DeepSpeed, and the others are ignored")
        return sample[0], sample[1] if len(sample) > 1 else None


def _counted(members: int) -> str:
    return "1 member" if members == 1 else f"{members} members"


def own_copy(data: Any, device: torch.device, what: str) -> Payload:
    """A copy of the iterator's `data`. Raises PipelineError if it contains anything but tensors."""
    if torch.is_tensor(data):
        return _copied(data, device)
    if not isinstance(data, (tuple, list)) or not data or not all(map(torch.is_tensor, data)):
        given = "empty" if isinstance(data, (tuple, list)) and not data else type(data).__name__
        raise PipelineError(f"the {what} of a micro-batch are {given}: must be a tensor or a tuple of tensors")
    return tuple(_copied(tensor, device) for tensor in data)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`, for which the host doesn't wait: to a GPU it goes through page-locked memory, which nothing
    else changes before the GPU has read it."""
    tensor = tensor.detach()
    from_host = tensor.device.type == "cpu" and tensor.layout is torch.strided
    if not from_host or get_accelerator().is_synchronized_device():
        return tensor.clone().to(device)
    return torch.empty_like(tensor, pin_memory=True).copy_(tensor).to(device, non_blocking=True)


def own_labels(labels: Any, device: torch.device) -> Any:
    """As `own_copy`; of labels in another form (a dictionary, say) the tensors are copied where they are."""
    if torch.is_tensor(labels) or isinstance(labels, (tuple, list)) and labels:
        return own_copy(labels, device, "labels")
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), labels)


def loss_of(loss_fn: Callable[[Any, Any], Any], outputs: Any, labels: Any) -> Any:
    """The loss; PipelineError where the data had no labels, and the function fails without them."""
    try:
        return loss_fn(outputs, labels)
    except Exception as error:
        if labels is not None:
            raise
        raise PipelineError("the data iterator gave None for labels, which the loss function needs: "
                            f"{type(error).__name__}: {error}") from error


def check_loss(loss: Any) -> None:
    """Raises PipelineError for a loss that can't be trained on."""
    check_number(loss)
    if not loss.requires_grad:
        raise PipelineError("the loss has no gradient: it is detached, or depends on nothing that is trained")


def check_number(loss: Any) -> None:
    """Raises PipelineError for a loss that isn't one number."""
    if not torch.is_tensor(loss):
        raise PipelineError(f"the loss is a {type(loss).__name__}: must be a tensor of one number")
    if loss.numel() != 1:
        raise PipelineError(f"the loss has the shape {list(loss.shape)}: must be one number, such as a mean or a sum")


def check_reduction(reduction: str | None, is_sent: bool) -> None:
    """Raises PipelineError for a `reduce_output` of eval_batch that isn't known, or gives more than can be sent."""
    if reduction is not None and str(reduction).lower() != "avg":
        raise PipelineError(f"reduce_output = {reduction!r}: must be 'avg' or None")
    if reduction is None and is_sent:
        raise PipelineError("reduce_output = None: must be 'avg' with bcast_loss or a monitor, which take one number")


def as_number(loss: Any) -> Any:
    """A loss of one number, whatever its shape, as a tensor without dimensions; all else as it is.

    DeepSpeed stacks a batch's losses, and prints them, as numbers.
    """
    return loss.reshape(()) if torch.is_tensor(loss) and loss.numel() == 1 else loss


def detached(loss: Any) -> Any:
    """A loss (a tensor or a list of them) outside its graph, in memory of its own."""
    return loss.detach().clone() if torch.is_tensor(loss) else [part.detach().clone() for part in loss]


def added(total: Any, loss: Any) -> Any:
    """The sum of two losses; `total` may be None yet."""
    if torch.is_tensor(loss):
        return loss if total is None else total + loss
    return [added(None if total is None else total[place], part) for place, part in enumerate(loss)]
