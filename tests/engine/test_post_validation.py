"""A step validated afterwards is the step that asks all ranks first: bit for bit, whatever the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec
from eventually import eventually
from instruction_functions import around_instruction
from internals import count_rollbacks, kept_for_rollback
from pipelines import (BF16_ZERO1, FP32_ZERO1, LENGTH, SAMPLES, VOCABULARY, WIDTH, Dropping, Job, cross_entropy, data,
                       post_validated, tied_specs)
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ds_vshape.config.compatibility import check_post_validation
from ds_vshape.config.section import ConfigError
from ds_vshape.engine.post_validation import PostValidatingEngine
from ds_vshape.engine.verdict import NormLimits, StepReport, Verdict, judge
from ds_vshape.runtime.instructions import (AgreeOnForwards, AwaitVerdict, StepAhead, TellForwards, pass_of,
                                            stepping_ahead, training_instructions)
from ds_vshape.schedule.lowering import lower
from ds_vshape.schedule.named import SCHEDULES, build
from ds_vshape.schedule.passes import Kind
from ds_vshape.schedule.timeline import Times

BATCHES = range(6)
FP16: dict[str, Any] = {"fp16": {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 2, "hysteresis": 1},
                        "zero_optimization": {"stage": 1}}
SUMS_IN_FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}
WARM_UP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 9,
                                                       "warmup_type": "linear"}}}
MOMENTUM = {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}, "zero_allow_untested_optimizer": True}


class Remembering(Dropping):
    """A block with dropout whose output depends on what it has seen, which it keeps in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen + 0.1 * x.detach().mean((0, 1)).to(self.seen.dtype)
        return super().forward(x) + self.seen.to(x.dtype)


class Shifting(nn.Embedding):
    """An embedding that changes its input."""

    def __init__(self) -> None:
        super().__init__(VOCABULARY, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.add_(1).remainder_(VOCABULARY))


def remembering(blocks: int) -> tuple[Any, ...]:
    return (LayerSpec(Shifting), *[LayerSpec(Remembering)] * blocks, LayerSpec(nn.Linear, WIDTH, VOCABULARY))


def drawn(engine: Any, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches in one place of memory, from the generator that dropout uses too."""
    tokens = torch.empty(SAMPLES, LENGTH + 1, dtype=torch.long)
    for _ in range(engine.micro_batches):
        tokens.random_(VOCABULARY)
        yield tokens[:, :-1], tokens[:, 1:]


@dataclass(frozen=True)
class Outcome:
    """All that training leaves on a rank."""

    losses: list[float]
    norms: list[float]
    evaluated: list[float]
    steps: str
    events: list[Any]
    tensors: Any


class Events:
    """A monitor."""

    enabled = True

    def __init__(self) -> None:
        self.written: list[Any] = []

    def write_events(self, events: list[Any]) -> None:
        self.written += events


class Training:
    """One engine, and how many of its steps were taken back."""

    def __init__(self, job: Job, **module_options: Any) -> None:
        get_accelerator().is_fp16_supported = lambda: True
        torch.manual_seed(5)
        self.engine = job.engine(seed_layers=False, **module_options)
        self.engine.monitor = Events()
        self._redone = count_rollbacks(self.engine) if isinstance(self.engine, PostValidatingEngine) else [0]

    @property
    def redone(self) -> int:
        """The number of steps that were taken back."""
        return self._redone[0]

    def run(self, folder: Path | None) -> Outcome:
        """Train. With a `folder`, after the third batch evaluate, save, train on something else and load again; and
        set a learning rate by hand after each batch."""
        engine = self.engine
        losses, norms, evaluated = [], [], []
        for batch in BATCHES:
            losses.append(float(engine.train_batch(drawn(engine, batch))))
            norms.append(float(engine.get_global_grad_norm()))
            if folder is not None:
                engine.optimizer.param_groups[0]["lr"] = 1e-2 / (batch + 1)
            if folder is not None and batch == 2:
                evaluated.append(float(engine.eval_batch(data(engine, 9))))
                engine.train_batch(drawn(engine, batch))
                engine.save_checkpoint(str(folder))
                engine.train_batch(drawn(engine, batch))
                engine.load_checkpoint(str(folder))
        return self._outcome(losses, norms, evaluated)

    def _outcome(self, losses: list[float], norms: list[float], evaluated: list[float]) -> Outcome:
        engine, optimizer = self.engine, self.engine.optimizer
        weights = engine.module.state_dict()
        options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        scheduler = engine.lr_scheduler
        steps = [engine.global_steps, engine.skipped_steps, engine.global_samples, engine.was_step_applied(),
                 vars(optimizer.loss_scaler), options, scheduler and [scheduler.state_dict(), scheduler.get_last_lr()]]
        tensors = (weights, optimizer.single_partition_of_fp32_groups, list(optimizer.optimizer.state.values()))
        copied = tree_map(lambda value: value.clone() if torch.is_tensor(value) else value, tensors)
        return Outcome(losses, norms, evaluated, str(steps), sorted(engine.monitor.written), copied)


@dataclass(frozen=True)
class Case:
    """A job, how many of its steps have to be taken back and how many of them skipped at least, and whether training
    is interrupted by evaluation and checkpoints."""

    job: Job
    redone: range
    skipped: int = 0
    interrupted: bool = False


def both(rank: int, cases: list[Case], folder: Path) -> list[int]:
    """How many steps of each case were done twice; all else is compared here."""
    counts = []
    for number, case in enumerate(cases):
        print(case)
        places = [folder / f"{number}-{which}" if case.interrupted else None for which in ("asking", "validated")]
        expected = Training(case.job).run(places[0])
        training = Training(post_validated(case.job))
        found = training.run(places[1])
        assert found.losses == expected.losses
        assert found.evaluated == expected.evaluated
        assert found.steps == expected.steps
        assert found.events == expected.events
        torch.testing.assert_close(found.norms, expected.norms, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.tensors, expected.tensors, rtol=0, atol=0)
        assert training.engine.skipped_steps >= case.skipped
        counts.append(training.redone)
    return counts


def job(schedule: str, stages: int, *configs: dict[str, Any], clip: float = 0.0, layers: Any = None) -> Job:
    merged = {key: value for config in configs for key, value in config.items()}
    return Job(schedule, stages, 2 * stages, {**merged, "gradient_clipping": clip},
               remembering(2 * stages - 1) if layers is None else layers)


# Where all are clipped, only the first wasn't expected to be.
NEVER, SOMETIMES, ONCE = range(1), range(1, 6), range(1, 2)
TIED = tuple(tied_specs(4))
CASES = {2: [Case(job("v-zb", 2, FP32_ZERO1, clip=100.0), NEVER),
             Case(job("v-zb", 2, FP32_ZERO1, WARM_UP, clip=2.4), SOMETIMES),
             Case(job("1f1b", 2, BF16_ZERO1, MOMENTUM, clip=1e-2), ONCE, interrupted=True),
             Case(job("1f1b", 2, FP16, WARM_UP), SOMETIMES, skipped=1),
             Case(job("v-half", 2, FP16, SUMS_IN_FP32, clip=2.2), SOMETIMES, skipped=1),
             Case(job("zb-h1", 2, FP32_ZERO1, clip=4.9, layers=TIED), SOMETIMES)],
         # The first two with two replicas.
         4: [Case(job("v-zb", 2, FP16, WARM_UP, clip=2.4), range(1, 9), skipped=1, interrupted=True),
             Case(job("1f1b", 2, FP32_ZERO1, clip=4.9, layers=TIED), SOMETIMES),
             Case(job("v-zb", 4, BF16_ZERO1, clip=50.0), SOMETIMES)]}


@pytest.mark.parametrize("world", CASES)
@pytest.mark.quick_cases("2")
def test_equals_the_step_that_asks_first(world: int, tmp_path: Path) -> None:
    """Losses, weights, optimizer states, loss scale, learning rates, counters, what monitors hear, bit for bit; norms
    to rounding. With dropout, buffers that change, inputs that change in place, data drawn from dropout's generator."""
    for counts in run_ranks(world, both, CASES[world], tmp_path):
        for count, case in zip(counts, CASES[world], strict=True):
            assert count in case.redone, case


def weighted(logits: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    labels, weight = targets
    return cross_entropy(logits, labels) * weight.mean()


def rollbacks_by_batch(rank: int, clipped: list[int], batches: int) -> list[int]:
    """How many steps had been taken back after each batch, when those of the batches in `clipped` were clipped."""
    training = Training(post_validated(job("v-zb", 2, FP32_ZERO1, clip=50.0)), loss_fn=weighted)
    engine, counts = training.engine, []
    for batch in range(batches):
        weight = torch.full((SAMPLES,), 1e3 if batch in clipped else 1.0)
        engine.train_batch(iter([(inputs, (labels, weight)) for inputs, labels in data(engine, batch)]))
        engine.settle()
        counts.append(training.redone)
    return counts


def test_after_a_clipped_step_the_next_ones_ask_first_until_one_is_not_clipped() -> None:
    for counts in run_ranks(2, rollbacks_by_batch, [1, 2, 3, 6], 8):
        assert counts == [0, 1, 1, 1, 1, 1, 2, 2]


def step_beside_one_that_waits(rank: int, done: Path) -> None:
    """Rank 1 begins no step before rank 0 has ended its own."""
    engine = Job({"name": "v-zb", "optimizer_post_validation": True}, 2, 4, FP32_ZERO1).engine()

    def in_turn(step: Callable[[], None]) -> None:
        if rank == 1:
            eventually(f"rank 0 has done step {engine.global_steps}", done.exists)
            done.unlink()
        step()
        if rank == 0:
            done.touch()

    around_instruction(engine, StepAhead, in_turn)
    for batch in range(3):
        engine.train_batch(data(engine, batch))


def test_a_step_does_not_wait_for_other_pipeline_ranks(tmp_path: Path) -> None:
    run_ranks(2, step_beside_one_that_waits, tmp_path / "done")


def what_is_kept(rank: int) -> tuple[int, int, int]:
    engine = Job({"name": "v-half", "optimizer_post_validation": True}, 2, 4, BF16_ZERO1, remembering(4)).engine()
    for batch in range(2):
        engine.train_batch(data(engine, batch))
    buffers = sum(buffer.nbytes for buffer in engine.module.buffers())
    kept = sum(tensor.nbytes for tensor in kept_for_rollback(engine)) + buffers
    return kept, engine.memory_report()[rank].rollback, buffers


def test_what_is_kept_is_predicted() -> None:
    for kept, predicted, buffers in run_ranks(2, what_is_kept):
        assert kept == predicted > buffers > 0


# -- the verdict

GOOD = StepReport(False, False, 3.0)


@pytest.mark.parametrize("reports, replicas, limits, expected", [
    ([GOOD, StepReport(False, False, 4.0)], 1, NormLimits(0.0, 1.0), (Verdict.ACCEPTED, 5.0)),
    ([GOOD, StepReport(False, False, 4.0)] * 2, 2, NormLimits(0.0, 2.0), (Verdict.ACCEPTED, 2.5)),
    ([GOOD], 1, NormLimits(3.1, 1.0), (Verdict.ACCEPTED, 3.0)),
    ([GOOD], 1, NormLimits(2.9, 1.0), (Verdict.REDO, 3.0)),
    # DeepSpeed clips from 1e-6 below the limit on; what is too close to say counts as clipped.
    ([GOOD], 1, NormLimits(3.0 + 1e-5, 1.0), (Verdict.REDO, 3.0)),
    ([GOOD], 1, NormLimits(1.6, 2.0), (Verdict.ACCEPTED, 1.5)),
    ([GOOD], 1, NormLimits(1.4, 2.0), (Verdict.REDO, 1.5)),
    ([GOOD, StepReport(False, True, 0.0)], 1, NormLimits(0.0, 1.0), (Verdict.REDO, math.inf)),
    ([GOOD, StepReport(False, False, math.nan)], 1, NormLimits(0.0, 1.0), (Verdict.REDO, math.inf)),
    ([GOOD, StepReport(False, False, 1e20)], 1, NormLimits(0.0, 1.0), (Verdict.REDO, math.inf)),
    ([StepReport(True, False, 0.0), StepReport(False, True, 0.0)], 1, NormLimits(0.0, 1.0), (Verdict.FAILED, math.inf)),
])
def test_verdicts(reports: list[StepReport], replicas: int, limits: NormLimits,
                  expected: tuple[Verdict, float]) -> None:
    sent = [StepReport.of(report.numbers()) for report in reports]
    assert judge(sent, replicas, limits) == expected


def test_programs_tell_and_wait_where_nobody_is_held_up() -> None:
    for name in SCHEDULES:
        for micro_batches in (1, 2, 7):
            schedule = build(name, 3, micro_batches)
            for program in lower(schedule, Times.uniform(schedule.placement.stages)):
                plain = training_instructions(program)
                instructions = stepping_ahead(plain)
                kinds = [type(instruction) for instruction in instructions]
                assert kinds[-2:] == [AgreeOnForwards, StepAhead]
                assert [i for i in instructions[:-2] if type(i) not in (AwaitVerdict, TellForwards)] == plain[:-4]
                passes = [pass_of(instruction) for instruction in instructions]
                await_at, tell_at = kinds.index(AwaitVerdict), kinds.index(TellForwards)
                assert all(action.kind is Kind.F for action in passes[:await_at] if action)
                following = next(action for action in passes[await_at:] if action)
                assert following.kind in (Kind.B, Kind.BW) or tell_at == await_at - 1
                assert not any(action and action.kind is Kind.F for action in passes[tell_at:])


@pytest.mark.parametrize("config, message", [
    ({}, "zero_optimization.stage = 0: must be 1"),
    ({"bf16": {"enabled": True}}, "zero_optimization.stage = 0: must be 1"),
    ({**BF16_ZERO1, **SUMS_IN_FP32}, "bf16 and data_types.grad_accum_dtype = 'fp32': must be 'bf16'"),
    ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
     "zero_optimization.offload_optimizer.device = 'cpu': must be 'none'"),
    ({**FP32_ZERO1, "torch_autocast": {"enabled": True, "dtype": "float16"}},
     "torch_autocast.dtype = 'float16': must be 'bfloat16'"),
])
def test_what_cannot_be_taken_back_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_post_validation(config)
    assert f"pipeline_schedule.optimizer_post_validation = true with {message}" in str(error.value)


def test_what_can_be_taken_back_is_accepted() -> None:
    for config in (FP32_ZERO1, BF16_ZERO1, FP16, {**FP16, **SUMS_IN_FP32}, {**FP32_ZERO1, **SUMS_IN_FP32}):
        check_post_validation(config)
