"""The engine on simulated GPUs over NCCL's stand-in: losses and weights are those over gloo, bit for bit.

There operators run late, a device is bound to the job, and whatever is read, sent or let go of too early is NaN. Passes
synchronize the device: in batches in which messages are announced all passes of all ranks, in others those of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from given_back import gives_back
from internals import messages_are_announced
from pipelines import (BF16_ZERO0, BF16_ZERO1, BF16_ZERO1_FP32, FP32, FP32_ZERO1, LENGTH, SAMPLES, VOCABULARY, Job,
                       Outcome, cross_entropy, merged, post_validated, tied_specs)
from ranks import run_ranks
from simulated_gpu.communicator import Counts
from simulated_gpu.processes import run_on_gpus
from torch import Tensor

import ds_vshape
from ds_vshape.models.gpt import GPTConfig
from ds_vshape.models.gpt_parallel import parallel_gpt_layers
from ds_vshape.models.parallel_layers import tensor_group
from ds_vshape.runtime import instructions as instr
from ds_vshape.runtime.instructions import Execute, Instruction
from ds_vshape.runtime.wrappers import InstructionWrappers
from ds_vshape.schedule.communicators import COMMUNICATOR_BYTES, MAX_CTAS, communicators_of_ranks
from ds_vshape.schedule.named import SCHEDULES, build

BATCHES = range(4)
PRECISIONS = {"fp32-zero0": FP32, "fp32-zero1": FP32_ZERO1, "bf16-zero0": BF16_ZERO0, "bf16-zero1": BF16_ZERO1,
              "bf16-zero1-fp32": BF16_ZERO1_FP32}
CHECKPOINTING = {"activation_checkpoint_interval": 1, "checkpointable_layers": ["Block"]}
DYNAMIC = {"dynamic_shape": True}


@dataclass(frozen=True)
class Case:
    """A job; how its module is made; and whether lengths change from micro-batch to micro-batch, or from batch to
    batch with reset_activation_shape()."""

    job: Job
    options: dict[str, Any] = field(default_factory=dict)
    resets: bool = False
    tensor_parallel: bool = False

    def engine(self) -> Any:
        if not self.tensor_parallel:
            return self.job.engine(**self.options)
        topology = PipeModelDataParallelTopology(num_pp=self.job.stages, num_mp=2, num_dp=1)
        layers = parallel_gpt_layers(GPTConfig(layers=4, hidden=8, heads=2, length=LENGTH), tensor_group(topology))
        module = ds_vshape.PipelineModule(layers, topology=topology, loss_fn=cross_entropy, seed_layers=True,
                                          partition_method="type:Block", config=self.job.ds_config())
        return ds_vshape.initialize(model=module, model_parameters=module.parameters(), config=self.job.ds_config())[0]

    def length(self, batch: int, micro_batch: int) -> int:
        if self.resets:
            return LENGTH + batch % 2
        return LENGTH + (3 * batch + micro_batch) % 4 if self.options.get("dynamic_shape") else LENGTH

    def data(self, engine: Any, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(101 * batch + engine.grid.get_data_parallel_rank())
        # One piece of memory for all micro-batches of a length, as some loaders have.
        rooms: dict[int, Tensor] = {}
        for micro_batch in range(engine.micro_batches):
            length = self.length(batch, micro_batch)
            tokens = rooms.setdefault(length, torch.empty(SAMPLES, length + 1, dtype=torch.long))
            tokens.random_(VOCABULARY, generator=generator)
            yield tokens[:, :-1], tokens[:, 1:]


def train_cases(rank: int, cases: list[Case], prepare: Callable[[Any], None]) -> list[Outcome]:
    """Losses of training and of an evaluation in the middle, and weights."""
    outcomes = []
    for case in cases:
        print(case)
        engine = case.engine()
        prepare(engine)
        losses = []
        for batch in BATCHES:
            if case.resets:
                engine.reset_activation_shape()
            losses.append(float(engine.train_batch(case.data(engine, batch))))
            if batch == 1:
                losses.append(float(engine.eval_batch(case.data(engine, batch))))
        weights = {name: value.cpu() for name, value in engine.module.state_dict().items()}
        outcomes.append(Outcome(losses, {f"{rank % 2}.{name}" if case.tensor_parallel else name: value
                                         for name, value in weights.items()}))
    return outcomes


PASSES = {instr.ForwardPass, instr.SplitForwardPass, instr.BackwardPass, instr.InputGradPass, instr.WeightGradPass,
          instr.RecomputePass, instr.SplitRecomputePass}


def synchronizing(instructions: Mapping[Instruction, Execute],
                  is_due: Callable[[Any], bool]) -> dict[Instruction, Execute]:
    """An instruction map that synchronizes the device at the start of each pass where `is_due`, of the engine, holds.
    """

    def synchronized(execute: Execute, engine: Any, **arguments: Any) -> None:
        if is_due(engine):
            get_accelerator().synchronize()
        execute(engine, **arguments)

    return {kind: partial(synchronized, execute) if kind in PASSES else execute
            for kind, execute in instructions.items()}


def synchronize_in_passes(engine: Any) -> None:
    """While messages are announced in all passes, else in those of one rank, another in each batch."""

    def is_due(engine: Any) -> bool:
        return bool(messages_are_announced(engine) or engine.global_steps % engine.placement.ranks == engine.stage_id)

    InstructionWrappers(engine).add(partial(synchronizing, is_due=is_due))


def synchronize_and_give_memory_back(engine: Any) -> None:
    """Also recompute and offload here and there."""
    synchronize_in_passes(engine)
    engine.use_schedule(gives_back(engine.schedule(), engine.micro_batches))


def assert_equal_to_gloo(cases: list[Case], world: int, prepare: Callable[[Any], None] = synchronize_in_passes) -> None:
    gloo = run_ranks(world, train_cases, cases, lambda engine: None, timeout=300)
    gpus = run_on_gpus(world, train_cases, cases, prepare, timeout=400)
    over_gloo, on_gpus = ([merged(list(ranks)) for ranks in zip(*results)] for results in (gloo, gpus))
    for case, oracle, outcome in zip(cases, over_gloo, on_gpus, strict=True):
        assert outcome.losses == oracle.losses, case
        assert outcome.weights.keys() == oracle.weights.keys()
        assert all(torch.equal(outcome.weights[name], value) for name, value in oracle.weights.items()), case


def clipped(config: dict[str, Any], norm: float) -> dict[str, Any]:
    return {**config, "gradient_clipping": norm}


def features(ranks: int) -> dict[str, Case]:
    """One case for each feature, on some schedule and precision."""
    tied = tuple(tied_specs(2 * ranks))
    return {
        "checkpointing": Case(Job("v-half", ranks, ranks + 2, BF16_ZERO1), CHECKPOINTING),
        "checkpointing, fp32": Case(Job("zb-h1", ranks, ranks + 2, FP32), CHECKPOINTING),
        "dynamic": Case(Job("v-zb", ranks, 2 * ranks, FP32_ZERO1), DYNAMIC),
        "dynamic, checkpointing": Case(Job("v-min", ranks, ranks + 1, BF16_ZERO1_FP32), {**DYNAMIC, **CHECKPOINTING}),
        "dynamic, whole backwards": Case(Job("interleaved-1f1b", ranks, 2 * ranks, FP32), DYNAMIC),
        "reset": Case(Job("v-half", ranks, ranks + 1, FP32), resets=True),
        "clipping": Case(Job("zb-h1", ranks, ranks + 1, clipped(FP32, 0.5))),
        "clipping, ZeRO-1": Case(Job("v-zb", ranks, ranks + 1, clipped(BF16_ZERO1, 0.5))),
        # Some steps stand, and some are taken back.
        "post-validation": Case(post_validated(Job("v-zb", ranks, 2 * ranks, clipped(FP32_ZERO1, 2.4)))),
        "post-validation, bf16": Case(post_validated(Job("1f1b", ranks, ranks + 1, clipped(BF16_ZERO1, 1e-2)))),
        "post-validation, dynamic": Case(post_validated(Job("v-half", ranks, ranks + 2, FP32_ZERO1)), DYNAMIC),
        "tied": Case(Job("v-half", ranks, ranks + 1, BF16_ZERO1_FP32, tied)),
        "tied, clipping": Case(Job("1f1b-v", ranks, ranks + 1, clipped(FP32, 0.5), tied)),
    }


def tensor_parallel(schedule: str, config: dict[str, Any], **section: Any) -> Case:
    job = Job({"name": schedule, **section}, 2, 3, clipped(config, 0.5))
    return Case(job, tensor_parallel=True)


QUICK = ("checkpointing", "dynamic", "reset", "clipping", "post-validation", "tied")


def test_two_ranks() -> None:
    cases = features(2)
    assert_equal_to_gloo([Case(Job("v-half", 2, 4, FP32_ZERO1)), *(cases[name] for name in QUICK)], 2)


# What isn't checkpointed, and so may be recomputed.
NOT_CHECKPOINTED = ("dynamic", "dynamic, whole backwards", "reset", "clipping, ZeRO-1", "post-validation", "tied")


@pytest.mark.parametrize("names", [("dynamic", "post-validation"),
                                   pytest.param(NOT_CHECKPOINTED, marks=pytest.mark.slow)])
def test_recomputation_and_offload(names: tuple[str, ...]) -> None:
    """The copies run on streams of their own, to page-locked memory; no host waits for them."""
    cases = features(2)
    assert_equal_to_gloo([cases[name] for name in names], 2, synchronize_and_give_memory_back)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str, ranks: int) -> None:
    assert_equal_to_gloo([Case(Job(schedule, ranks, ranks + 2, config)) for config in PRECISIONS.values()], ranks)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_features(ranks: int) -> None:
    assert_equal_to_gloo(list(features(ranks).values()), ranks)


@pytest.mark.slow
def test_replicas() -> None:
    cases = [*features(2).values(), Case(Job("v-zb", 2, 4, FP32_ZERO1)), Case(Job("v-zb", 2, 4, BF16_ZERO1))]
    assert_equal_to_gloo(cases, 4)


@pytest.mark.slow
def test_tensor_parallel() -> None:
    cases = [tensor_parallel("v-half", FP32), tensor_parallel("v-zb", FP32_ZERO1), tensor_parallel("1f1b", BF16_ZERO1),
             tensor_parallel("v-zb", FP32_ZERO1, optimizer_post_validation=True)]
    assert_equal_to_gloo(cases, 4)


def communicators_of_messages(rank: int, job: Job) -> tuple[int, list[tuple[int, bool]]]:
    engine = job.engine()
    for batch in range(2):
        engine.train_batch(Case(job).data(engine, batch))
    light = [(options.config.max_ctas, options.is_high_priority_stream) for options in Counts.options
             if options.config.max_ctas == MAX_CTAS]
    assert engine.memory_report()[engine.stage_id].communicators == COMMUNICATOR_BYTES * len(light)
    return communicators_of_ranks(engine.placement)[engine.stage_id], light


@pytest.mark.parametrize(["schedule", "pipelines"], [("v-half", 1), ("1f1b", 2)])
def test_messages_have_one_light_communicator_for_each_direction(schedule: str, pipelines: int) -> None:
    ranks = 4 // pipelines
    found = run_on_gpus(4, communicators_of_messages, Job(schedule, ranks, 4))
    of_pipeline = [2 if place in (0, ranks - 1) else 4 for place in range(ranks)]
    assert sorted(expected for expected, _ in found) == sorted(of_pipeline * pipelines)
    for expected, light in found:
        assert light == [(MAX_CTAS, True)] * expected


def swapping(rank: int, case: Case) -> list[float]:
    """Losses, with all passes of all ranks synchronizing in the first batch by another schedule."""
    engine, losses = case.engine(), []
    for batch in BATCHES:
        if batch == 2:
            engine.use_schedule(build("v-zb", engine.placement.ranks, engine.micro_batches))
        with InstructionWrappers(engine).during(partial(synchronizing, is_due=lambda _: batch == 2)):
            losses.append(float(engine.train_batch(case.data(engine, batch))))
    return losses


def test_another_schedule_may_load_kernels_on_all_ranks() -> None:
    case = Case(Job("v-min", 4, 8, FP32))
    assert run_on_gpus(4, swapping, case, timeout=100) == run_ranks(4, swapping, case)
