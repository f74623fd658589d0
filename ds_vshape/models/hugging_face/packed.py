"""How the samples of packed rows are kept apart: by masks; or, for attention that has none, by where each starts.

transformers makes masks for "sdpa" and "eager". Kernels for sequences of various lengths, as flash attention has them,
skip instead what samples don't see of each other: they take cu_seqlens, the places at which sequences start in all rows
one after the other, and last the number of tokens. Each stage computes them of the position ids that it gets. No number
is read on the host, so cu_seqlens are of a fixed size: sequences without tokens fill them up.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ds_vshape.models.hugging_face.forward import Arguments, BaseForward, finished_mask
from ds_vshape.models.hugging_face.plan import PlannedModel

try:
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
except ImportError as error:
    raise ImportError("models of Hugging Face need transformers: pip install 'ds-vshape[models]'") from error


def takes_cu_seqlens(attention: str) -> bool:
    """Whether the attention that transformers knows by this name is flash attention, or names `cu_seq_lens_q` among its
    parameters."""
    function = ALL_ATTENTION_FUNCTIONS.get(attention)
    return function is not None and (function is flash_attention_forward
                                     or "cu_seq_lens_q" in inspect.signature(function).parameters)


def cu_seqlens(position_ids: Tensor, samples: int) -> Tensor:
    """int32 [rows x samples + 1]: the places of the 0s in position ids [rows, length], then the number of tokens; for
    rows of at most `samples` samples."""
    started = (position_ids == 0).flatten().cumsum(0)
    # Of sample k, the first place at which k samples have started; where there are fewer, the end.
    numbers = torch.arange(1, len(position_ids) * samples + 2, device=position_ids.device)
    return torch.searchsorted(started, numbers, out_int32=True)


def varlen_arguments(forward: BaseForward, hidden: Tensor, position_ids: Tensor, samples: int) -> list[Arguments]:
    """What the base model calls each decoder layer with: transformers' FlashAttentionKwargs for rows of at most
    `samples` samples, and no masks. The greatest length is the rows', which may be more than any sample's."""
    places, length = cu_seqlens(position_ids, samples), position_ids.shape[1]
    keywords = {"cu_seq_lens_q": places, "cu_seq_lens_k": places, "max_length_q": length, "max_length_k": length}
    mask = finished_mask(hidden)

    def without_mask(arguments: Any) -> Any:
        return tree_map_only(Tensor, lambda tensor: None if tensor is mask else tensor, arguments)

    return [Arguments(without_mask(each.args), without_mask(each.kwargs))
            for each in forward.arguments(hidden, mask, position_ids, keywords)]


def check_packed(planned: PlannedModel, forward: BaseForward, samples: int | None) -> None:
    """Raise ValueError if a decoder layer's tokens would see another sample of their row.

    Args:
        samples: the most that a row has, for attention that takes cu_seqlens; None where masks keep them apart.
    """
    chunk = getattr(planned.config, "attention_chunk_size", None)
    if samples is not None and chunk:
        raise ValueError(f"packed = True: attention_chunk_size = {chunk} with attention = "
                         f"{planned.config._attn_implementation!r}, which has no masks: attention must be 'sdpa' or "
                         "'eager'")
    positions = torch.tensor([[0, 1, 0, 1]])
    hidden = torch.zeros(*positions.shape, planned.config.hidden_size)
    try:
        arguments = (forward.arguments(hidden, None, positions) if samples is None
                     else varlen_arguments(forward, hidden, positions, samples))
    except TypeError as error:  # a forward that doesn't take cu_seqlens
        raise _mixing(planned, 0) from error
    for index, (layer, given) in enumerate(zip(getattr(planned.owner, planned.layers), arguments, strict=True)):
        if samples is None:
            apart = _masks_keep_apart([*given.args, *given.kwargs.values()])
        else:
            try:
                apart = _reaches_attention(planned, layer, hidden, given)
            except Exception as error:  # of whatever else than attention it starts with
                raise _mixing(planned, index) from error
        if not apart:
            raise _mixing(planned, index)


def _mixing(planned: PlannedModel, index: int) -> ValueError:
    return ValueError(f"packed = True: model_type = {planned.model_type!r} with attention = "
                      f"{planned.config._attn_implementation!r} doesn't keep the samples of a row apart in decoder "
                      f"layer {index}; must be False")


def _masks_keep_apart(arguments: list[Any]) -> bool:
    """Whether there are masks for two samples of two tokens, and none lets the first token of the second one see the
    last of the first."""
    masks = [value for value in arguments if isinstance(value, Tensor) and value.shape[-2:] == (4, 4)]
    # True, or a bias of 0, lets a token be seen.
    return bool(masks) and not any(bool(mask[0, 0, 2, 1]) is (mask.dtype == torch.bool) for mask in masks)


class _Reached(Exception):
    """Ends a layer's forward at its attention."""


def _reaches_attention(planned: PlannedModel, layer: Any, hidden: Tensor, arguments: Arguments) -> bool:
    """Whether a layer on the meta device hands cu_seqlens on to its attention, without a mask that would replace them.
    """
    received: list[bool] = []

    def stand_in(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *_: Any,
                 **given: Any) -> Any:
        received.append(attention_mask is None and all(
            given.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")))
        raise _Reached

    name = planned.config._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS[name]
    ALL_ATTENTION_FUNCTIONS.register(name, stand_in)
    try:
        hidden, args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"),
                                             (hidden, arguments.args, arguments.kwargs))
        four_bit = planned.four_bit
        with torch.no_grad(), nullcontext() if four_bit is None else four_bit.by_shapes(layer):
            layer(hidden, *args, **kwargs)
    except _Reached:
        pass
    finally:
        ALL_ATTENTION_FUNCTIONS.register(name, function)
    return received == [True]
