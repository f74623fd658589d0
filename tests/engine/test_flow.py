"""What flows between stages: members of every kind, gradients that are missing, shapes that change.

The oracle is DeepSpeed's own engine with one stage, where nothing flows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec
from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler
from pipelines import BATCHES, FP32, FP32_ZERO1, SAMPLES, VOCABULARY, WIDTH, Block, Job, data, merged, train
from ranks import RanksFailed, run_ranks
from torch import Tensor, nn

SCHEDULES = ["1f1b", "zb-h1", "v-half", "v-zb"]
Members = tuple[Any, ...]


class Embed(nn.Module):
    """Tokens -> (x, a mask by content, a count by content, the tokens)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, tokens: Tensor) -> Members:
        return self.embedding(tokens), tokens > 5, tokens.sum(), tokens


class WithMembers(Block):
    """A block on the first of several members, which uses the others too."""

    def forward(self, inputs: Members) -> Members:
        x, mask, count, tokens = inputs
        assert mask.dtype is torch.bool and count.dtype is tokens.dtype is torch.int64
        return super().forward(x.masked_fill(mask[..., None], 0.0)) * (count % 3), ~mask, count + 1, tokens


class Branching(Block):
    """(x, y) -> (x, another y): both want gradients, and the y that came in isn't used."""

    def forward(self, inputs: Any) -> Members:
        x = inputs[0] if isinstance(inputs, tuple) else inputs
        return super().forward(x), self.up(x)


class WithNone(Block):
    """(x, None, x without gradient) -> the same."""

    def forward(self, inputs: Any) -> Members:
        x, nothing, apart = inputs if isinstance(inputs, tuple) else (inputs, None, inputs.detach())
        assert nothing is None and not apart.requires_grad
        return super().forward(x + 0.1 * apart), None, x.detach()


class Deciding(Block):
    """(x, y): y wants a gradient, and gets one, in some micro-batches only."""

    def forward(self, inputs: Any) -> Members:
        x, y = inputs if isinstance(inputs, tuple) else (inputs, inputs)
        x = super().forward(x + y)
        return x, x * 0.5 if float(x.detach().sum()) > 0 else x.detach()


class Detaching(Block):
    """Nothing before it gets a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class Empty(Block):
    """(x, a tensor of no elements) -> the same."""

    def forward(self, inputs: Any) -> Members:
        x = inputs[0] if isinstance(inputs, tuple) else inputs
        return super().forward(x), x[:0]


class Conjugating(Block):
    """(complex numbers with the conjugate bit, theirs with the negative bit, integers of 16 bits) -> the same; the
    gradients of the first have the conjugate bit too."""

    def forward(self, inputs: Any) -> Members:
        if isinstance(inputs, tuple):
            pairs, imaginary, places = inputs
            assert places.dtype is torch.int16
            x = torch.view_as_real(pairs.conj().resolve_conj()).flatten(-2) + (imaginary.sum() + places.sum()) * 0.01
        else:
            x = inputs
        pairs = torch.view_as_complex(super().forward(x).unflatten(-1, (-1, 2)).contiguous()).conj()
        imaginary = pairs.detach().imag
        assert pairs.is_conj() and imaginary.is_neg()
        return pairs, imaginary, x.detach().argmax(-1).short()


class Real(nn.Module):
    def forward(self, inputs: Members) -> Tensor:
        return torch.view_as_real(inputs[0].conj().resolve_conj()).flatten(-2)


class First(nn.Module):
    def forward(self, inputs: Members) -> Tensor:
        return inputs[0]  # type: ignore[no-any-return]


EMBEDDING, HEAD = LayerSpec(nn.Embedding, VOCABULARY, WIDTH), LayerSpec(nn.Linear, WIDTH, VOCABULARY)
FLOWS: dict[str, list[Any]] = {
    "masks, counts and tokens by content": [LayerSpec(Embed), *[LayerSpec(WithMembers)] * 5, LayerSpec(First), HEAD],
    "members that nobody uses": [EMBEDDING, *[LayerSpec(Branching)] * 5, LayerSpec(First), HEAD],
    "none, and a float without gradient": [EMBEDDING, *[LayerSpec(WithNone)] * 5, LayerSpec(First), HEAD],
    "no gradient from a stage on": [EMBEDDING, *[LayerSpec(Block)] * 2, LayerSpec(Detaching), *[LayerSpec(Block)] * 3,
                                    HEAD],
    "conjugated, negated and short": [EMBEDDING, *[LayerSpec(Conjugating)] * 5, LayerSpec(Real), HEAD],
    "no elements": [EMBEDDING, *[LayerSpec(Empty)] * 5, LayerSpec(First), HEAD],
    "gradients in some micro-batches": [EMBEDDING, *[LayerSpec(Deciding)] * 5, LayerSpec(First), HEAD],
}
# Its signatures change from one micro-batch to the next.
DYNAMIC = "gradients in some micro-batches"


def train_and_evaluate(rank: int, jobs: list[Job], dynamic: bool) -> list[Any]:
    outcomes = []
    for job in jobs:
        engine = job.engine(dynamic_shape=dynamic)
        first = train(engine, BATCHES[:2])
        evaluated = float(engine.eval_batch(data(engine, 99), num_micro_batches=2))
        outcomes.append((first.losses, evaluated, train(engine, BATCHES[2:])))
    return outcomes


def all_of(jobs: list[Job], ranks: int, dynamic: bool) -> list[tuple[list[float], Any]]:
    """For each job, the losses before and in an evaluation, and what came out of the training after it."""
    return [([*of_ranks[0][0], of_ranks[0][1]], merged([outcome for _, _, outcome in of_ranks]))
            for of_ranks in zip(*run_ranks(ranks, train_and_evaluate, jobs, dynamic))]


@pytest.mark.quick_cases("gradients in some micro-batches", "masks, counts and tokens by content", "no elements")
@pytest.mark.parametrize("flow", FLOWS)
def test_members(flow: str) -> None:
    layers = tuple(FLOWS[flow])
    (losses, oracle), = all_of([Job(None, 1, 4, FP32, layers)], 1, True)
    jobs = [Job(schedule, 2, 4, precision, layers) for schedule, precision in
            zip(SCHEDULES, (FP32_ZERO1, FP32, FP32, FP32_ZERO1), strict=True)]
    for job, (ours, outcome) in zip(jobs, all_of(jobs, 2, flow == DYNAMIC), strict=True):
        assert ours == pytest.approx(losses, rel=1e-6) and outcome.losses == pytest.approx(oracle.losses, rel=1e-5), job
        for name, value in oracle.weights.items():
            torch.testing.assert_close(outcome.weights[name], value, rtol=1e-4, atol=1e-5, msg=f"{name}, {job}")


def test_a_gradient_that_comes_and_goes_needs_dynamic_shapes() -> None:
    job = Job("v-half", 2, 4, layers=tuple(FLOWS[DYNAMIC]))
    with pytest.raises(RanksFailed, match="changed: .*float32 with gradient.*dynamic_shape=True"):
        run_ranks(2, train_and_evaluate, [job], False, timeout=60)


# -- shapes


def of_length(batch: int, number: int, length: int) -> tuple[Tensor, Tensor]:
    """As `micro_batch`, of another length."""
    generator = torch.Generator().manual_seed(1000 * batch + number)
    tokens = torch.randint(VOCABULARY, (SAMPLES, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def samples(batch: int, count: int, *lengths: int) -> Any:
    """`count` micro-batches, of `lengths` in turn."""
    return iter([of_length(batch, number, lengths[number % len(lengths)]) for number in range(count)])


def train_and_evaluate_lengths(rank: int, job: Job, dynamic: bool) -> list[float]:
    """Evaluations of other lengths, and of several at once, between batches of one length, then of another."""
    engine = job.engine(dynamic_shape=dynamic)
    losses = []
    for batch, (length, others) in enumerate([(3, (5,)), (3, (2, 7, 4)), (6, (3,)), (6, (6, 1))]):
        if batch == 2 and not dynamic:
            engine.reset_activation_shape()
        losses.append(float(engine.train_batch(samples(batch, engine.micro_batches, length))))
        losses.append(float(engine.eval_batch(samples(50 + batch, 3, *others), num_micro_batches=3)))
    return losses


def train_lengths_in_a_batch(rank: int, job: Job) -> list[float]:
    engine = job.engine(dynamic_shape=True)
    return [float(engine.train_batch(samples(batch, engine.micro_batches, 3, 5, 2))) for batch in range(3)]


SHALLOW = (EMBEDDING, *[LayerSpec(Block)] * 6, HEAD)


@pytest.mark.quick_cases("v-zb", "1f1b")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lengths_that_change(schedule: str) -> None:
    stock, job = Job(None, 1, 4, layers=SHALLOW), Job(schedule, 2, 4, layers=SHALLOW)
    oracle = run_ranks(1, train_and_evaluate_lengths, stock, True)
    assert run_ranks(2, train_and_evaluate_lengths, job, False) == oracle * 2
    assert run_ranks(2, train_and_evaluate_lengths, job, True) == oracle * 2
    assert run_ranks(2, train_lengths_in_a_batch, job) == run_ranks(1, train_lengths_in_a_batch, stock) * 2


CURRICULUM = {"min_difficulty": 2, "max_difficulty": 8, "schedule_type": "fixed_linear",
              "schedule_config": {"total_curriculum_step": 4, "difficulty_step": 2}}


def train_by_curriculum(rank: int, job: Job) -> tuple[list[float], list[int]]:
    """DeepSpeed's scheduler says how long sequences are; the script cuts them and announces a change."""
    engine, scheduler = job.engine(), CurriculumScheduler(CURRICULUM)
    losses, lengths = [], [0]
    for batch in range(6):
        lengths.append(scheduler.update_difficulty(batch + 1))
        if lengths[-1] != lengths[-2]:
            engine.reset_activation_shape()
        losses.append(float(engine.train_batch(samples(batch, engine.micro_batches, lengths[-1]))))
    return losses, lengths[1:]


def legacy_curriculum(rank: int) -> str:
    with pytest.raises(Exception) as caught:
        Job("v-half", 2, 2, {"curriculum_learning": {"enabled": True}}).engine()
    return str(caught.value)


@pytest.mark.slow
def test_curriculum() -> None:
    """A sequence length that grows; the old key of the config is refused by DeepSpeed, with the way out."""
    (losses, lengths), = run_ranks(1, train_by_curriculum, Job(None, 1, 4, layers=SHALLOW))
    assert lengths == sorted(lengths) and lengths[0] == 2 and lengths[-1] == 8
    for schedule in SCHEDULES:
        results = run_ranks(2, train_by_curriculum, Job(schedule, 2, 4, layers=SHALLOW))
        assert results == [(losses, lengths)] * 2, schedule
    assert all("data_efficiency.data_sampling.curriculum_learning" in text for text in run_ranks(2, legacy_curriculum))
