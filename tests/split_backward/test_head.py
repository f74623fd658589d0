"""A head and its loss in chunks of tokens against the same in one piece, and what of its memory is alive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live_memory import Storages
from torch import Tensor, nn

from ds_vshape.split_backward import SplitForward, WeightGradientStore
from ds_vshape.split_backward.head import EarlyGradients, HeadOutput, Projection, product_alone, with_logits

WORDS, WIDTH, FACTOR = 50, 8, 5.0


def scaled_and_capped(project: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """As forwards of transformers surround the product."""
    return 3 * torch.tanh(project(2 * hidden[None])[0] / 2)


class Sums:
    """One sum of gradients."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.sum: Tensor | None = None
        self.dtype = dtype

    def add(self, parameter: Any, gradient: Tensor) -> None:
        gradient = gradient.to(self.dtype)
        self.sum = gradient if self.sum is None else self.sum + gradient

    def buffer(self, parameter: Any) -> Tensor | None:
        return self.sum


@pytest.fixture
def tensors() -> tuple[Tensor, nn.Parameter, nn.Parameter, Tensor]:
    """Hidden states, weight, bias, and labels, of which some don't count."""
    torch.manual_seed(0)
    labels = torch.randint(WORDS, (3, 7))
    labels[0, :3] = labels[2, 6] = -100
    weight, bias = nn.Parameter(torch.randn(WORDS, WIDTH) / 3), nn.Parameter(torch.randn(WORDS) / 3)
    return torch.randn(3, 7, WIDTH, requires_grad=True), weight, bias, labels


def in_one_piece(forward: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return forward(lambda x: F.linear(x, weight, bias), hidden.flatten(0, 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("chunk", [None, 1, 4, 21, 100])
@pytest.mark.parametrize("items", [None, 40])
@pytest.mark.parametrize("forward", [product_alone, scaled_and_capped])
def test_equals_the_loss_of_whole_logits(forward: Any, items: int | None, chunk: int | None, tensors: Any) -> None:
    hidden, *weights, labels = tensors
    logits = in_one_piece(forward, hidden, *weights)
    expected = F.cross_entropy(logits, labels.flatten(), reduction="mean" if items is None else "sum") / (items and
                                                                                                         items or 1)
    oracle = torch.autograd.grad(FACTOR * expected, [hidden, *weights])
    output = HeadOutput(hidden, Projection(*weights, forward))
    torch.testing.assert_close(with_logits((output,))[0].flatten(0, 1), logits)
    loss = output.loss(labels, items, chunk=chunk)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(FACTOR * loss, [hidden, *weights]), oracle)

    sums, early = Sums(), EarlyGradients(torch.device("cpu"))
    for times in (1, 2):  # the first makes the sum, the second adds to it
        with early.active(output, sums, lambda: torch.tensor(FACTOR)) as told, SplitForward(WeightGradientStore()):
            loss = told.loss(labels, items, chunk=chunk)
        (FACTOR * loss).backward()
        assert weights[0].grad is None, "added already"
        torch.testing.assert_close(sums.sum, times * oracle[1])
        torch.testing.assert_close([hidden.grad, weights[1].grad], [times * oracle[0], times * oracle[2]])
    with torch.no_grad(), early.active(output, sums, lambda: torch.tensor(FACTOR)) as told:
        torch.testing.assert_close(told.loss(labels, items, chunk=chunk), expected.detach())
    torch.testing.assert_close(sums.sum, 2 * oracle[1])


def test_a_frozen_head_and_frozen_layers(tensors: Any) -> None:
    hidden, weight, _, labels = tensors
    expected = F.cross_entropy(in_one_piece(product_alone, hidden, weight, None), labels.flatten())
    of_hidden, of_weight = torch.autograd.grad(expected, [hidden, weight])
    frozen = HeadOutput(hidden, Projection(weight.detach()))
    torch.testing.assert_close(torch.autograd.grad(frozen.loss(labels, chunk=4), [hidden])[0], of_hidden)
    alone = HeadOutput(hidden.detach(), Projection(weight))
    torch.testing.assert_close(torch.autograd.grad(alone.loss(labels, chunk=4), [weight])[0], of_weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_low_precision_sums_are_rounded_once(dtype: torch.dtype) -> None:
    """Not once for each chunk, whatever the sums' dtype; under autocast as without chunks."""
    torch.manual_seed(0)
    hidden = torch.randn(256, WIDTH, dtype=dtype, requires_grad=True)
    weight, labels = nn.Parameter(torch.randn(WORDS, WIDTH, dtype=dtype) / 3), torch.randint(WORDS, (256,))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
        expected = F.cross_entropy(F.linear(hidden, weight).float(), labels)
        oracle = torch.autograd.grad(expected, [hidden, weight])
        sums, early = Sums(dtype), EarlyGradients(torch.device("cpu"))
        with early.active(HeadOutput(hidden, Projection(weight)), sums, lambda: torch.ones(())) as output:
            loss = output.loss(labels, chunk=2)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for found, wanted in zip((hidden.grad, sums.sum), oracle, strict=True):
        assert found is not None
        assert float((found - wanted).float().norm() / wanted.float().norm()) < 6e-3


def test_a_weight_with_a_hook_gets_its_gradient_in_b(tensors: Any) -> None:
    hidden, weight, _, labels = tensors
    seen: list[Tensor] = []
    weight.register_hook(seen.append)
    sums, early = Sums(), EarlyGradients(torch.device("cpu"))
    with early.active(HeadOutput(hidden, Projection(weight)), sums, lambda: torch.ones(())) as output:
        loss = output.loss(labels, chunk=4)
    loss.backward()
    assert sums.sum is None and len(seen) == 1 and weight.grad is not None


def test_gradients_go_early_where_the_engine_has_said_so_alone(tensors: Any) -> None:
    """Not those of another head, of another engine's, nor after the loss function."""
    hidden, weight, _, labels = tensors
    sums, others, early = Sums(), Sums(), EarlyGradients(torch.device("cpu"))
    plain = HeadOutput(hidden, Projection(weight))
    with early.active((plain, (hidden, plain)), sums, lambda: torch.ones(())) as (told, (same, nested)):
        assert same is hidden
        with EarlyGradients(torch.device("cpu")).active(plain, others, lambda: torch.ones(())) as of_others:
            of_others.loss(labels)
            assert others.sum is not None and sums.sum is None
            told.loss(labels)
        torch.testing.assert_close(sums.sum, others.sum)
        nested.loss(labels)
        torch.testing.assert_close(sums.sum, 2 * others.sum)
        for_autograd = plain.loss(labels)
    later = told.loss(labels)
    torch.testing.assert_close(sums.sum, 2 * others.sum)
    for loss in (for_autograd, later):
        torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], others.sum)


@pytest.mark.parametrize("use", [lambda loss: 2 * loss, lambda loss: loss + loss.square()])
def test_a_loss_that_is_changed_afterwards_is_refused(use: Any, tensors: Any) -> None:
    hidden, weight, _, labels = tensors
    early = EarlyGradients(torch.device("cpu"))
    with early.active(HeadOutput(hidden, Projection(weight)), Sums(), lambda: torch.ones(())) as output:
        loss = output.loss(labels, chunk=4)
    with pytest.raises(RuntimeError, match="must return it as it is, or .it, auxiliary loss., or have whole logits"):
        use(loss).backward()
    early.check()  # said once
    without = HeadOutput(hidden, Projection(weight)).loss(labels, chunk=4)
    without.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        without.backward()


def test_a_head_keeps_two_units_and_logits_never_exist_whole() -> None:
    """In units of tokens x hidden, with a vocabulary of 32 times hidden: 33 in one piece."""
    tokens, width = 512, 64
    unit = tokens * width * 4
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight, labels = nn.Parameter(torch.randn(32 * width, width)), torch.randint(32 * width, (tokens,))
    sums, early = Sums(), EarlyGradients(torch.device("cpu"))
    sums.sum = torch.zeros_like(weight, requires_grad=False)
    output = HeadOutput(hidden, Projection(weight))

    class Peak(Storages):
        peak = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            value = super().__torch_dispatch__(func, types, args, kwargs)
            Peak.peak = max(Peak.peak, sum(size for ref, size in self._seen.values() if not ref.expired()))
            return value

    apart = [hidden, weight, labels, sums.sum]
    with Peak() as watched, early.active(output, sums, lambda: torch.ones(())) as told:
        loss = told.loss(labels)
        kept = watched.live(apart)
    assert unit <= kept <= 1.1 * unit, "the gradient of the hidden states; these themselves are the second"
    assert Peak.peak - sum(tensor.nbytes for tensor in apart) < 7 * unit
    del loss
    with Storages() as watched:
        whole = F.cross_entropy(F.linear(hidden, weight), labels)
        assert watched.live([hidden, weight, labels]) > 31 * unit
    assert whole.requires_grad
