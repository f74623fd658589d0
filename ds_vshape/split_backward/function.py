"""SplitFunction: an autograd Function whose backward is written as two halves, input gradient and weight gradient.

Outside a SplitBackward mode its backward runs both halves at once, as any Function does. Inside, autograd gets the
first half and the store gets what the second needs. The node itself can't be kept for that: it holds the graph. So W
works on a HalfContext, which has the node's saved tensors and attributes and nothing that leads to other nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from ds_vshape.split_backward.autocast import enabled_autocast
from ds_vshape.split_backward.store import Buffers, Entry, WeightGradientStore
from ds_vshape.split_backward.weights import CastWeight, Target, is_deferrable

# What stands in for a torch function: takes the store and then the same arguments; NotImplemented leaves the call to
# autograd.
Operator = Callable[..., Any]
Operators = Mapping[Callable[..., Any], Operator]

Gradients = Tensor | tuple[Tensor | None, ...] | None


class HalfContext:
    """The `ctx` of `backward_input` and then of `backward_weight`.

    `saved_tensors`, `needs_input_grad`, and each attribute that `forward` or `backward_input` set on its ctx. Between
    the two, `keep` drops what the second doesn't need.
    """

    saved_tensors: tuple[Tensor | None, ...]
    needs_input_grad: tuple[bool, ...]

    def __init__(self, node: Any) -> None:
        self.__dict__.update(node.__dict__)
        self.needs_input_grad = node.needs_input_grad
        # Unpacked here and once: under a checkpoint this recomputes the forward, and a second time is refused.
        self.saved_tensors = node.saved_tensors

    def keep(self, positions: tuple[int, ...] | None) -> None:
        """Keep the saved tensors at `positions` (None: all of them), detached: memory but no graph."""
        self.__dict__.pop("deferral", None)
        self.saved_tensors = tuple(
            tensor.detach() if tensor is not None and (positions is None or position in positions) else None
            for position, tensor in enumerate(self.saved_tensors)
        )
        self._versions = self._current_versions()

    def check_unmodified(self) -> None:
        """RuntimeError if a kept tensor was written to since `keep` (autograd itself guards only until B)."""
        if self._versions != self._current_versions():
            raise RuntimeError(
                "one of the tensors needed for a weight gradient has been modified by an inplace operation between "
                "its input-gradient pass (B) and its weight-gradient pass (W)"
            )

    def _current_versions(self) -> list[int]:
        return [tensor._version for tensor in self.saved_tensors if tensor is not None]


class SplitFunction(torch.autograd.Function):
    """Base class of functions with weights, for kernels of your own that the B/W split is to cover.

    Write `forward` as for torch.autograd.Function, and in place of `backward` its two halves. `weight_arguments` says
    which positions of forward's arguments are weights. Call `apply` as usual; nothing else changes in the module:

        class Scale(SplitFunction):
            weight_arguments = (1,)
            saved_for_weight = (0,)

            @staticmethod
            def forward(ctx, x, weight):                # x (..., h), weight (h,)
                ctx.save_for_backward(x, weight)
                return x * weight

            @staticmethod
            def backward_input(ctx, grad_y):            # B: one gradient for each argument, None for the weights
                _, weight = ctx.saved_tensors
                return (grad_y * weight if ctx.needs_input_grad[0] else None), None

            @staticmethod
            def backward_weight(ctx, grad_y):           # W: one gradient for each weight argument
                x, _ = ctx.saved_tensors
                return (grad_y * x).flatten(0, -2).sum(0)

        y = Scale.apply(x, self.weight)

    What lives from B to W: the output gradients, the tensors passed to save_for_backward (all of them, or those whose
    positions `saved_for_weight` lists; the others are None in W) and any tensor set as an attribute of ctx.
    `backward_input` runs first, so it may leave an intermediate for `backward_weight` as an attribute of ctx.

    In a split, `forward` gets an alias of each weight, not the Parameter itself. Weight gradients are deferred if each
    weight argument that requires a gradient is a Parameter that `is_deferrable` accepts; otherwise both halves run at
    once, in B. Double backward is refused.
    """

    weight_arguments: ClassVar[tuple[int, ...]] = ()
    saved_for_weight: ClassVar[tuple[int, ...] | None] = None

    @staticmethod
    def backward_input(ctx: Any, *output_gradients: Any) -> Any:
        """The gradients of forward's arguments, one for each, None for the weight arguments."""
        raise NotImplementedError("a SplitFunction needs a backward_input")

    @staticmethod
    def backward_weight(ctx: Any, *output_gradients: Any) -> Any:
        """The gradients of the weight arguments, one for each, None where `ctx.needs_input_grad` is False."""
        raise NotImplementedError("a SplitFunction needs a backward_weight")

    @classmethod
    def accumulate_weight(cls, ctx: Any, buffers: Buffers, *output_gradients: Any) -> Any:
        """`backward_weight` where sums over the micro-batches so far exist: `buffers` has one for each weight
        argument, shaped as the weight and of the same or a wider dtype, or None.

        Override it to add a gradient to its buffer in place, without a tensor of its own, and return None for it.
        """
        return cls.backward_weight(ctx, *output_gradients)

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """The function's value, recorded by autograd; an active SplitBackward sees the call and splits it."""
        if has_torch_function(arguments):
            return handle_torch_function(apply_split_function, arguments, cls, *arguments)
        return super().apply(*arguments)  # type: ignore[no-untyped-call]

    @classmethod
    def apply_split(cls, store: WeightGradientStore, *arguments: Any) -> Any:
        """As `apply`, with the weight gradients left to `store`; NotImplemented if they can't be deferred."""
        targets: list[Target | None] = []
        inputs = list(arguments)
        for position in cls.weight_arguments:
            weight = arguments[position]
            if weight is None or not weight.requires_grad:
                targets.append(None)
            elif is_deferrable(weight):
                targets.append(weight.cast if isinstance(weight, CastWeight) else weight)
                # An alias, so that B doesn't reach the parameter's own node of the graph: autograd would call
                # DeepSpeed's hooks there, with no gradient to handle.
                inputs[position] = weight.detach().requires_grad_()
            else:
                return NotImplemented
        if not any(target is not None for target in targets):
            return NotImplemented
        # Past Function.apply, whose care for torch.func costs some microseconds: no transform is active here.
        value = super(torch.autograd.Function, cls).apply(*inputs)  # type: ignore[misc]
        # The node of a Python function is its ctx.
        for output in (value,) if isinstance(value, Tensor) else value:
            node: Any = output.grad_fn if isinstance(output, Tensor) else None
            if node is not None and getattr(node, "_forward_cls", None) is cls:
                node.deferral = (store, tuple(targets))
                break
        return value

    @staticmethod
    def backward(ctx: Any, *output_gradients: Any) -> Any:
        """Called by autograd: both halves, or the first half with the second put into the store."""
        if torch.is_grad_enabled():
            return _backward_once(ctx, *output_gradients)
        return _backward(ctx, *output_gradients)


def apply_split_function(function: type[SplitFunction], *arguments: Any) -> Any:
    """`function.apply(*arguments)` in the form in which a torch function mode sees it."""
    return function.apply(*arguments)


def split_function(store: WeightGradientStore, function: type[SplitFunction], *arguments: Any) -> Any:
    """The split counterpart of `apply_split_function`."""
    return function.apply_split(store, *arguments)


def _backward(node: Any, *output_gradients: Any) -> Any:
    function: type[SplitFunction] = node._forward_cls
    context = HalfContext(node)
    # Without this, an active mode would look at each torch call of the two halves.
    with torch._C.DisableTorchFunction():
        input_gradients = function.backward_input(context, *output_gradients)
        deferral = getattr(node, "deferral", None)
        if deferral is None:
            return _merge(function, input_gradients, function.backward_weight(context, *output_gradients))
        store, targets = deferral
        context.keep(function.saved_for_weight)
        # Under create_graph the output gradients have a history too.
        kept = tuple(
            gradient.detach() if gradient is not None and gradient.requires_grad else gradient
            for gradient in output_gradients
        )
        store.add(Entry(function, context, kept, targets, enabled_autocast()))
        return input_gradients


def _merge(function: type[SplitFunction], input_gradients: Gradients, weight_gradients: Gradients) -> Any:
    merged = list(input_gradients) if isinstance(input_gradients, tuple) else [input_gradients]
    weights = weight_gradients if isinstance(weight_gradients, tuple) else (weight_gradients,)
    for position, gradient in zip(function.weight_arguments, weights, strict=True):
        merged[position] = gradient
    return tuple(merged)


_backward_once = once_differentiable(_backward)
