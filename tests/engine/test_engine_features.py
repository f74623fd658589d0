"""What DeepSpeed's engine does besides training: monitors, timers, profiler, optimizers, schedulers, additional losses.

The oracle is DeepSpeed's own pipeline engine, on as many ranks and the same data, wherever it works.
"""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import FP32_ZERO1, SAMPLES, Job, cross_entropy, data
from ranks import run_ranks
from torch import Tensor, nn

import ds_vshape

SCHEDULES = ["1f1b", "v-half", "v-zb"]
BATCHES = range(4)


def losses(engine: Any) -> list[float]:
    return [float(engine.train_batch(data(engine, batch))) for batch in BATCHES]


# -- monitors


def monitored(rank: int, job: Job, folder: Path) -> None:
    engine = job.engine()
    losses(engine)
    engine.eval_batch(data(engine, 9))


def test_monitors_get_what_deepspeed_gives_them(tmp_path: Path) -> None:
    """DeepSpeed's own csv monitor: the same files with the same values; what pipelines report is beside them."""

    def written(schedule: str | None) -> dict[str, str]:
        folder = tmp_path / str(schedule)
        config = {**FP32_ZERO1, "csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": "job"},
                  "steps_per_print": 2}
        run_ranks(2, monitored, Job(schedule, 2, 3, config), folder)
        return {file.name: file.read_text() for file in sorted(folder.rglob("*.csv"))}

    oracle = written(None)
    assert {"Train_Samples_train_loss.csv", "Train_Samples_lr.csv", "Train_Samples_eval_loss.csv"} <= oracle.keys()
    for schedule in SCHEDULES:
        found = written(schedule)
        ours = {name for name in found if name.startswith("Train_Pipeline_")}
        assert ours and {name: text for name, text in found.items() if name not in ours} == oracle


# -- timers and the profiler


def with_output(rank: int, job: Job) -> tuple[list[float], str]:
    output = io.StringIO()
    with redirect_stdout(output):
        engine = job.engine()
        trained = losses(engine)
        engine.eval_batch(data(engine, 9))
    return trained, output.getvalue()


@pytest.mark.quick_cases("v-half")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_wall_clock_breakdown(schedule: str) -> None:
    """DeepSpeed's own pipeline engine fails with it."""
    breakdown = {"wall_clock_breakdown": True, "steps_per_print": 2}
    (trained, output), _ = run_ranks(2, with_output, Job(schedule, 2, 3, {**FP32_ZERO1, **breakdown}))
    assert trained == run_ranks(2, with_output, Job(schedule, 2, 3, FP32_ZERO1))[0][0]
    lines = [line for line in output.splitlines() if "time (ms)" in line]
    micro = [line for line in lines if "fwd_microstep" in line]
    assert len(micro) == len(BATCHES) // 2
    for line in micro:
        times = {name: float(value) for name, value in re.findall(r"(\w+): ([\d.]+)", line)}
        assert min(times["batch_input"], times["fwd_microstep"], times["bwd_microstep"], times["step_microstep"]) > 0
        assert times["bwd_inner_microstep"] <= times["bwd_microstep"] + 0.5
    assert any("pipe_recv_grad" in line for line in lines)


@pytest.mark.quick_cases("v-half")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_flops_profiler(schedule: str) -> None:
    """The multiplications of one batch's forwards on rank 0, counted by hand; training is what it is without."""
    profiled = Job(schedule, 2, 3, {"flops_profiler": {"enabled": True, "profile_step": 2, "detailed": False}})
    (trained, output), (_, other) = run_ranks(2, with_output, profiled)
    assert trained == run_ranks(2, with_output, Job(schedule, 2, 3))[0][0]
    assert "Flops Profiler" not in other and output.count("Profile Summary at step 2") == 1
    macs = re.search(r"fwd MACs per GPU:\s+([\d.]+) (\w*)MACs", output)
    assert macs is not None
    count = float(macs[1]) * {"": 1, "K": 1e3, "M": 1e6}[macs[2]]
    samples, tokens, width, vocabulary = SAMPLES, 3, 8, 13
    # The embedding and 2 of 3 blocks, or the embedding, a block and the head.
    block, head = 2 * width * 2 * width, width * vocabulary
    rank_0 = block + head if schedule.startswith("v") else 2 * block
    assert count == pytest.approx(3 * samples * tokens * rank_0, rel=0.01)


def test_timers_and_profiler_together() -> None:
    config = {"flops_profiler": {"enabled": True, "profile_step": 1}, "wall_clock_breakdown": True,
              "steps_per_print": 1}
    (trained, output), _ = run_ranks(2, with_output, Job("v-zb", 2, 3, config))
    assert trained == run_ranks(2, with_output, Job("v-zb", 2, 3))[0][0]
    assert "Profile Summary at step 1" in output and "bwd_inner" in output


# -- optimizers and schedulers


def with_optimizer(rank: int, job: Job, kind: str) -> list[Any]:
    """Train with an optimizer and a scheduler of the client's, or of the config."""
    module = job.engine().module
    config = job.ds_config()
    options: dict[str, Any] = {"model_parameters": list(module.parameters())}
    if kind != "config":
        del config["optimizer"]
    if kind == "config":
        config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.05, "warmup_num_steps": 3}}
    elif kind == "objects":
        options["optimizer"] = torch.optim.AdamW(module.parameters(), lr=0.02, foreach=False)
        options["lr_scheduler"] = torch.optim.lr_scheduler.LambdaLR(options["optimizer"], lambda step: 0.5 ** step)
    else:
        options["optimizer"] = lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9, foreach=False)
        options["lr_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2)
    engine, optimizer, _, scheduler = ds_vshape.initialize(model=module, config=config, **options)
    seen: list[Any] = []
    for batch in BATCHES:
        seen += [float(engine.train_batch(data(engine, batch))), *engine.get_lr()]
    assert optimizer is engine.optimizer and scheduler is engine.lr_scheduler
    return [*seen, type(scheduler).__name__, engine.global_steps, engine.global_samples]


@pytest.mark.quick_cases("objects", "callables")
@pytest.mark.parametrize("kind", ["config", "objects", "callables"])
def test_optimizers_and_schedulers(kind: str) -> None:
    oracle = run_ranks(2, with_optimizer, Job(None, 2, 3), kind)
    assert len(set(oracle[0][1:-3:2])) > 1, "the rate must change"
    for schedule in SCHEDULES:
        assert run_ranks(2, with_optimizer, Job(schedule, 2, 3), kind) == oracle


# -- what a batch is made of


class WithPenalty:
    """What a subclass of PipelineModule may report besides its loss: values that the loss function leaves behind."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {"confidence": torch.zeros(()), "squares": torch.zeros(())}

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.values = {"confidence": logits.softmax(-1).amax(-1).mean(), "squares": logits.square().mean()}
        return cross_entropy(logits, labels) + 0.1 * self.values["squares"]


def with_additional_losses(rank: int, job: Job) -> list[Any]:
    loss_fn = WithPenalty()
    engine = job.engine(loss_fn=loss_fn)
    engine.module.get_additional_losses = lambda: loss_fn.values
    seen: list[Any] = []
    for batch in BATCHES:
        seen.append(float(engine.train_batch(data(engine, batch))))
        seen.append({name: float(value) for name, value in engine.get_additional_losses().items()})
    return seen


def test_additional_losses() -> None:
    """Means over micro-batches and replicas, known on every rank."""
    oracle = run_ranks(4, with_additional_losses, Job(None, 2, 3, FP32_ZERO1))
    assert set(oracle[0][1]) == {"confidence", "squares"} and 0 < oracle[0][1]["confidence"] < 1
    for schedule in SCHEDULES:
        assert run_ranks(4, with_additional_losses, Job(schedule, 2, 3, FP32_ZERO1)) == oracle


def reversed_tokens(sample: Any) -> Any:
    """Called on every rank that loads, as DeepSpeed's `set_batch_fn` says."""
    inputs, labels = sample
    return inputs.flip(-1), labels.flip(-1)


def with_changes(rank: int, job: Job) -> list[Any]:
    """A function over the batches, another batch size after each, evaluation in all forms between."""
    engine = job.engine()
    engine.set_batch_fn(reversed_tokens)
    seen: list[Any] = []
    for batch, micro_batches in enumerate((2, 5, 1, 3)):
        engine.set_train_batch_size(micro_batches * SAMPLES * engine.dp_world_size)
        seen += [float(engine.train_batch(data(engine, batch))), engine.train_batch_size()]
        seen.append(float(engine.eval_batch(data(engine, 7))))
        parts = engine.eval_batch(data(engine, 7), reduce_output=None, bcast_loss=False, num_micro_batches=1)
        quiet = engine.eval_batch(data(engine, 8), bcast_loss=False, num_micro_batches=1)
        loads = engine.is_last_stage()
        seen.append([[float(part) for part in parts], float(quiet)] if loads else None)
    with pytest.raises(ValueError):
        engine.set_train_batch_size(SAMPLES * engine.dp_world_size + 1)
    return seen


def test_changes_between_batches() -> None:
    """Bit for bit DeepSpeed's own; what isn't broadcast is known where the loss is computed."""
    oracle = run_ranks(4, with_changes, Job(None, 2, 3, FP32_ZERO1))
    expected, = {str(seen) for seen in oracle if seen[3] is not None and seen == oracle[2]}
    for schedule in SCHEDULES:
        ours = run_ranks(4, with_changes, Job(schedule, 2, 3, FP32_ZERO1))
        assert expected in [str(seen) for seen in ours]
        known = [[value for value in seen if not isinstance(value, list) and value is not None] for seen in ours]
        assert all(values == known[0] for values in known)


# -- layers that a script changes


class LowRank(nn.Module):
    """An adapter of a script's own around a frozen layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)
        for weight in (self.down.weight, self.up.weight):
            with torch.no_grad():
                weight.copy_(torch.arange(weight.numel()).reshape(weight.shape) / weight.numel() - 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + self.up(self.down(x))
        return y


def train_adapters(rank: int, job: Job) -> list[float]:
    module = job.module()
    module.requires_grad_(False)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, LowRank(child))
    for chunk in getattr(module, "chunks", [module]):
        funcs = chunk.funcs if chunk is not module else chunk.forward_funcs
        funcs[:] = [LowRank(func) if isinstance(func, nn.Linear) else func for func in funcs]
    return losses(job.engine(module))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_layers_that_are_put_in_after_the_module_is_built(schedule: str) -> None:
    """Their parameters don't have what DeepSpeed's module marks its own with."""
    job = Job(schedule, 2, 3, {**FP32_ZERO1, "gradient_clipping": 0.5})
    assert run_ranks(2, train_adapters, job)[0] == run_ranks(2, train_adapters, replace(job, schedule=None))[0]
