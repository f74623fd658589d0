"""Gradients that are added up over replicas concurrently with the passes: the weights are DeepSpeed's, bit for bit.

Two replicas: a sum of two doesn't depend on how gradients are put together for it.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec
from internals import count_early_reductions, wrap_background
from pipelines import BATCHES, BF16_ZERO1, FP32_ZERO1, Block, FrozenBlock, Job, data, merged, specs, tied_specs, train
from ranks import run_ranks
from torch import Tensor

FP16_ZERO1_FP32: dict[str, Any] = {
    "fp16": {"enabled": True, "initial_scale_power": 8}, "zero_optimization": {"stage": 1},
    "data_types": {"grad_accum_dtype": "fp32"}}
CONFIGS = {"fp32": FP32_ZERO1, "bf16": BF16_ZERO1, "fp16, sums in fp32": FP16_ZERO1_FP32,
           "buckets of one gradient": {"zero_optimization": {"stage": 1, "reduce_bucket_size": 150}},
           "no contiguous bucket": {"zero_optimization": {"stage": 1, "contiguous_gradients": False}}}
MODELS = {"plain": specs(3), "tied": tied_specs(4),
          "one frozen": [*specs(2)[:-1], LayerSpec(FrozenBlock), specs(2)[-1]]}


class Unused(Block):
    """A block with a parameter that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(3))


MODELS["one parameter unused"] = [*specs(2)[:-1], LayerSpec(Unused), specs(2)[-1]]


def jobs() -> list[Job]:
    found = [Job("v-zb", 2, 4, config, tuple(MODELS["plain"])) for config in CONFIGS.values()]
    # On the linear placement tied weights lie on two ranks, as in DeepSpeed.
    found += [Job("zb-h1", 2, 4, FP32_ZERO1, tuple(model)) for model in MODELS.values()]
    return [*found, Job("1f1b", 2, 4, FP32_ZERO1, tuple(MODELS["plain"]))]


def train_both(rank: int) -> list[tuple[Any, Any, list[int]]]:
    """Of each job: DeepSpeed's outcome, ours, and how many stages of this rank each batch reduced early."""
    # DeepSpeed takes a CPU for unable to do fp16; torch's can.
    get_accelerator().is_fp16_supported = lambda: True
    return [(train(replace(job, schedule=None).engine(), BATCHES), *train_counting(job)) for job in jobs()]


def train_counting(job: Job) -> tuple[Any, list[int]]:
    engine = job.engine()
    counts = count_early_reductions(engine)
    return train(engine, BATCHES), counts


@pytest.mark.slow
def test_weights_are_deepspeeds_bit_for_bit() -> None:
    for of_ranks in zip(*run_ranks(4, train_both), strict=True):
        stock, ours, counts = zip(*of_ranks, strict=True)
        expected, found = merged(list(stock)), merged(list(ours))
        assert found.losses == expected.losses
        assert found.weights.keys() == expected.weights.keys()
        for name, weight in expected.weights.items():
            assert torch.equal(found.weights[name], weight), name
        for of_batches in counts:
            assert of_batches[0] == 0 and all(of_batches[1:]), "no stage was reduced early"


def train_without_replica_1(rank: int) -> tuple[list[float], dict[str, Tensor]]:
    """Five batches; in the third the data of one replica end too soon."""
    engine = Job("v-zb", 2, 4, FP32_ZERO1, tuple(MODELS["plain"])).engine()
    losses = []
    for batch in BATCHES:
        if batch == 2:
            short = list(data(engine, batch))[:4 - 2 * engine.grid.get_data_parallel_rank()]
            try:
                engine.train_batch(iter(short))
            except StopIteration:
                losses.append(float("inf"))
        losses.append(float(engine.train_batch(data(engine, batch))))
    return losses, engine.module.state_dict()


def test_a_replica_that_fails_in_a_batch_takes_part_in_its_sums() -> None:
    for (losses, weights), expected in zip(run_ranks(4, train_without_replica_1),
                                           run_ranks(4, train_plainly), strict=True):
        assert losses[2] == float("inf") and losses[:2] + losses[3:] == expected.losses
        for name, weight in expected.weights.items():
            assert torch.equal(weights[name], weight), name


def train_plainly(rank: int) -> Any:
    return train(Job("v-zb", 2, 4, FP32_ZERO1, tuple(MODELS["plain"])).engine(), BATCHES)


def train_with_a_slow_thread(rank: int) -> Any:
    """What runs concurrently with the passes starts late on one replica, as on a busy machine."""
    engine = Job("v-zb", 2, 4, FP32_ZERO1, tuple(MODELS["plain"])).engine()
    if engine.grid.get_data_parallel_rank() == 0:
        wrap_background(engine, lambda work: lambda: (time.sleep(0.1), work())[1])
    return train(engine, BATCHES)


def test_the_loss_never_meets_gradients() -> None:
    """Replicas average both in one group, in which they must do the same things in the same order."""
    found, expected = (merged(run_ranks(4, body)) for body in (train_with_a_slow_thread, train_plainly))
    assert found.losses == expected.losses
    assert all(torch.equal(found.weights[name], weight) for name, weight in expected.weights.items())
