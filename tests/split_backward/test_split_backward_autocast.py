"""The split under autocast against autograd's own backward under the same autocast: bit for bit, and still deferred.

The oracle is the same computation without the mode. What makes it hard: autocast casts a weight once for all of its
uses, so that their gradients are summed in low precision before the sum is cast back.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec
from pipelines import (BATCHES, BF16_ZERO0, FP32, FP32_ZERO1, VOCABULARY, WIDTH, Block, Job, Outcome, merged, specs,
                       train)
from ranks import run_ranks
from split_cases import CASES, Case, Tied, upstream
from split_cases import train as train_split
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_vshape.runtime.gradients import InGrad
from ds_vshape.split_backward import (MATRIX_OPERATORS, Entry, GradientAccumulator, SplitBackward, SplitFunction,
                                      WeightGradientStore, WholeGradients)
from ds_vshape.split_backward.matrix import Linear

BF16, FP16, FP32_DTYPE = torch.bfloat16, torch.float16, torch.float32


class Under(nn.Module):
    """`inner` under autocast."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype = BF16, cache: bool = True) -> None:
        super().__init__()
        self.inner, self.dtype, self.cache = inner, dtype, cache

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype, cache_enabled=self.cache):
            return self.inner(x)


@pytest.mark.parametrize(("dtype", "autocast"), [(FP32_DTYPE, BF16), (FP32_DTYPE, FP16), (BF16, BF16), (BF16, FP16)],
                         ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_operator_equals_autograd_bit_for_bit(case: Case, dtype: torch.dtype, autocast: torch.dtype) -> None:
    torch.manual_seed(1)
    module, batches = Under(case.module(dtype), autocast), case.batches(dtype)
    split = train_split(module, batches, case.operators)
    split.assert_equal(train_split(module, batches))
    # A cast of a part of a tensor is whole, so that its bias needs no entry of its own.
    entries = 1 if case.name == "linear of a part" and dtype != autocast else case.entries
    assert split.entries == (entries * len(batches) if case.covered else 0)


def test_operands_of_64_bits_are_not_cast() -> None:
    torch.manual_seed(1)
    module = Under(nn.Linear(5, 3).double())
    batches = [torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    split = train_split(module, batches, MATRIX_OPERATORS)
    split.assert_equal(train_split(module, batches))
    assert split.entries == 3


class Uses(nn.Module):
    """A weight that is used in many ways, by a function of it and a leaf."""

    def __init__(self, function: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(6, 6), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear, x)


def off() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


def thrice(linear: nn.Linear, x: Tensor) -> Tensor:
    with torch.autocast("cpu", BF16):
        return linear(torch.tanh(linear(torch.tanh(linear(x))))) + x


def in_two_contexts(linear: nn.Linear, x: Tensor) -> Tensor:
    for _ in range(2):
        with torch.autocast("cpu", BF16):
            x = torch.tanh(linear(torch.tanh(linear(x)))) + x
    return x


def with_a_part_in_32_bits(linear: nn.Linear, x: Tensor) -> Tensor:
    with torch.autocast("cpu", BF16):
        x = torch.tanh(linear(x))
        with off():
            x = torch.tanh(linear(x.float()))
        return linear(x) + linear(torch.tanh(x))


def with_an_inner_context(linear: nn.Linear, x: Tensor) -> Tensor:
    with torch.autocast("cpu", BF16):
        x = torch.tanh(linear(x))
        with torch.autocast("cpu", BF16):
            x = torch.tanh(linear(x))
        return linear(x)


def with_an_inner_dtype(linear: nn.Linear, x: Tensor) -> Tensor:
    with torch.autocast("cpu", BF16):
        with torch.autocast("cpu", FP16, cache_enabled=False):
            x = torch.tanh(linear(torch.tanh(linear(x))))
        return linear(torch.tanh(linear(x)))


def without_the_cache_for_a_while(linear: nn.Linear, x: Tensor) -> Tensor:
    with torch.autocast("cpu", BF16):
        x = torch.tanh(linear(x))
        with torch.autocast("cpu", BF16, cache_enabled=False):
            x = torch.tanh(linear(torch.tanh(linear(x))))
        return linear(x)


def after_clearing_the_cache(linear: nn.Linear, x: Tensor) -> Tensor:
    with torch.autocast("cpu", BF16):
        x = torch.tanh(linear(torch.tanh(linear(x))))
        torch.clear_autocast_cache()
        return linear(torch.tanh(linear(x)))


def after_no_grad(linear: nn.Linear, x: Tensor) -> Tensor:
    with torch.autocast("cpu", BF16):
        with torch.no_grad():
            y = linear(x)
        return linear(x) * y + linear(torch.tanh(x))


def of_one_leaf(linear: nn.Linear, x: Tensor) -> Tensor:
    """As queries, keys and values: the leaf's gradients are summed in low precision too."""
    with torch.autocast("cpu", BF16):
        return torch.tanh(linear(x)) * linear(x) + linear(x) + x


def transposed(linear: nn.Linear, x: Tensor) -> Tensor:
    with torch.autocast("cpu", BF16):
        x = torch.tanh(x @ linear.weight.t() + linear(x))
        return torch.addmm(linear.bias, x, linear.weight.t()) + x @ linear.weight


USES = [thrice, in_two_contexts, with_a_part_in_32_bits, with_an_inner_context, with_an_inner_dtype,
        without_the_cache_for_a_while, after_clearing_the_cache, after_no_grad, of_one_leaf, transposed]


@pytest.mark.parametrize("around", [False, True], ids=["", "autocast around all batches"])
@pytest.mark.parametrize("function", USES, ids=lambda function: function.__name__)
def test_several_uses_are_summed_in_the_precision_of_autograd(function: Any, around: bool) -> None:
    torch.manual_seed(3)
    module = Uses(function)
    batches = [torch.randn(5, 6, requires_grad=True) for _ in range(3)]
    for _ in range(2):
        outcomes = []
        for operators in (None, MATRIX_OPERATORS):
            with torch.autocast("cpu", BF16) if around else nullcontext():
                outcomes.append(train_split(module, batches, operators))
        outcomes[1].assert_equal(outcomes[0])
        assert outcomes[1].entries >= 2 * len(batches)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0.9)


@pytest.mark.parametrize("function", [
    lambda linear, x: x.bfloat16() @ (linear.weight @ linear.weight.t()),
    lambda linear, x: x * F.linear(linear.bias, linear.weight),
    lambda linear, x: x * F.linear(linear.weight, linear.weight, linear.bias),
], ids=["matmul", "a bias by a weight", "linear"])
def test_a_weight_by_a_weight(function: Any) -> None:
    """The gradient of one of them would be an input gradient of the other's."""
    torch.manual_seed(3)
    module = Under(Uses(function))
    batches = [torch.randn(6, 6, requires_grad=True) for _ in range(3)]
    split = train_split(module, batches, MATRIX_OPERATORS)
    split.assert_equal(train_split(module, batches))


def test_sums_in_another_precision_would_differ() -> None:
    """Else the test above shows nothing: a cast for each use gives other sums than one for all."""
    gradients = []
    for cache in (True, False):
        torch.manual_seed(3)
        tied = Under(Tied(), cache=cache)
        gradients.append(train_split(tied, [torch.randint(0, 13, (2, 5))]).weight_gradients[1])
    assert gradients[0] is not None and gradients[1] is not None and not torch.equal(gradients[0], gradients[1])


def test_embedding_and_head() -> None:
    """The embedding's rows are 32 bits, the head's product is not."""
    torch.manual_seed(2)
    module = Under(Tied())
    batches = [torch.randint(0, 13, (2, 5)) for _ in range(4)]
    split = train_split(module, batches, MATRIX_OPERATORS)
    split.assert_equal(train_split(module, batches))
    assert split.entries == 5 * len(batches)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.dropout(F.gelu(self.up(self.norm(x)) * self.up(x)), 0.3))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, inside: bool) -> None:
        super().__init__()
        self.layers, self.reentrant, self.inside = nn.ModuleList(Layer() for _ in range(3)), reentrant, inside

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(8)
        for layer in self.layers:
            with nullcontext() if self.inside else torch.autocast("cpu", BF16):
                x = checkpoint(Under(layer) if self.inside else layer, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_checkpoints_are_recomputed_under_autocast(reentrant: bool, inside: bool) -> None:
    torch.manual_seed(4)
    module = Checkpointed(reentrant, inside)
    batches = [torch.randn(2, 5, 6, requires_grad=True) for _ in range(3)]
    split = train_split(module, batches, MATRIX_OPERATORS)
    split.assert_equal(train_split(module, batches))
    assert split.entries == 3 * 3 * len(batches)


@pytest.mark.parametrize("autocast_in_w", [False, True])
@pytest.mark.parametrize("autocast_in_b", [False, True])
def test_w_computes_as_autograd_did_in_b(autocast_in_b: bool, autocast_in_w: bool) -> None:
    """A backward under autocast multiplies in low precision what the forward did in 32 bits."""
    torch.manual_seed(5)
    linear, x = nn.Linear(6, 4), torch.randn(5, 6)
    gradients = []
    for split in (False, True):
        linear.zero_grad()
        store = WeightGradientStore()
        with SplitBackward(store) if split else nullcontext():
            value = torch.tanh(linear(x)).sum()
        with SplitBackward(store) if split else nullcontext(), torch.autocast("cpu", BF16, enabled=autocast_in_b):
            value.backward()
        assert len(store) == split
        with torch.autocast("cpu", BF16, enabled=autocast_in_w):
            store.run(WholeGradients(InGrad().add))
        gradients.append([parameter.grad for parameter in linear.parameters()])
    for mine, autograds in zip(*gradients, strict=True):
        assert mine is not None and autograds is not None and torch.equal(mine, autograds)


def test_casts_live_as_long_as_autocasts_own_and_not_until_w() -> None:
    linear, store, used = nn.Linear(6, 4), WeightGradientStore(), []

    def casts() -> set[int]:
        """Memory of the weights that the products so far were given, as far as it is alive."""
        gc.collect()
        return {reference().data_ptr() for reference in used if reference() is not None}

    class Watched(Linear):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            used.append(weakref.ref(weight.untyped_storage()))
            return Linear.forward(ctx, x, weight, bias)

    table = {F.linear: lambda store, x, weight, bias: Watched.apply_split(store, x, weight, bias)}
    with SplitBackward(store, table):
        with torch.autocast("cpu", BF16):
            linear(torch.randn(5, 6))
            value = linear(torch.randn(5, 6)).sum()
            assert len(used) == 2 and len(casts()) == 1, "one cast for both"
        assert len(casts()) == 1, "the graph needs it"
        value.backward()
    del value
    assert len(store) == 1 and not casts()


def test_a_layer_that_cannot_be_deferred_is_cast_by_autocast_alone() -> None:
    linear = nn.Linear(6, 4)
    linear.weight.register_hook(lambda gradient: None)
    store = WeightGradientStore()
    with SplitBackward(store), torch.autocast("cpu", BF16):
        linear(torch.randn(5, 6)).sum().backward()
    assert len(store) == 0 and linear.weight.grad is not None and linear.weight.grad.dtype is FP32_DTYPE


class Scale(SplitFunction):
    """A function of a user's own, which autocast doesn't cast: what it computes with is up to it."""

    weight_arguments = (1,)

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward_input(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ ctx.saved_tensors[1].t(), None

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward_weight(ctx: Any, gradient: Tensor) -> Tensor:
        return ctx.saved_tensors[0].t() @ gradient  # of 16 bits: autograd makes it the weight's 32


def test_a_function_of_the_users_own() -> None:
    torch.manual_seed(6)
    module = Under(Uses(lambda linear, x: Scale.apply(torch.tanh(x), linear.weight)))
    batches = [torch.randn(5, 6, requires_grad=True) for _ in range(3)]
    split = train_split(module, batches, MATRIX_OPERATORS)
    split.assert_equal(train_split(module, batches))
    assert split.entries == 3 and split.weight_gradients[0].dtype is FP32_DTYPE  # type: ignore[union-attr]


# Sums in place: of more bits than the products


def test_sums_in_place_are_no_further_from_exact_sums() -> None:
    """Sums of exactly these products in 64 bits say which is right: neither is off by more than its rounding."""
    torch.manual_seed(7)
    module = Under(Tied())
    batches = [torch.randint(0, 13, (2, 5)) for _ in range(8)]
    exact = {parameter: torch.zeros(parameter.shape, dtype=torch.float64) for parameter in module.parameters()}

    def gradients(accumulator: GradientAccumulator | None) -> list[Tensor | None]:
        module.zero_grad()
        for place, batch in enumerate(batches):
            store = WeightGradientStore()
            with SplitBackward(store) if accumulator else nullcontext():
                output = module(batch)
                output.backward(upstream(output, place))
            if accumulator:
                store.run(accumulator)
        return [parameter.grad for parameter in module.parameters()]

    def add(parameter: nn.Parameter, gradient: Tensor) -> None:
        exact[parameter] += gradient

    gradients(WholeGradients(add))
    for found in (gradients(None), gradients(WholeGradients(InGrad().add)), gradients(InGrad())):
        for total, gradient in zip(exact.values(), found, strict=True):
            assert gradient is not None and (total - gradient).norm() <= 2e-7 * total.norm()


# Models of transformers


def llama(tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied))


@pytest.mark.parametrize("recompute", [None, True, False], ids=["", "reentrant", "not reentrant"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_is_deferred(tied: bool, recompute: bool | None) -> None:
    pytest.importorskip("transformers")
    gradients = []
    for split in (False, True):
        model, deferred = llama(tied), set()
        if recompute is not None:
            model.activation_checkpointing_enable({"use_reentrant": recompute})
        for seed in range(2):
            tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(seed))
            store = WeightGradientStore()
            with SplitBackward(store) if split else nullcontext(), torch.autocast("cpu", BF16):
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            with SplitBackward(store) if split else nullcontext():
                loss.backward()
            deferred |= set(store.parameters())
            store.run(WholeGradients(InGrad().add))
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(mine, autograds) for autograds, mine in zip(*gradients, strict=True))
    share = sum(parameter.numel() for parameter in deferred) / sum(p.numel() for p in model.parameters())
    assert share > 0.95


# On the engine


class LowPrecision(Block):
    """A block under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16):
            return super().forward(x)


LAYERS = [LayerSpec(nn.Embedding, VOCABULARY, WIDTH), LayerSpec(LowPrecision), LayerSpec(Block),
          LayerSpec(LowPrecision), LayerSpec(nn.Linear, WIDTH, VOCABULARY)]
SECTION = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
# The config, the layers, and how far all batches together may lead elsewhere with sums in place, of the way they lead.
# Where sums have fewer bits, each rounding may flip a bit of a weight's cast.
ON_THE_ENGINE: dict[str, tuple[dict[str, Any], list[Any], float]] = {
    "a layer": (FP32, LAYERS, 1e-3),
    "a layer, bf16": (BF16_ZERO0, LAYERS, 0.3),
    "the section": (SECTION, specs(3), 1e-3),
    "the section, ZeRO-1": ({**FP32_ZERO1, **SECTION}, specs(3), 1e-3),
}


def train_each(rank: int, schedule: str | None) -> list[tuple[Outcome, Outcome, dict[str, Tensor], float]]:
    """For each config: the outcomes without and with sums in place, the weights at the start, and the share of weights
    that were deferred."""
    deferred: set[nn.Parameter] = set()
    add = WeightGradientStore.add

    def watched(store: WeightGradientStore, entry: Entry) -> None:
        add(store, entry)
        deferred.update(store.parameters())

    WeightGradientStore.add = watched  # type: ignore[method-assign]
    results = []
    for config, layers, _ in ON_THE_ENGINE.values():
        outcomes, start = [], {}
        for fusion in (False, True) if schedule else (False,):
            section = schedule and {"name": schedule, "gradient_accumulation_fusion": fusion}
            engine = Job(section, 2, 4, config, tuple(layers)).engine()
            start = {name: value.double() for name, value in engine.module.state_dict().items()}
            deferred.clear()
            outcomes.append(train(engine, BATCHES))
        weights = [parameter for parameter in engine.module.parameters() if parameter.dim() > 1]
        share = sum(weight in deferred for weight in weights) / len(weights)
        results.append((outcomes[0], outcomes[-1], start, share))
    return results


@pytest.mark.slow
def test_training_under_autocast() -> None:
    stock = run_ranks(2, train_each, None)
    for schedule in ("v-half", "v-zb", "zb-h1"):
        ours = run_ranks(2, train_each, schedule)
        for name, of_stock, of_ours in zip(ON_THE_ENGINE, zip(*stock, strict=True), zip(*ours, strict=True)):
            expected = merged([outcome for outcome, *_ in of_stock])
            exact = merged([outcome for outcome, *_ in of_ours])
            fused = merged([outcome for _, outcome, *_ in of_ours])
            start = {layer: weight for *_, weights, _ in of_ours for layer, weight in weights.items()}
            assert exact.losses == expected.losses, (schedule, name)
            tolerance = ON_THE_ENGINE[name][-1]
            assert fused.losses == pytest.approx(exact.losses, rel=tolerance), (schedule, name)
            for layer, weight in expected.weights.items():
                assert torch.equal(exact.weights[layer], weight), (schedule, name, layer)
                off = (fused.weights[layer].double() - weight.double()).norm()
                assert off <= tolerance * (weight.double() - start[layer]).norm(), (schedule, name, layer)
            # zb-h1's first stage runs each W right after its B: nothing is gained there by a split.
            shares = [share for *_, share in of_ours]
            assert max(shares) == 1 and (schedule == "zb-h1" or min(shares) == 1), (schedule, name, shares)
