"""What all layers of a Hugging Face model share on a rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ds_vshape.models.hugging_face.forward import Arguments, BaseForward, HeadForward
from ds_vshape.models.hugging_face.packed import varlen_arguments
from ds_vshape.models.hugging_face.plan import PlannedModel
from ds_vshape.models.hugging_face.tensor_parallel import Cut, TensorParallelPlan
from ds_vshape.split_backward.head import HeadOutput, Projection
from ds_vshape.split_backward.tensor_parallel import sum_gradient

# What flows from layer to layer: hidden states [batch, length, hidden], behind them the attention mask (booleans) and
# the position ids (integers) if the batch has them; router logits come last.
Flow = Tensor | tuple[Tensor, ...]


class Shared:
    """The model that the layers are parts of, its forwards around them, and the arguments of its decoder layers.

    The layers of a stage run one after the other on one micro-batch, so the latest arguments are cached: for all layers
    of the stage, and for all micro-batches where there is no mask.

    Attributes:
        samples: the most that a packed row has, where attention takes cu_seqlens; None elsewhere.
    """

    def __init__(self, planned: PlannedModel, parallel: TensorParallelPlan | None = None,
                 chunked_head: bool = False, samples: int | None = None) -> None:
        self.planned = planned
        self.parallel = parallel
        self.chunked_head = chunked_head
        self.samples = samples
        self.forward = BaseForward(planned)
        self.head = HeadForward(planned, parallel is not None)
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
        """Where modules of the base model are in the model, and their copies with weights, in one module."""
        owner, owner_name = self.planned.owner, self.planned.owner_name
        modules = {name: self.made(f"{owner_name}.{name}", owner.get_submodule(name)) for name in names}
        if len(modules) == 1:
            (name, module), = modules.items()
            return f"{owner_name}.{name}", module
        return owner_name, nn.ModuleDict(modules)

    def made(self, name: str, module: nn.Module) -> nn.Module:
        """A copy, with weights, of this rank's share of a module of the model, which is at `name` there."""
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

    def logits(self, head: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor | None, hidden: Tensor,
               mask: Tensor | None, router_logits: Tensor | None) -> Flow:
        """The logits that `head`, a product with the weight, makes of what the norm has given, with a router loss if
        there is one; or what the loss needs to make them."""
        if not self.chunked_head:
            return self.head(head, hidden, mask, router_logits)
        if self.parallel is not None:
            hidden = sum_gradient(hidden, self.parallel.group)
        output: Any = HeadOutput(hidden, Projection(weight, bias, self._logits_of_chunk))
        if router_logits is None:
            return output  # type: ignore[no-any-return]
        # The head's forward computes the router loss only along with logits: those of a single token of the vocabulary.
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
            if self.samples is None or position_ids is None:
                arguments = self.forward.arguments(hidden, mask, position_ids)
            else:
                arguments = varlen_arguments(self.forward, hidden, position_ids, self.samples)
            self._made_of, self._arguments = made_of, arguments
        return self._arguments[index]


def _are_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Tensors are compared by identity, not by their numbers."""
    return len(one) == len(other) and all(a is b if isinstance(a, Tensor) else a == b for a, b in zip(one, other))
