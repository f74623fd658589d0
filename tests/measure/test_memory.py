"""Sizes in bytes: counted by hand, and against what the allocator really gave out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import astuple
from itertools import chain
from typing import Any

import pytest
import torch
from counted_blocks import (BLOCK_KEPT, BLOCK_WHOLE, LENGTH, SAMPLES, UNIT, WIDTH, WORDS, GPTBlock, allocated, job,
                            tokens)
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.runtime.pipe.module import PipelineError
from given_back import BOTH, MOVED, NOTHING, RECOMPUTED, gives_back
from instruction_functions import around_instruction
from pipelines import BF16_ZERO0, BF16_ZERO1, BF16_ZERO1_FP32, FP32, FP32_ZERO1, Job
from ranks import run_ranks
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ds_vshape.measure.memory import ActivationMeter
from ds_vshape.measure.rank_memory import RankMemory
from ds_vshape.runtime import instructions as instr
from ds_vshape.schedule.activations import Activations
from ds_vshape.schedule.named import build
from ds_vshape.schedule.passes import B, F
from ds_vshape.split_backward import SplitBackward, WeightGradientStore


def inputs() -> Tensor:
    return torch.randn(SAMPLES, LENGTH, WIDTH, requires_grad=True)


def measure(module: nn.Module, function: Callable[[Tensor], Any], x: Tensor) -> tuple[int, int]:
    """What the meter measures for `function`, a part of `module`, after F and after B."""
    meter, store = ActivationMeter(module, "cpu"), WeightGradientStore()
    meter.start()
    with SplitBackward(store), meter.forward(F(0, 0), x):
        outputs = function(x)
    root, grad = get_gradient_edge(outputs), torch.ones_like(outputs)
    del outputs
    with SplitBackward(store), meter.backward(B(0, 0)):
        torch.autograd.backward([root], [grad])
    meter.after_backward(B(0, 0), store)
    meter.stop()
    assert meter.unknown is None
    return meter.whole[0], meter.kept[0]


def forward_and_forget(function: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    """F as an engine runs it: the graph stays, the outputs go."""
    with SplitBackward(WeightGradientStore()):
        return get_gradient_edge(function(x))


def test_a_block_counted_by_hand() -> None:
    block = GPTBlock()
    assert measure(block, block, inputs()) == (BLOCK_WHOLE, BLOCK_KEPT)


def test_a_block_against_the_allocator() -> None:
    block, x = GPTBlock(), inputs()
    left, _ = allocated(lambda: forward_and_forget(block, x))
    assert measure(block, block, x)[0] == left + x.nbytes


def checkpointed(function: Callable[[Any, Tensor], Tensor]) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
    return lambda block: lambda x: function(block, function(block, x))


# With the bytes that the allocator sees and the meter doesn't: a number made a tensor, the host's random states.
FUNCTIONS: dict[str, tuple[int, Callable[[nn.Module], Callable[[Tensor], Tensor]]]] = {
    "shared by two operators": (0, lambda block: lambda x: torch.sin(x) * torch.cos(x)),
    "its output saved": (0, lambda block: lambda x: torch.exp(torch.sigmoid(x))),
    "its input alone": (8, lambda block: lambda x: x * 2),
    "views": (0, lambda block: lambda x: (x.view(-1, WIDTH)[::2].sin() ** 2).sum() * x.transpose(0, 1).sin()),
    "dropout": (0, lambda block: lambda x: functional.dropout(functional.dropout(x, 0.5), 0.5)),
    "checkpoints of torch": (2 * 5056, checkpointed(lambda block, x: checkpoint(block, x, use_reentrant=False))),
    "reentrant ones": (2 * 5056, checkpointed(lambda block, x: checkpoint(block, x, use_reentrant=True))),
    "checkpoints of DeepSpeed": (4 * 5056, checkpointed(checkpointing.checkpoint)),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_what_a_graph_holds_against_the_allocator(case: str) -> None:
    """To the byte: memory that several operators saved counts once, and what nodes keep beside autograd counts too."""
    block = GPTBlock()
    unseen, make = FUNCTIONS[case]
    function, x = make(block), inputs()
    forward_and_forget(function, x)  # What is made once for all, as DeepSpeed's checkpoints do.
    left, _ = allocated(lambda: forward_and_forget(function, x))
    assert measure(block, function, x)[0] == left + x.nbytes - unseen


def test_frozen_parameters_and_buffers_do_not_count() -> None:
    block = GPTBlock().requires_grad_(False)
    assert measure(block, block, inputs())[1] == 0


# -- engines


def measured_peak(rank: int, job: Job) -> Any:
    engine = job.engine()
    for _ in range(2):
        engine.train_batch(tokens(engine.micro_batches))
    activations, predicted = engine.activation_sizes(), engine.memory_report()
    _, most = allocated(lambda: engine.train_batch(tokens(engine.micro_batches)))
    return activations, predicted, most


@pytest.mark.quick_cases("1f1b-2-6", "v-min-4-8", "v-zb-2-8")
@pytest.mark.parametrize("schedule, ranks, micro_batches", [("1f1b", 2, 6), ("v-min", 4, 8), ("v-half", 2, 8),
                                                            ("v-zb", 2, 8), ("zb-h2", 2, 8)])
def test_predicted_against_really_allocated(schedule: str, ranks: int, micro_batches: int) -> None:
    """A batch starts with parameters and optimizer in place; what it allocates at most beyond them is predicted. Where
    a stage has no W before the peak, its gradients are counted too early."""
    for ratio in predicted_against_allocated(job(schedule, ranks, micro_batches)):
        assert 0.91 < ratio < 1.01


@pytest.mark.quick_cases("v-half-2")
@pytest.mark.parametrize("schedule, ranks", [("1f1b", 2), ("v-half", 2), ("v-zb", 4)])
def test_predicted_where_blocks_are_recomputed(schedule: str, ranks: int) -> None:
    """A B of recomputed layers has what all layers before it keep for W, a BW has not. In these small blocks the random
    states that checkpoints put aside, 5 KiB each, are 5%."""
    recomputed = {**FP32, "pipeline": {"activation_checkpoint_interval": 1}}
    for ratio in predicted_against_allocated(job(schedule, ranks, 8, recomputed, 4 * ranks - 2)):
        assert 0.97 < ratio < 1.06


def measured_working(rank: int, job: Job, collections: int | None = None) -> Any:
    """With a garbage collection after so many objects, 0 for none: it decides which addresses new tensors get."""
    if collections is not None:
        gc.set_threshold(collections)
    engine = job.engine()
    for _ in range(2):
        engine.train_batch(tokens(engine.micro_batches))
    return engine.room()


@pytest.mark.parametrize("config", [FP32, FP32_ZERO1, BF16_ZERO1_FP32], ids=["zero0", "zero1", "bf16"])
def test_a_batch_of_one_micro_batch_needs_no_more_while_passes_run(config: dict[str, Any]) -> None:
    """Its passes are the first of the batch, which make the sums of gradients and ZeRO's bucket: parts of their own.
    Gradients that become these sums are no memory besides."""
    one, other = run_ranks(2, measured_working, job("1f1b", 2, 1, config))
    several, _ = run_ranks(2, measured_working, job("1f1b", 2, 4, config))
    assert one == other
    for ours, theirs in zip(chain(*astuple(one.working)), chain(*astuple(several.working)), strict=True):
        assert 0 <= ours <= theirs + 64  # but for a few numbers
    assert one.working.forward == pytest.approx(several.working.forward, abs=64)


def test_what_passes_need_does_not_depend_on_addresses() -> None:
    """A gradient may come to lie where a tensor of its pass has lain."""
    found = [run_ranks(2, measured_working, job("1f1b", 2, 1), collections) for collections in (0, 1, 7)]
    assert found[0] == found[1] == found[2]


GIVES_BACK = {"name": "adaptive", "times": "profile", "recompute": True, "offload": True}


def measured_peak_giving_back(rank: int, schedule: str, ranks: int, ways: tuple[int, ...]) -> Any:
    """As measured_peak, with memory given back in some of the `ways`."""
    engine = job(GIVES_BACK, ranks, 8).engine()
    engine.use_schedule(gives_back(build(schedule, ranks, 8), ranks, ways))
    for _ in range(2):
        engine.train_batch(tokens(engine.micro_batches))
    predicted = engine.memory_report()
    _, most = allocated(lambda: engine.train_batch(tokens(engine.micro_batches)))
    return engine.activation_sizes(), predicted, most


@pytest.mark.parametrize("ways", [(NOTHING, RECOMPUTED), (NOTHING, MOVED), (NOTHING, RECOMPUTED, MOVED, BOTH)],
                         ids=["recomputed", "offloaded", "all ways"])
@pytest.mark.parametrize("schedule, ranks", [("v-half", 2), ("v-zb", 4)])
@pytest.mark.quick_cases("v-half-2-all ways")
def test_predicted_where_memory_is_given_back(schedule: str, ranks: int, ways: tuple[int, ...]) -> None:
    results = run_ranks(ranks, measured_peak_giving_back, schedule, ranks, ways)
    for memory, (_, _, most) in zip(results[0][1], results, strict=True):
        ratio = most / (memory.gradients + memory.activations_peak + memory.working)
        assert 0.91 < ratio < 1.01


def reported_by_hand(rank: int, batches: int) -> Any:
    """What is reported under a schedule that no key has announced, used after some batches."""
    engine = job("v-half", 2, 8).engine()
    for _ in range(batches):
        engine.train_batch(tokens(engine.micro_batches))
    engine.use_schedule(gives_back(build("v-half", 2, 8), 2))
    for _ in range(2 if batches < 2 else 1):
        with pytest.raises(PipelineError, match="activations are measured in training batch"):
            engine.memory_report()
        engine.train_batch(tokens(engine.micro_batches))
    return engine.activation_sizes(), engine.memory_report()


@pytest.mark.parametrize("batches", [0, 3])
def test_a_schedule_of_ones_own_may_give_memory_back_without_the_keys(batches: int) -> None:
    (sizes, memory, _), _ = run_ranks(2, measured_peak_giving_back, "v-half", 2, (NOTHING, RECOMPUTED, MOVED, BOTH))
    assert sizes.recomputed and sizes.offloadable
    for sizes_by_hand, by_hand in run_ranks(2, reported_by_hand, batches):
        assert sizes_by_hand == sizes
        for ours, theirs in zip(by_hand, memory, strict=True):
            assert (ours.activations_peak, ours.working) == (theirs.activations_peak, theirs.working)


@pytest.fixture(scope="module")
def oracle() -> Activations:
    """Sizes where nothing is recomputed or offloaded."""
    sizes: Activations = run_ranks(2, measured_peak_giving_back, "v-half", 2, (NOTHING,))[0][0]
    return sizes


@pytest.mark.parametrize("way", [RECOMPUTED, MOVED, BOTH], ids=["recomputed", "offloaded", "both"])
def test_sizes_are_those_without_recomputation_and_offload(way: int, oracle: Activations) -> None:
    """Also where all micro-batches, the measured one among them, are recomputed or offloaded: memory that has gone to
    the host and comes back to another place is the same memory."""
    sizes = run_ranks(2, measured_peak_giving_back, "v-half", 2, (way,))[0][0]
    assert (sizes.after_forward, sizes.after_backward) == (oracle.after_forward, oracle.after_backward)


def predicted_against_allocated(job: Job) -> list[float]:
    """By rank: what a batch allocates at most over what was predicted."""
    results = run_ranks(job.stages, measured_peak, job)
    activations, predicted, _ = results[0]
    assert all((others, memory) == (activations, predicted) for others, memory, _ in results), "the same on every rank"
    return [most / (memory.gradients + memory.activations_peak + memory.working)
            for memory, (_, _, most) in zip(predicted, results, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("schedule, ranks", [("zb-h1", 2), ("v-min", 2), ("v-half", 2), ("v-zb", 4)])
def test_checkpointing_takes_less_on_every_rank(schedule: str, ranks: int) -> None:
    """Really allocated beyond gradients; a running backward has a recomputed block and its gradients."""
    plain = run_ranks(ranks, measured_peak, job(schedule, ranks, 8, blocks=4 * ranks - 2))
    checkpointing = {**FP32, "pipeline": {"activation_checkpoint_interval": 1}}
    recomputed = run_ranks(ranks, measured_peak, job(schedule, ranks, 8, checkpointing, 4 * ranks - 2))
    for rank in range(ranks):
        (_, before, most_before), (_, after, most_after) = plain[rank], recomputed[rank]
        gradients = before[rank].gradients
        assert after[rank].activations_peak < 0.75 * before[rank].activations_peak
        assert most_after - gradients < 0.9 * (most_before - gradients)
        assert most_after - gradients < after[rank].activations_peak + 2 * BLOCK_WHOLE


def test_sizes_of_stages_counted_by_hand() -> None:
    """On 2 ranks the stages of v-zb are embedding and block, two blocks, two blocks, block and head. The embedding
    gives what the first block has as input, so it adds its tokens; the head's loss takes logits and labels."""
    results = run_ranks(2, measured_peak, job("v-zb", 2, 4))
    activations = results[0][0]
    indices, words = SAMPLES * LENGTH * 8, SAMPLES * LENGTH * WORDS * 4
    assert activations.after_forward[:3] == (BLOCK_WHOLE + indices, 2 * BLOCK_WHOLE, 2 * BLOCK_WHOLE)
    # cross_entropy keeps the log-softmax, the labels, and two numbers for the mean.
    assert activations.after_forward[3] == pytest.approx(BLOCK_WHOLE + UNIT + words + indices, abs=64)
    # Between B and W: the embedding's tokens and the gradient of its output; the head's input and the logits' gradient.
    # The gradient of a block's output is the one that its last linear and the head below it keep, each its own.
    assert activations.after_backward[1] == 2 * BLOCK_KEPT
    assert activations.after_backward == (BLOCK_KEPT + UNIT + indices, 2 * BLOCK_KEPT, 2 * BLOCK_KEPT,
                                          BLOCK_KEPT + UNIT + words)


def model_state(rank: int, job: Job) -> Any:
    engine = job.engine()
    accumulated: list[int] = []

    def counted(reduce_gradients: Callable[[], None]) -> None:
        held = [p.grad for p in engine.module.parameters()] + [getattr(p, "grad_accum", None)
                                                               for p in engine.module.parameters()]
        held += getattr(engine.optimizer, "fp32_groups_gradients_flat", [])
        accumulated.append(sum(t.nbytes for t in held if t is not None))
        reduce_gradients()

    around_instruction(engine, instr.ReduceGrads, counted)
    for _ in range(2):
        engine.train_batch(tokens(engine.micro_batches))
    numbers = sum(p.numel() for p in engine.module.parameters())
    return numbers, engine.memory_report(), accumulated[-1], engine.stage_id


# Bytes for each number of a rank's weights: parameters, gradients, optimizer. Two replicas share 12 of the last: a
# weight in fp32 and two moments.
STATES: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "fp32 zero0": (FP32, 4, 4, 8),
    "fp32 zero1": (FP32_ZERO1, 4, 4, 6),
    "bf16 zero1": (BF16_ZERO1, 2, 2, 6),
    "bf16 zero1, fp32 accumulation": (BF16_ZERO1_FP32, 2, 4, 6),
    "bf16 zero0": (BF16_ZERO0, 2, 2, 6),
}


@pytest.mark.parametrize("case", STATES)
def test_parameters_gradients_and_optimizer(case: str) -> None:
    """Two replicas of two ranks with Adam. DeepSpeed's flat buffers are padded; torch's Adam counts steps apart."""
    config, parameters, gradients, optimizer = STATES[case]
    for numbers, predicted, accumulated, stage in run_ranks(4, model_state, job("v-half", 2, 3, config)):
        memory = predicted[stage]
        buffers = (2, 4)[stage] * WIDTH * 4  # One in each block of the rank; DeepSpeed leaves them in fp32.
        assert memory.parameters == pytest.approx(parameters * numbers + buffers, abs=64)
        assert memory.optimizer == pytest.approx(optimizer * numbers, abs=256)
        assert memory.gradients == pytest.approx(gradients * numbers, abs=64)
        assert accumulated == pytest.approx(memory.gradients, abs=64)  # BF16_Optimizer's buffers are padded.
        passes, batch_end = memory.activations_peak + memory.working, memory.batch_end
        assert memory.total == sum(astuple(memory)) - min(passes, batch_end)


def test_a_report_can_be_read() -> None:
    memory = RankMemory(parameters=3 * 2**30, gradients=2**20, optimizer=0, activations_peak=1536)
    assert str(memory) == ("3.001 GiB: parameters 3 GiB, gradients 1 MiB, optimizer 0 B, activations peak 1.5 KiB, "
                           "working 0 B")
