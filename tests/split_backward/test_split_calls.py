"""The operators of all tables in the ways in which torch lets them be called: value, error, gradients are torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from split_cases import add
from torch import Tensor, nn
from torch.autograd import forward_ad

from ds_vshape.split_backward import ALL_OPERATORS, SplitBackward, SplitForward, WeightGradientStore, WholeGradients

SHAPES = {"w": (4, 5), "b": (4,), "m": (5, 4), "batch": (2, 5, 4), "c": (3, 5, 3), "cb": (3,), "l": (5,), "v": (5,)}


class Operands:
    """Weights by the names of SHAPES, and inputs."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, dtype=dtype)))
        for dims in (1, 2, 3):
            setattr(self, f"x{dims}", torch.randn((2, 3, 5)[3 - dims:], dtype=dtype).requires_grad_())

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def gradients(self) -> list[Tensor | None]:
        return [tensor.grad for tensor in vars(self).values()]


Call = Callable[[Any], Any]

CALLS: dict[str, Call] = {
    "linear, keywords": lambda o: F.linear(bias=o.b, input=o.x3, weight=o.w),
    "linear, bias positional": lambda o: F.linear(o.x2, o.w, o.b),
    "linear, unknown keyword": lambda o: F.linear(o.x2, o.w, out=torch.empty(3, 4)),
    "linear, four arguments": lambda o: F.linear(o.x2, o.w, o.b, 1),
    "linear, no weight": lambda o: F.linear(o.x2),
    "linear, 1-D": lambda o: F.linear(o.x1, o.w, o.b),
    "linear, 1-D strided": lambda o: F.linear(o.x2.flatten()[::3], o.w, o.b),
    "linear, 1-D strided, no bias": lambda o: F.linear(o.x2.flatten()[::3], o.w),
    "linear, 0-D": lambda o: F.linear(torch.tensor(1.0), o.w),
    "linear, weight of 1 dimension": lambda o: F.linear(o.x2, o.v),
    "linear, bias of 1 number": lambda o: F.linear(o.x2, o.w, o.b[:1]),
    "linear, integers": lambda o: F.linear(torch.ones(3, 5, dtype=torch.int64), o.w),
    "linear, complex": lambda o: F.linear(torch.ones(3, 5, dtype=torch.complex64), o.w),
    "linear, another dtype": lambda o: F.linear(o.x2.half(), o.w),
    "linear, nothing in it": lambda o: F.linear(o.x3[:, :0], o.w, o.b),
    "linear, not a tensor": lambda o: F.linear([1.0], o.w),
    "linear, meta":
        lambda o: F.linear(torch.empty(3, 5, device="meta"), nn.Parameter(torch.empty(4, 5, device="meta"))),
    "linear, inference tensor": lambda o: F.linear(in_inference(o), o.w),
    "linear, forward mode": lambda o: tangent(lambda x: F.linear(x, o.w, o.b), o.x2),
    "linear, 3-D, detached in place": lambda o: F.linear(o.x3, o.w).detach_(),
    "linear, 3-D with bias, detached in place": lambda o: F.linear(o.x3, o.w, o.b).detach_(),
    "linear, added to": lambda o: F.linear(o.x3, o.w, o.b).add_(1).mul_(2),
    "linear, a part written": lambda o: written(F.linear(o.x3, o.w)),
    "linear, requires_grad_": lambda o: F.linear(o.x3, o.w).requires_grad_(False),
    "linear, without gradients after": lambda o: without_gradients(F.linear(o.x3, o.w)),
    "linear, negated bits": lambda o: F.linear(torch.complex(o.x2, o.x2).conj().imag, o.w),
    "matmul, keywords": lambda o: torch.matmul(input=o.x2, other=o.m),
    "matmul, numpy's names": lambda o: torch.matmul(x1=o.x2, x2=o.m),
    "matmul, out": lambda o: torch.matmul(o.x2.detach(), o.m.detach(), out=torch.empty(3, 4, dtype=o.m.dtype)),
    "matmul, out with a weight": lambda o: torch.matmul(o.x2, o.m, out=torch.empty(3, 4, dtype=o.m.dtype)),
    "matmul, vectors": lambda o: torch.matmul(o.x1, o.m) + o.m.t() @ o.v,
    "matmul, reflected": lambda o: o.w.__rmatmul__(torch.ones(2, 4, dtype=o.w.dtype)),
    "matmul, broadcast": lambda o: o.x3[:, None] @ o.batch,
    "matmul, one argument": lambda o: torch.matmul(o.x2),
    "matmul, detached in place": lambda o: (o.x3 @ o.m).detach_(),
    "matmul, by a weight twice transposed": lambda o: o.x3 @ o.m.t().t(),
    "Tensor.matmul, keyword": lambda o: o.x2.matmul(other=o.m),
    "mm, out": lambda o: torch.mm(o.x2.detach(), o.m.detach(), out=torch.empty(3, 4, dtype=o.m.dtype)),
    "mm, of three dimensions": lambda o: torch.mm(o.x3, o.m),
    "mm, out_dtype": lambda o: torch.mm(o.x2, o.m, o.m.dtype),
    "mm, not a tensor": lambda o: torch.mm(o.x2, 1),
    "bmm, keywords": lambda o: torch.bmm(input=o.x3, mat2=o.batch),
    "bmm, out": lambda o: torch.bmm(o.x3.detach(), o.batch.detach(), out=torch.empty(2, 3, 4, dtype=o.m.dtype)),
    "bmm, of two dimensions": lambda o: torch.bmm(o.x2, o.m),
    "addmm, keywords": lambda o: torch.addmm(input=o.b, mat1=o.x2, mat2=o.m),
    "addmm, scaled by one": lambda o: torch.addmm(o.b, o.x2, o.m, beta=1, alpha=1),
    "addmm, old": lambda o: torch.addmm(1, o.b, 1, o.x2, o.m),
    "addmm, old, one scale": lambda o: torch.addmm(0.5, o.b, o.x2, o.m),
    "addmm, Tensor's, old": lambda o: o.b.addmm(1, 2, o.x2, o.m),
    "addmm, a column": lambda o: torch.addmm(o.x2[:, :1], o.x2, o.m),
    "addmm, a number": lambda o: torch.addmm(o.b[0], o.x2, o.m),
    "addmm, out":
        lambda o: torch.addmm(o.b.detach(), o.x2.detach(), o.m.detach(), out=torch.empty(3, 4, dtype=o.m.dtype)),
    "embedding, one index": lambda o: F.embedding(torch.tensor(2), o.w),
    "embedding, keywords": lambda o: F.embedding(weight=o.w, input=torch.tensor([1, 3])),
    "embedding, int32": lambda o: F.embedding(torch.tensor([1, 3], dtype=torch.int32), o.w),
    "embedding, floats": lambda o: F.embedding(torch.tensor([1.0]), o.w),
    "embedding, out of range": lambda o: F.embedding(torch.tensor([9]), o.w),
    "embedding, of a vector": lambda o: F.embedding(torch.tensor([1]), o.v),
    "embedding, padding out of range": lambda o: F.embedding(torch.tensor([1]), o.w, 7),
    "embedding, sparse": lambda o: F.embedding(torch.tensor([1]), o.w, sparse=True),
    "embedding, sparse, and linear":
        lambda o: F.linear(o.x2, o.w) + F.embedding(torch.tensor([1]), o.w, sparse=True)[0, 0],
    "conv1d, keywords": lambda o: F.conv1d(weight=o.c, input=o.x3.transpose(1, 2), bias=o.cb, padding=1),
    "conv1d, unbatched": lambda o: F.conv1d(o.x3[0].t(), o.c, o.cb),
    "conv1d, bad stride": lambda o: F.conv1d(o.x3.transpose(1, 2), o.c, stride=(1, 1)),
    "conv1d, stride of 0": lambda o: F.conv1d(o.x3.transpose(1, 2), o.c, stride=0),
    "conv1d, bad padding": lambda o: F.conv1d(o.x3.transpose(1, 2), o.c, padding="all"),
    "conv1d, negative padding": lambda o: F.conv1d(o.x3.transpose(1, 2), o.c, padding=-1),
    "conv1d, tensor as stride": lambda o: F.conv1d(o.x3.transpose(1, 2), o.c, stride=torch.tensor(1)),
    "conv1d, bad groups": lambda o: F.conv1d(o.x3.transpose(1, 2), o.c, groups=2),
    "conv1d, too small": lambda o: F.conv1d(o.x3.transpose(1, 2)[..., :2], o.c),
    "conv1d, even kernel, same":
        lambda o: F.conv1d(o.x3.transpose(1, 2), nn.Parameter(torch.ones_like(o.c)[..., :2]), padding="same"),
    "layer_norm, keywords": lambda o: F.layer_norm(o.x3, normalized_shape=[5], bias=o.v, weight=o.l, eps=1e-3),
    "layer_norm, bias alone": lambda o: F.layer_norm(o.x3, (5,), None, o.v),
    "layer_norm, a Size": lambda o: F.layer_norm(o.x3, o.x3.shape[2:], o.l),
    "layer_norm, a number": lambda o: F.layer_norm(o.x3, 5, o.l),
    "layer_norm, wrong shape": lambda o: F.layer_norm(o.x3, (4,), o.b),
    "rms_norm, keywords": lambda o: F.rms_norm(input=o.x3, weight=o.l, normalized_shape=(5,)),
    "rms_norm, a number": lambda o: F.rms_norm(o.x3, 5, o.l),
}


def in_inference(operands: Any) -> Tensor:
    with torch.inference_mode():
        return torch.ones_like(operands.x2)


def tangent(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = function(forward_ad.make_dual(x, torch.ones_like(x)))
        value, derivative = forward_ad.unpack_dual(dual)
        return value + derivative


def written(value: Tensor) -> Tensor:
    value[0] = 1
    value.view(-1)[3:5].mul_(2)
    return value


def without_gradients(value: Tensor) -> Tensor:
    with torch.no_grad():
        return value + 1


def run(call: Call, dtype: torch.dtype, split: bool) -> tuple[Any, list[Tensor | None]]:
    """What the call gives (or the type of its error) with properties of it, and the gradients of all operands."""
    operands, store = Operands(dtype), WeightGradientStore()
    try:
        if split:
            with SplitForward(store, ALL_OPERATORS):
                value = call(operands)
        else:
            value = call(operands)
    except Exception as error:
        return type(error), []
    found = (value.detach().clone(), value.dtype, value.stride(), value._is_view(), value.requires_grad, value.is_leaf)
    if value.requires_grad and value.device.type != "meta":
        with SplitBackward(store, ALL_OPERATORS):
            torch.autograd.backward(value, torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape))
        store.run(WholeGradients(add))
    return found, operands.gradients()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_is_torchs(call: Call, dtype: torch.dtype) -> None:
    expected, gradients = run(call, dtype, split=False)
    found, mine = run(call, dtype, split=True)
    if isinstance(expected, type):
        assert found is expected
        return
    assert not isinstance(found, type), found
    assert found[1:] == expected[1:]
    if found[0].device.type != "meta":
        assert torch.equal(found[0], expected[0])
    for one, two in zip(mine, gradients, strict=True):
        assert (one is None) == (two is None)
        assert one is None or torch.equal(one.to_dense(), two.to_dense())
