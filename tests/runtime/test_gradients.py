"""Late weight gradients land where each of DeepSpeed's optimizers accumulates; clipping counts the whole model once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, ReduceTiedGrads
from deepspeed.runtime.pipe.topology import (PipeDataParallelTopology, PipelineParallelGrid,
                                             PipeModelDataParallelTopology)
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from instruction_functions import around_instruction
from ranks import run_ranks
from torch import Tensor, nn

from ds_vshape.runtime.gradients import InGrad, accumulator_of, clip_gradients, leave_to_backward, place_of
from ds_vshape.split_backward import SplitBackward, WeightGradientStore, is_deferrable

MICRO_BATCHES = 4


class Block(nn.Module):
    """Weights that are split and a scale that is not, so that both B and W compute gradients."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.full((width,), 1.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x)) * self.scale


BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "initial_scale_power": 8}}
ZERO_1, SUM_IN_FP32 = {"zero_optimization": {"stage": 1}}, {"data_types": {"grad_accum_dtype": "fp32"}}

# The config, its optimizer, and where that one accumulates.
CASES: dict[str, tuple[dict[str, Any], type, str]] = {
    "fp32 ZeRO-0": ({}, torch.optim.Adam, "grad"),
    "fp32 ZeRO-1": (ZERO_1, DeepSpeedZeroOptimizer, "grad"),
    "bf16 ZeRO-0": (BF16, BF16_Optimizer, "buffer"),
    "bf16 ZeRO-1": ({**BF16, **ZERO_1}, DeepSpeedZeroOptimizer, "grad"),
    "bf16 ZeRO-1, sums in fp32": ({**BF16, **ZERO_1, **SUM_IN_FP32}, BF16_Optimizer, "buffer"),
    "fp16 ZeRO-1": ({**FP16, **ZERO_1}, DeepSpeedZeroOptimizer, "grad"),
    "fp16 ZeRO-1, sums in fp32": ({**FP16, **ZERO_1, **SUM_IN_FP32}, DeepSpeedZeroOptimizer, "grad_accum"),
}


def accumulated(engine: Any, place: str) -> dict[str, Tensor | None]:
    """What the engine's optimizer has summed up for each parameter."""
    optimizer = engine.optimizer
    found = {}
    for name, parameter in engine.module.named_parameters():
        if place == "buffer":
            index, = (index for index, other in enumerate(optimizer.bf16_groups[0]) if other is parameter)
            assert optimizer.fp32_groups_has_gradients[0][index]
            found[name] = optimizer.fp32_groups_gradients[0][index].clone()
        else:
            found[name] = getattr(parameter, place).clone()
    return found


def train(config: dict[str, Any], kind: type, place: str, delay: int | None,
          fusion: bool = False) -> list[dict[str, Tensor]]:
    """Two batches on DeepSpeed's own engine: the accumulated gradients of each, and the weights after both.

    With a `delay` the backward is split, and W of a micro-batch comes that many backwards later, or at the end.
    """
    # The accelerator says no where the processor has no instructions for it; torch computes it all the same.
    get_accelerator().is_fp16_supported = lambda: True
    layers = [LayerSpec(nn.Embedding, 11, 8), *[LayerSpec(Block, 8)] * 2, LayerSpec(nn.Linear, 8, 3)]
    module = deepspeed.pipe.PipelineModule(layers, num_stages=1, seed_layers=True, partition_method="uniform",
                                           loss_fn=lambda x, y: nn.functional.mse_loss(x.float(), y))
    adam = {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}}
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": MICRO_BATCHES, "optimizer": adam,
              "gradient_clipping": 0.0, **config}
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
    assert isinstance(engine.optimizer, kind)
    accumulator, stores, results = accumulator_of(place_of(engine.optimizer), fusion), [], []

    def split_forward(forward: Callable[[], None]) -> None:
        stores.append(WeightGradientStore())
        with SplitBackward(stores[-1]):
            forward()

    def split_backward(backward: Callable[[], None]) -> None:
        backward()
        assert len(stores[-1]) > 0, "nothing was split"
        while len(stores) > delay:
            stores.pop(0).run(accumulator)

    def end_of_backwards(reduce_tied: Callable[[], None]) -> None:
        while stores:
            stores.pop(0).run(accumulator)
        results.append(accumulated(engine, place))
        reduce_tied()

    around_instruction(engine, ReduceTiedGrads, end_of_backwards)
    if delay is not None:
        around_instruction(engine, ForwardPass, split_forward)
        around_instruction(engine, BackwardPass, split_backward)
    random = torch.Generator().manual_seed(5)
    for _ in range(2):
        engine.train_batch(iter([(torch.randint(11, (2, 6), generator=random), torch.randn(2, 6, 3, generator=random))
                                 for _ in range(MICRO_BATCHES)]))
    return [*results, {name: parameter.detach().clone() for name, parameter in module.named_parameters()}]


@pytest.mark.parametrize("case", CASES)
def test_late_gradients_sum_up_as_an_unsplit_backward(case: str) -> None:
    def body(rank: int) -> list[list[dict[str, Tensor]]]:
        return [train(*CASES[case], delay) for delay in (None, 0, 1, MICRO_BATCHES)]

    (unsplit, *split), = run_ranks(1, body)
    assert all(grad.count_nonzero() > 0 for grads in unsplit for grad in grads.values())
    for other in split:
        for expected, found in zip(unsplit, other, strict=True):
            assert expected.keys() == found.keys()
            for name in expected:
                assert expected[name].dtype == found[name].dtype
                assert torch.equal(expected[name], found[name]), name


@pytest.mark.parametrize("case", CASES)
def test_products_added_to_their_sums_in_place(case: str) -> None:
    """The sums of the first batch, to the rounding of the narrower type; in fp32 the weights too."""
    def body(rank: int) -> list[list[dict[str, Tensor]]]:
        return [train(*CASES[case], None), *(train(*CASES[case], delay, fusion=True) for delay in (0, MICRO_BATCHES))]

    (unsplit, *fused), = run_ranks(1, body)
    fp32 = case.startswith("fp32")
    for other in fused:
        for expected, found in list(zip(unsplit, other, strict=True))[:None if fp32 else 1]:
            for name in expected:
                assert expected[name].dtype == found[name].dtype
                far = (expected[name].double() - found[name].double()).norm()
                assert far < (1e-6 if fp32 else 1e-2) * expected[name].double().norm(), name


def test_a_first_gradient_is_kept_and_later_ones_are_added() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3))
    first = torch.ones(2, 3)
    InGrad().add(parameter, first)
    assert parameter.grad is first
    InGrad().add(parameter, torch.full((2, 3), 2.0))
    assert parameter.grad is first and torch.equal(first, torch.full((2, 3), 3.0))
    assert not first.requires_grad


def test_a_transposed_gradient_becomes_one_that_can_be_flattened() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3))
    gradient = torch.arange(6.0).view(3, 2).t()
    InGrad().add(parameter, gradient)
    assert torch.equal(parameter.grad.view(-1), gradient.reshape(-1))


def test_a_gradient_is_added_to_a_sparse_one() -> None:
    """As of an embedding with sparse gradients whose weight is also that of a product."""
    parameter = nn.Parameter(torch.zeros(4, 3))
    nn.functional.embedding(torch.tensor([1, 1, 3]), parameter, sparse=True).sum().backward()
    sparse = parameter.grad.to_dense()
    assert InGrad().buffer(parameter) is None
    InGrad().add(parameter, torch.ones(4, 3))
    assert torch.equal(parameter.grad, sparse + 1)
    assert InGrad().buffer(parameter) is parameter.grad


# -- clipping


def plain_model(scale: float) -> dict[str, nn.Parameter]:
    """The whole model's parameters with gradients; "tied" is one that two pipeline ranks hold."""
    random = torch.Generator().manual_seed(1)
    parameters = {}
    for name, shape in (("first", (4, 5)), ("tied", (7,)), ("last", (3, 3)), ("bias", (3,)), ("frozen", (2,))):
        parameters[name] = nn.Parameter(torch.zeros(shape))
        parameters[name].ds_pipe_replicated = False
        if name != "frozen":
            parameters[name].grad = scale * torch.randn(shape, generator=random)
    return parameters


@pytest.mark.parametrize("scale, max_norm", [(1.0, 1.0), (1.0, 1e-3), (1e-4, 1.0), (1e3, 2.5)])
def test_clipping_is_that_of_the_whole_model(scale: float, max_norm: float) -> None:
    held = [("first", "tied"), ("tied", "last", "bias", "frozen")]

    def body(rank: int) -> tuple[float, dict[str, Tensor | None]]:
        grid = PipelineParallelGrid(PipeDataParallelTopology(2, 1))
        model = plain_model(scale)
        model["tied"].ds_pipe_replicated = rank > 0
        norm = clip_gradients((model[name] for name in held[rank]), max_norm, grid)
        return norm, {name: model[name].grad for name in held[rank]}

    whole = plain_model(scale)
    expected = torch.nn.utils.clip_grad_norm_(whole.values(), max_norm)
    for norm, grads in run_ranks(2, body):
        assert norm == pytest.approx(float(expected), rel=1e-6)
        for name, grad in grads.items():
            if name == "frozen":
                assert grad is None
            else:
                torch.testing.assert_close(grad, whole[name].grad, rtol=1e-6, atol=0)
                assert float(expected) > max_norm or torch.equal(grad, plain_model(scale)[name].grad)


def test_clipping_where_a_rank_has_no_gradients() -> None:
    def body(rank: int) -> float:
        grid = PipelineParallelGrid(PipeDataParallelTopology(2, 1))
        model = plain_model(1.0)
        return clip_gradients(model.values() if rank else [model["frozen"]], 1.0, grid)

    expected = float(torch.nn.utils.clip_grad_norm_(plain_model(1.0).values(), 1.0))
    assert run_ranks(2, body) == [pytest.approx(expected, rel=1e-6)] * 2


def test_clipping_counts_what_tensor_parallel_ranks_share_once() -> None:
    def body(rank: int) -> tuple[float, Tensor, Tensor]:
        grid = PipelineParallelGrid(PipeModelDataParallelTopology(num_pp=1, num_mp=2, num_dp=1))
        model = plain_model(1.0)
        # Each rank holds some rows of "first" and "tied", and all of "last".
        rows, shared = nn.Parameter(torch.zeros(2, 5)), model["last"]
        rows.ds_pipe_replicated, rows.tensor_model_parallel = False, True
        rows.grad = model["first"].grad[2 * rank:2 * rank + 2].clone()
        return clip_gradients([rows, shared], 1.0, grid), rows.grad, shared.grad

    whole = plain_model(1.0)
    expected = float(torch.nn.utils.clip_grad_norm_([whole["first"], whole["last"]], 1.0))
    for rank, (norm, rows, shared) in enumerate(run_ranks(2, body)):
        assert norm == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(rows, whole["first"].grad[2 * rank:2 * rank + 2], rtol=1e-6, atol=0)
        torch.testing.assert_close(shared, whole["last"].grad, rtol=1e-6, atol=0)


def test_only_what_the_optimizer_holds_is_deferred() -> None:
    """Another optimizer may hold other weights."""
    first, second = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    for held in ([first], [second], [first, second]):
        leave_to_backward([first, second], InGrad(held))
        assert [weight for weight in (first, second) if is_deferrable(weight)] == held
