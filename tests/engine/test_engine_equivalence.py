"""Every schedule trains what DeepSpeed's own engine trains: the same losses and weights, bit for bit.

Each stage adds up its gradients in the order of the micro-batches, whatever the schedule; no sum is taken in another
order than in 1F1B. So nothing here needs a tolerance, except where a plain model in fp32 stands beside bf16.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from pipelines import (BATCHES, BF16_ZERO0, BF16_ZERO1, BF16_ZERO1_FP32, FP32, FP32_ZERO1, SAMPLES, Job, Outcome,
                       PlainTraining, cross_entropy, merged, specs, train)
from ranks import run_ranks

from ds_vshape.schedule.named import SCHEDULES
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.schedule import Schedule

MAIN_SCHEDULES = ["1f1b", "zb-h1", "v-min", "v-half", "v-zb"]
PRECISIONS = {"fp32-zero0": FP32, "fp32-zero1": FP32_ZERO1, "bf16-zero1": BF16_ZERO1,
              "bf16-zero1-fp32": BF16_ZERO1_FP32}


def train_all(rank: int, jobs: list[Job], counts: tuple[int, ...]) -> list[list[Outcome]]:
    """For each job, five batches with each of `counts` micro-batches, one after the other."""
    outcomes = []
    for job in jobs:
        engine = job.engine()
        outcomes.append([])
        for count in counts:
            engine.set_train_batch_size(SAMPLES * count * engine.grid.get_data_parallel_world_size())
            outcomes[-1].append(train(engine, BATCHES))
    return outcomes


def outcomes_of(jobs: list[Job], counts: tuple[int, ...], world: int) -> list[list[Outcome]]:
    """Each job's outcomes, those of its ranks merged."""
    of_jobs = zip(*run_ranks(world, train_all, jobs, counts))
    return [[merged(list(ranks)) for ranks in zip(*of_job)] for of_job in of_jobs]


def assert_equal(outcomes: list[Outcome], oracles: list[Outcome], of: Any) -> None:
    for outcome, oracle in zip(outcomes, oracles, strict=True):
        assert outcome.losses == oracle.losses, of
        assert outcome.weights.keys() == oracle.weights.keys(), of
        for name, value in oracle.weights.items():
            assert torch.equal(outcome.weights[name], value), (of, name)


@pytest.mark.quick_cases("2-2-fp32-zero1")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("stages", [2, 4])
def test_equals_deepspeed_and_the_plain_model(stages: int, replicas: int, precision: str) -> None:
    counts = (1, 3, 8)
    jobs = [Job(schedule, stages, counts[0], PRECISIONS[precision]) for schedule in [None, *MAIN_SCHEDULES]]
    oracle, *ours = outcomes_of(jobs, counts, stages * replicas)
    for schedule, outcomes in zip(MAIN_SCHEDULES, ours, strict=True):
        assert_equal(outcomes, oracle, schedule)
    training = PlainTraining(jobs[0], replicas)
    plain = [training.train(BATCHES, count) for count in counts]
    if precision.startswith("fp32"):
        assert_equal(oracle, plain, "plain")
    else:
        # bf16 keeps 8 bits of each activation and gradient; 15 of Adam's steps of 0.01 turn that into this difference.
        for of_engine, of_plain in zip(oracle, plain, strict=True):
            assert of_engine.losses == pytest.approx(of_plain.losses, rel=0.03)


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name not in MAIN_SCHEDULES])
@pytest.mark.quick_cases("interleaved-1f1b", "zb-v")
def test_the_other_schedules(schedule: str) -> None:
    oracle, ours = outcomes_of([Job(name, 3, 2, FP32_ZERO1) for name in (None, schedule)], (2, 7), 3)
    assert_equal(ours, oracle, schedule)


FP16 = {"enabled": True, "initial_scale_power": 8}
OTHER_PRECISIONS: dict[str, dict[str, Any]] = {
    "fp16-zero1": {"fp16": FP16, "zero_optimization": {"stage": 1}},
    "fp16-zero1-fp32": {"fp16": FP16, "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
    "fp16-overflow": {"fp16": {"enabled": True, "initial_scale_power": 24}, "zero_optimization": {"stage": 1}},
    "bf16-immediate": {**BF16_ZERO1_FP32, "bf16": {"enabled": True, "immediate_grad_update": True}},
}


def train_in_fp16(rank: int, job: Job) -> tuple[Outcome, int]:
    # The accelerator says no where the processor has no instructions for it; torch computes it all the same.
    get_accelerator().is_fp16_supported = lambda: True
    engine = job.engine()
    return train(engine, BATCHES), engine.skipped_steps


@pytest.mark.parametrize("precision", OTHER_PRECISIONS)
@pytest.mark.quick_cases("fp16-overflow")
def test_other_precisions(precision: str) -> None:
    results = {schedule: run_ranks(4, train_in_fp16, Job(schedule, 2, 3, OTHER_PRECISIONS[precision]))
               for schedule in (None, "zb-h1", "v-half")}
    oracle, skipped = merged([outcome for outcome, _ in results[None]]), results[None][0][1]
    assert (skipped > 0) == (precision == "fp16-overflow")
    for schedule in ("zb-h1", "v-half"):
        assert_equal([merged([outcome for outcome, _ in results[schedule]])], [oracle], schedule)
        assert all(count == skipped for _, count in results[schedule])


def cut_weights(schedule: Schedule) -> Schedule:
    """`schedule` with every W in three pieces."""
    return schedule.with_orders(tuple(
        tuple(piece for action in order for piece in (action.cut(3) if action.kind is Kind.W else (action,)))
        for order in schedule.orders))


def train_in_pieces(rank: int) -> Outcome:
    engine = Job("v-half", 2, 6, layers=tuple(specs(9))).engine()
    engine.use_schedule(cut_weights(engine.schedule()))
    return train(engine, BATCHES)


def test_weight_gradients_in_pieces() -> None:
    (oracle,), = outcomes_of([Job(None, 2, 6, layers=tuple(specs(9)))], (6,), 2)
    assert_equal([merged(run_ranks(2, train_in_pieces))], [oracle], "pieces")


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "v-half", "interleaved-1f1b"])
def test_one_rank(schedule: str) -> None:
    """No neighbour, no channel; the two chunks hand over on the spot."""
    oracle, ours = outcomes_of([Job(None, 1, 4), Job(schedule, 1, 4)], (4, 1), 1)
    assert_equal(ours, oracle, schedule)


def test_bf16_optimizer_without_zero() -> None:
    jobs = [Job(schedule, 2, 4, BF16_ZERO0) for schedule in (None, "zb-h1", "v-zb")]
    oracle, *ours = outcomes_of(jobs, (4,), 2)
    for outcomes in ours:
        assert_equal(outcomes, oracle, "bf16 zero-0")


def hooked(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A hook that writes to the first gradient of the backward."""
    loss = cross_entropy(outputs, labels)
    if loss.requires_grad:
        loss.register_hook(lambda gradient: gradient.mul_(0.5))
    return loss


def penalized(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A run of autograd of its own, from a copy of the outputs and back to them."""
    loss = cross_entropy(outputs, labels)
    if loss.requires_grad:
        gradient, = torch.autograd.grad(cross_entropy(outputs.clone(), labels), outputs, create_graph=True)
        loss = loss + gradient.float().pow(2).sum()
    return loss.reshape(1)


class Offset(torch.nn.Module):
    """A loss with a weight whose gradient is a view of the first gradient of the backward. The losses tell its value.
    """

    def __init__(self) -> None:
        super().__init__()
        self.offset = torch.nn.Parameter(torch.ones(1))

    def forward(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(outputs, labels) + self.offset.squeeze()


LOSSES = {"hooked": lambda: hooked, "penalized": lambda: penalized, "offset": Offset}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_losses_that_reach_into_the_backward(precision: str) -> None:
    # What DeepSpeed can't train: without ZeRO it refuses a run of autograd from the outputs, and BF16_Optimizer loses
    # the gradients of a loss's weights.
    without = {"fp32-zero0": "penalized", "bf16-zero1-fp32": "offset"}.get(precision)
    losses = [name for name in LOSSES if name != without]
    jobs = [Job(schedule, 2, 4, PRECISIONS[precision]) for schedule in (None, "1f1b", "v-half")]

    def outcome(job: Job, name: str) -> Outcome:
        found = train(job.engine(loss_fn=LOSSES[name]()), BATCHES)
        # Ranks that don't compute the loss have a copy that they don't train.
        found.weights.pop("loss_fn.offset", None)
        return found

    def body(rank: int) -> list[list[Outcome]]:
        return [[outcome(job, name) for job in jobs] for name in losses]

    for name, of_jobs in zip(losses, zip(*run_ranks(2, body), strict=True), strict=True):
        oracle, *ours = [merged(list(ranks)) for ranks in zip(*of_jobs, strict=True)]
        for each in ours:
            assert_equal([each], [oracle], (name, precision))
