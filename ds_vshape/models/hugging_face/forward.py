"""transformers' own forwards, run with stand-ins where modules live in other layers of the pipeline.

What a model does around its layers (scales of embeddings, masks of every type of layer, rotary embeddings, caps of
logits, router losses) is in the forwards of its base model and of its head. They run here as they are. A stand-in hands
on what it is handed, so that the forward of the base model tells what it would have called each layer with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ds_vshape.models.hugging_face.plan import PlannedModel, tensors_in

try:
    from transformers.modeling_outputs import MoeModelOutputWithPast
except ImportError as error:
    raise ImportError("models of Hugging Face need transformers: pip install 'ds-vshape[models]'") from error


class StandIn(nn.Module):
    """In place of `original`, whose attributes it shows: hands on hidden states, or is a zero to add to them."""

    def __init__(self, original: nn.Module, hands_on: bool = True) -> None:
        super().__init__()
        self._hands_on = hands_on
        # Not registered as a module: it is on the meta device and stays there.
        self.__dict__["_original"] = original
        self.received: tuple[Tensor, tuple[Any, ...], dict[str, Any]] | None = None
        self.returned: Tensor | None = None
        self.in_tuple = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        first: Tensor = args[0] if args else kwargs.pop("hidden_states")
        self.received = (first, args[1:], kwargs)
        if not self._hands_on:
            return torch.zeros((), device=first.device)
        result = first if self.returned is None else self.returned
        return (result,) if self.in_tuple else result


@dataclass(frozen=True)
class Arguments:
    """With what the base model calls a decoder layer, besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BaseForward:
    """The forward of the base model, in which the layers and what else the pipeline's layers hold are stand-ins.

    This isn't a module: DeepSpeed would cast the frequencies of the rotary embedding to bf16, which transformers keeps
    in fp32.

    Raises:
        ValueError: if the model's layers aren't called one after the other with what follows from masks and positions.
    """

    def __init__(self, planned: PlannedModel) -> None:
        self._model_type = planned.model_type
        self._layers = [StandIn(layer) for layer in getattr(planned.owner, planned.layers)]
        stand_ins: dict[str, nn.Module] = {
            name: StandIn(child, name not in planned.of_ids) for name, child in planned.owner.named_children()
            if name in planned.modules_of_layers}
        stand_ins[planned.layers] = nn.ModuleList(self._layers)
        others = {name: planned.made(child) for name, child in planned.owner.named_children() if name not in stand_ins}
        self._owner = _copy_with(planned.owner, {**stand_ins, **others}).eval()
        self._device = torch.device("cpu")
        self.changes_embeddings = self._try(planned.config.hidden_size)

    def __call__(self, embeddings: Tensor, mask: Tensor | None, position_ids: Tensor | None, *,
                 modules: Mapping[str, nn.Module] | None = None, after_layers: Tensor | None = None,
                 training: bool = False) -> Tensor:
        """What the base model returns for embeddings [batch, length, hidden].

        Args:
            modules: to run instead of their stand-ins.
            after_layers: what the last layer is to return; the embeddings in their last form where there is nothing.
            training: as the flag of the base model.
        """
        if mask is None and position_ids is not None:
            mask = finished_mask(embeddings)  # the layers' stand-ins need none
        try:
            return self._run(embeddings, mask, position_ids, modules or {}, after_layers, training)
        finally:
            for layer in self._layers:  # keeps no graph alive
                layer.received = None

    def arguments(self, hidden: Tensor, mask: Tensor | None, position_ids: Tensor | None,
                  keywords: Mapping[str, Any] = MappingProxyType({})) -> list[Arguments]:
        """For every decoder layer, at hidden states of this shape and type; `keywords` are for the base model, which
        hands them on to its layers."""
        with torch.no_grad():
            self._run(hidden.detach(), mask, position_ids, keywords=keywords)
        return [Arguments(args, kwargs) for _, args, kwargs in self._received()]

    def _run(self, embeddings: Tensor, mask: Tensor | None, position_ids: Tensor | None,
             modules: Mapping[str, nn.Module] = MappingProxyType({}), after_layers: Tensor | None = None,
             training: bool = False, keywords: Mapping[str, Any] = MappingProxyType({})) -> Tensor:
        if embeddings.device != self._device:
            self._owner.to(embeddings.device)
            self._device = embeddings.device
        given = {**keywords, **({} if position_ids is None else {"position_ids": position_ids})}
        stand_ins = dict(self._owner._modules)
        self._owner._modules.update(modules)
        self._owner.training = training
        self._layers[-1].returned = after_layers
        try:
            output = self._owner(inputs_embeds=embeddings, attention_mask=mask, use_cache=False, **given)
        finally:
            self._owner._modules.update(stand_ins)
            self._owner.training = False
            self._layers[-1].returned = None
        return output[0]  # type: ignore[no-any-return]

    def _received(self) -> list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]:
        """What the layers were called with, once."""
        received = [layer.received for layer in self._layers]
        for layer in self._layers:
            layer.received = None
        if None in received:
            raise ValueError(f"model_type = {self._model_type!r}: its forward left out layer {received.index(None)}")
        return received  # type: ignore[return-value]

    def _try(self, hidden_size: int) -> bool:
        """Whether the first layer gets others than the embeddings, after a check that layers can be cut apart. Where
        hidden states don't get from layer to layer as tensors, layers may return them in tuples."""
        try:
            return self._changes_embeddings(hidden_size)
        except Exception as error:
            for layer in self._layers:
                layer.in_tuple = True
            try:
                return self._changes_embeddings(hidden_size)
            except Exception:
                raise error from None

    def _changes_embeddings(self, hidden_size: int) -> bool:
        embeddings = torch.zeros(1, 2, hidden_size, requires_grad=True)
        self._run(embeddings, None, None)
        received = self._received()
        first, *others = (hidden for hidden, *_ in received)
        if any(other is not first for other in others):
            raise ValueError(f"model_type = {self._model_type!r}: its forward changes hidden states between layers; "
                             "must be a model whose layers follow each other")
        if any(tensor.requires_grad for _, args, kwargs in received for tensor in tensors_in([args, kwargs])):
            raise ValueError(f"model_type = {self._model_type!r}: its layers take more that depends on the embeddings "
                             "than hidden states; must be a model whose layers hand on hidden states alone")
        return first is not embeddings


class HeadForward:
    """The forward of the causal language model, in which the base model is a stand-in.

    Args:
        shares_vocabulary: whether the head gives the rank's part of the logits, which is noted in them as DeepSpeed
            notes it in parameters (`tensor_model_parallel`).
    """

    def __init__(self, planned: PlannedModel, shares_vocabulary: bool = False) -> None:
        self._shares_vocabulary = shares_vocabulary
        self._base = BaseOutput()
        self._model = _copy_with(planned.model, {planned.head: HeadStandIn(getattr(planned.model, planned.head))})
        *path, name = planned.owner_name.split(".")
        owner = self._model
        for step in path:  # OPT's head calls the decoder within the base model
            owner._modules[step] = _copy_with(owner._modules[step], {})
            owner = owner._modules[step]
        owner._modules[name] = self._base
        self._head: Any = self._model._modules[planned.head]
        self._coefficient = getattr(planned.config, "router_aux_loss_coef", None)

    def __call__(self, head: Callable[[Tensor], Tensor], hidden: Tensor, mask: Tensor | None = None,
                 router_logits: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [batch, length, vocab_size]; with the router loss, weighted, where there are router logits [layers,
        batch x length, experts]."""
        self._base.hidden = hidden
        self._base.router_logits = None if router_logits is None else tuple(router_logits)
        self._head.function = partial(head)  # nn.Module would register a module
        try:
            output = self._model(attention_mask=mask, use_cache=False)
        finally:
            self._base.hidden = self._base.router_logits = self._head.function = None
        output.logits.tensor_model_parallel = self._shares_vocabulary
        if router_logits is None:
            return output.logits  # type: ignore[no-any-return]
        return output.logits, self._coefficient * output.aux_loss


class HeadStandIn(StandIn):
    """In place of the head, calls `function`."""

    function: Callable[[Tensor], Tensor] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        assert self.function is not None
        return self.function(hidden)


class BaseOutput(nn.Module):
    """In place of the base model, returns what the pipeline has computed."""

    hidden: Tensor | None = None
    router_logits: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        return _Output(last_hidden_state=self.hidden, router_logits=self.router_logits)


class _Output(MoeModelOutputWithPast):
    """What other families add to the outputs of their base models isn't there."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def finished_mask(hidden: Tensor) -> Tensor:
    """A mask that transformers hands on as it is, because of its four dimensions. Without one, its forwards read
    position ids on the host, to see whether rows are packed."""
    return hidden.new_empty(1, 1, 1, 1)


def _copy_with(module: Any, children: Mapping[str, nn.Module]) -> Any:
    """A shallow copy of `module` with other children."""
    copied = copy.copy(module)
    copied._modules = {**module._modules, **children}
    return copied
