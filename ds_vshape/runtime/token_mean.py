"""A batch's loss as the mean over its tokens, whichever micro-batch and replica they are in.

DeepSpeed averages the means of micro-batches, so that a token counts for more in a micro-batch with few tokens. A loss
function that takes `num_items_in_batch`, as those of transformers do (`fixed_cross_entropy` in loss/loss_utils.py),
divides the sum over a micro-batch's tokens by the number of all tokens of the batch instead:

    [1] the batch starts     the rank of the last stage draws all micro-batches, and counts the tokens in their labels
    [2] meanwhile            the counts of all replicas are added up
    [3] each loss            sum / tokens x micro-batches x replicas, since DeepSpeed divides by these two
    [4] from there on        backward, loss scale, clipping and reports are DeepSpeed's
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.pipe.module import PipelineError
from torch import Tensor, nn

from ds_vshape.comm.background import Background, Handle
from ds_vshape.config.section import KEY, ConfigError
from ds_vshape.runtime.micro_batch import loss_of
from ds_vshape.split_backward.head import IGNORE_INDEX

# As transformers calls it.
ITEMS = "num_items_in_batch"
TOKENS, MICRO_BATCHES = "tokens", "micro_batches"


def averages_tokens(of_config: str | None, of_module: str | None, loss_fn: Any) -> bool:
    """Whether losses are averaged over tokens, as the config's "loss_average" says, or else the module's argument, or
    else the loss function: if it takes `num_items_in_batch`.

    Raises ConfigError for an illegal value, and for one that the loss function can't follow.
    """
    if of_module not in (None, TOKENS, MICRO_BATCHES):
        raise ConfigError(f"loss_average = {of_module!r}: must be {TOKENS!r} or {MICRO_BATCHES!r}, or None, "
                          "which leaves it to the loss function")
    where, wanted = (f"{KEY}.loss_average", of_config) if of_config else ("PipelineModule's loss_average", of_module)
    parameter = _items_of(loss_fn)
    if wanted == TOKENS and parameter is None:
        raise ConfigError(f"{where} = {TOKENS!r}: loss_fn = {_named(loss_fn)} must be a function of (outputs, labels, "
                          f"{ITEMS}) that gives the sum over the labels' tokens, divided by {ITEMS}")
    if wanted == MICRO_BATCHES and parameter is not None and parameter.default is parameter.empty:
        raise ConfigError(f"{where} = {MICRO_BATCHES!r}: must be {TOKENS!r}, or loss_fn = {_named(loss_fn)} must have "
                          f"a default for {ITEMS}, with which it gives the mean of a micro-batch")
    return parameter is not None and wanted != MICRO_BATCHES


def _items_of(loss_fn: Any) -> inspect.Parameter | None:
    try:
        signature = inspect.signature(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn)
    except (TypeError, ValueError):  # no function, or one of C without a signature
        return None
    return signature.parameters.get(ITEMS)


def _named(loss_fn: Any) -> str:
    return getattr(loss_fn, "__qualname__", None) or type(loss_fn).__name__


class TokenMean:
    """The losses of one rank's batches.

    Args:
        loss_fn: takes (outputs, labels, num_items_in_batch) and returns the loss of a micro-batch, or (loss, auxiliary
            loss), of which the second is averaged over micro-batches. Its attribute `count_tokens`, if it has one,
            returns the number of tokens in labels; otherwise labels must be a tensor, of which all but -100 count.
        group, replicas: the ranks that compute the losses of other replicas, and how many there are.
        device: where losses are.
    """

    def __init__(self, loss_fn: Callable[..., Any], group: Any, replicas: int, device: torch.device,
                 background: Background) -> None:
        self._loss_fn = loss_fn
        self._group, self._replicas, self._device, self._background = group, replicas, device, background
        self._count_tokens = getattr(loss_fn, "count_tokens", _count_labels)
        self._counts: list[Any] = []
        self._micro_batches = 1
        self._tokens: Handle[Tensor] | None = None

    def count(self, labels: Any) -> None:
        """Count the labels of a micro-batch of the batch that is about to start. PipelineError if they can't be."""
        self._counts.append(_checked(self._count_tokens(labels)))

    def start_batch(self, micro_batches: int) -> None:
        """Add up what has been counted (collective over replicas, so that one that has failed takes part)."""
        counts, self._counts = self._counts, []
        self.forget()
        self._micro_batches = micro_batches
        tokens = self._added(counts)
        self._tokens = self._background.start(partial(self._over_replicas, tokens), (tokens,))

    def _added(self, counts: list[Any]) -> Tensor:
        """The sum of the counts, on the device, without a wait of the host."""
        there = [count for count in counts if torch.is_tensor(count) and count.device == self._device]
        here = sum(int(count) for count in counts if not any(count is other for other in there))
        total = torch.full((), here, dtype=torch.int64, device=self._device)
        for count in there:
            total += count.reshape(())
        return total

    def _over_replicas(self, tokens: Tensor) -> Tensor:
        if self._replicas > 1:
            dist.all_reduce(tokens, group=self._group)
        # Without any token all sums are zero, and so is the loss.
        return tokens.clamp_(min=1)

    def loss(self, outputs: Any, labels: Any) -> Any:
        """The loss of a micro-batch, scaled so that the mean over micro-batches and replicas is that over tokens."""
        assert self._tokens is not None
        found = loss_of(partial(self._loss_fn, **{ITEMS: self._tokens.result()}), outputs, labels)
        loss, *auxiliary = found if isinstance(found, tuple) else (found,)
        if not torch.is_tensor(loss) or len(auxiliary) > 1:
            raise PipelineError(f"the loss function gave {_described(found)}: must be a tensor of one number, or "
                                "(loss, auxiliary loss)")
        return sum(auxiliary, loss * self.share)

    @property
    def share(self) -> int:
        """The number by which DeepSpeed will divide the sum of the losses."""
        return self._micro_batches * self._replicas

    def forget(self) -> None:
        """Drop what is left of a batch that has failed."""
        self._counts.clear()
        if self._tokens is not None:
            self._tokens.result()
            self._tokens = None


def _count_labels(labels: Any) -> Tensor:
    if not torch.is_tensor(labels):
        raise PipelineError(f"the labels of a micro-batch are {_described(labels)}: must be a tensor, of which all but "
                            f"{IGNORE_INDEX} count as tokens, or loss_fn must have a function count_tokens(labels)")
    return (labels != IGNORE_INDEX).sum()


def _checked(count: Any) -> Any:
    is_number = isinstance(count, int) and not isinstance(count, bool) and count >= 0
    if is_number or torch.is_tensor(count) and count.numel() == 1 and not count.is_floating_point():
        return count
    raise PipelineError(f"count_tokens gave {_described(count)}: must be a number of tokens, an int from 0 or a tensor "
                        "of one")


def _described(value: Any) -> str:
    if torch.is_tensor(value):
        return f"a {value.dtype} tensor of shape {list(value.shape)}"
    return repr(value) if isinstance(value, (int, float, type(None))) else f"a {type(value).__name__}"
