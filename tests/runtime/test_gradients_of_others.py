"""Gradients that come from another backward than the engine's count, with every optimizer and schedule; and
weights that no optimizer holds are left alone.

The oracle is DeepSpeed's engine with one stage in fp32: gradients add up in `.grad`, as in a plain loop.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from pipelines import (BASE_SEED, BF16_ZERO0, BF16_ZERO1, BF16_ZERO1_FP32, FP32, FP32_ZERO1, VOCABULARY, Block, Job,
                       cross_entropy, data, specs)
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional
from universal import convert

import ds_vshape

BATCHES = range(3)
# A norm is told only where gradients are clipped, and this clips nothing.
CLIP = {"gradient_clipping": 1e9}
IMMEDIATE = {**BF16_ZERO1_FP32, "bf16": {"enabled": True, "immediate_grad_update": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}, "zero_optimization": {"stage": 1}}
NARROW = {**FP32_ZERO1, "data_types": {"grad_accum_dtype": "bf16"}}
# Each optimizer, and each place where gradients add up, with a schedule; the one that zeroes `.grad` with all of them.
JOBS: dict[str, tuple[dict[str, Any], str, bool, float]] = {
    "fp32": (FP32, "v-half", False, 1e-5),
    "fp32 ZeRO-1": (FP32_ZERO1, "v-zb", True, 1e-5),
    "fp32, sums in bf16": (NARROW, "zb-h1", False, 2e-2),
    "bf16": (BF16_ZERO0, "v-zb", True, 3e-2),
    "bf16 ZeRO-1": (BF16_ZERO1, "v-half", True, 3e-2),
    "bf16, sums in fp32": (BF16_ZERO1_FP32, "v-half", False, 3e-2),
    "bf16, sums in fp32, v-zb": (BF16_ZERO1_FP32, "v-zb", False, 3e-2),
    "bf16, sums in fp32, zb-h1": (BF16_ZERO1_FP32, "zb-h1", True, 3e-2),
    "bf16, sums in fp32, 1f1b": (BF16_ZERO1_FP32, "1f1b", False, 3e-2),
    "bf16, immediate": (IMMEDIATE, "v-half", True, 3e-2),
}


class Auxiliary(Block):
    """A block that trains its weights by losses of its own, too: by a backward in its forward, and by hand."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            with torch.enable_grad():
                (self.up(x.detach()).float().square().mean() + self.norm.weight.float().square().sum()).backward()
            with torch.no_grad():
                by_hand = 0.1 * self.norm.bias + 0.05
                self.norm.bias.grad = by_hand if self.norm.bias.grad is None else self.norm.bias.grad + by_hand
        return super().forward(x)


class Projecting(nn.Module):
    """A loss with weights of its own, of which some are split and others aren't."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(BASE_SEED)
        self.scale = nn.Parameter(torch.full((VOCABULARY,), 1.5))
        self.projection = nn.Linear(VOCABULARY, VOCABULARY)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        projected = self.projection(logits * self.scale)
        return functional.cross_entropy(projected.flatten(0, 1).float(), labels.flatten())


class Regularizing:
    """Between two batches a script lets the weights of the second block decay by a loss of its own."""

    def __init__(self, engine: Any) -> None:
        self._weights = [parameter for name, parameter in engine.module.named_parameters() if name.startswith("2.")]

    def __call__(self) -> None:
        if self._weights:
            sum(weight.float().square().sum() for weight in self._weights).mul(0.1).backward()


def chosen(block: type[nn.Module]) -> tuple[Any, ...]:
    return tuple(specs(5, block))


def job(schedule: str | None, fusion: bool, config: dict[str, Any], block: type[nn.Module], stages: int = 2) -> Job:
    section = None if schedule is None else {"name": schedule, "gradient_accumulation_fusion": fusion}
    return Job(section, stages, 5, {**config, **CLIP}, chosen(block))


def train_all(rank: int, jobs: list[Job],
              between: Callable[[Any], Any] | None) -> list[tuple[list[float], list[float]]]:
    """Losses and norms of each job."""
    # The accelerator says no where the processor has no instructions for it; torch computes it all the same.
    get_accelerator().is_fp16_supported = lambda: True
    results = []
    for one in jobs:
        print(one)
        engine = one.engine(loss_fn=Projecting())
        act = between(engine) if between else None
        losses, norms = [], []
        for batch in BATCHES:
            if act:
                act()
            losses.append(float(engine.train_batch(data(engine, batch))))
            norms.append(float(engine.get_global_grad_norm()))
        results.append((losses, norms))
    return results


def check(cases: dict[str, tuple[dict[str, Any], str, bool, float]], block: type[nn.Module],
          between: Callable[[Any], Any] | None) -> None:
    (oracle,), = run_ranks(1, train_all, [job(None, False, FP32_ZERO1, block, stages=1)], between)
    jobs = [job(schedule, fusion, config, block) for config, schedule, fusion, _ in cases.values()]
    results = run_ranks(2, train_all, jobs, between, timeout=240)
    for (name, (*_, rounding)), *of_ranks in zip(cases.items(), *results, strict=True):
        for losses, norms in of_ranks:
            assert losses == pytest.approx(oracle[0], rel=rounding), name
            assert norms == pytest.approx(oracle[1], rel=rounding), name


def test_backwards_in_a_forward_by_hand_and_between_batches() -> None:
    check(JOBS, Auxiliary, Regularizing)


def test_a_loss_function_with_weights() -> None:
    check({**JOBS, "fp16": (FP16, "v-half", False, 1e-2),
           "fp16, sums in fp32": ({**FP16, "data_types": {"grad_accum_dtype": "fp32"}}, "zb-h1", True, 1e-2)},
          Block, None)


# -- a loss function's weights in checkpoints

def with_loss(rank: int, one: Job, folder: str, saves: bool,
              module_only: bool = False) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of three batches after a checkpoint, and the loss function's state where it's computed."""
    engine = one.engine(loss_fn=Projecting())
    if saves:
        for batch in BATCHES:
            engine.train_batch(data(engine, batch))
        engine.save_checkpoint(folder)
    else:
        engine.load_checkpoint(folder, load_module_only=module_only)
    state = {name: value.clone() for name, value in engine.module.loss_fn.state_dict().items()}
    losses = [float(engine.train_batch(data(engine, 10 + batch))) for batch in BATCHES]
    return losses, state if engine.is_last_stage() else {}


def of_last(results: list[tuple[list[float], dict[str, Tensor]]]) -> tuple[list[float], dict[str, Tensor]]:
    (losses, state), = [result for result in results if result[1]]
    return losses, state


@pytest.mark.quick_cases("v-half-config0")
@pytest.mark.parametrize(["schedule", "config"], [("v-half", FP32), ("zb-h1", BF16_ZERO1_FP32)])
def test_a_loss_functions_weights_are_saved_and_loaded(schedule: str, config: dict[str, Any], tmp_path: Path) -> None:
    one = Job(schedule, 2, 3, config, chosen(Block))
    losses, state = of_last(run_ranks(2, with_loss, one, str(tmp_path), True))
    again, loaded = of_last(run_ranks(2, with_loss, one, str(tmp_path), False))
    assert again == losses
    assert state.keys() == loaded.keys() and all(torch.equal(state[name], loaded[name]) for name in state)
    # Weights alone, on another placement.
    _, loaded = of_last(run_ranks(2, with_loss, Job("1f1b", 2, 3, config, chosen(Block)), str(tmp_path), False,
                                  True))
    assert all(torch.equal(state[name], loaded[name]) for name in state)


@pytest.mark.slow
@pytest.mark.parametrize(["before", "after"], [("zb-h1", "v-half"), ("v-zb", "zb-h1")])
def test_a_loss_functions_weights_are_converted(before: str, after: str, tmp_path: Path) -> None:
    """By DeepSpeed's universal conversion, in which ranks that don't compute the loss have copies of the weights."""
    losses, _ = of_last(run_ranks(2, with_loss, Job(before, 2, 3, BF16_ZERO1, chosen(Block)), str(tmp_path), True))
    convert(tmp_path)
    universal = {**BF16_ZERO1, "checkpoint": {"load_universal": True}}
    again, _ = of_last(run_ranks(2, with_loss, Job(after, 2, 3, universal, chosen(Block)), str(tmp_path), False))
    assert again == losses


# -- weights that the optimizer doesn't hold

def train_part(rank: int, jobs: list[Job]) -> list[tuple[list[float], list[float], dict[str, Tensor]]]:
    """Losses, norms and weights where the optimizer gets some of the weights, and others are frozen for a while."""
    results = []
    for one in jobs:
        print(one)
        module_of = deepspeed.pipe.PipelineModule if one.schedule is None else ds_vshape.PipelineModule
        options = {} if one.schedule is None else {"config": one.ds_config()}
        module = module_of(one.specs(), num_stages=one.stages, loss_fn=cross_entropy, partition_method="uniform",
                           seed_layers=True, base_seed=BASE_SEED, **options)
        held = [parameter for name, parameter in module.named_parameters()
                if not ("up." in name and name.startswith(("1.", "4.")))]
        # Not held: frozen now, and trained later.
        frozen = [parameter for name, parameter in module.named_parameters() if "3.down" in name]
        for parameter in frozen:
            parameter.requires_grad_(False)
        engine, *_ = ds_vshape.initialize(model=module, model_parameters=[p for p in held if p.requires_grad],
                                          config=one.ds_config())
        first_block = [parameter for name, parameter in module.named_parameters() if name.startswith(("0.", "1."))]
        losses, norms = [], []
        for batch in range(5):
            # Progressive freezing and unfreezing.
            for parameter in frozen:
                parameter.requires_grad_(batch > 1)
            for parameter in first_block:
                parameter.requires_grad_(batch not in (1, 3))
            if batch:
                engine.reset_activation_shape()
            losses.append(float(engine.train_batch(data(engine, batch))))
            # DeepSpeed's engine tells none where the optimizer is torch's.
            norms.append(float(engine.get_global_grad_norm() or 0.0))
        results.append((losses, norms, {name: value.clone() for name, value in module.state_dict().items()}))
    return results


@pytest.mark.slow
def test_weights_in_no_optimizer_group() -> None:
    """As under DeepSpeed with one stage, in the same precision: they stay, and the norm leaves them out."""
    cases = {name: case for name, case in JOBS.items() if name != "fp32, sums in bf16"}
    alone = [job(None, False, config, Block, stages=1) for config, *_ in cases.values()]
    jobs = [job(schedule, fusion, config, Block) for config, schedule, fusion, _ in cases.values()]
    oracles, = run_ranks(1, train_part, alone, timeout=240)
    results = run_ranks(2, train_part, jobs, timeout=240)
    for name, oracle, *of_ranks in zip(cases, oracles, *results, strict=True):
        for losses, norms, weights in of_ranks:
            assert losses == pytest.approx(oracle[0], rel=cases[name][3]), name
            assert norms == pytest.approx(oracle[1], rel=cases[name][3]) or not any(oracle[1]), name
            for weight, value in weights.items():
                if weight.startswith(("1.up", "4.up")):
                    assert torch.equal(value, oracle[2][weight]), (name, weight)
