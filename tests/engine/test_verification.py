"""`"verify_gradients": true` changes nothing where the split is right, and ends the job where it isn't."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec
from deepspeed.runtime.pipe.module import PipelineError
from internals import wrap_accumulator
from logged import lines_of
from parallel_pipelines import MODEL, parallel_engine
from pipelines import (BF16_ZERO0, BF16_ZERO1, BF16_ZERO1_FP32, FP32, FP32_ZERO1, SAMPLES, VOCABULARY, WIDTH, Block,
                       Dropping, Job, micro_batch, tied_specs, train)
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional

from ds_vshape.engine.comparison import compare, tolerance
from ds_vshape.models.gpt import gpt_layers
from ds_vshape.schedule.builders.fuse import with_whole_backwards
from ds_vshape.schedule.lowering import lower
from ds_vshape.schedule.named import build
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.proofs import deadlock
from ds_vshape.schedule.schedule import check
from ds_vshape.schedule.timeline import Times
from ds_vshape.split_backward import SplitFunction
from ds_vshape.split_backward.mode import active_store

BATCHES = 5
FP16_ZERO1 = {"fp16": {"enabled": True, "initial_scale_power": 40}, "zero_optimization": {"stage": 1}}
ADAPTIVE = {"name": "adaptive", "memory_limit": 0.9, "planning_seconds": 0.5}


class Stateful(Block):
    """A block with state of all kinds: a norm's running statistics, counters, a tensor, a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(WIDTH, affine=False)
        self.calls, self.seen = 0, [0.0]
        self.random, self.generator = random.Random(1), torch.Generator().manual_seed(2)
        self.mean = torch.zeros(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(float(x.detach().sum()))
        self.mean = 0.9 * self.mean + 0.1 * x.detach().float().mean((0, 1))
        noise = torch.rand(WIDTH, generator=self.generator) * self.random.random() / (self.calls + len(self.seen))
        normed = self.batch_norm(x.transpose(1, 2).float()).transpose(1, 2).to(x.dtype)
        return super().forward(x) + functional.dropout(normed, 0.3) * (noise + self.mean).to(x.dtype)


def layers() -> tuple[Any, ...]:
    blocks = [LayerSpec(kind) for kind in (Stateful, Dropping, Block, Stateful, Block, Block)]
    return (LayerSpec(nn.Embedding, VOCABULARY, WIDTH), *blocks, LayerSpec(nn.Linear, WIDTH, VOCABULARY))


def dropping() -> tuple[Any, ...]:
    return (*layers()[:1], *[LayerSpec(Dropping)] * 6, *layers()[-1:])


def endless(replica: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches that draw random numbers on the host."""
    number = 0
    while True:
        tokens, labels = micro_batch(number, random.randrange(100), replica)
        yield (tokens + torch.randint(2, tokens.shape)) % VOCABULARY, labels
        number += 1


def state(engine: Any) -> list[Any]:
    """All that a batch changes: weights, buffers, moments, random numbers, state of layers, DeepSpeed's counters."""
    module, optimizer = engine.module, engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    found: list[Any] = [*module.state_dict().values(), torch.get_rng_state(), random.getstate()[1]]
    for of_weight in inner.state.values():
        found += [value for _, value in sorted(of_weight.items())]
    for layer in module.modules():
        if isinstance(layer, Stateful):
            found += [layer.calls, layer.seen, layer.mean, layer.random.getstate()[1], layer.generator.get_state()]
    found += [value for owner in (engine, optimizer) for name, value in sorted(vars(owner).items())
              if isinstance(value, (bool, int, float)) and name not in ("iteration",)]
    scaler = getattr(optimizer, "loss_scaler", None)
    return found + ([value for _, value in sorted(vars(scaler).items())] if scaler is not None else [])


def trained(job: Job, **options: Any) -> tuple[list[float], list[Any], list[str]]:
    random.seed(3)
    torch.manual_seed(4)
    engine = job.engine(**options)
    data = endless(engine.grid.get_data_parallel_rank())
    run = lambda: [float(engine.train_batch(data)) for _ in range(BATCHES)]  # noqa: E731
    losses, lines = lines_of(run, "verify_gradients")
    if hasattr(engine, "settle"):
        engine.settle()
    return losses, [*state(engine), next(data)[0]], lines


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def with_and_without(rank: int, cases: list[tuple[Any, dict[str, Any], dict[str, Any]]], micro_batches: int = 4,
                     specs: Any = None) -> list[list[str]]:
    told = []
    for section, config, options in cases:
        section = {"name": section} if isinstance(section, str) else section
        job = partial(Job, stages=2, micro_batches=micro_batches, config=config, layers=specs or layers())
        losses, without, nothing = trained(job(section), **options)
        verified_losses, verified, lines = trained(job({**section, "verify_gradients": True}), **options)
        assert verified_losses == losses and nothing == []
        assert len(verified) == len(without)
        differing = [place for place, pair in enumerate(zip(verified, without)) if not same(*pair)]
        assert not differing, (section, config, differing)
        told.append(lines)
    return told


EXACT = [("v-half", FP32, {}), ("v-zb", BF16_ZERO1_FP32, {}),
         ("zb-h1", BF16_ZERO1, {"activation_checkpoint_interval": 1})]
MORE = [("v-zb", FP32_ZERO1, {}), ("v-half", BF16_ZERO1_FP32, {"activation_checkpoint_interval": 1}),
        ("v-half", BF16_ZERO0, {}), (ADAPTIVE, FP32_ZERO1, {}), ("zb-h1", FP32, {"dynamic_shape": True})]


@pytest.mark.parametrize("cases", [EXACT, pytest.param(MORE, marks=pytest.mark.slow)])
def test_nothing_changes_and_all_agrees_bit_for_bit(cases: list[Any]) -> None:
    told, nothing = run_ranks(2, with_and_without, cases)
    assert nothing == [[] for _ in cases]
    for (line,), case in zip(told, cases, strict=True):
        assert "in training batch 3 the losses of 4 micro-batches and" in line and line.endswith("bit for bit"), case


@pytest.mark.slow
def test_with_fusion_sums_agree_to_rounding() -> None:
    cases = [({"name": name, "gradient_accumulation_fusion": True}, config, {})
             for name, config in [("v-half", FP32), ("v-zb", BF16_ZERO1), ("zb-h1", BF16_ZERO1_FP32)]]
    told, _ = run_ranks(2, with_and_without, cases)
    assert all("bit for bit" in line for line, in told)


@pytest.mark.slow
def test_with_post_validation_and_replicas() -> None:
    ahead = {"name": "v-zb", "optimizer_post_validation": True}
    told = run_ranks(4, stepping_ahead, ahead)[0]
    assert len(told) == 4 and all(line.endswith("bit for bit") for line, in told)


def stepping_ahead(rank: int, ahead: Any) -> list[list[str]]:
    # A batch that is given up leaves the counters of its layers as they are, with the key or without.
    given_up = [(ahead, {**FP32_ZERO1, "gradient_clipping": 0.1}, {}), (ahead, BF16_ZERO1, {})]
    return with_and_without(rank, given_up, specs=dropping()) + with_and_without(
        rank, [("v-half", FP32_ZERO1, {}), ("v-half", FP32, {})])


def test_an_overflow_puts_it_off() -> None:
    """A loss scale that is too high by far: gradients are infinite in the first batches."""
    cases = [("v-half", FP16_ZERO1, {})]
    told = run_ranks(2, overflowing, cases)[0]
    assert told == [[]]


def overflowing(rank: int, cases: list[Any]) -> list[list[str]]:
    # The accelerator says no where the processor has no instructions for it; torch computes it all the same.
    get_accelerator().is_fp16_supported = lambda: True
    return with_and_without(rank, cases, specs=dropping())


def in_parallel(rank: int) -> tuple[list[str], bool]:
    found = []
    for section in {"name": "v-zb"}, {"name": "v-zb", "verify_gradients": True}:
        engine = parallel_engine(Job(section, 2, 3, FP32_ZERO1, tuple(gpt_layers(MODEL))), 1, "uniform")
        outcome, lines = lines_of(lambda engine=engine: train(engine, range(BATCHES)), "verify_gradients")
        found.append(outcome)
    without, verified = found
    return lines, without.losses == verified.losses and all(
        torch.equal(weight, without.weights[name]) for name, weight in verified.weights.items())


@pytest.mark.slow
def test_tensor_parallel_layers() -> None:
    ((line,), equal), *others = run_ranks(4, in_parallel)
    assert line.endswith("bit for bit") and "on 4 ranks" in line
    assert equal and others == [([], True)] * 3


@pytest.mark.slow
def test_tied_layers() -> None:
    told = run_ranks(2, with_and_without, [("v-half", FP32, {}), ("zb-h1", FP32_ZERO1, {})], 4, tuple(tied_specs(6)))[0]
    assert all("bit for bit" in line for line, in told)


# -- faults


class InMemory(torch.autograd.Function):
    """The identity, whose value lies in `memory`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, memory: Tensor) -> Tensor:
        memory.numpy()[:] = x.detach().numpy()
        return memory.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Reusing(Block):
    """Puts what its product needs where the next forward puts its own."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = torch.zeros(SAMPLES, 3, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.down(self.up(InMemory.apply(x, self.memory)))


class WrongHalf(SplitFunction):
    """x * weight, with a weight gradient that depends on how many backwards its layer has run by then."""

    weight_arguments = (1,)

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: LateFactor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return x * weight

    @staticmethod
    def backward_input(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.layer.backwards += 1
        return grad * ctx.saved_tensors[1], None, None

    @staticmethod
    def backward_weight(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.layer.backwards * (grad * ctx.saved_tensors[0]).sum((0, 1))


class LateFactor(Block):
    """A layer whose weight gradient depends on when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(WrongHalf.apply(x, self.scale, self))


class DependsOnSplit(torch.autograd.Function):
    """The identity, whose gradient is another one where a backward is split."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1.0 if active_store() is None else 1.01)


class Looking(Block):
    """A layer whose input gradient depends on whether its backward is split."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(DependsOnSplit.apply(x))


class OnlySplit(Block):
    """A layer that runs where its backward is split, and nowhere else."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and active_store() is None:
            raise ValueError("not without a split")
        return super().forward(x)


def scaled_delivery(engine: Any) -> None:
    """What W gives is too large by a hundredth."""
    wrap_accumulator(engine, lambda parameter, gradient, deliver: deliver(
        parameter, gradient * (1.01 if parameter.shape == (2 * WIDTH, WIDTH) else 1.0)))


# The faulty layer, and what the errors of all ranks name.
FAULTS: dict[str, tuple[type[Block], str]] = {
    "memory": (Reusing, r"the gradient of \d\.up\.weight \(Reusing, stage 1\) differs"),
    "half": (LateFactor, r"the gradient of \d\.scale \(LateFactor, stage 1\) differs from that of whole backwards"),
    "input gradient": (Looking, r"the gradient of 2\.down\.weight \(Block, stage 1\) differs"),
    "accumulator": (Block, r"\.up\.weight \(Block, stage \d\) differs from that of whole backwards by 0\.0"),
    "whole": (OnlySplit, "the batch runs as scheduled, and fails with whole backwards: .*: not without a split"),
}


class Global(Block):
    """A layer with state that a snapshot doesn't find."""

    calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        Global.calls.append(1)
        return super().forward(x) * len(Global.calls)


FAULTS["global"] = Global, "6 of 6 losses differ, the first is .* state that isn't put back"


def with_a_fault(rank: int, cases: list[tuple[str, Any, bool]]) -> list[list[str]]:
    told = []
    for fault, name, fusion in cases:
        section = {**(name if isinstance(name, dict) else {"name": name}), "verify_gradients": True,
                   "gradient_accumulation_fusion": fusion}
        faulty = 5 if name == "zb-h1" else 3
        blocks = [LayerSpec(FAULTS[fault][0] if place == faulty else Block) for place in range(1, 7)]
        specs = (LayerSpec(nn.Embedding, VOCABULARY, WIDTH), *blocks, LayerSpec(nn.Linear, WIDTH, VOCABULARY))
        engine = Job(section, 2, 6, FP32, specs).engine()
        if fault == "accumulator":
            scaled_delivery(engine)
        data, errors = endless(0), []
        for _ in range(2):
            engine.train_batch(data)
        weights = [parameter.detach().clone() for parameter in engine.module.parameters()]
        for _ in range(2):
            with pytest.raises(PipelineError) as error:
                engine.train_batch(data)
            errors.append("\n".join([str(error.value), *getattr(error.value, "__notes__", ())]))
        assert engine.global_steps == 2
        assert all(map(torch.equal, weights, engine.module.parameters()))
        told.append(errors)
    return told


@pytest.mark.parametrize("cases", [
    [("memory", "v-half", False), ("half", "v-zb", True), ("input gradient", "v-half", True), ("whole", "v-zb", False)],
    pytest.param([("memory", "zb-h1", True), ("half", "v-half", False), ("accumulator", "v-half", False),
                  ("accumulator", ADAPTIVE, True), ("global", "v-half", False)], marks=pytest.mark.slow)])
def test_faults_end_the_job_on_every_rank(cases: list[Any]) -> None:
    """Named with parameter, layer, stage and rank, how far off, and what to do; nothing is stepped."""
    for case, *errors in zip(cases, *run_ranks(2, with_a_fault, cases), strict=True):
        for error in [error for of_rank in errors for error in of_rank]:
            assert re.search(FAULTS[case[0]][1], error), (case, error)
            assert ("Look at the highest stage first" in error) is (case[0] != "whole")


def data_that_end(rank: int) -> list[str]:
    engine = Job({"name": "v-half", "verify_gradients": True}, 2, 4, FP32, layers()).engine()
    data = endless(0)
    for _ in range(2):
        engine.train_batch(data)
    with pytest.raises(StopIteration):
        engine.train_batch(iter([next(data), next(data)]))
    losses, lines = lines_of(lambda: [float(engine.train_batch(data)) for _ in range(2)], "verify_gradients")
    return lines


def test_data_that_end_put_it_off() -> None:
    (line,), nothing = run_ranks(2, data_that_end)
    assert "in training batch 3" in line and line.endswith("bit for bit") and nothing == []


def unsplit(rank: int) -> list[str]:
    engine = Job({"name": "1f1b", "verify_gradients": True}, 2, 4, FP32, layers()).engine()
    data = endless(0)
    return lines_of(lambda: [engine.train_batch(data) for _ in range(4)], "verify_gradients")[1]


def test_a_schedule_that_splits_nothing() -> None:
    assert run_ranks(2, unsplit) == [[
        "pipeline_schedule.verify_gradients: 1f1b splits no backward, so there is nothing to verify"], []]


@pytest.mark.parametrize("name", ["v-min", "v-half", "v-zb", "zb-v", "zb-h1", "zb-h2"])
def test_whole_backwards_in_the_order_of_a_schedule(name: str) -> None:
    for ranks, micro_batches in (2, 1), (3, 5), (4, 12):
        schedule = build(name, ranks, micro_batches)
        whole = with_whole_backwards(schedule)
        check(whole)
        deadlock.check(lower(whole, Times.uniform(whole.placement.stages)), whole.placement)
        assert {action.kind for _, action in whole.passes()} == {Kind.F, Kind.BW}


def test_how_far_values_agree() -> None:
    gradient = torch.tensor([3.0, -4.0])
    assert compare(gradient, gradient.clone(), 1e-4).share == 0
    assert compare(gradient * 1.01, gradient, 1e-4).share == pytest.approx(0.01, rel=1e-4)
    assert compare(None, None, 1e-4).is_close and compare(None, torch.zeros(2), 1e-4).is_close
    assert not compare(None, gradient, 1e-4).is_close and not compare(gradient, None, 1e-4).is_close
    assert not compare(gradient * math.nan, gradient, 1e-4).is_close
    # Noise of a gradient that is zero, beside gradients of usual size.
    noise = torch.tensor([1e-9, -1e-9])
    assert compare(noise, -noise, 1e-4, 1.0).is_close and not compare(noise, -noise, 1e-4).is_close
    assert tolerance(torch.float32, 8) == 1e-4 < tolerance(torch.float32, 256) < tolerance(torch.bfloat16, 1)
    assert compare(torch.tensor([3 + 4j]), torch.tensor([3 + 4j]), tolerance(torch.complex64, 1)).is_close
