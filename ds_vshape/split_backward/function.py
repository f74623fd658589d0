"""SplitFunction: an autograd Function whose backward is written as two halves, input gradient and weight gradient.

Outside a split its backward runs both halves at once, as any Function does. In the B of a split, autograd gets the
first half and the store gets what the second needs. The node itself can't be kept for that: it holds the graph. So W
works on a HalfContext, which has the node's saved tensors and attributes and nothing that leads to other nodes.

The graph holds the Parameters themselves, so that any other run of autograd over it finds what it asks for. The second
half is deferred only in B, and only where this run of autograd would do no more than add to the parameter's `.grad`
(`_only_adds`). Autograd then gets None for the weight; DeepSpeed's hooks on the parameter run as they do in
its own engine, and find nothing new.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter
from torch.overrides import (TorchFunctionMode, _get_current_function_mode, _pop_mode, _push_mode,
                             handle_torch_function, has_torch_function)

from ds_vshape.split_backward.autocast import enabled_autocast
from ds_vshape.split_backward.ownership import is_shared, own_copy, saved_is_shared
from ds_vshape.split_backward.store import Entry, OperatorBuffers, WeightGradientStore
from ds_vshape.split_backward.targets import Target, parameter_of
from ds_vshape.split_backward.weights import has_hooks, has_post_hooks, is_deferrable, node_has_hooks, target_of

# What stands in for a torch function: takes the store and then the same arguments; NotImplemented leaves the call to
# autograd.
Operator = Callable[..., Any]
Operators = Mapping[Callable[..., Any], Operator]

Gradients = Tensor | tuple[Tensor | None, ...] | None


class Deferral(NamedTuple):
    """What a node of a split knows about its second half."""

    store: WeightGradientStore
    targets: tuple[Target | None, ...]
    # The positions of the arguments that are tensors: the node has one edge for each.
    tensors: tuple[int, ...]
    # Of each weight: the parameter, the argument (itself, its transpose or what was made of it) and the node's edge.
    edges: tuple[tuple[Parameter, Tensor, int], ...]


class HalfContext:
    """The `ctx` of `backward_input` and then of `backward_weight`.

    `saved_tensors`, `needs_input_grad`, and each attribute that `forward` or `backward_input` set on its ctx. Between
    the two, `keep` drops what the second doesn't need.
    """

    saved_tensors: tuple[Tensor | None, ...]
    needs_input_grad: tuple[bool, ...]

    def __init__(self, node: Any, needs_input_grad: tuple[bool, ...]) -> None:
        self.__dict__.update(node.__dict__)
        self.__dict__.pop("deferral", None)
        self.needs_input_grad = needs_input_grad
        # Unpacked here and once: under a checkpoint this recomputes the forward, which an active mode must see, and a
        # second time is refused.
        self.saved_tensors = node.saved_tensors

    def keep(self, positions: tuple[int, ...] | None, outgoing: Sequence[Tensor]) -> None:
        """Keep the saved tensors at `positions` (None: all of them), without a graph, and copies of what W reads and
        others may write to: constants that are held elsewhere too, and attributes that left with the gradients
        `outgoing`.

        An activation isn't copied: writing to it between B and W is an error (`Entry.check_unmodified`).
        """
        saved = self.saved_tensors
        kept: list[Tensor | None] = [None] * len(saved)
        for position in range(len(saved)) if positions is None else positions:
            tensor = saved[position]
            if tensor is not None and tensor.requires_grad:
                kept[position] = tensor.detach()
            elif tensor is not None:
                kept[position] = own_copy(tensor) if saved_is_shared(saved, position) else tensor
        self.saved_tensors = tuple(kept)
        for name, value in self.__dict__.items():
            if isinstance(value, Tensor) and _leaves(value, outgoing):
                self.__dict__[name] = own_copy(value)


class SplitFunction(torch.autograd.Function):
    """Base class of autograd Functions with weights, for kernels of your own whose backward is split into B and W.

    Write `forward` as for torch.autograd.Function, and instead of `backward` its two halves. `weight_arguments` are the
    positions of the weights among forward's arguments. Call `apply` as usual; nothing else changes in the module:

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

    From B to W the following are kept: the output gradients, the tensors passed to save_for_backward (all of them, or
    those whose positions `saved_for_weight` lists; the others are None in W) and every tensor set as an attribute of
    ctx. `backward_input` runs first, so it can pass an intermediate result to `backward_weight` as an attribute of ctx.

    Weight gradients are deferred if each weight argument that requires a gradient is a Parameter that `is_deferrable`
    accepts; otherwise both halves run at once, in B.

    Double backward (`create_graph=True`) is refused unless `differentiable_twice` says that both halves consist of
    operations which autograd can differentiate, with respect to the saved tensors and the output gradients.
    """

    weight_arguments: ClassVar[tuple[int, ...]] = ()
    saved_for_weight: ClassVar[tuple[int, ...] | None] = None
    differentiable_twice: ClassVar[bool] = False

    @staticmethod
    def backward_input(ctx: Any, *output_gradients: Any) -> Any:
        """The gradients of forward's arguments, one for each, None for the weight arguments."""
        raise NotImplementedError("a SplitFunction needs a backward_input")

    @staticmethod
    def backward_weight(ctx: Any, *output_gradients: Any) -> Any:
        """The gradients of the weight arguments, one for each, None where `ctx.needs_input_grad` is False."""
        raise NotImplementedError("a SplitFunction needs a backward_weight")

    @classmethod
    def accumulate_weight(cls, ctx: Any, buffers: OperatorBuffers, *output_gradients: Any) -> Any:
        """As `backward_weight`, with the sums over the previous micro-batches: `buffers` has one for each weight
        argument, with the weight's shape and the same or a wider dtype, or None.

        Override it to add a gradient to its buffer in place, without a temporary tensor, and return None for it.
        """
        return cls.backward_weight(ctx, *output_gradients)

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """The function's value, recorded by autograd; an active SplitBackward sees the call and splits it."""
        if has_torch_function(arguments):
            mode = _get_current_function_mode()  # type: ignore[no-untyped-call]
            if isinstance(mode, RecordingMode):
                return mode.apply(cls, arguments)
            return handle_torch_function(apply_split_function, arguments, cls, *arguments)
        return super().apply(*arguments)  # type: ignore[no-untyped-call]

    @classmethod
    def can_defer(cls, weight: Tensor) -> bool:
        """Whether the gradient of the weight argument `weight`, which requires one, may be deferred."""
        return is_deferrable(weight)

    @classmethod
    def apply_split(cls, store: WeightGradientStore, *arguments: Any) -> Any:
        """As `apply`, with the weight gradients left to `store`; NotImplemented if they can't be deferred."""
        targets: list[Target | None] = []
        for position in cls.weight_arguments:
            weight = arguments[position]
            if weight is None or not weight.requires_grad:
                targets.append(None)
            elif cls.can_defer(weight):
                targets.append(target_of(weight))
            else:
                return NotImplemented
        if not any(target is not None for target in targets):
            return NotImplemented
        # Past Function.apply, whose care for torch.func costs some microseconds: no transform is active here.
        value = super(torch.autograd.Function, cls).apply(*arguments)  # type: ignore[misc]
        # The node of a Python function is its ctx.
        for output in (value,) if isinstance(value, Tensor) else value:
            node: Any = output.grad_fn if isinstance(output, Tensor) else None
            if node is not None and getattr(node, "_forward_cls", None) is cls:
                tensors = tuple(place for place, argument in enumerate(arguments) if isinstance(argument, Tensor))
                edges = tuple(
                    (parameter_of(target), arguments[place], tensors.index(place))
                    for place, target in zip(cls.weight_arguments, targets)
                    if target is not None
                )
                node.deferral = Deferral(store, tuple(targets), tensors, edges)
                break
        return value

    @staticmethod
    def backward(ctx: Any, *output_gradients: Any) -> Any:
        """Called by autograd: both halves, or the first half with the second put into the store."""
        deferral: Deferral | None = getattr(ctx, "deferral", None)
        if not torch.is_grad_enabled():
            if deferral is not None and _is_plain_backward(ctx, deferral, output_gradients):
                return _defer(ctx, deferral, output_gradients)
        elif not ctx._forward_cls.differentiable_twice:
            return _at_once_undifferentiable(ctx, *output_gradients)
        return _at_once(ctx, *output_gradients)


class RecordingMode(TorchFunctionMode):
    """A torch function mode by which a SplitFunction is split (mode.py, which imports this module)."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise NotImplementedError

    def apply(self, function: type[SplitFunction], arguments: tuple[Any, ...]) -> Any:
        """What handle_torch_function does where this is the innermost mode, in half of the time."""
        _pop_mode()  # type: ignore[no-untyped-call]
        try:
            return self.__torch_function__(apply_split_function, (), (function, *arguments))
        finally:
            _push_mode(self)  # type: ignore[no-untyped-call]


def apply_split_function(function: type[SplitFunction], *arguments: Any) -> Any:
    """`function.apply(*arguments)` in the form in which a torch function mode sees it."""
    return function.apply(*arguments)


def split_function(store: WeightGradientStore, function: type[SplitFunction], *arguments: Any) -> Any:
    """The split counterpart of `apply_split_function`."""
    return function.apply_split(store, *arguments)


def _is_plain_backward(node: Any, deferral: Deferral, output_gradients: tuple[Any, ...]) -> bool:
    """Whether all that comes of the weight gradients in this run of autograd is that they add up in `.grad`, later."""
    if not deferral.store.deferring or has_post_hooks(node):
        return False
    ends = node.next_functions
    with torch._C.DisableTorchFunction():
        for gradient in output_gradients:
            if gradient is not None and not (type(gradient) is Tensor and gradient.layout is torch.strided):
                return False
        for parameter, argument, edge in deferral.edges:
            if argument is not parameter and (argument._backward_hooks or argument.retains_grad):
                return False
            if not _only_adds(parameter, ends[edge][0]):
                return False
    return True


def _only_adds(parameter: Parameter, node: Any) -> bool:
    """Whether autograd would only add to `parameter.grad` what `node`, the edge's end, gets.

    It wouldn't in a run for other inputs, nor in one that returns the gradient (torch.autograd.grad); and a hook would
    see the gradient.
    """
    if not parameter.requires_grad or has_hooks(parameter):
        return False
    # Between a transpose, a part or a cast and its parameter there are nodes of theirs.
    while getattr(node, "variable", None) is not parameter:
        if node_has_hooks(node):
            return False
        node = node.next_functions[0][0]
    try:
        return torch._C._will_engine_execute_node(node) and not node_has_hooks(node)
    except RuntimeError:  # autograd.grad by a leaf, or no run of autograd at all
        return False


def _is_wanted(node: Any) -> bool:
    """Whether this run of autograd wants the gradient that goes to `node`."""
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return True


def _defer(node: Any, deferral: Deferral, output_gradients: tuple[Tensor | None, ...]) -> Any:
    function: type[SplitFunction] = node._forward_cls
    context = HalfContext(node, node.needs_input_grad)
    # Without this, an active mode would look at each torch call of the two halves.
    with torch._C.DisableTorchFunction():
        shared = [is_shared(output_gradients, position) for position in range(len(output_gradients))]
        input_gradients = function.backward_input(context, *output_gradients)
        given = input_gradients if isinstance(input_gradients, tuple) else (input_gradients,)
        outgoing = [gradient for gradient in given if gradient is not None]
        kept = [
            own_copy(gradient) if gradient is not None and (held or _leaves(gradient, outgoing)) else gradient
            for gradient, held in zip(output_gradients, shared)
        ]
        context.keep(function.saved_for_weight, outgoing)
        deferral.store.add(Entry(function, context, tuple(kept), deferral.targets, enabled_autocast()))
    return input_gradients


def _leaves(tensor: Tensor, outgoing: Sequence[Tensor]) -> bool:
    """Whether the memory of `tensor` is also that of a gradient which autograd hands on."""
    for gradient in outgoing:
        if torch._C._is_alias_of(tensor, gradient):  # type: ignore[attr-defined]
            return True
    return False


def _at_once(node: Any, *output_gradients: Any) -> Any:
    function: type[SplitFunction] = node._forward_cls
    deferral: Deferral | None = getattr(node, "deferral", None)
    needs = list(node.needs_input_grad)
    if deferral is not None:
        for position, (end, _) in zip(deferral.tensors, node.next_functions):
            needs[position] = needs[position] and _is_wanted(end)
    context = HalfContext(node, tuple(needs))
    with torch._C.DisableTorchFunction():
        input_gradients = function.backward_input(context, *output_gradients)
        merged = list(input_gradients) if isinstance(input_gradients, tuple) else [input_gradients]
        if any(needs[position] for position in function.weight_arguments):
            weight_gradients = function.backward_weight(context, *output_gradients)
            weights = weight_gradients if isinstance(weight_gradients, tuple) else (weight_gradients,)
            for position, gradient in zip(function.weight_arguments, weights, strict=True):
                merged[position] = gradient
        return tuple(merged)


_at_once_undifferentiable = once_differentiable(_at_once)
