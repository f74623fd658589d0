"""Hooks and a split: those that look at a weight's gradient run when it is there, and those that change a gradient
in place change nothing of what W reads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from pipelines import BF16_ZERO0, BF16_ZERO1, BF16_ZERO1_FP32, FP32_ZERO1, WIDTH, Job, Pair, data
from ranks import run_ranks
from split_cases import add
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ds_vshape.split_backward import SplitBackward, SplitForward, WeightGradientStore, WholeGradients
from ds_vshape.split_backward.ownership import own_copy, run_from


def from_the_loss(value: Tensor) -> None:
    value.sin().sum().backward()


def from_the_outputs(value: Tensor) -> None:
    """As the engine starts the backward of a stage that has no loss."""
    run_from((get_gradient_edge(value),), (value.detach().cos(),))


def step(forward: Callable[[Pair, Tensor], Tensor], split: bool,
         run: Callable[[Tensor], None] = from_the_loss) -> tuple[list[Tensor | None], int]:
    torch.manual_seed(1)
    pair, store = Pair().double(), WeightGradientStore()
    x = torch.randn(2, 3, WIDTH, dtype=torch.double, requires_grad=True)
    if not split:
        from_the_loss(forward(pair, x * 1))
        return [parameter.grad for parameter in (*pair.parameters(), x)], 0
    with SplitForward(store):
        value = forward(pair, x * 1)
    with SplitBackward(store):
        run(value)
    del value
    entries = len(store)
    store.run(WholeGradients(add))
    return [parameter.grad for parameter in (*pair.parameters(), x)], entries


def quietly(*_: Any) -> None:
    """For hooks whose value would replace the gradient."""


# -- hooks that look at a weight's gradient


def on_node(pair: Pair, x: Tensor, registered: list[Any]) -> Tensor:
    node = get_gradient_edge(pair.a.weight).node
    registered += [node, node.register_hook(lambda *_: quietly(pair.a.weight.grad.mul_(0.5)))]
    return pair.b(torch.tanh(pair.a(x)))


def halved(gradients: Any, _: Any) -> Any:
    return tuple(None if gradient is None else gradient * 0.5 for gradient in gradients)


def on_product(pair: Pair, x: Tensor) -> Tensor:
    y = pair.a(x.flatten(0, 1))
    if y.requires_grad:
        y.grad_fn.register_hook(halved)
    return pair.b(torch.tanh(y))


def legacy(pair: Pair, x: Tensor) -> Tensor:
    pair.a.register_backward_hook(lambda _, gradients, outputs: halved(gradients, outputs))
    return pair.b(torch.tanh(pair.a(x.flatten(0, 1))))


@pytest.mark.parametrize("forward", [on_product, legacy])
def test_a_hook_on_a_products_node_changes_the_weights_gradients_too(forward: Callable[..., Tensor]) -> None:
    expected, _ = step(forward, split=False)
    found, entries = step(forward, split=True)
    assert entries == 1, "the other product's gradients are deferred"
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def before_node(pair: Pair, x: Tensor, registered: list[Any]) -> Tensor:
    node = get_gradient_edge(pair.a.bias).node
    registered += [node, node.register_prehook(lambda gradients: (gradients[0] * 2,))]
    return pair.b(torch.tanh(pair.a(x)))


def after_the_forward(pair: Pair, x: Tensor, registered: list[Any]) -> Tensor:
    """Registered when the call is recorded already."""
    value = pair.b(torch.tanh(pair.a(x)))
    pair.a.weight.register_hook(lambda gradient: gradient * 3)
    pair.b.bias.register_post_accumulate_grad_hook(lambda parameter: quietly(parameter.grad.mul_(2)))
    return value


def on_a_transpose(pair: Pair, x: Tensor, registered: list[Any]) -> Tensor:
    transposed = pair.a.weight.t()
    value = pair.b(torch.tanh(x @ transposed))
    transposed.register_hook(lambda gradient: gradient * 3)
    return value


@pytest.mark.parametrize("forward", [on_node, before_node, after_the_forward, on_a_transpose])
def test_a_hook_on_the_way_to_a_weight_runs(forward: Any) -> None:
    registered: list[Any] = []
    expected, _ = step(lambda pair, x: forward(pair, x, registered), split=False)
    found, entries = step(lambda pair, x: forward(pair, x, registered), split=True)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=0)
    assert entries == (0 if forward is after_the_forward else 1)


def test_a_hook_that_was_removed_is_none() -> None:
    def forward(pair: Pair, x: Tensor) -> Tensor:
        node = get_gradient_edge(pair.a.weight).node
        node.register_hook(lambda *_: None).remove()
        return pair.b(pair.a(x))
    assert step(forward, split=True)[1] == 2


# -- hooks that change gradients in place


def scaled_skip(pair: Pair, x: Tensor) -> Tensor:
    skip = torch.tanh(pair.a(x))
    skip.register_hook(lambda gradient: gradient.mul_(0.1))
    return pair.b(x) + skip


def past_the_version(pair: Pair, x: Tensor) -> Tensor:
    skip = torch.tanh(pair.a(x))
    skip.register_hook(lambda gradient: quietly(gradient.data.mul_(0.1)))
    return pair.b(x) + skip


def view_of_the_gradient(pair: Pair, x: Tensor) -> Tensor:
    skip = torch.tanh(pair.a(x))
    skip.register_hook(lambda gradient: gradient.mul_(0.1))
    return torch.cat([pair.b(x), skip], -1)[..., :WIDTH] + skip.view(-1).view_as(x)


def kept_by_a_hook(pair: Pair, x: Tensor) -> Tensor:
    """The hook of one tensor keeps its gradient, that of another changes it."""
    kept: list[Tensor] = []
    x.register_hook(lambda gradient: quietly(kept[0].zero_()))
    value = pair.b(torch.tanh(pair.a(x)))
    value.register_hook(kept.append)
    return value


def after_the_node(pair: Pair, x: Tensor) -> Tensor:
    value = pair.b(torch.tanh(pair.a(x)))
    value.grad_fn.register_hook(lambda inputs, outputs: quietly(outputs[0].zero_()))
    return value


def of_a_module(pair: Pair, x: Tensor) -> Tensor:
    pair.b.register_full_backward_hook(lambda module, inputs, outputs: quietly(outputs[0].zero_()))
    return pair.b(torch.tanh(pair.a(x)))


def through_an_added_bias(pair: Pair, x: Tensor) -> Tensor:
    """The bias's output gradient is passed on as an input gradient, which a hook changes."""
    product = nn.functional.linear(x.transpose(0, 1), pair.a.weight, pair.a.bias)
    x.register_hook(lambda gradient: gradient.zero_())
    return pair.b(product)


class Negating(torch.autograd.Function):
    """Reverses the gradient, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.neg_()


def by_a_function(pair: Pair, x: Tensor) -> Tensor:
    skip = Negating.apply(torch.tanh(pair.a(x)))
    return pair.b(x) + skip


@pytest.mark.parametrize("run", [from_the_loss, from_the_outputs])
@pytest.mark.parametrize("forward", [
    scaled_skip, past_the_version, view_of_the_gradient, kept_by_a_hook, after_the_node, of_a_module,
    through_an_added_bias, by_a_function,
])
def test_what_w_reads_is_its_own(forward: Callable[[Pair, Tensor], Tensor], run: Callable[[Tensor], None]) -> None:
    expected, _ = step(forward, split=False)
    found, entries = step(forward, split=True, run=run)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=0)
    assert entries >= 2


def test_a_constant_that_is_written_again_after_b_was_copied() -> None:
    pair, store, constant = Pair(), WeightGradientStore(), torch.ones(2, WIDTH)
    with SplitForward(store):
        value = pair.a(constant).sum()
    with SplitBackward(store):
        value.backward()
    constant.zero_()
    store.run(WholeGradients(add))
    assert torch.equal(pair.a.weight.grad, torch.full((WIDTH, WIDTH), 2.0))


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What B copies for W."""
    from ds_vshape.split_backward import function
    found: list[Tensor] = []
    monkeypatch.setattr(function, "own_copy", lambda tensor: found.append(tensor) or own_copy(tensor))
    return found


def test_a_gradient_that_nobody_else_has_is_not_copied(copies: list[Tensor]) -> None:
    assert step(lambda pair, x: torch.tanh(pair.b(torch.tanh(pair.a(x)))), split=True)[1] == 2
    assert copies == []
    step(lambda pair, x: torch.tanh(x + pair.b(torch.tanh(pair.a(x)))), split=True)
    assert len(copies) == 1


def test_a_gradient_from_which_a_run_starts_is_copied_where_others_keep_it(copies: list[Tensor]) -> None:
    kept: list[Tensor] = []

    def keeping(value: Tensor) -> None:
        kept.append(value.detach().cos())
        run_from((get_gradient_edge(value),), (kept[0],))

    def keeping_a_view(value: Tensor) -> None:
        gradient = value.detach().cos()
        kept.append(gradient[0])
        edges = (get_gradient_edge(value),)
        gradients = (gradient,)
        del gradient
        run_from(edges, gradients)

    def product(pair: Pair, x: Tensor) -> Tensor:
        return pair.b(torch.tanh(pair.a(x)))

    for run, number in ((from_the_outputs, 0), (keeping, 1), (keeping_a_view, 1)):
        copies.clear()
        assert step(product, split=True, run=run)[1] == 2
        assert len(copies) == number, run


def test_gradients_of_several_outputs(copies: list[Tensor]) -> None:
    """Those from which a run starts at two of a stage's outputs, of their own or one for both."""

    def grads(split: bool, same: bool) -> list[Tensor | None]:
        torch.manual_seed(1)
        pair, store = Pair().double(), WeightGradientStore()
        with SplitForward(store) if split else nullcontext():
            # Inputs that nothing else holds: W needs no copies of these either.
            outputs = (pair.a(torch.randn(3, WIDTH, dtype=torch.double)),
                       Negating.apply(pair.b(torch.randn(3, WIDTH, dtype=torch.double))))
        edges = tuple(map(get_gradient_edge, outputs))
        gradients = (torch.ones_like(outputs[0]),) * 2 if same else tuple(torch.ones_like(each) for each in outputs)
        del outputs
        with SplitBackward(store) if split else nullcontext():
            run_from(edges, gradients)
        del gradients
        store.run(WholeGradients(add))
        return [parameter.grad for parameter in pair.parameters()]

    for same in (False, True):
        copies.clear()
        expected = grads(False, same)
        assert all(map(torch.equal, grads(True, same), expected)), same
        assert bool(copies) is same


@pytest.mark.parametrize("tensor", [
    torch.randn(3, 4), torch.randn(4, 3).t(), torch.randn(3, 8)[:, ::2], torch.randn(3, 1).expand(3, 4),
    torch.randn(()).expand(2, 3), torch.randn(2, 3, 8)[..., 2:5], torch.randn(9).as_strided((3, 4), (2, 1)),
    torch.empty(0, 3), torch.tensor(1.0),
], ids=lambda tensor: f"{tuple(tensor.shape)}, {tensor.stride()}")
def test_a_copy_keeps_the_layout(tensor: Tensor) -> None:
    copy = own_copy(tensor)
    assert torch.equal(copy, tensor) and not torch._C._is_alias_of(copy, tensor) or tensor.numel() == 0
    overlapping = tensor.shape == (3, 4) and tensor.stride() == (2, 1)
    assert overlapping or copy.stride() == tensor.stride()


def test_weights_are_deferred_with_each_of_deepspeeds_optimizers() -> None:
    """All matrices of the layers and their biases, whatever hooks DeepSpeed has on them."""
    def body(rank: int) -> list[int]:
        found = []
        for config in ({}, FP32_ZERO1, BF16_ZERO0, BF16_ZERO1, BF16_ZERO1_FP32):
            engine = Job("v-zb", 2, 4, config).engine()
            entries: list[int] = []
            add_entry = WeightGradientStore.add
            WeightGradientStore.add = lambda store, entry: entries.append(1) or add_entry(store, entry)  # noqa: B023
            engine.train_batch(data(engine, 0))
            WeightGradientStore.add = add_entry
            found.append(len(entries))
        return found

    without_hooks, *others = (sum(of_ranks) for of_ranks in zip(*run_ranks(2, body)))
    assert others == [without_hooks] * 4 and without_hooks > 0
