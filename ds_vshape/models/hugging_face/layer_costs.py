"""What each layer of a Hugging Face model costs, found on the meta device: its modules run there, with shapes and
without data.

    parameters    of the module
    FLOPs         of the products that F, B and W make, as torch counts them (torch/utils/flop_counter.py)
    bytes         that F leaves for the backward and B leaves to W, as measure/memory.py counts them in an engine

Attention by scaled_dot_product_attention is taken to be fused, without dropout: it keeps queries, keys, values, output
and a number for each row of scores, and computes the scores again in B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ds_vshape.deepspeed_adapter.silent_group import silent_group
from ds_vshape.measure.memory import Storages
from ds_vshape.models.hugging_face.layer_list import next_token_loss, pipeline_layers
from ds_vshape.models.hugging_face.layers import DecoderLayer
from ds_vshape.models.hugging_face.shared import Flow, Shared
from ds_vshape.models.hugging_face.tensor_parallel import TensorParallelLoss
from ds_vshape.split_backward import SplitBackward, SplitForward, WeightGradientStore, WholeGradients


class Sums(NamedTuple):
    """All-reduces over tensor parallel ranks: how many, and the bytes of all of them."""

    number: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class MeasuredCosts:
    """The costs of one layer, for one micro-batch.

    Attributes:
        parameters: their number; no costs of a micro-batch.
        flops: of F, B and W.
        after_forward: bytes that F leaves for the backward, the layer's inputs included.
        after_backward: bytes that B leaves to W.
        sums_in_f, sums_in_b: of these passes.
    """

    parameters: int
    flops: tuple[int, int, int]
    after_forward: int
    after_backward: int
    sums_in_f: Sums = Sums()
    sums_in_b: Sums = Sums()


def layer_costs(config: Any, samples: int, length: int, dtype: torch.dtype,
                tensor: int = 1) -> tuple[MeasuredCosts, ...]:
    """The costs of each of pipeline_layers(config), for micro-batches of `samples` x `length` tokens without masks; the
    loss is part of the last layer. With `tensor` ranks that share each layer, the costs of the first of them.

    Raises:
        ValueError: as pipeline_layers.
    """
    with nullcontext() if tensor == 1 else silent_group(tensor) as group:
        return _costs_of(config, samples, length, dtype, group)


def _costs_of(config: Any, samples: int, length: int, dtype: torch.dtype, group: Any) -> tuple[MeasuredCosts, ...]:
    specs = pipeline_layers(config, tensor_group=group)
    loss_fn = next_token_loss if group is None else TensorParallelLoss(group)
    shared: Shared = specs[0].module_args[0]
    shared.planned.on_meta = True
    labels = torch.zeros(samples, length, dtype=torch.long, device="meta")
    flow: Flow = labels.clone()
    kinds = getattr(shared.planned.config, "layer_types", None)
    found, measured = [], {}
    for place, spec in enumerate(specs):
        layer = spec.build().to(dtype)
        call = layer if not getattr(spec, "forward_fn", None) else partial(spec.forward_fn, layer)
        if place == len(specs) - 1:
            call = partial(_with_loss, call, loss_fn, labels)
        # Equal layers are measured once.
        kind = kinds[layer.index] if isinstance(layer, DecoderLayer) and kinds else place == 0
        key = repr(layer), kind, tuple((tensor.shape, tensor.dtype) for tensor in tree_leaves(flow))
        if key not in measured:
            measured[key] = _measure(layer, call, flow)
        costs, flow = measured[key]
        found.append(costs)
    return tuple(found)


def _with_loss(call: Callable[[Flow], Flow], loss_fn: Callable[[Flow, Tensor], Flow], labels: Tensor,
               flow: Flow) -> Flow:
    return loss_fn(call(flow), labels)


def _measure(layer: nn.Module, call: Callable[[Flow], Any], flow: Flow) -> tuple[MeasuredCosts, Flow]:
    """The costs of a layer, and its outputs."""
    inputs = tree_map(lambda tensor: tensor.detach().requires_grad_(tensor.is_floating_point()), flow)
    store, watch = WeightGradientStore(), _Watch()
    model = Storages([*layer.parameters(), *layer.buffers()])
    with torch.no_grad(), _FusedAttention(watch), watch:
        call(inputs)  # masks and rotary embeddings, which are made once for all layers
    watch.storages = Storages()
    watch.take()
    with _FusedAttention(watch), watch, SplitForward(store):
        outputs = call(inputs)
    passed_on = tree_map(partial(torch.empty_like, requires_grad=False), outputs)
    roots = [output for output in tree_leaves(outputs) if output.requires_grad]
    edges, gradients = [get_gradient_edge(root) for root in roots], [torch.empty_like(root) for root in roots]
    del outputs, roots
    after_forward = (watch.storages - model).nbytes() + sum(tensor.nbytes for tensor in tree_leaves(inputs))
    flops_f, sums_in_f = watch.take()
    with watch, SplitBackward(store):
        torch.autograd.backward(edges, gradients)
    flops_b, sums_in_b = watch.take()
    after_backward = (Storages(store.tensors()) - model).nbytes()
    with watch:
        store.run(WholeGradients(lambda parameter, gradient: None))
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    flops = flops_f, flops_b, watch.flops
    return MeasuredCosts(parameters, flops, after_forward, after_backward, sums_in_f, sums_in_b), passed_on


# The attribute of a tensor that torch.any has returned.
_IS_ANY = "ds_vshape_is_any"
_GROUPED_MM = torch.ops.aten._grouped_mm.default


def _grouped(left: Tensor, right: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """The shape of a product of groups of rows with a matrix each, as experts multiply, or of the gradients of one; on
    the meta device torch's own takes bf16 alone."""
    if left.ndim == right.ndim == 2:
        assert offs is not None
        return left.new_empty(len(offs), len(left), right.shape[-1])
    if left.ndim == right.ndim:
        return left.new_empty(*left.shape[:2], right.shape[-1])
    return left.new_empty(left.shape[-2], right.shape[-1])


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the memory of all that is computed inside, and adds up FLOPs.

    Where a forward asks for the value of a tensor, which has none here, it is False if the tensor comes from torch.any,
    and True otherwise: forwards ask whether all tokens count (no padding), and whether any of them is illegal.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages = Storages()
        self.flops = 0
        self._sums = Sums()

    def take(self) -> tuple[int, Sums]:
        """FLOPs and sums over ranks since the last call."""
        taken = self.flops, self._sums
        self.flops, self._sums = 0, Sums()
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            return not getattr(args[0], _IS_ANY, False)
        result = _grouped(*args, **(kwargs or {})) if func is _GROUPED_MM else func(*args, **(kwargs or {}))
        if func._overloadpacket is torch.ops.aten.any:
            setattr(result, _IS_ANY, True)
        if func.namespace == "c10d":
            nbytes = sum(tensor.nbytes for tensor in tree_leaves(args[0]))
            self._sums = Sums(self._sums.number + 1, self._sums.nbytes + nbytes)
        # Without views of the arguments, whose memory may be older.
        given = {_memory(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        self.storages.add(tensor for tensor in tree_leaves(result)
                          if isinstance(tensor, Tensor) and _memory(tensor) not in given)
        count = flop_registry.get(func._overloadpacket)
        if func is _GROUPED_MM:  # a row of one is multiplied with one matrix of the other
            self.flops += 2 * args[0].shape[-2] * args[0].shape[-1] * args[1].shape[-1]
        elif count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # type: ignore[no-any-return]


class _FusedAttention(TorchFunctionMode):
    """In place of torch's attention, which on the meta device would be the one that keeps scores."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            query, key, value, *others = args
            mask = others[0] if others else (kwargs or {}).get("attn_mask")
            return _Attention.apply(self._watch, query, key, value, mask)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """The shapes of a fused attention's outputs and gradients, and its FLOPs."""

    @staticmethod
    def forward(ctx: Any, watch: _Watch, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        samples, heads, length, _ = query.shape
        # In the order of the tokens, as kernels return it: what comes next then needs no copy.
        output = query.new_empty(samples, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.watch = watch
        ctx.save_for_backward(query, key, value, mask, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        watch.flops += sdpa_flop_count(  # type: ignore[no-untyped-call]
            query.shape, _heads(key, query), _heads(value, query))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        ctx.watch.flops += sdpa_backward_flop_count(  # type: ignore[no-untyped-call]
            gradient.shape, query.shape, _heads(key, query), _heads(value, query))
        return None, torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _heads(of: Tensor, query: Tensor) -> torch.Size:
    """The shape of keys or values, with a head for each of the queries'."""
    return torch.Size((of.shape[0], query.shape[1], *of.shape[2:]))
