"""The split backward against autograd's own: equal bit for bit, nothing kept but what W needs, each forward run once.

The oracle is the same computation without the mode: an unsplit backward on the same weights and data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from live_memory import Block, Storages, linear_nodes
from split_cases import CASES, DTYPES, Case, Operation, Tied, add, in_their_dtypes, train
from torch import Tensor, nn

from ds_vshape.split_backward import ALL_OPERATORS, MATRIX_OPERATORS, SplitBackward, WeightGradientStore, WholeGradients


@in_their_dtypes(CASES)
def test_an_operator_equals_autograd_bit_for_bit(case: Case, dtype: torch.dtype):
    torch.manual_seed(1)
    module, batches = case.module(dtype), case.batches(dtype)
    split = train(module, batches, case.operators)
    split.assert_equal(train(module, batches))
    assert split.entries == (case.entries * len(batches) if case.covered else 0)


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


@settings(max_examples=150)
@given(models(), st.sampled_from(DTYPES), st.sampled_from([MATRIX_OPERATORS, ALL_OPERATORS]), st.data())
def test_random_models_equal_autograd_bit_for_bit(made: tuple[nn.Module, int], dtype: Any, operators: Any, data: Any):
    module, width = made
    torch.manual_seed(data.draw(st.integers(0, 3), label="seed"))
    module = module.to(dtype)
    shape = (data.draw(st.integers(1, 5), label="batch"), data.draw(st.integers(1, 9), label="sequence"), width)
    batches = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]
    train(module, batches, operators).assert_equal(train(module, batches))


# What lives between B and W


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
