"""Runs of autograd other than the engine's B, over a graph that is recorded for a split: each gets what it asks for,
and the weights' gradients are those of the same computation without a split.

The engine's own passes are imitated: F of all micro-batches, then each B with the W of the micro-batch before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pipelines import WIDTH, Block
from split_cases import add
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from ds_vshape.split_backward import ALL_OPERATORS, SplitBackward, SplitForward, WeightGradientStore, WholeGradients

MICRO_BATCHES = 3
Stage = Callable[["Layers", Tensor], Tensor]


class Layers(nn.Module):
    """What the stages of these tests are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.block = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False), Block()
        self.embedding, self.conv = nn.Embedding(5, WIDTH), nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.norm, self.rms = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)


def train(stage: Stage, split: bool) -> tuple[list[Tensor], dict[str, Tensor | None], int]:
    """Outputs and input gradients; the weights' gradients; how many entries waited for W."""
    torch.manual_seed(1)
    layers = Layers().double()
    inputs = [torch.randn(2, 3, WIDTH, dtype=torch.double, requires_grad=True) for _ in range(MICRO_BATCHES)]
    stores = [WeightGradientStore() for _ in inputs]
    entries, outputs = 0, []
    for x, store in zip(inputs, stores):
        if split:
            with SplitForward(store, ALL_OPERATORS):
                outputs.append(stage(layers, x))
            assert len(store) == 0
        else:
            outputs.append(stage(layers, x))
    for place, (output, store) in enumerate(zip(outputs, stores)):
        gradient = torch.linspace(-1, 2, output.numel(), dtype=torch.double).view(output.shape)
        if split:
            with SplitBackward(store, ALL_OPERATORS):
                torch.autograd.backward(output, gradient)
            entries += len(store)
            if place:
                stores[place - 1].run(WholeGradients(add))
        else:
            torch.autograd.backward(output, gradient)
    if split:
        stores[-1].run(WholeGradients(add))
    results = [*(output.detach() for output in outputs), *(x.grad for x in inputs if x.grad is not None)]
    return results, {name: parameter.grad for name, parameter in layers.named_parameters()}, entries


def check(stage: Stage, entries: int | None = None) -> None:
    values, expected, _ = train(stage, split=False)
    mine, gradients, waited = train(stage, split=True)
    for one, two in zip(mine, values, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    for name, gradient in expected.items():
        assert (gradients[name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-11, atol=1e-12)
    assert entries is None or waited == entries * MICRO_BATCHES


# -- in the forward, for inputs


def network(layers: Layers, x: Tensor) -> Tensor:
    """All kinds of operators, nonlinear in the input."""
    x = torch.tanh(layers.a(layers.norm(x))) @ layers.b.weight.t()
    x = x + torch.tanh(layers.conv(x.transpose(1, 2)).transpose(1, 2)) @ layers.matrix
    return layers.rms(torch.tanh(x)) + torch.addmm(layers.a.bias, x[0], layers.matrix)


def adversarial(layers: Layers, x: Tensor) -> Tensor:
    probe = x.detach().requires_grad_()
    (direction,) = torch.autograd.grad(network(layers, probe).pow(2).sum(), probe)
    return network(layers, x + 0.1 * direction.sign())


def on_the_same_graph(layers: Layers, x: Tensor) -> Tensor:
    """The nodes run here are those that B runs."""
    hidden = layers.block(x * 2)
    value = network(layers, hidden)
    (weight,) = torch.autograd.grad(value.pow(2).sum(), hidden, retain_graph=True)
    return value * weight.norm()


def by_backward_to_inputs(layers: Layers, x: Tensor) -> Tensor:
    probe = x.detach().requires_grad_()
    network(layers, probe).sum().backward(inputs=[probe])
    return network(layers, x + 0.1 * probe.grad)


def jacobian(layers: Layers, x: Tensor) -> Tensor:
    found = torch.autograd.functional.jacobian(lambda t: network(layers, t).sum((0, 1)), x.detach())
    return network(layers, x) * found.norm()


def batched_jacobian(layers: Layers, x: Tensor) -> Tensor:
    probe = x.detach().requires_grad_()
    value = network(layers, probe)
    (found,) = torch.autograd.grad(value, probe, torch.randn(4, *value.shape, dtype=x.dtype).sign() * 0 + 1,
                                   is_grads_batched=True)
    return network(layers, x) * found.norm()


def vjp(layers: Layers, x: Tensor) -> Tensor:
    value, found = torch.autograd.functional.vjp(lambda t: network(layers, t), x.detach(), torch.ones_like(x))
    return network(layers, x) + value + found


def implicit(layers: Layers, x: Tensor) -> Tensor:
    """A deep equilibrium layer: its backward solves for the gradient by vector-Jacobian products in a hook."""
    with torch.no_grad():
        z = torch.zeros_like(x)
        for _ in range(4):
            z = torch.tanh(layers.a(z) * 0.3 + x)
    z = torch.tanh(layers.a(z) * 0.3 + x)
    point = z.detach().requires_grad_()
    value = torch.tanh(layers.a(point) * 0.3 + x.detach())

    def solve(gradient: Tensor) -> Tensor:
        total = gradient
        for _ in range(3):
            total = torch.autograd.grad(value, point, total, retain_graph=True)[0] + gradient
        return total

    z.register_hook(solve)
    return layers.b(z)


# -- for weights


def adaptive(layers: Layers, x: Tensor) -> Tensor:
    """VQGAN's weight of a loss: a ratio of gradient norms at the last layer's weight."""
    value = layers.a(layers.block(x))
    norms = [torch.autograd.grad(part, layers.a.weight, retain_graph=True)[0].norm()
             for part in (value.pow(2).mean(), value.mean())]
    return value.pow(2) + (norms[0] / norms[1]).detach() * value


def of_a_transpose(layers: Layers, x: Tensor) -> Tensor:
    transposed = layers.b.weight.t()
    value = torch.tanh(x) @ transposed
    of_view, = torch.autograd.grad(value.sum(), transposed, retain_graph=True)
    of_weight, = torch.autograd.grad(value.sum(), layers.b.weight, retain_graph=True)
    return value * of_view.norm() + of_weight.norm()


def a_transpose_whose_gradient_is_kept(layers: Layers, x: Tensor) -> Tensor:
    transposed = layers.b.weight.t()
    value = torch.tanh(x) @ transposed
    value.sum().backward(inputs=[transposed], retain_graph=True)
    return value * transposed.grad.norm()


def of_some_weights(layers: Layers, x: Tensor) -> Tensor:
    """One of a node's weights, and weights of several nodes; some twice."""
    value = network(layers, layers.block(x))
    weights = [layers.a.bias, layers.conv.weight, layers.matrix, layers.norm.weight, layers.block.up.weight]
    return value * sum(gradient.norm() for gradient in torch.autograd.grad(value.sum(), weights, retain_graph=True))


def inner_step(layers: Layers, x: Tensor) -> Tensor:
    """MAML: a step of gradient descent that is differentiated itself."""
    loss = layers.a(x).pow(2).mean()
    weight, bias = torch.autograd.grad(loss, [layers.a.weight, layers.a.bias], create_graph=True)
    return F.linear(x, layers.a.weight - 0.1 * weight, layers.a.bias - 0.1 * bias)


def to_named_weights(layers: Layers, x: Tensor) -> Tensor:
    """Into .grad, here and now, of one of a node's two weights."""
    layers.a(x.detach()).pow(2).sum().backward(inputs=[layers.a.bias])
    assert layers.a.bias.grad is not None
    return layers.a(x)


# -- of a higher order


def penalty(layers: Layers, x: Tensor) -> Tensor:
    probe = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(network(layers, probe).sum(), probe, create_graph=True)
    return network(layers, x) + gradient.pow(2).mean()


def penalty_on_offloaded_tensors(layers: Layers, x: Tensor) -> Tensor:
    """What hooks of saved tensors give back has other memory, and autograd's graph all the same."""
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda tensor: tensor):
        return penalty(layers, x)


def penalty_with_rounded_weights(layers: Layers, x: Tensor) -> Tensor:
    """Weights that are rounded for a product, and are as they were before its gradient is taken."""
    exact = [layer.weight.data for layer in (layers.a, layers.b)]
    x = x * 1
    for layer in (layers.a, layers.b):
        layer.weight.data = layer.weight.data.sign()
    score = network(layers, x)
    layers.a.weight.data, layers.b.weight.data = exact
    gradient, = torch.autograd.grad(score.sum(), x, create_graph=True)
    return score + gradient.pow(2).sum()


def forces(layers: Layers, x: Tensor) -> Tensor:
    """Minus the derivative of an energy, by the stage's own input."""
    x = x * 1
    (gradient,) = torch.autograd.grad(network(layers, x).sum(), x, create_graph=True)
    return -gradient


def third_order(layers: Layers, x: Tensor) -> Tensor:
    x = x * 1
    for _ in range(2):
        x = torch.autograd.grad(torch.tanh(layers.a(x)).pow(3).sum(), x, create_graph=True)[0]
    return x


def embedded_penalty(layers: Layers, x: Tensor) -> Tensor:
    rows = layers.embedding(torch.tensor([[1, 4, 1]]))
    value = torch.tanh(layers.a(x + rows))
    (gradient,) = torch.autograd.grad(value.sum(), rows, create_graph=True)
    return value + gradient


# -- backwards of a layer's own


def local_loss(layers: Layers, x: Tensor) -> Tensor:
    """A backward in the forward that means the weights, and looks at what it got."""
    before = None if layers.a.weight.grad is None else layers.a.weight.grad.clone()
    layers.a(x.detach()).pow(2).sum().backward()
    assert before is None or not torch.equal(layers.a.weight.grad, before)
    return layers.a(x) * layers.a.weight.grad.norm()


class Reversible(torch.autograd.Function):
    """Recomputes its function in its backward, and runs a backward there."""

    how = "backward"

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Any, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function, ctx.weights = function, weights
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            value = ctx.function(x)
        if Reversible.how == "grad":
            found = torch.autograd.grad(value, (x, *ctx.weights), gradient)
            return found[0], None, *found[1:]
        if Reversible.how == "method":
            value.backward(gradient)
        else:
            torch.autograd.backward(value, gradient)
        if Reversible.how == "halved":
            for weight in ctx.weights:
                weight.grad.mul_(0.5)
        return x.grad, None, *[None] * len(ctx.weights)


def reversible(how: str) -> Stage:
    def stage(layers: Layers, x: Tensor) -> Tensor:
        Reversible.how = how
        return layers.b(Reversible.apply(x, layers.a, *layers.a.parameters()))
    return stage


def gradient_in_a_checkpoint(reentrant: bool) -> Stage:
    def inside(layers: Layers, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return adversarial(layers, x)
    return lambda layers, x: checkpoint(inside, layers, x, use_reentrant=reentrant) + layers.b(x)


def local_loss_in_a_checkpoint(layers: Layers, x: Tensor) -> Tensor:
    def inside(x: Tensor) -> Tensor:
        with torch.enable_grad():
            layers.a(x.detach()).pow(2).sum().backward()
        return layers.b(x)
    return checkpoint(inside, x, use_reentrant=True)


def twice_in_one_backward(layers: Layers, x: Tensor) -> Tensor:
    """A hook runs the node that B is about to run."""
    value = layers.a(x * 1)
    other = torch.tanh(value)
    other.register_hook(lambda gradient: gradient + torch.autograd.grad(value, layers.a.weight, gradient,
                                                                        retain_graph=True)[0].norm())
    return layers.b(other)


def frozen_meanwhile(layers: Layers, x: Tensor) -> Tensor:
    value = layers.a(x)
    value.register_hook(lambda gradient: [layers.a.weight.requires_grad_(False)] and None)
    return value


def parametrized(layers: Layers, x: Tensor) -> Tensor:
    if not parametrize.is_parametrized(layers.a):
        nn.utils.parametrizations.weight_norm(layers.a)
    return adversarial(layers, x)


STAGES: dict[str, Stage] = {
    stage.__name__: stage
    for stage in (
        adversarial, on_the_same_graph, by_backward_to_inputs, jacobian, batched_jacobian, vjp, implicit, adaptive,
        of_a_transpose, a_transpose_whose_gradient_is_kept, of_some_weights, inner_step, to_named_weights, penalty,
        penalty_on_offloaded_tensors, penalty_with_rounded_weights, forces, third_order, embedded_penalty,
        local_loss_in_a_checkpoint, twice_in_one_backward, frozen_meanwhile,
        parametrized,
    )
} | {
    **{f"reversible, {how}": reversible(how) for how in ("grad", "backward", "method")},
    "gradient in a checkpoint": gradient_in_a_checkpoint(False),
    "gradient in a reentrant checkpoint": gradient_in_a_checkpoint(True),
}


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_every_run_gets_what_it_asks_for(stage: Stage) -> None:
    check(stage)


def test_the_engines_b_still_defers() -> None:
    """All of network's operators with a weight and a Block's, also where another run came before."""
    check(lambda layers, x: network(layers, layers.block(x)), entries=7 + 3)
    check(on_the_same_graph, entries=7 + 3)
    check(adversarial, entries=7)


def test_a_backward_in_a_forward_leaves_its_gradients_at_once() -> None:
    """In a micro-batch of its own: how far the others are, F's own look at .grad would tell."""
    results = []
    for split in (False, True):
        torch.manual_seed(1)
        layers, x, store = Layers().double(), torch.randn(2, 3, WIDTH, dtype=torch.double), WeightGradientStore()
        if split:
            with SplitForward(store):
                value = local_loss(layers, x)
            with SplitBackward(store):
                value.sum().backward()
            store.run(WholeGradients(add))
        else:
            local_loss(layers, x).sum().backward()
        results.append(layers.a.weight.grad)
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=0)


def test_a_backward_in_a_function_leaves_its_gradients_at_once() -> None:
    results = []
    for split in (False, True):
        torch.manual_seed(1)
        layers, x, store = Layers().double(), torch.randn(2, 3, WIDTH, dtype=torch.double), WeightGradientStore()
        x.requires_grad_()
        if split:
            with SplitForward(store):
                value = reversible("halved")(layers, x)
            with SplitBackward(store):
                value.sum().backward()
            assert len(store) == 1
            store.run(WholeGradients(add))
        else:
            reversible("halved")(layers, x).sum().backward()
        results.append([layers.a.weight.grad, layers.b.weight.grad])
    for one, two in zip(*results):
        torch.testing.assert_close(two, one, rtol=1e-12, atol=0)


def test_a_run_after_w_computes_everything_at_once() -> None:
    layers, x, store = Layers().double(), torch.randn(2, WIDTH, dtype=torch.double), WeightGradientStore()
    with SplitForward(store):
        value = layers.a(x).pow(2).sum()
    with SplitBackward(store):
        value.backward(retain_graph=True)
    store.run(WholeGradients(add))
    once = layers.a.weight.grad.clone()
    value.backward()
    assert len(store) == 0
    assert torch.equal(layers.a.weight.grad, 2 * once)


def test_a_node_that_is_run_twice_defers_twice() -> None:
    layers, x, store = Layers().double(), torch.randn(2, WIDTH, dtype=torch.double), WeightGradientStore()
    with SplitForward(store):
        value = layers.a(x).pow(2).sum()
    with SplitBackward(store):
        value.backward(retain_graph=True)
        value.backward()
    assert len(store) == 2
    store.run(WholeGradients(add))
    mine, layers.a.weight.grad = layers.a.weight.grad, None
    layers.a(x).pow(2).sum().backward()
    assert torch.equal(mine, 2 * layers.a.weight.grad)


def test_a_hook_of_a_norms_input_runs_once_under_create_graph() -> None:
    weight, calls = nn.Parameter(torch.ones(4)), []
    with SplitBackward(WeightGradientStore(), ALL_OPERATORS):
        x = torch.randn(3, 4, requires_grad=True) * 2
        x.register_hook(lambda gradient: calls.append(gradient.shape))
        score = torch.nn.functional.rms_norm(x, (4,), weight).sum()
        torch.autograd.grad(score, x, create_graph=True)
    assert len(calls) == 1


def test_a_weight_whose_data_is_another_tensor_after_its_use() -> None:
    """Weights that are rounded for a product, and are as they were after it."""
    def stage(layers: Layers, x: Tensor) -> Tensor:
        exact = [layer.weight.data for layer in (layers.a, layers.b)]
        for layer in (layers.a, layers.b):
            layer.weight.data = layer.weight.data.sign()
        value = layers.b(torch.tanh(layers.a(x)))
        layers.a.weight.data, layers.b.weight.data = exact
        return value
    expected, found = train(stage, split=False), train(stage, split=True)
    for one, two in zip(found[0], expected[0], strict=True):
        assert torch.equal(one, two)
    assert found[2] == 2 * MICRO_BATCHES
