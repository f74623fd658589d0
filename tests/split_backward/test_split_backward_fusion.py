"""Weight gradients added to their sums in place: the sums are autograd's to rounding, and nothing else is allocated.

The oracle is the same computation without the mode: an unsplit backward on the same weights and data.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pipelines import (BATCHES, BF16_ZERO0, BF16_ZERO1, BF16_ZERO1_FP32, FP32, FP32_ZERO1, Job, Outcome, specs,
                       tied_specs, train)
from ranks import run_ranks
from split_cases import CASES, DTYPES, Case, Operation, Tied, by_experts, grouped, in_their_dtypes, selected, upstream
from split_programs.steps import Scale
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ds_vshape.deepspeed_adapter.optimizers import GradAccumSums
from ds_vshape.runtime.gradients import InGrad, InGradAccum
from ds_vshape.schedule.passes import Kind, Pass
from ds_vshape.schedule.schedule import Schedule
from ds_vshape.split_backward import (MATRIX_OPERATORS, GradientAccumulator, SplitBackward, SplitFunction,
                                      WeightGradientStore, WholeGradients, accumulate, matrix)

# How far a sum may be from autograd's, of the sum: some roundings. A gradient left out or taken twice is far beyond.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}
FUSED_CASES = [case for case in CASES if case.covered and case.operators is MATRIX_OPERATORS]


def backward(module: nn.Module, batches: list[Tensor], accumulator: GradientAccumulator | None) -> list[Tensor]:
    """The outputs after a backward of each batch, split if there is an accumulator."""
    outputs = []
    for place, batch in enumerate(batches):
        store = WeightGradientStore()
        if accumulator is None:
            outputs.append(module(batch))
            outputs[-1].backward(upstream(outputs[-1], place))
        else:
            with SplitBackward(store):
                outputs.append(module(batch))
                outputs[-1].backward(upstream(outputs[-1], place))
            store.run(accumulator)
    return outputs


def distance(found: Tensor, wanted: Tensor, start: float | Tensor = 0.0) -> float:
    """How far `found` is from `wanted`, which is that far from `start`, both as norms: their ratio."""
    if torch.equal(found, wanted):
        return 0.0
    return float((found.double() - wanted.double()).norm() / (wanted.double() - start).norm())


def gradients(module: nn.Module, place: str = "grad") -> list[Tensor]:
    return [getattr(parameter, place).clone() for parameter in module.parameters()]


@in_their_dtypes(FUSED_CASES)
def test_a_sum_in_place_is_autograds_to_rounding(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    module, batches = case.module(dtype), case.batches(dtype)
    expected_outputs, expected = backward(module, batches, None), gradients(module)
    module.zero_grad()
    outputs = backward(module, batches, InGrad())
    assert all(torch.equal(one, two) for one, two in zip(outputs, expected_outputs, strict=True))
    for found, wanted in zip(gradients(module), expected, strict=True):
        assert found.dtype == wanted.dtype and found.stride() == wanted.stride()
        assert distance(found, wanted) < TOLERANCES[dtype]


@pytest.mark.parametrize("case", [case for case in FUSED_CASES if case.function in (F.linear, F.embedding, by_experts)],
                         ids=lambda case: case.name)
def test_a_sum_of_more_bits_than_the_products(case: Case) -> None:
    torch.manual_seed(1)
    module, batches = case.module(torch.bfloat16), case.batches(torch.bfloat16)
    expected = [torch.zeros(parameter.shape) for parameter in module.parameters()]
    for place, batch in enumerate(batches):
        module.zero_grad()
        output = module(batch)
        output.backward(upstream(output, place))
        for total, parameter in zip(expected, module.parameters(), strict=True):
            total += parameter.grad
    for parameter in module.parameters():
        parameter.grad_accum = None  # type: ignore[attr-defined]
    optimizer: Any = SimpleNamespace(gradient_accumulation_dtype=torch.float32, bit16_groups=[[*module.parameters()]])
    backward(module, batches, InGradAccum(GradAccumSums(optimizer)))
    for found, wanted in zip(gradients(module, "grad_accum"), expected, strict=True):
        assert found.dtype == torch.float32
        assert distance(found, wanted) < TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_uses_of_a_weight(dtype: torch.dtype) -> None:
    """An embedding's rows, its head's product, and a layer applied three times: each use is in the sum once."""
    torch.manual_seed(2)
    module = Tied().to(dtype)
    batches = [torch.randint(0, 13, (2, 5)) for _ in range(4)]
    backward(module, batches, None)
    expected = gradients(module)
    module.zero_grad()
    backward(module, batches, InGrad())
    for found, wanted in zip(gradients(module), expected, strict=True):
        assert distance(found, wanted) < TOLERANCES[dtype]


@pytest.mark.parametrize("pieces", [1, 2, 3, 9])
def test_w_in_pieces(pieces: int) -> None:
    torch.manual_seed(3)
    module, batches = Tied().double(), [torch.randint(0, 13, (2, 5)) for _ in range(3)]
    backward(module, batches, None)
    expected = gradients(module)
    module.zero_grad()
    for place, batch in enumerate(batches):
        store = WeightGradientStore()
        with SplitBackward(store):
            output = module(batch)
            output.backward(upstream(output, place))
        for piece in range(pieces):
            store.run_piece(piece, pieces, InGrad())
        assert len(store) == 0 and store.parameters() == () and not list(store.tensors())
    for found, wanted in zip(gradients(module), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_only_the_first_micro_batch_finds_no_sum() -> None:
    module, received = nn.Linear(3, 3), []

    class Watched(InGrad):
        def add(self, parameter: nn.Parameter, gradient: Tensor, /) -> None:
            received.append(parameter)
            super().add(parameter, gradient)

    backward(module, [torch.randn(2, 3) for _ in range(3)], Watched())
    assert [id(parameter) for parameter in received] == [id(module.weight)] + 3 * [id(module.bias)]


class Made(TorchDispatchMode):
    """Watches the sizes of what each operator makes; what it writes to isn't new."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in args if isinstance(tensor, Tensor)}
        if isinstance(value, Tensor) and value.untyped_storage()._cdata not in given:
            self.largest = max(self.largest, value.numel())
        return value


@pytest.mark.parametrize("function, x, weight", [
    (F.linear, torch.randn(2, 40), (50, 40)),
    (torch.matmul, torch.randn(2, 50), (50, 40)),
    (lambda x, w: w @ x, torch.randn(40, 2), (50, 40)),
    (torch.bmm, torch.randn(3, 2, 50), (3, 50, 40)),
    (lambda x, w: w.bmm(x), torch.randn(3, 40, 2), (3, 50, 40)),
    (lambda x, w: x @ w.mT, torch.randn(3, 2, 40), (3, 50, 40)),
    (by_experts, torch.randn(8, 40), (50, 4, 40)),
    (lambda x, w: selected(x, w, torch.bmm), torch.randn(6, 1, 4), (100, 4, 4)),
    (grouped, torch.randn(16, 40), (3, 40, 400)),
    (F.embedding, torch.tensor([3, 3, 5]), (500, 4)),
    (lambda x, w: F.embedding(x, w, padding_idx=3), torch.tensor([3, 3, 5]), (500, 4)),
])
def test_nothing_of_the_weights_size_is_made(function: Callable[..., Tensor], x: Tensor, weight: tuple) -> None:
    largest = {}
    for accumulator in (InGrad(), WholeGradients(InGrad().add)):
        module = Operation(function, weight)
        module.weights[0].grad, made = torch.ones(weight), Made()
        store = WeightGradientStore()
        with SplitBackward(store):
            module(x).sum().backward()
        with made:
            store.run(accumulator)
        largest[type(accumulator)] = made.largest
        assert module.weights[0].grad.sum() != torch.ones(weight).sum()
    size = torch.Size(weight).numel()
    assert largest[InGrad] < size / 10 and largest[WholeGradients] >= size


class ScaleInPlace(Scale):
    """Scale, with a way of its own to add to a sum."""

    @classmethod
    def accumulate_weight(cls, ctx: Any, buffers: Any, gradient: Tensor) -> Tensor | None:
        if buffers[0] is None:
            return cls.backward_weight(ctx, gradient)
        for row, of_row in zip(ctx.saved_tensors[0].flatten(0, -2), gradient.flatten(0, -2), strict=True):
            buffers[0].addcmul_(row, of_row)
        return None


@pytest.mark.parametrize("function", [Scale, ScaleInPlace])
def test_functions_of_the_users_own(function: type[SplitFunction]) -> None:
    torch.manual_seed(4)
    module = Operation(function.apply, (5,)).double()
    batches = [torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    backward(module, batches, None)
    expected = gradients(module)
    module.zero_grad()
    backward(module, batches, InGrad())
    torch.testing.assert_close(gradients(module), expected, rtol=1e-12, atol=1e-12)


# -- on the engine


def in_pieces(schedule: Schedule, pieces: int) -> Schedule:
    """The same order with each W cut into pieces."""
    orders = tuple(
        tuple(part for action in order for part in
              ([Pass(Kind.W, action.stage, action.micro_batch, piece, pieces) for piece in range(pieces)]
               if action.kind is Kind.W else [action]))
        for order in schedule.orders)
    return Schedule(schedule.name, schedule.placement, schedule.micro_batches, orders)


# Where gradients add up, the layers, pieces of W, and how far all batches together may lead elsewhere, of the way that
# they lead: Adam's steps are about equally long whatever a gradient's size, so a gradient near zero may step anywhere.
ON_THE_ENGINE = {
    "fp32 ZeRO-0": (FP32, specs(3), 1, 1e-5),
    "fp32 ZeRO-0, W in pieces": (FP32, specs(3), 2, 1e-5),
    "fp32 ZeRO-1, tied": (FP32_ZERO1, tied_specs(3), 1, 1e-5),
    "bf16 ZeRO-0, BF16_Optimizer": (BF16_ZERO0, specs(3), 1, 0.2),
    "bf16 ZeRO-1": (BF16_ZERO1, specs(3), 1, 0.2),
    "bf16 ZeRO-1, BF16_Optimizer with fp32 sums, tied": (BF16_ZERO1_FP32, tied_specs(3), 1, 0.2),
}


def test_training_with_sums_in_place() -> None:
    def body(rank: int) -> list[tuple[str, dict[str, Tensor], list[Outcome], list[int]]]:
        added = [0]
        in_place, by_rows = accumulate.add_product, accumulate.add_rows
        matrix.add_product = lambda *given: _count(added, in_place(*given))  # type: ignore[assignment]
        matrix.add_rows = lambda *given: _count(added, by_rows(*given))  # type: ignore[assignment]
        results = []
        for name, (config, layers, pieces, _) in ON_THE_ENGINE.items():
            outcomes, counts = [], []
            for fusion in (False, True):
                section = {"name": "v-zb", "gradient_accumulation_fusion": fusion}
                engine = Job(section, 2, 4, config, tuple(layers)).engine()
                if pieces > 1:
                    engine.use_schedule(in_pieces(engine.schedule(), pieces))
                start = {name: value.double() for name, value in engine.module.state_dict().items()}
                added[0] = 0
                outcomes.append(train(engine, BATCHES))
                counts.append(added[0])
            results.append((name, start, outcomes, counts))
        return results

    of_ranks = run_ranks(2, body)
    for case in zip(*of_ranks, strict=True):
        # Where sums have more bits than products, a CPU adds the rows of the embedding alone in place: on rank 0.
        assert sum(counts[0] for *_, counts in case) == 0 < sum(counts[1] for *_, counts in case), case[0][0]
        for name, start, (exact, fused), _ in case:
            tolerance = ON_THE_ENGINE[name][-1]
            assert fused.losses == pytest.approx(exact.losses, rel=tolerance), name
            for layer, weight in exact.weights.items():
                assert distance(fused.weights[layer], weight, start[layer]) < tolerance, f"{name}: {layer}"


def _count(total: list[int], added: bool) -> bool:
    total[0] += added
    return added
