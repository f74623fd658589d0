"""Attention over sequences of various lengths as flash_attn_varlen_func computes it, in torch, without a GPU.

It reads no number on the host. Kernels of flash attention need a GPU: `with_flash_attention` puts this in their place
below transformers' own code for "flash_attention_2", `register` makes an attention of a name of its own of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel, modeling_flash_attention_utils

NAME = "varlen_of_tests"


def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
                           max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
                           softmax_scale: float | None = None, causal: bool = False,
                           window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
                           deterministic: bool = False) -> Tensor:
    """[tokens, heads, head size] of queries [tokens, heads, head size], and keys and values [tokens, perhaps fewer
    heads, head size]. Sequence i has the tokens cu_seqlens[i] to cu_seqlens[i + 1], perhaps none; a window (left,
    right) includes both ends."""
    tokens = len(q)
    assert tokens == len(k) == len(v) and causal and not dropout_p
    assert isinstance(max_seqlen_q, int) and isinstance(max_seqlen_k, int)
    for ends, most in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
        assert ends.dtype == torch.int32 and ends.dim() == 1
        lengths = ends.diff()
        torch._assert_async(((lengths >= 0) & (lengths <= most)).all())
        torch._assert_async((ends[0] == 0) & (ends[-1] == tokens))
    places = torch.arange(tokens, dtype=torch.int32, device=q.device)
    of_query = torch.searchsorted(cu_seqlens_q, places, right=True)
    of_key = torch.searchsorted(cu_seqlens_k, places, right=True)
    behind = places[:, None] - places[None]
    seen = (of_query[:, None] == of_key[None]) & (behind >= 0)
    if window_size[0] >= 0:
        seen &= behind <= window_size[0]
    groups = q.shape[1] // k.shape[1]
    k, v = (each.repeat_interleave(groups, 1) for each in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
               scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
               cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor, max_length_q: int, max_length_k: int,
               **_: Any) -> tuple[Tensor, None]:
    assert attention_mask is None
    flat = [each.transpose(1, 2).flatten(0, 1) for each in (query, key, value)]
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
    output = flash_attn_varlen_func(*flat, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k,
                                    softmax_scale=scaling, causal=True, window_size=window, softcap=softcap or 0.0)
    return output.unflatten(0, (len(query), -1)), None


def register() -> None:
    AttentionInterface.register(NAME, _attention)


def _no_kernel(*_: Any, **__: Any) -> Any:
    raise AssertionError("flash attention was called without cu_seqlens")


@contextmanager
def with_flash_attention() -> Iterator[None]:
    """transformers takes flash attention for installed."""
    utils = modeling_flash_attention_utils
    loaded = {name: getattr(utils, name) for name in (
        "_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn",
        "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn")}
    functions = (_no_kernel, flash_attn_varlen_func, None, _no_kernel, _no_kernel)
    with (mock.patch.object(utils, "_lazy_imports", lambda *_, **__: functions),
          mock.patch.object(PreTrainedModel, "_flash_attn_import_error", lambda *_, **__: None),
          mock.patch.multiple(utils, **loaded)):
        yield
