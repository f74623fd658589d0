"""The pipeline's layers of a Hugging Face model, each around modules of transformers.

    Tokens -> Positions (where the model changes embeddings before its first layer)
      -> DecoderLayer x num_hidden_layers -> Norm -> Head, or Tokens again where the head is tied to the embedding
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_vshape.models.hugging_face.shared import Flow, Shared
from ds_vshape.models.parallel_layers import VocabularyLinear
from ds_vshape.split_backward.tensor_parallel import sum_gradient


class Part(nn.Module):
    """A layer around modules of the transformers model, which are at `name` there."""

    def __init__(self, shared: Shared, name: str, module: nn.Module) -> None:
        super().__init__()
        self.shared = shared
        self.name = name
        self.module = module


class Tokens(Part):
    """Token ids to embeddings; passes on what comes with them.

    Raises ValueError for inputs that no such model has; what is wrong in their numbers is told as torch tells an index
    out of range: on a GPU by the device.
    """

    def __init__(self, shared: Shared, packed: bool = False) -> None:
        super().__init__(shared, *shared.held(shared.planned.embedding))
        self._packed = packed

    def forward(self, inputs: Flow) -> Flow:
        ids, *others = inputs if isinstance(inputs, tuple) else (inputs,)
        self._check(ids, others)
        embeddings: Tensor = self.module(ids)
        if not others:
            return embeddings
        if not self._packed:
            # Booleans take an eighth of the bytes to send; transformers accepts both.
            others[0] = others[0].bool()
        return embeddings, *others

    def _check(self, ids: Tensor, others: list[Tensor]) -> None:
        most, form = (1, "ids and position ids (packed = True)") if self._packed else (
            2, "ids, ids and attention mask, or these two and position ids")
        shapes = [list(tensor.shape) for tensor in (ids, *others)]
        if (ids.dim() != 2 or not ids.numel() or any(shape != shapes[0] for shape in shapes) or len(others) > most
                or self._packed and not others):
            raise ValueError(f"the inputs of a micro-batch have the shapes {', '.join(map(str, shapes))}: must be "
                             f"{form}, each [batch, length]")
        tokens = self.shared.planned.config.vocab_size
        # Beyond them, one part of the vocabulary or another one would give zeros.
        torch._assert_async(((ids >= 0) & (ids < tokens)).all(),
                            f"the ids of a micro-batch must be tokens, from 0 to {tokens - 1} (vocab_size = {tokens})")
        if self._packed:
            torch._assert_async((others[0][:, 0] == 0).all(), "packed = True: position ids must start at 0 in each row")
            samples = self.shared.samples
            if samples is not None:
                torch._assert_async(((others[0] == 0).sum(1) <= samples).all(),
                                    f"samples_per_row = {samples}: a row has more samples, by its position ids")
        elif others:
            torch._assert_async(((others[0] == 0) | (others[0] == 1)).all(),
                                "an attention mask must hold 1 for tokens that count and 0 for others")

    def logits(self, flow: Flow) -> Flow:
        """The head, where it is tied to the embedding."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        parallel = self.shared.parallel

        def head(hidden: Tensor) -> Tensor:
            return F.linear(hidden if parallel is None else sum_gradient(hidden, parallel.group), weight)

        return self.shared.logits(head, weight, None, *_to_head(flow))


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
    """The norm after the last decoder layer. It passes on the mask for a router loss alone, and no position ids."""

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
        return self.shared.logits(module, module.weight, module.bias, *_to_head(flow))


def _members(flow: Flow) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Hidden states, mask if there is one, and position ids if there are any."""
    hidden, *others = flow if isinstance(flow, tuple) else (flow,)
    return (hidden, next((tensor for tensor in others if tensor.dtype == torch.bool), None),
            next((tensor for tensor in others if tensor.dtype != torch.bool), None))


def _with_hidden(flow: Flow, hidden: Tensor) -> Flow:
    return (hidden, *flow[1:]) if isinstance(flow, tuple) else hidden


def _to_head(flow: Flow) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Hidden states, mask and router logits; there is no mask without router logits."""
    hidden, *others = flow if isinstance(flow, tuple) else (flow,)
    return hidden, others[0] if len(others) > 1 else None, others[-1] if others else None


def _by_name(module: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """The modules of the base model, by their names, that Shared.held put into one module."""
    return {names[0]: module} if len(names) == 1 else {name: module.get_submodule(name) for name in names}


def _at(output: Any, place: int) -> Tensor:
    """The tensor at `place` of what a module returned, or the only one."""
    return output[place] if isinstance(output, tuple) else output  # type: ignore[no-any-return]
