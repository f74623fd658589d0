"""Measuring activations takes nothing from layers, and what can't be measured stays unknown and harms nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec
from internals import ask_for_plan, break_meter, nothing_measured, plan_requests
from logged import lines_of
from pipelines import LENGTH, SAMPLES, WIDTH, Block, Job, profiled
from ranks import run_ranks
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ds_vshape.config.section import ScheduleConfig
from ds_vshape.engine.scheduling import MeasuredSchedules, schedules_for
from ds_vshape.health.preflight import Preflight
from ds_vshape.health.watch import watch_job
from ds_vshape.schedule.activations import Activations, peak_activations
from ds_vshape.schedule.placement import v
from ds_vshape.schedule.timeline import Times

BATCHES = 3
SCHEDULES = ["v-half", "v-zb", "zb-h1"]


class Calling(nn.Module):
    """A linear layer and a function of its output."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(WIDTH, WIDTH), function

    def forward(self, x: Tensor) -> Tensor:
        return x + self.function(self.linear(x))


def counted(x: Tensor) -> Tensor:
    """Under a dispatch mode of the layer's own, which must be alone."""
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    seen = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Counting():
        y = x.sin()
    return y * len(seen)


def planned_on_fakes(x: Tensor) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True):
        shape = torch.empty(x.shape).transpose(0, 1).shape
    return x.reshape(shape).sin().reshape(x.shape)


def without_hooks(x: Tensor) -> Tensor:
    with disable_saved_tensors_hooks("none here"):
        return x.sin() * x


def saved_elsewhere(x: Tensor) -> Tensor:
    with save_on_cpu():
        return x.sin() * x


def inferred(x: Tensor) -> Tensor:
    with torch.inference_mode():
        scale = x.detach().abs().max() + 1
    return x / scale.item()


FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    lambda x: torch.func.grad(lambda t: t.sin().sum())(x),
    lambda x: torch.func.vmap(torch.func.jacrev(torch.sin))(x.flatten()).reshape(x.shape),
    counted, planned_on_fakes, without_hooks, saved_elsewhere, inferred,
    lambda x: functional.dropout(checkpoint(torch.sin, x, use_reentrant=False), 0.3),
]


def branching(x: Tensor) -> Tensor:
    y: Tensor = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))
    return y


def floats(batch: int, number: int, empty: int = -1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(101 * batch + number)
    x = torch.randn(SAMPLES, LENGTH, WIDTH, generator=generator)
    return (x[:0], x[:0]) if number == empty else (x, x.sin())


def squares(outputs: Tensor, labels: Tensor) -> Tensor:
    return functional.mse_loss(outputs, labels, reduction="sum")


def train(engine: Any, empty: int = -1) -> list[float]:
    return [float(engine.train_batch(iter([floats(batch, number, empty) for number in range(engine.micro_batches)])))
            for batch in range(BATCHES)]


def state(engine: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in engine.module.parameters()] + [torch.get_rng_state()]


def job(schedule: Any, functions: list[Callable[[Tensor], Tensor]] = FUNCTIONS) -> Job:
    return Job(schedule, 2, 4, layers=tuple([LayerSpec(Calling, function) for function in functions]))


def measured_and_not(rank: int) -> None:
    for schedule in SCHEDULES:
        for fusion in False, True:
            section = {"name": schedule, "gradient_accumulation_fusion": fusion}
            # Compiled in each engine, which takes seconds.
            functions = FUNCTIONS + [branching] * (section == {"name": "v-half", "gradient_accumulation_fusion": True})
            engine = job(section, functions).engine(loss_fn=squares)
            losses = train(engine)
            sizes = engine.activation_sizes()
            assert sizes is not None and min(sizes.after_forward) > 0
            with nothing_measured():
                other = job(section, functions).engine(loss_fn=squares)
                assert train(other) == losses
            assert all(map(torch.equal, state(engine), state(other)))


@pytest.mark.slow
def test_layers_may_do_in_the_measured_batch_what_they_may_do_in_others() -> None:
    """Transforms, control flow, modes and hooks of their own; losses, weights and random numbers bit for bit."""
    run_ranks(2, measured_and_not)


def cannot(self: Any) -> None:
    raise RuntimeError("nothing to be seen here")


def with_unknown_sizes(rank: int, case: str) -> Any:
    blocks = [LayerSpec(Block) for _ in range(4)]
    trial = Job({"name": "v-half", "timeout_seconds": 20}, 2, 4, {"steps_per_print": 1}, layers=tuple(blocks))
    engine = trial.engine(loss_fn=squares, dynamic_shape=True)
    if case == "one rank" and rank:
        break_meter(engine, cannot)
    losses, lines = lines_of(lambda: train(engine, 1 if case == "empty" else -1))
    assert engine.activation_sizes() is None
    for memory in engine.memory_report():
        assert memory.activations_peak is memory.working is None
        assert memory.parameters > 0 and memory.total >= memory.parameters + memory.optimizer
        assert str(memory).startswith("at least ") and "activations peak unknown" in str(memory)
    return losses, lines


@pytest.mark.parametrize("case, reason", [
    ("one rank", "pipeline rank 1: RuntimeError: nothing to be seen here"),
    ("empty", "micro-batch 1 of stage 0 was empty"),
])
def test_unknown_sizes_are_said_once_and_harm_nothing(case: str, reason: str) -> None:
    (losses, lines), (others, nothing) = run_ranks(2, with_unknown_sizes, case)
    assert losses == others and len(losses) == BATCHES
    first, *reports = lines
    assert first.startswith("activations couldn't be measured in training batch 2") and reason in first
    assert len(reports) == 2 and all("activations peak unknown" in line for line in reports)
    assert nothing == []


def planned_without_sizes(rank: int) -> tuple[Any, Any, list[str]]:
    config = ScheduleConfig(**profiled("adaptive", memory_limit="20KB"))
    schedules = schedules_for(config, v(2), lambda: [0.0] * 3, lambda: None, lambda times: times,
                              Preflight(watch_job(60.0)), None)
    assert isinstance(schedules, MeasuredSchedules)
    requests = plan_requests(schedules)
    safe = schedules.first(6)
    _, lines = lines_of(lambda: ask_for_plan(schedules, Times.uniform(4)))
    return safe, requests[0], lines


def test_a_limit_in_bytes_without_sizes() -> None:
    """The plan takes no more memory than the schedule that was safe before, and the log says so once."""
    (safe, request, lines), = run_ranks(1, planned_without_sizes)
    assert request.limits == peak_activations(safe, Activations.counted(safe.placement))
    assert len(lines) == 1 and "memory_limit = 20000 can't be planned for" in lines[0]
