"""A Hugging Face model as a list of pipeline layers, made of the classes of transformers themselves.

    ids [batch, length], or (ids, attention mask [batch, length], position ids [batch, length])
      -> Tokens -> Positions (GPT-2) -> DecoderLayer x num_hidden_layers -> Norm -> Head
      -> logits [batch, length, vocab_size]

Each layer holds one module of the transformers model under the name it has there. Between layers flow the hidden
states, followed by the attention mask and the position ids where the batch has them. What transformers' model makes of
those once for all of its layers (the causal mask in the form that the attention wants, the rotary embedding) each
stage makes for itself: it is cheaper to compute than to send.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn

try:
    from transformers import PreTrainedConfig
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding
except ImportError as error:
    raise ImportError("models of Hugging Face need transformers: pip install 'ds-vshape[models]'") from error

# DeepSpeed's partition method: stages get equal numbers of decoder layers; other layers go to the stage of a neighbour.
PARTITION_METHOD = "type:DecoderLayer"
# Which layers activation checkpointing may run again. Not the embedding: a reentrant checkpoint gives no gradients to
# a layer whose inputs are integers.
CHECKPOINTABLE_LAYERS = ["DecoderLayer"]

# What flows: hidden states [batch, length, hidden], or (hidden states, mask), or (hidden states, mask, position ids).
Flow = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Family:
    """What the models of one transformers family are made of, and what their parts are called.

    The part before the first dot is the name of the base model; the head is called lm_head in every family.
    """

    embedding: str
    positions: str | None
    decoder: str
    decoder_class: Callable[..., nn.Module]
    norm: str
    norm_of: Callable[[Any], nn.Module]
    rotary_class: Callable[[Any], nn.Module] | None


# By config.model_type.
FAMILIES = {
    "llama": Family("model.embed_tokens", None, "model.layers", LlamaDecoderLayer, "model.norm",
                    lambda config: LlamaRMSNorm(config.hidden_size, config.rms_norm_eps), LlamaRotaryEmbedding),
    "qwen2": Family("model.embed_tokens", None, "model.layers", Qwen2DecoderLayer, "model.norm",
                    lambda config: Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps), Qwen2RotaryEmbedding),
    "gpt2": Family("transformer.wte", "transformer.wpe", "transformer.h", GPT2Block, "transformer.ln_f",
                   lambda config: nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon), None),
}
# By what config.layer_types calls a decoder layer.
_MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


def pipeline_layers(config: PreTrainedConfig, attention: str = "sdpa") -> list[LayerSpec]:
    """The layers of the causal language model that `config` describes, for a PipelineModule; their weights are random.

    Args:
        attention: the attention that transformers is to use, "sdpa" or "eager".

    Raises:
        ValueError: for a model that can't be cut into these layers.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(f"model_type = {config.model_type!r}: must be one of {', '.join(sorted(FAMILIES))}")
    if getattr(config, "add_cross_attention", False):
        raise ValueError("add_cross_attention = True: must be False, a pipeline has a decoder alone")
    if getattr(config, "quantization_config", None):
        raise ValueError("the config has a quantization_config: quantized weights can't be trained")
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    shared = AttentionArguments(family, config)
    if config.tie_word_embeddings:
        first: LayerSpec = TiedLayerSpec("embedding", Tokens, family, config, tied_weight_attr="module.weight")
        last: LayerSpec = TiedLayerSpec("embedding", Tokens, family, config, tied_weight_attr="module.weight",
                                        forward_fn=Tokens.logits)
    else:
        first, last = LayerSpec(Tokens, family, config), LayerSpec(Head, config)
    return [
        first,
        *([LayerSpec(Positions, family, config)] if family.positions else []),
        *(LayerSpec(DecoderLayer, family, config, index, shared) for index in range(config.num_hidden_layers)),
        LayerSpec(Norm, family, config),
        last,
    ]


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """transformers' own loss: the mean cross-entropy in nats a token. `labels` [batch, length] are the tokens that come
    next, -100 where there is none to learn."""
    loss: Tensor = ForCausalLMLoss(logits, None, vocab_size=logits.shape[-1], shift_labels=labels)
    return loss


class Part(nn.Module):
    """A layer around one module of the transformers model, `name` there."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.module = module


class Tokens(Part):
    """Token ids to hidden states; what comes with them goes on."""

    def __init__(self, family: Family, config: Any) -> None:
        super().__init__(family.embedding,
                         nn.Embedding(config.vocab_size, config.hidden_size, getattr(config, "pad_token_id", None)))

    def forward(self, inputs: Flow) -> Flow:
        if isinstance(inputs, Tensor):
            return self.module(inputs)  # type: ignore[no-any-return]
        ids, mask, *position_ids = inputs
        # An eighth of the integers to send; transformers takes either.
        return self.module(ids), mask.bool(), *position_ids

    def logits(self, hidden: Tensor) -> Tensor:
        """The head, where it is tied to the embedding."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return F.linear(hidden, weight)


class Positions(Part):
    """Adds a learned vector for each position, then GPT-2's first dropout."""

    def __init__(self, family: Family, config: Any) -> None:
        assert family.positions is not None
        super().__init__(family.positions, nn.Embedding(config.max_position_embeddings, config.hidden_size))
        self.dropout = nn.Dropout(config.embd_pdrop)

    def forward(self, flow: Flow) -> Flow:
        hidden, mask, position_ids = _members(flow)
        return _with_hidden(flow, self.dropout(hidden + self.module(position_ids)))


class AttentionArguments:
    """The arguments of every decoder layer besides the hidden states.

    The layers of a stage run one after the other on one micro-batch, so the latest arguments are cached: for all layers
    of the stage, and for all micro-batches where there is no mask. This isn't a module: DeepSpeed would cast the
    frequencies of the rotary embedding to bf16, which transformers keeps in fp32.
    """

    def __init__(self, family: Family, config: Any) -> None:
        self._config = config
        self._rotary = family.rotary_class(config) if family.rotary_class else None
        self._made_of: tuple[Any, ...] = ()
        self._masks: dict[str, Any] = {}
        self._others: dict[str, Any] = {}

    def __call__(self, flow: Flow, layer_type: str) -> dict[str, Any]:
        hidden, mask, position_ids = _members(flow)
        made_of = _made_of(flow)
        if not _are_same(made_of, self._made_of):
            self._made_of, self._masks, self._others = made_of, {}, {"position_ids": position_ids}
            if self._rotary is not None:
                self._others["position_embeddings"] = self._rotary(hidden, position_ids)
        if layer_type not in self._masks:
            self._masks[layer_type] = _MASKS[layer_type](self._config, hidden, mask, None, position_ids)
        return {"attention_mask": self._masks[layer_type], **self._others}


class DecoderLayer(Part):
    """A decoder layer of transformers; `shared` serves all of them on this rank."""

    def __init__(self, family: Family, config: Any, index: int, shared: AttentionArguments) -> None:
        super().__init__(f"{family.decoder}.{index}", family.decoder_class(config, layer_idx=index))
        self._shared = shared
        self._layer_type = (getattr(config, "layer_types", None) or {index: "full_attention"})[index]

    def forward(self, flow: Flow) -> Flow:
        hidden, *_ = _members(flow)
        return _with_hidden(flow, self.module(hidden, **self._shared(flow, self._layer_type)))


class Norm(Part):
    """The norm after the last decoder layer; mask and position ids end here."""

    def __init__(self, family: Family, config: Any) -> None:
        super().__init__(family.norm, family.norm_of(config))

    def forward(self, flow: Flow) -> Tensor:
        hidden, *_ = _members(flow)
        return self.module(hidden)  # type: ignore[no-any-return]


class Head(Part):
    """Hidden states to logits, by a weight of its own."""

    def __init__(self, config: Any) -> None:
        super().__init__("lm_head", nn.Linear(config.hidden_size, config.vocab_size, bias=False))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.module(hidden)  # type: ignore[no-any-return]


def _members(flow: Flow) -> tuple[Tensor, Tensor | None, Tensor]:
    """Hidden states, mask if there is one, and position ids [batch or 1, length]."""
    hidden, *others = flow if isinstance(flow, tuple) else (flow,)
    mask = others[0] if others else None
    position_ids = others[1] if len(others) > 1 else torch.arange(hidden.shape[1], device=hidden.device)[None]
    return hidden, mask, position_ids


def _with_hidden(flow: Flow, hidden: Tensor) -> Flow:
    return (hidden, *flow[1:]) if isinstance(flow, tuple) else hidden


def _made_of(flow: Flow) -> tuple[Any, ...]:
    """What the arguments of the attention depend on."""
    hidden, *others = flow if isinstance(flow, tuple) else (flow,)
    return (hidden.shape[:2], hidden.dtype, hidden.device, *others, *(tensor._version for tensor in others))


def _are_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Tensors are compared by identity, not by their numbers."""
    return len(one) == len(other) and all(a is b if isinstance(a, Tensor) else a == b for a, b in zip(one, other))
