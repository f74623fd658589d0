"""Micro-batches of mixed lengths in the order in which ranks wait least: the engine puts them in order by itself."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec
from layers import LengthSleepingLinear
from pipelines import FP32_ZERO1, SAMPLES, VOCABULARY, Job, Outcome, merged, profiled
from ranks import RanksFailed, run_ranks
from torch import Tensor
from torch.nn import functional

import ds_vshape
from ds_vshape.schedule.builders.micro_batch_order import micro_batch_order
from ds_vshape.schedule.timeline import Times
from ds_vshape.split_backward.head import IGNORE_INDEX

MICRO_BATCHES, BATCHES = 6, 3
Batch = list[tuple[Tensor, Tensor]]


def batch_of_lengths(number: int, replica: int) -> Batch:
    dice = random.Random(f"{number} {replica}")
    found = []
    for _ in range(MICRO_BATCHES):
        length = min(40, round(dice.lognormvariate(2, 0.7)) + 1)
        tokens = torch.tensor([[dice.randrange(VOCABULARY) for _ in range(length + 1)] for _ in range(SAMPLES)])
        labels = tokens[:, 1:].clone()
        labels[0, 0] = IGNORE_INDEX
        found.append((tokens[:, :-1], labels))
    return found


def token_loss(outputs: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = functional.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def by_hand(batch: Batch, engine: Any) -> Batch:
    """The batch as the engine should order it."""
    schedule = engine.schedule()
    sizes = [inputs.numel() for inputs, _ in batch]
    times = replace(Times.uniform(schedule.placement.stages),
                    scales=tuple(size / (sum(sizes) / len(sizes)) for size in sizes))
    return [batch[place] for place in micro_batch_order(schedule, times)]


def train(rank: int, job: Job, orders_by_hand: bool, loss_average: str) -> tuple[Outcome, float]:
    engine = job.engine(dynamic_shape=True, loss_fn=token_loss, loss_average=loss_average)
    replica = engine.grid.get_data_parallel_rank()
    losses = []
    for number in range(BATCHES):
        batch = batch_of_lengths(number, replica)
        losses.append(float(engine.train_batch(iter(by_hand(batch, engine) if orders_by_hand else batch))))
    evaluated = float(engine.eval_batch(iter(batch_of_lengths(9, replica)), num_micro_batches=MICRO_BATCHES))
    return Outcome(losses, {name: value.clone() for name, value in engine.module.state_dict().items()}), evaluated


def trained(job: Job, ranks: int, orders_by_hand: bool, loss_average: str) -> tuple[Outcome, set[float]]:
    outcomes = run_ranks(ranks, train, job, orders_by_hand, loss_average)
    return merged([outcome for outcome, _ in outcomes]), {evaluated for _, evaluated in outcomes}


def section(name: str, order: str, **keys: Any) -> dict[str, Any]:
    return {"name": name, "micro_batch_order": order, **keys}


@pytest.mark.parametrize("name, ranks, loss_average, config, keys", [
    ("v-half", 2, "micro_batches", {}, {}),
    ("zb-h1", 2, "tokens", FP32_ZERO1, {"optimizer_post_validation": True}),
    pytest.param("v-zb", 4, "micro_batches", FP32_ZERO1, {"verify_gradients": True}, marks=pytest.mark.slow),
    pytest.param("interleaved-1f1b", 4, "tokens", FP32_ZERO1, {}, marks=pytest.mark.slow)])
def test_as_if_the_data_came_in_this_order(name: str, ranks: int, loss_average: str, config: dict[str, Any],
                                           keys: dict[str, Any]) -> None:
    """Bit for bit; and what the order of the data gives, up to rounding."""
    given, ordered = (Job(section(name, order, **keys), 2, MICRO_BATCHES, config) for order in ("data", "length"))
    ours, evaluated = trained(ordered, ranks, False, loss_average)
    oracle, of_oracle = trained(given, ranks, True, loss_average)
    assert (ours.losses, evaluated) == (oracle.losses, of_oracle)
    assert all(torch.equal(ours.weights[layer], weight) for layer, weight in oracle.weights.items())
    plain, _ = trained(given, ranks, False, loss_average)
    assert ours.losses == pytest.approx(plain.losses, rel=1e-5)
    assert any(not torch.equal(ours.weights[layer], weight) for layer, weight in plain.weights.items())


def train_with_short_data(rank: int, job: Job, ends: bool) -> list[float]:
    """The second batch has too little data on the rank of the first stage, or of the last one (`ends`)."""
    engine = job.engine(dynamic_shape=True, loss_fn=token_loss)
    losses = [float(engine.train_batch(iter(batch_of_lengths(0, 0))))]
    short = engine.is_last_stage() if ends else engine.is_first_stage()
    batch = batch_of_lengths(1, 0)[:3 if short else None]
    with pytest.raises(Exception, match=f"LoadMicroBatch, micro-batch 0 on pipeline rank {int(ends)}"):
        engine.train_batch(iter(batch))
    return [*losses, float(engine.train_batch(iter(batch_of_lengths(2, 0))))]


@pytest.mark.parametrize("ends", [False, True])
def test_data_that_end_too_early_fail_on_all_ranks(ends: bool) -> None:
    """And the next batch is ordered as before."""
    job = Job(section("1f1b", "length"), 2, MICRO_BATCHES)
    first, second = run_ranks(2, train_with_short_data, job, ends, timeout=60)
    assert first == second and len(first) == 2


LENGTHS = (20, 2, 6, 12)


def measure_lengths(rank: int) -> tuple[Times, Any, Times]:
    """The times that the job plans for, the schedule before, and the times for five micro-batches."""
    section = profiled("v-half", micro_batch_order="length")
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": len(LENGTHS),
              "optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "pipeline_schedule": section}
    layers = [LayerSpec(LengthSleepingLinear, 4, (0.006,) * 3, 10) for _ in range(4)]
    module = ds_vshape.PipelineModule(layers, num_stages=2, loss_fn=functional.mse_loss, config=config,
                                      dynamic_shape=True)
    engine = ds_vshape.initialize(model=module, model_parameters=module.parameters(), config=config)[0]
    first = engine.schedule()

    def planned(lengths: tuple[int, ...]) -> Times:
        while True:
            engine.train_batch(iter([(torch.ones(length, 4), torch.zeros(length, 4)) for length in lengths]))
            if engine.planned_times is not None:
                return engine.planned_times  # type: ignore[no-any-return]

    times = planned(LENGTHS)
    engine.set_train_batch_size(5)
    return times, first, planned((*LENGTHS, 10))


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_plans_are_for_the_lengths_in_each_place() -> None:
    (times, first, of_five), other = run_ranks(2, measure_lengths)
    assert (times, first, of_five) == other
    scales = tuple(length / 10 for length in LENGTHS)
    order = micro_batch_order(first, replace(Times.uniform(4), scales=scales))
    assert times.scales == pytest.approx([scales[micro_batch] for micro_batch in order], abs=0.35)
    assert all(0.006 <= seconds < 0.02 for seconds in times.forward)
    assert len(of_five.scales) == 5


def build_engine(rank: int, job: Job) -> None:
    job.engine()


def test_an_illegal_order() -> None:
    job = Job(section("v-half", "sorted"), 2, MICRO_BATCHES)
    with pytest.raises(RanksFailed, match=r"pipeline_schedule.micro_batch_order = 'sorted': .*'data' or 'length'"):
        run_ranks(2, build_engine, job, timeout=60)
