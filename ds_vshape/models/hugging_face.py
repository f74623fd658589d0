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

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn

from ds_vshape.models.hugging_face_forward import Arguments, BaseForward, HeadForward
from ds_vshape.models.hugging_face_plan import Plan, PlannedModel
from ds_vshape.models.hugging_face_tensor_parallel import Cut, TensorParallelPlan, parts_of, share_random_state
from ds_vshape.models.parallel_layers import VocabularyLinear
from ds_vshape.split_backward.head import HeadOutput, Projection
from ds_vshape.split_backward.tensor_parallel import sum_gradient

try:
    from transformers import PreTrainedConfig
    from transformers.loss.loss_utils import ForCausalLMLoss
except ImportError as error:
    raise ImportError("models of Hugging Face need transformers: pip install 'ds-vshape[models]'") from error

if TYPE_CHECKING:
    from peft import LoraConfig

# DeepSpeed's partition method: stages get equal numbers of decoder layers; other layers go to the stage of a neighbour.
PARTITION_METHOD = "type:DecoderLayer"
# Which layers activation checkpointing may run again. Not the embedding: a reentrant checkpoint gives no gradients to
# a layer whose inputs are integers.
CHECKPOINTABLE_LAYERS = ["DecoderLayer"]

# What flows: hidden states [batch, length, hidden], behind them the mask (booleans) and the position ids (integers) if
# the batch has them; router logits come last.
Flow = Tensor | tuple[Tensor, ...]


def pipeline_layers(config: PreTrainedConfig, attention: str | None = None,
                    plan: Plan | None = None, tensor_group: Any = None, experts: str | None = None,
                    lora: LoraConfig | None = None, packed: bool = False,
                    chunked_head: bool = False) -> list[LayerSpec]:
    """The layers of the causal language model that `config` describes, for a PipelineModule; their weights are random.

    With a `tensor_group` each layer is cut over its ranks (hugging_face_tensor_parallel.py), and the pipeline returns
    logits [batch, length, vocab_size / ranks], for TensorParallelLoss. Collective over the group.

    Args:
        attention: the attention that transformers is to use, "sdpa" or "eager"; by default transformers chooses.
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

    Raises:
        ValueError: for a model that can't be cut into these layers, or not over these ranks, and for adapters that it
            can't have.
        ImportError: for adapters without peft.
    """
    if getattr(config, "add_cross_attention", False):
        raise ValueError("add_cross_attention = True: must be False, a pipeline has a decoder alone")
    if getattr(config, "quantization_config", None):
        raise ValueError("the config has a quantization_config: quantized weights can't be trained")
    if getattr(config, "layerdrop", 0):
        raise ValueError(f"layerdrop = {config.layerdrop}: must be 0, each stage would drop layers for itself")
    planned = PlannedModel(config, attention, plan, experts, lora)
    parallel = None
    if tensor_group is not None and dist.get_world_size(tensor_group) > 1:
        if lora is not None:
            raise ValueError(f"lora with {dist.get_world_size(tensor_group)} tensor parallel ranks: must have 1, "
                             "adapters aren't cut")
        parallel = TensorParallelPlan(planned, tensor_group)
        share_random_state(tensor_group)
    shared = Shared(planned, parallel, chunked_head)
    if packed:
        shared.check_packed()
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


def next_token_loss(outputs: Flow, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Flow:
    """transformers' own loss: the cross-entropy in nats, and the router loss if there is one.

    Args:
        labels: [batch, length], the tokens that come next, -100 where there is none to learn.
        num_items_in_batch: by which the sum over tokens is divided; without it the loss is the mean of these tokens.

    Returns the loss. Where there is a router loss: with `num_items_in_batch` both, else their sum.
    """
    logits, *router_loss = parts_of(outputs)
    if isinstance(logits, HeadOutput):
        loss = logits.loss(labels, num_items_in_batch)
    else:
        loss = ForCausalLMLoss(logits, None, vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch,
                               shift_labels=labels)
    if num_items_in_batch is None:
        return sum(router_loss, loss)
    return (loss, *router_loss) if router_loss else loss


class Shared:
    """What all layers of a rank share: the model that they are parts of, and the arguments of its decoder layers.

    The layers of a stage run one after the other on one micro-batch, so the latest arguments are cached: for all layers
    of the stage, and for all micro-batches where there is no mask.
    """

    def __init__(self, planned: PlannedModel, parallel: TensorParallelPlan | None = None,
                 chunked_head: bool = False) -> None:
        self.planned = planned
        self.parallel = parallel
        self.chunked_head = chunked_head
        self.forward = BaseForward(planned)
        self.head = HeadForward(planned)
        self._layers = getattr(planned.owner, planned.layers)
        self._routed = [bool(planned.routers_in(layer)) for layer in self._layers]
        self._made_of: tuple[Any, ...] = ()
        self._arguments: list[Arguments] = []

    @property
    def layers(self) -> int:
        return len(self._layers)

    def has_routed_before(self, index: int) -> bool:
        """Whether router logits come with the hidden states to decoder layer `index`."""
        return any(self._routed[:index])

    def held(self, *names: str) -> tuple[str, nn.Module]:
        """Modules of the base model, made to be trained, in one module; and where they are in the model."""
        owner, owner_name = self.planned.owner, self.planned.owner_name
        modules = {name: self.made(f"{owner_name}.{name}", owner.get_submodule(name)) for name in names}
        if len(modules) == 1:
            (name, module), = modules.items()
            return f"{owner_name}.{name}", module
        return owner_name, nn.ModuleDict(modules)

    def made(self, name: str, module: nn.Module) -> nn.Module:
        """This rank's share of a module of the model, which is at `name` there, to be trained."""
        made: nn.Module = self.planned.made(module)
        return made if self.parallel is None else self.parallel.cut(name, made)

    def cut_of(self, weight: str) -> Cut | None:
        """The share that this rank has of a weight, by its name in the model; None where it is whole."""
        return None if self.parallel is None else self.parallel.cut_of(weight)

    def whole(self, name: str, share: Tensor) -> Tensor | None:
        """A weight whose share this rank has; None on all but the first of the tensor parallel ranks (collective)."""
        if self.parallel is None:
            return share
        return self.parallel.whole(name, share)

    def check_packed(self) -> None:
        """Raise ValueError if a decoder layer's tokens would see another sample of their row."""
        positions = torch.tensor([[0, 1, 0, 1]])
        hidden = torch.zeros(*positions.shape, self.planned.config.hidden_size)
        for index, arguments in enumerate(self.forward.arguments(hidden, None, positions)):
            masks = [value for value in (*arguments.args, *arguments.kwargs.values())
                     if isinstance(value, Tensor) and value.shape[-2:] == (4, 4)]
            # True, or a bias of 0, lets a token be seen.
            if not masks or any(bool(mask[0, 0, 2, 1]) is (mask.dtype == torch.bool) for mask in masks):
                raise ValueError(f"packed = True: model_type = {self.planned.model_type!r} doesn't keep the samples of "
                                 f"a row apart in decoder layer {index}; must be False")

    def logits(self, head: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor | None, flow: Flow) -> Flow:
        """The logits that `head`, a product with the weight, makes of what the norm has given, with a router loss if
        there is one; or what the loss needs to make them."""
        hidden, mask, router_logits = _to_head(flow)
        if not self.chunked_head:
            return self.head(head, hidden, mask, router_logits)
        if self.parallel is not None:
            hidden = sum_gradient(hidden, self.parallel.group)
        output: Any = HeadOutput(hidden, Projection(weight, bias, self._logits_of_chunk))
        if router_logits is None:
            return output  # type: ignore[no-any-return]
        # Of one word: the forward of the head gives the router loss with logits alone.
        _, router_loss = self.head(lambda hidden: hidden.detach()[..., :1], hidden, mask, router_logits)
        return output, router_loss

    def _logits_of_chunk(self, project: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Logits [tokens, vocab_size] of hidden states [tokens, hidden], by transformers' forward of the head."""
        logits = self.head(project, hidden[None])
        assert isinstance(logits, Tensor)
        return logits[0]

    def arguments(self, index: int, hidden: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> Arguments:
        """Of decoder layer `index`, besides the hidden states."""
        given = [tensor for tensor in (mask, position_ids) if tensor is not None]
        made_of = (hidden.shape[:2], hidden.dtype, hidden.device, mask is None, *given,
                   *(tensor._version for tensor in given))
        if not _are_same(made_of, self._made_of):
            self._made_of, self._arguments = made_of, self.forward.arguments(hidden, mask, position_ids)
        return self._arguments[index]


class Part(nn.Module):
    """A layer around modules of the transformers model, which are at `name` there."""

    def __init__(self, shared: Shared, name: str, module: nn.Module) -> None:
        super().__init__()
        self.shared = shared
        self.name = name
        self.module = module


class Tokens(Part):
    """Token ids to embeddings; what comes with them goes on."""

    def __init__(self, shared: Shared, packed: bool = False) -> None:
        super().__init__(shared, *shared.held(shared.planned.embedding))
        self._packed = packed

    def forward(self, inputs: Flow) -> Flow:
        if isinstance(inputs, Tensor):
            return self.module(inputs)  # type: ignore[no-any-return]
        ids, *others = inputs
        if not self._packed:
            # An eighth of the integers to send; transformers takes either.
            others[0] = others[0].bool()
        return self.module(ids), *others

    def logits(self, flow: Flow) -> Flow:
        """The head, where it is tied to the embedding."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        parallel = self.shared.parallel

        def head(hidden: Tensor) -> Tensor:
            return F.linear(hidden if parallel is None else sum_gradient(hidden, parallel.group), weight)

        return self.shared.logits(head, weight, None, flow)


class Positions(Part):
    """What the base model does with embeddings before its first layer: learned positions, scales, dropout."""

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared, *shared.held(*shared.planned.before))
        self._names = shared.planned.before

    def forward(self, flow: Flow) -> Flow:
        return _with_hidden(flow, self.shared.forward(*_members(flow), modules=_by_name(self.module, self._names),
                                                      training=self.training))


class DecoderLayer(Part):
    """A decoder layer of transformers."""

    def __init__(self, shared: Shared, index: int) -> None:
        name = f"{shared.planned.layers}.{index}"
        super().__init__(shared, *shared.held(name))
        self.index = index
        self._routed_before = shared.has_routed_before(index)
        self._router_logits: list[Tensor] = []
        for router, place in shared.planned.routers_in(self.module):
            router.register_forward_hook(
                lambda _, __, output, place=place: self._router_logits.append(_at(output, place)))

    def forward(self, flow: Flow) -> Flow:
        members = flow if isinstance(flow, tuple) else (flow,)
        routed = members[-1:] if self._routed_before else ()
        hidden, mask, position_ids = _members(members[:-1] if self._routed_before else members)
        arguments = self.shared.arguments(self.index, hidden, mask, position_ids)
        self._router_logits.clear()
        output = _at(self.module(hidden, *arguments.args, **arguments.kwargs), 0)
        if self._router_logits:
            routed = (torch.cat([*routed, torch.stack(self._router_logits)]),)
            self._router_logits.clear()
        others = members[1:len(members) - self._routed_before]
        return (output, *others, *routed) if others or routed else output


class Norm(Part):
    """The norm after the last decoder layer; position ids end here, and the mask where no router loss wants it."""

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared, *shared.held(*shared.planned.after))
        self._names = shared.planned.after
        self._routed = shared.has_routed_before(shared.layers)

    def forward(self, flow: Flow) -> Flow:
        members = flow if isinstance(flow, tuple) else (flow,)
        hidden, mask, position_ids = _members(members[:-1] if self._routed else members)
        output = self.shared.forward(hidden.detach(), mask, position_ids, after_layers=hidden,
                                     modules=_by_name(self.module, self._names))
        if not self._routed:
            return output
        return output, *(() if mask is None else (mask,)), members[-1]


class Head(Part):
    """Hidden states to logits, by a weight of its own."""

    def __init__(self, shared: Shared) -> None:
        planned = shared.planned
        super().__init__(shared, planned.head, shared.made(planned.head, planned.model.get_output_embeddings()))

        if shared.chunked_head and type(self.module) not in (nn.Linear, VocabularyLinear):
            raise ValueError(f"chunked_head = True: the head {planned.head} is a {type(self.module).__name__}; must be "
                             "a Linear, without adapters")

    def forward(self, flow: Flow) -> Flow:
        module: Any = self.module
        if not self.shared.chunked_head:
            return self.shared.head(module, *_to_head(flow))
        return self.shared.logits(module, module.weight, module.bias, flow)


def _members(flow: Flow) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Hidden states, mask if there is one, and position ids if there are any."""
    hidden, *others = flow if isinstance(flow, tuple) else (flow,)
    return (hidden, next((tensor for tensor in others if tensor.dtype == torch.bool), None),
            next((tensor for tensor in others if tensor.dtype != torch.bool), None))


def _with_hidden(flow: Flow, hidden: Tensor) -> Flow:
    return (hidden, *flow[1:]) if isinstance(flow, tuple) else hidden


def _to_head(flow: Flow) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Hidden states, mask and router logits; without these there is no mask either."""
    hidden, *others = flow if isinstance(flow, tuple) else (flow,)
    return hidden, others[0] if len(others) > 1 else None, others[-1] if others else None


def _by_name(module: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """The modules of the base model that Shared.held put into one."""
    return {names[0]: module} if len(names) == 1 else {name: module.get_submodule(name) for name in names}


def _at(output: Any, place: int) -> Tensor:
    """What a module returned, one tensor or several."""
    return output[place] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def _are_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Tensors are compared by identity, not by their numbers."""
    return len(one) == len(other) and all(a is b if isinstance(a, Tensor) else a == b for a, b in zip(one, other))
