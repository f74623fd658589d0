"""The split backward against autograd's own: equal bit for bit, nothing kept but what W needs, each forward run once.

The oracle is the same computation without the mode: an unsplit backward on the same weights and data.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ds_vshape.split_backward import ALL_OPERATORS, MATRIX_OPERATORS, SplitBackward, WeightGradientStore, WholeGradients
from ds_vshape.split_backward.matrix import Linear

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def add(parameter: nn.Parameter, gradient: Tensor) -> None:
    assert not gradient.requires_grad
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient


@dataclass(frozen=True)
class Trained:
    """What one run leaves behind: outputs, input gradients and weight gradients, and how many entries waited for W."""

    outputs: list[Tensor]
    input_gradients: list[Tensor | None]
    weight_gradients: list[Tensor | None]
    entries: int

    def assert_equal(self, other: Trained) -> None:
        for mine, others in (
            (self.outputs, other.outputs),
            (self.input_gradients, other.input_gradients),
            (self.weight_gradients, other.weight_gradients),
        ):
            assert len(mine) == len(others)
            for one, two in zip(mine, others):
                assert (one is None) == (two is None)
                assert one is None or torch.equal(one, two)


def train(module: nn.Module, batches: list[Tensor], operators: Any = None) -> Trained:
    """Forward and backward of each batch, the W of each after the B of the next; unsplit without `operators`."""
    module.zero_grad()
    outputs, input_gradients, stores, entries = [], [], [], 0
    for place, batch in enumerate(batches):
        leaf = batch.detach().requires_grad_(batch.requires_grad)
        store = WeightGradientStore()
        if operators is None:
            output = module(leaf)
            output.backward(upstream(output, place))
        else:
            with SplitBackward(store, operators):
                output = module(leaf)
            assert len(store) == 0
            with SplitBackward(store, operators):
                output.backward(upstream(output, place))
        entries += len(store)
        outputs.append(output.detach())
        input_gradients.append(leaf.grad)
        stores.append(store)
        if place > 0:
            stores[place - 1].run(WholeGradients(add))
    stores[-1].run(WholeGradients(add))
    weights = [None if parameter.grad is None else parameter.grad.clone() for parameter in module.parameters()]
    return Trained(outputs, input_gradients, weights, entries)


def upstream(output: Tensor, place: int) -> Tensor:
    """An output gradient: random, and by turns contiguous, transposed in memory and expanded."""
    generator = torch.Generator().manual_seed(place)
    if place % 3 == 0 or output.dim() < 2:
        return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    if place % 3 == 1:
        shape = (*output.shape[:-2], output.size(-1), output.size(-2))
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(output.dtype).transpose(-1, -2)
    return torch.randn((), generator=generator, dtype=torch.float64).to(output.dtype).expand(output.shape)


class Operation(nn.Module):
    """`function(x, *weights)` with the weights as parameters of the given shapes."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.weights)


@dataclass(frozen=True)
class Case:
    """An operator, the shape of its input, its weights' shapes, and whether the split covers it."""

    name: str
    function: Callable[..., Tensor]
    x: tuple[int, ...]
    weights: list[tuple[int, ...]]
    covered: bool = True
    x_gradient: bool = True
    indices: int = 0
    operators: Any = field(default_factory=lambda: MATRIX_OPERATORS)
    entries: int = 1

    def module(self, dtype: torch.dtype) -> nn.Module:
        return Operation(self.function, *self.weights).to(dtype)

    def batches(self, dtype: torch.dtype, count: int = 3) -> list[Tensor]:
        if self.indices:
            return [torch.randint(0, self.indices, self.x) for _ in range(count)]
        return [torch.randn(self.x).to(dtype).requires_grad_(self.x_gradient) for _ in range(count)]


def by_columns(x: Tensor) -> Tensor:
    """`x` with its last two dimensions the other way round in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


CASES = [
    Case("linear", F.linear, (6, 8), [(4, 8), (4,)]),
    Case("linear, odd", F.linear, (7, 5), [(3, 5), (3,)]),
    Case("linear without bias", F.linear, (7, 5), [(3, 5)]),
    Case("linear with keywords", lambda x, w, b: F.linear(input=x, weight=w, bias=b), (7, 5), [(3, 5), (3,)]),
    Case("linear 3-D", F.linear, (2, 7, 5), [(3, 5), (3,)]),
    Case("linear 3-D without bias", F.linear, (2, 7, 5), [(3, 5)]),
    Case("linear 4-D", F.linear, (2, 3, 7, 6), [(4, 6), (4,)]),
    Case("linear one row", F.linear, (1, 5), [(3, 5), (3,)]),
    Case("linear one column", F.linear, (7, 1), [(3, 1), (3,)]),
    Case("linear one output", F.linear, (7, 5), [(1, 5), (1,)]),
    Case("linear wide", F.linear, (33, 130), [(257, 130), (257,)]),
    Case("linear no rows", F.linear, (0, 5), [(3, 5), (3,)]),
    Case("linear 1-D", F.linear, (5,), [(3, 5), (3,)]),
    Case("linear 1-D without bias", F.linear, (5,), [(3, 5)]),
    Case("linear on the first stage", F.linear, (2, 7, 5), [(3, 5), (3,)], x_gradient=False),
    Case("linear by columns", lambda x, *w: F.linear(by_columns(x), *w), (7, 5), [(3, 5), (3,)]),
    Case("linear 3-D sequence first", lambda x, w: F.linear(x.transpose(0, 1), w), (2, 7, 5), [(3, 5)]),
    Case("linear 3-D sequence first, bias", lambda x, *w: F.linear(x.transpose(0, 1), *w), (2, 7, 5), [(3, 5), (3,)],
         entries=2),
    Case("linear 4-D by columns, bias", lambda x, *w: F.linear(by_columns(x), *w), (2, 3, 7, 6), [(4, 6), (4,)],
         entries=2),
    Case("linear of a part", lambda x, *w: F.linear(x[..., 1:6], *w), (2, 7, 8), [(3, 5), (3,)], entries=2),
    Case("linear, frozen bias", lambda x, w: F.linear(x, w, torch.ones(3, dtype=x.dtype)), (7, 5), [(3, 5)]),
    Case("linear, frozen weight", lambda x, b: F.linear(x, torch.ones(3, 5, dtype=x.dtype), b), (7, 5), [(3,)], False),
    Case("linear, computed weight", lambda x, w: F.linear(x, w * 2), (7, 5), [(3, 5)], covered=False),
    Case("linear, computed bias", lambda x, w, b: F.linear(x, w, b * 2), (7, 5), [(3, 5), (3,)], covered=False),
    Case("linear, written to", lambda x, *w: F.relu_(F.linear(x, *w)), (2, 7, 5), [(3, 5), (3,)]),
    Case("@", lambda x, w: x @ w, (7, 5), [(5, 3)]),
    Case("@ 3-D", lambda x, w: x @ w, (2, 7, 5), [(5, 3)]),
    Case("@ 3-D sequence first", lambda x, w: x.transpose(0, 1) @ w, (2, 7, 5), [(5, 3)]),
    Case("@ by columns", lambda x, w: by_columns(x) @ w, (7, 5), [(5, 3)]),
    Case("@ weight.t()", lambda x, w: x @ w.t(), (7, 5), [(3, 5)]),
    Case("@ weight.T, 3-D", lambda x, w: x @ w.T, (2, 7, 5), [(3, 5)]),
    Case("@ weight.mT, square", lambda x, w: x @ w.mT, (2, 7, 5), [(5, 5)]),
    Case("@ part of a weight", lambda x, w: x @ w[:, :2], (7, 5), [(5, 3)], covered=False),
    Case("@ part of weight.t()", lambda x, w: x @ w.t()[:, :3], (7, 3), [(5, 3)], covered=False),
    Case("@ batch of weights", lambda x, w: x @ w, (2, 7, 5), [(2, 5, 3)]),
    Case("@ vector", lambda x, w: x @ w, (7, 5), [(5,)], covered=False),
    Case("weight @", lambda x, w: w @ x, (7, 5), [(3, 7)]),
    Case("weight @ by columns", lambda x, w: w @ by_columns(x), (7, 5), [(3, 7)]),
    Case("weight @ 3-D", lambda x, w: w @ x, (2, 7, 5), [(3, 7)], covered=False),
    Case("torch.matmul", lambda x, w: torch.matmul(x, other=w), (2, 7, 5), [(5, 3)]),
    Case("Tensor.matmul", lambda x, w: x.matmul(w), (2, 7, 5), [(5, 3)]),
    Case("torch.mm", lambda x, w: torch.mm(x, mat2=w), (7, 5), [(5, 3)]),
    Case("Tensor.mm", lambda x, w: w.mm(x), (7, 5), [(3, 7)]),
    Case("torch.bmm", torch.bmm, (2, 7, 5), [(2, 5, 3)]),
    Case("Tensor.bmm", lambda x, w: x.bmm(w), (2, 7, 5), [(2, 5, 3)]),
    Case("torch.addmm", lambda x, w, b: torch.addmm(b, x, w), (7, 5), [(5, 3), (3,)]),
    Case("Tensor.addmm", lambda x, w, b: b.addmm(x, w), (7, 5), [(5, 3), (3,)]),
    Case("addmm by columns", lambda x, w, b: torch.addmm(b, by_columns(x), w), (7, 5), [(5, 3), (3,)]),
    Case("addmm weight.t()", lambda x, w, b: torch.addmm(b, x, w.t()), (7, 5), [(3, 5), (3,)]),
    Case("addmm scaled", lambda x, w, b: torch.addmm(b, x, w, alpha=2), (7, 5), [(5, 3), (3,)], covered=False),
    Case("addmm of a matrix", lambda x, w, b: torch.addmm(b, x, w), (7, 5), [(5, 3), (7, 3)], covered=False),
    Case("embedding", F.embedding, (2, 7), [(11, 5)], indices=11),
    Case("embedding, padding", lambda i, w: F.embedding(i, w, padding_idx=3), (4, 9), [(5, 6)], indices=5),
    Case("embedding, padding last", lambda i, w: F.embedding(i, w, padding_idx=-1), (4, 9), [(5, 6)], indices=5),
    Case("embedding scaled", lambda i, w: F.embedding(i, w, scale_grad_by_freq=True), (9,), [(5, 6)], False, indices=5),
    Case("embedding, max_norm", lambda i, w: F.embedding(i, w, max_norm=9.0), (9,), [(5, 6)], False, indices=5),
    Case("conv1d", F.conv1d, (2, 6, 9), [(4, 6, 3), (4,)]),
    Case("conv1d without bias", lambda x, w: F.conv1d(x, w, stride=2), (2, 5, 9), [(3, 5, 3)]),
    Case("conv1d groups", lambda x, *w: F.conv1d(x, *w, padding=2, groups=3), (2, 6, 9), [(6, 2, 3), (6,)]),
    Case("conv1d dilated, first stage", lambda x, *w: F.conv1d(x, *w, 1, 2, 2), (2, 5, 9), [(3, 5, 3), (3,)],
         x_gradient=False),
    Case("conv2d", F.conv2d, (2, 4, 8, 6), [(6, 4, 3, 3), (6,)]),
    Case("conv2d odd", lambda x, *w: F.conv2d(x, *w, (2, 1), (1, 0)), (3, 5, 7, 9), [(3, 5, 3, 2), (3,)]),
    Case("conv2d same", lambda x, *w: F.conv2d(x, *w, padding="same"), (2, 4, 7, 6), [(5, 4, 3, 5), (5,)]),
    Case("conv2d valid", lambda x, *w: F.conv2d(x, *w, padding="valid"), (2, 4, 7, 6), [(5, 4, 3, 5), (5,)]),
    Case("conv2d unbatched", F.conv2d, (4, 7, 6), [(5, 4, 3, 5), (5,)]),
    Case("conv2d channels last", lambda x, *w: F.conv2d(x.to(memory_format=torch.channels_last), *w), (2, 4, 8, 6),
         [(6, 4, 3, 3), (6,)]),
    Case("conv3d", F.conv3d, (2, 3, 5, 4, 6), [(4, 3, 2, 2, 3), (4,)]),
    Case("layer_norm in B", lambda x, *w: F.layer_norm(x, (5,), *w), (2, 7, 5), [(5,), (5,)], covered=False),
    Case("layer_norm", lambda x, *w: F.layer_norm(x, (5,), *w), (2, 7, 5), [(5,), (5,)], operators=ALL_OPERATORS),
    Case("layer_norm 2 dimensions", lambda x, *w: F.layer_norm(x, (7, 5), *w), (6, 7, 5), [(7, 5), (7, 5)],
         operators=ALL_OPERATORS),
    Case("layer_norm without bias", lambda x, w: F.layer_norm(x, (64,), w), (33, 64), [(64,)], operators=ALL_OPERATORS),
    Case("layer_norm by columns", lambda x, *w: F.layer_norm(by_columns(x), (5,), *w), (2, 7, 5), [(5,), (5,)],
         operators=ALL_OPERATORS),
    Case("layer_norm first stage", lambda x, *w: F.layer_norm(x, (5,), *w), (2, 7, 5), [(5,), (5,)], True, False,
         operators=ALL_OPERATORS),
    Case("layer_norm without weights", lambda x: F.layer_norm(x, (5,)), (2, 7, 5), [], False, operators=ALL_OPERATORS),
    Case("rms_norm in B", lambda x, w: F.rms_norm(x, (5,), w), (2, 7, 5), [(5,)], covered=False),
    Case("rms_norm", lambda x, w: F.rms_norm(x, (5,), w), (2, 7, 5), [(5,)], operators=ALL_OPERATORS),
    Case("rms_norm wide", lambda x, w: F.rms_norm(x, (64,), w, eps=1e-6), (33, 64), [(64,)], operators=ALL_OPERATORS),
    Case("rms_norm first stage", lambda x, w: F.rms_norm(x, (5,), w), (2, 7, 5), [(5,)], True, False,
         operators=ALL_OPERATORS),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_operator_equals_autograd_bit_for_bit(case: Case, dtype: torch.dtype):
    torch.manual_seed(1)
    module, batches = case.module(dtype), case.batches(dtype)
    split = train(module, batches, case.operators)
    split.assert_equal(train(module, batches))
    assert split.entries == (case.entries * len(batches) if case.covered else 0)


class Block(nn.Module):
    """A GPT block (pre-norm, flash attention of one head) of width `h` on (batch, sequence, h)."""

    def __init__(self, h: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.qkv, self.proj = nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.fc1, self.fc2 = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        q, k, v = (part.unsqueeze(1) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Tied(nn.Module):
    """An embedding used again as the head, and one linear layer applied three times."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(13, 10), nn.Linear(10, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for _ in range(3):
            x = x + torch.tanh(self.linear(x))
        return F.linear(x, self.embedding.weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_uses_of_a_weight_add_up_in_the_order_of_autograd(dtype: torch.dtype):
    torch.manual_seed(2)
    module = Tied().to(dtype)
    batches = [torch.randint(0, 13, (2, 5)) for _ in range(4)]
    split = train(module, batches, MATRIX_OPERATORS)
    split.assert_equal(train(module, batches))
    assert split.entries == 5 * len(batches)


def test_a_weight_is_delivered_once_however_often_it_was_used():
    module, store, delivered = Tied(), WeightGradientStore(), []
    with SplitBackward(store):
        module(torch.randint(0, 13, (2, 5))).sum().backward()
    assert len(store) == 5
    assert set(store.parameters()) == set(module.parameters())
    store.run(WholeGradients(lambda parameter, gradient: delivered.append(parameter)))
    assert Counter(delivered) == Counter(module.parameters())
    assert store.parameters() == () and len(store) == 0
    with pytest.raises(IndexError):
        store.run_next(WholeGradients(add))


def conv1d_of_gpt2(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x.reshape(-1, x.size(-1)), weight).view(x.shape)


def conv1d_along_the_sequence(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv1d(x.transpose(1, 2), weight, padding="same").transpose(1, 2)


@st.composite
def models(draw: st.DrawFn) -> tuple[nn.Module, int]:
    """A random stack of covered and uncovered layers of one width, some frozen, some shared; and the width."""
    width = draw(st.sampled_from([1, 4, 7, 32]))
    makers: list[Callable[[], nn.Module]] = [
        lambda: nn.Linear(width, width),
        lambda: nn.Linear(width, width, bias=False),
        lambda: nn.Sequential(nn.Linear(width, 3 * width), nn.ReLU(inplace=True), nn.Linear(3 * width, width)),
        lambda: nn.LayerNorm(width),
        lambda: nn.RMSNorm(width),
        lambda: nn.GELU(),
        lambda: nn.Tanh(),
        lambda: nn.PReLU(),
        lambda: Operation(conv1d_of_gpt2, (width, width), (width,)),
        lambda: Operation(lambda x, w: x + x.transpose(0, 1).contiguous().transpose(0, 1) @ w, (width, width)),
        lambda: Operation(lambda x, w: x * w, (width,)),
        lambda: Operation(lambda x, w: torch.einsum("abk,km->abm", x, w), (width, width)),
        lambda: Operation(conv1d_along_the_sequence, (width, width, 3)),
        lambda: Operation(lambda x, w: x.transpose(0, 1) @ w.t() @ w, (width, width)),
    ]
    layers: list[nn.Module] = []
    for index in draw(st.lists(st.integers(0, len(makers)), min_size=1, max_size=7)):
        layers.append(makers[index]() if index < len(makers) else draw(st.sampled_from(layers or [nn.Tanh()])))
    frozen = draw(st.sets(st.integers(0, len(layers) - 1)))
    for index in frozen:
        layers[index].requires_grad_(False)
    return nn.Sequential(*layers), width


@settings(max_examples=150, deadline=None, derandomize=True)
@given(models(), st.sampled_from(DTYPES), st.sampled_from([MATRIX_OPERATORS, ALL_OPERATORS]), st.data())
def test_random_models_equal_autograd_bit_for_bit(made: tuple[nn.Module, int], dtype: Any, operators: Any, data: Any):
    module, width = made
    torch.manual_seed(data.draw(st.integers(0, 3), label="seed"))
    module = module.to(dtype)
    shape = (data.draw(st.integers(1, 5), label="batch"), data.draw(st.integers(1, 9), label="sequence"), width)
    batches = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]
    train(module, batches, operators).assert_equal(train(module, batches))


# What lives between B and W


class Storages(TorchDispatchMode):
    """Watches the memory that each operator allocates."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = func(*args, **(kwargs or {}))
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                known = self._seen.get(reference.cdata)
                if known is None or known[0].expired():
                    self._seen[reference.cdata] = (reference, storage.nbytes())
        return value

    def live(self, without: list[Tensor] = []) -> int:  # noqa: B006
        """Bytes still allocated, not counting the memory of the tensors `without`."""
        gc.collect()
        apart = {tensor.untyped_storage()._cdata for tensor in without}
        return sum(size for ref, size in self._seen.values() if not ref.expired() and ref.cdata not in apart)


H, BATCH, SEQUENCE = 64, 3, 40
BSH = BATCH * SEQUENCE * H * 4


@pytest.mark.parametrize(("operators", "kept", "parameters"), [(MATRIX_OPERATORS, 16, 8), (ALL_OPERATORS, 20, 12)])
def test_a_gpt_block_keeps_inputs_and_output_gradients_between_b_and_w(operators: Any, kept: int, parameters: int):
    torch.manual_seed(3)
    block, store, watched = Block(H), WeightGradientStore(), Storages()
    # The statistics of two norms and of the attention: a few numbers for each token.
    statistics = 5 * BSH // H
    with watched:
        x = torch.randn(BATCH, SEQUENCE, H).clone().requires_grad_()
        with SplitBackward(store, operators):
            output = block(x)
        assert 16 * BSH <= watched.live([*block.parameters(), output]) <= 16 * BSH + statistics
        output_gradient = torch.randn(output.shape)
        with SplitBackward(store, operators):
            torch.autograd.backward(output, output_gradient)
        del output, output_gradient
        assert x.grad is not None
        elsewhere = [*block.parameters(), *(p.grad for p in block.parameters() if p.grad is not None), x.grad]
        if kept == 16:
            elsewhere.append(x)  # else the first norm's entry keeps it
        left = [watched.live(elsewhere)]
        assert kept * BSH <= left[0] <= kept * BSH + (statistics if kept == 20 else 0)

        delivered: list[nn.Parameter] = []
        elsewhere.append(x)
        while len(store):
            store.run_next(WholeGradients(lambda parameter, gradient: delivered.append(parameter)))
            left.append(watched.live(elsewhere))
        assert all(later < earlier for earlier, later in pairwise(left))
        assert left[-1] == 0
        assert len(delivered) == parameters


def linear_nodes() -> list[object]:
    """The nodes of split linear layers that are alive anywhere."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is Linear._backward_cls]


def test_no_node_of_the_graph_lives_after_b():
    before = len(linear_nodes())  # other tests may have left some in a traceback
    block, store = Block(8), WeightGradientStore()
    with SplitBackward(store):
        output = block(torch.randn(2, 3, 8, requires_grad=True)).sum()
    assert len(linear_nodes()) == before + 4
    output.backward()
    del output
    assert len(store) == 4
    assert len(linear_nodes()) == before


def test_the_order_of_entries_is_that_of_b():
    block, store, order = Block(8), WeightGradientStore(), []
    with SplitBackward(store):
        block(torch.randn(2, 3, 8, requires_grad=True)).sum().backward()
    store.run(WholeGradients(lambda parameter, gradient: order.append(parameter)))
    expected = [block.fc2, block.fc1, block.proj, block.qkv]
    assert [id(parameter) for parameter in order] == [
        id(parameter) for layer in expected for parameter in (layer.weight, layer.bias)
    ]


@pytest.mark.parametrize("pieces", [1, 2, 3, 4, 9])
def test_w_in_pieces(pieces: int):
    """Like layers are cut between layers; the gradients are those of the whole W, and no piece repeats or drops one."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(4)))
    inputs = torch.randn(5, 6)
    model(inputs).square().sum().backward()
    oracle = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    store = WeightGradientStore()
    with SplitBackward(store):
        model(inputs).square().sum().backward()
    delivered: list[list[Any]] = []
    for piece in range(pieces):
        delivered.append([])
        store.run_piece(piece, pieces, WholeGradients(lambda *given, piece=piece: delivered[piece].append(given)))
    assert len(store) == 0
    gradients = {parameter: grad for of_piece in delivered for parameter, grad in of_piece}
    assert sum(map(len, delivered)) == len(oracle)
    assert all(torch.equal(gradients[parameter], grad) for parameter, grad in zip(model.parameters(), oracle))
    if pieces in (1, 2, 4):
        assert [len(of_piece) for of_piece in delivered] == [8 // pieces] * pieces
