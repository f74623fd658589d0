"""DeepSpeed's tensor parallel layers (deepspeed/module_inject/layers.py), whose input gradients don't hold up B.

The sum of a layer's input gradients runs concurrently with a deferred weight gradient
(ds_vshape/split_backward/tensor_parallel.py). Each layer is made of a whole one, of which it keeps its share.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from deepspeed.module_inject import set_autotp_mode
from deepspeed.module_inject.layers import (GatherFromTensorParallelRegion, LinearLayer, SubParamLinearLayer,
                                            VocabParallelEmbedding, VocabParallelLinear)
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor
from torch.nn import functional

from ds_vshape.split_backward.tensor_parallel import sum_gradient


def tensor_group(topology: PipeModelDataParallelTopology) -> Any:
    """The process group of this rank's tensor parallel ranks (collective); DeepSpeed's layers train from now on."""
    set_autotp_mode(training=True)
    # Every rank takes part in making every group.
    groups = {tuple(ranks): dist.new_group(ranks) for ranks in topology.get_axis_comm_lists("model")}
    mine, = (group for ranks, group in groups.items() if dist.get_rank() in ranks)
    return mine


class _Column:
    """A column parallel layer of DeepSpeed's whose input gradient doesn't hold up everything else."""

    mp_group: Any
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(sum_gradient(x, self.mp_group), self.weight, self.bias)


class ColumnLinear(_Column, LinearLayer):  # type: ignore[misc]
    """Rows of a weight."""


class SubParamColumnLinear(_Column, SubParamLinearLayer):  # type: ignore[misc]
    """Rows of each of several weights that lie one after another."""


class VocabularyLinear(_Column, VocabParallelLinear):  # type: ignore[misc]
    """A head of which each rank has the rows, and computes the logits, of its part of the vocabulary."""


class VocabularyEmbedding(VocabParallelEmbedding):  # type: ignore[misc]
    """An embedding of which each rank has the rows of its part of the vocabulary."""

    @staticmethod
    def validate_embedding(module: Any) -> None:
        """Raises NotImplementedError for an embedding that does more than to look up rows and to scale them.

        DeepSpeed's takes the scaled one of Gemma 3 alone; other families have their own copies of it.
        """
        is_scaled = type(module).__name__.endswith("ScaledWordEmbedding")
        if not (is_scaled and isinstance(getattr(module, "embed_scale", None), Tensor)):
            VocabParallelEmbedding.validate_embedding(module)


class GatheredColumnLinear(_Column, LinearLayer):  # type: ignore[misc]
    """Rows of a weight, whose outputs every rank gets whole."""

    def forward(self, x: Tensor) -> Tensor:
        gathered: Tensor = GatherFromTensorParallelRegion.apply(self.mp_group, super().forward(x),
                                                                self._partition_sizes)
        return gathered
