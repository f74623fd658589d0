"""The mean over tokens: losses and gradients of a batch are those of one concatenated batch of all micro-batches and
replicas, in the plain model and in double precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from parallel_pipelines import DATA, MODEL, PIPE, TENSOR, parallel_engine
from pipelines import (BF16_ZERO1, FP32, FP32_ZERO1, LENGTH, VOCABULARY, Job, PlainModel, cross_entropy, specs,
                       tied_specs)
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional

from ds_vshape.models.gpt import gpt_layers
from ds_vshape.runtime.token_mean import averages_tokens

MICRO_BATCHES = 4
# Steps as long as the gradient is, exactly: weights then tell the gradient to all its bits.
STEP = 2.0**20
SGD = {"optimizer": {"type": "SGD", "params": {"lr": STEP}}, "zero_allow_untested_optimizer": True}
AUXILIARY = 0.5


def token_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    total = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return total / num_items_in_batch


def auxiliary_of(logits: Tensor) -> Tensor:
    return AUXILIARY * logits.float().square().mean()


def with_auxiliary(logits: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Any:
    return token_loss(logits, labels, num_items_in_batch), auxiliary_of(logits)


class OfParts(nn.Module):
    """A loss whose labels are a dictionary; a loss function with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def count_tokens(self, labels: Any) -> int:
        return int((labels["next"] >= 0).sum())

    def forward(self, logits: Tensor, labels: Any, num_items_in_batch: Any) -> Tensor:
        return token_loss(self.scale * logits, labels["next"], num_items_in_batch)


def micro_batch(batch: int, number: int, replica: int, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Tokens and the tokens after them, between none and all of which count."""
    generator = torch.Generator().manual_seed(10007 * batch + 101 * number + replica)
    tokens = torch.randint(VOCABULARY, (2, length + 1), generator=generator)
    counted = [2 * length, 1, 0, length + 1][(number + batch + replica) % 4]
    labels = tokens[:, 1:].clone()
    labels.view(-1)[counted:] = -100
    return tokens[:, :-1], labels


def batch_of(engine: Any, batch: int, count: int | None = None) -> Iterator[Any]:
    replica = engine.grid.get_data_parallel_rank()
    return iter([micro_batch(batch, number, replica) for number in range(count or engine.micro_batches)])


def concatenated(batch: int, count: int, replicas: int) -> tuple[Tensor, Tensor]:
    parts = [micro_batch(batch, number, replica) for replica in range(replicas) for number in range(count)]
    tokens, labels = zip(*parts)
    return torch.cat(tokens), torch.cat(labels)


@dataclass(frozen=True)
class Case:
    """A training batch and an evaluation."""

    schedule: Any
    config: dict[str, Any] = field(default_factory=dict)
    layers: Any = None
    loss_fn: Any = token_loss
    replicas: int = 1
    stages: int = 2

    @property
    def job(self) -> Job:
        return Job(self.schedule, self.stages, MICRO_BATCHES, {**SGD, **self.config}, self.layers)


@dataclass(frozen=True)
class Found:
    """The losses, the norm of the gradient, and the gradient by the names of weights."""

    loss: float
    evaluated: float
    norm: float
    gradients: dict[str, Tensor]


def trained(engine: Any) -> Found:
    evaluated = float(engine.eval_batch(batch_of(engine, 1, 3), num_micro_batches=3))
    before = {name: weight.detach().clone() for name, weight in engine.module.named_parameters()}
    loss = float(engine.train_batch(batch_of(engine, 0)))
    after = dict(engine.module.named_parameters())
    gradients = {name: (weight - after[name].detach()) / STEP for name, weight in before.items()}
    return Found(loss, evaluated, float(engine.get_global_grad_norm() or 0.0), gradients)


def on_ranks(rank: int, cases: list[Case]) -> list[Found]:
    return [trained(case.job.engine(loss_fn=case.loss_fn)) for case in cases]


def plain(case: Case) -> Found:
    """One forward over everything."""
    model = PlainModel(case.job.specs()).double()
    tokens, labels = concatenated(1, 3, case.replicas)
    with torch.no_grad():
        evaluated = float(plain_loss(case, model(tokens), labels))
    tokens, labels = concatenated(0, MICRO_BATCHES, case.replicas)
    loss = plain_loss(case, model(tokens), labels)
    loss.backward()
    clip = case.config.get("gradient_clipping") or float("inf")
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), clip))
    return Found(loss.item(), evaluated, norm, {name: p.grad for name, p in model.named_parameters()})


def plain_loss(case: Case, logits: Tensor, labels: Tensor) -> Tensor:
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    # All micro-batches are of one size, so the mean of their auxiliary losses is that over everything.
    return loss + AUXILIARY * logits.square().mean() if case.loss_fn is with_auxiliary else loss


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    names = sorted(found.keys() & expected.keys())
    assert names
    difference, size = (torch.cat([of[name].double().flatten() for name in names]) for of in (
        {name: found[name] - expected[name] for name in names}, expected))
    return float(difference.norm() / size.norm())


def check(cases: list[Case], world: int) -> None:
    for rank, outcomes in enumerate(run_ranks(world, on_ranks, cases)):
        for case, found in zip(cases, outcomes, strict=True):
            oracle = plain(case)
            about = f"{case.schedule} on rank {rank}"
            assert found.loss == pytest.approx(oracle.loss, rel=1e-6), about
            assert found.evaluated == pytest.approx(oracle.evaluated, rel=1e-6), about
            assert relative_error(found.gradients, oracle.gradients) < 1e-6, about
            if case.config.get("gradient_clipping"):
                assert oracle.norm > case.config["gradient_clipping"]
                assert found.norm == pytest.approx(oracle.norm, rel=1e-6), about


def test_gradients_are_those_of_one_concatenated_batch() -> None:
    """With replicas, ZeRO-0 and 1, clipping after it, tied heads, and losses of all forms."""
    clipped = {"gradient_clipping": 0.2}
    check([Case("1f1b", {**FP32, **clipped}, replicas=2), Case("v-half", {**FP32_ZERO1, **clipped}, replicas=2),
           Case("zb-h1", FP32_ZERO1, tuple(tied_specs(3)), replicas=2),
           Case("v-zb", FP32, tuple(tied_specs(3)), with_auxiliary, replicas=2)], 4)


@pytest.mark.slow
@pytest.mark.parametrize("config", [FP32, FP32_ZERO1], ids=["zero0", "zero1"])
def test_under_every_schedule(config: dict[str, Any]) -> None:
    """With a micro-batch that has no token and one that has few, fusion, and steps that are validated later."""
    names = ("gpipe", "1f1b", "1f1b-v", "interleaved-1f1b", "zb-h1", "zb-h2", "v-min", "v-half", "v-zb", "adaptive")
    later = [Case({"name": "v-zb", "optimizer_post_validation": True}, config)] if config is FP32_ZERO1 else []
    check([*(Case(name, config) for name in names), *later,
           Case({"name": "v-half", "gradient_accumulation_fusion": True}, config),
           Case("v-half", {**config, "pipeline": {"activation_checkpoint_interval": 1}})], 2)


def on_tensor_ranks(rank: int, job: Job) -> Found:
    return trained(parallel_engine(job, DATA, "type:Block", token_loss))


def test_with_tensor_parallel_layers_and_replicas() -> None:
    case = Case("v-half", {**FP32_ZERO1, "gradient_clipping": 0.2}, tuple(gpt_layers(MODEL)), replicas=DATA)
    job = Job("v-half", PIPE, MICRO_BATCHES, {**SGD, **case.config}, case.layers)
    oracle = plain(case)
    whole = {"position_embedding": "1.embedding.weight", "head_norm": "6.weight"}
    for found in run_ranks(PIPE * DATA * TENSOR, on_tensor_ranks, job):
        assert found.loss == pytest.approx(oracle.loss, rel=1e-6)
        assert found.evaluated == pytest.approx(oracle.evaluated, rel=1e-6)
        assert found.norm == pytest.approx(oracle.norm, rel=1e-6)
        held = {name: value for name, value in found.gradients.items() if name in whole.values()
                or name.startswith("tied_modules")}
        if held:
            assert relative_error(held, oracle.gradients) < 2e-6


# -- which mean


def without_default(outputs: Any, labels: Any, num_items_in_batch: Any) -> Any: ...


def with_default(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any: ...


@pytest.mark.parametrize("of_config, of_module, loss_fn, expected", [
    (None, None, cross_entropy, False), (None, None, with_default, True), (None, None, OfParts(), True),
    (None, None, None, False), ("micro_batches", None, with_default, False),
    (None, "micro_batches", with_default, False),
    ("micro_batches", None, cross_entropy, False), ("tokens", "micro_batches", with_default, True),
    ("micro_batches", "tokens", with_default, False), (None, "tokens", without_default, True)])
def test_what_decides(of_config: str | None, of_module: str | None, loss_fn: Any, expected: bool) -> None:
    assert averages_tokens(of_config, of_module, loss_fn) is expected


def means(rank: int) -> list[float]:
    found = []
    for section, option, loss_fn in ((None, None, functional_mean), (None, None, optional_mean),
                                     ("micro_batches", None, optional_mean), (None, "micro_batches", optional_mean),
                                     ("micro_batches", "tokens", optional_mean)):
        schedule = {"name": "v-half", **({} if section is None else {"loss_average": section})}
        engine = Job(schedule, 2, 2, SGD).engine(loss_fn=loss_fn, loss_average=option)
        found.append(float(engine.train_batch(batch_of(engine, 0, 2))))
    return found


def functional_mean(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def optional_mean(logits: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    mean = functional_mean(logits, labels)
    return mean if num_items_in_batch is None else token_loss(logits, labels, num_items_in_batch)


def test_micro_batches_are_averaged_where_that_is_asked_for() -> None:
    """As DeepSpeed does; all tokens count in one, and 1 in the other."""
    model = PlainModel(specs(3))
    parts = [micro_batch(0, number, 0) for number in range(2)]
    of_parts = [functional_mean(model(tokens), labels).item() for tokens, labels in parts]
    by_tokens = (2 * LENGTH * of_parts[0] + of_parts[1]) / (2 * LENGTH + 1)
    expected = [sum(of_parts) / 2, by_tokens, *[sum(of_parts) / 2] * 3]
    assert abs(expected[0] - by_tokens) > 0.01
    for found in run_ranks(2, means):
        assert found == pytest.approx(expected, rel=1e-6)


# -- data


class Counting:
    """An iterator that fills the same memory again for each micro-batch, and knows how often."""

    def __init__(self, engine: Any, batches: int) -> None:
        self._samples = [sample for batch in range(batches) for sample in batch_of(engine, batch)]
        self._tokens, self._labels = (torch.empty_like(part) for part in self._samples[0])
        self.drawn = 0

    def __iter__(self) -> Counting:
        return self

    def __next__(self) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, labels = self._samples[self.drawn]
        self.drawn += 1
        return self._tokens.copy_(tokens), {"next": self._labels.copy_(labels)}


def from_reused_memory(rank: int, schedule: str) -> tuple[list[float], list[int]]:
    engine = Job(schedule, 2, MICRO_BATCHES).engine(loss_fn=OfParts())
    iterator = Counting(engine, 2)
    losses, drawn = [], []
    for _ in range(2):
        losses.append(float(engine.train_batch(iterator)))
        drawn.append(iterator.drawn)
    return losses, drawn


@pytest.mark.parametrize("schedule", ["v-half", pytest.param("1f1b", marks=pytest.mark.slow)])
def test_data_in_reused_memory(schedule: str) -> None:
    """A batch draws its micro-batches and no more; labels of any form are counted by the loss function."""
    model = PlainModel(specs(3))
    tokens, labels = concatenated(0, MICRO_BATCHES, 1)
    results = run_ranks(2, from_reused_memory, schedule)
    for rank, (losses, drawn) in enumerate(results):
        assert losses == results[0][0] and losses[0] == pytest.approx(functional_mean(model(tokens), labels).item())
        assert drawn == ([0, 0] if schedule == "v-half" and rank == 1 else [4, 8])


def nothing_to_learn(rank: int, schedule: str) -> tuple[list[float], bool]:
    engine = Job(schedule, 2, 2, {**FP32_ZERO1, **SGD, "gradient_clipping": 1.0}).engine(loss_fn=token_loss)
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    empty = [(tokens, torch.full_like(labels, -100)) for tokens, labels in batch_of(engine, 0, 2)]
    losses = [float(engine.eval_batch(iter(empty))), float(engine.train_batch(iter(empty)))]
    unchanged = all(torch.equal(before[name], value) for name, value in engine.module.state_dict().items())
    losses.append(float(engine.train_batch(batch_of(engine, 1, 2))))
    return losses, unchanged


def test_a_batch_without_a_token_has_no_loss_and_no_gradient() -> None:
    for losses, unchanged in run_ranks(2, nothing_to_learn, "v-half"):
        assert losses[:2] == [0.0, 0.0] and unchanged and 0 < losses[2] < 10


class LateLoss:
    """Counts what it's given, and raises where that is asked for."""

    fails = False

    def count_tokens(self, labels: Tensor) -> Any:
        if LateLoss.fails:
            raise ZeroDivisionError("no count today")
        return (labels >= 0).sum()

    def __call__(self, logits: Tensor, labels: Tensor, num_items_in_batch: Any) -> Tensor:
        return token_loss(logits, labels, num_items_in_batch)


def cannot_count(engine: Any, batch: int) -> Iterator[Any]:
    LateLoss.fails = engine.grid.get_data_parallel_rank() == 1
    return batch_of(engine, batch)


def too_short(engine: Any, batch: int) -> Iterator[Any]:
    return batch_of(engine, batch, MICRO_BATCHES - 2 * engine.grid.get_data_parallel_rank())


def no_tensor(engine: Any, batch: int) -> Iterator[Any]:
    return iter([(tokens, (labels, labels)) for tokens, labels in batch_of(engine, batch)])


def through_failures(rank: int, schedule: Any, spoils: list[Callable[..., Any]]) -> Any:
    job = Job(schedule, 2, MICRO_BATCHES, FP32_ZERO1)
    losses: list[list[float]] = []
    errors = []
    for failing in (False, True):
        loss_fn = token_loss if no_tensor in spoils else LateLoss()
        engine = job.engine(loss_fn=loss_fn)
        losses.append([])
        for batch, spoil in enumerate(spoils):
            losses[-1].append(float(engine.train_batch(batch_of(engine, batch))))
            if failing:
                for act in (engine.train_batch, engine.eval_batch):
                    with pytest.raises(Exception) as error:
                        act(spoil(engine, 9))
                    errors.append(f"{type(error.value).__name__}: {error.value}")
                    LateLoss.fails = False
            losses[-1].append(float(engine.train_batch(batch_of(engine, batch + 10))))
    return losses, errors


@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("v-half", marks=pytest.mark.slow),
                                      pytest.param({"name": "v-zb", "optimizer_post_validation": True},
                                                   marks=pytest.mark.slow)])
def test_batches_that_fail_on_one_replica(schedule: Any) -> None:
    """No rank hangs, all raise, and training continues bit for bit."""
    for (oracle, losses), errors in run_ranks(4, through_failures, schedule, [cannot_count, too_short]):
        assert losses == oracle
        counting, _, short, _ = errors
        assert all("no count today" in error for error in errors[:2]), counting
        assert all(error.startswith("StopIteration") for error in errors[2:]), short


def through_one_iterator(rank: int) -> tuple[list[float], list[float]]:
    """The losses without a failure, and of one iterator in whose second batch tokens can't be counted."""
    job = Job("1f1b", 2, MICRO_BATCHES)
    engine = job.engine(loss_fn=LateLoss())
    oracle = [float(engine.train_batch(batch_of(engine, batch))) for batch in range(2)]
    engine = job.engine(loss_fn=LateLoss())
    samples = chain.from_iterable(batch_of(engine, batch) for batch in (0, 9, 1))
    losses = [float(engine.train_batch(samples))]
    LateLoss.fails = True
    with pytest.raises(Exception, match="no count today"):
        engine.train_batch(samples)
    LateLoss.fails = False
    return oracle, [*losses, float(engine.train_batch(samples))]


def test_data_continue_after_a_batch_whose_tokens_cannot_be_counted() -> None:
    for oracle, losses in run_ranks(2, through_one_iterator):
        assert losses == oracle


@pytest.mark.slow
def test_labels_that_nothing_counts_are_refused() -> None:
    for (oracle, losses), errors in run_ranks(2, through_failures, "v-half", [no_tensor]):
        assert losses == oracle
        for error in errors:
            assert ("the labels of a micro-batch are a tuple: must be a tensor, of which all but -100 count as tokens, "
                    "or loss_fn must have a function count_tokens(labels)") in error


# -- what else there is


def lengths(engine: Any, batch: int) -> Iterator[Any]:
    return iter([micro_batch(batch, number, 0, LENGTH + 2 * number - batch) for number in range(MICRO_BATCHES)])


def changing_lengths(rank: int, schedule: str) -> list[float]:
    engine = Job(schedule, 2, MICRO_BATCHES).engine(loss_fn=token_loss, dynamic_shape=True)
    return [float(engine.train_batch(lengths(engine, batch))) for batch in range(3)]


@pytest.mark.slow
def test_lengths_that_change() -> None:
    model = PlainModel(specs(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    expected = []
    for batch in range(3):
        parts = [(model(tokens), labels) for tokens, labels in lengths(None, batch)]
        tokens = sum(int((labels >= 0).sum()) for _, labels in parts)
        loss = sum((token_loss(logits, labels, tokens) for logits, labels in parts), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    for losses in run_ranks(2, changing_lengths, "v-half"):
        assert losses == pytest.approx(expected, rel=1e-5)


def five_batches(rank: int, jobs: list[Job]) -> list[list[float]]:
    get_accelerator().is_fp16_supported = lambda: True
    return [[float(engine.train_batch(batch_of(engine, batch))) for batch in range(5)]
            for engine in (job.engine(loss_fn=token_loss) for job in jobs)]


@pytest.mark.slow
def test_verified_and_validated_batches_and_loss_scales_change_nothing() -> None:
    """One batch runs twice, another is given up and runs again, and a scale is applied after the mean."""
    clipped = {**FP32_ZERO1, "gradient_clipping": 0.3}
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 8}, "zero_optimization": {"stage": 1}}
    jobs = [Job({"name": "v-zb", **more}, 2, MICRO_BATCHES, clipped) for more in (
        {}, {"verify_gradients": True}, {"optimizer_post_validation": True})]
    jobs += [Job("v-half", 2, MICRO_BATCHES, FP32_ZERO1), Job("v-half", 2, MICRO_BATCHES, BF16_ZERO1),
             Job("v-half", 2, MICRO_BATCHES, fp16)]
    for once, verified, validated, fp32, bf16, scaled in run_ranks(2, five_batches, jobs):
        assert verified == validated == once
        assert bf16 == pytest.approx(fp32, rel=2e-2)
        assert scaled == pytest.approx(fp32, rel=5e-3)


def no_loss(rank: int) -> list[float]:
    engine = Job("v-half", 2, MICRO_BATCHES).engine(loss_fn=token_loss)
    unlabelled = iter([(tokens, None) for tokens, _ in batch_of(engine, 0)])
    engine.eval_batch(unlabelled, compute_loss=False, reduce_output=None, bcast_loss=False)
    listed = engine.eval_batch(batch_of(engine, 0), reduce_output=None, bcast_loss=False)
    return [] if listed is None else [float(loss) for loss in listed]


@pytest.mark.slow
def test_evaluation_without_loss_and_without_reduction() -> None:
    """Nothing is counted where no loss is asked for; the mean of the parts is that over tokens."""
    model = PlainModel(specs(3))
    tokens, labels = concatenated(0, MICRO_BATCHES, 1)
    parts, _ = run_ranks(2, no_loss)
    assert len(parts) == MICRO_BATCHES
    assert sum(parts) / MICRO_BATCHES == pytest.approx(functional_mean(model(tokens), labels).item(), rel=1e-6)
