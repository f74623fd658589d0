"""DeepSpeed's universal conversion carries optimizer state from one placement to another, bit for bit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from pipelines import (AFTER, BASE_SEED, BEFORE, BF16_ZERO1, BF16_ZERO1_FP32, FP32_ZERO1, Job, Outcome, assert_equal,
                       cross_entropy, merged, specs, train, train_and_save)
from ranks import run_ranks
from universal import convert

import ds_vshape
from ds_vshape.module.dummy_parameter import NAME

LAYERS = tuple(specs(7))


def load_and_train(rank: int, job: Job, folder: str) -> Outcome:
    engine = job.engine()
    engine.load_checkpoint(folder)
    return train(engine, AFTER)


CASES: dict[str, tuple[Any, int, Any, int, dict[str, Any]]] = {
    "from DeepSpeed's 1F1B to V": (None, 2, "v-half", 2, BF16_ZERO1),
    "from V to DeepSpeed's 1F1B": ("v-zb", 2, None, 2, BF16_ZERO1_FP32),
    "to more ranks": (None, 2, "v-min", 4, FP32_ZERO1),
    "to fewer ranks": ("v-half", 4, "zb-h1", 2, FP32_ZERO1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.quick_cases("from V to DeepSpeed's 1F1B")
def test_goes_on_with_equal_losses(case: str, tmp_path: Path) -> None:
    before, ranks_before, after, ranks_after, config = CASES[case]
    job = Job(before, ranks_before, 3, config, LAYERS)
    saved = merged(run_ranks(ranks_before, train_and_save, job, str(tmp_path)))
    convert(tmp_path)
    universal = {**config, "checkpoint": {"load_universal": True}}
    job = Job(after, ranks_after, 3, universal, LAYERS)
    loaded = merged(run_ranks(ranks_after, load_and_train, job, str(tmp_path)))
    assert_equal(loaded, saved)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


# What is wrong, and what is told on both ranks.
FAULTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a cut weight": (lambda folder: cut(folder / "zero/2.up.weight/fp32.pt"),
                     ("2.up.weight/fp32.pt is truncated or damaged",)),
    "a missing weight": (lambda folder: (folder / "zero/2.up.weight/fp32.pt").unlink(),
                         ("2.up.weight/fp32.pt is missing",)),
    "a missing state": (lambda folder: (folder / "zero/2.up.weight/exp_avg.pt").unlink(),
                        ("2.up.weight/exp_avg.pt is missing",)),
    "a cut state": (lambda folder: cut(folder / "zero/8.weight/exp_avg_sq.pt"), ("exp_avg_sq.pt is truncated",)),
    "a missing parameter": (lambda folder: shutil.rmtree(folder / "zero/2.up.weight"), ("2.up.weight/", "is missing")),
    "a cut state of the optimizer": (lambda folder: cut(folder / "zero/optimizer_state.pt"),
                                     ("optimizer_state.pt is truncated or damaged",)),
    "no state of the optimizer": (lambda folder: (folder / "zero/optimizer_state.pt").unlink(),
                                  ("optimizer_state.pt is missing",)),
    "a weight of another shape": (
        lambda folder: torch.save({"param": torch.zeros(3)}, folder / "zero/8.bias/fp32.pt"),
        ("8.bias/fp32.pt", "full param numel 3")),
    "a cut state file": (lambda folder: cut(folder / "mp_rank_00_model_states.pt"),
                         ("mp_rank_00_model_states.pt is truncated or damaged",)),
    "an empty latest": (lambda folder: (folder.parent / "latest_universal").write_text(""),
                        ("latest_universal is empty",)),
    "no latest": (lambda folder: (folder.parent / "latest_universal").unlink(), ("latest_universal",)),
}


def load_with_faults(rank: int, job: Job, folder: Path) -> tuple[dict[str, str], Outcome]:
    engine = job.engine()
    train(engine, BEFORE)
    told = {}
    for name, (damage, _) in FAULTS.items():
        place = folder.with_name("bad")
        if rank == 0:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(folder, place)
            damage(place / (place / "latest_universal").read_text())
        dist.barrier()
        with pytest.raises(Exception) as error:
            engine.load_checkpoint(str(place))
        told[name] = str(error.value)
        dist.barrier()
    return told, train(engine, AFTER)


@pytest.mark.slow
@pytest.mark.parametrize("config", [FP32_ZERO1, BF16_ZERO1_FP32])
def test_a_load_that_fails(config: dict[str, Any], tmp_path: Path) -> None:
    """Both ranks raise, with the file; training continues as if nothing had been loaded."""
    folder = tmp_path / "good"
    job = Job("v-half", 2, 3, config, LAYERS)
    whole = merged(run_ranks(2, train_and_save, job, str(folder)))
    convert(folder)
    universal = Job("v-half", 2, 3, {**config, "checkpoint": {"load_universal": True}}, LAYERS)
    results = run_ranks(2, load_with_faults, universal, folder)
    for told, _ in results:
        for name, (_, parts) in FAULTS.items():
            assert all(part in told[name] for part in parts), told[name]
    outcome = merged([outcome for _, outcome in results])
    assert_equal(outcome, whole)


# -- tensor parallel ranks whose layers are plain ones


def plain_layers_engine(job: Job) -> Any:
    """Tensor parallel ranks that all hold all of their stage: what the second trains, the first one counts."""
    topology = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=1)
    stock = job.schedule is None
    module_class = deepspeed.pipe.PipelineModule if stock else ds_vshape.PipelineModule
    options = {} if stock else {"config": job.ds_config()}
    module = module_class(job.specs(), topology=topology, loss_fn=cross_entropy, partition_method="uniform",
                          seed_layers=True, base_seed=BASE_SEED, **options)
    return ds_vshape.initialize(model=module, model_parameters=module.parameters(), config=job.ds_config())[0]


def save_or_load_plain(rank: int, job: Job, folder: str, loads: bool) -> Outcome:
    engine = plain_layers_engine(job)
    if loads:
        engine.load_checkpoint(folder)
    else:
        train(engine, BEFORE)
        engine.save_checkpoint(folder)
    outcome = train(engine, AFTER)
    outcome.weights.pop(NAME, None)
    return outcome


PLAIN_CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "from V to DeepSpeed's 1F1B": ("v-half", None, FP32_ZERO1),
    "from DeepSpeed's 1F1B to V": (None, "v-half", FP32_ZERO1),
    "from one schedule to another": ("zb-h1", "v-zb", BF16_ZERO1_FP32),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if number > 1 else ())
                                  for number, case in enumerate(PLAIN_CASES)])
@pytest.mark.slow
def test_plain_layers_on_tensor_parallel_ranks(case: str, tmp_path: Path) -> None:
    before, after, config = PLAIN_CASES[case]
    # DeepSpeed's own engine can't cut up what it sends of layers that aren't tensor parallel.
    config = {**config, "pipeline": {"pipe_partitioned": False, "grad_partitioned": False}}
    saved = merged(run_ranks(4, save_or_load_plain, Job(before, 2, 2, config, LAYERS), str(tmp_path), False))
    convert(tmp_path)
    universal = {**config, "checkpoint": {"load_universal": True}}
    loaded = merged(run_ranks(4, save_or_load_plain, Job(after, 2, 2, universal, LAYERS), str(tmp_path), True))
    assert_equal(loaded, saved)
