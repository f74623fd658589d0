"""The split and the rest of autograd: hooks, checkpointing, transforms, errors, and functions of the user's own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import deepspeed
import pytest
import torch
import torch.nn.functional as F
from live_memory import CHECKPOINTS
from split_cases import add
from torch import Tensor, nn

from ds_vshape.split_backward import MATRIX_OPERATORS, SplitBackward, SplitFunction, WeightGradientStore, WholeGradients


def split_step(function: Callable[[], Tensor]) -> WeightGradientStore:
    """F and B of `function`, a scalar; what waits for W."""
    store = WeightGradientStore()
    with SplitBackward(store):
        value = function()
    with SplitBackward(store):
        value.backward()
    return store


# Checkpointing


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 24), nn.Linear(24, 6)
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return x + self.down(F.dropout(F.gelu(self.up(self.norm(x))), 0.3))


@pytest.mark.parametrize("backward", [Tensor.backward, torch.autograd.backward], ids=["method", "function"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_recomputes_once_and_stores_once(kind: str, backward: Callable[[Tensor], None]):
    torch.manual_seed(4)
    layers = nn.ModuleList(Layer() for _ in range(3))
    data = torch.randn(2, 5, 6)

    def stage(x: Tensor) -> Tensor:
        for layer in layers:
            x = CHECKPOINTS[kind](layer, x)
        return x.square().sum()

    def gradients() -> list[Tensor | None]:
        return [parameter.grad for parameter in layers.parameters()]

    torch.manual_seed(5)
    x = data.clone().requires_grad_()
    stage(x).backward()
    expected, x_expected = gradients(), x.grad

    for layer in layers:
        layer.zero_grad()
        layer.forwards = 0
    torch.manual_seed(5)
    x = data.clone().requires_grad_()
    store = WeightGradientStore()
    with SplitBackward(store):
        loss = stage(x)
    assert len(store) == 0
    with SplitBackward(store):
        backward(loss)
    assert [layer.forwards for layer in layers] == [2, 2, 2]
    assert len(store) == 6
    assert x_expected is not None and x.grad is not None and torch.equal(x.grad, x_expected)
    store.run(WholeGradients(add))
    assert [layer.forwards for layer in layers] == [2, 2, 2]
    for mine, autograds in zip(gradients(), expected):
        assert mine is not None and autograds is not None and torch.equal(mine, autograds)


def test_saved_tensors_may_live_elsewhere_meanwhile():
    """Offloading by hooks: what W needs comes back in B, and the parameter that gets the gradient is the real one."""
    torch.manual_seed(6)
    linear, x = nn.Linear(5, 3), torch.randn(4, 5, requires_grad=True)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.detach().clone()

    store = WeightGradientStore()
    with SplitBackward(store), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = linear(x).square().sum()
    assert any(tensor.data_ptr() == linear.weight.data_ptr() for tensor in packed)
    value.backward()
    store.run(WholeGradients(add))
    assert set(store.parameters()) == set()
    mine = [linear.weight.grad, linear.bias.grad]
    linear.zero_grad()
    linear(x).square().sum().backward()
    for one, two in zip(mine, [linear.weight.grad, linear.bias.grad]):
        assert one is not None and two is not None and torch.equal(one, two)


def test_the_linear_layers_inside_torchs_attention_are_split():
    torch.manual_seed(9)
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    store = split_step(lambda: attention(x, x, x, need_weights=False)[0].square().sum())
    assert set(store.parameters()) == set(attention.parameters())
    store.run(WholeGradients(add))
    mine = [parameter.grad for parameter in attention.parameters()]
    attention.zero_grad()
    attention(x, x, x, need_weights=False)[0].square().sum().backward()
    for one, parameter in zip(mine, attention.parameters()):
        assert one is not None and parameter.grad is not None and torch.equal(one, parameter.grad)


# Hooks


def test_a_weight_with_a_tensor_hook_stays_with_autograd():
    linear, calls = nn.Linear(5, 3), []
    linear.weight.register_hook(lambda gradient: calls.append(gradient.shape))
    store = split_step(lambda: linear(torch.randn(4, 5)).sum())
    assert len(store) == 0 and calls == [(3, 5)]
    assert linear.weight.grad is not None and linear.bias.grad is not None


def test_a_weight_with_a_post_accumulate_hook_stays_with_autograd():
    linear, calls = nn.Linear(5, 3), []
    linear.bias.register_post_accumulate_grad_hook(lambda parameter: calls.append(parameter.shape))
    store = split_step(lambda: linear(torch.randn(4, 5)).sum())
    assert len(store) == 0 and calls == [(3,)]


def test_the_hooks_that_deepspeed_sets_do_not_keep_a_weight_from_being_split():
    linear, calls = nn.Linear(5, 3), []

    def hook(parameter: nn.Parameter) -> None:
        calls.append(parameter)

    hook.__module__ = "deepspeed.runtime.zero.stage_1_and_2"
    for parameter in linear.parameters():
        deepspeed.utils.torch.register_grad_hook(parameter, hook)
    store = split_step(lambda: linear(torch.randn(4, 5)).sum())
    # They run as in DeepSpeed's own engine, and find nothing new.
    assert len(store) == 1 and len(calls) == 2 and linear.weight.grad is None


def test_a_hook_on_a_transposed_weight_runs():
    weight, calls = nn.Parameter(torch.randn(3, 5)), []

    def forward() -> Tensor:
        transposed = weight.t()
        transposed.register_hook(lambda gradient: calls.append(gradient.shape))
        return (torch.randn(4, 5) @ transposed).sum()

    assert len(split_step(forward)) == 0 and calls == [(5, 3)]


# What is left alone


def test_without_gradients_nothing_is_rerouted():
    linear, store = nn.Linear(5, 3), WeightGradientStore()
    with SplitBackward(store):
        with torch.no_grad():
            assert linear(torch.randn(4, 5)).grad_fn is None
        with torch.inference_mode():
            assert linear(torch.randn(4, 5)).is_inference()
    assert len(store) == 0


def test_torch_func_transforms_work_inside():
    weight, store = nn.Parameter(torch.randn(3, 5)), WeightGradientStore()
    x = torch.randn(4, 5)
    expected = torch.func.grad(lambda w: F.linear(x, w).square().sum())(weight.detach())
    with SplitBackward(store):
        gradient = torch.func.grad(lambda x: F.linear(x, weight).sum())(x)
        mapped = torch.func.vmap(lambda row: F.linear(row, weight))(x)
        of_weight = torch.func.grad(lambda w: F.linear(x, w).square().sum())(weight.detach())
    assert torch.equal(gradient, torch.ones(4, 3) @ weight)
    assert torch.allclose(mapped, x @ weight.t())
    assert torch.equal(of_weight, expected)
    assert len(store) == 0


def test_compiled_code_keeps_its_weight_gradients_in_b():
    torch.manual_seed(8)
    inner, outer, x = nn.Linear(5, 5), nn.Linear(5, 3), torch.randn(4, 5)
    compiled = torch.compile(inner, backend="aot_eager", fullgraph=True)
    store = split_step(lambda: outer(compiled(x)).square().sum())
    assert set(store.parameters()) == set(outer.parameters())
    store.run(WholeGradients(add))
    mine = [parameter.grad for parameter in (*inner.parameters(), *outer.parameters())]
    for module in (inner, outer):
        module.zero_grad()
    outer(inner(x)).square().sum().backward()
    for one, parameter in zip(mine, (*inner.parameters(), *outer.parameters())):
        assert one is not None and parameter.grad is not None and torch.equal(one, parameter.grad)


def test_subclasses_and_sparse_inputs_are_left_alone():
    class Tagged(Tensor):
        pass

    linear = nn.Linear(5, 3)
    assert len(split_step(lambda: linear(torch.randn(4, 5).as_subclass(Tagged)).sum())) == 0
    weight = nn.Parameter(torch.randn(5, 3))
    assert len(split_step(lambda: (torch.eye(5).to_sparse() @ weight).sum())) == 0


def test_complex_weights_are_left_alone():
    weight = torch.nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))
    store = WeightGradientStore()
    with SplitBackward(store):
        torch.nn.functional.linear(torch.randn(2, 4, dtype=torch.complex64), weight).abs().sum().backward()
    assert len(store) == 0 and weight.grad is not None


def test_an_embedding_with_a_sparse_gradient_is_left_alone():
    weight = nn.Parameter(torch.randn(5, 3))
    assert len(split_step(lambda: F.embedding(torch.tensor([1, 2]), weight, sparse=True).sum())) == 0
    assert weight.grad is not None and weight.grad.is_sparse


def test_a_weight_under_a_parametrization_is_left_alone():
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))
    assert len(split_step(lambda: linear(torch.randn(4, 5)).sum())) == 0
    assert all(parameter.grad is not None for parameter in linear.parameters())


# Errors


def test_writing_to_a_saved_input_before_b_is_torchs_own_error():
    linear, x, store = nn.Linear(5, 3), torch.randn(4, 5), WeightGradientStore()
    with SplitBackward(store):
        value = linear(x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_writing_to_a_kept_tensor_between_b_and_w_is_an_error():
    linear, x = nn.Linear(5, 3), torch.randn(4, 5, requires_grad=True) * 1
    store = split_step(lambda: linear(x).sum())
    x.detach().add_(1)
    with pytest.raises(RuntimeError, match="between its input-gradient pass"):
        store.run(WholeGradients(add))


def test_double_backward_of_a_users_function_is_refused():
    weight, x, store = nn.Parameter(torch.randn(5)), torch.randn(4, 5, requires_grad=True), WeightGradientStore()
    with SplitBackward(store):
        value = scale_step(weight, x)
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_a_second_backward_is_torchs_own_error():
    linear, store = nn.Linear(5, 3), WeightGradientStore()
    with SplitBackward(store):
        value = linear(torch.randn(4, 5)).sum()
    value.backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_wrong_arguments_raise_as_before():
    with SplitBackward(WeightGradientStore()):
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            F.linear(torch.randn(4, 5), nn.Parameter(torch.randn(3, 6)))
        with pytest.raises(TypeError):
            F.linear(torch.randn(4, 5))  # type: ignore[call-arg]
        with pytest.raises(AssertionError):
            F.embedding(torch.tensor([1]), nn.Parameter(torch.randn(3, 6)), padding_idx=7)


def test_no_input_gradient_is_computed_where_none_is_needed(monkeypatch: pytest.MonkeyPatch):
    from ds_vshape.split_backward import matrix

    calls: list[str] = []
    monkeypatch.setattr(matrix, "_left_gradient", lambda *_: calls.append("input"))
    linear = nn.Linear(5, 3)
    store = split_step(lambda: linear(torch.randn(4, 5)).sum())
    assert calls == [] and len(store) == 1


# Functions of the user's own


class Scale(SplitFunction):
    """x (n, h) times weight (h), and a record of which half ran when."""

    weight_arguments = (1,)
    saved_for_weight = (0,)
    log: ClassVar[list[str]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, factor: float) -> Tensor:
        Scale.log.append("F")
        ctx.save_for_backward(x, weight)
        ctx.factor = factor
        return x * weight * factor

    @staticmethod
    def backward_input(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        Scale.log.append("B")
        _, weight = ctx.saved_tensors
        ctx.scaled = gradient * ctx.factor
        return (ctx.scaled * weight if ctx.needs_input_grad[0] else None), None, None

    @staticmethod
    def backward_weight(ctx: Any, gradient: Tensor) -> Tensor:
        Scale.log.append("W")
        x, _ = ctx.saved_tensors
        return (ctx.scaled * x).sum(0)


@pytest.fixture(autouse=True)
def empty_log() -> None:
    Scale.log.clear()


def scale_step(weight: Tensor, x: Tensor) -> Tensor:
    return Scale.apply(x, weight, 3.0).square().sum()


def test_a_users_function_runs_both_halves_at_once_outside_a_split():
    weight, x = nn.Parameter(torch.randn(5)), torch.randn(4, 5, requires_grad=True)
    scale_step(weight, x).backward()
    assert Scale.log == ["F", "B", "W"]
    other, y = nn.Parameter(weight.detach().clone()), x.detach().requires_grad_()
    (y * other * 3.0).square().sum().backward()
    assert weight.grad is not None and other.grad is not None and x.grad is not None and y.grad is not None
    assert torch.allclose(weight.grad, other.grad) and torch.allclose(x.grad, y.grad)


def test_a_users_function_is_split_inside():
    weight, x = nn.Parameter(torch.randn(5)), torch.randn(4, 5, requires_grad=True)
    scale_step(weight, x).backward()
    expected, x_expected = weight.grad, x.grad
    weight.grad = x.grad = None
    Scale.log.clear()
    store = split_step(lambda: scale_step(weight, x))
    assert Scale.log == ["F", "B"] and store.parameters() == (weight,) and weight.grad is None
    store.run(WholeGradients(add))
    assert Scale.log == ["F", "B", "W"]
    assert expected is not None and torch.equal(weight.grad, expected)
    assert x_expected is not None and x.grad is not None and torch.equal(x.grad, x_expected)


@pytest.mark.parametrize("kind", ["computed", "hooked"])
def test_a_users_function_runs_at_once_where_its_weight_cannot_wait(kind: str):
    leaf = nn.Parameter(torch.randn(5))
    if kind == "hooked":
        leaf.register_hook(lambda gradient: None)
    store = split_step(lambda: scale_step(leaf * 1 if kind == "computed" else leaf, torch.randn(4, 5)))
    assert len(store) == 0 and Scale.log == ["F", "B", "W"] and leaf.grad is not None


def test_a_users_function_with_a_frozen_weight_owes_nothing():
    x = torch.randn(4, 5, requires_grad=True)
    store = split_step(lambda: scale_step(nn.Parameter(torch.randn(5), requires_grad=False), x))
    assert len(store) == 0 and x.grad is not None


class TwoOutputs(SplitFunction):
    """x -> (x weight, weight + shift): two outputs, and a gradient that is the output gradient itself."""

    weight_arguments = (1, 2)

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return x * weight, weight + shift

    @staticmethod
    def backward_input(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor | None, ...]:
        return first * ctx.saved_tensors[1], None, None

    @staticmethod
    def backward_weight(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return first * ctx.saved_tensors[0] + second, second


def test_a_gradient_that_is_not_the_functions_own_memory_is_copied():
    weight, shift = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))
    second_gradient, got = torch.ones(5), {}
    store = WeightGradientStore()
    with SplitBackward(store):
        first, second = TwoOutputs.apply(torch.randn(5, requires_grad=True), weight, shift)
        torch.autograd.backward([first, second], [torch.zeros(5), second_gradient])
    store.run(WholeGradients(lambda parameter, gradient: got.update({parameter: gradient})))
    got[shift].add_(1)
    assert torch.equal(second_gradient, torch.ones(5)) and torch.equal(got[weight], torch.ones(5))


def test_a_wrong_count_or_shape_of_weight_gradients_is_named():
    class Wrong(TwoOutputs):
        @staticmethod
        def backward_weight(ctx: Any, first: Tensor, second: Tensor) -> Any:
            return second if ctx.saved_tensors[0].dim() == 1 else (second, second.sum())

    for x, message in ((torch.randn(5), "1 gradients for its 2"), (torch.randn(1, 5), r"shape \(\) for a parameter")):
        weight, shift = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))
        store = split_step(lambda: sum(part.sum() for part in Wrong.apply(x, weight, shift)))  # noqa: B023
        with pytest.raises(RuntimeError, match=message):
            store.run(WholeGradients(add))


def test_what_a_users_function_saved_is_free_after_its_w():
    weight, store = nn.Parameter(torch.randn(5)), WeightGradientStore()
    x = torch.randn(4, 5)
    watched = weakref.ref(x.untyped_storage())
    with SplitBackward(store):
        scale_step(weight, x.clone()).backward()
    del x
    gc.collect()
    assert len(store) == 1
    store.run(WholeGradients(add))
    gc.collect()
    assert watched() is None and len(store) == 0


def test_the_table_of_operators_decides():
    linear, store = nn.Linear(5, 3), WeightGradientStore()
    without = {function: split for function, split in MATRIX_OPERATORS.items() if function is not F.linear}
    with SplitBackward(store, without):
        linear(torch.randn(4, 5)).sum().backward()
    assert len(store) == 0 and linear.weight.grad is not None
