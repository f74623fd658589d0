"""A checkpoint continues on another number of data parallel ranks as if it had been trained there from the start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import BF16_ZERO1, BF16_ZERO1_FP32, FP32, FP32_ZERO1, LENGTH, SAMPLES, VOCABULARY, Job, tied_specs
from ranks import RanksFailed, run_ranks
from torch import Tensor

from ds_vshape.checkpoint.replicas import redistribute
from ds_vshape.deepspeed_adapter.optimizers import FlatGroup
from ds_vshape.finetuning.batches import WindowRows
from ds_vshape.finetuning.training import Training, TrainingPlan

ROWS = WindowRows(torch.arange(400) * 7 % VOCABULARY, LENGTH)
PLAN = TrainingPlan(ROWS, ROWS, batches=5)
MICRO_BATCHES = 4


def train(rank: int, replicas: int, plans: list[TrainingPlan], options: dict[str, Any],
          tied: bool) -> list[tuple[list[float], dict[str, Tensor]]]:
    """The losses and the rank's weights after each of several trainings, whose batches have the same rows however many
    replicas there are."""
    found = []
    for plan in plans:
        config = {"train_micro_batch_size_per_gpu": SAMPLES, **options}
        layers = tuple(tied_specs(3)) if tied else None
        engine = Job("v-half", 2, MICRO_BATCHES // replicas, config, layers).engine()
        losses = Training(engine, plan).run().losses
        found.append((losses, {name: value.clone() for name, value in engine.module.state_dict().items()}))
    return found


@pytest.mark.quick_cases("zero1-2-1")
@pytest.mark.parametrize("options, tied, before, after, rounding", [
    pytest.param(FP32, False, 1, 2, 1e-5, id="zero0-1-2"), pytest.param(FP32_ZERO1, False, 2, 1, 1e-5, id="zero1-2-1"),
    pytest.param(FP32_ZERO1, True, 1, 2, 1e-5, id="tied-1-2"),
    # Gradients are summed up over replicas in bf16: 8 bits.
    pytest.param(BF16_ZERO1, False, 1, 2, 2 ** -8, id="bf16-1-2"),
    pytest.param(BF16_ZERO1_FP32, False, 2, 1, 2 ** -8, id="bf16-fp32-2-1")])
def test_a_training_continues_on_other_replicas(options: dict[str, Any], tied: bool, before: int, after: int,
                                                rounding: float, tmp_path: Path) -> None:
    """The sum of gradients over replicas has another order, hence the rounding."""
    part = replace(PLAN, batches=2, save_every=2, checkpoints=tmp_path)
    run_ranks(2 * before, train, before, [part], options, tied)
    rest = replace(part, batches=5, save_every=0)
    for (whole, weights), (resumed, continued) in run_ranks(2 * after, train, after, [PLAN, rest], options, tied):
        assert resumed == pytest.approx(whole[2:], rel=rounding)
        for name, weight in weights.items():
            assert torch.allclose(continued[name], weight, rtol=rounding, atol=5 * rounding), name


@pytest.mark.slow
def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    part = replace(PLAN, batches=2, save_every=2, checkpoints=tmp_path)
    run_ranks(4, train, 2, [part], FP32_ZERO1, False)
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (tmp_path / "batch2" / name).unlink()
    with pytest.raises(RanksFailed) as failed:
        run_ranks(2, train, 1, [replace(part, batches=5)], FP32_ZERO1, False)
    assert str(failed.value).count(f"CheckpointError: {tmp_path}/batch2/{name}") >= 2


def saved(numbers: list[Tensor], replicas: int, whole: list[int]) -> list[dict[str, Any]]:
    """What replicas save of groups, the last one without the zeros that make the parts of `whole` alike."""
    parts = []
    for replica in range(replicas):
        masters, states = [], {}
        for number, (values, length) in enumerate(zip(numbers, whole, strict=True)):
            padded = torch.cat([values, values.new_zeros(length - len(values))]).chunk(replicas)[replica]
            room = length - len(values) if replica == replicas - 1 else 0
            masters.append(padded[:len(padded) - room])
            states[number] = {"step": torch.tensor(3.0), "exp_avg": 2 * padded}
        parts.append({"single_partition_of_fp32_groups": masters, "clip_grad": 1.0,
                      "base_optimizer_state": {"state": states, "param_groups": [{"lr": 0.1}]}})
    return parts


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (3, 2), (2, 4), (2, 2)])
def test_what_is_divided_otherwise_is_the_same(before: int, after: int) -> None:
    """Joined again it's what was saved: nothing is lost, and zeros fill up the last part."""
    numbers = [torch.arange(1.0, 12.0), torch.arange(1.0, 9.0)]
    parts = saved(numbers, before, [12, 12])
    groups = [FlatGroup(len(values), 12 // after) for values in numbers]
    divided = [redistribute(parts, groups, replica) for replica in range(after)]
    for number, values in enumerate(numbers):
        padded = torch.cat([values, torch.zeros(12 - len(values))])
        joined = torch.cat([each["single_partition_of_fp32_groups"][number] for each in divided])
        states = [each["base_optimizer_state"]["state"][number] for each in divided]
        assert torch.equal(joined, padded)
        assert torch.equal(torch.cat([state["exp_avg"] for state in states]), 2 * padded)
        assert all(state["step"] == 3 for state in states)
    assert all(each["clip_grad"] == 1 and each["base_optimizer_state"]["param_groups"] == [{"lr": 0.1}]
               for each in divided)
