"""A Hugging Face model as a list of pipeline layers, made of the classes of transformers themselves.

    ids [batch, length], or (ids, attention mask [batch, length], position ids [batch, length]), or in packed rows
    (ids, position ids)
      -> Tokens -> Positions (where the model changes embeddings before its first layer)
      -> DecoderLayer x num_hidden_layers -> Norm -> Head
      -> logits [batch, length, vocab_size], or (logits, router loss) where an MoE's config has output_router_logits

Each layer holds modules of the transformers model under the names that they have there; which ones, the model's plan
says. Between layers flow the hidden states, followed by the attention mask and the position ids where the batch has
them, and by the router logits of the layers so far [layers, batch x length, experts] where the loss wants them. What
transformers' model makes of masks and positions once for all of its layers (the causal mask in the form that the
attention wants, the rotary embedding) each stage makes for itself: it is cheaper to compute than to send.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor

from ds_vshape.models.hugging_face.layers import DecoderLayer, Head, Norm, Positions, Tokens
from ds_vshape.models.hugging_face.packed import check_packed, takes_cu_seqlens
from ds_vshape.models.hugging_face.plan import Plan, PlannedModel
from ds_vshape.models.hugging_face.quantization import quantization_of
from ds_vshape.models.hugging_face.shared import Flow, Shared
from ds_vshape.models.hugging_face.tensor_parallel import (TensorParallelPlan, parts_of, share_random_state,
                                                            shares_vocabulary, with_router_loss)
from ds_vshape.split_backward.head import HeadOutput

try:
    from transformers import PreTrainedConfig
    from transformers.loss.loss_utils import ForCausalLMLoss
except ImportError as error:
    raise ImportError("models of Hugging Face need transformers: pip install 'ds-vshape[models]'") from error

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

# DeepSpeed's partition method: stages get equal numbers of decoder layers; other layers join the stage of a neighbour.
PARTITION_METHOD = "type:DecoderLayer"
# Which layers activation checkpointing may run again. Not the embedding: a reentrant checkpoint gives no gradients to
# a layer whose inputs are integers.
CHECKPOINTABLE_LAYERS = ["DecoderLayer"]


def pipeline_layers(config: PreTrainedConfig, attention: str | None = None,
                    plan: Plan | None = None, tensor_group: Any = None, experts: str | None = None,
                    lora: LoraConfig | None = None, packed: bool = False,
                    chunked_head: bool = False,
                    quantization_config: BitsAndBytesConfig | dict[str, Any] | None = None,
                    samples_per_row: int | None = None) -> list[LayerSpec]:
    """The layers of the causal language model that `config` describes, for a PipelineModule; their weights are random.

    With a `tensor_group` each layer is cut over its ranks (tensor_parallel.py), and the pipeline returns
    logits [batch, length, vocab_size / ranks], for TensorParallelLoss. Collective over the group.

    Args:
        attention: the attention that transformers is to use: "sdpa", "eager", "flash_attention_2" or another one that
            it has, or a function's name in its AttentionInterface; by default transformers chooses.
        plan: for a family that has none in transformers, in the form of its base_model_pp_plan: the modules of the
            base model in the order in which they run, each with what it takes and what it returns.
        tensor_group: the process group of this rank's tensor parallel ranks (parallel_layers.tensor_group).
        experts: how transformers is to compute the experts of a mixture, "grouped_mm", "batched_mm" or "eager"; by
            default transformers chooses.
        lora: adapters to train (peft's); everything else is frozen, except what the LoraConfig says of biases and
            modules_to_save.
        packed: rows hold several samples, whose position ids each start at 0 and which transformers keeps apart; a
            micro-batch is ((ids, position ids), labels).
        chunked_head: leave the logits to next_token_loss (or TensorParallelLoss), which computes them for some tokens
            at a time, so that they never exist whole (split_backward/head.py).
        quantization_config: with `lora`, for a model whose config has none: a base of 4 bits, by what transformers'
            from_pretrained takes. load_weights quantizes each weight when it has read it.
        samples_per_row: the most samples in a packed row, which attention without masks needs: flash attention, and
            functions of the AttentionInterface that have `cu_seq_lens_q` among their parameters.

    Raises:
        ValueError: for a model that can't be cut into these layers, or not over these ranks, for adapters that it
            can't have, and for quantization that can't be trained.
        ImportError: for adapters without peft, and for 4 bits without bitsandbytes.
    """
    if getattr(config, "add_cross_attention", False):
        raise ValueError("add_cross_attention = True: must be False, a pipeline has a decoder alone")
    if getattr(config, "layerdrop", 0):
        raise ValueError(f"layerdrop = {config.layerdrop}: must be 0, each stage would drop layers for itself")
    ranks = 1 if tensor_group is None else dist.get_world_size(tensor_group)
    quantization = quantization_of(config, quantization_config, lora, ranks)
    planned = PlannedModel(config, attention, plan, experts, lora, quantization)
    parallel = None
    if ranks > 1:
        if lora is not None:
            raise ValueError(f"lora with {ranks} tensor parallel ranks: must have 1, adapters aren't cut")
        parallel = TensorParallelPlan(planned, tensor_group)
        share_random_state(tensor_group)
    samples = _samples(planned, samples_per_row) if packed else None
    shared = Shared(planned, parallel, chunked_head, samples)
    if packed:
        check_packed(planned, shared.forward, samples)
    if planned.is_tied:
        first: LayerSpec = TiedLayerSpec("embedding", Tokens, shared, packed, tied_weight_attr="module.weight")
        last: LayerSpec = TiedLayerSpec("embedding", Tokens, shared, packed, tied_weight_attr="module.weight",
                                        forward_fn=Tokens.logits)
    else:
        first, last = LayerSpec(Tokens, shared, packed), LayerSpec(Head, shared)
    return [
        first,
        *([LayerSpec(Positions, shared)] if planned.before or shared.forward.changes_embeddings else []),
        *(LayerSpec(DecoderLayer, shared, index) for index in range(shared.layers)),
        LayerSpec(Norm, shared),
        last,
    ]


def _samples(planned: PlannedModel, samples_per_row: int | None) -> int | None:
    """The most samples of a packed row where attention takes cu_seqlens, None elsewhere."""
    attention = planned.config._attn_implementation
    if samples_per_row is not None and samples_per_row < 1:
        raise ValueError(f"samples_per_row = {samples_per_row}: must be at least 1")
    if not takes_cu_seqlens(attention):
        return None
    if samples_per_row is None:
        raise ValueError(f"packed = True with attention = {attention!r}: must come with samples_per_row, the most "
                         "samples in a row; or attention must be 'sdpa' or 'eager', which have masks")
    return samples_per_row


def next_token_loss(outputs: Flow, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Flow:
    """transformers' own loss: the cross-entropy in nats, and the router loss if there is one.

    Args:
        labels: [batch, length], the tokens that come next, -100 where there is none to learn.
        num_items_in_batch: what the sum over tokens is divided by; without it, the number of these tokens.

    Returns the loss. Where there is a router loss: both with `num_items_in_batch`, otherwise their sum.

    Raises:
        ValueError: for logits of a part of the vocabulary, as with a `tensor_group`.
    """
    logits, *router_loss = parts_of(outputs)
    if shares_vocabulary(logits):
        raise ValueError("loss_fn = next_token_loss, and each of the tensor parallel ranks has logits of a part of the "
                         "vocabulary: must be TensorParallelLoss(tensor_group)")
    if isinstance(logits, HeadOutput):
        loss = logits.loss(labels, num_items_in_batch)
    else:
        loss = ForCausalLMLoss(logits, None, vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch,
                               shift_labels=labels)
    return with_router_loss(loss, router_loss, num_items_in_batch)
