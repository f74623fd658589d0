"""What a deferred gradient is the gradient of: a parameter, or something made of one.

    Parameter    its gradient is delivered
    Element      one matrix of a batch of matrices, `weight[index]`: a view
    Selection    some matrices of such a batch, `weight[indices]`: a copy
    Cast         autocast's cast of a parameter, of its transpose, or of one of the above

What is made of a parameter is a tensor with a graph of its own. The gradients of its uses add up before their sum
becomes a part of the parameter's, as they do at that tensor's node in autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

# The attribute of a tensor that says what it was made of.
_MADE = "ds_vshape_made"


class Cast:
    """One cast of `of`, or of its transpose, as autocast multiplies it: the gradients of its uses add up in `dtype`
    before their sum is cast back."""

    __slots__ = ("dtype", "of", "transposed")

    def __init__(self, of: Target, dtype: torch.dtype, transposed: bool) -> None:
        self.of, self.dtype, self.transposed = of, dtype, transposed

    @classmethod
    def mark(cls, values: Tensor, of: Target, transposed: bool = False) -> Tensor:
        """`values`, known from now on as a cast of `of` (recorded by autograd) or of its transpose."""
        setattr(values, _MADE, cls(of, values.dtype, transposed))
        return values

    def add_to(self, total: Tensor | None, gradient: Tensor) -> Tensor:
        """The gradient of `of` so far, and that of this cast."""
        cast = gradient.to(self.of.dtype)
        return cast if total is None else total.add_(cast)

    def within(self, sums: Tensor) -> Tensor:
        """Where in `sums`, those of `of`, the products with this are added."""
        return sums


class Element:
    """`of[index]`."""

    __slots__ = ("index", "of")

    def __init__(self, of: Parameter, index: int) -> None:
        self.of, self.index = of, index

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    @property
    def shape(self) -> torch.Size:
        return self.of.shape[1:]

    def add_to(self, total: Tensor | None, gradient: Tensor) -> Tensor:
        """The gradient of `of` so far, and that of this element."""
        return self.add_in_place(torch.zeros_like(self.of, requires_grad=False) if total is None else total, gradient)

    def add_in_place(self, sums: Tensor, gradient: Tensor) -> Tensor:
        self.within(sums).add_(gradient)
        return sums

    def within(self, sums: Tensor) -> Tensor:
        return sums[self.index]


class Selection:
    """`of[indices]`, indices [s]."""

    __slots__ = ("indices", "of", "shape")

    def __init__(self, of: Parameter, indices: Tensor, shape: torch.Size) -> None:
        # W reads them; the script may use their memory again.
        self.of, self.indices, self.shape = of, indices.clone(), shape

    @classmethod
    def mark(cls, values: Tensor, of: Parameter, indices: Tensor) -> Tensor:
        """`values`, known from now on as `of[indices]` (recorded by autograd)."""
        setattr(values, _MADE, cls(of, indices, values.shape))
        return values

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    def add_to(self, total: Tensor | None, gradient: Tensor) -> Tensor:
        """The gradient of `of` so far, and that of these elements."""
        # As autograd: those of one index are added up first.
        whole = self.add_in_place(torch.zeros_like(self.of, requires_grad=False), gradient)
        return whole if total is None else total.add_(whole)

    def add_in_place(self, sums: Tensor, gradient: Tensor) -> Tensor:
        return sums.index_put_((self.indices,), gradient.to(sums.dtype), accumulate=True)

    def within(self, sums: Tensor) -> None:
        return None


Made = Cast | Element | Selection
Target = Parameter | Made


def parameter_of(target: Target) -> Parameter:
    """The parameter that the gradient is for in the end."""
    while not isinstance(target, Parameter):
        target = target.of
    return target


def shape_of(target: Target) -> torch.Size:
    """The shape of the gradient; of the transpose of a matrix, that of the matrix."""
    while isinstance(target, Cast):
        target = target.of
    return target.shape


def becomes_whole(target: Target) -> bool:
    """Whether the sum of the target's gradients is handed on as the parameter's, not added into a larger tensor."""
    while isinstance(target, Cast):
        target = target.of
    return isinstance(target, Parameter)


def made_from(tensor: Tensor) -> Made | None:
    """What `tensor`, no Parameter, was made of; None where it is of another kind, or where its own gradient is asked
    for. The same for each call with one tensor."""
    made: Made | None = getattr(tensor, _MADE, None)
    if made is None and type(tensor._base) is Parameter:
        made = _element(tensor, tensor._base)
        if made is not None:
            setattr(tensor, _MADE, made)
    if made is None or tensor.grad_fn is None or tensor._backward_hooks or tensor.retains_grad:
        return None
    # A copy may have been written to since.
    return None if isinstance(made, Selection) and not _comes_from(tensor, "IndexBackward0", made.of) else made


def _comes_from(tensor: Tensor, node_name: str, base: Parameter) -> bool:
    """Whether `tensor` was made of `base` by one node of that name."""
    node: Any = tensor.grad_fn
    return node.name() == node_name and getattr(node.next_functions[0][0], "variable", None) is base


def _element(view: Tensor, base: Parameter) -> Element | None:
    """Which element of `base` the view is, by the node that made it; None for a view of another kind, for a view of a
    view and for one that someone wrote to."""
    node: Any = view.grad_fn
    if node is None:
        return None
    if _comes_from(view, "SelectBackward0", base):
        index = _signed(node._saved_index)
    elif _comes_from(view, "UnbindBackward0", base):
        index = view.output_nr
    else:
        return None
    return Element(base, index % base.size(0)) if _signed(node._saved_dim) in (0, -base.dim()) else None


def _signed(number: int) -> int:
    """`number`, which torch shows as one of 64 bits without a sign."""
    return number - (1 << 64) if number >= 1 << 63 else number
