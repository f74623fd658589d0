"""A byte-level GPT as a list of pipeline layers.

    bytes [batch, length]
      -> TokenEmbedding (tied to the head) -> PositionEmbedding -> Block x layers -> LayerNorm -> head
      -> logits [batch, length, vocabulary]

Each layer takes one tensor and gives one, so that the list can be cut into stages anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn

from ds_vshape.split_backward.head import HeadOutput, Projection

VOCABULARY = 256


@dataclass(frozen=True)
class GPTConfig:
    """`layers` blocks of width `hidden` with `heads` heads each, for sequences of at most `length` bytes.

    A `vocabulary` above the number of bytes has words that no text uses, and the cost of those that one would.
    """

    layers: int
    hidden: int
    heads: int
    length: int
    vocabulary: int = VOCABULARY

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise ValueError(f"hidden = {self.hidden} must be a multiple of heads = {self.heads}")


class TokenEmbedding(nn.Embedding):
    """Bytes to vectors; `head` uses the same weight the other way round."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__(vocabulary, hidden)
        nn.init.normal_(self.weight, std=0.02)


def head(embedding: TokenEmbedding, hidden: Tensor) -> Tensor:
    """Vectors [batch, length, hidden] to logits [batch, length, vocabulary]."""
    return F.linear(hidden, embedding.weight)


class PositionEmbedding(nn.Module):
    """Adds a learned vector for each position."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.length, config.hidden)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, hidden: Tensor) -> Tensor:
        positions: Tensor = self.embedding(torch.arange(hidden.shape[1], device=hidden.device))
        return hidden + positions


class Block(nn.Module):
    """Causal self-attention and an MLP, each after a norm, with residual connections."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.hidden)
        self.query_key_value = nn.Linear(config.hidden, 3 * config.hidden)
        self.attention_out = nn.Linear(config.hidden, config.hidden)
        self.mlp_norm = nn.LayerNorm(config.hidden)
        self.mlp_in = nn.Linear(config.hidden, 4 * config.hidden)
        self.mlp_out = nn.Linear(4 * config.hidden, config.hidden)
        # GPT-2's initialization: what is added to the residual stream shrinks with the number of additions.
        for linear in (self.query_key_value, self.mlp_in):
            nn.init.normal_(linear.weight, std=0.02)
        for linear in (self.attention_out, self.mlp_out):
            nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * config.layers))
        for linear in (self.query_key_value, self.attention_out, self.mlp_in, self.mlp_out):
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self._attention(self.attention_norm(hidden))
        mlp: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(hidden))))
        return hidden + mlp

    def _attention(self, hidden: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        # [batch, length, 3 * width] -> three of [batch, heads, length, width / heads]
        query, key, value = (self.query_key_value(hidden)
                             .view(batch, length, 3, self.heads, -1)
                             .permute(2, 0, 3, 1, 4))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: Tensor = self.attention_out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return output


def head_in_chunks(embedding: TokenEmbedding, hidden: Tensor) -> HeadOutput:
    """As `head`, with the logits left to `loss_fn`, which computes them for some tokens at a time."""
    return HeadOutput(hidden, Projection(embedding.weight))


def gpt_layers(config: GPTConfig, chunked_head: bool = False) -> list[LayerSpec]:
    """The layers for a PipelineModule, in order; only those of the rank's own stages get built there.

    With a `chunked_head` the logits never exist whole (split_backward/head.py).
    """
    return [
        TiedLayerSpec("embedding", TokenEmbedding, config.vocabulary, config.hidden),
        LayerSpec(PositionEmbedding, config),
        *(LayerSpec(Block, config) for _ in range(config.layers)),
        LayerSpec(nn.LayerNorm, config.hidden),
        TiedLayerSpec("embedding", TokenEmbedding, config.vocabulary, config.hidden,
                      forward_fn=head_in_chunks if chunked_head else head),
    ]


def seed_layer(seed: int) -> None:
    """For PipelineModule's seed_fn: DeepSpeed's own passes the NumPy integers that its partitioning gives to
    random.seed, which refuses them.
    """
    torch.manual_seed(int(seed))


def loss_fn(logits: Tensor | HeadOutput, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats a byte; `labels` [batch, length] are the bytes that come next."""
    if isinstance(logits, HeadOutput):
        return logits.loss(labels)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
