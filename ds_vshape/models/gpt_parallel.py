"""The GPT of gpt.py with each block on several tensor parallel ranks, by DeepSpeed's own layers.

    rows x columns of a weight     whole             on each of t ranks
    query_key_value                3 hidden x hidden   3 hidden / t x hidden: all of some heads
    attention_out                  hidden x hidden     hidden x hidden / t, then an all-reduce
    mlp_in                         4 hidden x hidden   4 hidden / t x hidden
    mlp_out                        hidden x 4 hidden   hidden x 4 hidden / t, then an all-reduce

Embedding, positions, norms and head are whole on every rank. A rank builds each block whole from the layer's seed and
keeps its share, so that the model is the same one on any number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from deepspeed.module_inject.layers import LinearAllreduce
from deepspeed.pipe import LayerSpec

from ds_vshape.models.gpt import Block, GPTConfig, gpt_layers
from ds_vshape.models.parallel_layers import ColumnLinear, SubParamColumnLinear


class ParallelBlock(Block):
    """The share that this rank has of a block that the ranks of `group` hold together."""

    def __init__(self, config: GPTConfig, group: Any) -> None:
        super().__init__(config)
        ranks = dist.get_world_size(group)
        if config.heads % ranks:
            raise ValueError(f"heads = {config.heads} must be a multiple of the {ranks} tensor parallel ranks")
        self.heads //= ranks
        # Query, key and value lie one after another in the weight, and each is cut by itself.
        self.query_key_value = SubParamColumnLinear(self.query_key_value, group, shape=(3, -1), partition_dim=0)
        self.attention_out = LinearAllreduce(self.attention_out, group)
        self.mlp_in = ColumnLinear(self.mlp_in, group)
        self.mlp_out = LinearAllreduce(self.mlp_out, group)


def parallel_gpt_layers(config: GPTConfig, group: Any) -> list[LayerSpec]:
    """As `gpt_layers`, with the blocks on the ranks of `group`."""
    return [LayerSpec(ParallelBlock, config, group) if spec.typename is Block else spec for spec in gpt_layers(config)]
