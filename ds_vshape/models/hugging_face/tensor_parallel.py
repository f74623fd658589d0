"""A Hugging Face model on tensor parallel ranks: transformers' plan, carried out by DeepSpeed's own layers.

    style in config.base_model_tp_plan     on each of t ranks
    colwise                                1 / t of the rows of a Linear, and of its outputs
    rowwise                                1 / t of the columns; an all-reduce of the outputs
    colwise_gather_output                  1 / t of the rows; every rank gets the whole outputs
    rowwise_split_input                    1 / t of the columns, for whole inputs; an all-reduce
    moe_tp_experts                         every expert, with 1 / t of its intermediate size, as the plan says of its
                                           weights (packed_colwise: gate and up, each for itself; colwise; rowwise)
    replicated_with_grad_allreduce         whole, for the heads of the rank; gradients are added up over the ranks

Embedding and head have 1 / t of the vocabulary on each rank, whatever the plan says of them, so that no rank ever has
all logits. All that the plan doesn't name is whole on every rank, and gets the same gradients there.

A layer is drawn whole and cut then, so that weights don't depend on t.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject.layers import LinearAllreduce, LinearAllreduceWithReplicatedInput, RowParallel
from deepspeed.sequence.cross_entropy import vocab_parallel_cross_entropy
from torch import Tensor, nn

from ds_vshape.models.hugging_face.plan import PlannedModel
from ds_vshape.models.parallel_layers import ColumnLinear, GatheredColumnLinear, VocabularyEmbedding, VocabularyLinear
from ds_vshape.split_backward.head import HeadOutput
from ds_vshape.split_backward.tensor_parallel import sum_gradient

_ROWS, _COLUMNS = -2, -1
_LINEARS: dict[str, Any] = {
    "colwise": ColumnLinear, "colwise_gather_output": GatheredColumnLinear,
    "rowwise": LinearAllreduce, "rowwise_split_input": LinearAllreduceWithReplicatedInput,
}
_EXPERTS = "moe_tp_experts"
# Of the weights of experts: the dimension that is cut, and how many weights lie there one after another.
_EXPERT_WEIGHTS = {"colwise": (_ROWS, 1), "packed_colwise": (_ROWS, 2), "rowwise": (_COLUMNS, 1)}
_SUMMED = "replicated_with_grad_allreduce"
# Modules that sit next to column parallel layers, and work on the rank's heads or its part of the intermediate size.
_ON_A_SHARE = re.compile(r"(q|k|v|query|key|value)_?(layer_?|rms_?)?norm|act|act_fn|activation|activation_fn")


@dataclass(frozen=True)
class Cut:
    """The share of a weight that rank `rank` of `ranks` has: of dimension `dim` (negative), where `pieces` weights lie
    one after another, the same part of each."""

    dim: int
    rank: int
    ranks: int
    pieces: int = 1

    def of_shape(self, shape: Any) -> list[int]:
        """The shape of a weight whose share has `shape`."""
        whole = list(shape)
        whole[self.dim] *= self.ranks
        return whole

    def take(self, whole: Any) -> Tensor:
        """The share, a copy, of a tensor or of what safetensors' get_slice returns, which then reads no more than it.

        Raises:
            ValueError: if the dimension can't be divided.
        """
        shape = list(whole.shape if isinstance(whole, Tensor) else whole.get_shape())
        size, rest = divmod(shape[self.dim], self.pieces * self.ranks)
        if rest:
            raise ValueError(f"{shape[self.dim]} in {shape} must be a multiple of the {self.ranks} tensor parallel "
                             "ranks" + (f" and {self.pieces}" if self.pieces > 1 else ""))
        index = [slice(None)] * len(shape)
        shares = []
        for piece in range(self.pieces):
            start = (piece * self.ranks + self.rank) * size
            index[self.dim] = slice(start, start + size)
            shares.append(whole[tuple(index)])
        return torch.cat(shares, self.dim)

    def join(self, shares: list[Tensor]) -> Tensor:
        """The whole weight, of the shares of all ranks."""
        pieces = [share.chunk(self.pieces, self.dim) for share in shares]
        return torch.cat([share[piece] for piece in range(self.pieces) for share in pieces], self.dim)


class TensorParallelPlan:
    """What the ranks of `group` hold of a planned model.

    Raises:
        ValueError: on every rank, for a model without a plan, a style in it that can't be carried out, and sizes that
            the ranks can't share.
    """

    def __init__(self, planned: PlannedModel, group: Any) -> None:
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._model_type = planned.model_type
        self._config = planned.config
        self._embedding = f"{planned.owner_name}.{planned.embedding}"
        self._head = planned.head
        self._styles = dict(self._styles_in(planned))
        self._check_weights_on_shares(planned.model)
        self._check_heads()
        self._check_embedding(planned)
        self._cuts = dict(self._cuts_in(planned.model))

    def cut_of(self, weight: str) -> Cut | None:
        """The share of a weight by its name in the model; None where it is whole."""
        return self._cuts.get(weight)

    def whole(self, name: str, share: Tensor) -> Tensor | None:
        """The whole weight on the first rank, None on the others (collective)."""
        cut = self.cut_of(name)
        if cut is None:
            return share if self.rank == 0 else None
        shares = [torch.empty_like(share) for _ in range(self.ranks)] if self.rank == 0 else None
        dist.gather(share.contiguous(), shares, dist.get_global_rank(self.group, 0), self.group)
        return None if shares is None else cut.join(shares)

    def cut(self, name: str, module: nn.Module) -> nn.Module:
        """This rank's share of a whole module, which is at `name` in the model; its modules are replaced."""
        for path, child in list(module.named_modules()):
            share = self._share_of(_joined(name, path), child)
            if path == "":
                module = share
            elif share is not child:
                module.set_submodule(path, share)
        return module

    def _share_of(self, name: str, module: Any) -> Any:
        style = self._styles.get(name, "")
        if name == self._embedding:
            return VocabularyEmbedding(module, self.group)
        if name == self._head:
            return VocabularyLinear(module, self.group)
        if style in _LINEARS:
            return _LINEARS[style](module, self.group)
        if style == _SUMMED:
            for parameter in module.parameters(recurse=False):
                parameter.register_hook(partial(_summed, self.group))
        if style == _EXPERTS:
            self._cut_experts(name, module)
        return module

    def _cut_experts(self, name: str, experts: nn.Module) -> None:
        """Every rank computes a part of what each expert returns."""
        parameter: Any
        for weight, parameter in experts.named_parameters(recurse=False):
            parameter.data = self._cuts[f"{name}.{weight}"].take(parameter.data)
            parameter.tensor_model_parallel = True  # DeepSpeed counts it on every rank in the gradients' norm.
        experts.register_forward_pre_hook(partial(_sum_gradients, self.group), with_kwargs=True)
        experts.register_forward_hook(lambda _, __, output: RowParallel.apply(self.group, output, False))

    def _styles_in(self, planned: PlannedModel) -> Iterator[tuple[str, str]]:
        """The styles by the names of modules and parameters, without embedding and head."""
        plan = getattr(self._config, "base_model_tp_plan", None)
        if not plan:
            raise ValueError(f"model_type = {self._model_type!r}: transformers has no plan for its tensor parallel "
                             "layers (config.base_model_tp_plan); must be a model with one, or have 1 tensor parallel "
                             f"rank instead of {self.ranks}")
        plan = {f"{planned.model.base_model_prefix}.{name}": style for name, style in plan.items()}
        modules = dict(planned.model.named_modules())
        for name, part in (*modules.items(), *planned.model.named_parameters()):
            style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
            if style is None or name in (self._embedding, self._head):
                continue
            of_experts = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name.rpartition(".")[0])) == _EXPERTS
            fits = (type(part) is nn.Linear and style in _LINEARS or style == _SUMMED or style == _EXPERTS
                    or isinstance(part, nn.Parameter) and of_experts and style in _EXPERT_WEIGHTS)
            if not fits:
                raise ValueError(
                    f"model_type = {self._model_type!r}: its plan (config.base_model_tp_plan) wants {style!r} for "
                    f"{name}, a {type(part).__name__}, which isn't done; must be {', '.join(sorted(_LINEARS))} for a "
                    f"Linear, {_SUMMED} for a norm, or {_EXPERTS} for experts with "
                    f"{', '.join(sorted(_EXPERT_WEIGHTS))} for their weights; or have 1 tensor parallel rank")
            yield name, style

    def _check_weights_on_shares(self, model: nn.Module) -> None:
        """A whole weight there would get, on each rank, the gradient of the rank's share alone."""
        modules = dict(model.named_modules())
        for path in dict.fromkeys(name.rpartition(".")[0] for name, style in self._styles.items()
                                  if style == "colwise"):
            names = [name for name, _ in modules[path].named_parameters(recurse=False)]
            names += [name for name, child in modules[path].named_children()
                      if _ON_A_SHARE.fullmatch(name) and any(True for _ in child.parameters())]
            unnamed = sorted(f"{path}.{name}" for name in names if f"{path}.{name}" not in self._styles)
            if unnamed:
                raise ValueError(
                    f"model_type = {self._model_type!r}: its plan (config.base_model_tp_plan) cuts {path} and doesn't "
                    f"say what becomes of {unnamed[0]}; must have 1 tensor parallel rank, or a plan that names it: "
                    f"{_SUMMED!r} where the weight is the same for all heads")

    def _check_heads(self) -> None:
        if not any(style == "colwise" and re.search("attn|attention", name) for name, style in self._styles.items()):
            return
        for key in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(self._config, key, None)
            if isinstance(heads, int) and heads % self.ranks:
                raise ValueError(f"{key} = {heads}: must be a multiple of the {self.ranks} tensor parallel ranks")

    def _check_embedding(self, planned: PlannedModel) -> None:
        vocabulary = self._config.vocab_size
        if vocabulary % self.ranks:
            raise ValueError(f"vocab_size = {vocabulary}: must be a multiple of the {self.ranks} tensor parallel ranks")
        embedding = planned.model.get_input_embeddings()
        try:
            VocabularyEmbedding.validate_embedding(embedding)
        except NotImplementedError as error:
            raise ValueError(f"model_type = {self._model_type!r}: its {type(embedding).__name__} can't be cut by the "
                             f"vocabulary ({error}); must have 1 tensor parallel rank") from None

    def _cuts_in(self, model: nn.Module) -> Iterator[tuple[str, Cut]]:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            path, _, kind = name.rpartition(".")
            style = self._styles.get(path, "colwise" if path in (self._embedding, self._head) else "")
            pieces = 1
            if style == _EXPERTS:
                if name not in self._styles:
                    raise ValueError(f"model_type = {self._model_type!r}: its plan (config.base_model_tp_plan) cuts "
                                     f"{path} and doesn't say how to cut {name}; must have 1 tensor parallel rank")
                dim, pieces = _EXPERT_WEIGHTS[self._styles[name]]
            elif style.startswith("colwise"):
                dim = _COLUMNS if kind == "bias" else _ROWS
            elif style.startswith("rowwise") and kind == "weight":
                dim = _COLUMNS
            else:
                continue
            size = parameter.shape[dim] // pieces
            if size % self.ranks:
                raise ValueError(f"model_type = {self._model_type!r}: {size} in the shape {list(parameter.shape)} of "
                                 f"{name} must be a multiple of the {self.ranks} tensor parallel ranks")
            yield name, Cut(dim, self.rank, self.ranks, pieces)


class TensorParallelLoss:
    """next_token_loss (layer_list.py) where each rank of `group` has the logits [batch, length,
    vocab_size / ranks] of its part of the vocabulary. Every rank gets the whole loss.

    Raises:
        ValueError: for logits of the whole vocabulary.
    """

    def __init__(self, group: Any) -> None:
        self._group = group

    def __call__(self, outputs: Tensor | tuple[Tensor, ...], labels: Tensor,
                 num_items_in_batch: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        logits, *router_loss = parts_of(outputs)
        self._check(logits)
        if isinstance(logits, HeadOutput):
            loss = logits.loss(labels, num_items_in_batch, partial(self._cross_entropy, reduction="sum"))
        else:
            loss = self._cross_entropy(logits, labels, "mean" if num_items_in_batch is None else "sum")
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        return with_router_loss(loss, router_loss, num_items_in_batch)

    def token_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each token [batch, length] in nats; 0 where the label is -100."""
        self._check(logits)
        return self._cross_entropy(logits, labels, "none")

    def _check(self, logits: Tensor | HeadOutput) -> None:
        ranks = dist.get_world_size(self._group)
        if ranks > 1 and not shares_vocabulary(logits):
            raise ValueError(f"loss_fn = TensorParallelLoss over {ranks} tensor parallel ranks, and the head isn't cut "
                             "over them: must be next_token_loss, or pipeline_layers must have their tensor_group")

    def _cross_entropy(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        size, ranks = logits.shape[-1], dist.get_world_size(self._group)
        start = dist.get_rank(self._group) * size
        loss: Tensor = vocab_parallel_cross_entropy(
            logits, labels, self._group, vocab_start_index=start, vocab_end_index=start + size,
            global_vocab_size=ranks * size, reduction=reduction)
        return loss


def parts_of(outputs: Any) -> tuple[Any, ...]:
    """Logits, or the HeadOutput that makes them, and a router loss if there is one."""
    return outputs if type(outputs) is tuple else (outputs,)


def shares_vocabulary(logits: Tensor | HeadOutput) -> bool:
    """Whether these are a rank's part of the logits."""
    noted = logits.projection.weight if isinstance(logits, HeadOutput) else logits
    return getattr(noted, "tensor_model_parallel", False)


def with_router_loss(loss: Tensor, router_loss: Sequence[Tensor],
                     num_items_in_batch: Tensor | None) -> Tensor | tuple[Tensor, ...]:
    """The sum of a mean over tokens and a router loss, if there is one. With `num_items_in_batch` both: the engine
    averages them differently."""
    if num_items_in_batch is None:
        return sum(router_loss, loss)
    return (loss, *router_loss) if router_loss else loss


def share_random_state(group: Any) -> None:
    """Give all ranks of `group` the random state of its first rank on the CPU (collective)."""
    state = torch.get_rng_state().to(get_accelerator().current_device_name())
    dist.broadcast(state, dist.get_global_rank(group, 0), group)
    torch.set_rng_state(state.cpu())


def _summed(group: Any, gradient: Tensor) -> Tensor:
    total = gradient.clone()
    dist.all_reduce(total, group=group)
    return total


def _sum_gradients(group: Any, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of experts, with their gradients, of which each rank has a part, summed over the ranks."""
    def of(value: Any) -> Any:
        return sum_gradient(value, group) if isinstance(value, Tensor) and value.is_floating_point() else value
    return tuple(map(of, args)), {name: of(value) for name, value in kwargs.items()}


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))
